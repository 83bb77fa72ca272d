from __future__ import annotations

from typing import Any, Callable

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, nd
from mxnet.gluon import nn

from bort.bort import BortModel, SparseEmbeddingGrad, encode, encode_for_backward, get_bort_model
from bort.dropout import dropout
from bort.encoder import (
    MASK_VALUE,
    GraphBreak,
    additive_mask,
    backward,
    encode_embedding,
    fuse_qkv,
    gather_indices,
    layer_norm,
)

IDS = np.random.default_rng(4).integers(0, 50, (3, 12))
LENGTHS = np.array([12, 1, 7])


@pytest.fixture
def model() -> BortModel:
    """Return a small model none of whose parameters is zero or one."""
    model, _ = get_bort_model("bort_2_4_48_32", vocab=range(50), dropout=0.0)
    generator = np.random.default_rng(5)
    for parameter in model.collect_params().values():
        parameter.set_data(nd.array(generator.normal(0.3, 0.3, parameter.shape)))
    return model


def gluonnlp_encode(model: BortModel, ids: Any, lengths: Any) -> Any:
    return model._encode_sequence(ids, [], lengths)[0]


WEIGHTS = np.random.default_rng(6).normal(size=(*IDS.shape, 32))


def by_autograd(model: BortModel, run: Callable[[BortModel, Any, Any], Any]) -> None:
    """Differentiate a fixed weighing of all encoded values."""
    with autograd.record():
        total = (run(model, nd.array(IDS), nd.array(LENGTHS)) * nd.array(WEIGHTS)).sum()
    total.backward()


def by_rows(model: BortModel) -> None:
    """Do the same as a step of training does."""
    rows = SparseEmbeddingGrad(model, IDS, mx.cpu())
    with autograd.record():
        total = (encode_for_backward(model, rows, nd.array(LENGTHS)) * nd.array(WEIGHTS)).sum()
    model.word_embed[0].weight.zero_grad()
    rows.backward(total)


def gradients_of(model: BortModel) -> dict[str, np.ndarray]:
    return {
        name: parameter.grad().asnumpy()
        for name, parameter in model._collect_params_with_prefix().items()
        if not name.startswith("decoder")
    }


def assert_close(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        # Softmax does not see the keys' bias and hardly the queries': what is left is rounding.
        scale = max(np.abs(values).max(), 0.1)
        np.testing.assert_allclose(ours[name], values, atol=2e-5 * scale, err_msg=name)


def test_the_values_are_those_of_gluonnlp(model: BortModel) -> None:
    ids, lengths = nd.array(IDS), nd.array(LENGTHS)
    expected = gluonnlp_encode(model, ids, lengths).asnumpy()
    np.testing.assert_allclose(encode(model, ids, lengths).asnumpy(), expected, atol=2e-5)


def test_the_gradients_are_those_of_gluonnlp(model: BortModel) -> None:
    by_autograd(model, gluonnlp_encode)
    expected = gradients_of(model)
    by_autograd(model, encode)
    assert_close(gradients_of(model), expected)
    by_rows(model)
    assert_close(gradients_of(model), expected)


def test_gradients_are_added_where_they_are_to_accumulate(model: BortModel) -> None:
    by_rows(model)
    once = gradients_of(model)
    model.collect_params().setattr("grad_req", "add")
    for parameter in model.collect_params().values():
        parameter.zero_grad()
    for _ in range(3):
        by_rows(model)
    ours = gradients_of(model)
    # by_rows sets that of the word embedding to zero each time: here the decoder writes it first.
    assert_close(ours, {n: v if n.startswith("word") else 3 * v for n, v in once.items()})


def test_a_broken_graph_has_the_gradients_of_the_whole_in_float64(model: BortModel) -> None:
    model.cast("float64")
    ids, lengths, weights = (nd.array(a, dtype="float64") for a in (IDS, LENGTHS, WEIGHTS))
    found = []
    breaks: list[GraphBreak] = []
    for place in (None, breaks):
        with autograd.record():
            embedding = model.word_embed(ids)
            total = (encode_embedding(model.encoder, embedding, lengths, place) * weights).sum()
        backward(total, place or [])
        found.append(gradients_of(model))
    assert len(breaks) == 5
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_first_token_alone_has_the_values_and_gradients_of_all(model: BortModel) -> None:
    model.cast("float64")
    lengths = nd.array(LENGTHS, dtype="float64")
    weights = nd.array(WEIGHTS[:, :1], dtype="float64")
    values, gradients = [], []
    for cls_only in (False, True):
        model.collect_params().zero_grad()
        rows = SparseEmbeddingGrad(model, IDS, mx.cpu())
        with autograd.record():
            sequence = encode_for_backward(model, rows, lengths, cls_only)
            total = (sequence.slice_axis(axis=1, begin=0, end=1) * weights).sum()
        rows.backward(total)
        values.append(sequence.asnumpy()[:, :1])
        gradients.append(gradients_of(model))
    assert sequence.shape == (3, 1, 32)
    np.testing.assert_allclose(values[1], values[0], rtol=1e-9)
    for name, expected in gradients[0].items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            gradients[1][name], expected, rtol=1e-7, atol=1e-9 * scale + 1e-12, err_msg=name
        )
    assert np.abs(gradients[0]["encoder.layer_norm.beta"]).max() > 0


def test_a_selection_has_the_values_and_gradients_of_all(model: BortModel) -> None:
    """Ragged: three positions of the first sequence, none of the second, one of the third."""
    model.cast("float64")
    ids, lengths = (nd.array(a, dtype="float64") for a in (IDS, LENGTHS))
    positions = np.array([0, 5, 11, 24 + 6])
    weights = nd.array(WEIGHTS.reshape(-1, 32)[positions], dtype="float64")
    only = gather_indices(positions, 3, 12, mx.cpu())
    assert only.padded.size == 3 * 3
    values, gradients = [], []
    for selection in (None, only):
        model.collect_params().zero_grad()
        rows = SparseEmbeddingGrad(model, IDS, mx.cpu())
        with autograd.record():
            encoded = encode_for_backward(model, rows, lengths, positions=selection)
            if selection is None:
                encoded = encoded.reshape((-3, 0)).take(nd.array(positions))
            total = (encoded * weights).sum()
        rows.backward(total)
        values.append(encoded.asnumpy())
        gradients.append(gradients_of(model))
    assert encoded.shape == (4, 32)
    np.testing.assert_allclose(values[1], values[0], rtol=1e-9)
    np.testing.assert_allclose(
        encode(model, ids, lengths, positions=only).asnumpy(), values[0], 1e-9
    )
    for name, expected in gradients[0].items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            gradients[1][name], expected, rtol=1e-7, atol=1e-9 * scale + 1e-12, err_msg=name
        )


def test_fused_projections_give_the_same(model: BortModel) -> None:
    ids, lengths = nd.array(IDS), nd.array(LENGTHS)
    expected = encode(model, ids, lengths).asnumpy()
    fuse_qkv(model.encoder)
    for name in ("query_weight", "value_bias"):  # not requested again
        getattr(model.encoder.transformer_cells[0].attention_cell, name).data()[:] = 0
    np.testing.assert_allclose(encode(model, ids, lengths).asnumpy(), expected, atol=2e-5)


def test_without_a_position_a_selection_is_empty_but_valid(model: BortModel) -> None:
    only = gather_indices(np.array([], np.int64), 3, 12, mx.cpu())
    assert only.padded.asnumpy().tolist() == [0, 12, 24]
    assert only.flat.size == 0


def test_padding_is_hidden_from_its_length_on() -> None:
    mask = additive_mask(nd.array([3, 1, 0]), 3).asnumpy()
    np.testing.assert_array_equal(mask == 0, [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert mask.min() == np.float32(MASK_VALUE)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_layer_norm_has_the_gradient_of_float64(offset: float) -> None:
    generator = np.random.default_rng(7)
    rows, gradient = generator.normal(offset, 2, (5, 64)), generator.normal(size=(5, 64))
    layer = nn.LayerNorm(in_channels=64, epsilon=1e-5)
    layer.initialize()
    gamma, beta = generator.normal(size=(2, 64))
    layer.gamma.set_data(nd.array(gamma))
    layer.beta.set_data(nd.array(beta))
    inputs = nd.array(rows)
    inputs.attach_grad()
    breaks: list[GraphBreak] = []
    with autograd.record():
        outputs = layer_norm(layer, inputs * 1, breaks)
        total = (outputs * nd.array(gradient)).sum()
    backward(total, breaks)
    deviation = np.sqrt(rows.var(axis=1, keepdims=True) + 1e-5)
    x = (rows - rows.mean(axis=1, keepdims=True)) / deviation
    # The derivative of the mean and of the deviation, each by the chain rule.
    g = gradient * gamma
    expected = (g - g.mean(1, keepdims=True) - x * (g * x).mean(1, keepdims=True)) / deviation
    close = {"rtol": 1e-4, "atol": 2e-5}
    np.testing.assert_allclose(outputs.asnumpy(), x * gamma + beta, **close)
    np.testing.assert_allclose(inputs.grad.asnumpy(), expected, **close)
    np.testing.assert_allclose(layer.gamma.grad().asnumpy(), (gradient * x).sum(0), **close)
    np.testing.assert_allclose(layer.beta.grad().asnumpy(), gradient.sum(0), **close)


def test_dropout_follows_the_seed_and_the_rate(model: BortModel) -> None:
    dropped, _ = get_bort_model("bort_2_4_48_32", vocab=range(50), dropout=0.5)
    ids, lengths = nd.array(IDS), nd.array(LENGTHS)

    def draw(seed: int) -> np.ndarray:
        dropout.seed(seed)
        with autograd.train_mode():
            return encode(dropped, ids, lengths).asnumpy()

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).mean() > 0.5
    still = encode(model, ids, lengths).asnumpy()
    with autograd.train_mode():
        np.testing.assert_array_equal(encode(model, ids, lengths).asnumpy(), still)


def test_a_hybridized_model_gives_the_same(model: BortModel) -> None:
    ids, lengths = nd.array(IDS), nd.array(LENGTHS)
    before = encode(model, ids, lengths).asnumpy()
    model.hybridize(static_alloc=True)
    np.testing.assert_array_equal(encode(model, ids, lengths).asnumpy(), before)
