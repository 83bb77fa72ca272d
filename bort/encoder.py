"""The encoder of GluonNLP's BERTModel once more, for CPUs: the same parameters, the same values.

On a CPU, MXNet 1.9.1 takes ten times as long for the gradient of LayerNorm as the arithmetic needs,
and long for the softmax that knows lengths and for the attention over interleaved heads that
GluonNLP 0.10.0 is built of. Here LayerNorm has a gradient of matrix products, and attention is made
of operators that oneDNN computes. RESULTS.md has the times.

Not by `autograd.Function`: in MXNet 1.9.1 it loses gradients that are to be added to others, and
hangs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import gluonnlp as nlp
import numpy as np
from mxnet import autograd, nd

# Added to the scores of padding: its exponential is 0.
HIDDEN = -1e30
# Where rows are a multiple of so many values long, 4 KiB, oneDNN's product takes a sixth longer
# than OpenBLAS's, whose gradient is the slower one.
ALIASED = 1024


class Selection(NamedTuple):
    """The positions of a batch whose encodings alone are wanted, as NDArrays (see `select`).

    As many are computed of each sequence: what is too much is its first token.
    """

    table: Any  # [batch * most] int32, into the flattened [batch * length] grid
    places: Any  # [n] int32, into the table


def select(positions: np.ndarray, batch: int, length: int, device: Any) -> Selection:
    """Select positions [n] of the flattened grid, those of one sequence after another's."""
    sequences = positions // length
    counts = np.bincount(sequences, minlength=batch)
    ordinals = np.arange(len(positions)) - (np.cumsum(counts) - counts)[sequences]
    most = max(1, int(counts.max()))
    table = np.repeat(length * np.arange(batch)[:, None], most, axis=1)
    table[sequences, ordinals] = positions
    table, places = table.reshape(-1), sequences * most + ordinals
    return Selection(*(nd.array(each, ctx=device, dtype="int32") for each in (table, places)))


def encode_embedding(
    encoder: nlp.model.BERTEncoder,
    embedding: Any,
    valid_length: Any,
    cuts: list[Cut] | None = None,
    first_only: bool = False,
    only: Selection | None = None,
) -> Any:
    """Encode word embeddings [batch, length, units]; returns the same shape.

    `valid_length` [batch] is of the embeddings' type; positions at and beyond it come out zero.
    With `cuts` the recorded graph is cut at every LayerNorm; `backward` differentiates it. With
    `first_only` the last layer is computed for the first token alone: [batch, 1, units]; with
    `only` for a selection of n positions: [n, units].
    """
    batch, length, units = embedding.shape
    positions = encoder.position_weight.data(embedding.context)[:length]
    # An outer product repeats them: MXNet's broadcast sums its gradient slowly.
    ones = nd.ones((batch, 1), ctx=embedding.context, dtype=embedding.dtype)
    repeated = nd.dot(ones, positions.reshape((1, -1)))
    rows = nd.elemwise_add(embedding.reshape((-1,)), repeated.reshape((-1,))).reshape((-1, units))
    rows = layer_norm(encoder.layer_norm, dropout(rows, p=encoder._dropout), cuts)
    mask = hide_padding(valid_length, length)
    *cells, last = encoder.transformer_cells
    for cell in cells:
        rows = after_attention(cell, self_attention(cell.attention_cell, rows, mask), rows, cuts)
    if first_only:
        attended = first_attention(last.attention_cell, rows, mask)
        rows = rows.reshape((batch, -1)).slice_axis(axis=1, begin=0, end=units)
        return after_attention(last, attended, rows, cuts).expand_dims(1)
    if only is not None:
        chosen = rows.take(only.table)
        attended = self_attention(last.attention_cell, rows, mask, chosen)
        return after_attention(last, attended, chosen, cuts).take(only.places)
    rows = after_attention(last, self_attention(last.attention_cell, rows, mask), rows, cuts)
    sequence = rows.reshape((batch, length, units))
    return nd.SequenceMask(sequence, valid_length, use_sequence_length=True, axis=1)


def after_attention(cell: Any, attended: Any, rows: Any, cuts: list[Cut] | None) -> Any:
    """Do the rest of a layer: `attended` and the rows that went in, [n, units], to [n, units]."""
    attended = dropout(dense(cell.proj, attended), p=cell._dropout)
    rows = layer_norm(cell.layer_norm, nd.elemwise_add(attended, rows), cuts)
    inner = nd.LeakyReLU(dense(cell.ffn.ffn_1, rows), act_type="gelu")
    outer = dropout(dense(cell.ffn.ffn_2, inner), p=cell.ffn._dropout)
    return layer_norm(cell.ffn.layer_norm, nd.elemwise_add(outer, rows), cuts)


def hide_padding(valid_length: Any, length: int) -> Any:
    """Return what is added to attention scores, [batch, length]: 0, for padding -1e30."""
    places = nd.arange(length, ctx=valid_length.context, dtype=valid_length.dtype)
    return HIDDEN * nd.broadcast_greater_equal(
        places.reshape((1, -1)), valid_length.reshape((-1, 1))
    )


def self_attention(cell: Any, rows: Any, mask: Any, chosen: Any | None = None) -> Any:
    """Attend within each sequence: rows [batch * length, units], mask [batch, length].

    `cell` is GluonNLP's DotProductSelfAttentionCell; returns [batch * length, units] before the
    output projection. With `chosen`, [batch * most] of the rows, only these attend to all.
    """
    hidden = mask.repeat(cell._num_heads, axis=0).expand_dims(1)
    joined = getattr(cell, "joined", {}).get(rows.context)
    if joined and chosen is None:
        return _joined_attention(cell, rows, joined, hidden)
    queries = rows if chosen is None else chosen
    heads, units = cell._num_heads, cell.units
    batch, width = mask.shape[0], units // heads
    query, key, value = (
        affine(inputs, weight, bias)
        .reshape((batch, -1, heads, width))
        .transpose((0, 2, 1, 3))
        .reshape((-3, 0, 0))
        for inputs, weight, bias in zip((queries, rows, rows), *_projections(cell, rows.context))
    )
    scores = nd.batch_dot(query * width**-0.5, key, transpose_b=True)
    values = nd.batch_dot(_shares(cell, scores, hidden), value)
    return values.reshape((batch, heads, -1, width)).transpose((0, 2, 1, 3)).reshape((-1, units))


def _shares(cell: Any, scores: Any, hidden: Any) -> Any:
    """Return what each query [..., queries, length] takes of each value."""
    # Spread beforehand: MXNet's broadcast sums a gradient that nobody asked for.
    scores = nd.elemwise_add(scores, hidden.broadcast_to(scores.shape))
    return dropout(nd.softmax(scores, axis=-1), p=cell._dropout)


def _joined_attention(cell: Any, rows: Any, joined: tuple[Any, Any], hidden: Any) -> Any:
    """Attend by MXNet's own attention, quicker than batches of products for narrow heads.

    It wants the three projections head by head, and sequences side by side.
    """
    batch, length, units = hidden.shape[0] // cell._num_heads, hidden.shape[2], cell.units
    turned = rows.reshape((batch, length, units)).transpose((1, 0, 2)).reshape((-1, units))
    projected = affine(turned, *joined).reshape((length, batch, 3 * units))
    scores = nd.contrib.interleaved_matmul_selfatt_qk(projected, heads=cell._num_heads)
    attended = nd.contrib.interleaved_matmul_selfatt_valatt(
        projected, _shares(cell, scores, hidden), heads=cell._num_heads
    )
    return attended.transpose((1, 0, 2)).reshape((-1, units))


def _projections(cell: Any, device: Any) -> tuple[list[Any], list[Any]]:
    """Return the weights [units, units] and biases [units] of queries, keys and values."""
    weights, biases = (
        [getattr(cell, f"{name}_{kind}").data(device) for name in ("query", "key", "value")]
        for kind in ("weight", "bias")
    )
    return weights, biases


def _joined(cell: Any, device: Any) -> tuple[Any, Any]:
    """Lay the three projections out head by head: [3 * units, units] and [3 * units]."""
    heads, units = cell._num_heads, cell.units
    weights, biases = _projections(cell, device)
    weight = nd.concat(*[w.reshape((heads, -1, units)) for w in weights], dim=1)
    bias = nd.concat(*[b.reshape((heads, -1)) for b in biases], dim=1)
    return weight.reshape((-1, units)), bias.reshape((-1,))


def join_projections(encoder: nlp.model.BERTEncoder) -> None:
    """Lay out the projections of a float32 encoder whose weights will stay as they are, on CPUs."""
    for cell in (layer.attention_cell for layer in encoder.transformer_cells):
        devices = [one for one in cell.query_weight.list_ctx() if one.device_type != "gpu"]
        cell.joined = {one: _joined(cell, one) for one in devices}


def first_attention(cell: Any, rows: Any, mask: Any) -> Any:
    """Attend from the first token of each sequence only; returns [batch, units].

    With q its query, x the sequence and p its attention, no key and no value need be made:
    q (x K + k)' = (q K') x' + q k', and p (x V + v) = (p x) V + v * sum(p).
    """
    batch, length = mask.shape
    heads, units = cell._num_heads, cell.units
    width = units // heads

    def of_heads(name: str) -> tuple[Any, Any]:
        weight, bias = (
            getattr(cell, f"{name}_{kind}").data(rows.context) for kind in ("weight", "bias")
        )
        return weight.reshape((heads, width, units)), bias.reshape((heads, 1, width))

    (query, query_bias), (key, key_bias), (value, value_bias) = map(
        of_heads, ("query", "key", "value")
    )
    sequence = rows.reshape((batch, length, units))
    first = rows.reshape((batch, -1)).slice_axis(axis=1, begin=0, end=units)
    queries = nd.batch_dot(first.expand_dims(0).tile((heads, 1, 1)), query, transpose_b=True)
    queries = nd.broadcast_add(queries, query_bias) * width**-0.5  # [heads, batch, width]
    turned = nd.batch_dot(queries, key).transpose((1, 0, 2))  # [batch, heads, units]
    constant = nd.batch_dot(queries, key_bias, transpose_b=True).transpose((1, 0, 2))
    scores = nd.batch_dot(turned, sequence, transpose_b=True)  # [batch, heads, length]
    scores = nd.broadcast_add(nd.broadcast_add(scores, constant), mask.expand_dims(1))
    weights = dropout(nd.softmax(scores, axis=-1), p=cell._dropout)
    mixed = nd.batch_dot(weights, sequence).transpose((1, 0, 2))  # [heads, batch, units]
    shares = weights.sum(axis=-1, keepdims=True).transpose((1, 0, 2))
    values = nd.batch_dot(mixed, value, transpose_b=True) + nd.batch_dot(shares, value_bias)
    return values.transpose((1, 0, 2)).reshape((batch, units))


def dropout(values: Any, p: float) -> Any:
    """Drop values while a model is trained; MXNet's operator copies them even where it does not."""
    return nd.Dropout(values, p=p) if autograd.is_training() and p else values


def dense(layer: Any, rows: Any) -> Any:
    """Apply a Gluon Dense layer, without its activation, to rows [n, in]; returns [n, out]."""
    return affine(rows, *(one.data(rows.context) for one in (layer.weight, layer.bias)))


def affine(rows: Any, weight: Any, bias: Any) -> Any:
    """Multiply rows [n, in] by weight [out, in] and add bias [out]; returns [n, out]."""
    if autograd.is_recording() or weight.shape[1] % ALIASED:
        return nd.FullyConnected(rows, weight, bias, num_hidden=len(bias))
    return nd.broadcast_add(nd.dot(rows, weight, transpose_b=True), bias.reshape((1, -1)))


class Cut(NamedTuple):
    """A LayerNorm at which the graph is cut: its gradient is not left to autograd."""

    layer: Any
    rows: Any  # [n, units], the end of the graph before the cut
    normalised: Any  # [n, units], a leaf of the graph behind it
    mean: Any
    deviation: Any


def layer_norm(layer: Any, rows: Any, cuts: list[Cut] | None = None) -> Any:
    """Apply a Gluon LayerNorm to rows [n, units]; with `cuts`, cut the graph that is recorded."""
    gamma, beta = (one.data(rows.context) for one in (layer.gamma, layer.beta))
    if cuts is None or not autograd.is_recording():
        return nd.LayerNorm(rows, gamma, beta, axis=-1, eps=layer._epsilon)
    with autograd.pause():
        normalised, mean, deviation = nd.LayerNorm(
            rows, gamma, beta, axis=-1, eps=layer._epsilon, output_mean_var=True
        )
    normalised.attach_grad()
    cuts.append(Cut(layer, rows, normalised, mean, deviation))
    return normalised


def backward(head: Any, cuts: Sequence[Cut], gradient: Any | None = None) -> None:
    """Differentiate a loss [1], or an array with its gradient, whose graph was cut.

    From the last cut to the first.
    """
    head.backward(gradient)
    for cut in reversed(cuts):
        cut.rows.backward(_through_layer_norm(cut))


def _through_layer_norm(cut: Cut) -> Any:
    """Return the gradient of a cut's rows [n, units]; adds those of gamma and beta to theirs.

    With x the normalised rows, s the deviation and g = gradient * gamma it is
    (g - mean(g) - x * mean(g * x)) / s (Ba et al., Layer Normalization).
    Sums are products with ones: MXNet's own sums along an axis are slow.
    """
    gradient, gamma = cut.normalised.grad, cut.layer.gamma.data(cut.rows.context)
    count, units = cut.rows.shape
    inverse = 1 / cut.deviation.reshape((-1, 1))
    x = nd.broadcast_mul(nd.broadcast_sub(cut.rows, cut.mean.reshape((-1, 1))), inverse)
    product = nd.elemwise_mul(gradient, x)
    ones = nd.ones((1, count), ctx=gradient.context, dtype=gradient.dtype)
    _add_gradient(cut.layer.gamma, nd.dot(ones, product).reshape((-1,)))
    _add_gradient(cut.layer.beta, nd.dot(ones, gradient).reshape((-1,)))
    shares = gamma.reshape((-1, 1)) / units
    mean_g, mean_gx = nd.dot(gradient, shares), nd.dot(product, shares)
    g = nd.broadcast_mul(gradient, gamma.reshape((1, -1)))
    inner = nd.elemwise_sub(nd.broadcast_sub(g, mean_g), nd.broadcast_mul(x, mean_gx))
    return nd.broadcast_mul(inner, inverse)


def _add_gradient(parameter: Any, gradient: Any) -> None:
    if parameter.grad_req == "write":
        parameter.grad(gradient.context)[:] = gradient
    elif parameter.grad_req == "add":
        parameter.grad(gradient.context)[:] += gradient
