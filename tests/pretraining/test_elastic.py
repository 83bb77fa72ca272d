"""A rank is killed: with --elastic training continues, without it the job ends with an error."""

from __future__ import annotations

import re
import shlex
import socket
import textwrap
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from bort.errors import UserError
from bort.files import lock_folder
from tests.pretraining.helpers import (
    arguments,
    assert_same_training,
    finished_run,
    launched,
    write_shards,
)

pytestmark = pytest.mark.distributed

STEPS = 40
# One rank dies, once, in its step 9. While another is alone its steps take longer, so that there is
# still something to do for a worker that rejoins.
MORTAL_PROGRAM = """
    import os, signal, sys, time
    import horovod.mxnet as hvd
    from bort.pretraining import run as pretraining
    from run_pretraining_distillation_hvd import main

    killed_rank, mark = int(sys.argv.pop(1)), sys.argv.pop(1)
    rate_of = pretraining.linear_warmup_decay

    def mortal(step, *rest):
        if step == 9 and hvd.rank() == killed_rank and not os.path.exists(mark):
            open(mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if hvd.size() == 1:
            time.sleep(float(os.environ["SECONDS_ALONE"]))
        return rate_of(step, *rest)

    pretraining.linear_warmup_decay = mortal
    main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return a folder with shards in train/ and test/."""
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder / "train", sizes=(11, 5, 9), seed=1)
    write_shards(folder / "test", sizes=(7, 6), seed=2)
    return folder


def run_flags(data: Path) -> dict[str, object]:
    return {
        "data_eval": data / "test",
        "num_steps": STEPS,
        "log_interval": 3,
        "ckpt_interval": 5,
        "eval_interval": 10,
        "dropout": 0.1,
        "lr": 0.001,
        "seed": 9,
    }


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    """Return the folder of a run in one process, of the global batches of two."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    finished_run(data, ckpt_dir=folder, accumulate=2, **run_flags(data))
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the parameters of the last checkpoint, which has to be that of the last step."""
    from mxnet import nd

    from bort import checkpoint

    found = checkpoint.at_step(str(folder), STEPS)
    return {name: array.asnumpy() for name, array in nd.load(found.model_path).items()}


def mortal_run(
    data: Path, tmp_path: Path, horovodrun_flags: list[str], killed_rank: int, **flags: object
):
    """Train on two ranks, one of which is killed in step 9; checkpoints go to <tmp_path>/run."""
    program = tmp_path / "mortal.py"
    program.write_text(textwrap.dedent(MORTAL_PROGRAM))
    own = [str(program), str(killed_rank), str(tmp_path / "killed")]
    line = arguments(data, ckpt_dir=tmp_path / "run", **run_flags(data), **flags)
    return launched(horovodrun_flags, "python", *own, *line)


def elastic_flags(tmp_path: Path) -> list[str]:
    """Return flags for two hosts, since Horovod gives up the whole host of a worker that died."""
    script = tmp_path / "discover.sh"
    script.write_text(f"#!/bin/sh\necho localhost:1\necho {shlex.quote(socket.gethostname())}:1\n")
    script.chmod(0o755)
    flags = ["-np", "2", "--min-np", "1", "--max-np", "2", "--network-interface", "lo"]
    return [*flags, "--host-discovery-script", str(script)]


@pytest.mark.slow
@pytest.mark.parametrize("killed_rank", [0, 1])
def test_the_other_rank_continues_alone(data, tmp_path, monkeypatch, uninterrupted, killed_rank):
    monkeypatch.setenv("SECONDS_ALONE", "0")
    done = mortal_run(data, tmp_path, elastic_flags(tmp_path), killed_rank, elastic=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "killed").exists()
    # Updates 7 and 8 are taken back: they came after the last metric line and the copy made then.
    assert "1 rank(s) x 1 device(s) (cpu(0)), 2 micro-batch(es) per update" in done.stdout
    assert "from step 6\n" in done.stdout
    run = tmp_path / "run"
    assert_same_training(run, weights(run), uninterrupted, weights(uninterrupted))


@pytest.mark.slow
def test_a_killed_rank_rejoins(data, tmp_path, monkeypatch, uninterrupted):
    monkeypatch.setenv("SECONDS_ALONE", "0.5")
    flags = [*elastic_flags(tmp_path), "--blacklist-cooldown-range", "1", "3"]
    done = mortal_run(data, tmp_path, flags, killed_rank=1, elastic=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"(\d) rank\(s\)", done.stdout) == ["2", "1", "2"]
    run = tmp_path / "run"
    assert_same_training(run, weights(run), uninterrupted, weights(uninterrupted))


def test_without_elastic_the_job_ends_names_the_rank_and_leaves_a_valid_checkpoint(
    data, tmp_path, monkeypatch
):
    from bort import checkpoint

    monkeypatch.setenv("SECONDS_ALONE", "0")
    done = mortal_run(data, tmp_path, ["-np", "2", "-H", "localhost:2"], killed_rank=1)
    assert done.returncode != 0
    assert "Process name: 1\nExit code: 137" in done.stderr
    last = checkpoint.load(str(tmp_path / "run" / "checkpoint_last"))
    assert last.state["step"] == 5


def test_elastic_training_needs_an_elastic_horovodrun(data, tmp_path, monkeypatch):
    from bort.communicator import SingleProcess
    from bort.pretraining.elastic import run_elastic
    from tests.pretraining.helpers import settings_of_run

    monkeypatch.delenv("HOROVOD_ELASTIC", raising=False)
    settings = settings_of_run(data, ckpt_dir=tmp_path)
    with pytest.raises(UserError, match="--host-discovery-script"):
        run_elastic(settings, SingleProcess())


def test_a_new_rank_0_waits_for_the_lock_of_the_one_before(data, tmp_path, monkeypatch):
    from bort.pretraining import elastic
    from tests.pretraining.helpers import make_run

    run = make_run(data, ckpt_dir=tmp_path, num_steps=1)
    state = elastic.ElasticState(run)
    monkeypatch.setattr("bort.files._LOCK_POLL", 0.01)
    monkeypatch.setattr(elastic, "LOCK_SECONDS", 0.1)
    with lock_folder(str(tmp_path)):
        with pytest.raises(UserError, match="is writing there"):
            state.lock_folder()  # at the start it is that of another run
        state.save()
        with pytest.raises(UserError, match="is writing there"):
            state.lock_folder()
    former = ExitStack()
    former.enter_context(lock_folder(str(tmp_path)))
    monkeypatch.setattr(elastic, "LOCK_SECONDS", 60.0)
    monkeypatch.setattr("bort.files.time.sleep", lambda _: former.close())
    # Horovod calls this function alone where hosts, that of rank 0 among them, were taken away.
    with state.lock:
        elastic._train(state)
        with pytest.raises(UserError, match="is writing there"), lock_folder(str(tmp_path)):
            pass


def test_lack_of_memory_is_explained(data, tmp_path, monkeypatch):
    from mxnet import MXNetError

    from bort.communicator import SingleProcess
    from bort.pretraining import elastic
    from tests.pretraining.helpers import settings_of_run

    def fail(*_):
        raise MXNetError("Check failed: cudaMalloc retry failed: out of memory")

    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    monkeypatch.setattr(elastic, "pretraining_loop", fail)
    with pytest.raises(UserError, match=r"^out of memory: lower --batch_size"):
        elastic.run_elastic(settings_of_run(data, ckpt_dir=tmp_path), SingleProcess())
