from __future__ import annotations

import inspect
import re
import subprocess
import sys
from typing import Any, Sequence

import pytest

from bort.errors import UserError, door
from tests.conftest import ROOT


def test_a_user_error_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    @door
    def main(argv: Sequence[str] | None = None) -> None:
        print("so far so good")
        raise UserError(f"{argv[0]}: no such file; give another" if argv else "")

    with pytest.raises(SystemExit) as caught:
        main(["x.txt"])
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.err == "error: x.txt: no such file; give another\n"
    assert printed.out == "so far so good\n"


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt(), SystemExit(2)])
def test_everything_else_passes_through(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    @door
    def main(argv: Sequence[str] | None = None) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        main()
    assert caught.value is error
    assert capsys.readouterr().err == ""


def test_the_result_and_the_arguments_pass_through() -> None:
    @door
    def main(argv: Sequence[str] | None = None) -> Any:
        """Do nothing."""
        return argv

    assert main() is None
    assert main(["--a", "1"]) == ["--a", "1"]
    assert (main.__name__, inspect.getdoc(main)) == ("main", "Do nothing.")


SCRIPT = """
from bort.errors import UserError, door

@door
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
