"""The progress bar of long work."""

from __future__ import annotations

import sys
import time
from typing import Optional

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30


class ProgressBar:
    """Shows the work done, its speed and the time left, on stderr.

    On a terminal it is a bar; elsewhere a line every 30 seconds, because a bar that redraws itself
    is noise in a log file.

    Args:
        what: the work, shown in front.
        total: units to do; None where that is unknown.
        unit: of the count: "B" for bytes, else a noun.
        initial: units that were done before.
        enabled: False shows nothing, as on ranks other than 0.
        lines: False shows nothing where stderr is no terminal.
    """

    def __init__(
        self,
        what: str,
        total: Optional[int] = None,
        unit: str = "B",
        initial: int = 0,
        enabled: bool = True,
        lines: bool = True,
    ) -> None:
        shows_bar = enabled and sys.stderr.isatty()
        self._prints_lines = enabled and lines and not shows_bar
        self._bar = tqdm(
            total=total,
            desc=what or None,
            unit=unit,
            unit_scale=unit == "B",
            initial=initial,
            disable=not shows_bar,
            dynamic_ncols=True,
        )
        self._what, self._total, self._unit, self._done = what, total, unit, initial
        self._before = initial
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._prints_lines and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            line = tqdm.format_meter(
                self._done,
                self._total,
                now - self._start,
                prefix=self._what,
                unit=self._unit,
                unit_scale=self._unit == "B",
                initial=self._before,
            )
            print(line, file=sys.stderr, flush=True)

    def found(self, count: int) -> None:
        """Count `count` more units as done before: they say nothing about the speed."""
        self._done += count
        self._before += count
        if not self._bar.disable:
            for counter in ("n", "initial", "last_print_n"):
                setattr(self._bar, counter, getattr(self._bar, counter) + count)
            self._bar.refresh()

    def skip(self, count: int) -> None:
        """Take `count` units off the total: they were done before."""
        if self._total is not None:
            self._total -= count
            self._bar.total = self._total

    @staticmethod
    def write(line: str) -> None:
        """Print a line on stdout, above the bar if there is one."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
