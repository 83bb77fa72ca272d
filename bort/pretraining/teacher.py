"""The frozen teacher: GluonNLP's RoBERTa or any shape of ours, loaded and never trained."""

from __future__ import annotations

import os
from typing import Protocol, Sequence

import gluonnlp as nlp

from bort import checkpoint
from bort.bort import build_network
from bort.encoder import fuse_qkv
from bort.errors import UserError
from bort.files import read_json
from bort.parameters import load_parameters, parameter_file
from bort.pretraining.mlm import DeviceBatch, masked_logits
from bort.saved_model import model_config_path, read_model_config, verify_parameters
from bort.types import Block, Context, NDArray


def load_teacher(
    model_name: str,
    checkpoint_path: str,
    vocab_size: int,
    tokenizer_fingerprint: str,
    ctx: Sequence[Context],
) -> nlp.model.BERTModel:
    """Build a teacher and load its weights, which get no gradients.

    `checkpoint_path` is a parameter file, a checkpoint folder, or the folder of a run of the
    pretraining program. Raises `UserError` when there is no such file, when it is damaged or does
    not fit, and when what lies beside it says that it was trained with another tokenizer.
    """
    path = parameter_file(checkpoint_path)
    require_tokenizer(path, tokenizer_fingerprint)
    try:
        network = build_network(model_name, vocab_size, ctx, trainable=False)
    except UserError as error:
        raise UserError(f"--teacher_model: {error}") from None
    load_parameters(network, path)
    network.encoder.hybridize(static_alloc=True)
    return network


def require_tokenizer(path: str, fingerprint: str) -> None:
    """Verify a parameter file by what lies beside it: a checkpoint's state or a model config.

    Raises `UserError` when the file is damaged, or when the network was trained with another
    tokenizer: every id would stand for another token. A bare file has nothing beside it.
    """
    found = []
    state = os.path.join(os.path.dirname(path), checkpoint.STATE)
    if os.path.basename(path) == checkpoint.MODEL and os.path.exists(state):
        content = read_json(state)
        found.append(content.get("tokenizer_fingerprint") if isinstance(content, dict) else None)
    if os.path.exists(model_config_path(path)):
        model_config = read_model_config(path)
        verify_parameters(path, model_config)
        found.append(model_config.tokenizer_fingerprint)
    if any(each and each != fingerprint for each in found):
        raise UserError(
            f"{path}: trained with another tokenizer than the one of the shards; teacher and "
            "student need the same vocabulary"
        )


class Teacher(Protocol):
    """A source of teacher logits: a network, or the cache of its outputs."""

    def logits(self, batch: DeviceBatch) -> NDArray:
        """Return the logits [n, vocabulary], float32, at the masked positions."""


class LiveTeacher:
    """A frozen network that is run on every batch."""

    def __init__(self, network: Block) -> None:
        self.network = network
        fuse_qkv(network.encoder)

    def logits(self, batch: DeviceBatch) -> NDArray:
        """Return the logits [n, vocabulary] of the network."""
        return masked_logits(self.network, batch)
