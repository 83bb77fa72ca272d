"""What the pinned stack needs done before `import mxnet`; the only place that knows.

MXNet 1.9.1 predates NumPy 1.24 and the pip packages of CUDA, and it starts half as many OpenMP
threads as the machine has logical CPUs. `install` puts a hook in front of the import of MXNet, so
that the preparation costs nothing to programs that never import it.

`horovodrun` imports MXNet itself, before any code of ours runs. So scripts/setup_env.py copies this
file into the environment as the module `bort_mxnet_hook`, which a .pth file starts with Python.
Hence this file imports nothing of the project.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import sys
from contextlib import suppress
from importlib.abc import MetaPathFinder
from typing import Any

_NUMPY_ALIASES = {
    "bool": bool,
    "int": int,
    "float": float,
    "complex": complex,
    "object": object,
    "str": str,
}
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
# Libraries that only wrap others or need packages outside the set MXNet links to.
_NOT_NEEDED = ("libOpenCL", "libnvblas", "libcufftw", "libcusolverMg")


def restore_numpy_aliases() -> None:
    """Give NumPy 1.24+ back the aliases of Python types that MXNet 1.9.1 still uses."""
    import numpy

    for name, python_type in _NUMPY_ALIASES.items():
        if name not in vars(numpy):
            setattr(numpy, name, python_type)


def preload_cuda() -> None:
    """Load the CUDA libraries that pip installed: libmxnet.so then needs no library path.

    They depend on one another; loading is repeated until a pass loads nothing more.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    waiting = [
        path
        for root in roots
        for path in sorted(glob.glob(os.path.join(root, "*", "lib", "lib*.so.*")))
    ]
    waiting = [path for path in waiting if not os.path.basename(path).startswith(_NOT_NEEDED)]
    progress = True
    while waiting and progress:
        failed = [path for path in waiting if not load_library(path)]
        progress = len(failed) < len(waiting)
        waiting = failed


def load_library(path: str) -> bool:
    """Load a shared library for all that are loaded later; returns whether that worked."""
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def set_threads() -> None:
    """Give each rank of this host its share of the cores, unless the user set OMP_NUM_THREADS.

    GNU OpenMP's threads spin while they wait for one another. Where another program runs on one of
    the cores they wait for long, and a step of training took six times as long; with a shorter
    spin it takes twice as long, and just as long as before on a quiet machine.
    """
    ranks = int(os.environ.get("HOROVOD_LOCAL_SIZE", "1"))
    # MXNet ends the process when the variable is another text than one number.
    os.environ["OMP_NUM_THREADS"] = str(asked_threads() or max(1, usable_cores() // ranks))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def reuse_gpu_memory() -> None:
    """Let MXNet reuse a block of a GPU's memory for arrays of about its size, not of its size only.

    Batches are as wide as their longest sequence: they come in many sizes. Not run on a GPU yet.
    """
    os.environ.setdefault("MXNET_GPU_MEM_POOL_TYPE", "Round")


def keep_freed_memory() -> None:
    """Let glibc keep what MXNet frees on a CPU, instead of returning it to the system.

    MXNet frees every large buffer and allocates it at the next step; the kernel then fills it with
    zeros first, which cost a training step of Bort a tenth of its time. The arenas of single
    threads return large buffers whatever the two thresholds say, hence one arena for all.
    """
    with suppress(OSError, AttributeError):  # another C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def bound_caches() -> None:
    """Let MXNet and oneDNN keep the operators of the last batch or two only, on a CPU.

    They keep a compiled operator for each shape that they have seen. In bfloat16 each holds its own
    float32 buffers: training Bort on batches of 16 x 128 tokens, which come in a hundred lengths,
    grew to 9.0 GB. A step has about a hundred operators, of some eight shapes a kind; to make one
    again takes 0.1 ms.
    """
    os.environ.setdefault("MXNET_MKLDNN_CACHE_NUM", "8")  # of each kind of operator
    os.environ.setdefault("DNNL_PRIMITIVE_CACHE_CAPACITY", "32")


def usable_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def asked_threads() -> int:
    """Return the number of threads in OMP_NUM_THREADS, 0 without a valid one.

    Of a list such as "4,1", for nested parallel regions, the first counts.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def cpu_threads() -> int:
    """Return the number of threads that OMP_NUM_THREADS allows, without it one for each core."""
    return asked_threads() or usable_cores()


def require_docstrings() -> None:
    """Raise `ImportError` under Python's -OO: MXNet builds its own docstrings from others."""
    if sys.flags.optimize > 1:
        raise ImportError(
            "MXNet needs the docstrings that Python's -OO (PYTHONOPTIMIZE=2) removes; give -O or "
            "no such option",
            name="mxnet",
        )


class _BeforeMXNet(MetaPathFinder):
    """Finds nothing itself; the first search for MXNet is the moment to prepare."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Prepare when MXNet is searched for, then let the other finders find it."""
        if name == "mxnet":
            require_docstrings()
            sys.meta_path.remove(self)
            set_threads()
            keep_freed_memory()
            bound_caches()
            reuse_gpu_memory()
            restore_numpy_aliases()
            preload_cuda()


def install() -> None:
    """Prepare the stack just before the first `import mxnet`; a second call changes nothing.

    A hook that the environment's start-up file installed, perhaps another version's, is replaced.
    """
    name = _BeforeMXNet.__name__
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != name]
    if "mxnet" not in sys.modules:
        sys.meta_path.insert(0, _BeforeMXNet())
