"""The run scripts and those of the tasks, with stand-ins for the set-up and for Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bort.config import parse
from bort.files import read_json
from bort.finetuning.config import FINETUNING_CLASSES, FinetuningSettings
from data.submission import check_submission
from data.tasks import get_task, task_names

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(p.stem for p in ROOT.glob("scripts/finetune/*.sh") if p.stem != "common")
PREDICTED = {"ax": "MNLI", "ax-b": "SuperGLUERTE", "ax-g": "SuperGLUERTE"}


class Project:
    """A folder with the scripts, in which every program says what it was called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "scripts/finetune", folder / "scripts/finetune")
        shutil.copy(ROOT / "scripts/launch.sh", folder / "scripts")
        for script in ("run_finetune.sh", "run_pretraining_distillation.sh"):
            shutil.copy(ROOT / script, folder)
        self.program("scripts/setup_env.sh", "echo set up")
        for name in ("python", "horovodrun"):
            self.program(f".venv/bin/{name}", f'printf "%s\\n" {name} "$@" >calls')
        (folder / ".venv/made-for").write_text(f"{folder} cpu\n")
        (folder / "model").mkdir()
        (folder / "model/bort.params").touch()

    def program(self, name: str, script: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    def run(
        self, *arguments: str, script: str = "run_finetune", **environment: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(self.folder / f"{script}.sh"), *arguments],
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder), **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def call(self, *arguments: str, **environment: str) -> list[str]:
        """Run the script; return the words that it called a program with."""
        run = self.run(*arguments, **environment)
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stdout.startswith("set up")
        return (self.folder / "calls").read_text().splitlines()

    def settings(self, task: str, **environment: str) -> FinetuningSettings:
        """Run a task's script; return the settings that finetune_classifier.py understands."""
        program, file, *flags = self.call(task, **environment)
        assert (program, file) == ("python", "finetune_classifier.py")
        settings = FinetuningSettings(*parse("", flags, *FINETUNING_CLASSES))
        settings.check()
        return settings


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_every_task_has_a_script():
    names = [re.sub(r"[^a-z0-9-]", "", name.lower()) for name in task_names() if name != "RACE"]
    assert sorted(name.replace("superglue", "superglue-") for name in names) == SCRIPTS
    assert len(SCRIPTS) == 22


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_of_a_task(project, script):
    settings = project.settings(script)
    task = get_task(script)
    assert settings.task.task_name == task.name
    assert os.access(ROOT / "scripts/finetune" / f"{script}.sh", os.X_OK)
    if script in PREDICTED:
        assert settings.run.only_inference
        assert task.model_task == PREDICTED[script]
        assert settings.classifier.model_parameters == f"runs/finetuning/{task.model_task}"
        return
    assert settings.classifier.pretrained_parameters == "model/bort.params"
    assert settings.tokenizer.dataset_name == "openwebtext_ccnews_stories_books_cased"
    # The recommended space: README of the original; the epochs: its author on small tasks.
    optimizer = settings.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup_ratio) == (1e-4, 10, 0.35)
    assert optimizer.batch_size in (8, 16)
    small = task.official_rows("train") < 10_000
    assert optimizer.epochs in ((50, 100) if small else (10, 20))
    assert settings.run.seed == 0


def test_the_environment_overrides(project):
    settings = project.settings(
        "MRPC",
        PRETRAINED_PARAMETERS="runs/a body", DATA_DIR="my data", OUTPUT_DIR="out", EPOCHS="3",
        RAMP_UP_EPOCHS="2", EARLY_STOP="4", BATCH_SIZE="16", ACCUMULATE="2", MAX_LEN="64",
        LR="1e-5", WEIGHT_DECAY="350", WARMUP_RATIO="0.5", SEED="4",
        EXTRA_FLAGS="--resume --extra_layer",
    )  # fmt: skip
    task, tokenizer, classifier, optimizer, run = settings
    assert (task.data_dir, task.max_len) == ("my data", 64)
    assert tokenizer.dataset_name is None, "weights of ours bring their vocabulary along"
    assert classifier.pretrained_parameters == "runs/a body"
    assert classifier.extra_layer
    assert (optimizer.epochs, optimizer.ramp_up_epochs, optimizer.early_stop) == (3, 2, 4)
    assert (optimizer.batch_size, optimizer.accumulate) == (16, 2)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup_ratio) == (1e-5, 350, 0.5)
    assert (run.output_dir, run.seed, run.resume) == ("out", 4, True)


def test_random_weights_and_another_model(project):
    (project.folder / "model/bort.params").unlink()
    classifier = project.settings("CB", PRETRAINED_PARAMETERS="none", MODEL_NAME="bort_2_4_8_8")[2]
    assert classifier.pretrained_parameters is None
    assert classifier.model_name == "bort_2_4_8_8"
    answered = project.settings("AX", OUTPUT_DIR="out").classifier
    assert answered.model_parameters == "out/MNLI"
    answered = project.settings("AX", MODEL_PARAMETERS="my/model").classifier
    assert answered.model_parameters == "my/model"


def test_without_the_released_model(project):
    (project.folder / "model/bort.params").unlink()
    run = project.run("cola")
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1
    assert "scripts/download_model.sh" in run.stderr


@pytest.mark.parametrize(
    ("name", "task"), [("SST", "SST-2"), ("sts_b", "STS-B"), ("SuperGLUERTE", "SuperGLUERTE"),
                       ("RACE-H", "RACE-H"), ("diagnostic", "AX"), ("axb", "AX-b")],
)  # fmt: skip
def test_names_are_those_of_the_flag(project, name, task):
    assert project.settings(name).task.task_name == get_task(name).name == task


@pytest.mark.parametrize("arguments", [(), ("nothing",), ("common",), ("cola", "rte"), ("",)])
def test_usage(project, arguments):
    run = project.run(*arguments)
    assert run.returncode == 2
    assert re.fullmatch(r"usage: .*TEST1 or TEST2; the tasks are ax.* wsc\n", run.stderr)


def test_several_workers(project):
    words = project.call("rte", WORKERS="2", HOROVODRUN_FLAGS="--timeline-filename t.json")
    expected = "horovodrun -np 2 -H localhost:2 --timeline-filename t.json python -u"
    assert " ".join(words).startswith(f"{expected} finetune_classifier.py --task_name RTE")
    project.program("nvidia-smi", "echo GPU 0")
    (project.folder / ".venv/made-for").write_text("a project cu117\n")
    path = f"{project.folder}:{os.environ['PATH']}"
    words = project.call("rte", WORKERS="2", PATH=path)
    assert words[-2:] == ["--gpus", "0,1"]


@pytest.mark.parametrize(
    ("workers", "program"),
    [("1", "python run_pretraining_distillation.py"),
     ("2", "horovodrun -np 2 -H localhost:2 python -u run_pretraining_distillation_hvd.py")],
)  # fmt: skip
def test_pretraining_starts_its_workers_in_the_same_way(project, workers, program):
    run = project.run(workers, "train", "test", script="run_pretraining_distillation")
    assert run.returncode == 0, run.stdout + run.stderr
    words = (project.folder / "calls").read_text().split()
    assert " ".join(words).startswith(f"{program} --data train --data_eval test")


def embedded_run(project: Project, test: str, name: str, **environment: str) -> str:
    """Run TEST1 or TEST2 with the programs themselves, check what is left, return what it said."""
    for one in ("bort", "data", "test_data", "finetune_classifier.py"):
        (project.folder / one).symlink_to(ROOT / one)
    project.program(".venv/bin/python", f'exec {sys.executable} "$@"')
    run = project.run(test, **environment)
    assert run.returncode == 0, run.stdout + run.stderr
    folder = project.folder / "runs" / test / name
    metrics = read_json(str(folder / "metrics.json"))
    assert len(metrics["history"]) == 5
    assert metrics["seconds"] < 60
    task = get_task(name)
    rows = task.read(ROOT / "test_data", "test").examples
    assert check_submission(folder / str(task.submission_file("test")), task, "test", rows) > 0
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("test", "name"), [("TEST1", "MRPC"), ("TEST2", "CB")])
def test_embedded_runs(project, test, name):
    assert " 1 rank(s) " in embedded_run(project, test, name)


@pytest.mark.distributed
def test_embedded_run_on_two_workers(project):
    horovodrun = Path(sys.executable).parent / "horovodrun"
    if not horovodrun.exists():
        pytest.skip("this Python has no horovodrun; scripts/setup_env.sh makes one that has")
    project.program(".venv/bin/horovodrun", f'exec {horovodrun} "$@"')
    assert " 2 rank(s) " in embedded_run(project, "TEST1", "MRPC", WORKERS="2")
