from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Sequence

import pytest

from bort.config import option, parse
from bort.errors import Stopped, UserError, entry_point, escaped, quoted, reasons
from tests.conftest import ROOT


class MXNetError(RuntimeError):
    """As MXNet's, which takes long to import."""


def test_a_user_error_is_printed_in_one_line_with_status_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> None:
        print("so far so good")
        raise UserError(f"{argv[0]}: no such file; give another" if argv else "")

    with pytest.raises(SystemExit) as caught:
        main(["x.txt"])
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.err == "error: x.txt: no such file; give another\n"
    assert printed.out == "so far so good\n"


@pytest.mark.parametrize("error", [ValueError("by peer"), MXNetError("ours"), SystemExit(2)])
def test_everything_else_passes_through(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        main()
    assert caught.value is error
    assert capsys.readouterr().err == ""


def test_the_result_and_the_arguments_pass_through() -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> Any:
        """Do nothing."""
        return argv

    assert main() is None
    assert main(["--a", "1"]) == ["--a", "1"]
    assert (main.__name__, inspect.getdoc(main)) == ("main", "Do nothing.")


SCRIPT = """
from bort.errors import UserError, entry_point

@entry_point
def main(argv=None):
    print("before")
    raise {error}("it broke")

main()
"""


@pytest.mark.parametrize(
    ("error", "stderr"),
    [
        ("UserError", r"error: it broke\n"),
        ("RuntimeError", r"Traceback .*\nRuntimeError: it broke\n"),
    ],
)
def test_a_process_ends_with_status_1_and_a_traceback_only_if_the_mistake_is_ours(
    error: str, stderr: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(error=error)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stdout == "before\n"
    assert re.fullmatch(stderr, ended.stderr, re.DOTALL)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MXNetError("\nHorovod has been shut down. This was"), 1, "error: another rank has ended"),
        (MXNetError("\nMXNetError: Connection reset by peer"), 1, "error: another rank has ended"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Stopped(15, "stopped at step 7"), 143, "stopped at step 7\n"),
        (ImportError("MXNet needs docstrings", name="mxnet"), 1, "error: MXNet needs docstrings\n"),
        (BrokenPipeError(), 141, ""),
        (PermissionError(13, "Permission denied", "a.txt"), 1, "error: a.txt: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "No space left on device\n"),
        (MemoryError(), 1, "out of memory"),
        (MXNetError("\nCheck failed: cudaMalloc failed: out of memory"), 1, "smaller batches"),
        (ImportError("MXNet needs docstrings", name="mxnet"), 1, "error: MXNet needs docstrings"),
        (UserError("a\nb\udc80"), 1, "error: a b\\udc80\n"),
    ],
)
def test_errors_of_users_and_the_system_are_one_line(error, status, line, capsys):
    @entry_point
    def main(argv: Sequence[str] | None = None) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == status
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == (1 if line else 0)


def shell(command: str) -> subprocess.CompletedProcess:
    script = """
from bort.errors import entry_point

@entry_point
def main(argv=None):
    for number in range(100_000):
        print(number)

main()
"""
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} {command}"
    return subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_what_the_encoding_of_stdout_lacks_is_escaped(environment):
    script = """
from bort.errors import entry_point

@entry_point
def main(argv=None):
    print("r\\u00fcns/MRPC")

main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "r\\xfcns/MRPC\n", "")


def test_a_closed_pipe_is_silent():
    ended = shell("| head -n 1; exit ${PIPESTATUS[0]}")
    assert (ended.returncode, ended.stdout, ended.stderr) == (141, "0\n", "")


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "ValueError('ours')"])
def test_ctrl_c_before_main_prints_one_line_and_a_bug_keeps_its_traceback(raised):
    program = os.path.join(ROOT, "scripts", "predict.py")
    script = f"__file__ = {program!r}\nimport bort\nraise {raised}"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if raised == "KeyboardInterrupt":
        assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    else:
        assert ended.returncode == 1
        assert "Traceback" in ended.stderr


def test_ctrl_c_ends_a_program_of_others_as_without_the_package(tmp_path):
    script = """
import atexit
import bort

file = open("answers.txt", "w")
file.write("those of an hour")
atexit.register(print, "at exit")
raise KeyboardInterrupt
"""
    (tmp_path / "theirs.py").write_text(script)
    ended = subprocess.run(
        [sys.executable, "theirs.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" in ended.stderr
    assert ended.stdout == "at exit\n"
    assert (tmp_path / "answers.txt").read_text() == "those of an hour"


def test_an_import_that_ctrl_c_breaks_is_one_line():
    """NumPy turns the exception of a Ctrl-C into an ImportError that does not tell."""
    script = """
import os, signal
from bort.errors import entry_point

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job

@entry_point
def main(argv=None):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass
    raise ImportError("Importing the numpy C-extensions failed")

main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_a_half_built_object_prints_nothing_after_ctrl_c():
    script = """
from bort.errors import entry_point

class Half:
    def __init__(self):
        raise KeyboardInterrupt

    def __del__(self):
        raise AttributeError("never set")

entry_point(lambda argv: Half())()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_a_full_disk_behind_standard_output_is_a_one_line_error():
    ended = shell("> /dev/full")
    assert ended.returncode == 1
    assert ended.stderr == "error: a file or standard output: No space left on device\n"


def test_closed_streams_change_nothing():
    ended = shell("<&- 2>&-")
    assert ended.returncode == 0
    assert ended.stdout.endswith("99999\n")


def test_a_value_nested_too_deeply_for_repr_is_quoted_by_its_kind():
    value: list = []
    for _ in range(100_000):
        value = [value]
    assert quoted(value) == "a list that is nested too deeply"


def test_long_values_are_shortened():
    assert quoted("a" * 500) == "'" + "a" * 199 + "... (502 characters)"
    assert escaped("a" * 500) == "a" * 200 + "... (500 characters)"
    assert quoted(1) == "1"


def test_a_message_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> None:
        raise UserError("a\x1b[31m\x07b\u202ec\udcff: \u00e9 \u6f22 \U0001f600, no\tsuch\nfile")

    with pytest.raises(SystemExit):
        main([])
    expected = "a\\x1b[31m\\x07b\\u202ec\\udcff: \u00e9 \u6f22 \U0001f600, no\\tsuch file"
    assert capsys.readouterr().err == f"error: {expected}\n"


def test_a_message_repeats_no_long_value_of_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Flags:
        """Flags."""

        number: int = option(1, "a number")
        path: str = option("", "a path")

    @entry_point
    def main(argv: Sequence[str] | None = None) -> None:
        (flags,) = parse("Test.", argv, Flags)
        raise UserError(f"--path {flags.path}: not found")

    for words in (["--number", "9" * 5000], ["--path", "a" * 5000], ["--path", "\U0001f4a5" * 500]):
        with pytest.raises(SystemExit):
            main(words)
        (line,) = capsys.readouterr().err.splitlines()
        assert len(line) < 450
        assert words[1][:150] in line
        assert "..." in line
    path = f"{'long/' * 60}file"
    with pytest.raises(SystemExit):
        main(["--path", path])
    assert f"--path {path}: not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "lines"),
    [
        ("", ["ValueError"]),  # as ONNX Runtime's may be
        (" \n\t\n", ["ValueError"]),
        ("\nCheck failed:\n  wrong rank\n", ["Check failed:", "wrong rank"]),
        ("x" * 500, [f"{'x' * 200}... (500 characters)"]),
    ],
)
def test_an_exception_without_a_message_gives_its_class(message: str, lines: list[str]) -> None:
    assert reasons(ValueError(message)) == lines
