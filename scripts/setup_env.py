"""Makes .venv in the project root; scripts/setup_env.sh finds a Python and starts this with it.

Standard library only. The settings PYTHON and BORT_MXNET are described in setup_env.sh. Only a
.venv that this script made is changed; another one, or one behind a symbolic link, is used if
everything loads in it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
VERSION = f"3.{sys.version_info[1]}"
# The one behind an environment, asked for before that is removed.
BASE_PYTHON = os.path.realpath(sys.executable)
PY = str(VENV / "bin/python")
PACKAGES = VENV / f"lib/python{VERSION}/site-packages"
LOG = VENV / "setup.log"
BUILD_TOOLS = ROOT / "requirements-build.txt"
TRIED_VERSIONS = ROOT / f"constraints/python{VERSION}.txt"
START_UP_HOOK = ROOT / "bort/mxnet_setup.py"
HOROVOD = "0.28.1"
CONTAINER = "nvcr.io/nvidia/mxnet:24.06-py3"
CHOICES = ("cpu", "cu117", "cu101", "system", "auto")
# Horovod for an MXNet with CUDA cannot be compiled without nvcc, not even for Gloo alone, which
# calls nothing of CUDA itself. So the version does not matter; 13 is the first that pip has whole.
NVCC = ("nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88")
NVCC += ("nvidia-nvvm==13.0.88", "nvidia-cuda-cccl==13.0.85")
IMPORTS = "import mxnet, gluonnlp, horovod.mxnet as hvd; assert hvd.gloo_built()"


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"setup: {text}", flush=True)


def die(text: str) -> NoReturn:
    """End with one line on stderr."""
    sys.exit(f"error: {text}")


def run(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command with `text` as its input; one that cannot be started ends with status 127."""
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, cwd="/"
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def problem_of(code: str, *arguments: str) -> str:
    """Return why Python code fails in .venv, empty when it does not."""
    ended = run(PY, "-c", code, *arguments)
    said = ended.stderr.strip() or f"status {ended.returncode}"
    return said.splitlines()[-1] if ended.returncode else ""


def marker(name: str) -> str:
    """Return the text of a small file in .venv, empty when there is none."""
    with suppress(OSError):
        return (VENV / name).read_text(encoding="utf-8").strip()
    return ""


def step(what: str, *commands: Sequence[str], **environment: str) -> None:
    """Run commands, their output in the log, until one succeeds; when none does, show its end."""
    say(what)
    start = time.monotonic()
    with LOG.open("a", encoding="utf-8") as log:
        for command in commands:
            print(f"\n== {what}: {' '.join(command)}", file=log, flush=True)
            # It inherits the lock, and so holds it even if this process is killed.
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            settings = {**os.environ, **environment}
            if not subprocess.call(command, **streams, env=settings, cwd=ROOT, close_fds=False):
                say(f"    {time.monotonic() - start:.0f} s")
                return
    print(*LOG.read_text(errors="replace").splitlines()[-25:], sep="\n", file=sys.stderr)
    die(f"this failed: {what}. The whole output is in {LOG}")


def install(what: str, *arguments: str) -> None:
    """Install with uv where there is one; with pip otherwise, and where uv fails.

    uv knows neither pip's configuration nor the packages of the Python below the environment.
    """
    commands = [[PY, "-m", "pip", "install", *arguments]]
    uv = shutil.which("uv")
    if uv and "include-system-site-packages = true" not in marker("pyvenv.cfg"):
        commands.insert(0, [uv, "pip", "install", "--python", PY, *arguments])
    step(what, *commands)


def fingerprint(choice: str) -> str:
    """Return a checksum of everything that asks for work when it changes.

    nvidia-smi is only looked up, not run: with many GPUs it takes seconds.
    """
    digest = hashlib.sha256(f"{ROOT} {VERSION} {choice} {shutil.which('nvidia-smi')}".encode())
    project = ROOT / "pyproject.toml"
    for file in (Path(__file__), project, BUILD_TOOLS, TRIED_VERSIONS, START_UP_HOOK):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def complete(choice: str) -> bool:
    """Return whether an earlier call has left everything in place."""
    find = "from importlib.util import find_spec as find; assert all(map(find, {}))"
    same = marker("complete") == fingerprint(choice)
    return same and not problem_of(find.format(["mxnet", "gluonnlp", "horovod"]))


def foreign() -> str:
    """Return what .venv is if it is not this script's to change, empty if it is."""
    if VENV.is_symlink():
        return f".venv is a symbolic link to {os.readlink(VENV)}"
    ours = VENV.is_dir() and ((VENV / "setup.lock").exists() or not any(VENV.iterdir()))
    return "" if ours or not VENV.exists() else ".venv is not an environment that this script made"


def check_foreign(what: str) -> None:
    """Refuse an environment that is not ours, unless everything loads in it. Changes nothing."""
    # Python 3.9 has no tomllib.
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = project.partition("\ndependencies = [")[2].partition("\n]")[0]
    names = sorted(set(re.findall(r'^ *"([\w.-]+)', dependencies, re.MULTILINE)))
    installed = "import sys; from importlib.metadata import version; [*map(version, sys.argv[1:])];"
    problem = problem_of(installed + IMPORTS, *names)
    if problem:
        die(
            f"{what} and cannot be used for this project: {problem}. It is left as it is: install"
            " what is missing there, or remove the link or folder .venv and call this again"
        )
    for name in ("PYTHON", "BORT_MXNET"):
        if os.environ.get(name):
            say(f"{what}: {name}={os.environ[name]} is ignored")
    say("ready: .venv, used as it is")


def gpus() -> list[tuple[str, str]]:
    """Return (name, compute capability) of each GPU; none where the driver does not report it."""
    query = run("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
    return re.findall(r"^(.+), (\d+\.\d+)$", query.stdout, re.MULTILINE)


def mxnet_variant(choice: str) -> str:
    """Return the build of MXNet to install; the driver and the GPUs decide "auto"."""
    variant = choice
    if choice == "auto":
        variant = "cu117" if run("nvidia-smi", "-L").returncode == 0 else "cpu"
        if variant == "cpu" and shutil.which("nvidia-smi"):
            say("nvidia-smi is here but finds no working driver: taking MXNet for the CPU")
    if variant != "cu117":
        return variant
    found = gpus()
    # mxnet-cu117 has machine code for 5.0 to 8.9, and no PTX that a driver could translate.
    unserved = [f"{name} (compute capability {c})" for name, c in found if not 5 <= float(c) < 9]
    if choice == "auto" and unserved and len(unserved) == len(found):
        die(
            f"no MXNet 1.9.1 from pip runs on {'; '.join(sorted(set(unserved)))}. Take the CPU"
            f" (BORT_MXNET=cpu), or work in NVIDIA's container {CONTAINER} (BORT_MXNET=system);"
            " below 5.0, install CUDA 10.1 (BORT_MXNET=cu101)"
        )
    for gpu in unserved:
        say(f"warning: mxnet-cu117 has no code for {gpu} and fails there at its first kernel")
    return variant


def driver_library() -> str:
    """Return the path of the NVIDIA driver's library, empty on a machine without it."""
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return re.findall(r"/\S*libcuda\.so\S*", Path("/proc/self/maps").read_text())[0]
    return ""


def nvcc_folder() -> str:
    """Return the folder of an nvcc that has its toolkit beside it, empty when there is none.

    One on the PATH may be a script that calls another, which prints where its toolkit is.
    """
    trace = run("nvcc", "--dryrun", "-x", "cu", "/dev/null").stderr
    toolkits = [
        os.path.dirname(os.path.dirname(shutil.which("nvcc") or "")),
        *re.findall(r"^#\$ TOP=(.*)$", trace, re.MULTILINE),
        os.environ.get("CUDA_HOME", "/usr/local/cuda"),
    ]
    for folder in toolkits:
        header = f"{folder}/include/cuda_runtime.h"
        if os.path.isfile(header) and os.access(f"{folder}/bin/nvcc", os.X_OK):
            return f"{folder}/bin"
    return ""


def check_machine(variant: str) -> None:
    """Refuse a machine that lacks what the environment is made with."""
    compiler = os.environ.get("CXX", "g++")
    command = [*compiler.split(), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    needed = {
        "make": shutil.which("make"),
        "a C compiler": shutil.which(os.environ.get("CC", "gcc").split()[0]),
        f"a C++17 compiler ({compiler})": run(*command, text="#include <vector>").returncode == 0,
        "Python.h": Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "ensurepip": importlib.util.find_spec("ensurepip"),
    }
    if variant.startswith("cu"):
        needed["libcuda.so.1 of the NVIDIA driver (without one: BORT_MXNET=cpu)"] = driver_library()
    missing = [name for name, found in needed.items() if not found]
    if missing:
        die(
            f"this machine lacks {', '.join(missing)}. Debian, Ubuntu: apt-get install"
            f" build-essential python{VERSION}-dev python{VERSION}-venv. Fedora: dnf install"
            f" gcc-c++ make python{VERSION}-devel"
        )


def make_environment(variant: str) -> None:
    """Make .venv, and keep in it the compiled wheels, which took the longest, and the choice."""
    for child in VENV.iterdir():
        if child.is_dir() and not child.is_symlink():
            if child.name != "wheels":
                shutil.rmtree(child)
        elif child.name not in ("mxnet-choice", "setup.lock"):
            child.unlink()
    options = ["--system-site-packages"] if variant == "system" else []
    what = f"making .venv with Python {VERSION} ({BASE_PYTHON})"
    step(what, [BASE_PYTHON, "-m", "venv", *options, str(VENV)])


def install_packages(variant: str) -> None:
    """Bring all packages but Horovod up to date."""
    # NVIDIA's container brings an MXNet and versions of its own.
    tried = [] if variant == "system" else ["-c", str(TRIED_VERSIONS)]
    extras = "dev" if variant == "system" else f"{variant},dev"
    install("installing the build tools", "-r", str(BUILD_TOOLS), *tried)
    # Without isolation GluonNLP is compiled by the Cython just installed.
    size = " (2 GB to download)" * (variant == "cu117")
    what = f"installing the packages, MXNet for {variant}{size}"
    install(what, "--no-build-isolation", "-e", f"{ROOT}[{extras}]", *tried)
    write_hook()
    problem = problem_of("import mxnet, gluonnlp")
    if problem:
        die(f"MXNet for {variant} does not load: {problem}. README.md lists what it needs")


def write_hook() -> None:
    """Prepare MXNet's import in every Python that starts here: horovodrun imports it before us.

    A copy of bort/mxnet_setup.py is loaded, under a name of its own. Importing `bort` instead would
    run this checkout's code in the programs of another checkout.
    """
    shutil.copyfile(START_UP_HOOK, PACKAGES / "bort_mxnet_hook.py")
    start = "import bort_mxnet_hook; bort_mxnet_hook.install()\n"
    (PACKAGES / "bort_mxnet_hook.pth").write_text(start, encoding="utf-8")


def install_horovod(variant: str) -> None:
    """Install Horovod, which pip compiles once for this MXNet and keeps in a cache of its own."""
    cuda = variant.startswith("cu")
    toolkit = nvcc_folder() if cuda else ""
    if cuda and not toolkit:
        say(
            "warning: found no CUDA toolkit (nvcc), so Horovod is compiled without NCCL: gradients"
            " of several GPUs go through the host, which is slow. Install the toolkit, then rm"
            " .venv/complete and call this again"
        )
    works = f"{IMPORTS} and hvd.nccl_built()" if toolkit else IMPORTS
    if not problem_of(works):
        return
    if variant == "system":
        die(f"this Python brings no Horovod for MXNet; use {CONTAINER}")
    kind = "NCCL" if toolkit else "Gloo"
    # The wheel knows the path of the MXNet that it was linked to.
    place = hashlib.sha256(str(ROOT).encode()).hexdigest()[:10]
    cache = VENV / "wheels" / f"{variant}-{kind}-{place}"
    with tempfile.TemporaryDirectory(dir=VENV) as folder:
        nvcc = toolkit
        if cuda and not toolkit and not any(cache.rglob("horovod-*.whl")):
            nvcc = fetch_nvcc(variant, Path(folder))
        settings = build_settings(nvcc, nccl=bool(toolkit))
        what = f"installing Horovod {HOROVOD} with {kind} (1 to 3 minutes the first time)"
        options = ["--no-deps", "--no-build-isolation", "--force-reinstall"]
        command = [PY, "-m", "pip", "install", "-v", *options, "--cache-dir", str(cache)]
        step(what, [*command, f"horovod=={HOROVOD}"], **settings)
    problem = problem_of(works)
    if problem:
        die(f"Horovod does not load: {problem}. Try: rm -rf .venv/wheels, and call this again")


def build_settings(nvcc: str, nccl: bool) -> dict[str, str]:
    """Return the environment variables of Horovod's build; `nvcc` is the folder of that program."""
    names = "WITH_MXNET WITH_GLOO WITHOUT_MPI WITHOUT_TENSORFLOW WITHOUT_PYTORCH"
    settings = {f"HOROVOD_{name}": "1" for name in names.split()}
    settings["MAKEFLAGS"] = f"-j{os.cpu_count()}"
    settings["PATH"] = ":".join(filter(None, [f"{VENV}/bin", nvcc, os.environ["PATH"]]))
    nvidia = PACKAGES / "nvidia"
    if nvidia.is_dir():
        # MXNet's headers include cuBLAS's and others, which a toolkit may come without.
        settings["CPLUS_INCLUDE_PATH"] = ":".join(map(str, sorted(nvidia.glob("*/include"))))
    if nccl:
        settings |= {"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_LINK": "SHARED"}
        capabilities = {capability.replace(".", "") for _, capability in gpus()}
        if capabilities:
            settings["HOROVOD_BUILD_CUDA_CC_LIST"] = ",".join(sorted(capabilities))
        library = nvidia / "nccl/lib/libnccl.so.2"
        if library.exists():
            settings["HOROVOD_NCCL_HOME"] = str(nvidia / "nccl")
            with suppress(FileExistsError):
                library.with_suffix("").symlink_to(library.name)  # the name that a linker looks for
    return settings


def fetch_nvcc(variant: str, folder: Path) -> str:
    """Install nvcc for the compilation only; return the folder of the program."""
    if variant != "cu117":
        die(f"found no nvcc; Horovod for mxnet-{variant} needs the CUDA toolkit of that version")
    what = "fetching nvcc, for the compilation only"
    install(what, "--no-deps", "--target", str(folder), *NVCC)
    toolkit = folder / "nvidia/cu13"
    (toolkit / "lib64").symlink_to("lib")
    (toolkit / "lib/libcudart.so").symlink_to("libcudart.so.13")
    return str(toolkit / "bin")


@contextmanager
def lock() -> Iterator[None]:
    """Let one set-up work at a time. The lock ends with the processes that hold it."""
    VENV.mkdir(exist_ok=True)
    with (VENV / "setup.lock").open("a") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work here; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_up(choice: str) -> None:
    """Do all the work. A finished .venv is brought up to date; any other is made from scratch."""
    variant = mxnet_variant(choice)
    check_machine(variant)
    made_for = f"{ROOT} {VERSION} {variant}"
    finished = marker("complete") not in ("", fingerprint(choice))  # this one would be damaged
    if not finished or marker("made-for") != made_for:
        make_environment(variant)
    (VENV / "complete").unlink(missing_ok=True)
    (VENV / "made-for").write_text(f"{made_for}\n", encoding="utf-8")
    (VENV / "mxnet-choice").write_text(f"{choice}\n", encoding="utf-8")
    install_packages(variant)
    if variant.startswith("cu"):
        # Horovod opens libcuda.so, a name that some drivers' packages leave out; MXNet's folder is
        # where its run path leads.
        link = PACKAGES / "mxnet/libcuda.so"
        link.unlink(missing_ok=True)
        link.symlink_to(driver_library())
    install_horovod(variant)
    (VENV / "complete").write_text(fingerprint(choice), encoding="utf-8")


def main() -> None:
    """Make .venv, or find it complete."""
    for name in ("PIP_TARGET", "PIP_USER", "VIRTUAL_ENV"):  # packages would go elsewhere
        os.environ.pop(name, None)
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    choice = os.environ.get("BORT_MXNET") or marker("mxnet-choice") or "auto"
    if choice not in CHOICES:
        die(f"BORT_MXNET={choice} is not one of {', '.join(CHOICES)}")
    what = foreign()
    if what:
        check_foreign(what)
        return
    if not complete(choice):
        with lock():
            if not complete(choice):
                set_up(choice)
    say(f"ready: .venv, Python {VERSION}, MXNet for {marker('made-for').rpartition(' ')[2]}")


if __name__ == "__main__":
    if sys.argv[1:]:
        die(f"{sys.argv[1]}: set-up takes no arguments; scripts/setup_env.sh describes it")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
