"""The start-up hook of an environment, and programs run with the Python of another checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.scripts.helpers import load, project_in


@pytest.fixture(scope="module")
def others_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of another checkout, set up there, whose code identifies itself."""
    folder = tmp_path_factory.mktemp("other")
    other = load(project_in(folder))
    (folder / "bort/__init__.py").write_text("MARK = 'another checkout'\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", other.VENV], check=True)
    other.write_hook()
    # What `pip install -e` writes, and where the packages of this environment are.
    (other.PACKAGES / "__editable__.bort.pth").write_text(f"{folder}\n")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (other.PACKAGES / "others.pth").write_text("\n".join(packages) + "\n")
    return Path(other.PY)


def answer(python: Path, code: str, folder: Path, *arguments: str) -> str:
    command = [str(python), *arguments, *(["-c", code] if code else [])]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_hook_imports_nothing_of_the_project(others_python: Path, tmp_path: Path) -> None:
    code = (
        "import sys; print([type(f).__module__ for f in sys.meta_path][0], 'bort' in sys.modules)"
    )
    assert answer(others_python, code, tmp_path) == "bort_mxnet_hook False"
    code = "import bort; print(bort.MARK)"
    assert answer(others_python, code, tmp_path) == "another checkout"


def test_a_checkout_runs_its_own_code_with_the_python_of_another(others_python: Path) -> None:
    code = "import bort, sys; print(bort.__file__, [type(f).__module__ for f in sys.meta_path][0])"
    assert answer(others_python, code, ROOT) == f"{ROOT}/bort/__init__.py bort.mxnet_setup"


@pytest.mark.parametrize(
    "program", sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("scripts/*.py"))
)
def test_programs_in_scripts_find_their_own_checkout(program: str) -> None:
    """Only their own folder is on the path: they add the project's before importing bort."""
    text = (ROOT / program).read_text(encoding="utf-8")
    own = re.search(r"^(from|import) (bort|data|scripts)\b", text, re.MULTILINE)
    if own:
        assert "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))" in text[: own.start()]


def test_a_script_runs_its_own_code_with_the_python_of_another(
    others_python: Path, tmp_path: Path
) -> None:
    output = answer(others_python, "", tmp_path, f"{ROOT}/scripts/score.py", "--help")
    assert "usage: score.py" in output
