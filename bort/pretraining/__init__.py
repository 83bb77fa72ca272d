"""Pretraining: masked language modelling with knowledge distillation."""
