"""Sweeps, with a stand-in for finetune_classifier.py; and one with the program itself."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bort.errors import UserError
from bort.files import lock_folder, read_json
from bort.finetuning import sweep as module
from bort.finetuning.config import (
    ClassifierSettings,
    FinetuningOptimizerSettings,
    FinetuningRunSettings,
)
from bort.finetuning.search_space import read_space
from bort.jobs import ProcessDiedError, Serial
from scripts import sweep
from tests.finetuning.helpers import arguments, write_reviews
from tests.test_jobs import gone

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "scripts/agora_spaces/published.yaml"
DEFAULTS = (ClassifierSettings(), FinetuningOptimizerSettings(), FinetuningRunSettings())

pytestmark = pytest.mark.integration

# Writes what a run leaves; its score is 10 lr + seed / 100. Fails or waits where a file says so.
PROGRAM = """
import json, os, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
flags.update({"--resume": "--resume" in sys.argv})
words = [one for one in sys.argv[1:] if one != "--resume"]
flags.update(zip(words[::2], words[1::2]))
here = os.path.dirname(os.path.abspath(__file__))
lr, seed = float(flags["--lr"]), int(flags.get("--seed", 0))
def note(word):
    with open(os.path.join(here, "calls"), "a") as calls:
        call = {"what": word, "lr": lr, "seed": seed, "resume": flags["--resume"],
                "pid": os.getpid(), "gpus": flags.get("--gpus"),
                "weights": flags.get("--pretrained_parameters"),
                "threads": os.environ["OMP_NUM_THREADS"]}
        calls.write(json.dumps(call) + "\\n")
def stop(*_):
    note("stopped")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
note("start")
print("a run says something")
sys.stdout.flush()
if os.path.exists(os.path.join(here, f"fail-{lr:g}")):
    sys.exit("error: --lr is not to the program's taste")
for _ in range(int(100 * float(os.environ.get("WAIT", 0)))):
    with open(os.path.join(here, "calls")) as calls:
        if calls.read().count('"start"') >= int(os.environ.get("TOGETHER", 99)):
            break
    time.sleep(0.01)
folder = os.path.join(flags["--output_dir"], "SST-2")
os.makedirs(os.path.join(folder, "tokenizer"))
for name in ("best.params", "best.json", "SST-2.tsv"):
    open(os.path.join(folder, name), "w").close()
with open(os.path.join(folder, "metrics.json"), "w") as handle:
    json.dump({"best": {"score": 10 * lr + seed / 100}, "seconds": 2.0}, handle)
note("end")
"""


class Sweep:
    """A grid and a stand-in for the program in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "program.py"
        self.program.write_text(PROGRAM)
        self.results = folder / "out" / "SST-2-sweep"

    def flags(self, *others: str, **grid: list) -> list[str]:
        path = self.folder / "grid.yaml"
        path.write_text("".join(f"{name}: {values}\n" for name, values in grid.items()))
        fixed = ["--task", "SST", "--grid", str(path), "--output_dir", str(self.folder / "out")]
        return [*fixed, "--data_dir", str(ROOT / "test_data"), *others]

    def calls(self, what: str) -> list[dict]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [call for call in map(json.loads, lines) if call["what"] == what]

    def weights(self) -> list[str]:
        return sorted(path.parts[-3] for path in self.results.rglob("best.params"))


@pytest.fixture
def tried(tmp_path, monkeypatch) -> Sweep:
    made = Sweep(tmp_path)
    monkeypatch.setattr(module, "PROGRAM", made.program)
    return made


@pytest.fixture
def in_process(tried, monkeypatch) -> Sweep:
    """Run the stand-in in this process: a new one takes a quarter of a second to start."""

    def become(words: list[str], log: str) -> None:
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(words[0])
        raise ProcessDiedError(0)

    monkeypatch.setattr(module.jobs, "become_program", become)
    monkeypatch.setattr(module, "executor_of", lambda *_: Serial())
    return tried


def test_table_has_means_and_spreads_over_seeds(in_process, capsys):
    rows = sweep.main(in_process.flags(seed=[0, 1, 4], lr=["1e-2", 0.03]))
    assert [row.values for row in rows] == [{"lr": 0.03}, {"lr": 0.01}]
    expected = np.array([0.30, 0.31, 0.34])
    assert rows[0].scores == pytest.approx(expected)
    assert rows[0].mean == pytest.approx(expected.mean())
    assert rows[0].spread == pytest.approx(expected.std(ddof=1))
    table = (
        "lr\truns\tmean\tspread\tbest\tseconds\n"
        "0.03\t3\t0.3167\t0.0208\t0.3400\t6\n"
        "0.01\t3\t0.1167\t0.0208\t0.1400\t6\n"
    )
    assert (in_process.results / "sweep.tsv").read_text() == table
    markdown = (in_process.results / "sweep.md").read_text()
    assert "| 0.03 | 3 | 0.3167 | 0.0208 | 0.3400 | 6 |\n" in markdown
    assert capsys.readouterr().out.endswith(markdown)


def test_only_the_best_run_keeps_its_weights(in_process, capsys):
    sweep.main(in_process.flags(seed=[0, 1], lr=[0.02, 0.01]))
    assert in_process.weights() == ["seed=1,lr=0.02"]
    shown = "the best run, whose weights are kept: "
    assert f"{shown}{in_process.results}/seed=1,lr=0.02/SST-2\n" in capsys.readouterr().out
    kept = in_process.results / "seed=0,lr=0.01" / "SST-2"
    assert {path.name for path in kept.iterdir()} == {"metrics.json", "SST-2.tsv"}


def test_ended_runs_are_skipped(in_process, capsys):
    sweep.main(in_process.flags(seed=[0], lr=[0.01]))
    (in_process.results / "seed=0,lr=0.03").mkdir()  # what a killed sweep left
    capsys.readouterr()
    rows = sweep.main(in_process.flags(seed=[0, 1], lr=[0.01, 0.03]))
    assert [len(row.scores) for row in rows] == [2, 2]
    assert "4 runs, 1 already finished" in capsys.readouterr().out
    started = in_process.calls("start")
    assert len(started) == 4
    assert all(call["resume"] for call in started)


def test_runs_with_damaged_metrics_are_repeated_alone(in_process, capsys):
    contents = [b"", b"{", b"\xff", b"[]", b'{"best": {"score": "x"}}']
    rates = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    flags = in_process.flags(seed=[0], lr=rates)
    table = sweep.main(flags)
    damaged = [in_process.results / f"seed=0,lr={r}" / "SST-2" / "metrics.json" for r in rates[:5]]
    for path, content in zip(damaged, contents):
        path.write_bytes(content)
    capsys.readouterr()
    assert sweep.main(flags) == table
    printed = capsys.readouterr()
    for path, content in zip(damaged, contents):
        assert f"warning: {path}: " in printed.err
        assert f"moved to {path}.damaged, the run is repeated" in printed.err
        assert Path(f"{path}.damaged").read_bytes() == content
    assert "6 runs, 1 already finished" in printed.out
    assert [call["lr"] for call in in_process.calls("start")] == [*rates, *rates[:5]]
    assert in_process.weights() == ["seed=0,lr=0.06"]
    sweep.main(flags)
    assert len(in_process.calls("start")) == 11


def test_a_failed_run_leaves_the_others_alone_and_is_tried_again(tried, capsys):
    (tried.folder / "fail-0.01").touch()
    flags = tried.flags(seed=[0, 1], lr=[0.01, 0.02])
    with pytest.raises(SystemExit):
        sweep.main(flags)
    printed = capsys.readouterr()
    assert "seed=0,lr=0.01: failed (error: --lr is not to the program's taste)" in printed.out
    assert "| 0.02 | 2 | 0.2050 |" in printed.out
    assert "| 0.01 | 0 | - | - | - | 0 |" in printed.out
    assert "2 of 4 runs failed" in printed.err
    (tried.folder / "fail-0.01").unlink()
    assert [len(row.scores) for row in sweep.main(flags)] == [2, 2]


@pytest.mark.parametrize("jobs", [1, 2])
def test_jobs_share_cores_and_gpus(tried, jobs, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("bort.jobs.usable_cores", lambda: 6)
    monkeypatch.setattr("bort.jobs.cpu_threads", lambda: 6)
    monkeypatch.setenv("WAIT", "30" if jobs > 1 else "0")
    monkeypatch.setenv("TOGETHER", "2")  # runs that have started let the others end
    flags = ("--jobs", str(jobs), "--gpus", "4,5,6")
    sweep.main(tried.flags(*flags, seed=[0, 1, 2], lr=[0.01]))
    lines = [json.loads(line)["what"] for line in (tried.folder / "calls").read_text().splitlines()]
    together = np.cumsum([1 if what == "start" else -1 for what in lines])
    assert together.max() == jobs
    started = tried.calls("start")
    assert {call["threads"] for call in started} == {str(6 // jobs)}
    assert {call["gpus"] for call in started} == ({"4,5,6"} if jobs == 1 else {"4", "5"})


def test_more_jobs_than_gpus_and_threads_of_the_user(tried, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("WAIT", "0.1")
    sweep.main(tried.flags("--jobs", "3", "--gpus", "1,2", seed=[0, 1, 2], lr=[0.01]))
    assert sorted(call["gpus"] for call in tried.calls("start")) == ["1", "1", "2"]
    assert {call["threads"] for call in tried.calls("start")} == {"5"}


def test_a_run_that_was_killed_is_named_with_the_reason(in_process, monkeypatch, capsys):
    """Its log ends with a line about its training."""

    def killed(*_):
        raise ProcessDiedError(-signal.SIGKILL)

    monkeypatch.setattr(module.jobs, "become_program", killed)
    with pytest.raises(SystemExit):
        sweep.main(in_process.flags(lr=[0.01]))
    said = capsys.readouterr().err
    assert "error: lr=0.01: a worker process was killed, as the system does when memory" in said


def test_an_interrupted_sweep_lets_its_runs_save(tried):
    grid = tried.flags("--jobs", "2", seed=[0, 1, 2], lr=[0.01])
    code = (
        "import sys; from pathlib import Path; from bort.finetuning import sweep as module\n"
        f"module.PROGRAM = Path({str(tried.program)!r})\n"
        "from scripts import sweep; sweep.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *grid]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "WAIT": "60"})
    try:
        for _ in range(200):
            time.sleep(0.05)
            if (tried.folder / "calls").exists() and len(tried.calls("start")) == 2:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert len(tried.calls("stopped")) == 2


def start_in_background(tried, *flags):
    code = (
        "import sys; from pathlib import Path; from bort.finetuning import sweep as module\n"
        f"module.PROGRAM = Path({str(tried.program)!r})\n"
        "from scripts import sweep; sweep.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *tried.flags(*flags, seed=[0, 1, 2], lr=[0.01])]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "WAIT": "60"})
    for _ in range(600):
        time.sleep(0.05)
        if (tried.folder / "calls").exists():
            return process
    process.kill()
    raise AssertionError("no run was started")


def test_a_killed_sweep_ends_its_runs(tried):
    process = start_in_background(tried)
    process.kill()
    process.wait()
    (call,) = tried.calls("start")
    assert gone(call["pid"])
    assert tried.calls("stopped") == []


def test_a_second_sweep_in_a_folder_is_refused(tried, capsys):
    process = start_in_background(tried)
    with pytest.raises(SystemExit):
        sweep.main(tried.flags(seed=[0], lr=[0.01]))
    assert f"process {process.pid} on " in capsys.readouterr().err
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert len(tried.calls("start")) == 1


def test_values_that_share_six_digits_are_different_runs(in_process):
    big = [20201023, 20201024, 9007199254740993, 9007199254740992]
    (row,) = sweep.main(in_process.flags(seed=big, lr=[0.01]))
    assert len(row.scores) == 4
    assert sorted(call["seed"] for call in in_process.calls("start")) == sorted(big)
    names = {path.name for path in in_process.results.iterdir() if path.is_dir()}
    assert names == {f"seed={seed},lr=0.01" for seed in big}
    rows = sweep.main(in_process.flags(seed=[0], lr=[0.1234567, 0.1234568]))
    assert [row.values["lr"] for row in rows] == [0.1234568, 0.1234567]


def test_a_name_that_no_folder_can_have_is_refused(in_process, capsys):
    names = ("lr", "weight_decay", "warmup_ratio", "dropout", "prob", "max_norm", "epsilon")
    grid = {name: [0.12345678901234567] for name in names}
    more = {name: [1] for name in ("batch_size", "accumulate", "num_buckets", "dev_batch_size")}
    with pytest.raises(SystemExit):
        sweep.main(in_process.flags(**grid, **more, seed=[0]))
    assert "longer than 255 characters; give flags with one value" in capsys.readouterr().err
    assert not in_process.results.exists()
    sweep.main(in_process.flags(**grid, **more))
    assert len(in_process.calls("end")) == 1


@pytest.mark.parametrize("value", [0, 7, 20201023, 2**63, 1e-4, 9e-6, 0.1, 1 / 3, 1e22, 0.1234567])
def test_names_read_back_as_the_value(value):
    assert type(value)(module.spelled(value)) == value


def test_a_run_under_its_shortened_name_is_resumed(in_process, capsys):
    """Earlier versions named the folder of seed 1234567 `seed=1.23457e+06`."""
    sweep.main(in_process.flags(seed=[1234567], lr=[0.01]))
    short = in_process.results / "seed=1.23457e+06,lr=0.01"
    (in_process.results / "seed=1234567,lr=0.01").rename(short)
    config = {"FinetuningRunSettings": {"seed": 1234567}, "Optimizer": {"lr": 0.01}}
    (short / "SST-2" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    sweep.main(in_process.flags(seed=[1234567, 1234568], lr=[0.01]))
    assert "2 runs, 1 already finished" in capsys.readouterr().out
    assert [call["seed"] for call in in_process.calls("start")] == [1234567, 1234568]


def test_weights_that_a_kill_left_are_deleted_at_the_next_call(in_process):
    flags = in_process.flags(seed=[0, 1], lr=[0.01])
    sweep.main(flags)
    assert in_process.weights() == ["seed=1,lr=0.01"]
    (in_process.results / "seed=0,lr=0.01" / "SST-2" / "best.params").touch()
    sweep.main(flags)
    assert in_process.weights() == ["seed=1,lr=0.01"]


def test_a_checkpoint_that_a_kill_left_is_deleted_at_the_next_call(in_process):
    flags = in_process.flags(seed=[0, 1], lr=[0.01])
    sweep.main(flags)
    left = [in_process.results / f"seed={n},lr=0.01" / "SST-2" / "step-0000003" for n in (0, 1)]
    for folder in left:
        folder.mkdir()
    with lock_folder(str(left[1].parent)):  # by a run that has not ended
        sweep.main(flags)
    assert [folder.exists() for folder in left] == [False, True]


def test_other_spellings_of_the_paths_resume_the_sweep(in_process, monkeypatch, capsys):
    write_reviews(in_process.folder / "data")
    monkeypatch.chdir(in_process.folder)
    fixed = ["--task", "SST", "--grid", "grid.yaml"]
    in_process.flags(seed=[0], lr=[0.01])

    def call(output, data, cache, home=in_process.folder):
        capsys.readouterr()
        argv = [*fixed, "--output_dir", output, "--data_dir", data, "--cache_dir", cache]
        sweep.main(argv)
        assert "1 runs, 1 already finished" in capsys.readouterr().out

    sweep.main([*fixed, "--output_dir", "o", "--data_dir", "data"])
    call("o/", "./data/", "elsewhere")
    call(str(in_process.folder / "o"), str(in_process.folder / "data"), "cache")
    os.rename("o", "moved")
    call("moved", "data", "cache")
    (in_process.folder / "new").mkdir()
    os.rename("data", "new/data")
    call("moved", "new/data", "cache")
    with pytest.raises(SystemExit):
        call("moved", "new", "cache")
    assert "another --data_dir" in capsys.readouterr().err


def test_a_sweep_belongs_to_its_rows_and_not_to_where_they_are(in_process, monkeypatch, capsys):
    write_reviews(in_process.folder / "one")
    write_reviews(in_process.folder / "other", dev=18)
    grid = in_process.flags(seed=[0], lr=[0.01])
    fixed = [*grid[: grid.index("--data_dir")], *grid[grid.index("--data_dir") + 2 :]]
    monkeypatch.chdir(in_process.folder / "one")
    sweep.main([*fixed, "--data_dir", "."])
    monkeypatch.chdir(in_process.folder / "other")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        sweep.main([*fixed, "--data_dir", "."])
    assert "contains a sweep on other rows; restore them" in capsys.readouterr().err
    sweep.main([*fixed, "--data_dir", "../one"])
    assert "1 runs, 1 already finished" in capsys.readouterr().out


def test_a_sweep_belongs_to_the_weights_that_it_starts_from(in_process, capsys):
    """Of a pretraining run, which is still training, the newest checkpoint is taken."""
    weights = in_process.folder / "body.params"
    weights.write_bytes(b"one")
    given = ("--pretrained_parameters", str(weights))
    sweep.main(in_process.flags(*given, seed=[0], lr=[0.01]))
    weights.write_bytes(b"other")
    with pytest.raises(SystemExit):
        sweep.main(in_process.flags(*given, seed=[0, 1], lr=[0.01]))
    assert "contains a sweep from other weights of the same name" in capsys.readouterr().err
    assert len(in_process.calls("start")) == 1
    weights.unlink()
    sweep.main(in_process.flags(*given, seed=[0], lr=[0.01]))
    assert "1 runs, 1 already finished" in capsys.readouterr().out
    weights.write_bytes(b"one")
    sweep.main(in_process.flags(*given, seed=[0, 1], lr=[0.01]))
    assert len(in_process.calls("start")) == 2


def test_all_runs_of_a_sweep_start_from_one_checkpoint(in_process):
    """As a run in training moves `checkpoint_last`, this link may be moved between two runs."""
    weights = in_process.folder / "first" / "body.params"
    weights.parent.mkdir()
    weights.touch()
    link = in_process.folder / "newest"
    link.symlink_to("first", target_is_directory=True)
    sweep.main(in_process.flags("--pretrained_parameters", str(link), seed=[0, 1], lr=[0.01]))
    assert [call["weights"] for call in in_process.calls("start")] == [str(weights)] * 2
    recorded = read_json(str(in_process.results / "sweep.json"))
    assert recorded["pretrained_parameters"] == str(link)


def test_a_sweep_is_resumed_from_its_checkpoint_by_name(in_process, capsys):
    """The run that is named has trained on since; its newest checkpoint is another one."""
    for name in ("step-1", "step-2"):
        (in_process.folder / name).mkdir()
        (in_process.folder / name / "body.params").write_text(name)
    link = in_process.folder / "newest"
    link.symlink_to("step-1", target_is_directory=True)
    sweep.main(in_process.flags("--pretrained_parameters", str(link), seed=[0], lr=[0.01]))
    link.unlink()
    link.symlink_to("step-2", target_is_directory=True)
    wider = {"seed": [0, 1], "lr": [0.01]}
    for other in (link, in_process.folder / "step-2"):
        with pytest.raises(SystemExit):
            sweep.main(in_process.flags("--pretrained_parameters", str(other), **wider))
        assert "contains a sweep " in capsys.readouterr().err
    first = str(in_process.folder / "step-1")
    with pytest.raises(SystemExit):  # what else the file is taken for
        sweep.main(in_process.flags("--model_parameters", first, **wider))
    assert "contains a sweep with another --pretrained_parameters" in capsys.readouterr().err
    sweep.main(in_process.flags("--pretrained_parameters", first, **wider))
    assert {call["weights"] for call in in_process.calls("start")} == {f"{first}/body.params"}


def test_a_broken_test_file_is_found_before_any_run(tried, tmp_path, capsys):
    folder = write_reviews(tmp_path / "data") / "SST-2"
    (folder / "test.tsv").write_text("index\tsentence\n0\tfine\n1\n")
    with pytest.raises(SystemExit):
        sweep.main(tried.flags("--data_dir", str(tmp_path / "data"), lr=[0.1, 0.2]))
    assert "test.tsv:3: expected 2 columns, found 1" in capsys.readouterr().err
    assert not (tmp_path / "calls").exists()
    assert not tried.results.exists()


def test_another_sweep_is_refused(in_process, capsys):
    sweep.main(in_process.flags("--epochs", "3", seed=[0], lr=[0.01]))
    with pytest.raises(SystemExit):
        sweep.main(in_process.flags("--epochs", "4", seed=[0, 1], lr=[0.01]))
    assert "contains a sweep with another --epochs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sweep.main(in_process.flags("--only_inference", seed=[0], lr=[0.01]))
    assert "unrecognized arguments: --only_inference" in capsys.readouterr().err
    # What a run that has run out of memory, or whose gradient is not finite, asks for.
    cures = ("--dev_batch_size", "8", "--on_nonfinite", "skip")
    sweep.main(in_process.flags("--epochs", "3", *cures, seed=[0], lr=[0.01]))
    assert len(in_process.calls("start")) == 1


def test_a_sweep_is_not_resumed_with_other_numbers_of_gpus(in_process, capsys):
    """A run on two GPUs takes twice as many examples in an update as one on a single GPU."""
    sweep.main(in_process.flags("--jobs", "2", "--gpus", "0,1,2,3", seed=[0], lr=[0.01]))
    wider = {"seed": [0, 1], "lr": [0.01]}
    with pytest.raises(SystemExit):
        sweep.main(in_process.flags("--jobs", "4", "--gpus", "0,1,2,3", **wider))
    assert "runs had 2 GPU(s) each, now 1: their updates" in capsys.readouterr().err
    sweep.main(in_process.flags("--gpus", "4,5", **wider))
    sweep.main(in_process.flags(**wider))  # all have finished: the table needs no GPUs
    assert len(in_process.calls("start")) == 2


def test_a_grid_in_between_does_not_hide_the_flags_of_the_first(in_process, capsys):
    sweep.main(in_process.flags("--epochs", "1", lr=[0.01]))
    sweep.main(in_process.flags("--epochs", "1", lr=[0.01], epochs=[2]))
    with pytest.raises(SystemExit):  # 10 epochs, which is the default
        sweep.main(in_process.flags(lr=[0.01]))
    assert "contains a sweep with another --epochs" in capsys.readouterr().err
    sweep.main(in_process.flags("--epochs", "1", lr=[0.01, 0.02]))


def test_a_flag_that_was_varied_may_be_given_later(in_process, capsys):
    sweep.main(in_process.flags(lr=[0.01], epochs=[1, 2]))
    sweep.main(in_process.flags("--epochs", "2", lr=[0.01]))
    sweep.main(in_process.flags(lr=[0.01], epochs=[1, 2]))
    with pytest.raises(SystemExit):
        sweep.main(in_process.flags("--epochs", "1", lr=[0.01]))
    assert "contains a sweep with another --epochs" in capsys.readouterr().err


def test_published_space():
    sets = read_space(str(PUBLISHED), *DEFAULTS)
    assert len(sets) == 480  # README of the original
    assert {one["lr"] for one in sets} == {1e-4, 1e-5, 9e-6}
    assert {one["weight_decay"] for one in sets} == {0, 10, 100, 350}
    assert {one["warmup_ratio"] for one in sets} == {0.35, 0.4, 0.45, 0.5}
    assert {one["batch_size"] for one in sets} == {8, 16}
    assert {one["seed"] for one in sets} == set(range(5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: [1e-4, 1e-3]\nlearning: [1]", "learning: unknown; known are dropout"),
        ("task_name: [CB]", "task_name: unknown"),
        ("lr: 1e-4", "must be lines of a name and a list"),
        ("lr: []", "must be lines of a name and a list"),
        ("- lr", "must be lines of a name and a list"),
        ("lr: [high]", "lr: 'high' is not a float"),
        ("batch_size: [8.5]", "batch_size: 8.5 is not an int"),
        ("seed: [true]", "seed: True is not an int"),
        ("lr: [.nan]", "lr: nan is not a float"),
        ("warmup_ratio: [0.5, 1.5]", "--warmup_ratio 1.5: must be at most 1.0"),
        ("lr: [1", "is not YAML"),
        ("seed: [1]\nlr: [1]\nseed: [2]", "is on line 1 and again on line 3"),
        ("seed: [9007199254740993.5]", "is not an int"),
        (f"seed: [{2**63}]", "has more than 63 bits"),
        (
            "".join(f"{n}: {list(range(1, 60))}\n" for n in ("epochs", "seed", "batch_size")),
            "205,379 combinations; at most 10,000 are allowed",
        ),
        ("lr: ['\xe4']", "lr: 'ä' is not a float"),
        ("epochs: [1, 2]\ntraining_steps: [9]", "epochs: has no effect with training_steps; leave"),
    ],
)
def test_invalid_grids_are_refused(tmp_path, content, message):
    path = tmp_path / "grid.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_space(str(path), *DEFAULTS)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_value_counts_once_and_the_last_name_changes_fastest(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("seed: [1, 0]\nlr: [1e-3, 0.001, 2e-3]\n")
    found = [(one["seed"], one["lr"]) for one in read_space(str(path), *DEFAULTS)]
    assert found == [(1, 1e-3), (1, 2e-3), (0, 1e-3), (0, 2e-3)]
    with pytest.raises(UserError, match="cannot be read"):
        read_space(str(tmp_path / "missing.yaml"), *DEFAULTS)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("epochs", ("--training_steps", "9")),
        ("prob", ("--model_parameters", "runs/CB")),
        ("cpu_contexts", ("--gpus", "0")),
    ],
)
def test_a_grid_of_a_flag_without_effect_is_refused(in_process, capsys, name, flags):
    with pytest.raises(SystemExit):
        sweep.main(in_process.flags(*flags, lr=[0.01], **{name: [1, 2]}))
    said = capsys.readouterr().err
    assert f"grid.yaml: {name}: has no effect with {flags[0][2:]}; leave one of them out" in said
    assert not in_process.results.exists()


def test_the_program_itself(tmp_path):
    data = write_reviews(tmp_path / "data", train=16, dev=8, test=4)
    grid = tmp_path / "grid.yaml"
    grid.write_text("epochs: [2]\n")
    flags = arguments(data, tmp_path / "out", epochs=None)
    (row,) = sweep.main([*flags, "--grid", str(grid)])
    results = tmp_path / "out" / "SST-2-sweep" / "epochs=2" / "SST-2"
    metrics = read_json(str(results / "metrics.json"))
    assert len(metrics["history"]) == row.values["epochs"] == 2
    assert row.scores == [metrics["best"]["score"]]
    assert (results / "best.params").exists()
