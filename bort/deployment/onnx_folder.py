"""A saved model as a folder of ONNX files that optimum and transformers.js load.

config.json, tokenizer.json, tokenizer_config.json, ...   as for transformers
onnx/model.onnx                                           float32
onnx/model_quantized.onnx                                 int8
README.md, SHA256SUMS                                     the model card; sums of all files
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Mapping, NamedTuple

import numpy as np

from bort.bort import types_of
from bort.errors import UserError
from bort.files import new_folder
from bort.huggingface.families import Architecture
from bort.huggingface.folder import (
    architecture_for,
    require_tokenizer,
    usual_family,
    write_description,
)
from bort.huggingface.model_card import model_card
from bort.inference.onnx_export import TOLERANCE, mxnet_outputs, random_inputs
from bort.inference.onnx_file import onnx_session, write_onnx
from bort.inference.onnx_graph import describe
from bort.inference.onnx_huggingface import build_huggingface
from bort.inference.runtime import metadata_of
from bort.mxnet_setup import cpu_threads
from bort.parameters import check_finite, parameter_file
from bort.saved_model import MASKED_LM, SavedModel, load_model
from bort.shapes import CLS
from bort.sums import write_sums
from bort.types import TaskKind

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ONNX_FOLDER = "onnx"
# {precision: the name under which transformers.js and optimum look for it}
FILES: Mapping[str, str] = {"float32": "model.onnx", "int8": "model_quantized.onnx"}


class Comparison(NamedTuple):
    """The graphs against MXNet, on random inputs with padding.

    difference: the largest of float32; largest: the largest absolute logit; cosine: the similarity
    of all logits of int8 to MXNet's.
    """

    difference: float
    largest: float
    cosine: float


class FolderExport(NamedTuple):
    """A written folder: its comparison, and a description in one line."""

    comparison: Comparison
    description: str


def export_folder(model: str, output: str) -> FolderExport:
    """Write a saved model, checkpoint or run as a new folder with Hugging Face's ONNX layout.

    Raises `UserError` when the model cannot be loaded or has no tokenizer, when the folder exists,
    and when logits differ from MXNet's by more than `TOLERANCE`; then the folder is not made.
    """
    source = parameter_file(model)
    saved = load_model(source)
    check_finite(source, saved.network)
    architecture = onnx_architecture(saved)
    special_tokens = require_tokenizer(saved).special_tokens
    with new_folder(output) as folder:
        card = model_card(saved.model_config, architecture, special_tokens, is_onnx=True)
        write_description(folder, saved, architecture, card)
        comparison = write_graphs(os.path.join(folder, ONNX_FOLDER), source, saved, tuple(FILES))
        write_sums(folder)
        sizes = [
            f"{os.path.getsize(os.path.join(folder, ONNX_FOLDER, name)) / 1e6:,.1f}"
            for name in FILES.values()
        ]
    description = (
        f"{output}: {architecture.name} of {saved.model_config.model}, {' and '.join(sizes)} MB"
    )
    return FolderExport(comparison, description)


def onnx_architecture(saved: SavedModel) -> Architecture:
    """Return the architecture whose inputs and outputs the graph has.

    What a graph computes, it says itself: neither a second dense layer nor mean pooling is a
    hindrance.
    """
    plain = dataclasses.replace(saved.model_config, extra_layer=False, pooling=CLS)
    return architecture_for(plain, usual_family(require_tokenizer(saved)))


def write_graphs(
    folder: str, source: str, saved: SavedModel, precisions: tuple[str, ...]
) -> Comparison:
    """Write the graphs of a network into a new folder, after they were compared with MXNet.

    source: the .params file of the network. precisions: of `FILES`.

    Raises `UserError` when float32 differs from MXNet by more than `TOLERANCE`.
    """
    os.makedirs(folder)
    network, kind = saved.network, saved.model_config.kind
    metadata = metadata_of(source, saved.model_config)
    described = describe(network)
    feeds = random_inputs(network)
    expected = [mxnet_outputs(network, feed) for feed in feeds]
    separator = described.options.type_separator
    if separator is not None:
        for feed in feeds:
            feed["token_type_ids"] = types_of(feed["input_ids"], separator).astype(np.int64)
    found = {}
    for precision, name in FILES.items():
        graph = build_huggingface(described, kind, precision, metadata)
        session = onnx_session(graph.SerializeToString(), cpu_threads())
        found[precision] = [run(session, kind, feed) for feed in feeds]
        if precision in precisions:
            write_onnx(graph, os.path.join(folder, name))
    comparison = _compare(expected, found)
    if not comparison.difference <= TOLERANCE * max(1.0, comparison.largest):  # NaN, too
        raise UserError(
            f"{source}: ONNX Runtime differs from MXNet by {comparison.difference:.1e}; nothing "
            "is written"
        )
    return comparison


def run(session: InferenceSession, kind: str, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the logits of a graph for the inputs of ours: [batch, outputs] or [masks, vocabulary].

    feed: input_ids [batch, length], valid_length [batch], of a masked LM `positions` [masks], of a
        body with token types token_type_ids [batch, length].
    """
    ids, lengths = feed["input_ids"], feed["valid_length"]
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    # The options of a multiple choice are one example.
    wrapped = (np.s_[None],) if kind == TaskKind.MULTIPLE_CHOICE else ()
    given = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in feed:
        given["token_type_ids"] = feed["token_type_ids"]
    (logits,) = session.run(None, {name: array[wrapped] for name, array in given.items()})
    if kind == MASKED_LM:
        return logits.reshape(-1, logits.shape[-1])[feed["positions"]]
    return logits.reshape(len(ids), -1)


def _compare(expected: list[np.ndarray], found: Mapping[str, list[np.ndarray]]) -> Comparison:
    exact, full, small = (
        np.concatenate([logits.ravel() for logits in one]).astype(np.float64)
        for one in (expected, found["float32"], found["int8"])
    )
    return Comparison(
        float(np.abs(full - exact).max()),
        float(np.abs(exact).max()),
        float(small @ exact / np.sqrt((small @ small) * (exact @ exact))),
    )
