"""The encoder of GluonNLP's BERTModel for CPUs: the same parameters, the same values, faster.

On a CPU, MXNet 1.9.1 takes ten times as long for the gradient of LayerNorm as its arithmetic needs,
and is slow in the softmax with lengths and the attention over interleaved heads that GluonNLP
0.10.0 is built of. Here LayerNorm has a gradient of matrix products, and attention is made of
operators that oneDNN computes. RESULTS.md has the times.

`autograd.Function` is not used: in MXNet 1.9.1 it loses gradients that are added to others, and
hangs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional, Sequence

import gluonnlp as nlp
import numpy as np
from mxnet import autograd, nd, sym

from bort import bfloat16
from bort.dropout import dropout
from bort.types import Block, Context, NDArray

# Added to the attention scores of padding: the exponential of the sum is 0.
MASK_VALUE = -1e30
# With rows of a multiple of so many values, 4 KiB, oneDNN's product takes a sixth longer than
# OpenBLAS's, whose gradient is the slower one.
ALIASED = 1024


class GatherIndices(NamedTuple):
    """Positions of a batch at which alone the encoding is computed (see `gather_indices`).

    The same number is computed of each sequence: those with fewer are filled up with token 0.
    """

    padded: NDArray  # [batch * most] int32, into the flattened [batch * length] grid
    flat: NDArray  # [n] int32, into `padded`


def gather_indices(
    positions: np.ndarray, batch: int, length: int, device: Context
) -> GatherIndices:
    """Return the indices of positions [n] of the flattened grid, sorted by sequence."""
    sequences = positions // length  # [n]
    counts = np.bincount(sequences, minlength=batch)  # [batch]
    ordinals = np.arange(len(positions)) - (np.cumsum(counts) - counts)[sequences]  # [n]
    most = max(1, int(counts.max()))
    padded = np.repeat(length * np.arange(batch)[:, None], most, axis=1)  # [batch, most]
    padded[sequences, ordinals] = positions
    flat = sequences * most + ordinals
    return GatherIndices(
        nd.array(padded.reshape(-1), ctx=device, dtype="int32"),
        nd.array(flat, ctx=device, dtype="int32"),
    )


def encode_embedding(
    encoder: nlp.model.BERTEncoder,
    embedding: NDArray,
    valid_length: NDArray,
    breaks: Optional[list[GraphBreak]] = None,
    cls_only: bool = False,
    positions: Optional[GatherIndices] = None,
) -> NDArray:
    """Encode word embeddings [batch, length, units]; returns the same shape.

    Args:
        encoder: GluonNLP's encoder, whose parameters are used.
        embedding: [batch, length, units].
        valid_length: [batch], of the embedding's type; positions at and beyond it come out zero.
        breaks: with a list the recorded graph is broken at every LayerNorm and the breaks are
            appended; `backward` differentiates the graph.
        cls_only: the last layer is computed for token 0 alone; returns [batch, 1, units].
        positions: it is computed for n positions; returns [n, units].
    """
    batch, length, units = embedding.shape
    table = encoder.position_weight.data(embedding.context)[:length]  # [length, units]
    # An outer product repeats it: MXNet's broadcast sums its gradient slowly.
    ones = nd.ones((batch, 1), ctx=embedding.context, dtype=embedding.dtype)
    repeated = nd.dot(ones, table.reshape((1, -1)))  # [batch, length * units]
    summed = nd.elemwise_add(embedding.reshape((-1,)), repeated.reshape((-1,)))
    hidden_states = summed.reshape((-1, units))  # [batch * length, units]
    hidden_states = layer_norm(
        encoder.layer_norm, dropout(hidden_states, p=encoder._dropout), breaks
    )
    mask = additive_mask(valid_length, length)
    *cells, last = encoder.transformer_cells
    heads = last.attention_cell._num_heads
    full = attention_mask(mask, heads, length)
    for cell in cells:
        attended = self_attention(cell.attention_cell, hidden_states, full)
        hidden_states = output_layer(cell, attended, hidden_states, breaks)
    if cls_only:
        attended = cls_attention(last.attention_cell, hidden_states, mask)
        cls = hidden_states.reshape((batch, -1)).slice_axis(axis=1, begin=0, end=units)
        return output_layer(last, attended, cls, breaks).expand_dims(1)
    if positions is not None:
        queries = hidden_states.take(positions.padded)  # [batch * most, units]
        some = attention_mask(mask, heads, queries.shape[0] // batch)
        attended = self_attention(last.attention_cell, hidden_states, some, queries)
        return output_layer(last, attended, queries, breaks).take(positions.flat)
    attended = self_attention(last.attention_cell, hidden_states, full)
    hidden_states = output_layer(last, attended, hidden_states, breaks)
    sequence = hidden_states.reshape((batch, length, units))
    return nd.SequenceMask(sequence, valid_length, use_sequence_length=True, axis=1)


def output_layer(
    cell: Block, attended: NDArray, hidden_states: NDArray, breaks: Optional[list[GraphBreak]]
) -> NDArray:
    """Return what a layer makes of its input and its attention, both [n, units]: [n, units]."""
    attended = dropout(dense(cell.proj, attended), p=cell._dropout)
    hidden_states = layer_norm(cell.layer_norm, nd.elemwise_add(attended, hidden_states), breaks)
    inner = nd.LeakyReLU(dense(cell.ffn.ffn_1, hidden_states), act_type="gelu")
    outer = dropout(dense(cell.ffn.ffn_2, inner), p=cell.ffn._dropout)
    return layer_norm(cell.ffn.layer_norm, nd.elemwise_add(outer, hidden_states), breaks)


def additive_mask(valid_length: NDArray, length: int) -> NDArray:
    """Return what is added to attention scores, [batch, length]: 0, and MASK_VALUE for padding."""
    positions = nd.arange(length, ctx=valid_length.context, dtype=valid_length.dtype)
    return MASK_VALUE * nd.broadcast_greater_equal(
        positions.reshape((1, -1)), valid_length.reshape((-1, 1))
    )


def attention_mask(mask: NDArray, heads: int, queries: int) -> NDArray:
    """Repeat an additive mask [batch, length] for heads and queries.

    Returns [batch, heads, queries, length]. MXNet's broadcast_add would do it in every layer, and
    would sum a gradient that nothing uses.
    """
    batch, length = mask.shape
    return mask.reshape((batch, 1, 1, length)).broadcast_to((batch, heads, queries, length))


def self_attention(
    cell: Block, hidden_states: NDArray, mask: NDArray, queries: Optional[NDArray] = None
) -> NDArray:
    """Attend within each sequence, before the output projection.

    Args:
        cell: GluonNLP's DotProductSelfAttentionCell.
        hidden_states: [batch * length, units].
        mask: [batch, heads, queries, length], see `attention_mask`.
        queries: [batch * most, units], some of the hidden states: these alone attend to all.

    Returns [batch * length, units], with `queries` [batch * most, units].
    """
    fused = getattr(cell, "fused_qkv", {}).get(hidden_states.context)
    if fused and queries is None:
        return _fused_attention(cell, hidden_states, fused, mask)
    if queries is None:
        queries = hidden_states
    heads, units = cell._num_heads, cell.units
    batch, width, device = mask.shape[0], units // heads, mask.context
    # [batch * positions, units] -> [batch, positions, heads, width] -> [batch, heads, .., width];
    # another shape would be another copy of the gradient.
    query, key, value = (
        affine(inputs, bfloat16.operand(weight, device), bfloat16.operand(bias, device))
        .reshape((batch, -1, heads, width))
        .transpose((0, 2, 1, 3))
        for inputs, weight, bias in zip(
            (queries, hidden_states, hidden_states), *_projections(cell)
        )
    )
    scores = nd.batch_dot(query * width**-0.5, key, transpose_b=True)
    context = nd.batch_dot(attention_probs(cell, scores, mask), value)
    # [batch, heads, positions, width] -> [batch, positions, heads, width] -> [.., units]
    return context.transpose((0, 2, 1, 3)).reshape((-1, units))


def attention_probs(cell: Block, scores: NDArray, mask: NDArray) -> NDArray:
    """Return the probabilities of scores and additive mask, all of one shape [..., length].

    Dropout is applied to them.
    """
    # Detached: a graph that is broken is freed piece by piece, and no piece may share a node.
    scores = nd.elemwise_add(scores, mask.detach())
    return dropout(nd.softmax(scores, axis=-1), p=cell._dropout)


def _fused_attention(
    cell: Block, hidden_states: NDArray, fused: tuple[NDArray, NDArray], mask: NDArray
) -> NDArray:
    """Attend by MXNet's own attention, faster than batches of products for narrow heads.

    It takes the three projections head by head, and sequences side by side.
    """
    (batch, _, _, length), units = mask.shape, cell.units
    mask = mask.reshape((-3, 0, 0))  # [batch * heads, length, length]
    by_position = hidden_states.reshape((batch, length, units)).transpose((1, 0, 2))
    projected = affine(by_position.reshape((-1, units)), *fused)
    projected = projected.reshape((length, batch, 3 * units))
    scores = nd.contrib.interleaved_matmul_selfatt_qk(projected, heads=cell._num_heads)
    attended = nd.contrib.interleaved_matmul_selfatt_valatt(
        projected, attention_probs(cell, scores, mask), heads=cell._num_heads
    )
    return attended.transpose((1, 0, 2)).reshape((-1, units))  # [batch * length, units]


def _projections(cell: Block) -> tuple[list[Block], list[Block]]:
    """Return the weights [units, units] and biases [units] of queries, keys and values."""
    weights, biases = (
        [getattr(cell, f"{name}_{part}") for name in ("query", "key", "value")]
        for part in ("weight", "bias")
    )
    return weights, biases


def _fused(cell: Block, device: Context) -> tuple[NDArray, NDArray]:
    """Return the three projections head by head: [3 * units, units] and [3 * units]."""
    heads, units = cell._num_heads, cell.units
    weights, biases = _projections(cell)
    weight = nd.concat(*[w.data(device).reshape((heads, -1, units)) for w in weights], dim=1)
    bias = nd.concat(*[b.data(device).reshape((heads, -1)) for b in biases], dim=1)
    weight, bias = weight.reshape((-1, units)), bias.reshape((-1,))
    if bfloat16.has_copies(weights[0]):
        return bfloat16.rounded(weight), bfloat16.rounded(bias)
    return weight, bias


def fuse_qkv(encoder: nlp.model.BERTEncoder) -> None:
    """Fuse the projections of a float32 encoder on CPUs, whose weights must not change later."""
    for cell in (layer.attention_cell for layer in encoder.transformer_cells):
        devices = [device for device in cell.query_weight.list_ctx() if device.device_type != "gpu"]
        cell.fused_qkv = {device: _fused(cell, device) for device in devices}


def cls_attention(cell: Block, hidden_states: NDArray, mask: NDArray) -> NDArray:
    """Attend from token 0 of each sequence alone; returns [batch, units].

    With q its query, x the sequence and p its attention, neither keys nor values are computed:
    q (x K + k)' = (q K') x' + q k', and p (x V + v) = (p x) V + v * sum(p).
    """
    batch, length = mask.shape
    heads, units = cell._num_heads, cell.units
    width = units // heads

    def of_heads(name: str) -> tuple[NDArray, NDArray]:
        """Return weight [heads, width, units] and bias [heads, 1, width] of a projection."""
        weight, bias = (
            getattr(cell, f"{name}_{part}").data(hidden_states.context)
            for part in ("weight", "bias")
        )
        return weight.reshape((heads, width, units)), bias.reshape((heads, 1, width))

    (query, query_bias), (key, key_bias), (value, value_bias) = map(
        of_heads, ("query", "key", "value")
    )
    sequence = hidden_states.reshape((batch, length, units))
    cls = hidden_states.reshape((batch, -1)).slice_axis(axis=1, begin=0, end=units)
    queries = nd.batch_dot(cls.expand_dims(0).tile((heads, 1, 1)), query, transpose_b=True)
    queries = nd.broadcast_add(queries, query_bias) * width**-0.5  # [heads, batch, width]
    keyed = nd.batch_dot(queries, key).transpose((1, 0, 2))  # [batch, heads, units]
    constant = nd.batch_dot(queries, key_bias, transpose_b=True).transpose((1, 0, 2))
    scores = nd.batch_dot(keyed, sequence, transpose_b=True)  # [batch, heads, length]
    scores = nd.broadcast_add(nd.broadcast_add(scores, constant), mask.expand_dims(1))
    probs = dropout(nd.softmax(scores, axis=-1), p=cell._dropout)
    mixed = nd.batch_dot(probs, sequence).transpose((1, 0, 2))  # [heads, batch, units]
    totals = probs.sum(axis=-1, keepdims=True).transpose((1, 0, 2))  # [heads, batch, 1]
    values = nd.batch_dot(mixed, value, transpose_b=True) + nd.batch_dot(totals, value_bias)
    return values.transpose((1, 0, 2)).reshape((batch, units))


def dense(layer: Block, inputs: NDArray) -> NDArray:
    """Apply a Gluon Dense layer, without its activation, to inputs [n, in]; returns [n, out]."""
    parameters = (layer.weight, layer.bias)
    return affine(inputs, *(bfloat16.operand(p, inputs.context) for p in parameters))


def affine(inputs: NDArray, weight: NDArray, bias: NDArray) -> NDArray:
    """Multiply inputs [n, in] by weight [out, in] and add bias [out]; returns [n, out]."""
    if weight.dtype == bfloat16.DTYPE:
        return bfloat16.product(inputs, weight, bias)
    if autograd.is_recording() or weight.shape[1] % ALIASED:
        return nd.FullyConnected(inputs, weight, bias, num_hidden=len(bias))
    return nd.broadcast_add(nd.dot(inputs, weight, transpose_b=True), bias.reshape((1, -1)))


class GraphBreak(NamedTuple):
    """A LayerNorm at which the recorded graph is broken: autograd does not differentiate it."""

    layer: Block
    inputs: NDArray  # [n, units], the end of the graph before the break
    outputs: NDArray  # [n, units], a leaf of the graph after it
    mean: NDArray
    deviation: NDArray


def layer_norm(layer: Block, inputs: NDArray, breaks: Optional[list[GraphBreak]] = None) -> NDArray:
    """Apply a Gluon LayerNorm to inputs [n, units]; with `breaks`, break the recorded graph."""
    gamma, beta = (p.data(inputs.context) for p in (layer.gamma, layer.beta))
    if breaks is None or not autograd.is_recording():
        return nd.LayerNorm(inputs, gamma, beta, axis=-1, eps=layer._epsilon)
    with autograd.pause():
        outputs, mean, deviation = nd.LayerNorm(
            inputs, gamma, beta, axis=-1, eps=layer._epsilon, output_mean_var=True
        )
    make_leaf(outputs)
    breaks.append(GraphBreak(layer, inputs, outputs, mean, deviation))
    return outputs


def make_leaf(array: NDArray) -> None:
    """Let a backward pass write the gradient of an array, to which nothing has led so far.

    `attach_grad` would fill it with zeros first.
    """
    gradient = nd.empty(array.shape, ctx=array.context, dtype=array.dtype)
    autograd.mark_variables([array], [gradient])


def backward(
    head: NDArray, breaks: Sequence[GraphBreak], gradient: Optional[NDArray] = None
) -> None:
    """Differentiate a loss [1], or an array with its gradient, whose graph was broken.

    From the last break to the first.
    """
    head.backward(gradient)
    for graph_break in reversed(breaks):
        graph_break.inputs.backward(_through_layer_norm(graph_break))


def _through_layer_norm(at: GraphBreak) -> NDArray:
    """Return the gradient of a break's inputs [n, units]; add those of gamma and beta."""
    gamma = at.layer.gamma.data(at.inputs.context)
    arrays = {
        "inputs": at.inputs,
        "gradient": at.outputs.grad,
        "gamma": gamma.reshape((1, -1)),
        "gamma_column": gamma.reshape((-1, 1)),
        "mean": at.mean.reshape((-1, 1)),
        "deviation": at.deviation.reshape((-1, 1)),
    }
    names, operators = _layer_norm_gradient(at.inputs.shape[1])
    gradient, of_gamma, of_beta = operators(*(arrays[name] for name in names))
    _add_gradient(at.layer.gamma, of_gamma.reshape((-1,)))
    _add_gradient(at.layer.beta, of_beta.reshape((-1,)))
    return gradient


@functools.cache
def _layer_norm_gradient(units: int) -> tuple[list[str], nd.CachedOp]:
    """Return the gradient of LayerNorm over rows of `units` as one operator, and its inputs' names.

    To call its operators one by one would take Python longer than some of them take. Shapes are
    changed outside of it, where that copies nothing.

    With x the normalised inputs, s the deviation and g = gradient * gamma the gradient of the
    inputs is (g - mean(g) - x * mean(g * x)) / s (Ba et al., Layer Normalization). Sums are
    products with ones: MXNet's own sums along an axis are slow.
    """
    # [n, units] twice, [1, units], [units, 1], [n, 1] twice
    inputs, gradient, gamma, column, mean, deviation = map(
        sym.var, ("inputs", "gradient", "gamma", "gamma_column", "mean", "deviation")
    )
    inverse = 1 / deviation
    x = sym.broadcast_mul(sym.broadcast_sub(inputs, mean), inverse)
    product = sym.elemwise_mul(gradient, x)
    ones = sym.ones_like(mean)
    of_gamma, of_beta = (sym.dot(ones, each, transpose_a=True) for each in (product, gradient))
    shares = column / units
    mean_g, mean_gx = sym.dot(gradient, shares), sym.dot(product, shares)  # [n, 1]
    g = sym.broadcast_mul(gradient, gamma)
    inner = sym.elemwise_sub(sym.broadcast_sub(g, mean_g), sym.broadcast_mul(x, mean_gx))
    outputs = sym.Group([sym.broadcast_mul(inner, inverse), of_gamma, of_beta])
    return outputs.list_inputs(), nd.CachedOp(outputs)


def _add_gradient(parameter: Block, gradient: NDArray) -> None:
    whole = parameter.grad(gradient.context) if parameter.grad_req != "null" else None
    if parameter.grad_req == "write":
        gradient.copyto(whole)
    elif parameter.grad_req == "add":
        nd.elemwise_add(whole, gradient, out=whole)
