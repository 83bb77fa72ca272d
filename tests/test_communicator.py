"""One process, and two under Horovod: sums, broadcasts, and ranks that lag behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import types
from importlib.util import find_spec

import numpy as np
import pytest

from bort.communicator import (
    LAUNCHERS,
    Horovod,
    SingleProcess,
    communicator_of_environment,
    only_process,
)
from bort.errors import UserError
from tests.pretraining.helpers import ROOT, horovodrun

# Rank 1 is slow at every turn: rank 0 then has several messages under way at once.
TWO_RANKS = """
    import json, sys, time
    from pathlib import Path
    import numpy as np
    from bort.communicator import Horovod

    communicator = Horovod()
    from mxnet import nd

    rank, size = communicator.rank, communicator.size

    def lag():
        time.sleep(0.02 * rank)

    found = {"size": size, "local_rank": communicator.local_rank}

    broadcast = []
    for call in range(20):
        arrays = [nd.full((3, 2), 100 * call + 10 * place + rank) for place in range(3)]
        communicator.broadcast(arrays)
        lag()
        broadcast += [float(array.sum().asscalar()) / 6 for array in arrays]
    found["broadcast"] = broadcast

    held = [nd.zeros(1000), nd.zeros(1)]
    sums = []
    for call in range(20):
        for place, array in enumerate(held):
            array[:] = call + place + 100 * rank
        communicator.allreduce_(held)
        lag()
        sums.append(nd.concat(held[0][:1], held[1], dim=0))
    found["allreduce_"] = nd.stack(*sums).asnumpy().tolist()

    found["sum"] = communicator.allreduce(np.array([1 / 3, rank, 2.0**53])).tolist()
    found["object"] = communicator.broadcast_object({"step": 7, "rank": rank, "none": None})
    start = time.monotonic()
    time.sleep(rank)
    communicator.barrier()
    found["waited"] = time.monotonic() - start
    Path(f"{sys.argv[1]}/{rank}.json").write_text(json.dumps(found))
"""


def test_a_single_process_is_rank_0_of_1_and_changes_nothing():
    alone = SingleProcess()
    assert (alone.rank, alone.size, alone.local_rank) == (0, 1, 0)
    values = np.array([1 / 3, 2.0])
    assert (alone.allreduce(values) == values).all()
    assert alone.broadcast_object({"step": 7}) == {"step": 7}
    array = np.ones(3)
    alone.broadcast([array])
    alone.allreduce_([array])
    alone.barrier()
    assert (array == 1).all()


@pytest.mark.distributed
def test_two_ranks_one_of_them_slow(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    horovodrun(2, "python", str(script), str(tmp_path))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one.pop("local_rank") for one in ranks] == [0, 1]
    assert all(one.pop("waited") > 0.9 for one in ranks), "the barrier lets nobody pass early"
    assert ranks[0] == ranks[1]
    expected = [100 * call + 10 * place for call in range(20) for place in range(3)]
    assert ranks[0]["broadcast"] == expected, "rank 0's values everywhere"
    assert ranks[0]["allreduce_"] == [[2 * call + 100, 2 * call + 102] for call in range(20)]
    assert ranks[0]["sum"] == [1 / 3 + 1 / 3, 1.0, 2.0**54], "in float64"
    assert ranks[0]["object"] == {"step": 7, "rank": 0, "none": None}
    assert ranks[0]["size"] == 2


ALL_LAUNCHERS = (*LAUNCHERS, "HOROVOD_RANK", "HOROVOD_SIZE", "SLURM_NTASKS")


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ALL_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("name", LAUNCHERS)
def test_processes_of_a_launcher_that_horovod_does_not_see_are_refused(monkeypatch, name):
    monkeypatch.setattr("bort.communicator.find_spec", lambda _: None)
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=f"{name} is 2, but this process is alone: 2 independent"):
        communicator_of_environment()
    with pytest.raises(UserError, match=f"{name} is 2, .* one process: start many.py"):
        only_process("many.py")
    monkeypatch.setenv(name, "1")
    assert communicator_of_environment().size == only_process("many.py").size == 1


@pytest.mark.usefixtures("no_launcher")
def test_one_process_in_a_job_of_slurm_for_many_is_taken(monkeypatch):
    """Its script has the number of tasks, and starts the program once."""
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert communicator_of_environment().size == only_process("many.py").size == 1


@pytest.mark.usefixtures("no_launcher")
def test_ranks_of_horovodrun_are_not_taken_for_one_process(monkeypatch):
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(UserError, match="HOROVOD_SIZE is 2"):
        only_process("many.py")


@pytest.fixture
def horovod_of_gloo(monkeypatch):
    """Install a stand-in for a Horovod that knows the processes of horovodrun only."""
    functions = dict.fromkeys(("rank", "local_rank"), lambda: 0)
    size = lambda: int(os.environ.get("HOROVOD_SIZE", "1"))  # noqa: E731
    functions.update(init=lambda: None, size=size, local_size=size)
    package = types.ModuleType("horovod")
    package.mxnet = types.SimpleNamespace(**functions)
    monkeypatch.setitem(sys.modules, "horovod", package)
    monkeypatch.setitem(sys.modules, "horovod.mxnet", package.mxnet)
    monkeypatch.setattr("bort.communicator.find_spec", lambda _: True)


@pytest.mark.usefixtures("no_launcher", "horovod_of_gloo")
@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS"),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS"),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun -n 1
        # salloc -n 4, then horovodrun
        ({"SLURM_NTASKS": "4", "HOROVOD_RANK": "0", "HOROVOD_SIZE": "1"}, None),
        ({"SLURM_NTASKS": "4", "HOROVOD_RANK": "0", "HOROVOD_SIZE": "4"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "OMPI_COMM_WORLD_SIZE"),
        ({"SLURM_NTASKS": "1"}, None),
        ({}, None),
    ],
)
def test_the_program_for_many_is_not_one_of_many_that_do_not_know(monkeypatch, given, refused):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(UserError, match=f"{refused} is {given[refused]}, but this process is"):
            Horovod()
    else:
        assert Horovod().size == int(given.get("HOROVOD_SIZE", "1"))


@pytest.mark.usefixtures("no_launcher", "horovod_of_gloo")
def test_a_single_process_calls_no_operation_of_horovod():
    """What stands for Horovod here has none."""
    communicator, array = Horovod(), np.arange(3.0)
    communicator.broadcast([array])
    communicator.allreduce_([array], compression="fp16")
    communicator.barrier()
    assert communicator.allreduce(array).tolist() == [0, 1, 2]
    assert communicator.broadcast_object({"step": 3}) == {"step": 3}
    assert communicator.allgather_object("cpu(0)") == ["cpu(0)"]


@pytest.mark.usefixtures("no_launcher", "horovod_of_gloo")
def test_a_horovod_of_mpi_takes_the_processes_of_mpirun(monkeypatch):
    """It has no variable of horovodrun."""
    monkeypatch.setattr(sys.modules["horovod.mxnet"], "size", lambda: 2)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert communicator_of_environment().size == 2


@pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod")
def test_a_rank_alone_under_srun_or_mpirun_is_refused_by_the_program_for_many(tmp_path):
    """As with a Horovod of Gloo, which does not know of the other processes."""
    program = "run_pretraining_distillation_hvd.py"
    done = subprocess.run(
        [sys.executable, program, "--data", "absent", "--ckpt_dir", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "SLURM_NTASKS": "4"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "SLURM_NTASKS is 4, but this process is alone" in done.stderr
    assert not (tmp_path / "run").exists()
