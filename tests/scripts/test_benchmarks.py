from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.shards import open_shards

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_random_shards_are_full_and_the_same_each_time(tmp_path: Path) -> None:
    from benchmarks.workers import write_shards

    for name in ("one", "two"):
        write_shards(str(tmp_path / name), 2, sequences=7, length=20, vocab_size=100)
    shards = open_shards(str(tmp_path / "one"))
    np.testing.assert_array_equal(shards.lengths, [20] * 14)
    for index in range(14):
        ids, positions, labels = shards.sequence(index)
        assert 5 <= ids.min() <= ids.max() < 100
        assert len(positions) == len(labels) == 3
        assert (np.diff(positions) > 0).all()
        assert positions[-1] < 20
    assert shards.manifest.shards == open_shards(str(tmp_path / "two")).manifest.shards


def test_a_process_left_behind_is_found() -> None:
    from benchmarks.starvation import _family, _private_memory, _still_there

    code = "import subprocess; child = subprocess.Popen(['sleep', '60'], stdout=-3)"
    command = [sys.executable, "-c", f"{code}; print(child.pid, flush=True); input()"]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        family = _family(parent.pid)
        assert {process.pid for process in family} == {parent.pid, child}
        assert 1 < _private_memory(family) < 500
        parent.communicate("\n")
        assert [process.pid for process in _still_there(family, patience=0.1)] == [child]
    finally:
        os.kill(child, 9)
    assert not _still_there(family)
