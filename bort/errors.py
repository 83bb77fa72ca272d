"""The one exception for mistakes a user can mend, and the door that turns it into one line."""

from __future__ import annotations

import functools
import sys
from typing import Callable, Optional, Sequence, TypeVar

Result = TypeVar("Result")
Main = Callable[[Optional[Sequence[str]]], Result]


class UserError(Exception):
    """A mistake of the user's: names the file, line or flag, what is wrong, and the cure."""


def door(main: Main[Result]) -> Main[Result]:
    """Wrap an entry point: a `UserError` becomes one line on stderr and exit status 1.

    Anything else keeps its traceback, because then the mistake is ours.
    """

    @functools.wraps(main)
    def entered(argv: Sequence[str] | None = None) -> Result:
        try:
            return main(argv)
        except UserError as error:
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None

    return entered
