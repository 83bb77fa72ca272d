"""What the tests of set-up and of the shell scripts share."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from tests.conftest import ROOT

MINOR = sys.version_info[1]


def project_in(folder: Path) -> Path:
    """Copy into `folder` what setup_env.py reads of a project."""
    for name in (
        *("scripts/setup_env.py", "scripts/setup_env.sh", "pyproject.toml"),
        *("requirements-build.txt", "bort/mxnet_setup.py", f"constraints/python3.{MINOR}.txt"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def load(project: Path) -> ModuleType:
    """Import the project's own setup_env.py: its paths are those of that project."""
    spec = importlib.util.spec_from_file_location("setup_env", project / "scripts/setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    path.chmod(0o755)
    return path


def content(folder: Path) -> dict[str, float]:
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}
