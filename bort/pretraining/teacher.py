"""The frozen teacher: GluonNLP's RoBERTa or any shape of ours, loaded and never trained."""

from __future__ import annotations

import os
from typing import Any, Protocol, Sequence

import gluonnlp as nlp

from bort import checkpoint
from bort.bort import build_network
from bort.encoder import fuse_qkv
from bort.errors import UserError
from bort.files import read_json
from bort.parameters import load_parameters, parameter_file
from bort.pretraining.mlm import DeviceBatch, masked_logits


def load_teacher(
    model_name: str,
    checkpoint_path: str,
    vocab_size: int,
    tokenizer_fingerprint: str,
    ctx: Sequence[Any],
) -> nlp.model.BERTModel:
    """Build a teacher and load its weights, which get no gradients.

    `checkpoint_path` is a parameter file, a checkpoint folder, or the folder of a run of the
    pretraining program. Raises `UserError` when there is no such file, when it does not fit, and
    when it says that it was trained with another tokenizer.
    """
    path = parameter_file(checkpoint_path)
    state = os.path.join(os.path.dirname(path), checkpoint.STATE)
    if os.path.exists(state) and read_json(state)["tokenizer_fingerprint"] != tokenizer_fingerprint:
        raise UserError(
            f"{path}: trained with another tokenizer than the one of the shards; teacher and "
            "student need the same vocabulary"
        )
    try:
        network = build_network(model_name, vocab_size, ctx, trainable=False)
    except UserError as error:
        raise UserError(f"--teacher_model: {error}") from None
    load_parameters(network, path)
    network.encoder.hybridize(static_alloc=True)
    return network


class Teacher(Protocol):
    """Whoever knows the right distributions: a network, or the cache of one."""

    def logits(self, batch: DeviceBatch) -> Any:
        """Return the logits [n, vocabulary], float32, at the masked positions."""


class LiveTeacher:
    """A frozen network that is run on every batch."""

    def __init__(self, network: Any) -> None:
        self.network = network
        fuse_qkv(network.encoder)

    def logits(self, batch: DeviceBatch) -> Any:
        """Return the logits [n, vocabulary] of the network."""
        return masked_logits(self.network, batch)
