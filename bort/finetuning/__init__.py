"""Fine-tuning on GLUE, SuperGLUE and RACE, hyperparameter sweeps and their reports."""
