"""The program run_agora.py on small data: what it writes, and that it is resumed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from bort.agora.labellers import ModelTimaeus
from bort.bort import get_bort_model
from bort.communicator import SingleProcess
from bort.files import lock_folder, read_json
from bort.finetuning.config import (
    ClassifierSettings,
    FinetuningOptimizerSettings,
    TaskSettings,
)
from bort.saved_model import ModelConfig, build_network, load_model, save_model
from bort.tokenization import TokenizerSettings, load_tokenizer
from data.tasks import get_task
from scripts import run_agora
from tests.pretraining.helpers import horovodrun
from tests.reference import redraw
from tests.wordpieces import write_vocabulary

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
TEST_DATA = ROOT / "test_data"
SHAPE = "bort_2_2_16_16"
SPACE = "lr: [1e-2, 1e-3]\nbatch_size: [4]\nepochs: [1]\n"


def save(path, kind, task=None, seed=4):
    tokenizer = load_tokenizer(TokenizerSettings())
    model_config = ModelConfig(
        SHAPE,
        tokenizer.vocab_size,
        tokenizer.fingerprint,
        kind,
        task=task.name if task else "",
        labels=task.labels if task else (),
        num_outputs=task.num_outputs if task else 0,
        max_len=48,
    )
    if task:
        network = build_network(model_config)
    else:
        network, _ = get_bort_model(SHAPE, vocab=tokenizer)
    redraw(network, seed=seed)
    save_model(str(path), network, model_config, tokenizer)
    return str(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Return a folder with a pretrained model and a search space."""
    folder = tmp_path_factory.mktemp("agora")
    save(folder / "pretrained" / "bort.params", "masked_lm")
    (folder / "space.yaml").write_text(SPACE)
    return folder


def arguments(places, task, output, *more):
    timaeus = places / f"timaeus-{task}" / "best.params"
    if not timaeus.exists():
        save(timaeus, get_task(task).kind, get_task(task))
    return [
        *("--task_name", task, "--data_dir", str(TEST_DATA), "--output_dir", str(output)),
        *("--pretrained_parameters", str(places / "pretrained"), "--timaeus", str(timaeus)),
        *("--search_space", str(places / "space.yaml"), "--max_len", "48"),
        *("--cache_dir", str(places / "encoded"), *more),
    ]


def check_layout(folder, task, content):
    """Check that what the folder holds is of one run, whose best model is the one saved."""
    dev = task.read(TEST_DATA, task.dev[0]).examples
    lines = (folder / f"{task.dev[0]}_predictions.jsonl").read_text().splitlines()
    scores = np.array([json.loads(line)["scores"] for line in lines])
    assert task.score(task.metrics(dev, scores)) == pytest.approx(content["best"]["score"])
    assert content["best"]["dev"] == pytest.approx(task.metrics(dev, scores))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["answers"][task.dev[0]]["metrics"] == pytest.approx(content["best"]["dev"])
    saved = load_model(str(folder))
    assert (saved.model_config.task, saved.model_config.details["theta"]) == (
        task.name,
        content["best"]["theta"],
    )
    assert json.loads(json.dumps(content)) == read_json(str(folder / "agora.json"))
    first = content["rounds"][0]
    assert (first["images"]["made"] > 0) == bool(first["mistakes"])  # none where all is right
    names = {"agora.png", "images.tsv", "config.json", "journal.jsonl", "models", "tokenizer"}
    assert names <= set(os.listdir(folder))
    assert "fits" not in os.listdir(folder)
    assert len(os.listdir(folder / "models")) == 1


def test_a_run_its_files_and_the_same_command_again(places, tmp_path, capsys):
    given = arguments(places, "SST-2", tmp_path)
    content = run_agora.main(given)
    folder = tmp_path / "SST-2"
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: WeakTimaeusWarning: the accuracy of Timaeus on dev is 0.")
    assert shown.out.startswith("round 0  sets 2  train 8  dev 0.")
    check_layout(folder, get_task("SST-2"), content)
    assert (folder / "SST-2.tsv").read_text().startswith("index\tprediction\n")
    journal = (folder / "journal.jsonl").read_text()
    again = run_agora.main([*given, "--workers", "1", "--dev_batch_size", "8"])
    assert (folder / "journal.jsonl").read_text() == journal
    assert again == content
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_agora.main([*given, "--upper", "0.3", "--prune", "halving"])
    assert "contains a run with another --prune, --upper; give" in capsys.readouterr().err
    for flag in ("--on_nonfinite", "--compression"):  # they would change nothing
        with pytest.raises(SystemExit):
            run_agora.main([*given, flag, "none"])
        assert f"unrecognized arguments: {flag} none" in capsys.readouterr().err


def test_a_run_is_resumed_under_other_spellings_of_its_paths(places, tmp_path, monkeypatch):
    content = run_agora.main(arguments(places, "SST-2", tmp_path / "o", "--tau", "swap"))
    journal = (tmp_path / "o" / "SST-2" / "journal.jsonl").read_bytes()
    os.rename(tmp_path / "o", tmp_path / "moved")
    monkeypatch.chdir(places)
    given = [
        *arguments(places, "SST-2", f"{tmp_path}/moved/", "--tau", "swap"),
        *("--cache_dir", str(tmp_path / "cache"), "--pretrained_parameters", "pretrained/"),
        *("--search_space", "./space.yaml", "--timaeus", "timaeus-SST-2/../timaeus-SST-2"),
    ]
    again = run_agora.main(given)
    assert (tmp_path / "moved" / "SST-2" / "journal.jsonl").read_bytes() == journal
    assert again["best"] == content["best"]


def test_the_best_of_the_grid_is_measured_again_where_its_record_is_damaged(places, tmp_path):
    given = arguments(places, "SST-2", tmp_path, "--tau", "swap")
    content = run_agora.main(given)
    folder = tmp_path / "SST-2"
    assert not list((folder / "models").glob("fit-0000-*")), "a later round has the best model"
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"best_of_grid", ', b'"best_of_g\xffid", '))
    again = run_agora.main(given)
    assert (folder / "journal.jsonl.damaged").exists()
    assert again["best_of_grid"] == content["best_of_grid"]
    assert again["best"] == content["best"]


def test_a_run_is_not_resumed_on_another_test_set_or_from_other_weights(places, tmp_path, capsys):
    shutil.copytree(TEST_DATA / "glue" / "SST-2", tmp_path / "data" / "SST-2")
    test = tmp_path / "data" / "SST-2" / "test.tsv"
    test.write_text("sentence\tlabel\na fine plot\t1\na bad plot\t0\n")
    given = arguments(places, "SST-2", tmp_path / "out", "--tau", "swap", "--max_rounds", "1")
    body = shutil.copytree(places / "pretrained", tmp_path / "body")
    given += ["--data_dir", str(tmp_path / "data"), "--pretrained_parameters", str(body)]
    content = run_agora.main(given)
    test.write_text("sentence\tlabel\na fine plot\t1\na bad plot\t1\n")
    with pytest.raises(SystemExit):
        run_agora.main(given)
    assert "a run whose test set had other rows; restore them, or" in capsys.readouterr().err
    test.unlink()
    assert run_agora.main(given)["best_of_grid"] == content["best_of_grid"]
    save(body / "bort.params", "masked_lm", seed=5)
    with pytest.raises(SystemExit):
        run_agora.main(given)
    assert "contains a run whose fits start from other weights than" in capsys.readouterr().err


def test_a_finished_run_keeps_its_results_when_its_labeller_is_another_one(
    places, tmp_path, capsys, monkeypatch
):
    given = arguments(places, "SST-2", tmp_path, "--tau", "swap", "--max_rounds", "2")
    labeller = Path(shutil.copytree(places / "timaeus-SST-2", tmp_path / "labeller"))
    given += ["--timaeus", str(labeller)]
    run_agora.main(given)
    folder = tmp_path / "SST-2"
    written = {name: (folder / name).read_bytes() for name in ("agora.json", "images.tsv")}
    label = ModelTimaeus.label
    with monkeypatch.context() as patch:
        patch.setattr(ModelTimaeus, "label", lambda self, inputs: 1 - label(self, inputs))
        with pytest.raises(SystemExit):
            run_agora.main(given)
    assert f"error: {folder}: fit-0001-" in capsys.readouterr().err
    save(labeller / "best.params", get_task("SST-2").kind, get_task("SST-2"), seed=5)
    with pytest.raises(SystemExit):
        run_agora.main(given)
    assert f"whose labeller had other weights than --timaeus {labeller};" in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in written} == written


@pytest.mark.parametrize("most", [100, 0])  # updates that a run may skip before it gives up
def test_a_search_space_whose_sets_all_diverge_is_named(
    places, tmp_path, capsys, monkeypatch, most
):
    monkeypatch.setattr("bort.training.loop.MAX_SKIPPED", most)
    space = tmp_path / "space.yaml"
    space.write_text("lr: [1e30]\nepochs: [1]\n")
    given = arguments(places, "SST-2", tmp_path / "out", "--tau", "swap")
    with pytest.raises(SystemExit):
        run_agora.main([*given, "--search_space", str(space)])
    assert f"{space}: every set diverged in every round; lower" in capsys.readouterr().err
    assert not (tmp_path / "out" / "SST-2" / "best.params").exists()


def test_a_second_run_in_a_folder_is_refused(places, tmp_path, capsys):
    held, refused = lock_folder(str(tmp_path / "SST-2")), pytest.raises(SystemExit)
    with held, refused:
        run_agora.main(arguments(places, "SST-2", tmp_path))
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    assert not (tmp_path / "SST-2" / "config.json").exists()


def test_a_model_in_the_folder_is_not_replaced(places, tmp_path, capsys):
    timaeus = save(tmp_path / "SST-2" / "best.params", get_task("SST-2").kind, get_task("SST-2"))
    before = Path(timaeus).read_bytes()
    with pytest.raises(SystemExit):
        run_agora.main([*arguments(places, "SST-2", tmp_path), "--tau", "swap"])
    says = f"{tmp_path / 'SST-2'}: has another model; name another --output_dir"
    assert says in capsys.readouterr().err
    assert Path(timaeus).read_bytes() == before


@pytest.mark.parametrize("content", ['{"TaskSettings": {}}', '{"architectures": ["BertModel"]}'])
def test_the_config_of_something_else_is_not_replaced(places, tmp_path, capsys, content):
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "config.json").write_text(content)
    with pytest.raises(SystemExit):
        run_agora.main(arguments(places, "SST-2", tmp_path))
    said = capsys.readouterr().err
    assert said.startswith(f"error: --output_dir {tmp_path / 'SST-2'}: holds the config.json of so")
    assert (tmp_path / "SST-2" / "config.json").read_text() == content


@pytest.mark.parametrize(("slot", "gpus"), [("0/2", "0"), ("1/2", "1"), (None, "0,1")])
def test_fits_at_a_time_divide_the_gpus(monkeypatch, slot, gpus):
    from bort.agora import run as agora_run

    class Asked(Exception):  # noqa: N818
        pass

    def devices_of(given, *_):
        raise Asked(given)

    monkeypatch.setattr(agora_run, "devices_of", devices_of)
    if slot:
        monkeypatch.setenv("BORT_JOB_SLOT", slot)
    tuner = agora_run.FineTuner(
        get_task("SST-2"), [], TaskSettings("SST-2"), TokenizerSettings(), ClassifierSettings(),
        FinetuningOptimizerSettings(), "0,1",
    )  # fmt: skip
    with pytest.raises(Asked) as asked:
        tuner.fit([], {"lr": 0.1}, None, "")
    assert asked.value.args == (gpus,)


def test_a_run_is_not_resumed_with_other_numbers_of_gpus(places, tmp_path, capsys, monkeypatch):
    """A fit on two GPUs takes twice as many examples in an update as one on a single GPU."""
    given = arguments(places, "SST-2", tmp_path, "--tau", "swap", "--max_rounds")
    run_agora.main([*given, "1"])
    monkeypatch.setattr("bort.jobs.gpus_of_each", lambda gpus, count: 2)
    run_agora.main([*given, "1"])  # nothing is left to be fitted
    with pytest.raises(SystemExit):
        run_agora.main([*given, "2"])
    assert "a run whose fits had 1 GPU(s) each, now 2: their updates" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(places, tmp_path, monkeypatch):
    from bort.agora import run as agora_run

    more = ("--tau", "dropout,noise", "--warm_start")
    expected = run_agora.main(arguments(places, "CB", tmp_path / "whole", *more))
    fit, fits = agora_run.FineTuner.fit, []

    def dying(*each):
        if len(fits) == 2:
            raise KeyboardInterrupt
        fits.append(each)
        return fit(*each)

    monkeypatch.setattr(agora_run.FineTuner, "fit", dying)
    given = arguments(places, "CB", tmp_path / "killed", *more)
    with pytest.raises(SystemExit) as stopped:
        run_agora.main(given)
    assert stopped.value.code == 130
    monkeypatch.undo()
    resumed = run_agora.main(given)
    for one in (expected, resumed):
        del one["seconds"]
        for record in one["rounds"]:
            del record["seconds"]
    assert resumed == expected
    check_layout(tmp_path / "killed" / "CB", get_task("CB"), {**resumed, **_times(tmp_path)})


def _times(tmp_path):
    content = json.loads((tmp_path / "killed" / "CB" / "agora.json").read_text())
    return {"seconds": content["seconds"], "rounds": content["rounds"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["STS-B", "COPA", "ReCoRD", "RACE-M", "MultiRC", "CoLA", "MNLI", "WSC"]
)
def test_every_kind_of_task(places, tmp_path, name):
    content = run_agora.main(arguments(places, name, tmp_path, "--sides", "all"))
    check_layout(tmp_path / get_task(name).name, get_task(name), content)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--timaeus_labels", "x"], "give one labeller: --timaeus or --timaeus_labels"),
        (["--regression_edges", "2,1"], "--regression_edges 2,1: must increase"),
        (["--regression_edges", "2;1"], "--regression_edges 2;1: must be numbers"),
        (["--tau_model", "absent"], "absent: not found"),
        (["--model_parameters", "x"], "--model_parameters: every fit gets a new head"),
        (["--vocab_file", "VOCABULARY"], "trained with another vocabulary than wordpiece of"),
        (["--task_name", "AX"], "--task_name AX: has no training set; run MNLI"),
        (["--task_name", "CB"], "whose labels are not those of CB"),
        (["--gpus", "0,0"], "error: --gpus 0,0: names a device twice"),
        (["--dtype", "float16"], "error: --dtype float16: needs GPUs"),
        (["--lower", "0.5"], "--lower 0.5: must not be above --upper 0.2"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(places, tmp_path, capsys, more, message):
    more = [write_vocabulary(tmp_path) if one == "VOCABULARY" else one for one in more]
    with pytest.raises(SystemExit):
        run_agora.main([*arguments(places, "SST-2", tmp_path / "out"), *more])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_space_of_replicas_on_the_cpu_has_no_effect_on_gpus(tmp_path, capsys):
    space = tmp_path / "space.yaml"
    space.write_text("cpu_contexts: [1, 2]\n")
    given = ("--task_name", "SST-2", "--search_space", str(space), "--timaeus", "absent")
    with pytest.raises(SystemExit):
        run_agora.main([*given, "--gpus", "0", "--output_dir", str(tmp_path / "out")])
    assert "cpu_contexts: has no effect with gpus; leave one" in capsys.readouterr().err


def test_ranks_and_processes_are_not_combined(places, tmp_path, capsys, monkeypatch):
    from bort.agora import run as agora_run

    ranks = SingleProcess()
    ranks.size = 2
    monkeypatch.setattr(agora_run, "communicator_of_environment", lambda: ranks)
    with pytest.raises(SystemExit):
        run_agora.main([*arguments(places, "SST-2", tmp_path / "out"), "--workers", "2"])
    assert "--workers: horovodrun spreads the fits over its ranks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_two_ranks_make_the_same_run(places, tmp_path):
    run_agora.main(arguments(places, "SST-2", tmp_path / "one"))
    program = ["python", "scripts/run_agora.py"]
    horovodrun(2, *program, *arguments(places, "SST-2", tmp_path / "two"))
    contents = []
    for name in ("one", "two"):
        content = read_json(str(tmp_path / name / "SST-2" / "agora.json"))
        del content["seconds"]
        for record in content["rounds"]:
            del record["seconds"]
        contents.append(content)
    assert contents[0] == contents[1]
