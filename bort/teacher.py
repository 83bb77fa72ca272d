"""The frozen teacher: GluonNLP's RoBERTa or any shape of ours, loaded and never trained."""

from __future__ import annotations

import os
from typing import Any, Sequence

import gluonnlp as nlp
import mxnet as mx

from bort import checkpoint
from bort.bort import get_bort_model, initialize, load_parameters
from bort.config import read_json
from bort.errors import UserError
from bort.parameters import parameter_file
from bort.shapes import ROBERTA, shape_of


def build_network(
    model_name: str,
    vocab_size: int,
    ctx: Any,
    use_decoder: bool = True,
    dropout: float = 0.0,
    draw: bool = True,
    gradients: bool = True,
) -> nlp.model.BERTModel:
    """Build a network with random weights: one of GluonNLP's RoBERTa models or a shape of ours.

    Without `draw` the weights are zero, for whoever loads others at once; without `gradients` it
    cannot be trained.

    Raises `UserError` for any other name.
    """
    vocab = range(vocab_size)  # asked for nothing but its length
    if model_name in ROBERTA:
        network, _ = nlp.model.get_model(
            model_name, vocab=vocab, pretrained=False, use_decoder=use_decoder, dropout=dropout
        )
        initialize(network, ctx or mx.cpu(), draw, gradients)
        return network
    try:
        shape_of(model_name)
    except UserError as error:
        raise UserError(f"{error}, or one of {', '.join(ROBERTA)}") from None
    return get_bort_model(
        model_name,
        vocab=vocab,
        ctx=ctx,
        use_decoder=use_decoder,
        dropout=dropout,
        draw=draw,
        gradients=gradients,
    )[0]


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
        network = build_network(model_name, vocab_size, ctx, gradients=False)
    except UserError as error:
        raise UserError(f"--teacher_model: {error}") from None
    load_parameters(network, path)
    network.encoder.hybridize(static_alloc=True)
    return network
