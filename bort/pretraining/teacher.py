"""The frozen teacher: GluonNLP's RoBERTa or any shape of ours, loaded and never trained."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Protocol, Sequence

import gluonnlp as nlp
import numpy as np
from mxnet import nd

from bort import checkpoint
from bort.bort import build_network, set_dtype
from bort.devices import uses_gpu_code
from bort.encoder import fuse_qkv
from bort.errors import UserError
from bort.files import read_json
from bort.parameters import load_parameters, parameter_file
from bort.pretraining.distillation import distillation_kl
from bort.pretraining.mlm import DeviceBatch, masked_logits, to_device
from bort.saved_model import (
    body_options_of,
    model_config_path,
    read_model_config,
    verify_parameters,
)
from bort.shapes import ROBERTA, body_shape
from bort.tokenization import TOKENIZER_FOLDER, load_tokenizer_folder
from bort.types import Block, Context, NDArray
from data.batches import PretrainingLoader

# Batches on which a teacher in bfloat16 is compared with itself in float32.
CHECKED_BATCHES = 2


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
    not fit, and when a file beside it says that it was trained with another tokenizer.
    """
    path = parameter_file(checkpoint_path)
    require_same_tokenizer(path, tokenizer_fingerprint)
    require_shape(path, "--teacher_model", model_name)
    try:
        network = build_network(
            model_name, vocab_size, ctx, trainable=False, options=body_options_of(path)
        )
    except UserError as error:
        raise UserError(f"--teacher_model: {error}") from None
    load_parameters(network, path)
    network.encoder.hybridize(static_alloc=True)
    return network


def require_same_tokenizer(path: str, fingerprint: str) -> None:
    """Verify a parameter file by the files beside it: a checkpoint's state or a model config.

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
            f"{path}: trained with another tokenizer{_vocabulary_of(path)} than the one of the "
            "shards; teacher, student and shards need the same vocabulary"
        )


def _vocabulary_of(path: str) -> str:
    """Return kind and size of the vocabulary beside a parameter file, in parentheses."""
    tokenizer = load_tokenizer_folder(os.path.join(os.path.dirname(path), TOKENIZER_FOLDER))
    return f" ({tokenizer.name}, {tokenizer.vocab_size:,} tokens)" if tokenizer else ""


def require_shape(path: str, flag: str, model_name: str) -> None:
    """Raise `UserError` when the model config beside a parameter file states another shape."""
    if not os.path.exists(model_config_path(path)):
        return
    stated = read_model_config(path).model
    try:
        given = body_shape(model_name)
    except UserError as error:
        raise UserError(f"{flag}: {error}, or one of {', '.join(ROBERTA)}") from None
    if given != body_shape(stated):
        raise UserError(f"{flag} {model_name}: {path} is of the shape {stated}; give that")


class Teacher(Protocol):
    """A source of teacher logits: a network, or the cache of its outputs."""

    def logits(self, batch: DeviceBatch) -> NDArray:
        """Return the logits [n, vocabulary], float32, at the masked positions."""

    def use_bfloat16(self) -> None:
        """Make matrix products in bfloat16 from now on."""


class LiveTeacher:
    """A frozen network that is run on every batch."""

    def __init__(self, network: Block) -> None:
        self.network = network
        fuse_qkv(network.encoder)

    def logits(self, batch: DeviceBatch) -> NDArray:
        """Return the logits [n, vocabulary] of the network."""
        return masked_logits(self.network, batch)

    def use_bfloat16(self) -> None:
        """Make matrix products in bfloat16 from now on."""
        set_dtype(self.network, "bfloat16")
        fuse_qkv(self.network.encoder)


class OpenVinoTeacher:
    """A frozen network that OpenVINO runs on every batch."""

    def __init__(self, network: Block) -> None:
        """Take over the weights of a network on CPUs, which is not used later."""
        from bort.inference.onnx_graph import build
        from bort.inference.runtime import openvino_core

        self._core = openvino_core()
        graph = build(network).SerializeToString()
        self._model = self._core.read_model(graph, b"")  # without a file for the weights
        self._compile("float32")

    def _compile(self, precision: str) -> None:
        from bort.inference.runtime import openvino_options

        compiled = self._core.compile_model(self._model, "CPU", openvino_options(precision))
        self._request = compiled.create_infer_request()

    def logits(self, batch: DeviceBatch) -> NDArray:
        """Return the logits [n, vocabulary] of the network."""
        masked = batch.masked
        feed = {
            "input_ids": batch.host_ids,
            "valid_length": batch.valid_length.asnumpy(),
            "positions": masked.padded.asnumpy()[masked.flat.asnumpy()],
        }
        self._request.infer({name: values.astype(np.int64) for name, values in feed.items()})
        found = self._request.get_output_tensor(0).data
        return nd.array(found, ctx=batch.labels.context, dtype="float32")

    def use_bfloat16(self) -> None:
        """Make matrix products in bfloat16 from now on."""
        self._compile("bfloat16")


def require_openvino(devices: Sequence[Context]) -> None:
    """Raise `UserError` when OpenVINO cannot run a teacher for these devices."""
    if any(uses_gpu_code(device) for device in devices):
        raise UserError("--teacher_runtime openvino: is for CPUs; leave it out on GPUs")
    if not find_spec("openvino"):
        raise UserError(
            "--teacher_runtime openvino: needs the package openvino; run: pip install openvino"
        )


def round_teacher(teacher: Teacher, source: PretrainingLoader, device: Context) -> str:
    """Let a teacher multiply in bfloat16; returns what that costs on some batches, in words."""
    numbers = range(min(CHECKED_BATCHES, source.batches_per_epoch))
    batches = [to_device(source(number), device) for number in numbers]
    batches = [batch for batch in batches if batch.labels.size]
    exact = [teacher.logits(batch) for batch in batches]
    teacher.use_bfloat16()
    total, same, positions = 0.0, 0.0, 0
    for batch, logits in zip(batches, exact):
        rounded = teacher.logits(batch)
        total += float(distillation_kl(rounded, logits, temperature=1.0).sum().asscalar())
        same += float((rounded.argmax(axis=1) == logits.argmax(axis=1)).sum().asscalar())
        positions += batch.labels.size
    return (
        f"teacher in bfloat16: {total / max(positions, 1):.2g} nats of KL from float32's "
        f"distributions, the same first word at {100 * same / max(positions, 1):.1f} % of "
        f"{positions} masked positions"
    )
