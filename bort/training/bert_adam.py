"""BERTAdam: GluonNLP's, with a faster update of float32 parameters on a CPU.

On a CPU MXNet's kernel computes the square root and the quotient of one value at a time, which
takes twice as long as the memory traffic. NumPy computes sixteen values at once; threads share the
work, because NumPy releases the GIL in each operation. Where Numba is installed, it compiles all
operations into one loop, which gives the same bits in less than half the time. RESULTS.md has the
times.
"""

from __future__ import annotations

import ctypes
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Callable, Iterator, NamedTuple, Sequence, TypeVar

import gluonnlp as nlp
import numpy as np
from mxnet import nd
from mxnet.base import _LIB, check_call

from bort.devices import runs_on_cpu
from bort.mxnet_setup import cpu_threads
from bort.types import NDArray

# Values updated at once: few enough to stay in the cache from one operation to the next, and enough
# for threads not to wait for the GIL.
CHUNK = 1 << 19


CompiledUpdate = Callable[..., None]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Chunk(NamedTuple):
    """A part of a parameter, arrays [n] float32 that view MXNet's memory; its rate and decay."""

    weight: np.ndarray
    gradient: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    rate: float
    decay: float


class BERTAdam(nlp.optimizer.BERTAdam):
    """GluonNLP's BERTAdam; `rescale_grad` is an NDArray [1], and 0 changes nothing."""

    def update_multi_precision(
        self,
        index: Sequence[int],
        weight: Sequence[NDArray],
        grad: Sequence[NDArray],
        state: Sequence[NDArray],
    ) -> None:
        """Make one update of several parameters.

        On a CPU it waits for all queued operations, and is complete when it returns.
        """
        if all(runs_on_cpu(array) and array.dtype == np.float32 for array in weight):
            self._update_on_cpu(index, weight, grad, state)
            return
        for indices in groups_of_equal_size([array.size for array in weight]):
            group = [[values[i] for i in indices] for values in (index, weight, grad, state)]
            super().update_multi_precision(*group)

    def _update_on_cpu(
        self,
        index: Sequence[int],
        weight: Sequence[NDArray],
        grad: Sequence[NDArray],
        state: Sequence[NDArray],
    ) -> None:
        self._update_count(index)
        factor = float(self.rescale_grad.asscalar())
        if factor == 0 or not math.isfinite(factor):
            return
        nd.waitall()  # nothing else may read or write the weights during the update
        chunks = list(self._chunks(index, weight, grad, state))
        compiled = compiled_update()  # here: in the threads it could be compiled twice
        on_threads(partial(self.update_chunks, factor=factor, compiled=compiled), chunks)

    def _chunks(
        self,
        index: Sequence[int],
        weight: Sequence[NDArray],
        grad: Sequence[NDArray],
        state: Sequence[NDArray],
    ) -> Iterator[Chunk]:
        rates, decays = self._get_lrs(index), self._get_wds(index)
        for *arrays, rate, decay in zip(weight, grad, *zip(*state), rates, decays):
            views = [view(array) for array in arrays]
            for start in range(0, views[0].size, CHUNK):
                w, g, mean, variance = (values[start : start + CHUNK] for values in views)
                yield Chunk(w, g, mean, variance, rate, decay)

    def update_chunks(
        self, chunks: Sequence[Chunk], factor: float, compiled: CompiledUpdate | None
    ) -> None:
        """Update chunks in place; gradients are multiplied by `factor`."""
        if compiled:
            shared = (factor, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, self.epsilon)
            for *arrays, rate, decay in chunks:
                compiled(*arrays, tuple(map(np.float32, (*shared, rate, decay))))
            return
        scratch = np.empty((2, CHUNK), np.float32)
        for chunk in chunks:
            self.update_chunk(chunk, factor, *scratch[:, : len(chunk.mean)])

    def update_chunk(self, chunk: Chunk, factor: float, buf0: np.ndarray, buf1: np.ndarray) -> None:
        """Update one chunk, with two buffers [n] for results."""
        weight, gradient, mean, variance, rate, decay = chunk
        np.multiply(gradient, np.float32(factor), out=buf0)
        np.multiply(buf0, buf0, out=buf1)
        buf1 *= np.float32(1 - self.beta2)
        variance *= np.float32(self.beta2)
        variance += buf1
        buf0 *= np.float32(1 - self.beta1)
        mean *= np.float32(self.beta1)
        mean += buf0
        np.sqrt(variance, out=buf1)
        buf1 += np.float32(self.epsilon)
        np.divide(mean, buf1, out=buf1)
        if decay:
            # Added to the step: a factor of nearly 1 on the weight would be rounded to 1.
            np.multiply(weight, np.float32(decay), out=buf0)
            buf1 += buf0
        buf1 *= np.float32(rate)
        weight -= buf1


def update_in_one_loop(
    weight: np.ndarray,
    gradient: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    constants: tuple[np.float32, ...],
) -> None:
    """Update arrays [n] as `BERTAdam.update_chunk` does, to be compiled.

    The operations and their order are the same, and so are the bits: Numba contracts no product and
    sum into one operation unless it is told to.
    """
    factor, beta1, rest1, beta2, rest2, epsilon, rate, decay = constants
    for i in range(weight.size):
        scaled = gradient[i] * factor
        variance[i] = variance[i] * beta2 + scaled * scaled * rest2
        mean[i] = mean[i] * beta1 + scaled * rest1
        step = mean[i] / (np.sqrt(variance[i]) + epsilon)
        if decay:
            step += weight[i] * decay
        weight[i] -= step * rate


@functools.lru_cache(maxsize=1)
def compiled_update() -> CompiledUpdate | None:
    """Return `update_in_one_loop`, compiled and without the GIL; None without Numba."""
    try:
        import numba
    except ImportError:  # not installed, or one that is made for another NumPy
        return None
    return numba.njit(nogil=True, error_model="numpy")(update_in_one_loop)


def on_threads(work: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
    """Divide items among as many threads as there are cores; returns what `work` makes of each."""
    workers = cpu_threads()
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, [items[first::workers] for first in range(workers)]))


def view(array: NDArray) -> np.ndarray:
    """Return the memory of a float32 NDArray on a CPU, [size], which nothing else may write."""
    pointer = ctypes.c_void_p()
    # By DLPack NumPy would get it read-only.
    check_call(_LIB.MXNDArrayGetData(array.handle, ctypes.byref(pointer)))
    values = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(values, shape=(array.size,))


def groups_of_equal_size(sizes: Sequence[int]) -> list[list[int]]:
    """Return the indices of equal sizes, grouped.

    The fused kernel takes several arrays and compares each index of the longest with the length of
    the others: with mixed sizes an update of Bort took a third longer.
    """
    indices: dict[int, list[int]] = {}
    for index, size in enumerate(sizes):
        indices.setdefault(size, []).append(index)
    return list(indices.values())
