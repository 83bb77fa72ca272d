"""BERTAdam: GluonNLP's, with a quick update of float32 parameters on a CPU.

There MXNet's kernel takes the square root and the quotient of one value at a time, and is twice as
long about it as memory is. NumPy computes sixteen values at once; threads share the work, since
NumPy lets go of Python's lock in each operation. RESULTS.md has the times.
"""

from __future__ import annotations

import ctypes
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterator, NamedTuple, Sequence

import gluonnlp as nlp
import numpy as np
from mxnet import nd
from mxnet.base import _LIB, check_call

from bort.devices import runs_on_cpu
from bort.mxnet_setup import cpu_threads

# Values updated at once: few enough for the cache to hold them from one operation to the next, and
# enough for threads not to wait for Python's lock.
PIECE = 1 << 19


class Piece(NamedTuple):
    """Some values of a parameter, [n] float32: views of MXNet's memory; its rate and decay."""

    weight: np.ndarray
    gradient: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    rate: float
    decay: float


class BERTAdam(nlp.optimizer.BERTAdam):
    """GluonNLP's BERTAdam; `rescale_grad` is an NDArray [1], and 0 leaves everything as it is."""

    def update_multi_precision(
        self, index: Sequence[int], weight: Sequence[Any], grad: Sequence[Any], state: Sequence[Any]
    ) -> None:
        """Make one update of several parameters.

        On a CPU it waits for all that is queued, and is done when it returns.
        """
        if all(runs_on_cpu(one) and one.dtype == np.float32 for one in weight):
            self._update_on_cpu(index, weight, grad, state)
            return
        for places in groups_of_equal_size([one.size for one in weight]):
            group = [[many[i] for i in places] for many in (index, weight, grad, state)]
            super().update_multi_precision(*group)

    def _update_on_cpu(
        self, index: Sequence[int], weight: Sequence[Any], grad: Sequence[Any], state: Sequence[Any]
    ) -> None:
        self._update_count(index)
        factor = float(self.rescale_grad.asscalar())
        if factor == 0 or not math.isfinite(factor):
            return
        nd.waitall()  # nothing else may read or write the weights meanwhile
        pieces = list(self._pieces(index, weight, grad, state))
        workers = cpu_threads()
        with ThreadPoolExecutor(workers) as pool:
            shares = [pieces[first::workers] for first in range(workers)]
            list(pool.map(self._update_pieces, shares, [factor] * workers))

    def _pieces(
        self, index: Sequence[int], weight: Sequence[Any], grad: Sequence[Any], state: Sequence[Any]
    ) -> Iterator[Piece]:
        rates, decays = self._get_lrs(index), self._get_wds(index)
        for *arrays, rate, decay in zip(weight, grad, *zip(*state), rates, decays):
            views = [view(one) for one in arrays]
            for start in range(0, views[0].size, PIECE):
                w, g, mean, variance = (values[start : start + PIECE] for values in views)
                yield Piece(w, g, mean, variance, rate, decay)

    def _update_pieces(self, pieces: Sequence[Piece], factor: float) -> None:
        room = np.empty((2, PIECE), np.float32)
        for piece in pieces:
            self._update_piece(piece, factor, *room[:, : len(piece.mean)])

    def _update_piece(
        self, piece: Piece, factor: float, one: np.ndarray, other: np.ndarray
    ) -> None:
        """Update one piece, with room for two results [n]."""
        weight, gradient, mean, variance, rate, decay = piece
        np.multiply(gradient, np.float32(factor), out=one)
        np.multiply(one, one, out=other)
        other *= np.float32(1 - self.beta2)
        variance *= np.float32(self.beta2)
        variance += other
        one *= np.float32(1 - self.beta1)
        mean *= np.float32(self.beta1)
        mean += one
        np.sqrt(variance, out=other)
        other += np.float32(self.epsilon)
        np.divide(mean, other, out=other)
        if decay:
            # Added to the step: a factor of nearly 1 on the weight would be rounded to 1.
            np.multiply(weight, np.float32(decay), out=one)
            other += one
        other *= np.float32(rate)
        weight -= other


def view(array: Any) -> np.ndarray:
    """Return the memory of a float32 NDArray on a CPU, [size], that nobody else is writing to."""
    pointer = ctypes.c_void_p()
    # MXNet's way to DLPack would make it read-only to NumPy.
    check_call(_LIB.MXNDArrayGetData(array.handle, ctypes.byref(pointer)))
    values = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(values, shape=(array.size,))


def groups_of_equal_size(sizes: Sequence[int]) -> list[list[int]]:
    """Return the places of equal sizes together.

    The fused kernel takes several arrays at once and asks for each element of the longest whether
    the others go that far: in mixed company an update of Bort took a third longer.
    """
    places: dict[int, list[int]] = {}
    for place, size in enumerate(sizes):
        places.setdefault(size, []).append(place)
    return list(places.values())
