"""Who may import whom: base modules and data no subpackage, subpackages only those below them."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SUBPACKAGES = (
    "training",
    "pretraining",
    "finetuning",
    "inference",
    "huggingface",
    "deployment",
    "agora",
    "ose",
)
MAY_IMPORT = {
    "training": set(),
    "pretraining": {"training", "inference"},  # which can run a teacher
    "finetuning": {"training"},
    "inference": set(),
    "huggingface": set(),
    "deployment": {"inference", "huggingface"},
    "agora": {"finetuning"},
    "ose": {"pretraining"},
}
# Two documented names of an earlier layout; they hold nothing but an import.
COMPATIBILITY = {"bort/predict.py", "bort/runtime.py"}


def imported(path: Path) -> set[str]:
    """Return the names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_follow_the_architecture() -> None:
    wrong = []
    for path in sorted([*ROOT.glob("bort/**/*.py"), *ROOT.glob("data/*.py")]):
        name = path.relative_to(ROOT).as_posix()
        package = name.split("/")[1] if name.count("/") == 2 else ""
        allowed = MAY_IMPORT.get(package, set()) | {package}
        for other in imported(path):
            parts = other.split(".")
            target = parts[1] if parts[0] == "bort" and len(parts) > 1 else ""
            outside = target in SUBPACKAGES and target not in allowed
            if parts[0] in ("scripts", "tests") or (outside and name not in COMPATIBILITY):
                wrong.append(f"{name} imports {other}")
            if package == "" and name.startswith("bort/") and parts[0] == "data":
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_every_subpackage_has_its_place_in_the_architecture() -> None:
    folders = {path.parent.name for path in ROOT.glob("bort/*/__init__.py")}
    assert folders == set(SUBPACKAGES) == set(MAY_IMPORT)


@pytest.mark.skipif(sys.version_info < (3, 10), reason="no list of Python's own modules")
def test_programs_import_bort_before_other_packages() -> None:
    """What bort installs makes a Ctrl-C during all later imports one line."""
    programs = [path for place in (ROOT, ROOT / "scripts") for path in place.glob("*.py")]
    for path in programs:
        names = [
            name.partition(".")[0]
            for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in (
                [node.module or ""] if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
        ]  # fmt: skip
        others = [name for name in names if name not in sys.stdlib_module_names]
        assert not others or others[0] in ("bort", "benchmarks"), path
