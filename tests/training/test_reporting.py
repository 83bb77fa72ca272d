"""Reporting: metrics.jsonl that survives interruptions, TensorBoard, silence off rank 0."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import struct
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from bort.communicator import SingleProcess
from bort.errors import UserError
from bort.files import read_json
from bort.journal import record_of
from bort.reporter import FolderReporter, NullReporter, closing_table
from bort.training.reporting import PhaseTimer

TRAIN = {"loss": 1.25, "tokens_per_second": 1000}


def reporter_in(folder: Path, step: int = 0, **options) -> FolderReporter:
    reporter = FolderReporter(str(folder), SingleProcess(), **options)
    reporter.start({"RunSettings": {"seed": 3}}, step, 100)
    return reporter


@pytest.fixture
def report(tmp_path):
    """Return a function that opens a reporter on the same folder, closing the one before."""
    with ExitStack() as opened:

        def reopen(from_step=0):
            opened.close()
            return opened.enter_context(reporter_in(tmp_path, from_step))

        yield reopen


def steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Read the scalars of all TensorBoard event files: records of length, CRC, event, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + size])
            place += 12 + size + 4
            found.update({(v.tag, event.step): v.simple_value for v in event.summary.value})
    return found


def test_every_line_is_one_object_on_disk_at_once(tmp_path, report):
    before = time.time()
    report().log(5, "train", TRAIN)
    line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert line.endswith("}\n")
    record = record_of(line.encode())
    assert before - 1 < record.pop("time") < time.time() + 1
    assert record == {"step": 5, "phase": "train", **TRAIN}


def test_a_line_on_the_screen_names_step_phase_and_values(report, capsys):
    report().log(1200, "eval", {"mlm_loss": 3.14159, "lr": 0.00001234, "positions": 12.0})
    shown = capsys.readouterr().out
    assert "step    1200  eval  mlm_loss 3.142  lr 1.23e-05  positions 12\n" in shown


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_diverged_run_is_still_reported(tmp_path, report, capsys, value):
    report().log(3, "train", {**TRAIN, "loss": value})
    assert f"loss {value}" in capsys.readouterr().out
    assert steps(tmp_path) == [3]


def test_resuming_removes_lines_written_after_the_checkpoint(tmp_path, report):
    first = report()
    for step in (0, 5, 10, 15, 20):
        first.log(step, "train", TRAIN)
    resumed = report(from_step=10)
    assert steps(tmp_path) == [0, 5, 10]
    resumed.log(15, "train", TRAIN)
    assert steps(tmp_path) == [0, 5, 10, 15]
    report(from_step=0)
    assert steps(tmp_path) == [], "a new run reports everything again"


@pytest.mark.parametrize("torn", ['{"step": 7, "pha', '{"step": 7}', "{"])
def test_a_line_torn_by_a_kill_is_cut_and_the_next_starts_afresh(tmp_path, report, torn):
    whole = json.dumps({"step": 5, "phase": "train", **TRAIN}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(whole + torn, encoding="utf-8")
    report(from_step=9).log(10, "train", TRAIN)
    assert steps(tmp_path) == [5, 10]
    assert not list(tmp_path.glob("*.tmp"))


def test_tensorboard_gets_the_same_values(tmp_path):
    with reporter_in(tmp_path) as reporter:
        reporter.log(5, "train", TRAIN)
        reporter.log(5, "eval", {"kl": 0.75})
    assert scalars(tmp_path) == {
        ("train/loss", 5): 1.25,
        ("train/tokens_per_second", 5): 1000,
        ("eval/kl", 5): 0.75,
    }


def test_tensorboard_needs_no_shared_memory(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("multiprocessing.Queue", refuse)
    with reporter_in(tmp_path) as reporter:
        reporter.log(5, "train", TRAIN)
    assert scalars(tmp_path)[("train/loss", 5)] == 1.25


@contextmanager
def files_of_at_most(size):
    """Let writes beyond a size fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("full", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_ends_the_run_in_one_line(tmp_path, full):
    """SummaryWriter's thread would end with it, and the run would wait for it forever."""
    with reporter_in(tmp_path, quiet=True) as warm_up:  # imports
        warm_up.log(1, "train", TRAIN)
    message = f"{tmp_path}: the metrics cannot be written (File too large); free some space and"
    with files_of_at_most(30_000), pytest.raises(UserError, match=re.escape(message)):
        log_for_long(tmp_path, to_board_alone=full == "tensorboard")


def log_for_long(folder, to_board_alone):
    with reporter_in(folder, quiet=True) as reporter, open(os.devnull, "wb") as nowhere:
        if to_board_alone:
            reporter._lines = nowhere
        for step in range(2, 2000):
            reporter.log(step, "train", TRAIN)


def test_the_closing_table_is_that_of_a_run_that_did_not_fail(tmp_path, capsys):
    for fails in (True, False):
        with suppress(KeyError), reporter_in(tmp_path) as reporter:
            reporter.log(5, "eval", {"kl": 0.75})
            if fails:
                raise KeyError
        assert ("held out" in capsys.readouterr().out) is not fails


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    rank_1 = SingleProcess()
    rank_1.rank = 1
    for silent in (FolderReporter(str(tmp_path), rank_1), NullReporter()):
        silent.start({}, 0, 100)
        with silent:
            silent.advance()
            silent.log(5, "train", TRAIN)
            silent.say("a line")
            silent.save_arrays("batch.npz", {"ids": np.zeros(2)})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_quiet_reporter_writes_its_files_and_prints_nothing(tmp_path, capsys):
    with reporter_in(tmp_path, quiet=True) as reporter:
        reporter.log(5, "train", TRAIN)
        reporter.say("a line")
    assert steps(tmp_path) == [5]
    assert read_json(str(tmp_path / "config.json")) == {"RunSettings": {"seed": 3}}
    assert capsys.readouterr() == ("", "")


def test_the_closing_table_compares_first_and_last_and_takes_medians(tmp_path):
    records = [
        {"step": 0, "phase": "eval", "time": 0, "kl": 2.0},
        *(
            {"step": step, "phase": "train", "tokens_per_second": speed, "student_share": share}
            | {"communication_share": 0.001}
            for step, speed, share in [(1, 10, 0.9), (2, 1000, 0.5), (3, 1200, 0.6)]
        ),
        {"step": 4, "phase": "train", "tokens_per_second": 1100},
        {"step": 3, "phase": "eval", "time": 9, "kl": 0.5},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    lines = closing_table(str(path)).splitlines()
    assert [line.split() for line in lines] == [
        ["held", "out", "step", "0", "now"],
        ["kl", "2.0000", "0.5000"],
        ["tokens/s", "(median)", "1,050"],
        ["time:", "student", "60.0%"],
        ["time:", "communication", "0.1%"],
    ]
    assert {len(line) for line in lines} == {44}


def test_the_closing_table_is_lined_up_for_long_names_too(tmp_path):
    record = {"step": 3, "phase": "eval", "dev_mismatched/accuracy": 0.5, "score": 0.25}
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert closing_table(str(path)).splitlines() == [
        "held out                     step 3         now",
        "dev_mismatched/accuracy      0.5000      0.5000",
        "score                        0.2500      0.2500",
    ]


def test_a_run_that_fails_closes_its_files_without_a_table(tmp_path, capsys):
    def fail():
        with reporter_in(tmp_path) as reporter:
            reporter.log(5, "eval", {"kl": 0.75})
            raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"):
        fail()
    assert "held out" not in capsys.readouterr().out
    assert scalars(tmp_path) == {("eval/kl", 5): 0.75}


def test_the_closing_table_of_a_run_without_metrics_is_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    assert closing_table(str(path)) == ""


def test_the_timer_divides_measured_steps_only():
    timer = PhaseTimer()
    with timer("data"):
        time.sleep(0.01)
    assert timer.shares() == {}
    timer.measured = True
    for _ in range(2):
        with timer("data"):
            time.sleep(0.01)
        with timer("student"):
            time.sleep(0.03)
    shares = timer.shares()
    assert shares.keys() == {"data_share", "student_share"}
    assert sum(shares.values()) == pytest.approx(1)
    assert 0.5 < shares["student_share"] < 0.95
    assert timer.shares() == {}, "the next interval starts from zero"


def test_the_timer_waits_for_what_the_device_still_has_to_do():
    from mxnet import nd

    timer = PhaseTimer()
    timer.measured = True
    big = nd.ones((400, 400))
    nd.waitall()
    with timer("queued"):
        for _ in range(30):
            big = nd.dot(big, big) * 0
    start = time.perf_counter()
    nd.waitall()
    assert time.perf_counter() - start < timer.seconds["queued"]
