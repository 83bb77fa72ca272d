"""Seeds of more than 32 bits."""

from __future__ import annotations

import mxnet as mx
import pytest

from bort.seeds import mxnet_seed

LARGE = [2**32 + 5, 2**64 + 5, 9007199254740993, 9007199254740992, 2**32]


@pytest.mark.parametrize("seed", [0, 5, 12345, 2**31 - 1, 2**32 - 1])
def test_small_seeds_stay(seed):
    assert mxnet_seed(seed) == seed


def test_large_seeds_draw_different_values():
    def draw(seed):
        mx.random.seed(mxnet_seed(seed))
        return tuple(mx.nd.random.uniform(shape=(3,)).asnumpy())

    assert len({draw(seed) for seed in [5, 0, *LARGE]}) == 2 + len(LARGE)
    assert all(0 <= mxnet_seed(seed) < 2**32 for seed in LARGE)
