"""UserError, and the entry-point decorator that turns errors into one line and an exit status."""

from __future__ import annotations

import functools
import io
import os
import re
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Callable, NoReturn, Optional, Sequence, TypeVar

Result = TypeVar("Result")
Main = Callable[[Optional[Sequence[str]]], Result]

QUOTED_CHARACTERS = 200
_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_SCRIPTS = os.path.join(_ROOT, "scripts")
_interrupts: list[int] = []  # the signals of Ctrl-C that came
_LONG_WORD = re.compile(r"\S{400,}")
# What MXNet says when it finds no room for an array, on GPUs and on CPUs.
_OUT_OF_MEMORY = re.compile(
    "out of memory|memory allocat|failed to allocate|bad_alloc|bad alloc", re.IGNORECASE
)
# In the error of a sum or broadcast under Horovod when another rank has ended.
_RANK_ENDED = re.compile(r"Horovod has been shut down|Connection (reset|closed) by peer")


class UserError(Exception):
    """A mistake the user can fix: names the file, line or flag, what is wrong, and the cure."""


class DivergedError(UserError):
    """A run ends because its gradient is not finite."""


class Stopped(Exception):  # noqa: N818  (not an error: the program did as it was told)
    """The program was told to stop by a signal and has saved its state."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(signum, message)  # all of it: a child process sends it to its parent
        self.signum, self.message = signum, message

    def __str__(self) -> str:
        return self.message


def quoted(value: object, characters: int = QUOTED_CHARACTERS) -> str:
    """Return `repr(value)`, shortened: a message never repeats a whole file."""
    try:
        text = repr(value)
    except RecursionError:  # of JSON that was nested just not too deeply to be read
        text = f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= characters else f"{text[:characters]}... ({len(text)} characters)"


def escaped(text: str, characters: int = QUOTED_CHARACTERS) -> str:
    """Return a text as `quoted` does, without the quotation marks."""
    shown = repr(text)[1:-1]
    if len(shown) <= characters:
        return shown
    return f"{shown[:characters]}... ({len(shown)} characters)"


def reasons(error: BaseException) -> list[str]:
    """Return the lines of an exception's message, shortened; its class where it has no message."""
    lines = [line.strip() for line in str(error).splitlines()]
    return [escaped(line) for line in lines if line] or [type(error).__name__]


def lacks_memory(error: BaseException) -> bool:
    """Return whether an exception, of Python or of MXNet, is for lack of memory."""
    is_of_mxnet = type(error).__name__ == "MXNetError"  # MXNet takes long to import
    return isinstance(error, MemoryError) or (
        is_of_mxnet and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def shortened(text: str) -> str:
    """Return a message with its longest words shortened: a flag's value, a path, a token."""
    return _LONG_WORD.sub(lambda found: f"{found[0][:200]}...{found[0][-100:]}", text)


def printable(text: str) -> str:
    """Return a text in one line for a terminal: control characters and what is no UTF-8 escaped."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "backslashreplace").decode()
        for one in text
    )


def entry_point(main: Main[Result]) -> Main[Result]:
    """Wrap the `main` of a program: what a user or the system causes is one line on stderr.

    Exit status: 1 for `UserError`, a failed read or write, lack of memory and of MXNet, and another
    rank's end; 128 + its number for a signal (130 for Ctrl-C, 141 for a closed pipe, which is
    silent). Any other exception keeps its traceback, because it is a bug.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> Result:
        _open_closed_streams()
        _escape_what_stdout_lacks()
        try:
            _note_interrupts()
            result = main(argv)
            sys.stdout.flush()
            return result
        except UserError as error:
            _exit(1, f"error: {error}")
        except Stopped as stop:
            _exit(128 + stop.signum, str(stop))
        except KeyboardInterrupt:
            # What was being made at that moment may fail in its destructor.
            sys.unraisablehook = lambda _: None
            _exit(128 + signal.SIGINT, "interrupted")
        except BrokenPipeError:
            _exit(128 + signal.SIGPIPE)
        except OSError as error:
            reason = error.strerror or reasons(error)[0]
            where = error.filename if error.filename is not None else "a file or standard output"
            _exit(1, f"error: {os.fsdecode(where)}: {reason}")
        except ImportError as error:
            _exit_if_interrupted()
            if error.name != "mxnet":
                raise
            _exit(1, f"error: {error}")
        except Exception as error:
            if lacks_memory(error):
                _exit(1, "error: out of memory; use smaller batches or fewer processes")
            _exit_if_interrupted()
            if type(error).__name__ == "MXNetError" and _RANK_ENDED.search(str(error)):
                _exit(1, "error: another rank has ended, and this one with it; its output says why")
            raise

    return wrapped


def install_interrupt_hook() -> None:
    """Let Ctrl-C during the imports of one of our programs, before its `main`, be one line as well.

    A program of others that imports the package keeps its own way to end: open files are written,
    temporary ones removed.
    """
    if not _is_our_program():
        return
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _report
    _note_interrupts()


def _is_our_program() -> bool:
    # A process that multiprocessing spawns runs the program's file under the second name.
    main = sys.modules.get("__mp_main__", sys.modules.get("__main__"))
    program = getattr(main, "__file__", None)
    if not program:
        return False
    folder = os.path.realpath(os.path.dirname(program))
    return folder == _ROOT or os.path.commonpath((folder, _SCRIPTS)) == _SCRIPTS


def _note_interrupts() -> None:
    """Remember a Ctrl-C: a package that is interrupted while it is imported raises ImportError."""
    with suppress(ValueError):  # not the main thread
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)


def _interrupt(signum: int, frame: Optional[FrameType]) -> None:
    _interrupts.append(signum)
    raise KeyboardInterrupt


def _exit_if_interrupted() -> None:
    if _interrupts:
        _exit(128 + signal.SIGINT, "interrupted")


def _report(
    kind: type[BaseException], error: BaseException, trace: Optional[TracebackType]
) -> None:
    if _interrupts or issubclass(kind, KeyboardInterrupt):
        with suppress(OSError, ValueError):
            print("interrupted", file=sys.stderr, flush=True)
        # Nothing is to be cleaned up yet, and a package that is half imported may crash at the end.
        os._exit(128 + signal.SIGINT)
    else:
        sys.__excepthook__(kind, error, trace)


def _exit(status: int, line: str = "") -> NoReturn:
    """Exit with one line on stderr; never with a second error while stdout is flushed."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        # The interpreter flushes again as it ends, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line:
        text = printable(shortened(" ".join(line.splitlines())))
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def _open_closed_streams() -> None:
    """Open what the shell closed (`2>&-`): a file opened later would otherwise take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            os.set_inheritable(number, True)  # child processes have the stream, too
            mode = "r" if number == 0 else "w"
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 (stays)
            setattr(sys, name, stream)


def _escape_what_stdout_lacks() -> None:
    """Let stdout escape characters, as stderr does, that the encoding of PYTHONIOENCODING lacks.

    A line of the log that names a folder would otherwise end a training.
    """
    # In the C locale, unless Python takes UTF-8 for it, `errors` is surrogateescape.
    refusing = ("strict", "surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in refusing:
        sys.stdout.reconfigure(errors="backslashreplace")
