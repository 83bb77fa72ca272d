"""The pretraining loop on tiny runs: what it computes, and that interruptions change nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bort.errors import Stopped, UserError
from bort.reporter import read_records
from bort.tokenization import TokenizerSettings, load_tokenizer
from bort.training.reporting import Stopwatch
from tests import reference
from tests.pretraining.helpers import (
    SHAPE,
    arguments,
    arrays_of,
    assert_same_training,
    digest,
    finished_run,
    held_out_of,
    make_run,
    metrics,
    teacher_flags,
    write_data,
    write_shards,
)
from tests.reference import parameters_of

HEADS = 2
TEMPERATURE = 2.0  # the default of --distillation_temperature
PROGRAM = Path(__file__).resolve().parents[2] / "run_pretraining_distillation.py"

SLOW = pytest.mark.slow


class Killed(BaseException):
    """Simulates SIGKILL inside this process."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


# ---- what is computed --------------------------------------------------------------------------


def test_losses_at_a_fixed_seed(data, tmp_path):
    """Golden numbers, to 1e-3: another CPU rounds differently, and 20 steps at this rate amplify.

    They change only with the data, the order, the initial weights, dropout, loss or update.
    """
    run = make_run(data, ckpt_dir=tmp_path, data_eval=data / "test", seed=7, **teacher_flags(data))
    evaluations = run.run()
    losses = [line["loss"] for line in metrics(tmp_path) if line["phase"] == "train"]
    assert losses == pytest.approx([0.76722, 0.70571, 0.66658, 0.62784], rel=1e-3)
    assert [line["kl"] for line in evaluations] == pytest.approx([0.75291, 0.44910], rel=1e-3)


def test_losses_in_bfloat16_at_a_fixed_seed(data, tmp_path, bfloat16):
    """Golden numbers, to 2e-3: at this rate 20 steps amplify what rounding changed by 3e-3."""
    flags = {"dtype": "bfloat16", "teacher_dtype": "bfloat16", **teacher_flags(data)}
    run = make_run(data, ckpt_dir=tmp_path, data_eval=data / "test", seed=7, **flags)
    evaluations = run.run()
    losses = [line["loss"] for line in metrics(tmp_path) if line["phase"] == "train"]
    assert losses == pytest.approx([0.76506, 0.70908, 0.67192, 0.62257], rel=2e-3)
    assert [line["kl"] for line in evaluations] == pytest.approx([0.75224, 0.45302], rel=2e-3)


def numpy_evaluation(run, shards) -> dict[str, float]:
    """Evaluate sequence by sequence in float64, without batches or padding."""
    student, teacher = map(parameters_of, (run.job.network, run.job.step.teacher.network))
    sums = dict.fromkeys(("mlm_loss", "accuracy", "kl", "teacher_accuracy"), 0.0)
    positions = 0
    for index in range(shards.num_sequences):
        ids, places, labels = shards.sequence(index)
        logits, taught = (
            reference.decode(model, reference.encode(model, HEADS, ids)[places])
            for model in (student, teacher)
        )
        sums["mlm_loss"] += reference.cross_entropy(logits, labels).sum()
        sums["kl"] += reference.distillation_kl(logits, taught, TEMPERATURE).sum()
        sums["accuracy"] += (logits.argmax(axis=1) == labels).sum()
        sums["teacher_accuracy"] += (taught.argmax(axis=1) == labels).sum()
        positions += len(labels)
    return {name: value / positions for name, value in sums.items()}


class OneOfTwo:
    """Rank `rank` of two, for evaluation only: its sum is its own part."""

    size = 2

    def __init__(self, rank):
        self.rank = rank
        self.local_rank = rank
        self.part = None

    def allreduce(self, values):
        self.part = values
        return values


def test_evaluation_equals_float64_numpy_for_any_batches_and_ranks(data, tmp_path):
    from bort.communicator import SingleProcess
    from bort.pretraining.evaluation import evaluate
    from data.shards import open_shards

    flags = {"ckpt_dir": tmp_path, "data_eval": data / "test", **teacher_flags(data)}
    expected = None
    for cut in ({"batch_size_eval": 3, "num_buckets": 4}, {"batch_size_eval": 100}):
        run = make_run(data, **flags, **cut)
        reference.redraw(run.job.network, seed=11, deviation=0.2)
        expected = expected or numpy_evaluation(run, open_shards(str(data / "test")))
        held_out = held_out_of(data, **flags, **cut)
        found = (run.job.network, run.job.step.teacher, held_out, TEMPERATURE)
        alone = evaluate(*found, SingleProcess(), run.devices[0])
        assert alone == pytest.approx(expected, rel=1e-5)
        parts = []
        for rank in range(2):
            parts.append(OneOfTwo(rank))
            evaluate(*found, parts[-1], run.devices[0])
        mlm, correct, kl, teacher_correct, positions = parts[0].part[:5] + parts[1].part[:5]
        together = np.array([mlm, correct, kl, teacher_correct]) / positions
        assert dict(zip(expected, together)) == pytest.approx(expected, rel=1e-5)


def test_a_student_equal_to_its_teacher_is_at_no_distance_from_it(data, tmp_path):
    run = make_run(
        data,
        ckpt_dir=tmp_path,
        data_eval=data / "test",
        student_parameters=data / "teacher.params",
        num_steps=1,
        **teacher_flags(data),
    )
    first = run.run()[0]
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert first["accuracy"] == first["teacher_accuracy"]


def test_bodies_of_other_options_are_student_and_teacher(data, tmp_path):
    from bort.saved_model import ModelConfig, build_network, load_model, save_model
    from bort.shapes import BodyOptions
    from data.shards import open_shards
    from tests.reference import redraw

    options = BodyOptions(layer_norm_eps=1e-3, type_separator=2)
    manifest = open_shards(str(data / "train")).manifest
    vocabulary = manifest.vocab_size, manifest.tokenizer_fingerprint
    paths = {}
    for name, shape in (("student", "bort_1_2_32_16"), ("teacher", "bort_2_4_32_48")):
        config = ModelConfig(shape, *vocabulary, "masked_lm", **options._asdict())
        network = build_network(config)
        redraw(network, seed=1, deviation=0.2)
        paths[name] = tmp_path / name / "model.params"
        save_model(str(paths[name]), network, config, None)
    given = {
        "student_model": "bort_1_2_32_16",
        "student_parameters": paths["student"],
        "teacher_model": "bort_2_4_32_48",
        "teacher_ckpt_dir": paths["teacher"],
        "data_eval": data / "test",
        "eval_interval": 20,
    }
    before, after = make_run(data, ckpt_dir=tmp_path / "run", **given).run()
    assert after["kl"] < before["kl"]
    trained = load_model(str(tmp_path / "run"))
    assert trained.model_config.body_options == options
    for flag, shape in (("student_model", "bort_1_4_32_16"), ("teacher_model", "bort_2_2_32_48")):
        with pytest.raises(UserError, match=f"--{flag} {shape}: .* is of the shape .*; give that"):
            make_run(data, ckpt_dir=tmp_path / "other", **{**given, flag: shape})


def test_distillation_lowers_the_divergence_from_the_teacher(data, tmp_path):
    run = make_run(
        data,
        ckpt_dir=tmp_path,
        data_eval=data / "test",
        eval_interval=20,
        ckpt_interval=20,
        mlm_weight=0.0,
        teacher_ce_weight=1.0,
        **teacher_flags(data),
    )
    before, after = run.run()
    assert after["kl"] < 0.7 * before["kl"]  # over four seeds 0.46 to 0.60


def test_masked_language_modelling_alone_learns_the_shards(data, tmp_path):
    run = make_run(data, ckpt_dir=tmp_path, num_steps=40, mlm_weight=1.0, dropout=0.0)
    run.run()
    lines = metrics(tmp_path)
    assert {line["phase"] for line in lines} == {"train"}, "nothing is held out"
    losses = [line["mlm_loss"] for line in lines]
    # 4.03 nats is a guess among the 56 words.
    assert losses[0] > 3.9
    assert np.mean(losses[-3:]) < 3.5  # over three seeds 3.34 to 3.36


def test_the_teacher_stays_as_it_was_loaded(data, tmp_path):
    run = make_run(data, ckpt_dir=tmp_path, num_steps=5, **teacher_flags(data))
    before = parameters_of(run.job.step.teacher.network)
    run.run()
    after = parameters_of(run.job.step.teacher.network)
    assert all((before[name] == after[name]).all() for name in before)


def test_micro_batches_are_averaged_by_their_masked_positions(data, tmp_path):
    """Five micro-batches with unequal numbers of masks train like the one batch of them all."""
    flags = {"num_buckets": 1, "dropout": 0.0, "num_steps": 4, "log_interval": 1, "lr": 0.001}
    folders = tmp_path / "whole", tmp_path / "parts"
    whole = finished_run(data, ckpt_dir=folders[0], batch_size=25, **flags)
    parts = finished_run(data, ckpt_dir=folders[1], batch_size=5, accumulate=5, **flags)
    assert len({len(parts.job.stream.source(number).labels) for number in range(5)}) > 1
    assert_same_training(
        folders[0], parameters_of(whole.job.network), folders[1], parameters_of(parts.job.network)
    )


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=SLOW)])
def test_two_devices_in_one_process_train_like_one_that_accumulates(data, tmp_path, accumulate):
    flags = {**teacher_flags(data), "data_eval": data / "test", "lr": 0.001, "num_steps": 6}
    folders = tmp_path / "one", tmp_path / "two"
    one = finished_run(data, ckpt_dir=folders[0], accumulate=2 * accumulate, **flags)
    two = finished_run(data, ckpt_dir=folders[1], accumulate=accumulate, cpu_contexts=2, **flags)
    assert_same_training(
        folders[0], parameters_of(one.job.network), folders[1], parameters_of(two.job.network)
    )
    for parameter in two.job.network.collect_params().values():
        first, second = parameter.list_data()
        assert (first.asnumpy() == second.asnumpy()).all(), parameter.name


def test_a_run_keeps_its_global_batches_on_another_number_of_devices(data, tmp_path):
    flags = {"num_steps": 6, "ckpt_interval": 3, "keep_checkpoints": 5, "lr": 0.001}
    uninterrupted = finished_run(data, ckpt_dir=tmp_path / "one", accumulate=2, **flags)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "one", moved, symlinks=True)
    resumed = finished_run(data, ckpt_dir=moved, cpu_contexts=2, start_step=3, **flags)
    assert_same_training(
        tmp_path / "one",
        parameters_of(uninterrupted.job.network),
        moved,
        parameters_of(resumed.job.network),
    )
    before = sorted(os.listdir(moved))
    given = {"accumulate": 2, "cpu_contexts": 3, "start_step": 3}
    crowded = make_run(data, ckpt_dir=moved, **given, **flags)
    with pytest.raises(UserError, match="2 micro-batches, too few for 3 workers"):
        crowded.run()
    assert sorted(os.listdir(moved)) == before, "the later checkpoint is not deleted"


def test_workers_that_join_a_run_of_fewer_micro_batches_are_idle(data, tmp_path, capsys):
    flags = {"num_steps": 3, "data_eval": data / "test"}
    expected = arrays_of(finished_run(data, ckpt_dir=tmp_path / "one", **flags))
    run = make_run(data, ckpt_dir=tmp_path / "two", cpu_contexts=2, **flags)
    run.micro_batches = 1  # as of a run that began with one worker
    run.start(may_idle=True)
    run.train()
    assert "warning: 1 of 2 workers have nothing to do; a run that" in capsys.readouterr().out
    for name, array in arrays_of(run).items():
        np.testing.assert_array_equal(array, expected[name], name)


# ---- what is used ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulate", "use_avg_len"), [pytest.param(1, False, marks=SLOW), (2, False), (3, True)]
)
def test_every_batch_of_every_shard_is_used(data, tmp_path, monkeypatch, accumulate, use_avg_len):
    from bort.pretraining import run as pretraining
    from data.shards import open_shards

    used = []
    to_device = pretraining.to_device

    def recording(batch, device):
        for ids, length in zip(batch.input_ids, batch.valid_length):
            used.append(tuple(ids[:length]))
        return to_device(batch, device)

    monkeypatch.setattr(pretraining, "to_device", recording)
    flags = {"accumulate": accumulate, "use_avg_len": use_avg_len, "seed": 3}
    flags["batch_size"] = 50 if use_avg_len else 4
    per_epoch = make_run(data, ckpt_dir=tmp_path, **flags).job.stream.source.batches_per_epoch
    epochs = 2 * accumulate
    steps = epochs * per_epoch // accumulate
    finished_run(data, ckpt_dir=tmp_path, num_steps=steps, **flags)
    shards = open_shards(str(data / "train"))
    there = [tuple(shards.sequence(index)[0]) for index in range(shards.num_sequences)]
    assert len(set(there)) == shards.num_sequences == 25
    assert sorted(used) == sorted(there * epochs)


def test_the_run_leaves_its_settings_metrics_and_checkpoints(data, tmp_path):
    finished_run(
        data, ckpt_dir=tmp_path, data_eval=data / "test", eval_interval=6, ckpt_interval=7, seed=5
    )
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["RunSettings"]["seed"] == 5
    assert settings["DataSettings"]["data"] == str(data / "train")
    lines = [(line["phase"], line["step"]) for line in metrics(tmp_path)]
    assert [step for phase, step in lines if phase == "train"] == [5, 10, 15, 20]
    assert [step for phase, step in lines if phase == "eval"] == [0, 6, 12, 18, 20]


def test_every_metric_line_has_the_time_per_phase(data, tmp_path):
    finished_run(data, ckpt_dir=tmp_path, num_steps=12, log_interval=5, **teacher_flags(data))
    written = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [line for line in map(json.loads, written) if line["phase"] == "train"]
    assert [line["step"] for line in lines] == [5, 10, 12]
    phases = ("data", "teacher", "student", "communication", "update")
    for line in lines:
        shares = [line[f"{phase}_share"] for phase in phases]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) >= 0


def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss(data, tmp_path):
    from bort import checkpoint

    # The rate is far too high towards the end: the best is not the last.
    finished_run(
        data,
        ckpt_dir=tmp_path,
        data_eval=data / "test",
        eval_interval=2,
        keep_checkpoints=1,
        lr=0.5,
    )
    best = checkpoint.load(str(tmp_path / "checkpoint_best")).state
    held_out = [line for line in metrics(tmp_path) if line["phase"] == "eval" and line["step"]]
    lowest = min(held_out, key=lambda line: line["mlm_loss"])
    assert best["step"] == lowest["step"]
    assert best["best_score"] == -lowest["mlm_loss"]
    assert {path.name for path in tmp_path.glob("step-*")} == {
        f"step-{lowest['step']:07d}",
        "step-0000020",
    }


def test_a_resumed_run_keeps_its_best_checkpoint(data, tmp_path):
    flags = {
        "data_eval": data / "test",
        "num_steps": 10,
        "eval_interval": 2,
        "keep_checkpoints": 1,
        "lr": 0.5,
        "seed": 1,
    }
    finished_run(data, ckpt_dir=tmp_path / "uninterrupted", **flags)
    run_killed_at(data, tmp_path / "resumed", 7, **flags)
    finished_run(data, ckpt_dir=tmp_path / "resumed", resume=True, **flags)
    one, other = ((tmp_path / name) for name in ("uninterrupted", "resumed"))
    best = os.readlink(one / "checkpoint_best")
    assert best < "step-0000006", "there is no best checkpoint from before the kill"
    assert os.readlink(other / "checkpoint_best") == best
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))


# ---- exact resume ------------------------------------------------------------------------------

STEPS = 18
NEEDS_OPENVINO = pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is not installed")
CONFIGURATIONS = {
    "plain": {},
    "teacher": {"with_teacher": True},
    "accumulating": {"accumulate": 2},
    "tokens": {"use_avg_len": True, "batch_size": 60},
    "bfloat16": {"dtype": "bfloat16", "teacher_dtype": "bfloat16", "with_teacher": True},
    "openvino": {"teacher_runtime": "openvino", "with_teacher": True},
}


def resumable_flags(data: Path, configuration: str) -> dict[str, object]:
    """Return the flags of a run with dropout whose intervals all differ."""
    flags = dict(CONFIGURATIONS[configuration])
    if flags.pop("with_teacher", False):
        flags.update(teacher_flags(data))
    common = {"num_steps": STEPS, "ckpt_interval": 4, "log_interval": 5, "eval_interval": 6}
    return {**common, "data_eval": data / "test", "dropout": 0.1, "seed": 9, **flags}


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Return a function: configuration -> (digest, metrics) of a run without interruption."""
    done = {}

    def get(configuration):
        if configuration not in done:
            folder = tmp_path_factory.mktemp(configuration)
            run = finished_run(data, ckpt_dir=folder, **resumable_flags(data, configuration))
            done[configuration] = digest(run), metrics(folder)
        return done[configuration]

    return get


def kill_at_batch(monkeypatch, batches: int) -> None:
    """Let the run die when it is about to use a training batch after `batches` of them."""
    from bort.pretraining.run import DistillationStep

    used = []
    step = DistillationStep.__call__

    def dying(self, batch, *rest):
        if len(used) == batches:
            raise Killed
        used.append(batch)
        return step(self, batch, *rest)

    monkeypatch.setattr(DistillationStep, "__call__", dying)


def run_killed_at(data, folder, batches, **flags) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at_batch(patch, batches)
        with pytest.raises(Killed):
            finished_run(data, ckpt_dir=folder, **flags)


@pytest.mark.parametrize(
    ("configuration", "batches"),
    [
        pytest.param("plain", 2, marks=SLOW),  # before the first checkpoint
        pytest.param("plain", 8, marks=SLOW),  # just after a checkpoint
        ("plain", 11),  # between checkpoints, a metric line and half an interval after one
        ("teacher", 14),
        pytest.param("accumulating", 2 * 9, marks=SLOW),  # between two accumulation groups
        ("accumulating", 2 * 6 + 1),  # inside one
        pytest.param("tokens", 11, marks=SLOW),
        ("bfloat16", 11),
        pytest.param("openvino", 11, marks=[NEEDS_OPENVINO, SLOW]),
    ],
)
def test_a_killed_and_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    data, tmp_path, uninterrupted, bfloat16, configuration, batches
):
    flags = resumable_flags(data, configuration)
    run_killed_at(data, tmp_path, batches, **flags)
    resumed = finished_run(data, ckpt_dir=tmp_path, resume=True, **flags)
    assert (digest(resumed), metrics(tmp_path)) == uninterrupted(configuration)


def test_resumed_again_and_again_across_the_ends_of_epochs(data, tmp_path, uninterrupted):
    flags = resumable_flags(data, "plain")
    run_killed_at(data, tmp_path, 5, **flags)
    for _ in range(2):
        run_killed_at(data, tmp_path, 7, resume=True, **flags)
    resumed = finished_run(data, ckpt_dir=tmp_path, resume=True, **flags)
    per_epoch = resumed.job.stream.source.batches_per_epoch
    # Killed in steps 6, 12 and 16; checkpoints, and ends of epochs, are in between.
    assert [step // per_epoch for step in (4, 8, 12, 15, STEPS)] == [0, 1, 1, 2, 2]
    assert (digest(resumed), metrics(tmp_path)) == uninterrupted("plain")


def test_a_resumed_run_times_the_tokens_that_it_has_read_itself(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Stopwatch, "lap", lambda stopwatch: 1.0)
    flags = resumable_flags(data, "plain")

    def tokens(folder):
        records = read_records(str(folder / "metrics.jsonl"))
        return {r["step"]: r["tokens_per_second"] for r in records if r["phase"] == "train"}

    finished_run(data, ckpt_dir=tmp_path / "each", **{**flags, "log_interval": 1})
    run_killed_at(data, tmp_path / "killed", 13, **flags)
    finished_run(data, ckpt_dir=tmp_path / "killed", resume=True, **flags)
    each, killed = tokens(tmp_path / "each"), tokens(tmp_path / "killed")
    assert killed[10] == sum(each[step] for step in range(6, 11))
    assert killed[15] == each[13] + each[14] + each[15]  # 11 and 12 are not timed here


def test_dropout_and_seed_change_the_result(data, tmp_path):
    flags = {"num_steps": 2, "dropout": 0.1, "seed": 9}
    changes = ({}, {"dropout": 0.0}, {"seed": 10})
    folders = [tmp_path / str(number) for number in range(3)]
    digests = [
        digest(finished_run(data, ckpt_dir=folder, **{**flags, **change}))
        for folder, change in zip(folders, changes)
    ]
    assert len(set(digests)) == 3


def test_start_step_resumes_from_that_step_and_drops_the_later_ones(data, tmp_path, uninterrupted):
    flags = {**resumable_flags(data, "plain"), "keep_checkpoints": 10}
    run_killed_at(data, tmp_path, 13, **flags)
    run_killed_at(data, tmp_path, 1, start_step=8, **flags)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-0000004", "step-0000006", "step-0000008"]
    resumed = finished_run(data, ckpt_dir=tmp_path, start_step=6, **flags)
    assert (digest(resumed), metrics(tmp_path)) == uninterrupted("plain")


def test_a_finished_run_resumed_does_nothing_more(data, tmp_path):
    flags = {"num_steps": 4, "data_eval": data / "test", "dropout": 0.1}
    finished = digest(finished_run(data, ckpt_dir=tmp_path, **flags)), metrics(tmp_path)
    resumed = finished_run(data, ckpt_dir=tmp_path, resume=True, **flags)
    assert (digest(resumed), metrics(tmp_path)) == finished


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"batch_size": 5}, "--batch_size 5: the checkpoint was made with 4"),
        ({"num_buckets": 2}, "--num_buckets 2"),
        ({"use_avg_len": True}, "--use_avg_len True"),
        ({"seed": 1}, "--seed 1"),
        ({"data": "test"}, "--data test: not the checkpoint's shards"),
    ],
)
def test_a_run_is_not_resumed_with_other_batches(data, tmp_path, monkeypatch, changed, named):
    finished_run(data, ckpt_dir=tmp_path, num_steps=1)
    monkeypatch.chdir(data)
    with pytest.raises(UserError, match=named):
        finished_run(data, ckpt_dir=tmp_path, num_steps=2, resume=True, **changed)


def test_a_run_with_the_order_of_another_version_is_not_resumed(data, tmp_path, monkeypatch):
    finished_run(data, ckpt_dir=tmp_path, num_steps=4)
    monkeypatch.setattr("bort.training.loop.SAMPLER_VERSION", 99)
    with pytest.raises(UserError, match="drawn in the order of another version; start a new run"):
        make_run(data, ckpt_dir=tmp_path, num_steps=8, resume=True).run()


def test_a_moved_run_resumes_from_moved_shards(data, tmp_path):
    finished_run(data, ckpt_dir=tmp_path / "here", num_steps=1)
    shutil.copytree(data / "train", tmp_path / "shards")
    (tmp_path / "here").rename(tmp_path / "there")
    flags = {"ckpt_dir": tmp_path / "there", "data": tmp_path / "shards", "num_steps": 2}
    assert finished_run(data, resume=True, **flags).progress.step == 2


def test_a_damaged_newest_checkpoint_is_skipped(data, tmp_path, uninterrupted, capsys):
    flags = resumable_flags(data, "plain")
    run_killed_at(data, tmp_path, 11, **flags)
    damaged = tmp_path / "step-0000008" / "trainer.npz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    resumed = finished_run(data, ckpt_dir=tmp_path, resume=True, **flags)
    assert f"warning: {damaged}: " in capsys.readouterr().err
    assert (digest(resumed), metrics(tmp_path)) == uninterrupted("plain")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    data, tmp_path, uninterrupted, number
):
    from bort import checkpoint
    from bort.pretraining import run as pretraining

    flags = resumable_flags(data, "plain")
    outside = signal.signal(number, signal.SIG_DFL)  # it may be ignored, as under nohup
    rate_of = pretraining.linear_warmup_decay

    def warned(step, *rest):
        if step == 7:
            os.kill(os.getpid(), number)
        return rate_of(step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "linear_warmup_decay", warned)
        with pytest.raises(Stopped, match="stopped after step 7; --resume continues") as stopped:
            finished_run(data, ckpt_dir=tmp_path, **flags)
    assert stopped.value.signum == number
    assert signal.signal(number, outside) is signal.SIG_DFL
    assert checkpoint.latest(str(tmp_path)).state["step"] == 7
    resumed = finished_run(data, ckpt_dir=tmp_path, resume=True, **flags)
    assert (digest(resumed), metrics(tmp_path)) == uninterrupted("plain")


def start(data: Path, folder: Path, **flags: object) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), *arguments(data, ckpt_dir=folder, **flags)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_step(folder: Path, process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 60
    path = folder / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and any(line["step"] >= step for line in metrics(folder)):
            return
        time.sleep(0.005)
    pytest.fail(f"step {step} was not reached: {process.stderr.read().decode()}")


@pytest.mark.slow  # 9 s: three processes; the test above stops runs in this process
def test_stopped_and_killed_processes_leave_the_bytes_of_an_uninterrupted_run(data, tmp_path):
    flags = {"num_steps": 240, "ckpt_interval": 20, "log_interval": 2, "seed": 4}
    expected = finished_run(data, ckpt_dir=tmp_path / "expected", **flags)
    folder = tmp_path / "interrupted"

    told = start(data, folder, **flags)
    wait_for_step(folder, told, 30)
    told.send_signal(signal.SIGTERM)
    assert told.wait(timeout=60) == 128 + signal.SIGTERM
    assert told.stderr.read().decode().startswith("stopped after step ")
    stopped_at = int(os.readlink(folder / "checkpoint_last")[len("step-") :])
    assert 30 <= stopped_at < 240

    killed = start(data, folder, resume=True, **flags)
    wait_for_step(folder, killed, stopped_at + 25)
    killed.kill()
    assert killed.wait(timeout=60) == -signal.SIGKILL

    resumed = finished_run(data, ckpt_dir=folder, resume=True, **flags)
    assert digest(resumed) == digest(expected)
    assert metrics(folder) == metrics(tmp_path / "expected")


# ---- mistakes of the user ----------------------------------------------------------------------


def complaint(capsys, status: int, line: list[str]) -> str:
    """Return the one line that the program leaves on stderr."""
    from run_pretraining_distillation import main

    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == status
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert shown[0].startswith("error: ")
    return shown[0]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"teacher_model": SHAPE}, "--teacher_ckpt_dir"),
        ({"teacher_ckpt_dir": "teacher.params"}, "--teacher_model"),
        ({"data": "absent"}, "absent"),
        ({"data": "beside"}, "beside/tokenizer: is not the tokenizer of the shards; restore"),
        ({"data_eval": "absent"}, "absent"),
        ({"data_eval": "other"}, "--data_eval other: made with another tokenizer"),
        ({"teacher_model": SHAPE, "teacher_ckpt_dir": "absent"}, "absent"),
        ({"teacher_model": "bert", "teacher_ckpt_dir": "teacher.params"}, "--teacher_model"),
        ({"teacher_model": "bort_2_2_32_32", "teacher_ckpt_dir": "teacher.params"}, "missing"),
        ({"teacher_model": SHAPE, "teacher_ckpt_dir": "foreign"}, "another tokenizer"),
        ({"student_model": "bort_1_3_32_32"}, "bort_1_3_32_32"),
        ({"student_parameters": "absent"}, "absent"),
        ({"start_step": 3}, "--start_step 3"),
        ({"ckpt_dir": "foreign"}, "--ckpt_dir foreign"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"dropout": 1.0}, "--dropout 1.0"),
    ],
)
def test_a_mistake_is_named_in_one_line(data, tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    write_shards("other", sizes=(3,), seed=1, fingerprint="another")
    write_shards("beside", sizes=(3,), seed=1)
    load_tokenizer(TokenizerSettings()).save("beside/tokenizer")
    foreign = {"data": "other", "ckpt_dir": "foreign", "num_steps": 1}
    finished_run(data, **foreign)
    os.symlink(data / "teacher.params", "teacher.params")
    capsys.readouterr()
    line = arguments(data, **{"ckpt_dir": "run", **flags})
    assert named in complaint(capsys, 1, line)
    assert not os.path.exists("run"), "nothing is left behind"


@pytest.mark.parametrize("content", ['{"TaskSettings": {}}', '{"vocab_size": 3}', "[]"])
def test_the_config_of_something_else_is_not_replaced(data, tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    said = complaint(capsys, 1, arguments(data, ckpt_dir=tmp_path))
    assert said.startswith(f"error: --ckpt_dir {tmp_path}: holds the config.json of something else")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_that_ended_before_its_first_checkpoint_may_start_again(data, tmp_path):
    from run_pretraining_distillation import main

    for content in ('{"LossSettings": {}}', "torn"):
        folder = tmp_path / str(len(content))
        folder.mkdir()
        (folder / "config.json").write_text(content)
        main(arguments(data, ckpt_dir=folder, num_steps=1))
        assert "StudentSettings" in (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("line", "named"), [(["--lr", "1"], "--data"), (["--data", "x", "--lr", "fast"], "--lr")]
)
def test_an_unreadable_command_line_is_a_one_line_error(capsys, line, named):
    assert named in complaint(capsys, 2, line)


def test_the_checkpoints_hold_what_the_run_has(data, tmp_path):
    from bort import checkpoint
    from bort.parameters import load_parameters

    run = finished_run(data, ckpt_dir=tmp_path, num_steps=3)
    found = checkpoint.latest(str(tmp_path))
    other = make_run(data, ckpt_dir=tmp_path / "other")
    load_parameters(other.job.network, found.model_path)
    other.trainer.load_state(found.trainer_arrays())
    mine, theirs = arrays_of(run), arrays_of(other)
    assert mine.keys() == theirs.keys()
    assert all((mine[name] == theirs[name]).all() for name in mine)
    assert any(array.any() for name, array in mine.items() if name.startswith("variance"))
