"""Fine-tuning: it learns, counts right, resumes bit for bit, and leaves what it promises."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import finetune_classifier
from bort import checkpoint
from bort.communicator import SingleProcess
from bort.errors import Stopped, UserError
from bort.files import lock_folder, read_json
from bort.saved_model import (
    ModelConfig,
    build_network,
    read_model_config,
    save_model,
    save_model_config,
)
from bort.tokenization import BYTE_TO_CHARACTER, SAMPLE_MODEL, SPECIAL_TOKENS, ByteLevelBPE
from bort.wordpiece import read_wordpiece
from data.submission import check_submission
from data.tasks import get_task, task_names
from tests.conftest import ROOT
from tests.finetuning.helpers import (
    SHAPE,
    arguments,
    finetuned,
    make_run,
    settings_of,
    write_reviews,
)
from tests.fuzz.samples import write_classifier, write_masked_lm
from tests.pretraining.helpers import assert_same_training, digest, metrics
from tests.wordpieces import write_vocabulary

pytestmark = pytest.mark.integration

TEST_DATA = ROOT / "test_data"
# Losses of the first steps, made by this program on one OpenMP thread.
GOLDEN = [0.69318, 0.69043, 0.69239, 0.69497, 0.69437, 0.69069]

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews"))


def training_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(folder) if line["phase"] == "train"]


# ---- learning ----------------------------------------------------------------------------------


def test_a_task_that_one_word_decides_is_learned(reviews, tmp_path):
    found = finetuned(reviews, tmp_path, epochs=6)
    assert found["best"]["accuracy"] == 1.0
    assert found["answers"]["dev"]["metrics"] == {"accuracy": 1.0}
    assert found["baseline"] == {"dev": {"accuracy": 0.5}}
    assert found["rows"] == {"train": 64, "dev": 20}
    assert found["steps"] == 6 * 9  # 64 examples in batches of 8, of three lengths
    assert len(found["history"]) == 6


def test_training_in_bfloat16_learns_and_predicts_with_the_best_epoch(reviews, tmp_path, bfloat16):
    found = finetuned(reviews, tmp_path, epochs=6, dtype="bfloat16")
    assert found["best"]["accuracy"] == 1.0
    # Made by the best parameters, read back: so were the copies that are multiplied.
    assert found["answers"]["dev"]["metrics"] == {"accuracy": 1.0}


def test_first_losses(reviews, tmp_path):
    run = make_run(reviews, tmp_path, log_interval=1, training_steps=6, lr=1e-4)
    run.loop.run()
    losses = [line["loss"] for line in training_lines(tmp_path / "SST-2")]
    assert losses[0] == pytest.approx(math.log(2), abs=0.01)  # the new head knows nothing
    assert losses == pytest.approx(GOLDEN, abs=2e-4)


@pytest.mark.parametrize("init", ["normal", "uniform", "orthogonal", "xavier"])
def test_the_head_starts_as_asked(reviews, tmp_path, init):
    run = make_run(reviews, tmp_path, init=init, prob=0.5)
    values = run.classifier.network.classifier[1].weight.data().asnumpy()
    spread = {
        "normal": values.std() / 0.5,
        "uniform": np.abs(values).max() / 0.5,
        "orthogonal": np.abs(values @ values.T - 0.25 * np.eye(32)).max() + 1,
        "xavier": np.abs(values).max() / math.sqrt(0.5 / 32),
    }[init]
    assert spread == pytest.approx(1, abs=0.1)
    assert np.abs(run.classifier.network.bort.word_embed[0].weight.data().asnumpy()).max() < 0.2


def test_a_pretrained_body_supplies_weights_shape_and_vocabulary(reviews, tmp_path):
    from bort.saved_model import ModelConfig, build_network, save_model
    from bort.tokenization import TokenizerSettings, load_tokenizer

    tokenizer = load_tokenizer(TokenizerSettings())
    model_config = ModelConfig(SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, "masked_lm")
    body = build_network(model_config)
    save_model(str(tmp_path / "body" / "model.params"), body, model_config, tokenizer)
    given = {"pretrained_parameters": tmp_path / "body", "model_name": None}
    run = make_run(reviews, tmp_path, **given)
    expected = body.word_embed[0].weight.data().asnumpy()
    found = run.classifier.network.bort.word_embed[0].weight.data().asnumpy()
    np.testing.assert_array_equal(found, expected)
    assert run.classifier.model_config.model == SHAPE
    assert not [
        name for name in run.classifier.network._collect_params_with_prefix() if "decoder" in name
    ]
    with pytest.raises(UserError, match="--model_name bort_1_4_32_32: the weights are of"):
        make_run(reviews, tmp_path, **{**given, "model_name": "bort_1_4_32_32"})
    other = tmp_path / "other.params"
    save_model(str(other), body, ModelConfig(SHAPE, 1000, "another", "masked_lm"), None)
    with pytest.raises(UserError, match="trained with another vocabulary"):
        make_run(reviews, tmp_path, pretrained_parameters=other, sentencepiece=SAMPLE_MODEL)


def test_a_pretrained_model_and_a_classifier_in_the_others_place_are_named(reviews, tmp_path):
    write_classifier(tmp_path / "classifier")
    write_masked_lm(tmp_path / "pretrained")
    message = r"best\.params: a fine-tuned classifier, not a pre.* on a task that has its labels"
    with pytest.raises(UserError, match=message):
        make_run(reviews, tmp_path, pretrained_parameters=tmp_path / "classifier", model_name=None)
    with pytest.raises(UserError, match="pretrained: a pretrained model, not a classifier"):
        make_run(reviews, tmp_path, model_parameters=tmp_path / "pretrained", model_name=None)


@pytest.mark.parametrize("trained", [True, False])
def test_flags_that_name_another_vocabulary_than_a_models_are_refused(reviews, tmp_path, trained):
    write_classifier(tmp_path / "model")
    flags = {"model_parameters": tmp_path / "model", "model_name": None,
             "only_inference": not trained}  # fmt: skip
    other = write_vocabulary(tmp_path)
    with pytest.raises(UserError, match="trained with another vocabulary than the one that the fl"):
        finetuned(reviews, tmp_path / "out", vocab_file=other, **flags)
    assert not (tmp_path / "out").exists()
    finetuned(reviews, tmp_path / "out", sentencepiece=SAMPLE_MODEL, epochs=1, **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"model_name": "bort_1_4_32_32"},
            f"--model_name bort_1_4_32_32: the model .* has {SHAPE}",
        ),
        ({"pooling": "mean"}, "--pooling mean: the model in .* has cls; leave the flag out"),
        ({"extra_layer": True}, "--extra_layer: the model in .* has none; leave the flag out"),
    ],
)
def test_flags_that_name_another_network_than_a_models_are_refused(
    reviews, tmp_path, flags, message
):
    write_classifier(tmp_path / "model")
    given = {"model_name": None, **flags, "model_parameters": tmp_path / "model"}
    with pytest.raises(UserError, match=message):
        finetuned(reviews, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_bert_body_keeps_epsilon_token_types_and_vocabulary(reviews, tmp_path):
    from bort.saved_model import ModelConfig, build_network, read_model_config, save_model
    from bort.shapes import BodyOptions
    from bort.wordpiece import Normalizer, WordPiece
    from tests.wordpieces import VOCABULARY

    tokenizer, options = WordPiece(VOCABULARY, Normalizer()), BodyOptions(1e-12, type_separator=3)
    model_config = ModelConfig(
        SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, "masked_lm", **options._asdict()
    )
    body = build_network(model_config)
    save_model(str(tmp_path / "body" / "model.params"), body, model_config, tokenizer)
    given = {"pretrained_parameters": tmp_path / "body", "model_name": None, "pooling": "mean"}
    run = make_run(reviews, tmp_path, **given)
    for name, expected in body._collect_params_with_prefix().items():
        if not name.startswith("decoder"):
            found = run.classifier.network.bort._collect_params_with_prefix()[name]
            np.testing.assert_array_equal(found.data().asnumpy(), expected.data().asnumpy())
    finetuned(reviews, tmp_path, **given)
    best = read_model_config(str(tmp_path / "SST-2" / "best.params"))
    assert (best.body_options, best.pooling) == (options, "mean")
    assert best.tokenizer_fingerprint == tokenizer.fingerprint
    metrics = finetuned(
        reviews, tmp_path, model_parameters=tmp_path / "SST-2", model_name=None, only_inference=True
    )
    assert metrics["dev"] is not None


# ---- updates, rates, evaluations ---------------------------------------------------------------


def test_the_last_smaller_group_of_an_epoch_is_used(reviews, tmp_path):
    run = make_run(reviews, tmp_path, accumulate=3, batch_size=8, num_buckets=1, epochs=2)
    assert run.loop.job.stream.source.batches_per_epoch == 8
    assert [run.loop.update_numbers(position) for position in (0, 3, 6, 8)] == [
        range(0, 3), range(3, 6), range(6, 8), range(8, 11)
    ]  # fmt: skip
    run.loop.run()
    assert (run.loop.progress.step, run.loop.progress.batches) == (6, 16)


def test_an_update_averages_over_the_examples_of_its_micro_batches(reviews, tmp_path):
    """Eight at once, or four and four: the same update, as dropout is off."""
    common = {"num_buckets": 1, "dropout": 0.0, "training_steps": 1, "log_interval": 1}
    one = make_run(reviews, tmp_path / "one", batch_size=64, **common)
    two = make_run(reviews, tmp_path / "two", batch_size=32, accumulate=2, **common)
    one.loop.run()
    two.loop.run()
    lines = [training_lines(tmp_path / name / "SST-2")[0] for name in ("one", "two")]
    for line in lines:
        del line["phase"]
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)
    others = arrays_of_network(two)
    for name, value in arrays_of_network(one).items():
        np.testing.assert_allclose(value, others[name], atol=2e-5, err_msg=name)


def arrays_of_network(run: Any) -> dict[str, np.ndarray]:
    parameters = run.classifier.network._collect_params_with_prefix()
    return {name: parameter.data().asnumpy() for name, parameter in parameters.items()}


def test_gradients_of_an_update_are_its_own(reviews, tmp_path):
    """Of the word embedding, too, which no backward pass through a decoder overwrites."""
    run = make_run(reviews, tmp_path, num_buckets=1, lr=0.0, dropout=0.0)
    run.loop.setup()
    batches = run.loop.batches()
    weight = run.classifier.network.bort.word_embed[0].weight
    for _ in range(2):
        run.loop.train_step(batches)
        rows = set(np.flatnonzero(np.abs(weight.grad().asnumpy()).sum(axis=1)))
        number = run.loop.progress.batches - 1
        assert rows <= set(run.loop.job.stream.source(number).input_ids.reshape(-1))


def test_replicas_in_one_process_train_like_accumulation(reviews, tmp_path):
    common = {"batch_size": 5, "num_buckets": 1, "epochs": 2}  # 13 batches: an odd one is left
    one = make_run(reviews, tmp_path / "one", accumulate=2, **common)
    two = make_run(reviews, tmp_path / "two", cpu_contexts=2, **common)
    one.loop.run()
    two.loop.run()
    assert_same_training(
        tmp_path / "one" / "SST-2", arrays_of_network(one),
        tmp_path / "two" / "SST-2", arrays_of_network(two),
    )  # fmt: skip


def rates(run: Any, steps: int) -> list[float]:
    return [run.loop.job.learning_rate(step) for step in range(1, steps + 1)]


def test_the_schedule_counts_real_updates(reviews, tmp_path):
    flags = {"batch_size": 8, "num_buckets": 1, "lr": 0.01, "warmup_ratio": 0.25}
    run = make_run(reviews, tmp_path, epochs=2, **flags)  # 16 updates, 4 of them warm-up
    up = [0.01 * step / 4 for step in (1, 2, 3, 4)]
    down = [0.01 * left / 13 for left in range(12, 0, -1)]
    assert rates(run, 16) == pytest.approx([*up, *down])
    ramped = make_run(reviews, tmp_path, epochs=4, ramp_up_epochs=2, **flags)
    assert ramped.loop.job.max_steps() == 32
    assert rates(ramped, 32) == pytest.approx([*up, *down, *[1e-7] * 16])
    short = make_run(reviews, tmp_path, training_steps=5, **flags)
    assert short.loop.job.max_steps() == 5
    assert rates(short, 5)[-1] == pytest.approx(0.01 / 5)


def test_bias_correction_makes_the_first_update_as_large_as_the_rate(reviews, tmp_path):
    flags = {"num_buckets": 1, "warmup_ratio": 0.0, "max_norm": 1e9, "epsilon": 1e-12}
    flags["lr"] = 2e-3  # the linear decay halves it in the only step
    changes = []
    for correct in (False, True):
        folder = tmp_path / str(correct)
        run = make_run(
            reviews, folder, training_steps=1, weight_decay=0.0, bias_correction=correct, **flags
        )
        bias = run.classifier.network.classifier[-1].bias.data()
        before = bias.asnumpy()
        run.loop.run()
        changes.append(np.abs(bias.asnumpy() - before))
    np.testing.assert_allclose(changes[1], 1e-3, rtol=1e-3)  # Adam's first step is rate * sign
    np.testing.assert_allclose(changes[0], 1e-3 * 0.1 / np.sqrt(0.001), rtol=1e-3)


def test_training_steps_end_the_run_within_an_epoch(reviews, tmp_path):
    found = finetuned(reviews, tmp_path, training_steps=11, num_buckets=1)
    assert found["steps"] == 11
    assert [one["step"] for one in found["history"]] == [8, 11]


def test_the_seconds_of_a_run_are_those_of_its_training(reviews, tmp_path, monkeypatch):
    from bort.finetuning import run as finetuning

    predict_sets, seconds = finetuning.predict_sets, [4.0]

    def slow(*each: Any) -> Any:
        seconds.append(100.0)
        return predict_sets(*each)

    monkeypatch.setattr(finetuning, "predict_sets", slow)
    monkeypatch.setattr(finetuning.History, "seconds", property(lambda _: seconds[-1]))
    found = finetuned(reviews, tmp_path, epochs=1)
    assert found["seconds"] == 4.0
    assert found["examples_per_second"] == 64 / 4


class Scripted:
    """Stands in for the metrics of a task: the evaluations of a run are given in advance."""

    def __init__(self, monkeypatch: Any, values: list[dict[str, float]]) -> None:
        from data.task import Task

        self.values = iter(values)
        monkeypatch.setattr(Task, "metrics", lambda *_: {"accuracy": next(self.values)})


def test_patience_ends_the_run(reviews, tmp_path, monkeypatch):
    Scripted(monkeypatch, [0.5, 0.6, 0.6, 0.55, 0.9])
    from bort.finetuning.run import DevEvaluation

    asked: list[int] = []
    patience_is_over = DevEvaluation.patience_is_over

    def counted(self: DevEvaluation, entries: Any, patience: Any) -> bool:
        asked.append(len(entries))
        return patience_is_over(self, entries, patience)

    monkeypatch.setattr(DevEvaluation, "patience_is_over", counted)
    run = make_run(reviews, tmp_path, epochs=9, early_stop=2, num_buckets=1)
    run.loop.run()
    assert run.epoch == 4
    assert run.loop.progress.best_step == 2 * 8
    assert asked == [0, 1, 2, 3, 4], "not before every update: it reads all evaluations"


def test_the_best_epoch_is_that_of_the_best_average_over_the_dev_sets(tmp_path, monkeypatch):
    # Matched and mismatched in turn: the averages are 0.5, 0.65, 0.6.
    Scripted(monkeypatch, [0.5, 0.5, 0.9, 0.4, 0.5, 0.7])
    run = make_run(TEST_DATA / "glue", tmp_path, task_name="MNLI", epochs=3, num_buckets=1)
    run.loop.run()
    updates_per_epoch = run.loop.job.stream.source.batches_per_epoch
    assert run.loop.progress.best_step == 2 * updates_per_epoch
    assert run.history.entries[1]["dev_matched/accuracy"] == 0.9
    assert run.history.entries[1]["score"] == pytest.approx(0.65)


# ---- resume ------------------------------------------------------------------------------------

RESUMED = {"epochs": 3, "dropout": 0.1, "accumulate": 2, "batch_size": 4, "log_interval": 5}


@pytest.fixture(scope="module")
def finished(reviews, tmp_path_factory) -> tuple[Path, Any]:
    """Return the folder of a run that nothing interrupted, and the run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = make_run(reviews, folder, **RESUMED)
    run.loop.run()
    return folder, run


@pytest.fixture(scope="module")
def uninterrupted(finished) -> tuple[str, Any, Any]:
    folder, run = finished
    return digest_of(run), run.history.entries, metrics(folder / "SST-2")


def digest_of(run: Any) -> str:
    return digest(run.loop)


class KilledError(Exception):
    pass


# In the first epoch before any checkpoint, at its end, within a group, in a later epoch.
@pytest.mark.parametrize(
    ("batches", "interval"),
    [
        (17, 2),
        *[pytest.param(batches, 2, marks=SLOW) for batches in (5, 12, 30)],
        *[pytest.param(batches, None, marks=SLOW) for batches in (5, 12, 17, 30)],
    ],
)
def test_a_killed_run_is_bit_identical_to_an_uninterrupted_one(
    reviews, tmp_path, uninterrupted, batches, interval
):
    from bort.finetuning import run as finetuning

    flags = {**RESUMED, "ckpt_interval": interval}
    step, used = finetuning.ClassificationStep.__call__, []

    def dying(self, *given):
        if len(used) == batches:
            raise KilledError
        used.append(given[0])
        return step(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning.ClassificationStep, "__call__", dying)
        with pytest.raises(KilledError):
            make_run(reviews, tmp_path, **flags).loop.run()
    run = make_run(reviews, tmp_path, resume=True, **flags)
    run.loop.run()
    assert (digest_of(run), run.history.entries, metrics(tmp_path / "SST-2")) == uninterrupted


def test_sigterm_leaves_a_checkpoint_and_no_answers(reviews, tmp_path, uninterrupted, monkeypatch):
    from bort.finetuning import run as finetuning

    rate = finetuning.learning_rate

    def warned(step, *rest):
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "learning_rate", warned)
        with pytest.raises(Stopped):
            finetuned(reviews, tmp_path, **RESUMED)
    assert (tmp_path / "SST-2" / "checkpoint_last").resolve().name == "step-0000011"
    assert not (tmp_path / "SST-2" / "metrics.json").exists()
    found = finetuned(reviews, tmp_path, resume=True, **RESUMED)
    assert (found["history"], metrics(tmp_path / "SST-2")) == uninterrupted[1:]
    assert not list((tmp_path / "SST-2").glob("*step-*"))
    (tmp_path / "SST-2" / "step-0000011").mkdir()  # as if killed before it was deleted
    assert finetuned(reviews, tmp_path, resume=True, **RESUMED) == found  # nothing to do
    assert not list((tmp_path / "SST-2").glob("*step-*"))


@pytest.mark.parametrize(
    ("before", "after", "updates"),
    [
        # An update keeps its micro-batches, and the run the updates that two workers would make.
        ({"cpu_contexts": 2}, {}, 3 * 8),
        # Another --accumulate holds for what is left: 11 of 16 micro-batches, and two epochs.
        ({}, {"accumulate": 4}, 5 + 3 + 2 * 4),
    ],
)
def test_a_run_resumed_with_other_updates_makes_as_many_epochs(
    reviews, tmp_path, before, after, updates
):
    flags = {"batch_size": 4, "num_buckets": 1, "epochs": 3, "ckpt_interval": 5}
    first = make_run(reviews, tmp_path, **flags, **before)
    first.loop.setup()
    with closing(first.loop.batches()) as batches:
        for _ in range(5):
            first.loop.train_step(batches)
    first.loop.save()
    run = make_run(reviews, tmp_path, resume=True, **flags, **after)
    run.loop.run()
    assert run.epoch == 3
    assert [entry["epoch"] for entry in run.history.entries] == [1, 2, 3]
    assert run.loop.progress.step == run.loop.job.max_steps() == updates
    last = rates(run, updates)[-1]
    assert last == pytest.approx(0.003 / (updates - int(updates * 0.1) + 1))


def test_the_best_model_is_of_the_resumed_run(reviews, tmp_path, monkeypatch):
    """Not of an evaluation after the checkpoint, which other flags need not repeat."""
    flags = {"num_buckets": 1, "epochs": 3, "ckpt_interval": 9}
    run = make_run(reviews, tmp_path, **flags)
    with monkeypatch.context() as patch:
        Scripted(patch, [0.5, 0.9])  # after 8 and 16 updates
        run.loop.setup()
        with closing(run.loop.batches()) as batches:
            for _ in range(16):
                run.loop.train_step(batches)
                run.loop._save_and_evaluate([], stop=False)
    # After 16 and 24 updates, then of the best model, and of the most frequent answer.
    Scripted(monkeypatch, [0.4, 0.3, 0.4, 0.5])
    found = finetuned(reviews, tmp_path, resume=True, **{**flags, "lr": 1e-6})
    assert [entry["score"] for entry in found["history"]] == [0.5, 0.4, 0.3]
    assert found["best"]["step"] == 16
    best = json.loads((tmp_path / "SST-2" / "best.json").read_text(encoding="utf-8"))
    assert best["details"]["metrics"] == found["best"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"seed": 8}, "the checkpoint was made with 7; give that, or another --output_dir"),
        ({"batch_size": 8}, "--batch_size 8: the checkpoint was made with 4"),
        ({"init": "xavier"}, "--init xavier: the checkpoint was made with normal"),
        # The same number of batches an epoch, but other ones: some rows would be seen twice.
        ({"num_buckets": 4}, "--num_buckets 4: the checkpoint was made with 3"),
        ({"train_rows": 60}, "examples 64, now 60"),
        ({"max_len": 32}, "--max_len 32: the checkpoint was made with 64"),
        ({"pooling": "mean"}, "--pooling mean: the checkpoint was made with cls"),
        ({"extra_layer": True}, "--extra_layer True: the checkpoint was made with False"),
    ],
)
def test_another_run_is_not_resumed(reviews, tmp_path, finished, flags, says):
    shutil.copytree(finished[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    with pytest.raises(UserError, match=says):
        make_run(reviews, tmp_path, resume=True, **{**RESUMED, **flags}).loop.run()


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ({}, ""),
        ({"epochs": 9, "dev_batch_size": 1, "log_interval": 1}, ""),
        (
            {"lr": 1e-3, "dropout": 0.3},
            "warning: --dropout, --lr: not what the checkpoint was made with; continuing with the "
            "values given now\n",
        ),
    ],
)
def test_changed_flags_of_a_resumed_run_are_named(
    reviews, tmp_path, finished, capsys, flags, warned
):
    shutil.copytree(finished[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    make_run(reviews, tmp_path, **{**RESUMED, **flags, "resume": True}).loop.setup()
    assert capsys.readouterr().err == warned


def test_a_flag_that_a_checkpoint_does_not_know_had_its_default(
    reviews, tmp_path, finished, capsys
):
    shutil.copytree(finished[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    path = str(tmp_path / "SST-2" / "checkpoint_last")
    state = checkpoint.load(path).state
    del state["settings"]["FinetuningOptimizerSettings"]["bias_correction"]
    checkpoint.write_state(path, state)
    make_run(reviews, tmp_path, **RESUMED, bias_correction=True, resume=True).loop.setup()
    assert capsys.readouterr().err.startswith("warning: --bias_correction: not what the checkpoint")


def test_a_run_is_not_resumed_from_other_weights(reviews, tmp_path, finished):
    from bort.saved_model import ModelConfig, build_network, save_model
    from bort.tokenization import TokenizerSettings, load_tokenizer

    shutil.copytree(finished[0], tmp_path / "run", symlinks=True)
    tokenizer = load_tokenizer(TokenizerSettings())
    model_config = ModelConfig(
        SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, "masked_lm", layer_norm_eps=1e-12
    )
    body = tmp_path / "model.params"
    save_model(str(body), build_network(model_config), model_config, tokenizer)
    flags = {**RESUMED, "pretrained_parameters": body, "resume": True}
    with pytest.raises(UserError, match=r"--pretrained_parameters .* was made with None"):
        make_run(reviews, tmp_path / "run", **flags).loop.run()


@pytest.mark.parametrize("name", ["train", "dev"])
def test_a_run_is_not_resumed_on_other_rows(reviews, tmp_path, finished, name):
    shutil.copytree(finished[0], tmp_path / "run", symlinks=True)
    shutil.copytree(reviews, tmp_path / "data")
    path = tmp_path / "data" / "SST-2" / f"{name}.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1].split("\t")[0] + ("\t1" if lines[1].endswith("\t0") else "\t0")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"other rows in {name}; restore them"):
        make_run(tmp_path / "data", tmp_path / "run", resume=True, **RESUMED).loop.run()


# ---- what is left ------------------------------------------------------------------------------


def test_inference_gives_the_answers_of_the_run(reviews, tmp_path, monkeypatch, capsys):
    from bort.finetuning import run as finetuning

    found = finetuned(reviews, tmp_path / "trained")
    calls = []
    monkeypatch.setattr(finetuning, "finetuning_loop", lambda *_: calls.append("trained"))
    again = finetuned(
        reviews,
        tmp_path / "answered",
        only_inference=True,
        model_parameters=tmp_path / "trained" / "SST-2",
        model_name=None,
        max_len=8,  # the model config knows better
    )
    assert not calls
    printed = capsys.readouterr().out.splitlines()[-4:]
    assert f"20 rows  accuracy {again['dev']['metrics']['accuracy']:.4f}" in printed[0]
    assert printed[1].endswith(str(tmp_path / "answered" / "SST-2" / "dev_predictions.jsonl"))
    assert again["dev"]["metrics"] == found["answers"]["dev"]["metrics"]
    for name in ("dev_predictions.jsonl", "SST-2.tsv"):
        trained, answered = (tmp_path / place / "SST-2" / name for place in ("trained", "answered"))
        assert trained.read_text() == answered.read_text()
    lines = (tmp_path / "trained" / "SST-2" / "dev_predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prediction"] for row in rows] == [int(np.argmax(row["scores"])) for row in rows]
    right = [row["prediction"] == row["label"] for row in rows]
    assert np.mean(right) == found["best"]["accuracy"]
    assert [row["uid"] for row in rows] == list(range(20))


def folder_of(name: str) -> Path:
    return (
        TEST_DATA / {"glue": "glue", "superglue": "superglue", "race": "race"}[get_task(name).suite]
    )


@pytest.mark.parametrize("name", [n for n in task_names() if get_task(n).train])
def test_every_task_trains_and_its_files_are_what_the_leaderboard_takes(name, tmp_path):
    found = finetuned(folder_of(name), tmp_path, task_name=name, epochs=1, lr=1e-4)
    task = get_task(name)
    assert set(found["rows"]) == {task.train, *task.dev}
    for split in task.test:
        path = Path(found["answers"][split]["file"])
        if task.submission_file(split):
            examples = task.read(folder_of(name), split).examples
            assert check_submission(path, task, split, examples) > 0
        else:
            assert found["answers"][split]["metrics"].keys() >= {"accuracy"}
    first = training_lines(tmp_path / task.name)
    if task.kind in ("classification", "candidates"):
        assert first[0]["loss"] == pytest.approx(math.log(len(task.labels)), abs=0.1)
    for other in map(get_task, task_names()):
        if other.model_task == task.name:
            written = tmp_path / other.name / str(other.submission_file(other.test[0]))
            examples = other.read(folder_of(other.name), other.test[0]).examples
            assert check_submission(written, other, other.test[0], examples) > 0


def test_races_joined_cast_is_one_input_of_four_classes(tmp_path):
    found = finetuned(
        TEST_DATA / "race", tmp_path, task_name="RACE-H", race_cast="joined", epochs=1, lr=1e-4
    )
    model_config = json.loads((tmp_path / "RACE-H" / "best.json").read_text())
    assert (model_config["num_outputs"], model_config["race_cast"], model_config["kind"]) == (
        4,
        "joined",
        "classification",
    )
    assert found["steps"] > 0
    for flags in ({}, {"race_cast": "joined"}):
        answers = finetuned(
            TEST_DATA / "race",
            tmp_path / "x",
            task_name="RACE-H",
            model_name=None,
            only_inference=True,
            model_parameters=tmp_path / "RACE-H",
            **flags,
        )
        assert answers["dev"]["metrics"] == found["answers"]["dev"]["metrics"]
    import mxnet as mx

    from bort.finetuning.classifier import load_classifier

    with pytest.raises(UserError, match=r"RACE-H: a model for --race_cast joined; give this flag"):
        load_classifier(str(tmp_path / "RACE-H"), get_task("RACE-H"), [mx.cpu()])


def test_a_classifier_of_another_program_learns_the_cast_of_race(tmp_path):
    tokenizer = ByteLevelBPE([*SPECIAL_TOKENS.values(), *BYTE_TO_CHARACTER.values()], [])
    model_config = ModelConfig(
        SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, "classification", labels=tuple("ABCD"),
        num_outputs=4, max_len=48,
    )  # fmt: skip
    body = tmp_path / "body" / "best.params"
    save_model(str(body), build_network(model_config), model_config, tokenizer)
    flags = {"task_name": "RACE-H", "model_name": None}
    finetuned(
        TEST_DATA, tmp_path / "a", race_cast="joined", epochs=1, model_parameters=body, **flags
    )
    trained = tmp_path / "a" / "RACE-H"
    assert json.loads((trained / "best.json").read_text())["race_cast"] == "joined"
    flags |= {"only_inference": True, "model_parameters": trained}
    finetuned(TEST_DATA, tmp_path / "a", **flags)


def test_pairs_are_not_predicted_with_a_roberta_of_another_program(tmp_path):
    """It was trained on pairs with two separators between the texts; it can learn our form."""
    tokenizer = ByteLevelBPE([*SPECIAL_TOKENS.values(), *BYTE_TO_CHARACTER.values()], [])
    for task_name in ("RTE", "SST-2"):
        task = get_task(task_name)
        model_config = ModelConfig(
            SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, task.kind, labels=task.labels,
            num_outputs=task.num_outputs, max_len=48,
        )  # fmt: skip
        network = build_network(model_config)
        save_model(str(tmp_path / task_name / "best.params"), network, model_config, tokenizer)
    flags = {"model_parameters": tmp_path / "RTE", "model_name": None}
    with pytest.raises(UserError, match="RTE: another program has trained it; RoBERTa's pairs"):
        finetuned(TEST_DATA, tmp_path / "a", task_name="RTE", only_inference=True, **flags)
    finetuned(TEST_DATA, tmp_path / "b", task_name="RTE", epochs=1, **flags)
    flags["model_parameters"] = tmp_path / "SST-2"  # single texts
    finetuned(TEST_DATA, tmp_path / "c", task_name="SST-2", only_inference=True, **flags)


@pytest.mark.parametrize("folder", ["SuperGLUERTE", "AX-b"])
def test_predictions_wait_for_no_other_writer_of_their_folders(tmp_path, folder):
    write_classifier(tmp_path / "model", "SuperGLUERTE")
    flags = {"only_inference": True, "model_name": None, "model_parameters": tmp_path / "model"}
    with (
        lock_folder(str(tmp_path / "out" / folder)),
        pytest.raises(UserError, match=f"out/{folder}: process {os.getpid()} on .* is writing"),
    ):
        finetuned(TEST_DATA / "superglue", tmp_path / "out", task_name="SuperGLUERTE", **flags)
    assert not list((tmp_path / "out" / folder).glob("*.json*"))


@pytest.mark.parametrize("task_name", ["SuperGLUERTE", "AX-b"])
def test_predictions_do_not_replace_the_test_set_of_their_name(tmp_path, task_name):
    shutil.copytree(TEST_DATA / "superglue", tmp_path / "data")
    write_classifier(tmp_path / "model", "SuperGLUERTE")
    official = tmp_path / "data" / "AX-b" / "AX-b.jsonl"
    before = official.read_bytes()
    flags = {"only_inference": True, "model_name": None, "model_parameters": tmp_path / "model"}
    with pytest.raises(UserError, match=f"would replace its test set {official}; name another fol"):
        finetuned(tmp_path / "data", tmp_path / "data", task_name=task_name, **flags)
    assert official.read_bytes() == before
    finetuned(tmp_path / "data", tmp_path / "out", task_name=task_name, **flags)


def test_diagnostics_are_predicted_with_the_model_of_their_task(tmp_path):
    finetuned(TEST_DATA / "superglue", tmp_path, task_name="SuperGLUERTE", epochs=1)
    flags = {"only_inference": True, "model_name": None}
    rte = tmp_path / "SuperGLUERTE"
    found = finetuned(
        TEST_DATA / "superglue", tmp_path / "x", task_name="AX-g", model_parameters=rte, **flags
    )
    assert found["test"]["metrics"].keys() == {"accuracy", "parity"}
    with pytest.raises(UserError, match="a model of SuperGLUERTE; give one of"):
        finetuned(
            TEST_DATA / "glue", tmp_path / "x", task_name="QNLI", model_parameters=rte, **flags
        )
    labels = r"\(entailment, not_entailment instead of false, true\)"
    with pytest.raises(UserError, match=f"whose labels are not those of BoolQ {labels}; give one"):
        finetuned(
            TEST_DATA / "superglue", tmp_path, task_name="BoolQ", model_parameters=rte, **flags
        )
    path = str(rte / "best.params")  # as one that another program has trained
    save_model_config(path, dataclasses.replace(read_model_config(path), task=""), None)
    again = finetuned(
        TEST_DATA / "superglue", tmp_path / "y", task_name="AX-g", model_parameters=rte, **flags
    )
    assert again["test"]["metrics"] == found["test"]["metrics"]


# ---- mistakes of the user ----------------------------------------------------------------------


def complaint(capsys: Any, line: list[str]) -> str:
    with pytest.raises(SystemExit) as left:
        finetune_classifier.main(line)
    assert left.value.code in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"task_name": "SST-3"}, "--task_name SST-3: unknown"),
        ({"task_name": "AX"}, "has no training set; fine-tune MNLI"),
        ({"data_dir": "absent"}, "no train set"),
        ({"only_inference": True}, "--only_inference needs --model_parameters"),
        ({"model_parameters": "a", "pretrained_parameters": "b"}, "contains the body"),
        ({"pretrained_parameters": "absent"}, "absent: not found"),
        ({"model_name": "bort_1_3_32_32"}, "bort_1_3_32_32"),
        ({"max_len": 513}, "--max_len 513: must be at most 512"),
        ({"epochs": 0}, "--epochs 0"),
        ({"init": "zeros"}, "--init"),
        ({"gpus": "one"}, "--gpus one"),
        ({"dropout": "nan"}, "--dropout nan"),
    ],
)
def test_a_mistake_is_named_in_one_line(reviews, tmp_path, capsys, flags, says):
    flags = dict(flags)
    data_dir = flags.pop("data_dir", reviews)
    assert says in complaint(capsys, arguments(data_dir, tmp_path / "out", **flags))
    assert not (tmp_path / "out" / "SST-2").exists()


def test_broken_data_are_named(tmp_path, capsys):
    folder = write_reviews(tmp_path / "data") / "SST-2"
    line = arguments(tmp_path / "data", tmp_path / "out")
    valid = (folder / "dev.tsv").read_text()
    (folder / "dev.tsv").write_text(valid + "odd label\t2\n")
    assert "dev.tsv:22" in complaint(capsys, line)
    (folder / "dev.tsv").write_text("sentence\tlabel\n")
    assert "dev.tsv: has no rows" in complaint(capsys, line)
    (folder / "dev.tsv").write_text(valid + "odd label\t2\nodder\t3\n")
    for name, odd in (("test", b"11\tan \xff odd byte\n"), ("train", b"no label\n")):
        with open(folder / f"{name}.tsv", "ab") as handle:
            handle.write(odd)
    capsys.readouterr()
    found = finetune_classifier.main([*line, "--skip_bad_rows", "--epochs", "1"])
    assert found["rows"]["dev"] == 20
    assert "dev.tsv:22" in found["skipped"][1]
    assert "test.tsv:12: is not UTF-8" in found["answers"]["test"]["skipped"][0]
    # Each once: those of the training set before the sets, the others below theirs.
    said = [part for part in capsys.readouterr().out.split("\n") if " skipped" in part]
    assert [part.replace(f"{folder}/", "") for part in said] == [
        "  1 broken row skipped: train.tsv:66: expected 2 columns, found 1",
        "  2 broken rows skipped, the first: dev.tsv:22: label '2' is not one of 0, 1",
        "  1 broken row skipped: test.tsv:12: is not UTF-8 at byte 7",
    ]


def test_broken_test_files_are_found_before_the_first_step(tmp_path, capsys):
    shutil.copytree(TEST_DATA / "glue", tmp_path / "data")
    for name, other in (("MNLI", "MNLI/test_mismatched.tsv"), ("MNLI", "AX/diagnostic-full.tsv")):
        path = tmp_path / "data" / other
        content = path.read_bytes()
        path.write_bytes(content + b"99\todd\n")
        line = arguments(tmp_path / "data", tmp_path / "out", task_name=name)
        rows = len(content.splitlines())
        assert f"{other}:{rows + 1}: expected" in complaint(capsys, line)
        assert not (tmp_path / "out" / name).exists()
        path.write_bytes(content)


def test_a_finished_run_is_not_continued_with_other_flags(reviews, tmp_path, capsys):
    found = finetuned(reviews, tmp_path, epochs=1)
    before = (tmp_path / "SST-2" / "metrics.json").read_bytes()
    for flags in ({"epochs": 5}, {"epochs": 1, "lr": 0.1}, {"epochs": 1, "seed": 8}):
        line = arguments(reviews, tmp_path, resume=True, **flags)
        name = list(flags)[-1]
        assert f"has finished, with --{name} " in complaint(capsys, line)
    assert (tmp_path / "SST-2" / "metrics.json").read_bytes() == before
    config = tmp_path / "SST-2" / "config.json"  # as of a version without --pooling
    content = read_json(str(config))
    del content["ClassifierSettings"]["pooling"]
    config.write_text(json.dumps(content))
    line = arguments(reviews, tmp_path, resume=True, epochs=1, pooling="mean")
    assert "has finished, with --pooling cls, not mean;" in complaint(capsys, line)
    same = {"epochs": 1, "resume": True, "log_interval": 1, "dev_batch_size": 7}
    assert finetuned(reviews, Path(f"{tmp_path}/../{tmp_path.name}"), **same) == found
    assert finetuned(f"{reviews}/../{reviews.name}", tmp_path, **same, task_name="sst") == found


def test_rank_0_says_whether_a_run_has_finished(reviews, tmp_path, monkeypatch):
    """Another machine need not have the folder of the run."""
    from bort.finetuning import run as finetuning

    second = SingleProcess()
    second.rank = 1
    answers = iter([True, {"task": "SST-2"}])
    monkeypatch.setattr(second, "broadcast_object", lambda mine: next(answers), raising=False)
    settings = settings_of(reviews, tmp_path, resume=True)
    assert finetuning.finetune(settings, second) == {"task": "SST-2"}
    assert not list(tmp_path.iterdir())


def test_another_path_of_the_same_name_is_not_that_of_the_finished_run(reviews, tmp_path, capsys):
    finetuned(reviews, tmp_path / "first", epochs=1)
    for folder in ("a", "b"):
        shutil.copytree(reviews, tmp_path / folder / "data")
        shutil.copytree(tmp_path / "first" / "SST-2", tmp_path / folder / "model")
    flags = {"epochs": 1, "model_name": None, "resume": True}
    data, model = tmp_path / "a" / "data", tmp_path / "a" / "model"
    finetuned(data, tmp_path / "run", model_parameters=model, **flags)
    other = tmp_path / "b"
    for flag, paths in {
        "data_dir": (other / "data", model),
        "model_parameters": (data, other / "model"),
    }.items():
        line = arguments(paths[0], tmp_path / "run", model_parameters=paths[1], **flags)
        assert f"has finished, with --{flag} {tmp_path}/a" in complaint(capsys, line)


def test_train_rows_of_record_are_queries(tmp_path):
    for rows in (1, 2):
        flags = {"task_name": "ReCoRD", "epochs": 1, "train_rows": rows}
        found = finetuned(TEST_DATA / "superglue", tmp_path / str(rows), **flags)
        task = get_task("ReCoRD")
        train = task.read(TEST_DATA / "superglue", "train", seed=7).examples
        assert found["train_examples"] == len(task.first_rows(train, rows)) >= 2 * rows


def test_the_answers_of_another_model_are_not_replaced(reviews, tmp_path, capsys):
    finetuned(reviews, tmp_path / "a", epochs=1)
    answers = tmp_path / "a" / "SST-2" / "dev_predictions.jsonl"
    before = answers.stat().st_mtime_ns
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    flags = {"only_inference": True, "model_name": None}
    other, own = (tmp_path / name / "SST-2" for name in "ba")
    line = arguments(reviews, tmp_path / "a", model_parameters=other, **flags)
    assert "SST-2: has a run with another model than" in complaint(capsys, line)
    assert answers.stat().st_mtime_ns == before
    finetuned(reviews, tmp_path / "a", model_parameters=own, **flags)
    (own / "best.params").rename(tmp_path / "kept.params")  # a sweep keeps the best run's alone
    assert "SST-2: has a run with another model than" in complaint(capsys, line)
    (own / "metrics.json").unlink()  # as in a run that has not finished
    assert "SST-2: has a run with another model than" in complaint(capsys, line)


def test_a_checkpoint_of_an_unfinished_run_is_its_own_model(reviews, tmp_path, finished, capsys):
    folder = tmp_path / "SST-2"
    shutil.copytree(finished[0] / "SST-2", folder, symlinks=True)
    flags = {"only_inference": True, "model_name": None, "model_parameters": folder}
    answers = finetuned(reviews, tmp_path, **flags)["dev"]["file"]
    assert answers == str(folder / "dev_predictions.jsonl")


def test_a_model_of_other_inputs_is_refused(tmp_path, capsys):
    finetuned(TEST_DATA / "superglue", tmp_path, task_name="WSC", epochs=1)
    path = tmp_path / "WSC" / "best.json"
    content = read_json(str(path))
    assert content.pop("inputs_version") == 2
    path.write_text(json.dumps(content))  # as the version before wrote it
    line = arguments(
        TEST_DATA / "superglue",
        tmp_path / "x",
        task_name="WSC",
        model_name=None,
        only_inference=True,
        model_parameters=tmp_path / "WSC",
    )
    assert "trained on version 1 of WSC's inputs" in complaint(capsys, line)


def test_logits_that_are_not_numbers_are_never_the_best_and_never_written(
    reviews, tmp_path, capsys, monkeypatch
):
    from bort.finetuning import predictions
    from bort.finetuning import run as finetuning

    def not_a_number(network: Any, loader: Any, *_: Any) -> np.ndarray:
        return np.full((len(loader.encoded.labels), 2), np.nan)

    line = arguments(reviews, tmp_path / "out", epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "predict_logits", not_a_number)
        assert "no evaluation gave a score" in complaint(capsys, line)
    line = arguments(reviews, tmp_path / "other", epochs=1)
    monkeypatch.setattr(predictions, "predict_logits", not_a_number)
    assert "SST-2 dev: the model's outputs contain NaN" in complaint(capsys, line)
    assert not list((tmp_path / "other").rglob("*.tsv"))


def test_another_runs_folder_is_not_overwritten(reviews, tmp_path, capsys):
    finetuned(reviews, tmp_path, epochs=1)
    before = (tmp_path / "SST-2" / "best.params").read_bytes()
    assert "has another run" in complaint(capsys, arguments(reviews, tmp_path))
    assert (tmp_path / "SST-2" / "best.params").read_bytes() == before
    (tmp_path / "SST-2" / "best.params").unlink()  # as in a sweep
    assert "has another run" in complaint(capsys, arguments(reviews, tmp_path, epochs=1))


@pytest.mark.parametrize("resume", [False, True])
def test_the_config_of_an_agora_run_is_not_replaced(reviews, tmp_path, capsys, resume):
    config = tmp_path / "SST-2" / "config.json"
    config.parent.mkdir()
    config.write_text('{"AgoraRunSettings": {}, "TaskSettings": {"task_name": "SST-2"}}')
    said = complaint(capsys, arguments(reviews, tmp_path, resume=resume))
    assert said.startswith(f"error: --output_dir {config.parent}: holds the config.json of someth")
    assert [path.name for path in config.parent.iterdir()] == ["config.json"]


def test_the_tokenizer_of_shards_is_not_replaced(reviews, tmp_path, capsys):
    tokenizer = tmp_path / "SST-2" / "tokenizer"
    read_wordpiece(write_vocabulary(tmp_path)).save(str(tokenizer))
    (tmp_path / "SST-2" / "part-00000.npz").touch()
    line = complaint(capsys, arguments(reviews, tmp_path))
    assert "SST-2: has part-00000.npz with its tokenizer/, which another vocabulary" in line
    assert [path.name for path in tokenizer.iterdir()] == ["tokenizer.json"]


def test_weights_of_another_shape_and_too_little_memory_are_explained(
    reviews, tmp_path, capsys, monkeypatch
):
    import mxnet as mx

    from bort.bort import get_bort_model
    from bort.finetuning import run as finetuning
    from bort.parameters import save_parameters

    model, _ = get_bort_model("bort_1_2_32_64", vocab=range(1000))
    save_parameters(model, str(tmp_path / "other.params"))
    flags = {"pretrained_parameters": tmp_path / "other.params"}
    line = arguments(reviews, tmp_path / "out", **flags)
    assert "is it of another shape or vocabulary?" in complaint(capsys, line)

    def exhausted(*_: Any) -> None:
        raise mx.MXNetError("Check failed: e == cudaSuccess: Memory allocation failed: out of")

    monkeypatch.setattr(finetuning, "forward", exhausted)
    line = arguments(reviews, tmp_path / "out")
    assert "lower --batch_size and raise --accumulate" in complaint(capsys, line)


def test_a_gradient_that_is_not_finite_is_reported(reviews, tmp_path, capsys):
    line = arguments(reviews, tmp_path, lr=1e30, max_norm=1e30)
    said = complaint(capsys, line)
    assert "is not finite; they are saved in" in said
