"""Resuming: what a run may change, evaluations that were interrupted, and one writer per folder."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from bort import checkpoint, processor
from bort.errors import Stopped, UserError
from bort.files import lock_folder
from bort.parameters import read_arrays
from bort.pretraining import run as pretraining
from bort.pretraining import teacher
from data.shards import open_shards
from tests.pretraining.helpers import (
    SHAPE,
    arguments,
    arrays_of,
    digest,
    finished_run,
    make_run,
    metrics,
    settings_of_run,
    teacher_flags,
    write_data,
    write_shards,
)

pytestmark = pytest.mark.integration

STEPS = 12
SLOW = pytest.mark.slow  # another interval, with the same kind of interruption


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def flags(data: Path, folder: Path, **others: object) -> dict[str, object]:
    """Return the flags of a run with dropout whose checkpoints and evaluations coincide once."""
    common = {"num_steps": STEPS, "ckpt_interval": 3, "eval_interval": 6, "log_interval": 5}
    common.update(data_eval=data / "test", dropout=0.1, seed=9, batch_size_eval=4)
    return {"ckpt_dir": folder, **common, **others}


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = finished_run(data, **flags(data, folder))
    return digest(run), metrics(folder), state_of(folder)


def state_of(folder: Path) -> dict[str, object]:
    """Return the state of the newest checkpoint without what names the folder."""
    state = checkpoint.load(str(folder / "checkpoint_last")).state
    names = ("step", "position", "best_score", "best_step", "interval")
    return {**{name: state[name] for name in names}, "files": sorted(state["sha256"])}


# ---- evaluations -------------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates SIGKILL inside this process."""


def disturb(monkeypatch, at: int, what) -> None:
    """Call `what` in the middle of the evaluation number `at`, the first being that at step 0."""
    evaluate, calls = pretraining.evaluate, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) - 1 == at:
            what()
        return evaluate(*given)

    monkeypatch.setattr(pretraining, "evaluate", interrupted)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize(
    ("at", "interval"),
    [(1, 3), (2, 4), pytest.param(1, 4, marks=SLOW), pytest.param(2, 3, marks=SLOW)],
)
def test_a_run_killed_in_an_evaluation_has_lost_nothing(
    data, tmp_path, monkeypatch, uninterrupted, at, interval
):
    """The checkpoint of a step comes before its evaluation, which the resumed run makes up for."""
    given = flags(data, tmp_path, ckpt_interval=interval)
    with monkeypatch.context() as patch:
        disturb(patch, at, kill)
        with pytest.raises(Killed):
            finished_run(data, **given)
    saved = checkpoint.load(str(tmp_path / "checkpoint_last")).state
    assert saved["step"] == (6 * at if interval == 3 else 4 * at + 4 * (at == 2))
    assert saved.get("evaluation_pending", False) == (saved["step"] % 6 == 0)
    resumed = finished_run(data, **given, resume=True)
    assert (digest(resumed), metrics(tmp_path), state_of(tmp_path)) == uninterrupted
    assert "evaluation_pending" not in checkpoint.load(str(tmp_path / "checkpoint_last")).state


@pytest.mark.parametrize("interval", [3, pytest.param(4, marks=SLOW)])
def test_sigterm_ends_an_evaluation_between_two_batches(
    data, tmp_path, monkeypatch, uninterrupted, interval
):
    given = flags(data, tmp_path, ckpt_interval=interval)
    with monkeypatch.context() as patch:
        disturb(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped after step 6"):
            finished_run(data, **given)
    assert [line["step"] for line in metrics(tmp_path) if line["phase"] == "eval"] == [0]
    saved = checkpoint.load(str(tmp_path / "checkpoint_last")).state
    assert (saved["step"], saved["evaluation_pending"]) == (6, True)
    resumed = finished_run(data, **given, resume=True)
    assert (digest(resumed), metrics(tmp_path), state_of(tmp_path)) == uninterrupted


def test_model_json_has_the_best_loss_of_its_own_evaluation(data, tmp_path):
    finished_run(data, **flags(data, tmp_path))
    path = tmp_path / "checkpoint_last"
    told = json.loads((path / "model.json").read_text())["details"]["metrics"]
    assert told == {"lowest held-out mlm_loss": -checkpoint.load(str(path)).state["best_score"]}


def test_model_json_tells_how_much_text_the_model_has_seen(data, tmp_path):
    shards = open_shards(str(data / "train"))
    # All sequences are one batch, and a pass is one step.
    given = {"batch_size": shards.num_sequences, "num_buckets": 1, "ckpt_dir": tmp_path}
    finished_run(data, **given, num_steps=3)
    told = json.loads((tmp_path / "checkpoint_last/model.json").read_text())["details"]
    assert told["tokens seen"] == f"{3 * shards.manifest.totals['tokens']:,}"
    assert (told["step"], told["passes over the data"]) == (3, "3")


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"optimizer": "sgd"}, "--optimizer sgd: the checkpoint was made with bertadam"),
        ({"student_model": "bort_1_2_32_16"}, "--student_model bort_1_2_32_16: the checkpoint"),
        ({"student_parameters": "teacher.params"}, "--student_parameters teacher.params: the"),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused_by_name(
    data, tmp_path, monkeypatch, changed, named
):
    monkeypatch.chdir(data)
    finished_run(data, ckpt_dir=tmp_path, num_steps=1)
    with pytest.raises(UserError, match=named):
        finished_run(data, ckpt_dir=tmp_path, num_steps=2, resume=True, **changed)


@pytest.mark.parametrize("spelled", ["./teacher.params", "{data}/teacher.params", "run/../start"])
def test_a_resumed_run_may_spell_its_first_weights_in_another_way(
    data, tmp_path, monkeypatch, spelled
):
    monkeypatch.chdir(tmp_path)
    for name in ("teacher.params", "start"):
        os.symlink(data / "teacher.params", name)
    finished_run(data, ckpt_dir="run", num_steps=1, student_parameters="teacher.params")
    given = {"num_steps": 2, "resume": True, "student_parameters": spelled.format(data=data)}
    assert finished_run(data, ckpt_dir="run", **given).progress.step == 2


@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("auto", "float32")])
def test_checkpoints_are_float32_for_every_type_of_product(data, tmp_path, bfloat16, before, after):
    run = finished_run(data, ckpt_dir=tmp_path, num_steps=2, dtype=before)
    path = checkpoint.latest(str(tmp_path)).model_path
    assert {array.dtype for array in read_arrays(path).values()} == {np.dtype("float32")}
    resumed = make_run(data, ckpt_dir=tmp_path, num_steps=4, resume=True, dtype=after)
    resumed.setup()
    for name, array in arrays_of(run).items():
        np.testing.assert_array_equal(arrays_of(resumed)[name], array)
    resumed.train()
    with pytest.raises(UserError, match="--dtype float16: the checkpoint was made with"):
        pretraining.check_resume(
            settings_of_run(data, dtype="float16"),
            pretraining.open_data(settings_of_run(data).data, seed=0),
            checkpoint.latest(str(tmp_path)).state,
        )


def test_what_changes_the_loss_or_the_schedule_of_a_resumed_run_is_named(data, tmp_path, capsys):
    given = {"ckpt_dir": tmp_path, "lr": 0.001, **teacher_flags(data)}
    finished_run(data, num_steps=1, **given)
    finished_run(data, num_steps=2, resume=True, ckpt_interval=1, **given)
    assert "warning" not in capsys.readouterr().err
    finished_run(data, num_steps=3, resume=True, ckpt_dir=tmp_path, mlm_weight=1)
    named = "--teacher_model, --teacher_ckpt_dir, --mlm_weight, --lr"
    said = f"warning: {named}: not what the checkpoint was made with; continuing"
    assert said in capsys.readouterr().err


def test_a_teacher_with_other_weights_than_before_is_named(data, tmp_path, capsys):
    finished_run(data, ckpt_dir=tmp_path / "teacher", num_steps=1)
    given = {"ckpt_dir": tmp_path / "run", "teacher_model": SHAPE, "ckpt_interval": 1}
    given["teacher_ckpt_dir"] = tmp_path / "teacher"
    finished_run(data, num_steps=1, **given)
    finished_run(data, num_steps=2, resume=True, **given)
    assert "warning" not in capsys.readouterr().err
    finished_run(data, ckpt_dir=tmp_path / "teacher", num_steps=2, resume=True)
    finished_run(data, num_steps=3, resume=True, **given)
    said = f"warning: {tmp_path / 'teacher'}: holds another teacher than the checkpoint was trained"
    assert said in capsys.readouterr().err
    finished_run(data, num_steps=4, resume=True, **given)
    assert "warning" not in capsys.readouterr().err


def test_another_accumulation_is_applied_on_resume(data, tmp_path):
    run = finished_run(data, ckpt_dir=tmp_path, num_steps=2)
    assert run.progress.batches == 2
    run = finished_run(data, ckpt_dir=tmp_path, num_steps=4, resume=True, accumulate=3)
    assert (run.micro_batches, run.progress.batches) == (3, 8)
    run = finished_run(data, ckpt_dir=tmp_path, num_steps=5, resume=True, accumulate=3)
    assert (run.micro_batches, run.progress.batches) == (3, 11)
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["DataSettings"]["accumulate"] == 3


def test_the_best_checkpoint_outlives_training_without_held_out_data(data, tmp_path):
    given = {"ckpt_dir": tmp_path, "eval_interval": 2, "ckpt_interval": 1, "keep_checkpoints": 1}
    finished_run(data, **given, data_eval=data / "test", num_steps=2, lr=0.0)
    before = checkpoint.load(str(tmp_path / "checkpoint_best")).state
    finished_run(data, **given, num_steps=4, resume=True)
    assert checkpoint.load(str(tmp_path / "checkpoint_best")).state == before
    # And the score is still compared with that of the same data later.
    after = checkpoint.load(str(tmp_path / "checkpoint_last")).state
    assert after["step"] == 4
    for name in ("best_step", "best_score", "held_out_sha256"):
        assert after[name] == before[name]


def test_the_best_score_starts_over_on_other_held_out_data(data, tmp_path, capsys):
    write_shards(tmp_path / "other", sizes=(5,), seed=8)
    folder = tmp_path / "run"
    given = {"ckpt_dir": folder, "eval_interval": 2, "ckpt_interval": 2, "lr": 0.0}
    finished_run(data, num_steps=2, data_eval=data / "test", **given)
    best = checkpoint.load(str(folder / "checkpoint_last")).state["best_score"]
    finished_run(data, num_steps=4, data_eval=tmp_path / "other", resume=True, **given)
    state = checkpoint.load(str(folder / "checkpoint_last")).state
    assert state["best_step"] == 4, "without training it would be no better on the same data"
    assert state["best_score"] != best
    warning = "warning: --data_eval {}: not the held-out shards of the checkpoint; "
    assert warning.format(tmp_path / "other") in capsys.readouterr().err


def test_a_best_checkpoint_that_a_later_one_had_replaced_is_replaced_again(data, tmp_path, capsys):
    """Steps 2 and 6 are the best; --start_step 4 takes back the second, the first was pruned."""
    given = {"ckpt_dir": tmp_path, "eval_interval": 2, "ckpt_interval": 1, "keep_checkpoints": 3}
    run = make_run(data, **given, data_eval=data / "test", num_steps=6)
    scores = {2: 2.0, 4: 1.0, 6: 3.0}
    scored = dataclasses.replace(
        run.job.evaluation, score=lambda metrics: scores[run.progress.step]
    )
    run.job = dataclasses.replace(run.job, evaluation=scored)
    run.run()
    assert checkpoint.steps(str(tmp_path)) == [4, 5, 6]
    capsys.readouterr()
    finished_run(data, **given, data_eval=data / "test", num_steps=6, start_step=4, lr=0.0)
    warned = f"warning: {tmp_path}: the best checkpoint, of step 2, is gone; the best one of now on"
    assert warned in capsys.readouterr().err
    assert os.readlink(tmp_path / "checkpoint_best") == "step-0000006"


def test_the_first_held_out_data_is_not_warned_of(data, tmp_path, capsys):
    given = {"ckpt_dir": tmp_path, "eval_interval": 2, "ckpt_interval": 2}
    finished_run(data, num_steps=2, **given)
    finished_run(data, num_steps=4, data_eval=data / "test", resume=True, **given)
    assert checkpoint.load(str(tmp_path / "checkpoint_last")).state["best_step"] == 4
    assert "warning" not in capsys.readouterr().err


def test_unknown_lines_in_the_metrics_do_not_prevent_resuming(data, tmp_path, capsys):
    unknown = b"".join([b"\xff\xfe\n", b"[1]\n", b'{"step": "x"}\n', b"{}\n", b"\n"])
    given = {"ckpt_dir": tmp_path, "num_steps": 10, "ckpt_interval": 5, "log_interval": 5}
    finished_run(data, **given)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + unknown + second)
    capsys.readouterr()
    finished_run(data, **{**given, "num_steps": 15}, resume=True)
    assert [record["step"] for record in metrics(tmp_path)] == [5, 10, 15]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == unknown
    assert "5 line(s) are not metrics; moved to" in capsys.readouterr().err


def test_a_state_of_another_type_is_refused(data, tmp_path):
    finished_run(data, ckpt_dir=tmp_path, num_steps=1)
    path = str(tmp_path / "step-0000001")
    state = checkpoint.load(path).state
    state["interval"] = "none"
    checkpoint.write_state(path, state)
    with pytest.raises(UserError, match=r"state\.json: is not the state of a run .*interval"):
        finished_run(data, ckpt_dir=tmp_path, num_steps=2, resume=True)


# ---- one writer, and a folder that can be written ------------------------------------------------


def test_a_second_writer_of_a_run_is_refused(data, tmp_path, capsys):
    from run_pretraining_distillation import main

    with lock_folder(str(tmp_path / "run")), pytest.raises(SystemExit) as stopped:
        main(arguments(data, ckpt_dir=tmp_path / "run", resume=True))
    assert stopped.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"--ckpt_dir {tmp_path / 'run'}: process {os.getpid()} on " in said[0]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"gpus": "0"}, "--gpus 0: MXNet sees 0 GPU(s) here; leave --gpus out for the CPU"),
        ({"gpus": "-1"}, "--gpus -1: MXNet sees"),
        ({"gpus": "0,0"}, "--gpus 0,0: names a device twice"),
        ({"dtype": "float16"}, "--dtype float16: needs GPUs"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16: this processor has neither AVX512-BF16 nor"),
        (
            {"teacher_dtype": "bfloat16", "teacher_cache": "cache"},
            "--teacher_dtype bfloat16: this processor has neither",
        ),
        ({"teacher_dtype": "bfloat16"}, "--teacher_dtype bfloat16: there is no teacher; give"),
        (
            {"teacher_runtime": "openvino", "teacher_model": SHAPE, "teacher_ckpt_dir": "run"},
            "--teacher_runtime openvino: needs the package",
        ),
        ({"teacher_runtime": "openvino"}, "--teacher_runtime openvino: there is no teacher; give"),
        ({"log_teacher_mse": True}, "--log_teacher_mse: there is no teacher; give"),
        (
            {"teacher_runtime": "openvino", "teacher_cache": "cache"},
            "--teacher_cache replaces the teacher: leave --teacher_runtime out",
        ),
        ({"lr": "inf"}, "--lr inf: must be a finite number"),
        ({"epsilon": 0}, "--epsilon 0.0: must be at least 1e-30"),
        ({"mlm_weight": 0}, "--mlm_weight 0: the loss is zero without a teacher"),
        ({"ckpt_dir": "file"}, "file is not a folder"),
        ({"ckpt_dir": "file/below"}, "file is not a folder"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_an_impossible_run_is_a_one_line_error_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, given, named, check
):
    from run_pretraining_distillation import main

    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(teacher, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    # There are no shards: what is wrong is found before they are looked for.
    line = arguments(tmp_path, **{"ckpt_dir": "run", **given, "check": check})
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert named in (captured.out + captured.err)
    assert os.listdir() == ["file"]


def test_a_run_is_repeated_from_its_config(data, tmp_path):
    from run_pretraining_distillation import main

    line = arguments(data, ckpt_dir=tmp_path / "one", num_steps=6, seed=4, data_eval=data / "test")
    evaluations = main(line)
    again = ["--config", str(tmp_path / "one" / "config.json"), "--ckpt_dir", str(tmp_path / "two")]
    assert main(again) == evaluations
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


def test_a_run_of_a_version_with_other_arithmetic_resumes_with_a_warning(
    data, tmp_path, monkeypatch, capsys
):
    given = {"num_steps": 4, "ckpt_interval": 2, "dropout": 0.1}
    with monkeypatch.context() as earlier:
        earlier.setattr("bort.training.loop.ARITHMETIC_VERSION", 0)
        finished_run(data, ckpt_dir=tmp_path, **given)
    capsys.readouterr()
    finished_run(data, ckpt_dir=tmp_path, **{**given, "num_steps": 6}, resume=True)
    assert f"warning: {tmp_path}: made by a version with other dropout" in capsys.readouterr().err
    finished_run(data, ckpt_dir=tmp_path, **{**given, "num_steps": 8}, resume=True)
    assert "other dropout" not in capsys.readouterr().err
