"""scripts/setup_env.py, with stand-ins for the commands that install, compile and load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts.helpers import MINOR, content, executable, load, project_in


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module for an empty project, on a machine with only make and a C compiler."""
    for name in ("BORT_MXNET", "PYTHON", "CXX", "CC", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    for tool in ("make", "gcc", "g++", "sh", "bash", "seq", "cat", "false"):
        executable(tmp_path / "bin" / tool, f'exec {shutil.which(tool) or "true"} "$@"')
    executable(tmp_path / "bin/g++", "cat > /dev/null")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    return load(project_in(tmp_path / "project"))


class Machine:
    """Replaces the commands that install, compile or load, and notes the command of each step."""

    def __init__(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = module
        self.steps: list[str] = []
        self.settings: dict[str, str] = {}
        self.fails_at = "no step"
        monkeypatch.setattr(module, "step", self.step)
        monkeypatch.setattr(module, "problem_of", self.problem_of)
        monkeypatch.setattr(module, "driver_library", lambda: "/driver/libcuda.so.1")

    def step(self, what: str, *commands: list[str], **settings: str) -> None:
        text = " ".join(commands[0])
        self.steps.append(text)
        if self.fails_at in text.replace(str(self.module.ROOT), ""):
            self.module.die(f"this failed: {what}")
        packages = self.module.PACKAGES
        if " -m venv" in text:
            packages.mkdir(parents=True)
        elif "--target" in text:
            Path(text.partition("--target ")[2].split()[0], "nvidia/cu13/lib").mkdir(parents=True)
        elif " -e " in text:
            (packages / "mxnet").mkdir(exist_ok=True)
            if "cu117" in text:
                (packages / "nvidia/nccl/lib").mkdir(parents=True)
                (packages / "nvidia/nccl/lib/libnccl.so.2").touch()
        elif "horovod==" in text:
            self.settings = settings
            (packages / "horovod").mkdir()

    def problem_of(self, code: str, *_: str) -> str:
        there = [name for name in ("mxnet", "horovod") if (self.module.PACKAGES / name).is_dir()]
        return next((f"no {n}" for n in ("mxnet", "horovod") if n in code and n not in there), "")

    def set_up(self, **environment: str) -> None:
        self.steps.clear()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            self.module.main()

    def ran(self, piece: str) -> bool:
        return any(piece in step for step in self.steps)


@pytest.fixture
def machine(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(setup, monkeypatch)


def refused(call: Callable[..., None], *arguments: str, **environment: str) -> str:
    """Return the one line that a call ends with."""
    with pytest.raises(SystemExit) as ended:
        call(*arguments, **environment)
    message = str(ended.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


# ---- set-up, step by step ----------------------------------------------------------------------


def test_a_fresh_checkout_is_set_up_once(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.set_up()
    making, tools, packages, horovod = machine.steps
    assert " -m venv " in making
    tried = f"-c {machine.module.ROOT}/constraints/python3.{MINOR}.txt"
    assert tools.endswith(f"requirements-build.txt {tried}")
    assert f"--no-build-isolation -e {machine.module.ROOT}[cpu,dev] {tried}" in packages
    assert horovod.endswith("horovod==0.28.1")
    assert machine.settings["HOROVOD_WITH_GLOO"] == "1"
    assert "HOROVOD_GPU_OPERATIONS" not in machine.settings
    assert (machine.module.PACKAGES / "bort_mxnet_hook.pth").exists()
    machine.set_up()
    assert machine.steps == []
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"setup: ready: .venv, Python 3.{MINOR}, MXNet for cpu"


@pytest.mark.parametrize("fails_at", ["-m venv", "requirements-build", "-e ", "horovod=="])
def test_the_next_call_completes_an_interrupted_set_up(machine: Machine, fails_at: str) -> None:
    machine.fails_at = fails_at
    assert "this failed" in refused(machine.set_up)
    machine.fails_at = "no step"
    machine.set_up()
    assert machine.ran("horovod==")
    machine.set_up()
    assert machine.steps == []


@pytest.mark.parametrize("package", ["mxnet", "horovod"])
def test_a_damaged_environment_is_replaced(machine: Machine, package: str, tmp_path: Path) -> None:
    """The compiled wheels stay, and so does what a link in the environment points to."""
    machine.set_up()
    venv = machine.module.VENV
    (venv / "wheels").mkdir()
    (venv / "wheels/kept").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").touch()
    (venv / "data").symlink_to(tmp_path / "data")
    (machine.module.PACKAGES / package).rmdir()
    machine.set_up()
    assert machine.ran("-m venv")
    assert (venv / "wheels/kept").exists()
    assert (tmp_path / "data/file").exists()
    assert not (venv / "data").is_symlink()


def test_what_does_not_load_is_reported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.module, "problem_of", lambda *_: "OSError: libgomp.so.1")
    message = refused(machine.set_up)
    assert "MXNet for cpu does not load: OSError: libgomp.so.1" in message
    monkeypatch.setattr(
        machine.module, "problem_of", lambda code: "no Gloo" if "horovod" in code else ""
    )
    assert "Horovod does not load: no Gloo" in refused(machine.set_up)


def test_a_moved_checkout_gets_a_new_environment(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.set_up(BORT_MXNET="cpu")
    machine.module.ROOT.rename(tmp_path / "elsewhere")
    moved = Machine(load(tmp_path / "elsewhere"), monkeypatch)
    before = machine.steps[-1]
    moved.set_up()
    assert moved.ran("-m venv")
    cache, other_cache = (step.partition("--cache-dir ")[2] for step in (before, moved.steps[-1]))
    assert Path(cache.split()[0]).name != Path(other_cache.split()[0]).name, (
        "linked to another path"
    )


def test_an_environment_can_replace_itself(tmp_path: Path) -> None:
    project_in(tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(os.path.realpath(sys.executable))
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'scripts')!r}); import setup_env as s;"
    code += "s.step = lambda what, command: print(command[0]); s.make_environment('cpu')"
    ended = subprocess.run(
        [python, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert not python.exists()
    assert Path(ended.stdout.strip()).exists()


@pytest.mark.parametrize("name", [f"constraints/python3.{MINOR}.txt", "bort/mxnet_setup.py"])
def test_a_changed_file_brings_the_environment_up_to_date(machine: Machine, name: str) -> None:
    machine.set_up()
    file = machine.module.ROOT / name
    file.write_text(f"{file.read_text()}# changed\n")
    machine.set_up()
    assert machine.ran("-e ")
    assert not machine.ran("-m venv"), "packages that the user installed stay"
    hook = machine.module.PACKAGES / "bort_mxnet_hook.py"
    assert hook.read_text() == (machine.module.ROOT / "bort/mxnet_setup.py").read_text()


def test_the_choice_of_mxnet_is_remembered(machine: Machine) -> None:
    machine.set_up(BORT_MXNET="cu117")
    assert machine.ran("[cu117,dev]")
    machine.set_up()
    assert machine.steps == []
    machine.set_up(BORT_MXNET="auto")
    assert machine.ran("-m venv")
    assert machine.ran("[cpu,dev]")
    machine.set_up()
    assert machine.steps == []
    message = refused(machine.set_up, BORT_MXNET="cu118")
    assert "BORT_MXNET=cu118 is not one of cpu, cu117, cu101, system, auto" in message


def test_the_container_keeps_its_mxnet(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        machine.module, "problem_of", lambda code: "none" if "horovod" in code else ""
    )
    message = refused(machine.set_up, BORT_MXNET="system")
    assert "this Python brings no Horovod for MXNet; use nvcr.io/nvidia/mxnet" in message
    assert machine.ran("--system-site-packages")
    assert machine.steps[-1].endswith("[dev]")


def test_uv_installs_where_it_is_there(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[list[list[str]]] = []
    monkeypatch.setattr(setup, "step", lambda what, *commands: calls.append(list(commands)))
    setup.install("a package", "tqdm")
    uv = str(executable(tmp_path / "bin/uv", "exit 0"))
    setup.install("a package", "tqdm")
    with_pip = [setup.PY, "-m", "pip", "install", "tqdm"]
    with_uv = [uv, "pip", "install", "--python", setup.PY, "tqdm"]
    assert calls == [[with_pip], [with_uv, with_pip]]


def test_a_step_shows_the_end_of_its_log(setup: ModuleType, capsys: pytest.CaptureFixture) -> None:
    setup.VENV.mkdir()
    setup.step("the first that works", ["false"], ["sh", "-c", "echo $SETTING"], SETTING="is set")
    assert "is set" in setup.LOG.read_text()
    message = refused(setup.step, "that one", ["sh", "-c", "seq 50; echo cause >&2; exit 3"])
    assert message == f"error: this failed: that one. The whole output is in {setup.LOG}"
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1] == "cause"
    assert len(shown) == 25


def test_one_set_up_at_a_time(setup: ModuleType, capsys: pytest.CaptureFixture) -> None:
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


# ---- environments that this script did not make ------------------------------------------------


@pytest.mark.parametrize("link", [True, False])
def test_another_environment_is_used_or_refused_but_never_changed(
    setup: ModuleType, tmp_path: Path, link: bool, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "other" if link else setup.VENV
    python = executable(target / "bin/python", "echo 'No module named mxnet' >&2; exit 1")
    if link:
        setup.VENV.symlink_to(target)
    before = content(target)
    message = refused(setup.main)
    assert "cannot be used for this project: No module named mxnet" in message
    assert (f"a symbolic link to {target}" in message) == link
    assert "remove the link or folder .venv" in message
    assert content(target) == before

    executable(python, "[[ $* == *'import mxnet, gluonnlp, horovod'* && $* == *tokenizers* ]]")
    before = content(target)
    setup.main()
    assert capsys.readouterr().out == "setup: ready: .venv, used as it is\n"
    assert content(target) == before
    assert setup.VENV.is_symlink() == link


def test_a_dangling_link_and_a_file_are_refused(setup: ModuleType, tmp_path: Path) -> None:
    setup.VENV.symlink_to(tmp_path / "missing")
    assert "a symbolic link to" in refused(setup.main)
    assert not (tmp_path / "missing").exists()
    setup.VENV.unlink()
    setup.VENV.write_text("notes")
    assert "not an environment that this script made" in refused(setup.main)
    assert setup.VENV.read_text() == "notes"


def test_a_link_to_an_environment_of_this_script(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    machine.set_up()
    target = machine.module.VENV.rename(tmp_path / "scratch")
    machine.module.VENV.symlink_to(target)
    before = content(target)
    machine.set_up(BORT_MXNET="cu117")
    assert machine.steps == []
    assert content(target) == before
    assert "BORT_MXNET=cu117 is ignored" in capsys.readouterr().out


def test_arguments_are_refused(tmp_path: Path) -> None:
    program = project_in(tmp_path / "project") / "scripts/setup_env.py"
    command = [sys.executable, "-I", "-S", str(program), "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: --help: set-up takes no arguments")


def test_an_empty_folder_is_filled(machine: Machine) -> None:
    machine.module.VENV.mkdir()
    machine.set_up()
    assert machine.ran("-m venv")


# ---- the machine -------------------------------------------------------------------------------


def give_gpus(folder: Path, *listing: str) -> None:
    """Let nvidia-smi list these GPUs, as "<name>, <compute capability>"."""
    executable(folder / "bin/nvidia-smi", f"printf '%s\\n' '{chr(10).join(listing)}'")


@pytest.mark.parametrize(
    ("gpus", "warnings"),
    [
        (["Tesla V100-SXM2-16GB, 7.0"], 0),
        (["NVIDIA L4, 8.9", "NVIDIA L4, 8.9"], 0),
        (["Field compute_cap is not a valid field to query."], 0),
        (["NVIDIA L4, 8.9", "NVIDIA H200, 9.0"], 1),
    ],
)
def test_a_gpu_takes_cuda_from_pip(
    setup: ModuleType,
    tmp_path: Path,
    gpus: list[str],
    warnings: int,
    capsys: pytest.CaptureFixture,
) -> None:
    give_gpus(tmp_path, *gpus)
    assert setup.mxnet_variant("auto") == "cu117"
    output = capsys.readouterr().out
    assert output.count("no code for NVIDIA H200 (compute capability 9.0)") == warnings


@pytest.mark.parametrize("gpu", ["NVIDIA H200, 9.0", "NVIDIA B200, 10.0", "Tesla K80, 3.7"])
def test_a_gpu_that_no_build_serves(setup: ModuleType, tmp_path: Path, gpu: str) -> None:
    give_gpus(tmp_path, gpu, gpu)
    message = refused(setup.mxnet_variant, "auto")
    name, capability = gpu.split(", ")
    assert message.count(f"{name} (compute capability {capability})") == 1
    assert "nvcr.io/nvidia/mxnet:24.06-py3" in message
    assert "BORT_MXNET=cpu" in message
    assert setup.mxnet_variant("cpu") == "cpu"


def test_nvidia_smi_without_driver(
    setup: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    executable(tmp_path / "bin/nvidia-smi", "echo no driver; exit 9")
    assert setup.mxnet_variant("auto") == "cpu"
    assert "no working driver" in capsys.readouterr().out


def test_horovod_without_nvcc_has_no_nccl(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.set_up(BORT_MXNET="cu117")
    warning = "compiled without NCCL: gradients of several GPUs go through the host"
    assert warning in capsys.readouterr().out
    assert machine.ran("nvidia-cuda-nvcc==13.0.88")
    assert "HOROVOD_GPU_OPERATIONS" not in machine.settings
    assert machine.settings["PATH"].split(":")[1].endswith("nvidia/cu13/bin")
    assert os.readlink(machine.module.PACKAGES / "mxnet/libcuda.so") == "/driver/libcuda.so.1"
    assert "needs the CUDA toolkit" in refused(machine.set_up, BORT_MXNET="cu101")
    capsys.readouterr()
    machine.set_up(BORT_MXNET="cpu")
    assert "warning" not in capsys.readouterr().out


def test_horovod_with_nvcc_has_nccl(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The nvcc on the PATH is a script that calls another, whose toolkit is used."""
    give_gpus(tmp_path, "A100, 8.0", "V100, 7.0", "A100, 8.0")
    toolkit = tmp_path / "toolkit"
    executable(tmp_path / "bin/nvcc", f"echo '#$ TOP={toolkit}' >&2")
    executable(toolkit / "bin/nvcc", "exit 1")
    assert machine.module.nvcc_folder() == "", "the toolkit has no headers"
    (toolkit / "include").mkdir()
    (toolkit / "include/cuda_runtime.h").touch()
    machine.set_up(BORT_MXNET="cu117")
    assert machine.settings["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert machine.settings["HOROVOD_BUILD_CUDA_CC_LIST"] == "70,80"
    assert machine.settings["PATH"].split(":")[1] == f"{toolkit}/bin"
    nccl = Path(machine.settings["HOROVOD_NCCL_HOME"])
    assert os.readlink(nccl / "lib/libnccl.so") == "libnccl.so.2"
    assert "warning" not in capsys.readouterr().out


def test_missing_parts_of_the_machine_are_named_with_their_packages(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.check_machine("cpu")
    monkeypatch.setenv("CXX", "g++ -O2")
    setup.check_machine("cpu")
    executable(tmp_path / "bin/g++", "exit 1")
    (tmp_path / "bin/make").unlink()
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup, "driver_library", lambda: "")
    message = refused(setup.check_machine, "cu117")
    for part in ("make", "a C++17 compiler (g++ -O2)", "Python.h", "ensurepip", "libcuda.so.1"):
        assert part in message
    assert f"apt-get install build-essential python3.{MINOR}-dev python3.{MINOR}-venv" in message
    assert "without one: BORT_MXNET=cpu" in message
