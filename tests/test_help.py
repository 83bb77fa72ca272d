"""What every program prints with --help, without importing MXNet."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import contextlib, io, os, runpy, sys

for path in sys.argv[1:]:
    sys.path[0] = os.path.dirname(path)  # as where Python is given the file
    sys.argv = [path, "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    assert printed.getvalue().startswith("usage: "), path
    assert "mxnet" not in sys.modules, path
"""


def test_help_of_every_program_is_printed_without_mxnet():
    programs = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]
    programs = [str(path) for path in programs if path.name != "setup_env.py"]
    assert len(programs) > 25
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *programs],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
