"""What pretraining and fine-tuning share: the loop, the optimizer and the reports."""
