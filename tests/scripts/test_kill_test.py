"""The kill test itself: its moments, that it sees a difference, and one small run of it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from bort import checkpoint
from scripts import kill_test
from tests.pretraining.helpers import write_shards

TIMING = kill_test.Timing(start=2.0, step=0.1)


def test_moments_fall_into_the_start_and_the_steps_and_repeat_with_the_seed():
    def drawn(seed):
        generator = random.Random(seed)
        return [kill_test.draw_moment(generator, 30.0, TIMING) for _ in range(400)]

    moments = drawn(5)
    assert moments == drawn(5)
    assert moments != drawn(6)
    starts = [moment for moment in moments if moment.steps is None]
    assert 400 / 10 < len(starts) < 400 / 3
    assert all(0 <= moment.seconds <= TIMING.start for moment in starts)
    later = [moment for moment in moments if moment.steps is not None]
    assert {0, 29} <= {moment.steps for moment in later} <= set(range(30))
    assert max(moment.seconds for moment in later) <= kill_test.SCATTER * TIMING.step


def end_of_run(folder, value: float) -> str:
    folder.mkdir()

    def write_model(path):
        with open(path, "wb") as handle:
            handle.write(b"weights")
        with open(path.replace(".params", ".json"), "w") as handle:
            handle.write(f"made by a command that names {folder}")

    checkpoint.save(str(folder), 3, write_model, {"mean.0": np.full(2, value)}, {})
    return str(folder)


def test_one_changed_bit_is_detected(tmp_path, capsys):
    first = end_of_run(tmp_path / "first", 1.0)
    kill_test.compare(first, end_of_run(tmp_path / "same", 1.0))
    other = end_of_run(tmp_path / "other", np.nextafter(1.0, 2.0))
    with pytest.raises(kill_test.UserError, match=r"other: trainer\.npz differ from those of"):
        kill_test.compare(first, other)


@pytest.mark.parametrize("moment", [(None, 30.0), (1000, 0.0), (0, 30.0)])
def test_a_run_that_ends_by_itself_is_not_taken_for_killed(monkeypatch, moment):
    monkeypatch.setattr(kill_test.time, "sleep", lambda seconds: process.wait())
    command = ["bash", "-c", "echo 'one; from step 0'; echo 'step  3  train loss 1'; exit 1"]
    started = kill_test._started

    def keeping(command):
        nonlocal process
        process = started(command)
        return process

    process = None
    monkeypatch.setattr(kill_test, "_started", keeping)
    with pytest.raises(kill_test.UserError, match="status 1 before it was killed"):
        kill_test.kill_at(kill_test.Moment(*moment), command)


@pytest.mark.slow
def test_a_run_killed_three_times_ends_like_an_uninterrupted_one(tmp_path, capsys):
    write_shards(tmp_path / "shards", sizes=(11, 5, 9), seed=1)
    line = {"data": tmp_path / "shards", "work_dir": tmp_path, "kills": 3, "num_steps": 60}
    words = [word for name, value in line.items() for word in (f"--{name}", str(value))]
    assert kill_test.main([*words, "--seed", "4"]) == 3
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("kill ") for line in said) == 3
    assert said[-1].startswith("3 of 3: ")
