"""The lists of packages, and that what they install works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def test_versions_that_were_tried() -> None:
    """Each Python has its file; it pins what pyproject.toml pins, and names no registry."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for minor in (9, 10, 11, 12):
        text = (ROOT / f"constraints/python3.{minor}.txt").read_text(encoding="utf-8")
        assert "://" not in text
        pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", text, re.MULTILINE))
        assert {"numpy", "mxnet", "gluonnlp", "onnx", "tiktoken", "pytest"} <= set(pins)
        for name, version in re.findall(r'^ +"([\w-]+)==([\w.]+)",', project, re.MULTILINE):
            if not name.startswith(("nvidia", "mxnet-")):
                assert pins[name.lower()] == version


def test_requirements_files_name_extras_that_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    files = {"requirements.txt": "cu101", "requirements-cpu.txt": "cpu"}
    for name, extra in {**files, "requirements-cu117.txt": "cu117"}.items():
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if line[0] != "#"] == [f"-e .[{extra}]"]
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


@pytest.mark.distributed
def test_horovodrun_here(tmp_path: Path) -> None:
    horovodrun = Path(sys.executable).parent / "horovodrun"
    if not horovodrun.exists():
        pytest.skip("this Python has no horovodrun; scripts/setup_env.sh makes one that has")
    check = subprocess.run(
        [horovodrun, "--check-build"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "[X] MXNet" in check.stdout
    assert "[X] Gloo" in check.stdout
    program = tmp_path / "program.py"
    program.write_text(
        "import mxnet as mx, horovod.mxnet as hvd\n"
        "hvd.init()\n"
        "total = hvd.allreduce(mx.nd.ones(2) * (hvd.rank() + 1), average=False)\n"
        "print('sum', total.asnumpy().tolist(), 'of', hvd.size())\n"
    )
    run = subprocess.run(
        [horovodrun, "-np", "2", "-H", "localhost:2", sys.executable, program],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert run.stdout.count("sum [3.0, 3.0] of 2") == 2


@pytest.mark.slow
def test_the_cuda_set_is_complete() -> None:
    if os.environ.get("BORT_TEST_CUDA_SET") != "1":
        pytest.skip("downloads 2 GB: set BORT_TEST_CUDA_SET=1 to run it")
    run = subprocess.run(
        [ROOT / "scripts/check_cuda_set.sh", sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "OK: requirements-cu117.txt is complete" in run.stdout
