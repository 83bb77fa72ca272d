"""The experiments' scripts, with a stand-in for Python that says what it was called with."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bort.journal import line_of
from scripts.experiments import distillation, python_reference, true_bort
from tests.test_readme import parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts/experiments"
NOT_EXPERIMENTS = ("common", "fetch_weights")
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.sh") if p.stem not in NOT_EXPERIMENTS)
VARIABLES = ("DATA_DIR", "TEXT")
PYTHON = """#!/usr/bin/env bash
printf '%s\\x1f' "$@" >>calls
printf '\\x1e' >>calls
if [[ " $* " == *" --winners "* ]]; then echo bort_1_4_320_32 1e-3; else echo "${@: -1}"; fi
"""


class Project:
    """A folder with the experiments, pretrained weights, text, and a Python that records calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(FOLDER, folder / "scripts/experiments")
        for name in ("all-MiniLM-L6-v2", "paraphrase-MiniLM-L3-v2", "bert-tiny"):
            (folder / "model/pretrained" / name).mkdir(parents=True)
        (folder / "text.txt").write_text("".join(f"Text {n}.\n\n" for n in range(100)))
        python = folder / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)

    def run(
        self, script: str, *arguments: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
        return subprocess.run(
            ["bash", f"scripts/experiments/{script}.sh", *arguments],
            cwd=self.folder,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[list[str]]:
        records = (self.folder / "calls").read_text().split("\x1e")
        return [record.split("\x1f")[:-1] for record in records if record]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.mark.parametrize("script", [p.stem for p in FOLDER.glob("*.sh")])
def test_scripts_are_valid_shell_and_executable(script):
    path = FOLDER / f"{script}.sh"
    checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert not checked.returncode, checked.stderr
    assert script == "common" or os.access(path, os.X_OK)


def test_the_table_lists_every_experiment():
    text = (ROOT / "scripts/README.md").read_text(encoding="utf-8")
    assert [script for script in SCRIPTS if f"| `experiments/{script}.sh` |" not in text] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_argument_starts_no_experiment(script, project):
    result = project.run(script, "--help", TEXT="text.txt", DATA_DIR="data")
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")
    assert not (project.folder / "calls").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_finds_the_project_when_it_is_called_in_its_own_folder(script, project):
    folder = project.folder / "scripts/experiments"
    command = ["bash", f"{script}.sh", "argument"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "quick_start"])
def test_a_missing_variable_is_named_before_anything_starts(script, project):
    result = project.run(script)
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert any(error.startswith(f"error: {name} is not set; set it to") for name in VARIABLES)
    assert not (project.folder / "calls").exists()


@pytest.mark.parametrize(
    ("script", "variable", "value", "said"),
    [
        ("distillation", "ARMS", "kd mlm-dk", "error: ARMS: mlm-dk is none of mlm mlm-bfloat16"),
        ("distillation", "START", "Random", "error: START: Random is none of bert-tiny random"),
        ("distillation", "TASKS", "SST-2 SST2", "error: TASKS: SST2 is none of SST-2 MRPC"),
        ("distillation", "STEPS", "1e3", "error: STEPS=1e3: must be a number from 1 to 9999999"),
        ("agora", "METHODS", "mistake", "error: METHODS: mistake is none of mistakes real"),
        ("agora", "TASKS", "CoLA", "error: TASKS: CoLA is none of SST-2 MRPC RTE STS-B"),
        ("finetuning", "MODELS", "bert-tiny-randm", "error: MODELS: bert-tiny-randm is none of"),
        ("finetuning", "TASKS", "MRPC sst", "error: TASKS: sst is none of MRPC"),
        ("distillation", "RATES", "1e-3,2e-3", "error: RATES: 1e-3,2e-3 is no number; give numb"),
        ("distillation", "TEACHER_DTYPE", "bf16", "error: TEACHER_DTYPE: bf16 is none of float"),
        ("true_bort", "TEACHER_DTYPE", "auto", "error: TEACHER_DTYPE: auto is none of float32"),
        ("teacher", "DTYPE", "bf16", "error: DTYPE: bf16 is none of auto float32 bfloat16"),
        ("teacher", "TEACHER_STEPS", "010", "error: TEACHER_STEPS=010: must be a number"),
        ("true_bort", "ROWS", "0", "error: ROWS=0: must be a number"),
        ("quick_start", "QUICK_STEPS", "-1", "error: QUICK_STEPS=-1: must be a number"),
    ],
)
def test_a_wrong_value_is_named_before_anything_starts(script, variable, value, said, project):
    variables = {"TEXT": "text.txt", "DATA_DIR": "data", variable: value}
    result = project.run(script, **variables)
    assert result.returncode == 2
    assert result.stderr.startswith(said)
    assert not (project.folder / "calls").exists()


@pytest.mark.parametrize(
    ("script", "variables"),
    [
        *((script, {}) for script in SCRIPTS),
        ("distillation", {"START": "random"}),
        ("distillation", {"STEPS": "3"}),
    ],
)
def test_every_command_of_an_experiment_has_flags_that_exist(script, variables, project, capsys):
    result = project.run(script, TEXT="text.txt", DATA_DIR="data", **variables)
    assert result.returncode == 0, result.stderr
    calls = project.calls()
    assert calls
    for program, *arguments in calls:
        empty = [flag for flag, value in zip(arguments, arguments[1:]) if not value]
        assert not any(flag.startswith("--") for flag in empty), f"{program} refuses {empty}"
        try:
            parse(program, arguments)
        except SystemExit:
            pytest.fail(f"{program} {arguments}: {capsys.readouterr().err}")


def write_run(path: Path, losses: list[float]) -> None:
    """Write the held-out losses of a run, at step 0, 100, 200, ..."""
    path.mkdir(parents=True)
    lines = (
        line_of({"step": 100 * n, "phase": "eval", "mlm_loss": loss, "accuracy": (10 - loss) / 10})
        for n, loss in enumerate(losses)
    )
    (path / "metrics.jsonl").write_bytes(b"".join(lines))


def test_the_tables_of_the_distillation(tmp_path, capsys, figures):
    for seed, offset in enumerate((0.0, 0.5, 1.0)):
        write_run(tmp_path / f"runs/mlm/{seed}", [8.0, 6.0 + offset, 4.0 + offset])
        write_run(tmp_path / f"runs/kd/{seed}", [8.0, 5.0 + offset, 3.0 + offset])
    (tmp_path / "times").mkdir()
    for arm, seconds in (("mlm", 0.05), ("kd", 0.1)):
        lines = (f"{2 + steps * seconds:.3f} 1.000\n" for steps in (20, 80))
        (tmp_path / "times" / arm).write_text("".join(lines))
    for seed, accuracy in enumerate((0.5, 0.6)):
        task = tmp_path / f"tasks/kd/{seed}/SST-2"
        task.mkdir(parents=True)
        answers = {"dev": {"rows": 2, "metrics": {"accuracy": accuracy}}}
        metrics = {"task": "SST-2", "answers": answers}
        (task / "metrics.json").write_text(json.dumps(metrics))
    distillation.main([str(tmp_path)])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == [
        *("kd", "3", "8.000 ± 0.000", "5.500 ± 0.500", "3.500 ± 0.500", "65.00 ± 5.00")
    ]
    # In the 10 s of mlm's 200 steps, kd makes 100.
    assert ["kd", "100", "100", "5.500 ± 0.500"] in rows
    assert ["mlm", "50", "200", "4.500 ± 0.500"] in rows
    assert rows[-1] == ["kd", "55.0 ± 7.1"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    kd, mlm = ((line.get_label(), line.get_xydata().tolist()) for line in axes.get_lines())
    assert kd == ("kd, 3 seeds", [[100, 5.5], [200, 3.5]])
    assert mlm == ("mlm, 3 seeds", [[100, 6.5], [200, 4.5]])


def test_an_arm_whose_fine_tuning_has_begun_only_is_left_out(tmp_path):
    for arm, seeds, accuracy in (("mlm", (1, 2), 0.5), ("start", (1,), 0.25), ("kd", (), 0.0)):
        (tmp_path / arm / "3/SST-2").mkdir(parents=True)  # training
        for seed in seeds:
            (tmp_path / f"{arm}/{seed}/SST-2").mkdir(parents=True)
            answers = {"dev": {"rows": 2, "metrics": {"accuracy": accuracy}}}
            content = json.dumps({"task": "SST-2", "answers": answers})
            (tmp_path / f"{arm}/{seed}/SST-2/metrics.json").write_text(content)
    (tmp_path / "notes.txt").touch()
    rows = distillation.tasks_table(tmp_path).splitlines()[2:]
    assert rows == ["| mlm | 50.0 ± 0.0 |", "| start | 25.0 (1 of 2) |"]
    assert not distillation.tasks_table(tmp_path / "nothing")


def test_the_losses_of_an_experiment_without_times_are_shown(tmp_path, capsys):
    write_run(tmp_path / "runs/mlm/1", [8.0, 6.0, 4.0])
    distillation.main([str(tmp_path)])
    assert "| mlm | 1 | 8.000 | 6.000 | 4.000 |" in capsys.readouterr().out


def test_a_run_that_has_not_come_so_far_is_not_shown_as_ended(tmp_path, capsys):
    write_run(tmp_path / "runs/kd/1", [8.0, 5.0])
    write_run(tmp_path / "runs/kd/2", [8.0, 7.0, 3.0])
    write_run(tmp_path / "runs/mlm/1", [8.0, 6.0, 4.0])
    (tmp_path / "times").mkdir()
    for arm in ("mlm", "kd"):
        (tmp_path / "times" / arm).write_text("1 0\n7 0\n")
    distillation.main([str(tmp_path)])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert ["kd", "2", "8.000 ± 0.000", "6.000 ± 1.414", "-", "-"] in rows
    assert ["mlm", "1", "8.000", "6.000", "4.000", "60.00"] in rows
    assert ["kd", "100", "200", "-"] in rows
    assert ["mlm", "100", "200", "4.000"] in rows


def test_a_run_without_an_evaluation_is_named(tmp_path, capsys):
    run = tmp_path / "runs/mlm/1"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_bytes(line_of({"step": 10, "phase": "train", "loss": 9.0}))
    for given in ([str(tmp_path)], ["--best", str(run)]):
        with pytest.raises(SystemExit):
            distillation.main(given)
        assert f"{run}: has no held-out loss yet; wait" in capsys.readouterr().err


def test_the_best_run_is_the_one_with_the_lowest_loss_at_the_end(tmp_path, capsys):
    write_run(tmp_path / "1e-3", [8.0, 3.0, 5.0])
    write_run(tmp_path / "3e-3", [8.0, 6.0, 4.0])
    distillation.main(["--best", str(tmp_path / "1e-3"), str(tmp_path / "3e-3")])
    assert capsys.readouterr().out == f"{tmp_path / '3e-3'}\n"


def test_the_tables_of_the_true_bort(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    lines = [
        {"step": 100 * n, "phase": phase, "mlm_loss": loss, "accuracy": 0.25, "kl": 2.0, **more}
        for n, loss in enumerate((10.0, 7.0))
        for phase, more in (("eval", {}), ("train", {"tokens_per_second": 1024.0}))
    ]
    (tmp_path / "model/metrics.jsonl").write_bytes(b"".join(map(line_of, lines)))
    (tmp_path / "tasks").mkdir()
    true_bort.main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "| 100 | 7.000 | 25.0 | 2.000 |" in shown
    # 44,100 updates of 8,192 tokens are 352,800 s at 1,024 tokens a second.
    assert "| 44,100 | 361 million | 98 |" in shown


def test_the_true_bort_before_its_first_line_of_training(tmp_path, capsys):
    write_run(tmp_path / "model", [10.0])
    with (tmp_path / "model/metrics.jsonl").open("ab") as file:
        file.write(line_of({"step": 0, "phase": "eval", "kl": 2.0}))
    true_bort.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:] == ["| 0 | 10.000 | 0.0 | 2.000 |", ""]


def test_the_reference_of_python_is_split_into_topics_that_are_held_out_or_not(tmp_path):
    python_reference.main([str(tmp_path)])
    topics = python_reference.read_topics()
    parts = [(tmp_path / f"{part}.txt").read_text() for part in ("train", "test")]
    trained, held_out = (part.strip().split("\n\n") for part in parts)
    assert len(trained) + len(held_out) == len(topics)
    assert len(held_out) == len(topics) // 5
    assert not set(trained) & set(held_out)


def test_sentences_get_a_line_each():
    text = "One sentence.  It\nends here! e.g. this does not.\n\n   Another paragraph\n"
    expected = "One sentence.\nIt ends here! e.g. this does not.\nAnother paragraph"
    assert python_reference.sentences_of(text) == expected


def test_text_is_held_out_and_a_step_whose_result_is_there_is_skipped(project):
    variables = {"TEXT": "text.txt", "TEACHER_STEPS": "7"}
    assert not project.run("teacher", **variables).returncode
    folder = project.folder / "runs/experiments/teacher"
    assert (folder / "test.txt").read_text() == "Text 49.\n\nText 99.\n\n"
    assert "Text 49." not in (folder / "train.txt").read_text()
    assert [call[0] for call in project.calls()] == [
        "scripts/convert_from_huggingface.py",
        "create_pretraining_data.py",
        "create_pretraining_data.py",
        "run_pretraining_distillation.py",
    ]
    (project.folder / "calls").unlink()
    for done in ("../pretrained/all-MiniLM-L6-v2", "train/manifest.json", "test/manifest.json"):
        (folder / done).mkdir(parents=True)
    (folder / "model/step-0000007").mkdir(parents=True)
    assert not project.run("teacher", **variables).returncode
    assert not (project.folder / "calls").exists()


def test_a_run_that_has_come_farther_is_not_taken_for_a_shorter_one(project):
    assert not project.run("quick_start", QUICK_STEPS="200").returncode
    (project.folder / "runs/experiments/quick_start/model/step-0000200").mkdir(parents=True)
    result = project.run("quick_start", QUICK_STEPS="99")
    assert result.returncode == 2
    assert "quick_start/model: has been trained for more than 99 steps" in result.stderr
    assert not project.run("quick_start", QUICK_STEPS="1000").returncode


@pytest.mark.parametrize(
    ("script", "variable", "value"),
    [
        ("teacher", "TEXT", "other.txt"),
        ("distillation", "STEPS", "480"),
        ("distillation", "RATES", "1e-4"),
        ("distillation", "ROWS", "5"),
        ("ose", "TEACHER_STEPS", "9"),
        ("true_bort", "TEACHER_STEPS", "9"),
    ],
)
def test_results_with_other_variables_are_not_mixed(script, variable, value, project):
    given = {"TEXT": "text.txt", "DATA_DIR": "data", "TASKS": "MRPC", "ARMS": ""}
    assert not project.run(script, **given).returncode
    assert not project.run(script, **given).returncode
    result = project.run(script, **{**given, variable: value})
    assert result.returncode == 2
    assert ": was begun with " in result.stderr
    assert f"{variable}=" in result.stderr


def test_a_table_stays_when_the_next_one_fails(project):
    variables = {"DATA_DIR": "data", "TASKS": "MRPC", "METHODS": "plain"}
    done = project.run("agora", **variables)
    table = project.folder / "runs/experiments/agora/MRPC/table.md"
    assert done.stdout.endswith(content := table.read_text())
    assert content
    python = project.folder / ".venv/bin/python"
    python.write_text(PYTHON + "if [[ $1 == *agora_table.py ]]; then echo wrong; exit 1; fi\n")
    assert project.run("agora", **variables).returncode == 1
    assert table.read_text() == content


def test_a_model_of_finetuning_may_have_a_correction_and_a_type(project):
    models = "bert-tiny-corrected-bfloat16 all-MiniLM-L6-v2-float32"
    project.run("finetuning", DATA_DIR="data", TASKS="MRPC", MODELS=models)
    tiny, minilm = (call for call in project.calls() if call[0] == "scripts/sweep.py")
    runs = "runs/experiments/finetuning"
    assert f"{runs}/bert-tiny-corrected-bfloat16" in tiny
    assert tiny[-3:] == ["--dtype", "bfloat16", "--bias_correction"]
    assert minilm[-2:] == ["--dtype", "float32"]


def test_the_deepest_model_of_finetuning_has_a_smaller_rate_on_race(project):
    grid = project.folder / "runs/experiments/finetuning/all-MiniLM-L6-v2-corrected/grid.yaml"
    for task, rate in (("RACE-M", "3e-5"), ("MRPC", "1e-4")):
        chosen = {"TASKS": task, "MODELS": "all-MiniLM-L6-v2-corrected"}
        assert not project.run("finetuning", DATA_DIR="data", **chosen).returncode
        assert grid.read_text() == f"seed: [1,2,3]\nlr: [{rate}]\n"


def test_another_socrates_shares_the_draws_and_the_labeller(project):
    chosen = {"TASKS": "SST-2", "METHODS": "mistakes", "ROWS": "100"}
    others = {"DATA_DIR": "data", "SOCRATES": "paraphrase-MiniLM-L3-v2"}
    assert not project.run("agora", **chosen, **others).returncode
    draws, timaeus, *_, run, _ = (
        call for call in project.calls() if "convert" not in call[0] and "predict" not in call[0]
    )
    assert "runs/experiments/agora/SST-2/sets" in draws
    assert "runs/experiments/agora/SST-2/timaeus" in timaeus
    assert "runs/experiments/agora-paraphrase-MiniLM-L3-v2/SST-2/100/mistakes/draw-4" in run
    assert "runs/experiments/pretrained/paraphrase-MiniLM-L3-v2" in run
    assert "mean" in run


def test_each_task_of_agora_has_a_table(project):
    for task in ("MRPC", "RTE"):
        assert not project.run("agora", DATA_DIR="data", TASKS=task, METHODS="plain").returncode
    tables = (project.folder / "runs/experiments/agora").glob("*/table.md")
    assert sorted(table.parent.name for table in tables) == ["MRPC", "RTE"]


@pytest.mark.parametrize("variable", ["BORT_STEPS", "ROWS"])
def test_a_longer_true_bort_or_more_rows_are_fine_tuned_again(project, variable):
    for value in ("100", "200"):
        variables = {"TEXT": "text.txt", "DATA_DIR": "data", variable: value}
        steps, rows = variables.get("BORT_STEPS", "4000"), variables.get("ROWS", "500")
        assert not project.run("true_bort", **variables).returncode
        folder = project.folder / "runs/experiments/true_bort"
        for seed, task in itertools.product("123", ("SST-2", "MRPC")):
            path = folder / f"tasks/step-{steps}-rows-{rows}/{seed}/{task}"
            path.mkdir(parents=True)
            (path / "metrics.json").touch()
        calls = [call for call in project.calls() if "true_bort" in " ".join(call)]
        runs = [call for call in calls if call[0] == "finetune_classifier.py"]
        assert len(runs) == 12
        assert all(rows in run for run in runs)
        converted = folder / f"huggingface-{steps}"
        new = not converted.exists()
        assert [call[0] for call in calls].count("scripts/convert_to_huggingface.py") == new
        converted.mkdir(exist_ok=True)
        (project.folder / "calls").unlink()


def test_a_text_that_is_not_held_out_to_its_end_is_not_trained_on(project):
    (project.folder / "short.txt").write_text("Text.\n\n" * 49)
    for text, said in (("text.txt,missing.txt", "missing.txt"), ("short.txt", "fewer than 50")):
        for _ in range(2):  # the second time, too
            result = project.run("teacher", TEXT=text)
            assert result.returncode == 2
            assert said in result.stderr
    assert [call[0] for call in project.calls()] == ["scripts/convert_from_huggingface.py"] * 4


def test_weights_are_fetched_once(project):
    done = project.run("fetch_weights")
    assert (done.returncode, done.stdout) == (0, "model/pretrained: in place\n")
    (project.folder / "model/pretrained/bert-tiny").rmdir()
    refused = project.run("fetch_weights")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: model/pretrained: is there, without bert-tiny; remove")
    assert not (project.folder / "calls").exists(), "nothing was downloaded"
