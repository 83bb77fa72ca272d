"""Export of a saved model to an ONNX file, compared with MXNet before it is written."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np

from bort.errors import UserError
from bort.files import refuse_overwriting
from bort.inference.onnx_file import onnx_session, write_onnx
from bort.inference.onnx_graph import OPSET, build
from bort.inference.runtime import metadata_of, onnx_path
from bort.mxnet_setup import cpu_threads
from bort.parameters import check_finite, parameter_file
from bort.saved_model import load_model, model_config_path
from bort.types import Block

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

TOLERANCE = 1e-4


class Export(NamedTuple):
    """A written file, how far it is from MXNet, and its description in one line."""

    path: str
    difference: float
    largest: float
    description: str


def export_onnx(model: str, output: Optional[str] = None) -> Export:
    """Write a saved model as an ONNX file, by default beside its parameters.

    model: a .params file, its folder, a checkpoint or a run.

    Raises `UserError` when the model cannot be loaded, when ONNX Runtime's outputs differ from
    MXNet's by more than `TOLERANCE`, and when the file cannot be written or is the model's own.
    """
    source = parameter_file(model)
    path = output or onnx_path(source)
    refuse_overwriting(path, source, model_config_path(source))
    saved = load_model(source)
    check_finite(source, saved.network)
    graph = build(saved.network, metadata=metadata_of(source, saved.model_config))
    session = onnx_session(graph.SerializeToString(), cpu_threads())
    difference, largest = compare_with_mxnet(saved.network, session)
    if not difference <= TOLERANCE * max(1.0, largest):  # false for NaN, too
        raise UserError(
            f"{source}: ONNX Runtime differs from MXNet by {difference:.1e}; nothing is written"
        )
    write_onnx(graph, path)
    description = (
        f"{saved.model_config.kind} of {saved.model_config.model}, {len(graph.graph.node)} nodes, "
        f"opset {OPSET}, {os.path.getsize(path) / 1e6:,.1f} MB"
    )
    return Export(path, difference, largest, description)


def compare_with_mxnet(network: Block, session: InferenceSession) -> tuple[float, float]:
    """Compare a graph in ONNX Runtime with its network in MXNet, on random batches with padding.

    Returns the largest difference and the largest absolute value of the outputs.
    """
    differences, largest = [], 0.0
    for feed in random_inputs(network):
        expected = mxnet_outputs(network, feed)
        (found,) = session.run(None, feed)
        differences.append(float(np.abs(found - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    return max(differences), largest


def random_inputs(network: Block, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Return batches for a network, the first as long as its position table, others with padding.

    Each has input_ids [batch, length] and valid_length [batch], for a masked LM also `positions`
    [batch] of the flattened batch: the last of each sequence before its padding.
    """
    generator = np.random.default_rng(seed)
    body: Block = getattr(network, "bort", network)
    vocab_size, positions = body.word_embed[0].weight.shape[0], body.encoder._max_length
    feeds = []
    for batch, length in ((1, positions), (5, min(40, positions)), (2, 1)):
        ids = generator.integers(0, vocab_size, (batch, length))
        lengths = generator.integers(1, length + 1, batch)
        feeds.append({"input_ids": ids, "valid_length": lengths})
        if body is network:
            feeds[-1]["positions"] = np.arange(batch) * length + lengths - 1
    return feeds


def mxnet_outputs(network: Block, feed: dict[str, np.ndarray]) -> np.ndarray:
    """Return the logits: [batch, outputs], or [masks, vocabulary] where there are `positions`."""
    from mxnet import nd

    from bort.bort import decode, encode, masked_hidden

    ids, lengths = (nd.array(feed[name], dtype="float32") for name in ("input_ids", "valid_length"))
    if "positions" not in feed:
        return network(ids, lengths).asnumpy()
    hidden = masked_hidden(network, encode(network, ids, lengths), nd.array(feed["positions"]))
    return decode(network, hidden).asnumpy()
