"""The set-up scripts, with stand-ins for Python, pip, compilers and nvidia-smi on the PATH."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    *("bash", "cat", "chmod", "cksum", "cp", "cut", "dirname", "env", "find", "flock", "grep"),
    *("head", "ln", "mkdir", "mktemp", "mv", "nproc", "od", "paste", "printf", "rm", "rmdir"),
    *("sed", "sh", "sort", "tail", "touch", "tr", "wc"),
)

# Answers what the scripts ask an interpreter, and keeps "installed" packages as folders. In Bash,
# because it starts ten times as fast as the interpreter it stands for.
FAKE_PYTHON = r"""
minor=MINOR home=HOME calls=CALLS
packages=${0%/*/*}/packages
text="$*"
echo "${text//$'\n'/ }" >>"$calls"
if [[ -n ${FAKE_FAILS:-} && $text == *"$FAKE_FAILS"* ]]; then
    echo "stand-in told to fail at: $text" >&2
    exit 1
fi
install() {
    for name; do
        [[ ! -d $packages/$name.dist-info ]] || continue
        mkdir -p "$packages/$name" "$packages/$name.dist-info"
        touch "$packages/$name.dist-info/RECORD"
    done
}
after() {  # the argument that follows $1
    local found=${text#*"$1 "}
    echo "${found%% *}"
}
case "$text" in
    --version) echo "Python 3.$minor.0" ;;
    "-c "*"version_info[0]"*) echo "$minor $home" ;;
    "-c "*purelib*) echo "$packages" ;;
    "-c "*cp%d%d*) echo "cp3$minor" ;;
    "-c "*find_spec*) for name in "${@:3}"; do [[ -d $packages/$name ]] || exit 1; done ;;
    "-c "*"import horovod"*) [[ -d $packages/horovod ]] ;;
    "-c "*"import mxnet"*) [[ -d $packages/mxnet && -d $packages/gluonnlp ]] ;;
    "-m venv"*)
        made="${@: -1}"
        mkdir -p "$made/bin" "$made/packages"
        cp "$0" "$made/bin/python"
        ;;
    "-m pip wheel"*)
        env | grep ^HOROVOD_ | sort >>"$calls"
        echo "COMPILER=$(cut -d: -f2 <<<"$PATH")" >>"$calls"
        touch "$(after --wheel-dir)/horovod-0.28.1-cp3$minor-cp3$minor-linux_x86_64.whl"
        ;;
    *--target*) mkdir -p "$(after --target)/nvidia/cu13/lib" ;;
    *force-reinstall*.whl) rm -rf "$packages/horovod.dist-info" && install horovod ;;
    *requirements-dev.txt*)
        install mxnet gluonnlp
        [[ $text != *cu117* ]] || mkdir -p "$packages/nvidia/nccl"
        ;;
esac
"""


class Machine:
    """A project folder and a PATH that holds nothing but what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        for made in (self.project / "scripts", self.bin):
            made.mkdir(parents=True)
        for path in (*ROOT.glob("requirements*.txt"), *ROOT.glob("scripts/*.sh")):
            shutil.copy(path, self.project / path.relative_to(ROOT))
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for tool in ("gcc", "g++", "make"):
            self.command(tool, "exit 0")
        self.command("cmake", "echo cmake version 3.25.1")

    def command(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        path.chmod(0o755)

    def python(self, name: str, minor: int, folder: Path | None = None) -> Path:
        path = (folder or self.bin) / name
        script = FAKE_PYTHON
        for field, value in (("MINOR", minor), ("HOME", path), ("CALLS", self.calls_file)):
            script = script.replace(f"={field}", f"='{value}'")
        path.write_text(f"#!{shutil.which('bash')}\n{script}")
        path.chmod(0o755)
        return path

    def gpus(self, *gpus: str) -> None:
        listing = "\n".join(gpus)
        self.command("nvidia-smi", f'[[ $1 == -L ]] || printf "%s\\n" "{listing}"')

    def run(self, script: str = "setup_env", **environment: str) -> subprocess.CompletedProcess:
        """Run a script; `calls` then holds what the interpreters were asked in this run only."""
        self.calls_file.write_text("")
        settings = {"PATH": str(self.bin), "CUDA_HOME": "/nonexistent", "HOME": str(self.project)}
        return subprocess.run(
            [str(self.project / "scripts" / f"{script}.sh")],
            env={**settings, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    def made(self, part: str) -> list[str]:
        return [call for call in self.calls if part in call]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.python("python3.11", 11)
    return made


def refused(run: subprocess.CompletedProcess) -> str:
    """Return the one line that a refused call ends with."""
    assert run.returncode == 1, run.stdout + run.stderr
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def succeeded(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].startswith("setup: ready")
    return run.stdout


def test_from_nothing_then_nothing(machine):
    succeeded(machine.run())
    pip = [call for call in machine.made("-m pip") if "--version" not in call]
    assert "-r requirements-build.txt" in pip[0]
    assert "--no-build-isolation -r requirements-cpu.txt -r requirements-dev.txt" in pip[1]
    assert "pip wheel" in pip[2]
    assert "horovod==0.28.1" in pip[2]
    assert pip[3].endswith(".whl")
    assert len(pip) == 4
    assert "HOROVOD_WITH_GLOO=1" in machine.calls
    assert not machine.made("HOROVOD_GPU_OPERATIONS")

    start = time.monotonic()
    succeeded(machine.run())
    assert time.monotonic() - start < 2
    assert not machine.made("-m pip")


@pytest.mark.parametrize("fails_at", ["-m venv", "requirements-build", "-dev.txt", "pip wheel"])
def test_a_broken_off_set_up_is_repaired(machine, fails_at):
    run = machine.run(FAKE_FAILS=fails_at)
    assert run.returncode == 1
    assert "stand-in told to fail" in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: this failed:")
    succeeded(machine.run())
    assert len(machine.made("-m venv")) == (fails_at == "-m venv")
    succeeded(machine.run())
    assert not machine.made("-m pip")


def test_a_half_installed_package_is_installed_again(machine):
    machine.run(FAKE_FAILS="pip wheel")
    info = machine.project / ".venv/packages/mxnet.dist-info"
    (info / "RECORD").unlink()
    succeeded(machine.run())
    assert (info / "RECORD").exists()
    (machine.project / ".venv/packages/horovod").rmdir()
    succeeded(machine.run())
    assert not machine.made("pip wheel")
    assert machine.made(".whl")


def test_a_damaged_package_is_replaced(machine):
    succeeded(machine.run())
    (machine.project / ".venv/packages/mxnet").rmdir()
    assert "does not load; making .venv anew" in succeeded(machine.run())
    assert not machine.made("pip wheel")
    machine.command("nvidia-smi", "exit 1")
    run = machine.run(FAKE_FAILS="import mxnet")
    assert "error: MXNet does not load" in run.stderr
    assert len(machine.made("-m venv")) == 1


def test_a_moved_checkout_gets_a_new_environment(machine, tmp_path):
    machine.gpus("NVIDIA L4, 8.9")
    succeeded(machine.run(BORT_MXNET="cpu"))
    machine.project = machine.project.rename(tmp_path / "elsewhere")
    assert "MXNet for cpu" in succeeded(machine.run())
    assert machine.made("-m venv")
    assert machine.made("pip wheel")


def test_the_newest_python_that_runs(machine):
    machine.command("python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    machine.python("python3.10", 10)
    machine.python("python3", 13)
    assert "with Python 3.11" in succeeded(machine.run())


def test_python_by_its_plain_name(machine):
    machine.python("python3", 12)
    assert "with Python 3.12" in succeeded(machine.run())


def test_python_asked_for(machine, tmp_path):
    other = machine.python("mine", 9, tmp_path)
    assert "with Python 3.9" in succeeded(machine.run(PYTHON=str(other)))
    succeeded(machine.run())
    assert not machine.made("-m pip"), "a Python that was chosen stays"
    assert "with Python 3.11" in succeeded(machine.run(PYTHON="python3.11"))


def test_python_that_does_not_serve(machine, tmp_path):
    thirteen = str(machine.python("thirteen", 13, tmp_path))
    assert "is Python 3.13; MXNet 1.9.1 needs 3.9 to 3.12" in refused(machine.run(PYTHON=thirteen))
    assert "does not run as Python 3" in refused(machine.run(PYTHON="/nonexistent"))
    assert not (machine.project / ".venv").exists()


def test_only_python_313(machine):
    (machine.bin / "python3.11").unlink()
    assert "found no Python 3.9 to 3.12." in refused(machine.run())
    machine.python("python3", 13)
    message = refused(machine.run())
    assert f"only 3.13 ({machine.bin}/python3)" in message
    assert "PYTHON=" in message
    assert "uv" in message


def test_uv_brings_a_python(machine, tmp_path):
    (machine.bin / "python3.11").unlink()
    brought = machine.python("brought", 12, tmp_path)
    machine.command("uv", f'[[ "$2" == install ]] || echo "{brought}"')
    assert f"with Python 3.12 ({brought})" in succeeded(machine.run())


@pytest.mark.parametrize(
    ("fails_at", "package"),
    [("ensurepip", "apt-get install python3.11-venv"), ("Python.h", "install python3.11-dev")],
)
def test_parts_of_python_are_missing(machine, fails_at, package):
    run = machine.run(FAKE_FAILS=fails_at)
    assert package in run.stderr.splitlines()[-1]
    assert run.returncode == 1


def test_no_compiler(machine):
    (machine.bin / "g++").unlink()
    assert "apt-get install build-essential" in refused(machine.run())
    machine.command("g++", "exit 1")
    assert "cannot compile" in refused(machine.run())


def test_cmake_from_pip(machine):
    machine.command("cmake", "echo cmake version 4.1.0")
    succeeded(machine.run())
    assert machine.made("pip install cmake>=3.13,<4")


@pytest.mark.parametrize(
    ("gpus", "file"),
    [
        (["Tesla V100-SXM2-16GB, 7.0"], "requirements-cu117.txt"),
        (["NVIDIA L4, 8.9", "NVIDIA L4, 8.9"], "requirements-cu117.txt"),
        (["Field compute_cap is not a valid field to query."], "requirements-cu117.txt"),
    ],
)
def test_a_gpu_takes_cuda_from_pip(machine, gpus, file):
    machine.gpus(*gpus)
    succeeded(machine.run())
    assert machine.made(f"-r {file}")


def test_nvidia_smi_without_driver(machine):
    machine.command("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    run = machine.run()
    succeeded(run)
    assert "no working driver" in run.stderr
    assert machine.made("-r requirements-cpu.txt")


@pytest.mark.parametrize("gpu", ["NVIDIA H200, 9.0", "NVIDIA B200, 10.0", "Tesla K80, 3.7"])
def test_a_gpu_that_no_build_serves(machine, gpu):
    machine.gpus(gpu, gpu)
    message = refused(machine.run())
    name, capability = gpu.split(", ")
    assert message.count(f"{name} (compute capability {capability})") == 1
    assert "nvcr.io/nvidia/mxnet:24.06-py3" in message
    assert "BORT_MXNET=cpu" in message
    run = machine.run(BORT_MXNET="cu117")
    assert f"warning: mxnet-cu117 has no code for {name}" in succeeded(run)


def test_one_gpu_of_two_is_served(machine):
    machine.gpus("NVIDIA L4, 8.9", "NVIDIA H200, 9.0")
    output = succeeded(machine.run())
    assert "warning: mxnet-cu117 has no code for NVIDIA H200" in output
    assert machine.made("requirements-cu117.txt")


def test_a_chosen_mxnet_is_remembered_and_wheels_are_kept(machine):
    machine.gpus("NVIDIA H200, 9.0")
    assert "MXNet for cpu" in succeeded(machine.run(BORT_MXNET="cpu"))
    assert "MXNet for cpu" in succeeded(machine.run())
    assert not machine.made("-m pip")
    machine.gpus("NVIDIA L4, 8.9")
    assert "MXNet for cu117" in succeeded(machine.run(BORT_MXNET="auto"))
    assert machine.made("pip wheel")
    assert "MXNet for cu117" in succeeded(machine.run())
    assert "MXNet for cpu" in succeeded(machine.run(BORT_MXNET="cpu"))
    assert machine.made(".whl")
    assert not machine.made("pip wheel")


def test_an_unknown_mxnet(machine):
    assert "BORT_MXNET=cu118 is not one of" in refused(machine.run(BORT_MXNET="cu118"))


def test_a_cuda_mxnet_without_driver(machine):
    run = machine.run(BORT_MXNET="cu117", FAKE_FAILS="libcuda")
    assert "comes with the NVIDIA driver" in run.stderr.splitlines()[-1]
    assert run.returncode == 1
    assert not machine.made("requirements")


def test_horovod_with_nccl_where_there_is_nvcc(machine, tmp_path):
    machine.gpus("Tesla V100, 7.0", "NVIDIA A100, 8.0", "NVIDIA A100, 8.0")
    machine.command("nvcc", f"echo '#$ TOP={tmp_path}/toolkit/bin/..'")
    for path in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / "toolkit" / path).parent.mkdir(parents=True)
        (tmp_path / "toolkit" / path).touch(0o755)
    succeeded(machine.run())
    assert "HOROVOD_GPU_OPERATIONS=NCCL" in machine.calls
    assert "HOROVOD_BUILD_CUDA_CC_LIST=70,80" in machine.calls
    assert machine.made("HOROVOD_NCCL_HOME=")
    assert machine.made(f"COMPILER={tmp_path}/toolkit/bin/../bin")
    (machine.bin / "nvidia-smi").unlink()
    shutil.rmtree(machine.project / ".venv")
    succeeded(machine.run(BORT_MXNET="cu117"))
    assert machine.made("HOROVOD_NCCL_HOME="), "no nvidia-smi in an image for later GPUs"


def test_horovod_with_gloo_where_there_is_no_nvcc(machine):
    machine.gpus("NVIDIA A100, 8.0")
    succeeded(machine.run())
    assert machine.made("nvidia-cuda-nvcc==")
    assert "HOROVOD_WITH_GLOO=1" in machine.calls
    assert not machine.made("HOROVOD_GPU_OPERATIONS")


def test_the_container_keeps_its_mxnet(machine):
    machine.gpus("NVIDIA H200, 9.0")
    run = machine.run(BORT_MXNET="system")
    assert "brings no Horovod" in run.stderr
    assert machine.made("-m venv --system-site-packages")
    assert machine.made("-r requirements-common.txt")
    assert not machine.made("pip wheel")


def test_the_path_file_prepares_every_python(machine, tmp_path):
    succeeded(machine.run())
    (machine.project / "bort").mkdir()
    shutil.copy(ROOT / "bort/__init__.py", machine.project / "bort")
    shutil.copy(ROOT / "bort/mxnet_setup.py", machine.project / "bort")
    code = (
        f"import site, sys; site.addsitedir({str(machine.project / '.venv/packages')!r});"
        "print([type(finder).__name__ for finder in sys.meta_path])"
    )
    command = [sys.executable, "-ISc", code]
    with_checkout = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "_BeforeMXNet" in with_checkout.stdout
    shutil.rmtree(machine.project / "bort")
    without = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "_BeforeMXNet" not in without.stdout
    assert not with_checkout.stderr + without.stderr


def requirements(name: str) -> dict[str, str]:
    """Read the lines of a requirements file: name -> version part, files it includes as well."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found: dict[str, str] = {}
    for line in filter(None, lines):
        if line.startswith("-r "):
            found.update(requirements(line[3:]))
        else:
            package = re.match(r"[A-Za-z0-9-]+", line).group()
            found[package] = line[len(package) :]
    return found


def test_the_requirements_files_agree():
    common = requirements("requirements-common.txt")
    expected = {
        "requirements.txt": {"mxnet-cu101": "==1.9.1"},
        "requirements-cpu.txt": {"mxnet": "==1.9.1"},
        "requirements-cu117.txt": {"mxnet-cu117": "==1.9.1"},
    }
    for name, own in expected.items():
        found = requirements(name)
        rest = {k: v for k, v in found.items() if k not in common and not k.startswith("nvidia-")}
        assert common.items() <= found.items()
        assert rest == own
    cuda = [k for k in requirements("requirements-cu117.txt") if k.startswith("nvidia-")]
    assert len(cuda) == 10
    assert all(requirements("requirements-cu117.txt")[k].startswith("==") for k in cuda)
    assert common["gluonnlp"] == "==0.10.0"


@pytest.mark.parametrize(("content", "status"), [(r"\x12\x01\0\0\0\0\0\0more", 0), ("<html>", 1)])
def test_download_of_the_model(machine, content, status):
    machine.command("aws", "exit 127")
    machine.command("curl", f"printf '{content}' > \"${{@: -2:1}}\"")
    run = machine.run("download_model")
    assert run.returncode == status
    files = [path.name for path in (machine.project / "model").iterdir()]
    assert files == (["bort.params"] if status == 0 else [])
    if status == 0:
        assert "run this again after ./scripts/setup_env.sh" in run.stdout
        (machine.bin / "curl").unlink()
        (machine.project / ".venv/bin").mkdir(parents=True)
        machine.command("python", "echo python $*")
        (machine.bin / "python").rename(machine.project / ".venv/bin/python")
        run = machine.run("download_model")
        assert run.returncode == 0
        assert "python scripts/describe_released.py" in run.stdout
        (machine.project / "model/bort.json").touch()
        assert "describe" not in machine.run("download_model").stdout
    else:
        assert "run_pretraining_distillation.sh" in run.stderr


@pytest.mark.parametrize(("lint", "tests", "status"), [(0, 0, 0), (1, 0, 1), (1, 2, 2), (0, 5, 5)])
def test_run_tests_ends_with_the_worst_status(machine, lint, tests, status):
    tools = machine.project / ".venv/bin"
    tools.mkdir(parents=True)
    for tool in ("ruff", "mypy", "python"):
        machine.command(tool, f"echo {tool} $*; exit {tests if tool == 'python' else lint}")
        (machine.bin / tool).rename(tools / tool)
    (machine.project / "scripts/setup_env.sh").write_text("#!/bin/sh\necho set up\n")
    run = machine.run("run_tests")
    assert run.returncode == status
    assert run.stdout.startswith("set up")
    assert run.stdout.rstrip().endswith("python -m pytest -m distributed and not slow")


@pytest.mark.distributed
def test_horovodrun_here(tmp_path):
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
def test_the_cuda_set_is_complete():
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
