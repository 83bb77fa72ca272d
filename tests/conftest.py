"""Fixtures that several test modules share."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Prepare the stack before any test module imports MXNet, even where no .pth file does.

    One OpenMP thread, unless the variable is set: bits depend on the number of threads. Bytecode is
    kept, as hundreds of processes import the same modules. Python looks for unreachable cycles less
    often, which took a twentieth of the time.
    """
    import bort  # noqa: F401

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    gc.set_threshold(50_000)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run chosen files, tests and markers in this process, as starting workers takes seconds."""
    chosen = not config.option.markexpr.startswith("not ")
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return 0 if chosen or not whole else None


@pytest.fixture(scope="session", autouse=True)
def files_stay_in_memory() -> Iterator[None]:
    """Let os.fsync return at once: the disk is a fifth of the time, and no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.fstat(file) and None)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real corpora and vocabularies, which are too large for this repository.

    The environment variable BORT_SHARED names it; tests that need it are skipped without it.
    """
    path = Path(os.environ.get("BORT_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"{path} is absent; BORT_SHARED names the folder of real corpora")
    return path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which every Matplotlib figure that is saved is added."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    saved, savefig = [], figure.Figure.savefig

    def keep(self: Any, *given: Any, **named: Any) -> Any:
        saved.append(self)
        return savefig(self, *given, **named)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    return saved


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept --dtype bfloat16 on every processor that can compute it, if only by emulation."""
    from bort import devices, processor

    if not processor.computes_bfloat16():
        pytest.skip("oneDNN computes in bfloat16 on processors with AVX-512 only")
    for module in (devices, processor):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)


@pytest.fixture
def tiny_model() -> Any:
    """Return a Bort with decoder, small enough for anything: vocabulary 50, all values drawn."""
    import bort.bort
    from tests.reference import redraw

    model, _ = bort.bort.get_bort_model("bort_2_4_24_32", vocab=range(50))
    redraw(model, seed=5)
    return model
