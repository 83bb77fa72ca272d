"""Functions in processes of their own: what comes back, and what becomes of those over a cap."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

from bort import jobs
from bort.errors import UserError
from bort.jobs import Caps, OverMemoryError, OverTimeError, peak_megabytes, run_isolated
from tests.pretraining.helpers import ROOT


def pid_and_threads():
    return os.getpid(), os.environ["OMP_NUM_THREADS"]


def say_and_sleep(path):
    with open(path, "w") as handle:
        handle.write(str(os.getpid()))
    time.sleep(60)


def take_memory(megabytes, seconds):
    taken = np.ones(int(megabytes * 2**20), dtype=np.uint8)
    time.sleep(seconds)
    return int(taken[0])


def mistake():
    raise UserError("file: wrong; mend it")


def bug():
    raise KeyError("not a user's")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def gone(pid, seconds=5.0):
    """Wait until a process is no more, or only waits to be buried."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as handle:
                if handle.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_the_result_comes_from_another_process_with_its_own_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    pid, threads = run_isolated(pid_and_threads, threads=3)
    assert (pid != os.getpid(), threads) == (True, "3")
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    run_isolated(pid_and_threads, threads=3)
    assert "OMP_NUM_THREADS" not in os.environ


def test_errors_reach_the_caller(capfd):
    with pytest.raises(UserError, match="file: wrong; mend it"):
        run_isolated(mistake, threads=1)
    with pytest.raises(RuntimeError, match="ended with status 1"):
        run_isolated(bug, threads=1)
    assert "not a user's" in capfd.readouterr().err
    with pytest.raises(UserError, match="killed, as the system does when memory runs out"):
        run_isolated(killed, threads=1)


def test_a_process_over_time_is_ended(tmp_path):
    path = tmp_path / "pid"
    start = time.monotonic()
    with pytest.raises(OverTimeError):
        run_isolated(partial(say_and_sleep, path), 1, Caps(seconds=2.0))
    assert time.monotonic() - start < 10
    assert gone(path.read_text())


def test_a_process_over_memory_is_ended():
    start = time.monotonic()
    with pytest.raises(OverMemoryError):
        run_isolated(partial(take_memory, 300, 60), 1, Caps(megabytes=200))
    assert time.monotonic() - start < 10
    assert run_isolated(partial(take_memory, 1, 0), 1, Caps(60, 200)) == 1


def test_a_short_peak_between_two_looks_counts(monkeypatch):
    monkeypatch.setattr(jobs, "LOOK_EVERY", 60)
    with pytest.raises(OverMemoryError):
        run_isolated(partial(take_memory, 300, 0), 1, Caps(megabytes=200))


def test_peaks_are_read():
    assert 10 < peak_megabytes(os.getpid()) < 1e5
    assert peak_megabytes(2**22 + 1) == 0  # no process has this number


def test_nothing_outlives_a_killed_parent(tmp_path):
    path = tmp_path / "pid"
    program = (
        "import sys; from functools import partial; from tests.test_jobs import *\n"
        f"if __name__ == '__main__': run_isolated(partial(say_and_sleep, {str(path)!r}), 1)"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], env=environment) as parent:
        while not (path.exists() and path.read_text()):
            time.sleep(0.05)
            assert parent.poll() is None
        parent.kill()
    assert gone(path.read_text())
