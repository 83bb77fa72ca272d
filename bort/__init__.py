"""Bort: a small fast BERT, its pretraining by distillation, its fine-tuning, Agora and OSE."""

from bort import mxnet_setup

mxnet_setup.install()
