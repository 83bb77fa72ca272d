"""The run scripts and those of the tasks, with stand-ins for the set-up and for Python."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bort.config import parse
from bort.files import read_json
from bort.finetuning.config import FINETUNING_CLASSES, FinetuningSettings
from bort.pretraining.config import SETTINGS_CLASSES, PretrainingSettings
from data.submission import check_submission
from data.tasks import get_task, task_names

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(p.stem for p in ROOT.glob("scripts/finetune/*.sh") if p.stem != "common")
PREDICTED = {"ax": "MNLI", "ax-b": "SuperGLUERTE", "ax-g": "SuperGLUERTE"}

pytestmark = pytest.mark.integration


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

    def settings(self, task: str, *given: str, **environment: str) -> FinetuningSettings:
        """Run a task's script; return the settings that finetune_classifier.py parses."""
        program, file, *flags = self.call(task, *given, **environment)
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_of_a_task_finds_the_project_when_it_is_called_in_its_own_folder(
    project, script
):
    folder = project.folder / "scripts/finetune"
    run = subprocess.run(
        ["bash", f"{script}.sh", "--config", "file"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("error: --config: the defaults of this script would override")


def test_help_needs_no_weights(project):
    (project.folder / "model/bort.params").unlink()
    assert project.call("CoLA", "--help")[-1] == "--help"


def test_the_environment_variables(project):
    settings = project.settings(
        "MRPC", PRETRAINED_PARAMETERS="runs/a body", DATA_DIR="my data", OUTPUT_DIR="my runs"
    )
    assert settings.task.data_dir == "my data"
    assert settings.run.output_dir == "my runs"
    assert settings.classifier.pretrained_parameters == "runs/a body"
    assert settings.tokenizer.dataset_name is None, "these weights have a vocabulary of their own"


def test_flags_go_to_the_program_and_override_the_defaults(project):
    settings = project.settings(
        "MRPC", "--epochs", "3", "--ramp_up_epochs", "2", "--early_stop", "4", "--batch_size=16",
        "--accumulate", "2", "--max_len", "64", "--lr", "1e-5", "--weight_decay", "350",
        "--warmup_ratio", "0.5", "--seed", "4", "--resume", "--extra_layer",
        "--pretrained_parameters", "runs/a body", "--data_dir", "my data", "--output_dir=my runs",
        DATA_DIR="other", OUTPUT_DIR="other", PRETRAINED_PARAMETERS="other",
    )  # fmt: skip
    task, tokenizer, classifier, optimizer, run = settings
    assert (task.data_dir, task.max_len) == ("my data", 64)
    assert tokenizer.dataset_name is None
    assert classifier.pretrained_parameters == "runs/a body"
    assert classifier.extra_layer
    assert (optimizer.epochs, optimizer.ramp_up_epochs, optimizer.early_stop) == (3, 2, 4)
    assert (optimizer.batch_size, optimizer.accumulate) == (16, 2)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup_ratio) == (1e-5, 350, 0.5)
    assert (run.output_dir, run.seed, run.resume) == ("my runs", 4, True)


@pytest.mark.parametrize(
    ("variable", "hint"),
    [("LR", "--lr"), ("MODEL_PARAMETERS", "--model_parameters"), ("EXTRA_FLAGS", "these flags")],
)
def test_a_variable_that_is_no_longer_read_is_refused(project, variable, hint):
    run = project.run("CoLA", **{variable: "1"})
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert f" {variable} " in run.stderr
    assert f" {hint} " in run.stderr
    assert not (project.folder / "calls").exists()


def test_random_weights_and_another_model(project):
    (project.folder / "model/bort.params").unlink()
    classifier = project.settings(
        "CB", "--model_name", "bort_2_4_8_8", PRETRAINED_PARAMETERS="none"
    ).classifier
    assert classifier.pretrained_parameters is None
    assert classifier.model_name == "bort_2_4_8_8"
    predicted = project.settings("AX", OUTPUT_DIR="out").classifier
    assert predicted.model_parameters == "out/MNLI"
    predicted = project.settings("AX", "--model_parameters", "my/model").classifier
    assert predicted.model_parameters == "my/model"


@pytest.mark.parametrize("flag", ["--model_parameters", "--model_par"])
@pytest.mark.parametrize("variables", [{}, {"PRETRAINED_PARAMETERS": "runs/a body"}])
def test_a_fine_tuned_model_needs_no_body(project, variables, flag):
    (project.folder / "model/bort.params").unlink()
    settings = project.settings(
        "CoLA", "--only_inference", f"{flag}=runs/finetuning/CoLA", **variables
    )
    assert settings.classifier.model_parameters == "runs/finetuning/CoLA"
    assert settings.classifier.pretrained_parameters is None
    assert settings.tokenizer.dataset_name is None


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
    assert " ".join(words[:7]) == "horovodrun -np 2 -H localhost:2 --timeline-filename t.json"
    assert " finetune_classifier.py --task_name RTE" in " ".join(words[7:])
    project.program("nvidia-smi", "echo GPU 0")
    (project.folder / ".venv/made-for").write_text("a project cu117\n")
    path = f"{project.folder}:{os.environ['PATH']}"
    words = project.call("rte", WORKERS="2", PATH=path)
    assert words[words.index("finetune_classifier.py") + 1 :][:2] == ["--gpus", "0,1"]


@pytest.mark.parametrize("workers", ["x", "0", "-1", "1.5", "08"])
def test_a_wrong_number_of_workers_is_refused(project, workers):
    run = project.run("rte", WORKERS=workers)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"error: WORKERS={workers}: must be a number of workers, at least 1\n"


def pretraining_call(project: Project, *arguments: str, **environment: str) -> str:
    """Run the pretraining script; return the words that it called a program with."""
    run = project.run(*arguments, script="run_pretraining_distillation", **environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return (project.folder / "calls").read_text().replace("\n", " ")


def pretraining_settings(
    project: Project, *arguments: str, **environment: str
) -> PretrainingSettings:
    """Run the pretraining script; return the settings that its program parses."""
    pretraining_call(project, *arguments, **environment)
    flags = (project.folder / "calls").read_text().splitlines()[2:]
    return PretrainingSettings(*parse("", flags, *SETTINGS_CLASSES))


@pytest.mark.parametrize(
    ("workers", "program"),
    [("1", r"python run_pretraining_distillation\.py"),
     ("2", r"horovodrun -np 2 -H localhost:2 .* run_pretraining_distillation_hvd\.py")],
)  # fmt: skip
def test_pretraining_starts_its_workers_in_the_same_way(project, workers, program):
    words = pretraining_call(project, workers, "train", "test")
    assert re.match(f"{program} --data train --data_eval test", words)


def test_defaults_of_pretraining(project):
    settings = pretraining_settings(project, "1", "train", "test")
    assert settings.teacher.teacher_ckpt_dir is None
    assert settings.loss.mlm_weight == 1
    assert settings.student.student_model == "bort_4_8_768_1024"
    assert (settings.optimizer.num_steps, settings.optimizer.lr) == (2_000_000, 1e-4)
    assert (settings.data.batch_size, settings.data.batch_size_eval) == (1024, 1024)
    assert settings.run.ckpt_dir == "runs/pretraining"
    assert (project.folder / "runs/pretraining/train.log").exists()


def test_pretraining_with_a_teacher_flags_and_variables(project):
    settings = pretraining_settings(
        project, "1", "train", "test", "my teacher", "--num_steps", "5", "--lr=2e-4", "--resume",
        "--teacher_ce_weight", "0.7",
        STUDENT_MODEL="bort_1_2_8_8", TEACHER_MODEL="bort_2_2_8_8", BATCH_SIZE="64", CKPT_DIR="out",
    )  # fmt: skip
    assert settings.teacher.teacher_ckpt_dir == "my teacher"
    assert settings.teacher.teacher_model == "bort_2_2_8_8"
    assert (settings.loss.mlm_weight, settings.loss.teacher_ce_weight) == (0.1, 0.7)
    assert settings.student.student_model == "bort_1_2_8_8"
    assert (settings.optimizer.num_steps, settings.optimizer.lr) == (5, 2e-4)
    assert (settings.data.batch_size, settings.data.batch_size_eval) == (64, 64)
    assert (settings.run.ckpt_dir, settings.run.resume) == ("out", True)
    assert (project.folder / "out/train.log").exists()


def test_the_shape_of_no_teacher_is_refused(project):
    run = project.run(
        "1", "train", "test", script="run_pretraining_distillation", TEACHER_MODEL="bort_2_2_8_8"
    )
    assert run.returncode == 2
    assert "TEACHER_MODEL=bort_2_2_8_8: there is no teacher; give its checkpoint" in run.stderr
    assert not (project.folder / "runs").exists()
    (project.folder / "test_data").mkdir()
    (project.folder / "test_data/sample_text.txt").write_text("One.\n\nTwo.\n")
    words = pretraining_call(project, "1", "TEST", TEACHER_MODEL="bort_2_2_8_8")
    assert "--teacher_model bort_2_4_512_256" in words


def test_pretraining_weighs_the_losses_alike_with_a_teacher_and_its_cache(project):
    live = pretraining_settings(project, "1", "train", "test", "teacher")
    cached = pretraining_settings(project, "1", "train", "test", "--teacher_cache", "cache")
    assert cached.loss == live.loss
    assert cached.teacher.teacher_cache == "cache"
    assert cached.teacher.teacher_model is None


@pytest.mark.parametrize(
    ("folder", "teacher"), [("--ckpt_dir", "--teacher_ckpt_dir"), ("--ckpt_d", "--teacher_ck")]
)
def test_the_log_is_in_the_folder_of_the_flag(project, folder, teacher):
    settings = pretraining_settings(
        project, "1", "train", "test", folder, "my run", teacher, "t", CKPT_DIR="other"
    )
    assert (settings.run.ckpt_dir, settings.loss.mlm_weight) == ("my run", 0.1)
    assert (project.folder / "my run/train.log").exists()
    assert not (project.folder / "other").exists()


@pytest.mark.parametrize(
    "arguments",
    [(), ("1",), ("0", "train", "test"), ("two", "TEST"), ("1", "train"), ("1", "TEST", "test"),
     ("1", "train", "--resume"), ("1", "train", "test", "teacher", "another")],
)  # fmt: skip
def test_usage_of_pretraining(project, arguments):
    run = project.run(*arguments, script="run_pretraining_distillation")
    assert run.returncode == 2
    assert run.stderr.startswith("usage: ")
    assert not (project.folder / "calls").exists()


def test_pretraining_refuses_a_variable_that_is_no_longer_read(project):
    run = project.run("1", "a", "b", script="run_pretraining_distillation", TEMPERATURE="2")
    assert run.returncode == 2
    assert "TEMPERATURE" in run.stderr
    assert "--distillation_temperature" in run.stderr
    assert not (project.folder / "runs").exists()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("run_finetune", ("cola",)), ("run_pretraining_distillation", ("1", "train", "test"))],
)
@pytest.mark.parametrize("flag", [("--config", "config.json"), ("--conf=config.json",)])
def test_the_config_of_a_run_is_refused(project, script, arguments, flag):
    run = project.run(*arguments, *flag, script=script)
    assert run.returncode == 2
    assert run.stderr.startswith("error: --config: the defaults of this script would override")
    assert not (project.folder / "runs").exists()


# Reports its start, counts the signals it gets, and takes a while to end after the first.
STOPPABLE = """
import signal, sys, time
received = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(int(number)))
print("started", flush=True)
while not received:
    time.sleep(0.01)
time.sleep(0.2)
print("saved after", received, flush=True)
sys.exit(7)
"""
SCRIPTS_AND_ARGUMENTS = [
    ("run_finetune", ("cola",), "runs/finetuning"),
    ("run_pretraining_distillation", ("1", "train", "test"), "runs/pretraining"),
]


class Running:
    """A script that runs in the background, in a process group of its own."""

    def __init__(
        self, project: Project, script: str, *arguments: str, sigint: Any = signal.SIG_DFL
    ) -> None:
        def reset_signals() -> None:
            # Bash cannot trap a signal that was ignored when it started, as in a background job
            # or under nohup.
            signal.signal(signal.SIGINT, sigint)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)

        self.process = subprocess.Popen(
            [str(project.folder / f"{script}.sh"), *arguments],
            env={"PATH": os.environ["PATH"], "HOME": str(project.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=reset_signals,  # noqa: PLW1509
        )

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        while (read := self.process.stdout.readline().rstrip("\n")) != line:
            assert read, f"the script ended before it printed {line!r}"

    def end(self) -> tuple[int, str]:
        """Return the exit status and what was printed since the last line that was waited for."""
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


def make_stoppable(project: Project, *programs: str) -> None:
    (project.folder / "stoppable.py").write_text(STOPPABLE)
    for program in programs:
        project.program(program, f"exec {sys.executable} stoppable.py")


@pytest.mark.parametrize(
    ("number", "passed"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
@pytest.mark.parametrize(("script", "arguments", "folder"), SCRIPTS_AND_ARGUMENTS)
def test_a_signal_reaches_the_program_and_its_status_is_kept(
    project, script, arguments, folder, number, passed
):
    make_stoppable(project, ".venv/bin/python")
    running = Running(project, script, *arguments)
    running.wait_for("started")
    running.process.send_signal(number)
    status, output = running.end()
    assert status == 7
    assert f"saved after [{int(passed)}]" in output
    if script == "run_pretraining_distillation":
        assert "saved after" in (project.folder / folder / "train.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_ranks_and_not_horovodrun(project, number):
    # horovodrun kills ranks that take more than 5 seconds to save a checkpoint.
    make_stoppable(project, ".venv/bin/python")
    horovodrun = """trap "echo horovodrun was stopped" TERM INT HUP
        shift 4; "$@" & first=$!; "$@" & wait $first; wait $!
        printf 'Traceback (most recent call last):\n  File "gloo_run.py"\n'
        printf 'RuntimeError: Horovod detected that a process failed\nProcess name: 0\n'
        exit 1"""
    project.program(".venv/bin/horovodrun", horovodrun)
    running = Running(project, "run_pretraining_distillation", "2", "train", "test")
    running.wait_for("started")
    running.wait_for("started")
    running.process.send_signal(number)
    status, output = running.end()
    assert (status, output) == (128 + number, f"saved after [{int(signal.SIGTERM)}]\n" * 2)


def test_where_sigint_is_ignored_it_stops_nothing(project):
    """As in a job that a shell script started in the background."""
    make_stoppable(project, ".venv/bin/python")
    running = Running(project, "run_finetune", "cola", sigint=signal.SIG_IGN)
    running.wait_for("started")
    running.process.send_signal(signal.SIGINT)
    running.process.send_signal(signal.SIGTERM)
    status, output = running.end()
    assert status == 7
    assert f"saved after [{int(signal.SIGTERM)}]" in output


def test_ctrl_c_reaches_the_program_once(project):
    # The terminal sends SIGINT to the whole process group, tee included.
    make_stoppable(project, ".venv/bin/python")
    running = Running(project, "run_pretraining_distillation", "1", "train", "test")
    running.wait_for("started")
    os.killpg(running.process.pid, signal.SIGINT)
    status, output = running.end()
    assert status == 7
    assert output == f"saved after [{int(signal.SIGINT)}]\n"
    assert (project.folder / "runs/pretraining/train.log").read_text().endswith(output)


def test_a_signal_during_set_up_stops_it_and_starts_nothing(project):
    make_stoppable(project, "scripts/setup_env.sh")
    running = Running(project, "run_finetune", "cola")
    running.wait_for("started")
    running.process.send_signal(signal.SIGTERM)
    status, _ = running.end()
    assert status == 7
    assert not (project.folder / "calls").exists()


def test_no_step_of_the_pipeline_follows_a_signal(project):
    (project.folder / "test_data").mkdir()
    (project.folder / "test_data/sample_text.txt").write_text("One.\n\nTwo.\n")
    stops_well = STOPPABLE.replace("sys.exit(7)", "sys.exit(0)")
    make_stoppable(project, ".venv/bin/python")
    (project.folder / "stoppable.py").write_text(stops_well)
    running = Running(project, "run_pretraining_distillation", "1", "TEST")
    running.wait_for("started")
    running.process.send_signal(signal.SIGTERM)
    status, output = running.end()
    assert status == 128 + signal.SIGTERM
    assert output.count("saved after") == 1
    assert "started" not in output


@pytest.mark.parametrize(
    ("script", "arguments", "folder"),
    [
        ("run_pretraining_distillation", ("1", "TEST"), "runs/TEST"),
        ("run_finetune", ("TEST1",), "runs/TEST1"),
    ],
)
def test_an_active_run_is_not_deleted_by_a_second_one(project, script, arguments, folder):
    (project.folder / "test_data").mkdir()
    (project.folder / "test_data/sample_text.txt").write_text("One.\n\nTwo.\n")
    make_stoppable(project, ".venv/bin/python")
    running = Running(project, script, *arguments)
    running.wait_for("started")
    result = project.folder / folder / "result"
    result.touch()
    second = project.run(*arguments, script=script)
    assert second.returncode == 1
    assert second.stderr == (
        f"error: {folder}: another run of this script is writing there; wait for its end\n"
    )
    running.process.send_signal(signal.SIGTERM)
    running.end()
    assert result.exists()
    project.program(".venv/bin/python", "exit 3")
    assert project.run(*arguments, script=script).returncode == 3
    assert not result.exists()


TWO_WORKERS = ("run_pretraining_distillation", ("2", "train", "test"), "runs/pretraining")


@pytest.mark.parametrize(("script", "arguments", "folder"), [*SCRIPTS_AND_ARGUMENTS, TWO_WORKERS])
def test_the_status_of_the_program_is_that_of_the_script(project, script, arguments, folder):
    for program in ("python", "horovodrun"):
        project.program(f".venv/bin/{program}", "echo failed >&2; exit 5")
    run = project.run(*arguments, script=script)
    assert run.returncode == 5
    assert "failed" in run.stdout + run.stderr


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


@pytest.fixture
def real_horovodrun(project):
    horovodrun = Path(sys.executable).parent / "horovodrun"
    if not horovodrun.exists():
        pytest.skip("this Python has no horovodrun; scripts/setup_env.sh makes one that has")
    project.program(".venv/bin/horovodrun", f'exec {horovodrun} "$@"')


@pytest.mark.distributed
@pytest.mark.usefixtures("real_horovodrun")
def test_ctrl_c_leaves_ranks_more_than_horovodruns_5_seconds_to_save(project):
    make_stoppable(project, ".venv/bin/python")
    slow = STOPPABLE.replace("time.sleep(0.2)", "time.sleep(7)")
    assert slow != STOPPABLE
    (project.folder / "stoppable.py").write_text(slow)
    running = Running(project, "run_pretraining_distillation", "2", "train", "test")
    missing = {"started", "[1]<stdout>:started"}
    while missing:
        line = running.process.stdout.readline()
        assert line, "the script ended before both ranks had started"
        missing.discard(line.rstrip("\n"))
    os.killpg(running.process.pid, signal.SIGINT)
    status, output = running.end()
    assert status == 128 + signal.SIGINT
    assert output.count(f"saved after [{int(signal.SIGTERM)}]") == 2
    assert "Traceback" not in output


@pytest.mark.distributed
@pytest.mark.usefixtures("real_horovodrun")
def test_embedded_run_on_two_workers(project):
    assert " 2 rank(s) " in embedded_run(project, "TEST1", "MRPC", WORKERS="2")
