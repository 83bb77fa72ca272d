"""The experiments' scripts, with a stand-in for Python that says what it was called with."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_readme import parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts/experiments"
NOT_EXPERIMENTS = ("common", "fetch_weights")
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.sh") if p.stem not in NOT_EXPERIMENTS)
VARIABLES = ("DATA_DIR", "TEXT")
PYTHON = """#!/usr/bin/env bash
printf '%s\\x1f' "$@" >>calls
printf '\\x1e' >>calls
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

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
        return subprocess.run(
            ["bash", f"scripts/experiments/{script}.sh"],
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
def test_a_missing_variable_is_named_before_anything_starts(script, project):
    result = project.run(script)
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert any(error.startswith(f"error: {name} is not set; set it to") for name in VARIABLES)
    assert not (project.folder / "calls").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_of_an_experiment_has_flags_that_exist(script, project, capsys):
    result = project.run(script, TEXT="text.txt", DATA_DIR="data")
    assert result.returncode == 0, result.stderr
    calls = project.calls()
    assert calls
    for program, *arguments in calls:
        try:
            parse(program, arguments)
        except SystemExit:
            pytest.fail(f"{program} {arguments}: {capsys.readouterr().err}")


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
