"""Bort: a small fast BERT, its pretraining by distillation, its fine-tuning, Agora and OSE."""

from bort import errors, mxnet_setup

errors.install_interrupt_hook()
mxnet_setup.install()
