"""Dropout on a CPU, with masks from NumPy.

MXNet 1.9.1 draws a mask on one core, one number after the other, which takes three times as long:
RESULTS.md has the times.
"""

from __future__ import annotations

import numpy as np
from mxnet import autograd, nd

from bort.types import NDArray

LEVELS = 1 << 16  # a mask is drawn from integers of 16 bits: the rate is exact to 1 / 65,536


class Dropout:
    """Draws masks from one generator, which `seed` starts over."""

    def __init__(self) -> None:
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Let the masks that follow depend on nothing but a seed."""
        self._bits = np.random.SFC64(seed)

    def __call__(self, values: NDArray, p: float) -> NDArray:
        """Drop values with probability p and scale the others up, in training mode alone."""
        if not p or not autograd.is_training():
            return values
        mask = nd.from_numpy(self._mask(values.size, p, np.dtype(values.dtype)))
        return nd.elemwise_mul(values, mask.reshape(values.shape).as_in_context(values.context))

    def _mask(self, size: int, p: float, dtype: np.dtype) -> np.ndarray:
        dropped = round(p * LEVELS)
        draws = self._bits.random_raw(-(-size // 4)).view(np.uint16)[:size]
        return np.multiply(draws >= dropped, dtype.type(LEVELS / (LEVELS - dropped)), dtype=dtype)


dropout = Dropout()
