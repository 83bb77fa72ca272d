from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, nd

from bort.dropout import Dropout


def dropped(seed: int, p: float, shape: tuple[int, ...] = (200, 333), dtype: str = "float32"):
    drop = Dropout()
    drop.seed(seed)
    with autograd.train_mode():
        return drop(nd.ones(shape, dtype=dtype), p).asnumpy()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_values_are_dropped_at_the_rate_and_the_others_scaled(p: float) -> None:
    values = dropped(1, p)
    kept = values != 0
    # 66,600 draws: five standard deviations.
    assert kept.mean() == pytest.approx(1 - p, abs=5 * np.sqrt(p * (1 - p) / kept.size))
    np.testing.assert_allclose(values[kept], 1 / (1 - p), rtol=1e-3)
    # Neither rows nor columns are dropped together.
    assert kept.mean(axis=0).std() == pytest.approx(np.sqrt(p * (1 - p) / 200), rel=0.2)


def test_a_mask_depends_on_seed_and_number_alone() -> None:
    np.testing.assert_array_equal(dropped(1, 0.5), dropped(1, 0.5))
    assert 0.4 < (dropped(1, 0.5) != dropped(2, 0.5)).mean() < 0.6
    drop = Dropout()
    with autograd.train_mode():
        one, two = (drop(nd.ones((7, 3)), 0.5).asnumpy() for _ in range(2))
    assert (one != two).any()


def test_outside_training_and_at_rate_0_nothing_happens() -> None:
    values, drop = nd.ones((3, 5)), Dropout()
    assert drop(values, 0.5) is values
    with autograd.train_mode():
        assert drop(values, 0.0) is values


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gradient_passes_where_values_do(dtype: str) -> None:
    values, drop = nd.full((40, 5), 3, dtype=dtype, ctx=mx.cpu(1)), Dropout()
    values.attach_grad()
    with autograd.record():
        result = drop(values, 0.25)
    result.backward()
    assert result.dtype == np.dtype(dtype)
    np.testing.assert_allclose(3 * values.grad.asnumpy(), result.asnumpy(), rtol=1e-6)
    assert set(np.unique(result.asnumpy()).tolist()) == {0, 4}
