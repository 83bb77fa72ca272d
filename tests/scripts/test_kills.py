"""Programs that run others, killed at any moment: nothing of them is left after seconds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.agora.test_run_agora import arguments, save
from tests.conftest import ROOT
from tests.finetuning.helpers import arguments as finetuning_arguments
from tests.finetuning.helpers import write_reviews
from tests.fuzz.faults import end_session, in_session, waited
from tests.pretraining.helpers import write_data

SECONDS = 15.0  # in which all have to be gone, on a machine that does other work too


def command_of(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return "ended"


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    data = folder / "shards"
    data.mkdir()
    write_data(data)
    (folder / "space.yaml").write_text("lr: [1e-2, 1e-3]\nbatch_size: [4]\nepochs: [300]\n")
    (folder / "ose.yaml").write_text(
        "architectures: [bort_1_2_8_8, bort_1_2_16_16, bort_2_2_16_16]\n"
    )
    (folder / "grid.yaml").write_text("lr: [1e-2, 1e-3]\n")
    save(folder / "pretrained" / "bort.params", "masked_lm")
    reviews = write_reviews(folder / "data", train=16, dev=8, test=4)
    sweep = finetuning_arguments(reviews, folder / "sweep", epochs=300)
    ose = {
        **{"space": folder / "ose.yaml", "data": data / "train", "data_eval": data / "test"},
        **{"batch_size": 4, "steps": 9000, "loss": "mlm", "workers": 2},
        **{"sequence_length": 24, "output_dir": folder / "ose"},
    }
    return {
        "run_agora.py": [*arguments(folder, "SST-2", folder / "agora"), "--workers", "2"],
        "run_ose.py": [word for name, value in ose.items() for word in (f"--{name}", str(value))],
        "sweep.py": [*sweep, "--grid", str(folder / "grid.yaml"), "--jobs", "2"],
    }


def start(commands, name):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / name), *commands[name]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run_agora.py", "run_ose.py", "sweep.py"])
def test_nothing_is_left_of_a_killed_program(commands, name):
    moments = random.Random(1)
    most = 0
    for _ in range(10):
        with start(commands, name) as process:
            time.sleep(moments.uniform(0.5, 12))
            most = max(most, len(in_session(process.pid)))
            process.kill()
        waited(lambda pid=process.pid: not in_session(pid), SECONDS)
        left = [command_of(pid) for pid in in_session(process.pid)]
        end_session(process.pid)
        assert left == []
    assert most >= 3  # the program and two of its jobs


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", ["run_agora.py", "run_ose.py", "sweep.py"])
def test_a_signal_ends_a_program_in_one_line(commands, name, signum, status):
    with start(commands, name) as process:
        assert waited(lambda: len(in_session(process.pid)) >= 3, 300)
        process.send_signal(signum)
        _, error = process.communicate(timeout=300)
    assert process.returncode == status
    lines = [line for line in error.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, error
    assert lines[0].startswith("interrupted")
    assert in_session(process.pid) == []
