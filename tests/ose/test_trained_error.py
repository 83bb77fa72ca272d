"""Errors by training: what is trained and measured; a search repeats and continues."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import mxnet as mx
import numpy as np
import pytest

from bort import processor
from bort.bort import get_bort_model
from bort.communicator import SingleProcess
from bort.config import build
from bort.errors import DivergedError, Stopped, UserError
from bort.files import lock_folder
from bort.jobs import OverTimeError, Serial
from bort.ose import run as ose_run
from bort.ose import trained_error as ose_training
from bort.ose.config import TrainingSettings, read_grid
from bort.ose.error_bounds import TeacherBounds, frequency_loss
from bort.ose.trained_error import (
    TrainedError,
    candidate_run,
    prepare_teacher,
    teacher_run,
    train,
)
from bort.parameters import load_parameters
from bort.pretraining.mlm import masked_logits, to_device
from bort.pretraining.run import open_data
from bort.shapes import Shape, shape_of
from data.shards import open_shards
from scripts import build_teacher_cache, run_ose
from tests.pretraining.helpers import (
    ROOT,
    SHAPE,
    VOCAB_SIZE,
    horovodrun,
    write_data,
    write_shards,
)

pytestmark = pytest.mark.integration

SMALL, MIDDLE, TOP = (Shape(1, 2, 8, 8), Shape(1, 2, 16, 16), Shape(2, 2, 16, 16))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    names = ", ".join(shape.name for shape in (SMALL, MIDDLE, TOP))
    (folder / "space.yaml").write_text(f"architectures: [{names}]\n")
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Train in this process, and note what is trained: a new process takes seconds to start."""
    calls = []
    trained = ose_training.train

    def train(run):
        calls.append(run)
        return trained(run)

    monkeypatch.setattr(ose_training, "train", train)
    monkeypatch.setattr(ose_training, "run_in_process", lambda function, threads: function())
    monkeypatch.setattr(ose_run, "Processes", lambda *_: Serial())
    return calls


def settings_of(data, **more):
    flags = {"data": f"{data}/train", "data_eval": f"{data}/test", "batch_size": 4, **more}
    return build(TrainingSettings, flags)


def flags_of(root, folder, **more):
    flags = {
        "space": root / "space.yaml",
        "data": root / "train",
        "data_eval": root / "test",
        "batch_size": 4,
        "steps": 8,
        "teacher_steps": 10,
        "sequence_length": 24,
        "workers": 1,
        "output_dir": folder,
        **more,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


# ---- what is asked for -------------------------------------------------------------------------


def test_the_grid_is_read():
    assert read_grid("lr=5e-4,1e-3,0.001,5e-4") == {"lr": [5e-4, 1e-3]}
    assert read_grid("lr=5e-4,1e-3 weight_decay=0") == {"lr": [5e-4, 1e-3], "weight_decay": [0.0]}
    wrong = {
        "rate=1": "must name one of .*lr, .*weight_bound",
        "lr": "must be num",
        "lr=x": "as in lr=",
    }
    for text, message in wrong.items():
        with pytest.raises(UserError, match=message):
            read_grid(text)
    with pytest.raises(UserError, match=r"--lr -1\.0: must be at least"):
        build(TrainingSettings, {"grid": "lr=-1"})


def test_candidates_and_t_multiply_in_the_type_of_the_flag(data, monkeypatch):
    settings = settings_of(data, dtype="auto")
    shape = shape_of("bort_1_2_16_16")
    for run in (
        ose_training.candidate_run(settings, None, shape, 5, {}, 0, "x"),
        ose_training.teacher_run(settings, shape, 0, "x"),
    ):
        assert run.optimizer.dtype == "auto"
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: False)
    with pytest.raises(UserError, match="--dtype bfloat16: this processor has neither AVX512-BF16"):
        settings_of(data, dtype="bfloat16")


def test_the_modes_set_optimiser_and_rate():
    practical = TrainingSettings(grid="lr=1e-3,2e-3 max_norm=5").hyperparameters()
    assert practical == [{"optimizer": "bertadam", "lr": r, "max_norm": 5} for r in (1e-3, 2e-3)]
    assert TrainingSettings(mode="theory").hyperparameters() == [
        {"optimizer": "sgd", "weight_bound": 1.0, "lr": 0.5}
    ]
    bound = TrainingSettings(mode="theory", grid="weight_bound=0.2").hyperparameters()
    assert bound[0]["weight_bound"] == 0.2
    for mode, name in (("practical", "weight_bound"), ("theory", "epsilon")):
        with pytest.raises(UserError, match=f"--grid {name}: has no effect with --mode {mode}"):
            TrainingSettings(mode=mode, grid=f"{name}=0.5,1").check()


def test_invalid_requests_are_refused(data, tmp_path, capsys):
    write_shards(tmp_path / "other", [4], seed=3, fingerprint="two")
    write_shards(tmp_path / "unknown", [4], seed=3, masked=False)
    (tmp_path / "one.yaml").write_text(f"architectures: [{TOP.name}]\n")
    wrong = [
        ({"data_eval": None}, "--data and --data_eval go together"),
        ({"data_eval": tmp_path / "other"}, "made with another tokenizer"),
        ({"data": tmp_path / "unknown"}, f"--data {tmp_path}/unknown: none of its tokens"),
        ({"data_eval": tmp_path / "unknown"}, "unknown: none of its tokens is masked"),
        (
            {"loss": "mlm", "teacher_ckpt_dir": "x"},
            "--teacher_ckpt_dir: --loss mlm needs no teacher",
        ),
        ({"loss": "mlm", "teacher_cache": "x"}, "--teacher_cache: --loss mlm needs no teacher"),
        (
            {"teacher_ckpt_dir": "x", "teacher_cache": "y"},
            "--teacher_cache replaces T's weights: leave --teacher_ckpt_dir out",
        ),
        ({"teacher_cache": tmp_path / "none"}, "is not a teacher cache"),
        ({"errors": "synthetic"}, "--errors replaces training"),
        ({"vocab_size": 60}, "--vocab_size 60: the shards have 61 tokens"),
        ({"max_length": 64}, "--max_length 64"),
        ({"stride": 4}, "stride 4: must be from 1 to 3"),
        ({"space": tmp_path / "one.yaml"}, "stride 1: all architectures that it visits have the"),
        ({"data": tmp_path / "absent"}, "absent"),
    ]
    for more, message in wrong:
        with pytest.raises(SystemExit):
            run_ose.main(flags_of(data, tmp_path / "out", **more))
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_candidate_is_trained_by_the_loss_that_is_measured(data):
    settings = settings_of(data, dropout=0.2)
    hparams = {"optimizer": "sgd", "weight_bound": 0.5, "lr": 0.3}
    plain = candidate_run(settings, None, SMALL, 7, hparams, 5, "folder")
    assert (plain.loss.mlm_weight, plain.loss.teacher_ce_weight) == (1, 0)
    teacher = ose_training.TrainedTeacher("cache", "sha", TeacherBounds(1.0, 2.0))
    taught = candidate_run(settings, teacher, SMALL, 7, hparams, 5, "folder")
    assert (taught.loss.mlm_weight, taught.loss.teacher_ce_weight) == (0, 1)
    assert taught.loss.distillation_temperature == 1
    assert taught.teacher.teacher_cache == "cache"
    assert (taught.optimizer.sgd_bound, taught.optimizer.lr) == (0.5, 0.3)
    assert (taught.optimizer.num_steps, taught.run.seed, taught.student.dropout) == (7, 5, 0.2)


# ---- what is measured --------------------------------------------------------------------------


def held_out_logits(settings, shape, path):
    """Return the logits [n, vocabulary], float64, of a stored network on the held-out shards."""
    network, _ = get_bort_model(shape.name, vocab=range(VOCAB_SIZE))
    load_parameters(network, path)
    run = candidate_run(settings, None, shape, 1, {}, 0, "")
    source = open_data(run.data, run.run.seed).held_out
    batches = [to_device(source(n), mx.cpu()) for n in range(source.batches_per_epoch)]
    logits = [masked_logits(network, batch).asnumpy() for batch in batches]
    labels = [batch.labels.asnumpy().astype(int) for batch in batches]
    return np.concatenate(logits).astype(np.float64), np.concatenate(labels)


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def model_path(folder):
    return str(folder / "checkpoint_last" / "model.params")


def test_the_error_is_the_cross_entropy_with_t(data, tmp_path, in_process):
    settings = settings_of(data, teacher_steps=20, teacher_lr=0.01)
    teacher = prepare_teacher(settings, TOP, 1, str(tmp_path))
    t, _ = held_out_logits(settings, TOP, model_path(tmp_path / "teacher"))
    t = log_softmax(t)
    assert teacher.bounds.entropy == pytest.approx(-(np.exp(t) * t).sum(axis=1).mean(), rel=1e-5)

    run = candidate_run(settings, teacher, SMALL, 10, {"lr": 0.01}, 3, str(tmp_path / "student"))
    figures = train(run)
    student, _ = held_out_logits(settings, SMALL, model_path(tmp_path / "student"))
    expected = -(np.exp(t) * log_softmax(student)).sum(axis=1).mean()
    assert teacher.bounds.entropy + figures["kl"] == pytest.approx(expected, rel=1e-5)

    error = TrainedError(settings, str(tmp_path), teacher)
    seeds = [np.random.default_rng(0).integers(2**31), np.random.default_rng(1).integers(2**31)]
    by_hand = [
        train(candidate_run(settings, teacher, SMALL, 10, {"lr": 0.01}, int(s), str(tmp_path / n)))
        for n, s in zip("ab", seeds)
    ]
    for seed, figures in enumerate(by_hand):
        given = error(SMALL, 10, {"lr": 0.01}, np.random.default_rng(seed))
        assert given == teacher.bounds.entropy + figures["kl"]
    assert by_hand[0] != by_hand[1]
    assert not list(tmp_path.glob(".candidate-*"))


def test_the_bounds_are_those_of_t_and_of_the_mean_of_its_distributions(data, tmp_path, in_process):
    settings = settings_of(data, teacher_ckpt_dir=f"{data}/teacher.params")
    teacher = prepare_teacher(settings, shape_of(SHAPE), 1, str(tmp_path))
    means = {}
    for part in ("train", "test"):
        held_out = settings_of(data, data_eval=f"{data}/{part}")
        t, _ = held_out_logits(held_out, shape_of(SHAPE), f"{data}/teacher.params")
        means[part] = np.exp(log_softmax(t)).mean(axis=0)
    expected = -(means["test"] * np.log(means["train"])).sum()
    assert teacher.bounds.plateau == pytest.approx(expected, rel=1e-5)
    assert teacher.bounds.plateau > teacher.bounds.entropy


def test_the_plateau_of_the_masked_lm_loss_is_that_of_the_frequencies(data):
    training, held_out = (open_shards(f"{data}/{part}") for part in ("train", "test"))
    counts = dict.fromkeys(range(VOCAB_SIZE), 1)
    for shard in training.shards:
        for token in shard.masked_ids:
            counts[int(token)] += 1
    total = sum(counts.values())
    losses = [
        -math.log(counts[int(t)] / total) for each in held_out.shards for t in each.masked_ids
    ]
    assert frequency_loss(training, held_out) == pytest.approx(np.mean(losses))


def test_the_error_may_be_the_masked_lm_loss(data, tmp_path, in_process):
    settings = settings_of(data, loss="mlm")
    hparams = settings.hyperparameters()[0]
    given = TrainedError(settings, str(tmp_path), None)(SMALL, 9, hparams, np.random.default_rng(0))
    seed = int(np.random.default_rng(0).integers(2**31))
    train(candidate_run(settings, None, SMALL, 9, hparams, seed, str(tmp_path / "again")))
    logits, labels = held_out_logits(settings, SMALL, model_path(tmp_path / "again"))
    expected = -log_softmax(logits)[np.arange(len(labels)), labels].mean()
    assert given == pytest.approx(expected, rel=1e-5)


def test_theory_mode_trains_within_the_bound(data, tmp_path, in_process):
    grid = {"mode": "theory", "grid": "lr=0.3 weight_bound=0.9"}
    settings = settings_of(data, loss="mlm", data_eval=f"{data}/train", **grid)
    (hparams,) = settings.hyperparameters()
    figures = {}
    for steps in (1, 60):
        folder = tmp_path / str(steps)
        run = candidate_run(settings, None, MIDDLE, steps, hparams, 0, str(folder))
        figures[steps] = train(run)
    network, _ = get_bort_model(MIDDLE.name, vocab=range(VOCAB_SIZE))
    load_parameters(network, model_path(folder))
    values = [abs(p.data().asnumpy()).max() for p in network.collect_params().values()]
    assert max(values) == np.float32(0.9)  # the gains of LayerNorm start at 1
    assert figures[60]["mlm_loss"] < figures[1]["mlm_loss"]
    assert not np.load(tmp_path / "60" / "checkpoint_last" / "trainer.npz").files


def test_a_run_that_was_asked_to_stop_raises_no_error(data, tmp_path, monkeypatch):
    from bort.training.loop import Loop

    monkeypatch.setattr(Loop, "_stop_agreed", lambda run: True)
    run = candidate_run(settings_of(data, loss="mlm"), None, SMALL, 5, {}, 0, str(tmp_path))
    with pytest.raises(Stopped):
        train(run)


def test_candidates_have_processes_with_the_threads_and_caps_of_the_flags(data):
    given = {"workers": 3, "threads": 2, "max_seconds": 60.0, "max_memory": 500.0}
    with ose_run.executor_of(settings_of(data, **given), SingleProcess()) as executor:
        assert (executor.workers, executor.threads, executor.caps) == (3, 2, (60.0, 500.0))


# ---- T -----------------------------------------------------------------------------------------


def test_the_training_of_t_resumes_where_it_was_killed(data, tmp_path, in_process, monkeypatch):
    settings = settings_of(data, teacher_steps=9)
    monkeypatch.setattr(ose_training, "TEACHER_INTERVAL", 3)
    uninterrupted = prepare_teacher(settings, TOP, 1, str(tmp_path / "a"))
    begun = teacher_run(settings, TOP, 1, str(tmp_path / "b" / "teacher"))
    from bort.training.loop import Loop

    with monkeypatch.context() as patch:
        stopped = lambda loop: loop.progress.step == 4  # noqa: E731
        patch.setattr(Loop, "_stop_agreed", stopped)
        with pytest.raises(Stopped):
            ose_training.train_teacher(begun)
    continued = prepare_teacher(settings, TOP, 1, str(tmp_path / "b"))
    assert continued.sha256 == uninterrupted.sha256
    assert continued.bounds.entropy == uninterrupted.bounds.entropy
    with pytest.raises(UserError, match=r"T was started with other settings \(--num_steps\)"):
        prepare_teacher(replace(settings, teacher_steps=12), TOP, 1, str(tmp_path / "b"))


def test_a_t_that_diverges_is_named_by_its_rate(data, tmp_path, in_process):
    settings = settings_of(data, teacher_steps=9, teacher_lr=1e30)
    with pytest.raises(UserError, match=r"--teacher_lr 1e\+30: the training of T in .* diverged"):
        prepare_teacher(settings, TOP, 1, str(tmp_path))


def test_t_may_be_given(data, tmp_path, in_process):
    settings = settings_of(data, teacher_ckpt_dir=f"{data}/teacher.params")
    shape = shape_of("bort_1_2_32_32")  # that of write_data
    teacher = prepare_teacher(settings, shape, 1, str(tmp_path))
    t, _ = held_out_logits(settings, shape, f"{data}/teacher.params")
    t = log_softmax(t)
    assert teacher.bounds.entropy == pytest.approx(-(np.exp(t) * t).sum(axis=1).mean(), rel=1e-5)
    assert not (tmp_path / "teacher").exists()


def test_ts_outputs_may_be_given(data, tmp_path, in_process, capsys):
    given = {"teacher_model": SHAPE, "teacher_ckpt_dir": data / "teacher.params"}
    sets = {"data": f"{data}/train,{data}/test", "output_dir": tmp_path / "cache"}
    build_teacher_cache.main([f"--{name}={value}" for name, value in {**given, **sets}.items()])
    cached = settings_of(data, teacher_cache=f"{tmp_path}/cache")
    teacher = prepare_teacher(cached, shape_of(SHAPE), 1, str(tmp_path / "out"))
    network = settings_of(data, teacher_ckpt_dir=f"{data}/teacher.params")
    live = prepare_teacher(network, shape_of(SHAPE), 1, str(tmp_path))
    assert (teacher.cache, teacher.sha256) == (f"{tmp_path}/cache", live.sha256)
    assert teacher.bounds == pytest.approx(live.bounds, rel=1e-3)  # the cache is of float16
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=f"made with {SHAPE}, but T is {TOP.name}; name T with"):
        prepare_teacher(cached, TOP, 1, str(tmp_path))


# ---- searches ----------------------------------------------------------------------------------


def test_a_search_by_divergence_repeats_no_training(data, tmp_path, in_process, capsys):
    steps = {"steps": 4, "teacher_steps": 4}
    by_entropy = run_ose.main(flags_of(data, tmp_path, **steps))
    report = json.loads((tmp_path / "ose.json").read_text())
    assert "errors are below" in capsys.readouterr().out
    in_process.clear()
    by_divergence = run_ose.main(flags_of(data, tmp_path, **steps, loss="divergence"))
    out = capsys.readouterr().out
    assert in_process == []
    entropy = float(out.split("entropy ")[1].split()[0])
    for row, other in zip(by_entropy.table, by_divergence.table):
        if row.error is None:
            assert other.error is None
        else:
            assert other.error == pytest.approx(row.error - entropy, abs=1e-4)
            assert other.w == pytest.approx(row.gain / other.error)
    written = json.loads((tmp_path / "ose.json").read_text())
    plateau = written["plateau"]
    assert plateau == pytest.approx(report["plateau"] - entropy, abs=1e-4)
    assert (report["lower_bound"], written["lower_bound"]) == (0, pytest.approx(entropy, abs=1e-4))
    errors = [row.error for row in by_divergence.table if row.error is not None]
    left = sum(error < plateau for error in errors)
    assert f"{left} of {len(errors)} errors are below {plateau:.4f}, the plateau" in out


def shapes_in(calls):
    return [run.student.student_model for run in calls]


@pytest.mark.slow
def test_a_search_continues_and_repeats(data, tmp_path, in_process, capsys):
    more = {"compare_strides": "1,2", "grid": "lr=0.01,0.02", "steps": 4, "teacher_steps": 4}
    result = run_ose.main(flags_of(data, tmp_path / "a", **more))
    assert sorted(shapes_in(in_process)) == 2 * [MIDDLE.name] + 2 * [SMALL.name]
    out = capsys.readouterr().out
    assert "   4 of 4  " in out
    strides = [line.split()[:2] for line in out.partition("stride  trained")[2].splitlines()]
    assert strides[1:3] == [["1", "4"], ["2", "2"]]

    journal = tmp_path / "a" / "journal-0.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 5
    journal.write_text("\n".join(lines[:3]) + '\n{"candidate": "torn')
    in_process.clear()
    assert run_ose.main(flags_of(data, tmp_path / "a", **more)) == result
    assert len(shapes_in(in_process)) == 2

    report = json.loads((tmp_path / "a" / "ose.json").read_text())
    assert report["model_name"] == result.best.architecture.name
    assert report["settings"]["TrainingSettings"]["repeats"] == 1
    assert run_ose.main(flags_of(data, tmp_path / "b", **more, seed=1)).table != result.table
    with pytest.raises(SystemExit):
        run_ose.main(flags_of(data, tmp_path / "a", **more, dropout=0.3))
    assert "give another --output_dir" in capsys.readouterr().err


def test_a_search_is_resumed_under_other_spellings_of_its_paths(data, tmp_path, in_process):
    steps = {"steps": 4, "teacher_steps": 4}
    result = run_ose.main(flags_of(data, tmp_path / "a", **steps))
    os.rename(tmp_path / "a", tmp_path / "b")
    (tmp_path / "linked").symlink_to(data)
    in_process.clear()
    trained = {"data": f"{data}/./train/", "data_eval": tmp_path / "linked" / "test"}
    again = run_ose.main(flags_of(data, f"{tmp_path}/./b/", **steps, **trained))
    assert again == result
    assert in_process == []


def test_a_second_search_in_a_folder_is_refused(data, tmp_path, in_process, capsys):
    with lock_folder(str(tmp_path)), pytest.raises(SystemExit):
        run_ose.main(flags_of(data, tmp_path))
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    assert in_process == []


def test_a_folder_of_another_search_is_refused_before_t_is_trained(
    data, tmp_path, in_process, monkeypatch, capsys
):
    monkeypatch.setattr(ose_training, "train", lambda run: {"mlm_loss": 4.0})
    run_ose.main(flags_of(data, tmp_path, loss="mlm"))
    journal = (tmp_path / "journal-0.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        run_ose.main(flags_of(data, tmp_path, max_memory=4000))
    (line,) = capsys.readouterr().err.splitlines()
    assert "journal-0.jsonl: was written by another search" in line
    assert "other values of loss, max_memory; give another --output_dir" in line
    assert not (tmp_path / "teacher").exists()
    assert (tmp_path / "journal-0.jsonl").read_bytes() == journal


@pytest.mark.parametrize("gives_up", [False, True])
def test_the_table_names_the_cap_and_the_divergence(
    data, tmp_path, in_process, monkeypatch, capsys, gives_up
):
    def train(run):
        shape = run.student.student_model
        if shape == MIDDLE.name:
            raise OverTimeError(7.0)
        if shape != SMALL.name and gives_up:
            raise DivergedError("step 102: the gradient of 101 updates in a row is not finite")
        return {"mlm_loss": 4.0 if shape == SMALL.name else np.nan}

    monkeypatch.setattr(ose_training, "train", train)
    more = {"loss": "mlm", "maximum_point": "bort_3_2_32_32"}
    result = run_ose.main(flags_of(data, tmp_path, **more))
    assert result.best.architecture == SMALL
    assert [row.failure for row in result.table] == ["", "time cap", "diverged"]
    out = capsys.readouterr().out
    assert f"   2 of 3  {MIDDLE.name}  time cap  7 s" in out
    assert "0.0000   time cap" in out
    assert "0.0000   diverged" in out
    table = json.loads((tmp_path / "ose.json").read_text())["table"]
    assert [(row["failure"], row["error"]) for row in table] == [
        ("", 4.0),
        ("time cap", None),
        ("diverged", None),
    ]
    assert run_ose.main(flags_of(data, tmp_path, **more)) == result  # from the journal


@pytest.mark.slow
def test_caps_and_workers_in_real_processes(data, tmp_path):
    big = Shape(1, 2, 8, 2048)
    space = data / "big.yaml"
    space.write_text(f"architectures: [{SMALL.name}, {MIDDLE.name}, {big.name}]\n")
    more = {
        "loss": "mlm",
        "space": space,
        "maximum_point": "bort_2_2_8_2048",
        "max_memory": 400,
        "max_seconds": 300,
    }
    one = run_ose.main(flags_of(data, tmp_path / "1", **more))
    assert [row.failure for row in one.table] == ["", "", "memory cap"]
    assert run_ose.main(flags_of(data, tmp_path / "2", **{**more, "workers": 2})) == one
    late = {**more, "max_seconds": 0.01}
    with pytest.raises(SystemExit):
        run_ose.main(flags_of(data, tmp_path / "3", **late))
    lines = (tmp_path / "3" / "journal-0.jsonl").read_text().splitlines()[1:]
    assert {json.loads(line)["failure"] for line in lines} == {"time cap"}


@pytest.mark.slow
def test_a_killed_search_continues(data, tmp_path, capsys):
    folder = tmp_path / "killed"
    journal = folder / "journal-0.jsonl"
    command = [sys.executable, "scripts/run_ose.py", *flags_of(data, folder, repeats=2)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        while not journal.exists() or len(journal.read_text().splitlines()) < 3:
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    before = journal.read_text()
    capsys.readouterr()
    continued = run_ose.main(flags_of(data, folder, repeats=2))
    assert "   2 of 2  " in capsys.readouterr().out  # of four
    assert journal.read_text().startswith(before)
    assert not list(folder.glob(".candidate-*"))
    assert continued == run_ose.main(flags_of(data, tmp_path / "uninterrupted", repeats=2))


@pytest.mark.distributed
def test_ranks_find_the_table_of_one_process(data, tmp_path, in_process):
    command = ["python", "scripts/run_ose.py"]
    flags = flags_of(data, tmp_path / "2")
    at = flags.index("--workers")
    horovodrun(2, *command, *flags[:at], *flags[at + 2 :])
    alone = run_ose.main(flags_of(data, tmp_path / "1"))
    reports = [json.loads((tmp_path / n / "ose.json").read_text())["table"] for n in "12"]
    for rows in reports:
        for row in rows:
            del row["seconds"]
    assert reports[0] == reports[1]
    assert len(alone.table) == 3
    assert (tmp_path / "2" / "journal-0.jsonl").read_text().count("\n") == 3
