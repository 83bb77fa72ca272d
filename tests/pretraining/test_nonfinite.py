"""Gradients that are not finite, injected into tiny runs: named, saved, skipped; the loss scale."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any, Iterable

import numpy as np
import pytest

import run_pretraining_distillation
from bort.errors import UserError
from bort.training.optimization import LossScale
from tests.pretraining.helpers import (
    arguments,
    arrays_of,
    digest,
    finished_run,
    horovodrun,
    make_run,
    metrics,
    write_shards,
)

pytestmark = pytest.mark.integration

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return a folder with shards in train/."""
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder / "train", sizes=(11, 5, 9), seed=1)
    return folder


def flags(folder: Path, **others: Any) -> dict[str, Any]:
    """Return the flags of a run with dropout whose intervals all differ."""
    common = {"num_steps": STEPS, "ckpt_interval": 4, "log_interval": 5, "dropout": 0.1}
    return {"ckpt_dir": folder, **common, "lr": 0.001, "seed": 9, **others}


def poison(monkeypatch, numbers: Iterable[int], value: float = float("nan")) -> None:
    """Multiply the gradient of the micro-batches `numbers` by `value`."""
    from bort.pretraining import run as pretraining
    from bort.training.loop import Loop

    current = []
    seed_dropout = Loop._seed_dropout
    loss = pretraining.distillation_loss

    def noting(self, number, device):
        current[:] = [number]
        return seed_dropout(self, number, device)

    def poisoned(*given):
        parts = loss(*given)
        return parts._replace(gradient=parts.gradient * value) if current[0] in bad else parts

    bad = set(numbers)
    monkeypatch.setattr(Loop, "_seed_dropout", noting)
    monkeypatch.setattr(pretraining, "distillation_loss", poisoned)


def weights_after(data: Path, folder: Path, step: int, **others: Any) -> dict[str, np.ndarray]:
    """Return parameters and optimiser state of an uninterrupted run after `step` steps."""
    run = make_run(data, **flags(folder, **others))
    run.setup()
    batches = run.batches()
    for _ in range(step):
        run.train_step(batches)
    batches.close()
    return arrays_of(run)


# ---- stop --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "accumulate", "value"),
    [
        *((step, 1, float("nan")) for step in (1, 7, 8, STEPS)),
        (8, 2, float("inf")),
        *(pytest.param(step, 2, float("inf"), marks=pytest.mark.slow) for step in (1, 7, STEPS)),
    ],
)
def test_a_gradient_that_is_not_finite_stops_the_run_and_is_saved(
    data, tmp_path, monkeypatch, step, accumulate, value
):
    """Also in the first step, in that of a checkpoint, and in the last one."""
    from bort import checkpoint

    last = accumulate * step - 1
    poison(monkeypatch, [last], value)
    run = make_run(data, **flags(tmp_path, accumulate=accumulate))
    with pytest.raises(UserError) as stopped:
        run.run()
    path = tmp_path / f"nonfinite-step-{step:07d}.npz"
    first = last - accumulate + 1
    assert str(stopped.value) == (
        f"step {step}: the gradient of micro-batches {first} to {last} is not finite; they are "
        f"saved in {path}; the parameters are as before the step; "
        "--resume with --on_nonfinite skip continues without it"
    )
    with np.load(path, allow_pickle=False) as arrays:
        assert len(arrays.files) == 4 * accumulate
        for number in range(first, last + 1):
            batch = run.job.stream.source(number)
            for name in ("input_ids", "valid_length", "masked_positions", "labels"):
                np.testing.assert_array_equal(arrays[f"{name}.{number}"], getattr(batch, name))
    found = checkpoint.latest(str(tmp_path))
    # The step itself is found out by the next one, before which a checkpoint may have been due.
    assert (found.state["step"] if found else 0) == (step - 1) // 4 * 4
    assert {p.name for p in tmp_path.glob("nonfinite-*")} == {path.name}


@pytest.mark.parametrize("step", [3, STEPS])
def test_the_parameters_are_as_before_the_step(data, tmp_path, monkeypatch, step):
    before = weights_after(data, tmp_path / "before", step - 1)
    poison(monkeypatch, [step - 1])
    run = make_run(data, **flags(tmp_path / "poisoned", on_nonfinite="skip"))
    run.setup()
    batches = run.batches()
    for _ in range(step):
        run.train_step(batches)
    batches.close()
    after = arrays_of(run)
    assert all((before[name] == after[name]).all() for name in before)


def test_the_program_ends_with_one_line_and_status_1(data, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, [2])
    with pytest.raises(SystemExit) as left:
        run_pretraining_distillation.main(arguments(data, **flags(tmp_path / "run")))
    assert left.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: step 3: the gradient of micro-batches 2 to 2 is not finite")
    assert (tmp_path / "run" / "nonfinite-step-0000003.npz").exists()


# ---- skip --------------------------------------------------------------------------------------


def test_skipping_continues_and_is_reported(data, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, [1, 6, STEPS - 1])
    run = finished_run(data, **flags(tmp_path, on_nonfinite="skip"))
    assert run.progress.step == STEPS
    assert all(np.isfinite(array).all() for array in arrays_of(run).values())
    said = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert [line.split(":")[1] for line in said] == [" step 2", " step 7", f" step {STEPS}"]
    assert len(list(tmp_path.glob("nonfinite-*.npz"))) == 3


def test_a_stopped_run_is_resumed_by_skipping(data, tmp_path, monkeypatch):
    poison(monkeypatch, [6])
    uninterrupted = finished_run(data, **flags(tmp_path / "skipped", on_nonfinite="skip"))
    folder = tmp_path / "stopped"
    with pytest.raises(UserError):
        finished_run(data, **flags(folder))
    resumed = finished_run(data, **flags(folder, on_nonfinite="skip", resume=True))
    assert digest(resumed) == digest(uninterrupted)


POISONED_PROGRAM = """
    import os, sys
    from bort.pretraining import run as pretraining
    from run_pretraining_distillation_hvd import main

    loss, calls = pretraining.distillation_loss, []

    def poisoned(*given):
        calls.append(given)
        parts = loss(*given)
        bad = len(calls) == 3 and os.environ["HOROVOD_RANK"] == "1"
        return parts._replace(gradient=parts.gradient * float("nan")) if bad else parts

    pretraining.distillation_loss = poisoned
    main(sys.argv[1:])
"""


@pytest.mark.distributed
def test_two_ranks_stop_together_and_leave_a_whole_file(data, tmp_path):
    """Rank 1 alone sees it; rank 0 saves the batches of both."""
    program = tmp_path / "poisoned.py"
    program.write_text(textwrap.dedent(POISONED_PROGRAM))
    with pytest.raises(AssertionError, match="micro-batches 4 to 5 is not finite"):
        horovodrun(2, "python", str(program), *arguments(data, **flags(tmp_path / "run")))
    with np.load(tmp_path / "run" / "nonfinite-step-0000003.npz", allow_pickle=False) as arrays:
        assert len(arrays.files) == 8
        assert all(len(arrays[name]) for name in arrays.files)


# ---- the loss scale ------------------------------------------------------------------------------


def scaled_run(data: Path, folder: Path, value: float = 2.0**15, window: int = 4, **others) -> Any:
    """Return a float32 run with the loss scale of float16, which CPUs cannot run."""
    run = make_run(data, **flags(folder, **others))
    run.trainer.loss_scale = LossScale(value, window)
    return run


def scales(folder: Path) -> list[float]:
    return [line["loss_scale"] for line in metrics(folder)]


def test_a_power_of_two_as_loss_scale_changes_no_bit(data, tmp_path):
    plain = finished_run(data, **flags(tmp_path / "plain"))
    scaled = scaled_run(data, tmp_path / "scaled", value=2.0**10, window=100)
    scaled.run()
    assert digest(scaled) == digest(plain)


def test_an_overflow_skips_its_step_and_halves_the_scale(data, tmp_path, monkeypatch):
    """Micro-batches 1, 5 and 6 overflow, so the scale doubles once, after the four that follow."""
    poison(monkeypatch, [1, 5, 6], float("inf"))
    skipping = finished_run(data, **flags(tmp_path / "skipping", on_nonfinite="skip"))
    run = scaled_run(data, tmp_path / "scaled", value=64.0, log_interval=1)
    run.run()
    assert scales(tmp_path / "scaled") == [64, 32, 32, 32, 32, 16, 8, 8, 8, 8, 16, 16]
    assert (run.trainer.loss_scale.value, run.trainer.loss_scale.good_updates) == (16.0, 1)
    assert digest(run) == digest(skipping)
    assert not list((tmp_path / "scaled").glob("nonfinite-*")), "overflows are part of the method"


def test_an_overflow_at_scale_1_stops_the_run_or_is_skipped(data, tmp_path, monkeypatch):
    """No smaller scale can prevent it: the gradient itself is not finite."""
    poison(monkeypatch, range(3), float("inf"))
    run = scaled_run(data, tmp_path / "stops", value=4.0, log_interval=1, window=100)
    with pytest.raises(UserError, match="step 3: the gradient of micro-batches 2 to 2 is not"):
        run.run()
    skips = {"on_nonfinite": "skip", "log_interval": 1, "window": 100}
    run = scaled_run(data, tmp_path / "skips", value=4.0, **skips)
    run.run()
    assert scales(tmp_path / "skips") == [2] + 11 * [1]


@pytest.mark.parametrize("scale", [None, 2.0**15])
def test_gradients_that_are_never_finite_stop_a_run_that_skips(data, tmp_path, monkeypatch, scale):
    poison(monkeypatch, range(100))
    monkeypatch.setattr("bort.training.loop.MAX_SKIPPED", 6)
    run = make_run(data, **flags(tmp_path, on_nonfinite="skip"))
    run.trainer.loss_scale = LossScale(scale) if scale else None
    with pytest.raises(UserError, match="step 7: the gradient of 7 updates in a row is not finite"):
        run.run()
    assert (tmp_path / "checkpoint_last").resolve().name == "step-0000004"


def test_the_state_of_the_loss_scale_is_resumed(data, tmp_path, monkeypatch):
    poison(monkeypatch, [1, 6], float("inf"))
    expected = scaled_run(data, tmp_path / "expected", value=64.0)
    expected.run()
    folder = tmp_path / "stopped"
    stopped = scaled_run(data, folder, value=64.0, num_steps=STEPS)
    stopped.setup()
    batches = stopped.batches()
    for _ in range(4):
        stopped.train_step(batches)
    batches.close()
    stopped.save()
    state = json.loads((folder / "step-0000004" / "state.json").read_text())
    assert state["loss_scale"] == [32.0, 2]
    # Made with other values, so that what it ends with can only come from the checkpoint.
    resumed = scaled_run(data, folder, value=2.0, resume=True)
    resumed.run()
    assert digest(resumed) == digest(expected)
    for name in ("value", "good_updates"):
        found = getattr(resumed.trainer.loss_scale, name)
        assert found == getattr(expected.trainer.loss_scale, name)
