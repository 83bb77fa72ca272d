from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bort import mxnet_setup
from tests.conftest import ROOT

VARIABLES = ("OMP_NUM_THREADS", "HOROVOD_LOCAL_SIZE")
HOOKS = "sum(type(finder).__name__ == '_BeforeMXNet' for finder in sys.meta_path)"
# Stands in for MXNet, whose import takes seconds: says what it finds when it is imported.
FAKE_MXNET = f"""
import os, sys, numpy
found = dict(
    threads=os.environ.get("OMP_NUM_THREADS"),
    aliases=[vars(numpy).get(name) is kind for name, kind in
        dict(bool=bool, int=int, float=float, complex=complex, object=object, str=str).items()],
    hooks={HOOKS},
)
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> Any:
    """Return a function that runs code in a bare Python and returns the value it prints as JSON.

    Without site: the virtual environment may install the hook by a .pth file, which is not what
    these tests are about.
    """
    (tmp_path / "mxnet.py").write_text(FAKE_MXNET)
    places = [tmp_path, ROOT, Path(np.__file__).parent.parent]
    clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}

    def run(code: str, **variables: str) -> Any:
        environment = {**clean, "PYTHONPATH": os.pathsep.join(map(str, places)), **variables}
        command = [sys.executable, "-S", "-c", f"import json, os, sys\n{code}"]
        return json.loads(subprocess.check_output(command, env=environment, text=True))

    return run


IMPORT = "import bort, mxnet; print(json.dumps(mxnet.found))"


def cores() -> int:
    return len(os.sched_getaffinity(0))


def test_importing_mxnet_after_bort_prepares_it(interpreter: Any) -> None:
    assert interpreter(IMPORT) == {"threads": str(cores()), "aliases": [True] * 6, "hooks": 0}


@pytest.mark.parametrize(("ranks", "share"), [(1, 1.0), (2, 0.5), (100000, 0.0)])
def test_ranks_on_a_host_share_its_cores(interpreter: Any, ranks: int, share: float) -> None:
    found = interpreter(IMPORT, HOROVOD_LOCAL_SIZE=str(ranks))
    assert found["threads"] == str(max(1, int(cores() * share)))


def test_the_users_number_of_threads_is_kept(interpreter: Any) -> None:
    found = interpreter(IMPORT, OMP_NUM_THREADS="7", HOROVOD_LOCAL_SIZE="2")
    assert found["threads"] == "7"


@pytest.mark.parametrize(
    ("value", "threads"),
    [("2,1", 2), (" 3 ", 3), ("0", None), ("", None), ("x", None), ("-1", None), ("1e9", None)],
)
def test_values_that_mxnet_cannot_read_are_replaced(
    interpreter: Any, value: str, threads: int | None
) -> None:
    found = interpreter(IMPORT, OMP_NUM_THREADS=value)
    assert found["threads"] == str(threads or cores())


def test_without_docstrings_mxnet_is_refused_with_the_reason(interpreter: Any) -> None:
    code = "import bort\ntry:\n    import mxnet\nexcept ImportError as error:\n"
    code += "    print(json.dumps([error.name, str(error)]))"
    name, message = interpreter(code, PYTHONOPTIMIZE="2")
    assert name == "mxnet"
    assert "-OO (PYTHONOPTIMIZE=2)" in message


def test_only_the_cores_this_process_may_use_count(interpreter: Any) -> None:
    pinned = "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    assert interpreter(pinned + IMPORT)["threads"] == "1"


def test_importing_bort_alone_changes_nothing_but_the_hook(interpreter: Any) -> None:
    code = f"import bort\nprint(json.dumps([{HOOKS}, os.environ.get('OMP_NUM_THREADS'), "
    code += "sorted({'mxnet', 'numpy'} & set(sys.modules))]))"
    assert interpreter(code) == [1, None, []]


def test_a_second_call_changes_nothing(interpreter: Any) -> None:
    again = "from bort import mxnet_setup\nmxnet_setup.install()\nmxnet_setup.install()\n"
    assert interpreter(again + f"print({HOOKS})") == 1
    assert interpreter(again + f"import mxnet\nmxnet_setup.install()\nprint({HOOKS})") == 0


def test_a_search_for_another_package_does_not_use_the_hook_up(interpreter: Any) -> None:
    search = "import bort, importlib.util\nimportlib.util.find_spec('mxnet_x')\n"
    assert interpreter(search + f"print({HOOKS})") == 1


def test_this_very_process_was_prepared() -> None:
    import mxnet as mx

    assert mx.nd.ones(1).asscalar() == 1
    assert os.environ["OMP_NUM_THREADS"]
    assert not any(isinstance(finder, mxnet_setup._BeforeMXNet) for finder in sys.meta_path)


@pytest.mark.parametrize(
    ("usable", "ranks", "threads"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 4, 1), (1, 1, 1)]
)
def test_threads_are_cores_by_ranks(
    usable: int, ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxnet_setup, "usable_cores", lambda: usable)
    monkeypatch.setenv("HOROVOD_LOCAL_SIZE", str(ranks))
    # Set first, so that the variable is restored after the test.
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    monkeypatch.delenv("OMP_NUM_THREADS")
    mxnet_setup.set_threads()
    assert os.environ["OMP_NUM_THREADS"] == str(threads)


def test_what_numpy_still_has_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    own = object()
    monkeypatch.setitem(vars(np), "float", own)
    monkeypatch.setitem(vars(np), "bool", None)
    monkeypatch.delitem(vars(np), "bool")
    mxnet_setup.restore_numpy_aliases()
    assert vars(np)["float"] is own
    assert vars(np)["bool"] is bool


# ---- the CUDA libraries of pip -----------------------------------------------------------------


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that lays out pip's CUDA packages with the given libraries."""

    def lay_out(*libraries: str) -> None:
        for library in libraries:
            folder = tmp_path / "nvidia" / library.split(".")[0][3:] / "lib"
            folder.mkdir(parents=True)
            (folder / library).touch()
        # A package with a file of its own hides a real one; without, the two would be merged.
        (tmp_path / "nvidia" / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, "nvidia", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))

    return lay_out


def loader(needs: dict[str, set[str]], loaded: list[str]) -> Any:
    """Return a loader of libraries that need others first; it notes what it loads."""

    def load(path: str) -> bool:
        name = os.path.basename(path)
        if not needs.get(name, set()) <= set(loaded):
            return False
        loaded.append(name)
        return True

    return load


def test_cuda_libraries_are_loaded_in_the_order_they_need(
    packages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages("liba.so.1", "libb.so.1", "libc.so.1")
    loaded: list[str] = []
    needs = {"liba.so.1": {"libb.so.1"}, "libb.so.1": {"libc.so.1"}}
    monkeypatch.setattr(mxnet_setup, "load_library", loader(needs, loaded))
    mxnet_setup.preload_cuda()
    assert loaded == ["libc.so.1", "libb.so.1", "liba.so.1"]


def test_cuda_libraries_that_cannot_be_loaded_are_skipped(
    packages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages("liba.so.1", "libb.so.1", "libOpenCL.so.1", "libnvblas.so.11")
    loaded: list[str] = []
    monkeypatch.setattr(
        mxnet_setup, "load_library", loader({"liba.so.1": {"libmissing.so"}}, loaded)
    )
    mxnet_setup.preload_cuda()
    assert loaded == ["libb.so.1"]


def test_loading_returns_whether_it_succeeded(tmp_path: Path) -> None:
    broken = tmp_path / "libbroken.so.1"
    broken.write_text("not a library")
    assert not mxnet_setup.load_library(str(broken))
    assert mxnet_setup.load_library("libc.so.6")
