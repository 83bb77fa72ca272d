"""The progress bar of long work."""

from __future__ import annotations

import sys
import time
from typing import Optional

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30


class Progress:
    """Shows bytes done, MB/s and the time left: a bar on a terminal, else a line now and then."""

    def __init__(self, what: str, total: Optional[int] = None) -> None:
        self._shows_bar = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=what,
            unit="B",
            unit_scale=True,
            disable=not self._shows_bar,
            dynamic_ncols=True,
        )
        self._what, self._total, self._done = what, total, 0
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, size: int) -> None:
        """Count `size` more bytes as done."""
        self._done += size
        self._bar.update(size)
        now = time.monotonic()
        if not self._shows_bar and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            elapsed = now - self._start
            line = tqdm.format_meter(
                self._done, self._total, elapsed, prefix=self._what, unit="B", unit_scale=True
            )
            print(line, file=sys.stderr, flush=True)

    def skip(self, size: int) -> None:
        """Take `size` bytes off the total: they were done before."""
        if self._total is not None:
            self._total -= size
            self._bar.total = self._total
