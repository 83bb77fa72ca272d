"""setup_env.sh, download_model.sh, run_tests.sh and .ci/run with stand-ins for their commands."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bort.sums import check_sums
from tests.conftest import ROOT
from tests.scripts.helpers import executable, project_in


class SearchPath:
    """A PATH of stand-ins for Python that print their version and their arguments."""

    def __init__(self, folder: Path) -> None:
        self.project = project_in(folder / "project")
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in ("bash", "env", "dirname"):
            (self.bin / tool).symlink_to(shutil.which(tool))

    def python(self, name: str, minor: int) -> Path:
        script = f"case $1 in -c) echo 3.{minor};; --version) echo Python 3.{minor}.1;;"
        return self.command(name, f'{script} *) echo "{name} runs $*";; esac')

    def command(self, name: str, script: str) -> Path:
        return executable(self.bin / name, script)

    def run(self, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.project / "scripts/setup_env.sh"],
            env={"PATH": str(self.bin), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def chosen(self, **environment: str) -> str:
        run = self.run(**environment)
        assert run.returncode == 0, run.stderr
        name, _, arguments = run.stdout.strip().partition(" runs ")
        assert arguments == "-I -S scripts/setup_env.py"
        return name

    def refusal(self, **environment: str) -> str:
        run = self.run(**environment)
        assert run.returncode == 1
        (line,) = run.stderr.strip().splitlines()
        return line


@pytest.fixture
def pythons(tmp_path: Path) -> SearchPath:
    return SearchPath(tmp_path)


def test_the_newest_python_that_runs(pythons: SearchPath) -> None:
    pythons.command("python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    pythons.python("python3", 13)
    pythons.python("python3.9", 9)
    pythons.python("python", 10)
    assert pythons.chosen() == "python"
    assert pythons.chosen(PYTHON=str(pythons.bin / "python3.9")) == "python3.9"
    (pythons.project / ".venv/bin").mkdir(parents=True)
    pythons.python("../project/.venv/bin/python", 9)
    assert pythons.chosen().endswith(".venv/bin/python"), "a Python that was chosen stays"


def test_a_python_that_does_not_serve(pythons: SearchPath) -> None:
    for path in (str(pythons.python("thirteen", 13)), "/nonexistent"):
        message = (
            f"error: PYTHON={path} does not run as Python 3.9 to 3.12, which MXNet 1.9.1 needs"
        )
        assert pythons.refusal(PYTHON=path) == message
    pythons.python("python3", 13)
    message = pythons.refusal()
    assert "found no Python 3.9 to 3.12, which MXNet 1.9.1 needs (Python 3.13.1)" in message
    assert "apt-get install python3.12" in message
    assert "install uv" in message


def test_uv_brings_a_python(pythons: SearchPath) -> None:
    brought = pythons.python("brought", 12)
    pythons.command("uv", f'[[ "$2" == install ]] || echo "{brought}"')
    assert pythons.chosen() == "brought"


@pytest.mark.parametrize("script", ["setup_env.sh", "download_model.sh"])
def test_an_argument_starts_neither_set_up_nor_a_download(pythons: SearchPath, script: str) -> None:
    shutil.copy(ROOT / "scripts" / script, pythons.project / "scripts")
    before = sorted(pythons.project.rglob("*"))
    run = subprocess.run(
        [pythons.project / "scripts" / script, "--help"],
        env={"PATH": str(pythons.bin)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("usage: ")
    assert sorted(pythons.project.rglob("*")) == before


MODEL = r"\x12\x01\0\0\0\0\0\0more"  # as MXNet's parameter files begin


def offer_model(pythons: SearchPath, content: str) -> None:
    """Let download_model.sh, run in place of setup_env.sh, get this content from curl."""
    shutil.copy(ROOT / "scripts/download_model.sh", pythons.project / "scripts/setup_env.sh")
    tools = ("mkdir", "mktemp", "mv", "rm", "head", "od", "tr", "cut", "grep", "chmod", "sha256sum")
    for tool in tools:
        if not (pythons.bin / tool).exists():
            (pythons.bin / tool).symlink_to(shutil.which(tool))
    pythons.command("aws", "exit 127")
    pythons.command("curl", f"printf '{content}' > \"${{@: -2:1}}\"")


def test_another_model_than_the_first_downloaded_is_refused(pythons: SearchPath) -> None:
    offer_model(pythons, MODEL)
    assert pythons.run().returncode == 0
    model = pythons.project / "model"
    check_sums(str(model))
    (model / "bort.params").unlink()
    assert pythons.run().returncode == 0, "the same one again"
    (model / "bort.params").unlink()
    offer_model(pythons, MODEL.replace("more", "mode"))
    run = pythons.run()
    assert run.returncode == 1
    assert "that of the first download was" in run.stderr
    assert [path.name for path in model.iterdir()] == ["SHA256SUMS"]
    (model / "bort.params").write_bytes(b"\x12\x01\0\0\0\0\0\0mose")
    assert "error: model/bort.params: its SHA-256 is " in pythons.run().stderr


@pytest.mark.parametrize(("content", "status"), [(MODEL, 0), ("<html>", 1)])
def test_download_of_the_model(pythons: SearchPath, content: str, status: int) -> None:
    offer_model(pythons, content)
    run = pythons.run()
    assert run.returncode == status, run.stderr
    model = pythons.project / "model"
    names = ["SHA256SUMS", "bort.params"] if status == 0 else []
    assert sorted(path.name for path in model.iterdir()) == names
    if status:
        assert "run_pretraining_distillation.sh" in run.stderr
        return
    assert "run this again after ./scripts/setup_env.sh" in run.stdout
    (pythons.bin / "curl").unlink()
    pythons.command("../project/.venv/bin/python", "echo python $*")
    assert "python scripts/describe_released.py" in pythons.run().stdout
    (model / "bort.json").touch()
    assert "describe" not in pythons.run().stdout


@pytest.mark.parametrize(("lint", "tests", "status"), [(0, 0, 0), (1, 0, 1), (1, 2, 2), (0, 5, 5)])
def test_run_tests_ends_with_the_worst_status(
    pythons: SearchPath, lint: int, tests: int, status: int
) -> None:
    shutil.copy(ROOT / "scripts/run_tests.sh", pythons.project / "scripts/run_tests.sh")
    for tool in ("ruff", "mypy", "python"):
        code = tests if tool == "python" else lint
        pythons.command(f"../project/.venv/bin/{tool}", f"echo {tool} $*; exit {code}")
    (pythons.project / "scripts/setup_env.sh").write_text("#!/bin/sh\necho set up\n")
    run = subprocess.run(
        [pythons.project / "scripts/run_tests.sh"], capture_output=True, text=True, check=False
    )
    assert run.returncode == status
    assert run.stdout.startswith("set up")
    assert "-m not (slow or distributed or cluster or gpu)\n" in run.stdout
    assert "-m (distributed or cluster) and not slow\n" in run.stdout


@pytest.mark.parametrize(
    ("venv", "status", "said"),
    [
        ("exit 1", 0, "skipped: {python} cannot make an environment"),
        ("printf '#!/bin/sh\\nexit 3' >$3/bin/python; /bin/chmod +x $3/bin/python", 3, ""),
    ],
)
def test_ci_tests_every_other_python_that_makes_an_environment(
    pythons: SearchPath, venv: str, status: int, said: str
) -> None:
    """As often as it is run: Debian's Python without ensurepip leaves a folder behind."""
    ci = executable(pythons.project / ".ci/run", "")
    shutil.copy(ROOT / ".ci/run", ci)
    executable(pythons.project / "scripts/run_tests.sh", "echo tests")
    pythons.python("../project/.venv/bin/python", 12)
    making = f"/bin/mkdir -p $3/bin; {venv}"
    python = pythons.command("python3.9", f"case $1 in -c) echo 3.9;; *) {making};; esac")
    (pythons.bin / "rm").symlink_to(shutil.which("rm"))
    for _ in range(2):
        run = subprocess.run(
            [ci],
            env={"PATH": str(pythons.bin), "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (run.returncode, run.stderr) == (status, "")
        first, *others = filter(None, run.stdout.splitlines())
        assert first == "tests"
        assert others == [
            "== quick and integration tests on Python 3.9",
            *filter(None, [said.format(python=python)]),
            "== quick and integration tests on Python 3.10",
            "skipped: this machine has no Python 3.10",
            "== quick and integration tests on Python 3.11",
            "skipped: this machine has no Python 3.11",
        ]


@pytest.mark.parametrize(("chosen", "seen"), [({}, "1"), ({"CUDA_VISIBLE_DEVICES": "4,6"}, "6")])
def test_gpu_check_tests_the_gpu_that_it_measures(
    pythons: SearchPath, chosen: dict[str, str], seen: str
) -> None:
    shutil.copy(ROOT / "scripts/gpu_check.sh", pythons.project / "scripts/gpu_check.sh")
    python = 'echo "sees $CUDA_VISIBLE_DEVICES: $*"'
    pythons.command("../project/.venv/bin/python", python)
    (pythons.project / "scripts/setup_env.sh").write_text("#!/bin/sh\n")
    command = [pythons.project / "scripts/gpu_check.sh", "1", "60"]
    run = subprocess.run(
        command,
        env={"PATH": str(pythons.bin), **chosen},
        capture_output=True,
        text=True,
        check=True,
    )
    _, tests, _, benchmark = run.stdout.splitlines()
    assert tests == f"sees {seen}: -m pytest -m gpu -rs tests"
    assert benchmark == f"sees {seen}: scripts/benchmark.py gpu --gpus 0 --peak_tflops 60"
