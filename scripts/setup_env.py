"""Makes .venv in the project root; scripts/setup_env.sh finds a Python and starts this with it.

Standard library only. The settings PYTHON and BORT_MXNET are described in setup_env.sh. The choice
of MXNet is remembered in .venv, and the next call repairs an interrupted one. Only a .venv that
this script made is changed; another one, or one behind a symbolic link, is used if it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
VERSION = f"3.{sys.version_info[1]}"
PY = str(VENV / "bin/python")
PACKAGES = VENV / f"lib/python{VERSION}/site-packages"
LOG = VENV / "setup.log"
BUILD_TOOLS = ROOT / "requirements-build.txt"
TRIED_VERSIONS = ROOT / f"constraints/python{VERSION}.txt"
HOROVOD = "0.28.1"
CONTAINER = "nvcr.io/nvidia/mxnet:24.06-py3"
CHOICES = ("cpu", "cu117", "cu101", "system", "auto")
COMPILERS = "Debian, Ubuntu: apt-get install build-essential. Fedora: dnf install gcc-c++ make"
# Horovod for an MXNet with CUDA cannot be compiled without nvcc, not even for Gloo alone, which
# calls nothing of CUDA itself. So the version does not matter; 13 is the first that pip has whole.
NVCC = "nvidia-cuda-nvcc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88"
NVCC += " nvidia-nvvm==13.0.88 nvidia-cuda-cccl==13.0.85"
IMPORTS = "import mxnet, gluonnlp, horovod.mxnet as hvd; assert hvd.gloo_built()"
# "bort" is loaded already only where the start-up file of an older set-up imports it.
FOREIGN = """import sys; from importlib.metadata import distribution
if "bort" in sys.modules:
    sys.exit("its start-up file imports another checkout's bort: set that checkout up again")
for name in sys.argv[1:]:
    distribution(name)
"""
LIBCUDA = """import ctypes, os, re, sys
try:
    ctypes.CDLL("libcuda.so")
except OSError:
    ctypes.CDLL("libcuda.so.1")
    library = re.search(r"/\\S*libcuda\\.so\\S*", open("/proc/self/maps").read()).group()
    if os.path.lexists(sys.argv[1]):
        os.remove(sys.argv[1])
    os.symlink(library, sys.argv[1])
"""


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"setup: {text}", flush=True)


def die(text: str) -> NoReturn:
    """End with one line on stderr."""
    sys.exit(f"error: {text}")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Return how a command ended and what it printed; one that cannot be started ends with 127."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def succeeds(*command: str) -> bool:
    """Return whether a command ends with status 0."""
    return run(*command).returncode == 0


def last_line(text: str) -> str:
    """Return the last line of an output."""
    return (text.strip().splitlines() or [""])[-1]


def marker(name: str) -> str:
    """Return the text of a small file in .venv, empty when there is none."""
    with suppress(OSError):
        return (VENV / name).read_text(encoding="utf-8").strip()
    return ""


def step(what: str, *commands: Sequence[str], **environment: str) -> None:
    """Run commands, their output in the log, until one succeeds; when none does, show its end.

    They inherit the lock, which is then held as long as they run, even if this process is killed.
    """
    say(what)
    start = time.monotonic()
    with LOG.open("a", encoding="utf-8") as log:
        for command in commands:
            print(f"\n== {what}: {' '.join(command)}", file=log, flush=True)
            settings = {**os.environ, **environment}
            status = subprocess.call(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=settings,
                cwd=ROOT,
                close_fds=False,
            )
            if status == 0:
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


# ---- what is there -----------------------------------------------------------------------------


def mxnet_choice(asked: str) -> str:
    """Return the build asked for by BORT_MXNET, else the remembered one, else "auto"."""
    choice = asked or marker("mxnet-choice") or "auto"
    if choice not in CHOICES:
        die(f"BORT_MXNET={choice} is not one of {', '.join(CHOICES)}")
    return choice


def fingerprint(choice: str) -> str:
    """Return a checksum of everything that asks for work when it changes.

    nvidia-smi is only looked up, not run: with many GPUs it takes seconds.
    """
    digest = hashlib.sha256(f"{ROOT} {choice} {shutil.which('nvidia-smi')}".encode())
    for file in (Path(__file__), ROOT / "pyproject.toml", BUILD_TOOLS, TRIED_VERSIONS):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def complete(choice: str) -> bool:
    """Return whether an earlier call has left everything in place, for this Python."""
    find = "import sys; from importlib.util import find_spec as find; "
    find += "sys.exit(not all(map(find, sys.argv[1:])))"
    same = PACKAGES.is_dir() and marker("complete") == fingerprint(choice)
    return same and succeeds(PY, "-c", find, "mxnet", "gluonnlp", "horovod")


def is_foreign() -> bool:
    """Return whether .venv is not this script's to change."""
    if VENV.is_symlink() or not VENV.is_dir():
        return os.path.lexists(VENV)
    ours = ("made-for", "setup.lock", "setup.log")  # setup.log: an older set-up, interrupted
    return any(VENV.iterdir()) and not any((VENV / name).is_file() for name in ours)


def check_foreign(asked_mxnet: str, asked_python: str) -> None:
    """Refuse an environment that is not ours, unless everything loads in it. Changes nothing."""
    what = ".venv is not an environment that this script made"
    if VENV.is_symlink():
        what = f".venv is a symbolic link to {os.readlink(VENV)}"
    # Python 3.9 has no tomllib.
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = project.partition("\ndependencies = [")[2].partition("\n]")[0]
    names = set(re.findall(r'^ *"([\w.-]+)', dependencies, re.MULTILINE))
    found = run(PY, "-c", f"{FOREIGN}{IMPORTS}", *sorted(names))
    problem = (last_line(found.stderr) or f"status {found.returncode}") * bool(found.returncode)
    if not problem and asked_python and not PACKAGES.is_dir():
        problem = f"it has another Python than PYTHON={asked_python}"
    if problem:
        die(
            f"{what} and cannot be used for this project: {problem}. It is left as it is: install"
            " what is missing there, or remove the link or folder .venv and call this again"
        )
    if asked_mxnet:
        say(f"{what}: BORT_MXNET={asked_mxnet} is ignored")


# ---- the machine -------------------------------------------------------------------------------


def check_python(python: str) -> None:
    """Refuse a Python without venv or without its C headers."""
    if not succeeds(python, "-c", "import venv, ensurepip"):
        die(f"{python} has no venv module. Debian, Ubuntu: apt-get install python{VERSION}-venv")
    header = "import os, sysconfig; os.stat(sysconfig.get_path('include') + '/Python.h')"
    if not succeeds(python, "-c", header):
        die(
            f"{python} has no C headers, and GluonNLP is compiled here. Debian, Ubuntu: apt-get"
            f" install python{VERSION}-dev. Fedora: dnf install python{VERSION}-devel"
        )


def check_compiler() -> None:
    """Refuse a machine that cannot compile C++17."""
    compiler = os.environ.get("CXX", "g++")
    for tool in (os.environ.get("CC", "gcc"), compiler, "make"):
        if not shutil.which(tool.split()[0]):
            die(f"found no {tool}, and GluonNLP and Horovod are compiled here. {COMPILERS}")
    command = [*compiler.split(), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    program = b"#include <vector>\n"
    if subprocess.run(command, input=program, capture_output=True, check=False).returncode:
        die(f"the C++ compiler {compiler} cannot compile one line of C++17. {COMPILERS}")


def gpus() -> list[tuple[str, str]]:
    """Return (name, compute capability) of each GPU; none where no driver runs.

    A driver too old to tell the capability belongs to a GPU that is not too new: "".
    """
    query = run("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
    lines = query.stdout.splitlines() if query.returncode == 0 else []
    found = [re.fullmatch(r"(.*), (\d+\.\d+)", line) for line in lines]
    return [(match[1], match[2]) if match else ("", "") for match in found]


def unserved(found: list[tuple[str, str]]) -> list[str]:
    """Name the GPUs for which mxnet-cu117 has no code.

    It holds machine code for 5.0 to 8.9 and no PTX that a driver could translate for newer ones.
    """
    return [
        f"{name} (compute capability {capability})"
        for name, capability in found
        if capability and not 5 <= float(capability) < 9
    ]


def mxnet_variant(choice: str) -> str:
    """Return the build of MXNet to install; the driver and the GPUs decide "auto"."""
    if choice != "auto":
        return choice
    if not shutil.which("nvidia-smi"):
        return "cpu"
    if not succeeds("nvidia-smi", "-L"):
        say("nvidia-smi is here but finds no working driver: taking MXNet for the CPU")
        return "cpu"
    found = gpus()
    without_code = unserved(found)
    if found and len(without_code) == len(found):
        die(
            f"no MXNet 1.9.1 from pip runs on {'; '.join(sorted(set(without_code)))}: mxnet-cu117"
            " serves 5.0 to 8.9. Either use NVIDIA's container, docker run --gpus all --ipc=host"
            f' -it -v "$PWD":/bort -w /bort {CONTAINER}, and in it BORT_MXNET=system'
            " ./scripts/setup_env.sh; or the CPU: BORT_MXNET=cpu ./scripts/setup_env.sh."
            " (Below 5.0: CUDA 10.1 and BORT_MXNET=cu101.)"
        )
    return "cu117"


# ---- the environment ---------------------------------------------------------------------------


def prepare(variant: str) -> bool:
    """Make .venv; one that was made for this MXNet and Python is kept, even unfinished: True."""
    made_for = f"{ROOT} {variant}"
    if marker("made-for") == made_for and PACKAGES.is_dir() and succeeds(PY, "-m", "pip", "-V"):
        for info in PACKAGES.glob("*.dist-info"):
            # pip takes a package for installed once this is there; it writes RECORD last.
            if not (info / "RECORD").exists():
                shutil.rmtree(info)
        return True
    python = os.path.realpath(sys.executable)  # the one behind an environment, which may go
    check_python(python)
    libcuda = "import ctypes; ctypes.CDLL('libcuda.so.1')"
    if variant.startswith("cu") and not succeeds(python, "-c", libcuda):
        die(
            f"mxnet-{variant} needs libcuda.so.1, which comes with the NVIDIA driver. Install the"
            " driver, or take MXNet for the CPU: BORT_MXNET=cpu ./scripts/setup_env.sh"
        )
    clear()
    (VENV / "made-for").write_text(f"{made_for}\n", encoding="utf-8")
    options = ["--system-site-packages"] if variant == "system" else []
    making = [python, "-m", "venv", *options, str(VENV)]
    step(f"making .venv with Python {VERSION} ({python})", making)
    return False


def clear() -> None:
    """Remove all but the compiled wheels, which took the longest, the choice and the lock."""
    for child in VENV.iterdir():
        if child.is_symlink() or child.is_file():
            if child.name not in ("mxnet-choice", "setup.lock"):
                child.unlink()
        elif child.name != "wheels":
            shutil.rmtree(child)


def remember(asked: str) -> None:
    """Keep what BORT_MXNET asks for; "auto" forgets it."""
    if asked == "auto":
        (VENV / "mxnet-choice").unlink(missing_ok=True)
    elif asked:
        (VENV / "mxnet-choice").write_text(f"{asked}\n", encoding="utf-8")


def fill(variant: str) -> None:
    """Make .venv or keep it, install the packages, and check that MXNet loads."""
    kept = prepare(variant)
    remember(os.environ.get("BORT_MXNET", ""))
    # NVIDIA's container brings an MXNet and versions of its own.
    tried = [] if variant == "system" else ["-c", str(TRIED_VERSIONS)]
    extras = "dev" if variant == "system" else f"{variant},dev"
    install("installing the build tools", "-r", str(BUILD_TOOLS), *tried)
    # Without isolation GluonNLP is compiled by the Cython just installed.
    packages = ["--no-build-isolation", "-e", f"{ROOT}[{extras}]", *tried]
    size = " (2 GB to download)" * (variant == "cu117")
    install(f"installing the packages, MXNet for {variant}{size}", *packages)
    write_hook()
    loaded = run(PY, "-c", "import mxnet, gluonnlp")
    if loaded.returncode and kept:
        say("what an earlier set-up left does not load; making a new .venv")
        (VENV / "made-for").write_text("", encoding="utf-8")
        fill(variant)
    elif loaded.returncode:
        hints = {
            "cu101": ". It needs CUDA 10.1, cuDNN 7 and NCCL 2 on LD_LIBRARY_PATH; with a newer"
            " driver use BORT_MXNET=cu117",
            "system": f". BORT_MXNET=system is for {CONTAINER}",
        }
        die(f"MXNet does not load: {last_line(loaded.stderr)}{hints.get(variant, '')}")


def write_hook() -> None:
    """Prepare MXNet's import in every Python that starts here: horovodrun imports it before us.

    A copy of bort/mxnet_setup.py is loaded, under a name of its own. Importing `bort` instead would
    run this checkout's code in the programs of another checkout.
    """
    (PACKAGES / "bort.pth").unlink(missing_ok=True)  # of an older set-up, imported bort
    source = (ROOT / "bort/mxnet_setup.py").read_text(encoding="utf-8")
    start = "import bort_mxnet_hook; bort_mxnet_hook.install()\n"
    for name, text in (("bort_mxnet_hook.py", source), ("bort_mxnet_hook.pth", start)):
        file = PACKAGES / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            unfinished = file.with_suffix(f".{os.getpid()}")
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(file)


# ---- Horovod -----------------------------------------------------------------------------------


def nvcc_folder() -> str:
    """Return the folder of an nvcc that has its toolkit beside it, empty when there is none.

    One on the PATH may be a script that calls another; CMake would then look for the headers in the
    wrong place.
    """
    nvcc = shutil.which("nvcc") or ""
    trace = run(nvcc, "--dryrun", "-x", "cu", "/dev/null") if nvcc else None
    top = re.search(r"^#\$ TOP=(.*)$", trace.stderr + trace.stdout, re.MULTILINE) if trace else None
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for folder in (os.path.dirname(nvcc), f"{top[1]}/bin" if top else "", f"{toolkit}/bin"):
        header = os.path.join(folder, "../include/cuda_runtime.h")
        if folder and os.access(f"{folder}/nvcc", os.X_OK) and os.path.isfile(header):
            return folder
    return ""


def horovod_settings(operations: str) -> dict[str, str]:
    """Return the environment variables of Horovod's build."""
    names = "WITH_MXNET WITH_GLOO WITHOUT_MPI WITHOUT_TENSORFLOW WITHOUT_PYTORCH"
    settings = {f"HOROVOD_{name}": "1" for name in names.split()}
    settings["MAKEFLAGS"] = f"-j{os.cpu_count()}"
    nvidia = PACKAGES / "nvidia"
    if nvidia.is_dir():
        # MXNet's headers include cuBLAS's and others, which a toolkit may come without.
        settings["CPLUS_INCLUDE_PATH"] = ":".join(map(str, sorted(nvidia.glob("*/include"))))
    if operations == "nccl":
        settings |= {"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_LINK": "SHARED"}
        capabilities = sorted({found.replace(".", "") for _, found in gpus() if found})
        if capabilities:
            settings["HOROVOD_BUILD_CUDA_CC_LIST"] = ",".join(capabilities)
        if (nvidia / "nccl").is_dir():
            settings["HOROVOD_NCCL_HOME"] = str(VENV / "nccl")
    return settings


def install_horovod(variant: str) -> None:
    """Install Horovod from a wheel that is compiled once and kept."""
    operations = "nccl" if variant.startswith("cu") and nvcc_folder() else "gloo"
    if variant.startswith("cu") and operations == "gloo":
        say(
            "warning: found no CUDA toolkit (nvcc), so Horovod is compiled without NCCL: gradients"
            " of several GPUs go through the host, which is slow. Install the toolkit, then rm"
            " .venv/complete and call this again"
        )
    works = f"{IMPORTS}{' and hvd.nccl_built()' if operations == 'nccl' else ''}"
    if succeeds(PY, "-c", works):
        return
    if variant == "system":
        die(f"this Python brings no Horovod for MXNet; use {CONTAINER}")
    # The wheel knows the path of the MXNet it was linked to.
    place = hashlib.sha256(str(ROOT).encode()).hexdigest()[:10]
    folder = VENV / "wheels" / f"{variant}-{operations}-{place}"
    pattern = f"horovod-{HOROVOD}-cp{VERSION.replace('.', '')}-*.whl"
    if not any(folder.glob(pattern)):
        compile_horovod(variant, operations, folder)
    wheel = str(next(folder.glob(pattern)))
    install("installing Horovod", "--no-deps", "--force-reinstall", wheel)
    loaded = run(PY, "-c", works)
    if loaded.returncode:
        hint = "try: rm -rf .venv/wheels, and call this again"
        die(f"Horovod was compiled but does not load; {hint}. {last_line(loaded.stderr)}")


def compile_horovod(variant: str, operations: str, folder: Path) -> None:
    """Compile Horovod's wheel into `folder`."""
    work = VENV / "wheels/unfinished"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    version = re.search(r"version 3\.(\d+)", run("cmake", "--version").stdout)
    if not version or int(version[1]) < 13:
        install("installing CMake", "cmake>=3.13,<4")  # 4 refuses Gloo's lists
    path = [str(VENV / "bin"), os.environ.get("PATH", "")]
    if variant.startswith("cu"):
        path.insert(1, nvcc_folder() or fetch_nvcc(variant, work / "nvcc"))
    if operations == "nccl":
        link_nccl()
    # No cache: pip's does not know which MXNet a wheel was compiled for.
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-binary", "horovod"]
    command = [PY, "-m", "pip", "wheel", "-v", *options, "--wheel-dir", str(work)]
    what = f"compiling Horovod {HOROVOD} for {variant} with {operations} (1 to 3 minutes)"
    settings = {**horovod_settings(operations), "PATH": ":".join(path)}
    step(what, [*command, f"horovod=={HOROVOD}"], **settings)
    folder.mkdir(exist_ok=True)
    for wheel in work.glob("horovod-*.whl"):
        wheel.replace(folder / wheel.name)
    shutil.rmtree(work)


def link_nccl() -> None:
    """Give NCCL's wheel the name libnccl.so, which a linker looks for."""
    nccl = PACKAGES / "nvidia/nccl"
    if nccl.is_dir():
        shutil.rmtree(VENV / "nccl", ignore_errors=True)
        (VENV / "nccl/lib").mkdir(parents=True)
        (VENV / "nccl/include").symlink_to(nccl / "include")
        (VENV / "nccl/lib/libnccl.so.2").symlink_to(nccl / "lib/libnccl.so.2")
        (VENV / "nccl/lib/libnccl.so").symlink_to("libnccl.so.2")


def fetch_nvcc(variant: str, folder: Path) -> str:
    """Install nvcc for the compilation only; return the folder of the program."""
    if variant != "cu117":
        die(f"found no nvcc; Horovod for mxnet-{variant} needs the CUDA toolkit of that version")
    install(
        "fetching nvcc, for the compilation only",
        "--no-deps",
        "--target",
        str(folder),
        *NVCC.split(),
    )
    toolkit = folder / "nvidia/cu13"
    (toolkit / "lib64").symlink_to("lib")
    (toolkit / "lib/libcudart.so").symlink_to("libcudart.so.13")
    return str(toolkit / "bin")


# ---- all of it ---------------------------------------------------------------------------------


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
    """Do all the work."""
    variant = mxnet_variant(choice)
    for gpu in unserved(gpus()) if variant == "cu117" else []:
        say(f"warning: mxnet-cu117 has no code for {gpu} and fails there at its first kernel")
    check_compiler()
    fill(variant)
    # Horovod opens libcuda.so, a name that some drivers' packages leave out; MXNet's folder is
    # where its run path leads.
    link = str(PACKAGES / "mxnet/libcuda.so")
    if variant.startswith("cu") and not succeeds(PY, "-c", LIBCUDA, link):
        die("libcuda.so.1, which comes with the NVIDIA driver, cannot be loaded")
    install_horovod(variant)
    (VENV / "complete").write_text(fingerprint(choice), encoding="utf-8")


def main() -> None:
    """Make .venv, or find it complete."""
    for name in ("PIP_TARGET", "PIP_USER", "VIRTUAL_ENV"):  # packages would go elsewhere
        os.environ.pop(name, None)
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    asked = os.environ.get("BORT_MXNET", "")
    choice = mxnet_choice(asked)
    if is_foreign():
        check_foreign(asked, os.environ.get("PYTHON", ""))
        say("ready: .venv, used as it is")
        return
    if complete(choice):
        write_hook()
    else:
        with lock():
            if not complete(choice):
                set_up(choice)
    variant = marker("made-for").rpartition(" ")[2]
    say(f"ready: .venv, Python {VERSION}, MXNet for {variant}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
