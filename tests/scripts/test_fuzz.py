"""fuzz.py: damaged files for every reader, faults for every program."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.integration


def fuzz(*words: object) -> str:
    """Run the program, whose children have to be forked before MXNet has threads."""
    ended = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "fuzz.py"), *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.parametrize(
    ("cases", "seed"),
    [
        (2000, 1),
        pytest.param(50_000, 2, marks=pytest.mark.slow),
    ],
)
def test_every_reader_with_damaged_files(cases, seed):
    assert "no problems" in fuzz("--cases", cases, "--seed", seed)


@pytest.mark.slow
def test_no_flipped_bit_is_unnoticed_where_there_are_checksums():
    *_, total = [line for line in fuzz("--flips", "--cases", 4000).splitlines() if line][:-2]
    assert total.split()[-1] == "0", total


@pytest.mark.slow
def test_every_program_under_every_fault():
    assert "no problems" in fuzz("--faults")
