"""--check: what it prints is true, what is wrong is named, and nothing is written."""

from __future__ import annotations

import re
import sys
import types
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from bort.communicator import SingleProcess
from bort.errors import UserError
from bort.pretraining import preflight
from tests import reference
from tests.pretraining.helpers import (
    SHAPE,
    VOCAB_SIZE,
    arguments,
    finished_run,
    horovodrun,
    make_run,
    settings_of_run,
    write_shards,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return a folder with shards in train/ and test/, and a teacher's weights."""
    from bort.bort import get_bort_model
    from bort.parameters import save_parameters

    folder = tmp_path_factory.mktemp("data")
    write_shards(folder / "train", sizes=(11, 5, 9), seed=1)
    write_shards(folder / "test", sizes=(7, 6), seed=2)
    teacher, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE))
    reference.redraw(teacher, seed=3, deviation=0.2)
    save_parameters(teacher, str(folder / "teacher.params"))
    return folder


def checked(capsys, source: Path, folder: Path, status: int = 0, **flags) -> dict[str, str]:
    """Run the program with --check; return {row: value}, the marks of wrong rows in front."""
    from run_pretraining_distillation import main

    capsys.readouterr()
    line = arguments(source, ckpt_dir=folder, check=True, **flags)
    if status:
        with pytest.raises(SystemExit) as stopped:
            main(line)
        assert stopped.value.code == status
    else:
        assert main(line) == []
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert len(errors) == bool(status)
    assert all(error.startswith("error: --check: failed: ") for error in errors)
    lines = captured.out.splitlines()
    assert len({line.index(line[7:].split("  ")[0], 5) for line in lines}) == 1, "aligned"
    return rows_of(lines)


def rows_of(lines: list[str]) -> dict[str, str]:
    found = {}
    for line in lines:
        mark, name, value = re.fullmatch(r"(ok|FAIL) +(\S+(?: \S+)*) {2,}(.*)", line).groups()
        found[name] = value if mark == "ok" else f"FAIL {value}"
    return found


def number(text: str) -> float:
    return float(re.search(r"[\d,.]*\d", text)[0].replace(",", ""))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


def test_a_complete_run_is_described(data, tmp_path, capsys):
    import gluonnlp
    import mxnet

    folder = tmp_path / "new" / "run"
    rows = checked(
        capsys,
        data,
        folder,
        data_eval=data / "test",
        accumulate=2,
        num_steps=10**7,
        teacher_model=SHAPE,
        teacher_ckpt_dir=data / "teacher.params",
    )
    assert not any(value.startswith("FAIL") for value in rows.values())
    assert (rows["MXNet"], rows["GluonNLP"]) == (mxnet.__version__, gluonnlp.__version__)
    assert rows["NumPy"] == np.__version__
    assert rows["sequences"] == "25"
    per_epoch = make_run(data, ckpt_dir=folder).job.stream.source.batches_per_epoch
    assert number(rows["micro-batches per epoch"]) == per_epoch
    assert number(rows["updates per epoch"]) == per_epoch / 2
    assert number(rows["epochs planned"]) == pytest.approx(10**7 * 2 / per_epoch, abs=0.005)
    assert rows["teacher"] == f"{SHAPE}, same vocabulary"
    assert rows["student"].startswith(f"{SHAPE}, 26,045 parameters")
    assert rows["processes"] == "1"
    assert rows["devices per process"] == "cpu(0)"
    hours, seconds = number(rows["to the end"]), number(rows["further updates"])
    assert hours == pytest.approx(seconds * 10**7 / 3600, abs=0.0006 * 10**7 / 3600)
    assert "10,000,000 updates" in rows["to the end"]
    assert number(rows["tokens/s"]) > 0
    threads = number(rows["OpenMP threads"].split(" of ")[0])
    assert number(rows["core-hours"]) == pytest.approx(hours * threads, abs=0.01 * threads)
    assert not (tmp_path / "new").exists(), "nothing is written"


def test_the_speed_is_that_of_the_updates_after_the_first(data, tmp_path, monkeypatch):
    from bort.training.loop import Loop

    clock, calls = [0.0], []

    def step(self, batches):
        calls.append(self.progress.batches)
        clock[0] += 10.0 if len(calls) == 1 else 2.0
        self.progress.batches += self.micro_batches

    monkeypatch.setattr(Loop, "train_step", step)
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: clock[0])
    run = make_run(data, ckpt_dir=tmp_path, accumulate=2)
    first, further, tokens = preflight.time_updates(run)
    assert (first, further) == (10.0, 2.0)
    numbers = range(2, 2 + 2 * preflight.TIMED_UPDATES)
    expected = sum(int(run.job.stream.source(n).valid_length.sum()) for n in numbers)
    assert tokens == expected / preflight.TIMED_UPDATES


def test_the_disk_row_counts_the_bytes_of_real_checkpoints(data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    finished_run(data, ckpt_dir=folder, num_steps=2, ckpt_interval=1)
    real = sum(p.stat().st_size for p in (folder / "step-0000002").iterdir())
    before = everything(folder)
    usage = namedtuple("usage", "total used free")

    def disk_of(free):
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0, 0, free))
        settings = settings_of_run(data, ckpt_dir=folder, resume=True, keep_checkpoints=3)
        return preflight.Preflight(settings, SingleProcess()).check()

    # 3 kept, the best, and the one being written; 2 are there.
    enough = {row.name: row for row in disk_of(3 * real)}
    assert not enough["disk"].failed
    assert "to the end" in enough
    short = {row.name: row for row in disk_of(int(2.9 * real * 0.9))}
    assert short["disk"].failed
    assert "lower --keep_checkpoints" in short["disk"].value
    assert "to the end" not in short
    assert everything(folder) == before


def test_what_a_resumed_run_would_refuse_fails(data, tmp_path, capsys):
    finished_run(data, ckpt_dir=tmp_path, num_steps=1, accumulate=2)
    rows = checked(capsys, data, tmp_path, status=1, resume=True, seed=5, accumulate=2)
    assert rows["networks"].startswith("FAIL --seed 5: the checkpoint was made with 0")
    rows = checked(capsys, data, tmp_path, status=1, resume=True, accumulate=2, cpu_contexts=3)
    assert rows["networks"].startswith("FAIL an update of this run takes 2 micro-batches, too few")


def test_a_resumed_run_has_less_to_do_and_loses_nothing(data, tmp_path, capsys):
    folder = tmp_path / "run"
    finished_run(data, ckpt_dir=folder, num_steps=8, ckpt_interval=4)
    before = everything(folder)
    rows = checked(capsys, data, folder, resume=True)
    assert rows["checkpoints"] == f"{folder}, from step 8"
    assert "12 updates" in rows["to the end"]
    rows = checked(capsys, data, folder, start_step=4)
    assert "16 updates" in rows["to the end"]
    rows = checked(capsys, data, folder, resume=True, num_steps=4)
    assert "0.00 h for 0 updates" in rows["to the end"], "it is past its end"
    # The first 8 updates took one micro-batch, the others are to take two.
    per_epoch = number(rows["micro-batches per epoch"])
    rows = checked(capsys, data, folder, resume=True, accumulate=2)
    assert number(rows["updates per epoch"]) == pytest.approx(per_epoch / 2, abs=0.05)
    planned = (8 + 12 * 2) / per_epoch
    assert number(rows["epochs planned"]) == pytest.approx(planned, abs=0.005)
    assert everything(folder) == before
    rows = checked(capsys, data, folder, status=1)
    assert rows["folder"].startswith("FAIL --ckpt_dir")


@pytest.mark.parametrize(
    ("flags", "row", "what"),
    [
        ({"data": "absent"}, "data", "absent: not found; make the folder with create_p"),
        ({"data_eval": "foreign"}, "data", "made with another tokenizer"),
        ({"gpus": "7"}, "device", "--gpus 7: MXNet sees 0 GPU(s) here"),
        ({"gpus": "x"}, "device", "--gpus x: expected device numbers"),
        ({"teacher_cache": "absent"}, "data", "is not a teacher cache"),
        ({"start_step": 3}, "folder", "has no such checkpoint"),
        (
            {"teacher_model": "bort_1_2_32_16", "teacher_ckpt_dir": "wide.params"},
            "networks",
            "is it of another shape or vocabulary?",
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_started(
    data, tmp_path, monkeypatch, capsys, flags, row, what
):
    from bort.bort import get_bort_model
    from bort.parameters import save_parameters

    monkeypatch.chdir(tmp_path)
    write_shards("foreign", sizes=(3,), seed=1, fingerprint="another")
    wide, _ = get_bort_model("bort_1_2_32_16", vocab=range(VOCAB_SIZE + 1))
    save_parameters(wide, "wide.params")
    rows = checked(capsys, data, tmp_path / "run", status=1, **flags)
    assert rows[row].startswith("FAIL ")
    assert what in rows[row]
    assert list(rows)[-1] == row, "what depends on it is not tried"
    assert not (tmp_path / "run").exists()


def test_updates_that_do_not_fit_into_memory_are_named(data, tmp_path, monkeypatch, capsys):
    from mxnet import MXNetError

    def fail(loop):
        raise MXNetError("Check failed: cudaMalloc retry failed: out of memory")

    monkeypatch.setattr(preflight, "time_updates", fail)
    rows = checked(capsys, data, tmp_path / "run", status=1)
    assert rows["speed"].startswith("FAIL out of memory: lower --batch_size and raise --accumulate")


def test_only_rank_0_reads_checkpoints(data, tmp_path):
    """As in a run: the machines of the other ranks need not have the folder."""
    settings, ranks = settings_of_run(data, ckpt_dir=tmp_path, start_step=2), SingleProcess()
    with pytest.raises(UserError, match="has no such checkpoint"):
        preflight.Preflight(settings, ranks)._folder_rows()
    ranks.rank = 1
    assert not preflight.Preflight(settings, ranks)._folder_rows()[0].failed


def test_an_old_gluonnlp_is_wrong(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight.nlp, "__version__", "0.9.1")
    rows = checked(capsys, data, tmp_path / "run", status=1)
    assert rows["GluonNLP"] == "FAIL 0.9.1, 0.10.* is needed: run scripts/setup_env.sh"


@pytest.mark.distributed
def test_two_ranks_are_checked_together(data, tmp_path):
    line = arguments(data, ckpt_dir=tmp_path / "run", check=True, num_steps=10**7)
    said = horovodrun(2, "python", "run_pretraining_distillation_hvd.py", *line)
    lines = [re.sub(r"^\[0\]<stdout>: ?", "", line) for line in said.splitlines()]
    rows = rows_of([line for line in lines if line.startswith(("ok", "FAIL"))])
    assert rows["processes"] == "2"
    assert rows["Horovod"].endswith(", works")
    assert number(rows["core-hours"]) == pytest.approx(2 * number(rows["to the end"]), rel=1e-3)
    assert sum("core-hours" in line for line in lines) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("built", "said"),
    [(True, ", NCCL, works"), (False, ", without NCCL: GPU gradients go through")],
)
def test_the_way_of_gradients_between_gpus_is_reported(monkeypatch, built, said):
    package = types.ModuleType("horovod")
    package.__version__ = "0.28.1"
    package.mxnet = types.SimpleNamespace(nccl_built=lambda: built)
    monkeypatch.setitem(sys.modules, "horovod", package)
    monkeypatch.setitem(sys.modules, "horovod.mxnet", package.mxnet)
    ranks = SingleProcess()
    ranks.size = 2
    monkeypatch.setattr(ranks, "allreduce", lambda values: values + 2.0, raising=False)
    row = preflight.process_rows(ranks)[0]
    assert said in row.value
    assert not row.failed
