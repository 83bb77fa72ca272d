"""A function in a process of its own, ended when it takes too long or too much memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import time
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Callable, Iterator, NamedTuple, Optional, TypeVar

from bort.errors import UserError

Result = TypeVar("Result")
LOOK_EVERY = 0.1  # seconds
GRACE = 10.0  # seconds in which a process that has answered may tidy up
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class Caps(NamedTuple):
    """Limits of a process; None: without limit."""

    seconds: Optional[float] = None  # its start included
    megabytes: Optional[float] = None  # of memory resident at once, libraries included


UNLIMITED = Caps()


class OverTimeError(Exception):
    """The function took more seconds than it may."""


class OverMemoryError(Exception):
    """The function took more memory than it may."""


def run_isolated(function: Callable[[], Result], threads: int, caps: Caps = UNLIMITED) -> Result:
    """Call a picklable function in a fresh process of `threads` OpenMP threads; return its result.

    Raises:
        OverTimeError, OverMemoryError: a cap was broken; the process is gone.
        UserError: raised by the function, or the system killed the process.
        RuntimeError: the function raised something else, which stands on stderr.
    """
    # A forked child would inherit MXNet's threads in a state that hangs.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function), daemon=True)
    with _environment(OMP_NUM_THREADS=str(threads)):
        process.start()
    sender.close()
    try:
        _wait(receiver, process.pid, caps)
        value = _received(receiver, process, caps)
        process.join(GRACE)
        return value
    finally:
        process.kill()
        process.join()


def _call(sender: Connection, function: Callable[[], Any]) -> None:
    die_with_parent()
    try:
        value, error = function(), None
    except UserError as mistake:
        value, error = None, mistake
    # With the peak: the parent, which looks now and then, may have missed it.
    sender.send((value, error, peak_megabytes(os.getpid())))


def _wait(receiver: Connection, pid: Optional[int], caps: Caps) -> None:
    start = time.monotonic()
    while not receiver.poll(LOOK_EVERY):
        if caps.seconds is not None and time.monotonic() - start > caps.seconds:
            raise OverTimeError
        if caps.megabytes is not None and peak_megabytes(pid) > caps.megabytes:
            raise OverMemoryError


def _received(receiver: Connection, process: Any, caps: Caps) -> Any:
    try:
        value, error, peak = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise UserError(
                "a process was killed, as the system does when memory runs out: give a cap on "
                "memory or fewer workers"
            ) from None
        raise RuntimeError(f"a process ended with status {process.exitcode}") from None
    if caps.megabytes is not None and peak > caps.megabytes:
        raise OverMemoryError
    if error is not None:
        raise error
    return value


def peak_megabytes(pid: Optional[int]) -> float:
    """Return the most memory a process has had resident at once; 0 when it has ended."""
    with suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8") as handle:
        found = re.search(r"VmHWM:\s*(\d+) kB", handle.read())
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def die_with_parent() -> None:
    """Let the system kill this process when the one that started it ends, however it ends."""
    with suppress(OSError, AttributeError):  # another system has no prctl
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
