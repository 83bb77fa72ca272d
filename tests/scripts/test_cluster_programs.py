"""Programs with --cluster: they write what they write here, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bort.files import OWN_SUM
from bort.journal import SUM
from tests.agora.test_run_agora import arguments as agora_arguments
from tests.agora.test_run_agora import save
from tests.conftest import ROOT
from tests.finetuning.helpers import arguments as finetuning_arguments
from tests.finetuning.helpers import write_reviews
from tests.nodes import Nodes, wait_until
from tests.pretraining.helpers import write_data
from tests.pretraining.test_teacher_cache import build_line, write_data_and_teachers
from tests.test_jobs import gone

pytestmark = pytest.mark.cluster

# Times, which differ between two runs of the same command, sums over them, and files with times.
CHANGING = ("time", SUM, OWN_SUM)
NOT_COMPARED = (".png", ".log", ".md", "sweep.tsv", "metrics.jsonl", ".lock")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    pytest.importorskip("distributed")
    with Nodes(tmp_path_factory.mktemp("nodes")) as made:
        yield made


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Return the command of each program; it writes to the folder `out` of where it is started."""
    folder = tmp_path_factory.mktemp("inputs")
    write_data(folder / "shards")
    (folder / "space.yaml").write_text("lr: [1e-2, 1e-3]\nbatch_size: [4]\nepochs: [2]\n")
    (folder / "ose.yaml").write_text(
        "architectures: [bort_1_2_8_8, bort_1_2_16_16, bort_2_2_16_16]\n"
    )
    (folder / "grid.yaml").write_text("lr: [1e-2, 1e-3]\n")
    save(folder / "pretrained" / "bort.params", "masked_lm")
    reviews = write_reviews(folder / "data", train=16, dev=8, test=4)
    out = Path("out")
    sweep = finetuning_arguments(reviews, out, epochs=2, cache_dir=folder / "encoded")
    ose = {
        **{"space": folder / "ose.yaml", "data": folder / "shards" / "train"},
        **{"data_eval": folder / "shards" / "test", "batch_size": 4, "steps": 20, "loss": "mlm"},
        **{"sequence_length": 24, "output_dir": out},
    }
    ose_line = [word for name, value in ose.items() for word in (f"--{name}", str(value))]
    text = ROOT / "test_data" / "sample_text.txt"
    (folder / "text.jsonl").write_text('{"text": "A row.\\nTwo sentences."}\n' * 40)
    return {
        "shards": [
            *("create_pretraining_data.py", "--input_file", f"{text},{folder / 'text.jsonl'}"),
            *("--output_dir", "out", "--num_outputs", "5", "--dupe_factor", "2"),
        ],
        "cache": [
            "scripts/build_teacher_cache.py",
            *build_line(write_data_and_teachers(folder / "teacher"), out),
        ],
        "sweep": ["scripts/sweep.py", *sweep, "--grid", str(folder / "grid.yaml")],
        "agora": [
            "scripts/run_agora.py",
            *agora_arguments(folder, "SST-2", out, "--max_rounds", "1"),
        ],
        "ose": ["scripts/run_ose.py", *ose_line],
    }


def start(command, folder, cluster=None):
    folder.mkdir(exist_ok=True)
    program, *flags = command
    more = ["--cluster", cluster] if cluster else []
    return subprocess.Popen(
        [sys.executable, str(ROOT / program), *flags, *more],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def local(commands, tmp_path_factory):
    """Return what a program leaves that runs here; each runs once."""
    known = {}

    def content(name):
        if name not in known:
            folder = tmp_path_factory.mktemp("local") / name
            finish(start(commands[name], folder))
            known[name] = comparable(folder / "out")
        return known[name]

    return content


def comparable(folder):
    """Return the files of a folder without times; the lines of a journal in any order."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith(NOT_COMPARED) and "tfevents" not in path.name:
            found[str(path.relative_to(folder))] = _content(path)
    return found


def _content(path):
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        lines = map(json.loads, path.read_text().splitlines())
        return sorted(json.dumps(without_times(line), sort_keys=True) for line in lines)
    if path.suffix == ".csv":
        return [line.split(",")[:4] for line in path.read_text().splitlines()]
    if path.name == "SHA256SUMS":  # the files themselves are compared, without their times
        return [line.split()[1] for line in path.read_text().splitlines()]
    return path.read_bytes()


def without_times(value):
    if isinstance(value, dict):
        return {
            key: without_times(each)
            for key, each in value.items()
            if key not in CHANGING and "second" not in key and not key.endswith("_share")
        }
    return [without_times(each) for each in value] if isinstance(value, list) else value


def leftovers(folder):
    return [path for path in folder.rglob(".*") if path.name != ".verified.json"]


PROGRAMS = ("shards", "cache", "sweep", "agora", "ose")


def slow_but(*quick):
    """Return the programs, all but these marked as slow: jobs are lost and repeated alike."""
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(name, marks=marks[name in quick]) for name in PROGRAMS]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_bytes_as_here(nodes, commands, local, tmp_path, name):
    finish(start(commands[name], tmp_path, nodes.address))
    assert comparable(tmp_path / "out") == local(name)
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("name", slow_but("shards", "sweep"))
def test_the_same_bytes_after_a_worker_and_a_node_were_killed(commands, local, tmp_path, name):
    pytest.importorskip("distributed")
    with Nodes(tmp_path / "nodes", count=2) as made:
        driver = start(commands[name], tmp_path, made.address)
        wait_until(lambda: len(made.jobs()) == 2, "no jobs")
        jobs = made.jobs()
        os.kill(made.workers(0)[0], signal.SIGKILL)
        made.kill(1)
        finish(driver)
        assert all(gone(pid) for pid in jobs)
    assert comparable(tmp_path / "out") == local(name)
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("name", slow_but("shards", "cache"))
def test_the_same_bytes_after_the_driver_was_killed(nodes, commands, local, tmp_path, name):
    driver = start(commands[name], tmp_path, nodes.address)
    wait_until(nodes.jobs, "no jobs")
    jobs = nodes.jobs()
    driver.kill()
    driver.communicate()
    finish(start(commands[name], tmp_path, nodes.address))
    assert all(gone(pid, 0.5) for pid in jobs)
    assert comparable(tmp_path / "out") == local(name)
    assert leftovers(tmp_path / "out") == []


def test_a_second_driver_in_a_folder_is_refused(nodes, commands, tmp_path):
    first = start(commands["sweep"], tmp_path, nodes.address)
    wait_until(nodes.jobs, "no jobs")
    second = start(commands["sweep"], tmp_path, nodes.address)
    output = second.communicate()[0]
    assert second.returncode == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"process {first.pid} on" in line
    finish(first)


FLAGS = [("sweep", "jobs"), ("agora", "workers"), ("ose", "workers")]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_numbers_of_jobs_here_are_refused(commands, tmp_path, name, flag):
    refused = start([*commands[name], f"--{flag}", "2"], tmp_path, "tcp://localhost:1")
    assert f"error: --{flag} 2: with --cluster its workers say" in refused.communicate()[0]
    assert refused.returncode == 1
