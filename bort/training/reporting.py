"""What a training step is measured by: sums between metric lines, time, and its phases."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Iterator, Sequence

from mxnet import nd

from bort.types import Context, NDArray


class MetricAccumulator:
    """Sums since the last metric line, kept on the device so that no step waits for them."""

    def __init__(self, device: Context, sums: int) -> None:
        self._sums = nd.zeros(sums, ctx=device)  # [sums]
        self.count = 0
        self.tokens = 0

    def add(self, sums: NDArray, count: int, tokens: int) -> None:
        """Add the sums [sums] of a micro-batch over `count` labels, and its tokens."""
        self._sums += sums.as_in_context(self._sums.context)
        self.count += count
        self.tokens += tokens

    def state(self) -> list[float]:
        """Return sums, count and tokens as numbers; waits for the device."""
        return [*map(float, self._sums.asnumpy()), self.count, self.tokens]

    def load_state(self, state: Sequence[float]) -> None:
        """Restore what `state` returned."""
        *sums, count, tokens = state
        self._sums[:] = nd.array(sums, ctx=self._sums.context)
        self.count, self.tokens = int(count), int(tokens)


class Stopwatch:
    """Seconds spent training, without the evaluations and checkpoints in between."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap and start the next."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the enclosed work out of the lap; waits for what the device still has to do."""
        nd.waitall()
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


class PhaseTimer:
    """Measures how the time of one step divides among its phases.

    MXNet runs behind Python's back, so a phase can only be timed by waiting for it. `measured`
    switches that on for single steps; the other steps are never held up.
    """

    def __init__(self) -> None:
        self.measured = False
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the enclosed code as phase `name` when the step is measured."""
        if not self.measured:
            yield
            return
        nd.waitall()
        start = time.perf_counter()
        yield
        nd.waitall()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        """Return {phase_share: part of the measured time} and start again from zero."""
        total = sum(self.seconds.values()) or 1.0
        shares = {f"{name}_share": seconds / total for name, seconds in self.seconds.items()}
        self.seconds = {}
        return shares
