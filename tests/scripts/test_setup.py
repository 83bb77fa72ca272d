"""scripts/setup_env.py function by function, and the scripts around it with few subprocesses."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT

MINOR = sys.version_info[1]


def project_in(folder: Path) -> Path:
    """Lay out in `folder` what setup_env.py reads of a project."""
    for name in (
        *("scripts/setup_env.py", "scripts/setup_env.sh", "pyproject.toml"),
        *("requirements-build.txt", "bort/mxnet_setup.py"),
        *(str(path.relative_to(ROOT)) for path in ROOT.glob("constraints/*.txt")),
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


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module for an empty project on a machine with compilers and without a GPU."""
    for name in ("BORT_MXNET", "PYTHON", "CXX", "CC", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    module = load(project_in(tmp_path / "project"))
    which = shutil.which
    hidden = ("nvidia-smi", "nvcc", "uv")
    monkeypatch.setattr(
        module.shutil, "which", lambda name: None if name in hidden else which(name)
    )
    return module


class Machine:
    """Takes the place of every command that installs, compiles or loads; notes each by its step."""

    def __init__(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = module
        self.steps: list[str] = []
        self.settings: dict[str, str] = {}
        self.fails_at = "no step"
        self.cmake = "cmake version 3.25.1"
        self.broken: set[str] = set()  # pieces of the code that a Python is given
        monkeypatch.setattr(module, "step", self.step)
        monkeypatch.setattr(module, "run", self.run)
        monkeypatch.setattr(module, "check_compiler", lambda: None)

    def step(self, what: str, *commands: list[str], **settings: str) -> None:
        text = " ".join(commands[0])
        self.steps.append(text)
        if self.fails_at in text.replace(str(self.module.ROOT), ""):
            self.module.die(f"this failed: {what}")
        packages = self.module.PACKAGES
        if " -m venv" in text:
            packages.mkdir(parents=True)
        elif " pip wheel " in text:
            self.settings = settings
            folder = Path(text.partition("--wheel-dir ")[2].split()[0])
            (folder / f"horovod-0.28.1-cp3{MINOR}-cp3{MINOR}-linux_x86_64.whl").touch()
        elif "--target" in text:
            Path(text.partition("--target ")[2].split()[0], "nvidia/cu13/lib").mkdir(parents=True)
        elif " -e " in text:
            (packages / "mxnet.dist-info").mkdir(exist_ok=True)
            (packages / "mxnet.dist-info/RECORD").touch()
            if "cu117" in text:
                (packages / "nvidia/nccl").mkdir(parents=True)
        elif text.endswith(".whl"):
            (packages / "horovod").mkdir(exist_ok=True)

    def run(self, *command: str) -> subprocess.CompletedProcess:
        text = " ".join(command).replace(str(self.module.ROOT), "")
        there = self.module.PACKAGES
        good = not any(piece in text for piece in self.broken)
        if "find_spec" in text:
            good &= (there / "horovod").is_dir()
        elif "import mxnet" in text:
            good &= (there / "mxnet.dist-info").is_dir()
            good &= "horovod" not in text or (there / "horovod").is_dir()
        output = self.cmake if command[0] == "cmake" else ""
        return subprocess.CompletedProcess(command, int(not good), output, "" if good else text)

    def set_up(self, **environment: str) -> None:
        self.steps.clear()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            self.module.main()

    def have(self, piece: str) -> bool:
        return any(piece in step for step in self.steps)


@pytest.fixture
def machine(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(setup, monkeypatch)


def refused(call: Any, *arguments: Any) -> str:
    """Return the one line that a call ends with."""
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    message = str(ended.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


# ---- from nothing to complete ------------------------------------------------------------------


def test_from_nothing_then_nothing(machine: Machine, capsys: Any) -> None:
    machine.set_up()
    making, tools, packages, wheel, horovod = machine.steps
    assert " -m venv " in making
    tried = f"-c {machine.module.ROOT}/constraints/python3.{MINOR}.txt"
    assert tools.endswith(f"requirements-build.txt {tried}")
    assert f"--no-build-isolation -e {machine.module.ROOT}[cpu,dev] {tried}" in packages
    assert wheel.endswith("horovod==0.28.1")
    assert machine.settings["HOROVOD_WITH_GLOO"] == "1"
    assert "HOROVOD_GPU_OPERATIONS" not in machine.settings
    assert horovod.endswith(".whl")
    machine.set_up()
    assert machine.steps == []
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"setup: ready: .venv, Python 3.{MINOR}, MXNet for cpu"


@pytest.mark.parametrize("fails_at", ["-m venv", "requirements-build", "-e ", "pip wheel"])
def test_an_interrupted_set_up_is_repaired(machine: Machine, fails_at: str) -> None:
    machine.fails_at = fails_at
    assert "this failed" in refused(machine.set_up)
    machine.fails_at = "no step"
    machine.set_up()
    assert machine.have("-m venv") == (fails_at == "-m venv")
    machine.set_up()
    assert machine.steps == []


def test_a_half_installed_package_is_installed_again(machine: Machine) -> None:
    machine.set_up()
    info = machine.module.PACKAGES / "mxnet.dist-info"
    (info / "RECORD").unlink()
    (machine.module.PACKAGES / "horovod").rmdir()
    machine.set_up()
    assert (info / "RECORD").exists()
    assert machine.have(".whl")
    assert not machine.have("pip wheel"), "the wheel was kept"


def test_a_damaged_environment_is_made_again_once(machine: Machine, capsys: Any) -> None:
    machine.set_up()
    (machine.module.VENV / "complete").unlink()
    machine.broken = {"-c import mxnet, gluonnlp"}
    assert "MXNet does not load" in refused(machine.set_up)
    assert "making a new .venv" in capsys.readouterr().out
    assert sum("-m venv" in step for step in machine.steps) == 1


def test_a_moved_checkout_gets_a_new_environment(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.set_up(BORT_MXNET="cpu")
    project = machine.module.ROOT.rename(tmp_path / "elsewhere")
    moved = Machine(load(project), monkeypatch)
    moved.set_up()
    assert moved.have("-m venv")
    assert moved.have("pip wheel"), "the old wheel is linked to the old path"
    assert (project / ".venv/mxnet-choice").read_text() == "cpu\n"


def test_what_changes_asks_for_work(machine: Machine) -> None:
    machine.set_up()
    file = machine.module.ROOT / f"constraints/python3.{MINOR}.txt"
    file.write_text(f"{file.read_text()}# changed\n")
    machine.set_up()
    assert machine.have("-e ")
    assert not machine.have("-m venv")


def test_a_choice_is_remembered_and_wheels_are_kept(machine: Machine) -> None:
    machine.set_up(BORT_MXNET="cpu")
    machine.set_up(BORT_MXNET="cu117")
    assert machine.have("[cu117,dev]")
    assert machine.have("-m venv")
    assert machine.have("pip wheel")
    machine.set_up()
    assert machine.steps == []
    machine.set_up(BORT_MXNET="auto")
    assert machine.have("[cpu,dev]")
    assert not machine.have("pip wheel")
    assert not (machine.module.VENV / "mxnet-choice").exists()
    assert "BORT_MXNET=cu118 is not one of cpu" in refused(
        lambda: machine.set_up(BORT_MXNET="cu118")
    )


def test_the_container_keeps_its_mxnet(machine: Machine) -> None:
    machine.broken = {"horovod"}
    message = refused(lambda: machine.set_up(BORT_MXNET="system"))
    assert "this Python brings no Horovod for MXNet; use nvcr.io/nvidia/mxnet" in message
    assert machine.have("--system-site-packages")
    assert machine.steps[-1].endswith("[dev]")


def test_uv_installs_where_it_is_there(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[list[str]]] = []
    monkeypatch.setattr(setup, "step", lambda what, *commands: calls.append(list(commands)))
    setup.install("a package", "tqdm")
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/bin/{name}")
    setup.install("a package", "tqdm")
    pip = [setup.PY, "-m", "pip", "install", "tqdm"]
    uv = ["/bin/uv", "pip", "install", "--python", setup.PY, "tqdm"]
    assert calls == [[pip], [uv, pip]]


def test_a_step_shows_the_end_of_its_log(setup: ModuleType, capsys: Any) -> None:
    setup.VENV.mkdir()
    setup.step("the first that works", ["false"], ["sh", "-c", "echo $SETTING"], SETTING="is set")
    assert "is set" in setup.LOG.read_text()
    message = refused(setup.step, "that one", ["sh", "-c", "seq 50; echo cause >&2; exit 3"])
    assert message == f"error: this failed: that one. The whole output is in {setup.LOG}"
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1] == "cause"
    assert len(shown) == 25


def test_one_set_up_at_a_time(setup: ModuleType, capsys: Any) -> None:
    entered: list[float] = []

    def second() -> None:
        with setup.lock():
            entered.append(time.monotonic())

    with setup.lock():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        left = time.monotonic()
    thread.join(10)
    assert len(entered) == 1
    assert entered[0] > left
    assert "another set-up is at work here" in capsys.readouterr().out


# ---- environments that are not ours ------------------------------------------------------------


def environment(folder: Path, *, complete: bool) -> Path:
    """Make an environment by hand whose Python loads everything, or fails as a bare one does."""
    python = folder / "bin/python"
    python.parent.mkdir(parents=True)
    error = "echo \"ModuleNotFoundError: No module named 'mxnet'\" >&2; exit 1"
    python.write_text(f"#!/bin/sh\n{'exit 0' if complete else error}\n")
    python.chmod(0o755)
    (folder / "mine").write_text("not to be lost")
    return folder


def content(folder: Path) -> dict[str, float]:
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("link", [True, False])
def test_an_environment_of_another_is_left_alone(
    setup: ModuleType, tmp_path: Path, link: bool, capsys: Any
) -> None:
    target = environment(tmp_path / "other" if link else setup.VENV, complete=False)
    if link:
        setup.VENV.symlink_to(target)
    before = content(target)
    message = refused(setup.main)
    assert (
        "cannot be used for this project: ModuleNotFoundError: No module named 'mxnet'" in message
    )
    assert (f"a symbolic link to {target}" in message) == link
    assert "remove the link or folder .venv" in message
    assert content(target) == before

    (target / "bin/python").write_text("#!/bin/sh\nexit 0\n")
    before = content(target)
    setup.main()
    assert capsys.readouterr().out == "setup: ready: .venv, used as it is\n"
    assert content(target) == before
    assert setup.VENV.is_symlink() == link


def test_a_link_that_leads_nowhere_and_a_file(setup: ModuleType, tmp_path: Path) -> None:
    setup.VENV.symlink_to(tmp_path / "gone")
    assert "a symbolic link to" in refused(setup.main)
    assert not (tmp_path / "gone").exists()
    setup.VENV.unlink()
    setup.VENV.write_text("notes")
    assert "not an environment that this script made" in refused(setup.main)
    assert setup.VENV.read_text() == "notes"


def test_a_link_to_an_environment_of_this_script(machine: Machine, tmp_path: Path) -> None:
    machine.set_up()
    target = machine.module.VENV.rename(tmp_path / "scratch")
    machine.module.VENV.symlink_to(target)
    (target / "made-for").write_text("another checkout cpu\n")
    before = content(target)
    machine.set_up(BORT_MXNET="cu117")
    assert machine.steps == []
    assert content(target) == before


def test_an_empty_folder_is_filled(machine: Machine) -> None:
    machine.module.VENV.mkdir()
    machine.set_up()
    assert machine.have("-m venv")


def test_what_a_link_inside_points_to_stays(machine: Machine, tmp_path: Path) -> None:
    machine.set_up()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").touch()
    (machine.module.VENV / "data").symlink_to(tmp_path / "data")
    (machine.module.VENV / "wheels/kept").touch()
    machine.module.clear()
    assert (tmp_path / "data/file").exists()
    assert sorted(os.listdir(machine.module.VENV)) == ["setup.lock", "wheels"]


# ---- the machine -------------------------------------------------------------------------------


def give_gpus(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, *listing: str, driver: bool = True
) -> None:
    """Let nvidia-smi list these GPUs, as "<name>, <compute capability>"."""

    def run(*command: str) -> subprocess.CompletedProcess:
        known = command[0] == "nvidia-smi" and driver
        return subprocess.CompletedProcess(command, 0 if known else 9, "\n".join(listing), "")

    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(setup, "run", run)


@pytest.mark.parametrize(
    "gpus",
    [
        ["Tesla V100-SXM2-16GB, 7.0"],
        ["NVIDIA L4, 8.9", "NVIDIA L4, 8.9"],
        ["Field compute_cap is not a valid field to query."],
        ["NVIDIA L4, 8.9", "NVIDIA H200, 9.0"],
    ],
)
def test_a_gpu_takes_cuda_from_pip(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, gpus: list[str]
) -> None:
    give_gpus(setup, monkeypatch, *gpus)
    assert setup.mxnet_variant("auto") == "cu117"
    expected = ["NVIDIA H200 (compute capability 9.0)"] if len(set(gpus)) == 2 else []
    assert setup.unserved(setup.gpus()) == expected


@pytest.mark.parametrize("gpu", ["NVIDIA H200, 9.0", "NVIDIA B200, 10.0", "Tesla K80, 3.7"])
def test_a_gpu_that_no_build_serves(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, gpu: str
) -> None:
    give_gpus(setup, monkeypatch, gpu, gpu)
    message = refused(setup.mxnet_variant, "auto")
    name, capability = gpu.split(", ")
    assert message.count(f"{name} (compute capability {capability})") == 1
    assert "nvcr.io/nvidia/mxnet:24.06-py3" in message
    assert "BORT_MXNET=cpu" in message
    assert setup.mxnet_variant("cpu") == "cpu"


def test_nvidia_smi_without_driver(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    give_gpus(setup, monkeypatch, driver=False)
    assert setup.mxnet_variant("auto") == "cpu"
    assert "no working driver" in capsys.readouterr().out


def test_a_gpu_without_code_is_warned_of(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(machine.module, "gpus", lambda: [("NVIDIA H200", "9.0")])
    machine.set_up(BORT_MXNET="cu117")
    assert "warning: mxnet-cu117 has no code for NVIDIA H200" in capsys.readouterr().out


def test_a_cuda_mxnet_without_driver(machine: Machine) -> None:
    machine.broken = {"libcuda"}
    message = refused(lambda: machine.set_up(BORT_MXNET="cu117"))
    assert "needs libcuda.so.1, which comes with the NVIDIA driver" in message
    assert machine.steps == []


def test_horovod_without_nvcc_warns_that_gradients_go_through_the_host(
    machine: Machine, capsys: Any
) -> None:
    machine.set_up(BORT_MXNET="cu117")
    warning = "compiled without NCCL: gradients of several GPUs go through the host"
    assert warning in capsys.readouterr().out
    assert machine.have("nvidia-cuda-nvcc==13.0.88")
    assert "HOROVOD_GPU_OPERATIONS" not in machine.settings
    assert machine.settings["PATH"].split(":")[1].endswith("nvidia/cu13/bin")
    machine.set_up(BORT_MXNET="cpu")
    assert "warning" not in capsys.readouterr().out


def test_horovod_with_nccl_where_there_is_nvcc(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    gpus = [("A100", "8.0"), ("V100", "7.0"), ("A100", "8.0"), ("old driver", "")]
    monkeypatch.setattr(machine.module, "gpus", lambda: gpus)
    monkeypatch.setattr(machine.module, "nvcc_folder", lambda: "/toolkit/bin")
    machine.set_up(BORT_MXNET="cu117")
    assert machine.settings["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert machine.settings["HOROVOD_BUILD_CUDA_CC_LIST"] == "70,80"
    assert machine.settings["HOROVOD_NCCL_HOME"] == str(machine.module.VENV / "nccl")
    assert os.readlink(machine.module.VENV / "nccl/lib/libnccl.so") == "libnccl.so.2"
    assert machine.settings["PATH"].split(":")[1] == "/toolkit/bin"
    assert "warning" not in capsys.readouterr().out


def test_nvcc_behind_a_script(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert setup.nvcc_folder() == ""
    script = tmp_path / "nvcc"
    script.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/toolkit/bin/..' >&2\n")
    for path in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / "toolkit" / path).parent.mkdir(parents=True)
        (tmp_path / "toolkit" / path).touch()
    for path in (script, tmp_path / "toolkit/bin/nvcc"):
        path.chmod(0o755)
    monkeypatch.setattr(setup.shutil, "which", lambda name: str(script))
    assert setup.nvcc_folder() == f"{tmp_path}/toolkit/bin/../bin"


@pytest.mark.parametrize(
    ("missing", "package"),
    [("ensurepip", f"apt-get install python3.{MINOR}-venv"), ("Python.h", f"python3.{MINOR}-dev")],
)
def test_parts_of_python_are_missing(machine: Machine, missing: str, package: str) -> None:
    machine.broken = {missing}
    assert package in refused(machine.set_up)


def test_no_compiler(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true -O2")
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/bin/{name}")
    setup.check_compiler()
    monkeypatch.setenv("CXX", "false")
    assert "cannot compile one line of C++17" in refused(setup.check_compiler)
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert "apt-get install build-essential" in refused(setup.check_compiler)


@pytest.mark.parametrize("cmake", ["", "cmake version 3.5.1", "cmake version 4.1.0"])
def test_cmake_from_pip(machine: Machine, cmake: str) -> None:
    machine.cmake = cmake
    machine.set_up()
    assert machine.have("cmake>=3.13,<4")


# ---- setup_env.sh: which Python ----------------------------------------------------------------


class SearchPath:
    """A PATH of stand-ins for Python that tell their version and what they are started with."""

    def __init__(self, folder: Path) -> None:
        self.project = project_in(folder / "project")
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in ("bash", "env", "sort", "dirname", "cat"):
            (self.bin / tool).symlink_to(shutil.which(tool))

    def python(self, name: str, minor: int) -> Path:
        return self.command(name, f'[[ $1 == -c ]] && echo {minor} || echo "{name} runs $*"')

    def command(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        path.chmod(0o755)
        return path

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
    message = "error: PYTHON={} is Python 3.13; MXNet 1.9.1 needs 3.9 to 3.12"
    thirteen = str(pythons.python("thirteen", 13))
    assert pythons.refusal(PYTHON=thirteen) == message.format(thirteen)
    assert "does not run as Python 3" in pythons.refusal(PYTHON="/nonexistent")
    assert "found no Python 3.9 to 3.12." in pythons.refusal()
    pythons.python("python3", 13)
    message = pythons.refusal()
    assert f"only 3.13 ({pythons.bin}/python3)" in message
    assert "install uv" in message


def test_uv_brings_a_python(pythons: SearchPath) -> None:
    brought = pythons.python("brought", 12)
    pythons.command("uv", f'[[ "$2" == install ]] || echo "{brought}"')
    assert pythons.chosen() == "brought"


# ---- the start-up hook -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of another checkout, set up there, whose code says so."""
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
    """Their folder is first on the path, not the project's: they say so before importing bort."""
    text = (ROOT / program).read_text(encoding="utf-8")
    own = re.search(r"^(from|import) (bort|data|scripts)\b", text, re.MULTILINE)
    if own:
        assert "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))" in text[: own.start()]


def test_a_script_runs_its_own_code_with_the_python_of_another(
    others_python: Path, tmp_path: Path
) -> None:
    output = answer(others_python, "", tmp_path, f"{ROOT}/scripts/score.py", "--help")
    assert "usage: score.py" in output


def test_the_hook_is_written_once_and_replaces_the_old_one(setup: ModuleType) -> None:
    setup.PACKAGES.mkdir(parents=True)
    (setup.PACKAGES / "bort.pth").write_text("import bort\n")
    setup.write_hook()
    before = content(setup.PACKAGES)
    assert [Path(name).name for name in before] == ["bort_mxnet_hook.pth", "bort_mxnet_hook.py"]
    setup.write_hook()
    assert content(setup.PACKAGES) == before
    hook = setup.PACKAGES / "bort_mxnet_hook.py"
    assert hook.read_bytes() == (ROOT / "bort/mxnet_setup.py").read_bytes()


# ---- the package -------------------------------------------------------------------------------


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


# ---- other scripts -----------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "status"), [(r"\x12\x01\0\0\0\0\0\0more", 0), ("<html>", 1)])
def test_download_of_the_model(pythons: SearchPath, content: str, status: int) -> None:
    shutil.copy(ROOT / "scripts/download_model.sh", pythons.project / "scripts/setup_env.sh")
    for tool in ("mkdir", "mktemp", "mv", "rm", "head", "od", "tr", "cut", "grep", "chmod"):
        (pythons.bin / tool).symlink_to(shutil.which(tool))
    pythons.command("aws", "exit 127")
    pythons.command("curl", f"printf '{content}' > \"${{@: -2:1}}\"")
    run = pythons.run()
    assert run.returncode == status, run.stderr
    model = pythons.project / "model"
    assert [path.name for path in model.iterdir()] == (["bort.params"] if status == 0 else [])
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
    assert "-m distributed and not slow\n" in run.stdout
    imports_distributed = tests == 0  # the command that stands for Python ends with `tests`
    assert ("-m cluster and not slow\n" in run.stdout) == imports_distributed


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
