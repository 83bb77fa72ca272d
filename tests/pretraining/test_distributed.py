"""Pretraining on two ranks under Horovod, against one rank that sees the same global batches."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest

from bort.files import read_json
from bort.processor import multiplies_bfloat16
from tests.pretraining.helpers import (
    arguments,
    assert_same_training,
    finished_run,
    horovodrun,
    launched,
    teacher_flags,
    write_data,
)

pytestmark = pytest.mark.distributed

STEPS = 20
# Rank 1 alone is told to stop, in its seventh step.
STOPPED_PROGRAM = """
    import os, signal, sys
    from bort.pretraining import run as pretraining
    from run_pretraining_distillation_hvd import main

    rate_of = pretraining.linear_warmup_decay

    def warned(step, *rest):
        if step == 7 and os.environ["HOROVOD_RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return rate_of(step, *rest)

    pretraining.linear_warmup_decay = warned
    main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def run_flags(data: Path) -> dict[str, object]:
    return {
        "data_eval": data / "test",
        **teacher_flags(data),
        "num_steps": STEPS,
        "ckpt_interval": 5,
        "keep_checkpoints": 10,
        "eval_interval": 10,
        "dropout": 0.1,
        "lr": 0.001,
        "seed": 9,
    }


def two_ranks_line(
    data: Path, folder: Path, program="run_pretraining_distillation_hvd.py", **flags
) -> list[str]:
    """Return the command of a rank; rank r keeps what it writes in <folder>/<r>."""
    line = arguments(data, **{**run_flags(data), **flags})
    words = " ".join(map(shlex.quote, ["python", str(program), *line]))
    own_folder = f'--ckpt_dir {shlex.quote(str(folder))}/"$HOROVOD_RANK"'
    return ["bash", "-c", f"exec {words} {own_folder}"]


def two_ranks(data: Path, folder: Path, **flags) -> None:
    """Train on two ranks."""
    horovodrun(2, *two_ranks_line(data, folder, **flags))


def stored(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Return the parameters and the optimiser's state of a checkpoint."""
    from mxnet import nd

    from bort import checkpoint

    found = checkpoint.at_step(str(folder), step)
    parameters = {name: array.asnumpy() for name, array in nd.load(found.model_path).items()}
    return {**parameters, **found.trainer_arrays()}


def assert_agree(folder: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Compare the metrics and the last weights of two runs."""
    assert_same_training(folder, weights(folder), other, weights(other), tolerance)


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the parameters of the last checkpoint."""
    arrays = stored(folder, STEPS)
    return {n: a for n, a in arrays.items() if not n.startswith(("mean.", "variance."))}


@pytest.fixture(scope="module")
def on_two_ranks(data, tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run on two ranks; rank r's files are in <r>/."""
    folder = tmp_path_factory.mktemp("two_ranks")
    two_ranks(data, folder)
    return folder


@pytest.fixture(scope="module")
def on_one_rank(data, tmp_path_factory) -> Path:
    """Return the folder of the same run on one rank that accumulates two micro-batches."""
    folder = tmp_path_factory.mktemp("one_rank")
    finished_run(data, ckpt_dir=folder, accumulate=2, **run_flags(data))
    return folder


def test_two_ranks_train_like_one_that_accumulates_two_micro_batches(on_two_ranks, on_one_rank):
    assert_agree(on_two_ranks / "0", on_one_rank)


def test_two_ranks_train_like_one_in_bfloat16(data, tmp_path):
    if not multiplies_bfloat16():
        pytest.skip("the processor has neither AVX512-BF16 nor AMX: the program refuses bfloat16")
    low = {"dtype": "bfloat16", "teacher_dtype": "bfloat16"}
    two_ranks(data, tmp_path / "two", **low)
    finished_run(data, ckpt_dir=tmp_path / "one", accumulate=2, **run_flags(data), **low)
    # A weight whose last bit of float32 differs may be rounded to the next bfloat16.
    assert_agree(tmp_path / "two" / "0", tmp_path / "one", tolerance=1e-2)


def test_only_rank_0_writes(on_two_ranks):
    assert [path.name for path in on_two_ranks.iterdir()] == ["0"]


def test_a_checkpoint_names_the_command_of_all_ranks(on_two_ranks):
    model = read_json(str(on_two_ranks / "0" / f"step-{STEPS:07d}" / "model.json"))
    command = model["details"]["command"]
    assert command.startswith("horovodrun -np 2 python run_pretraining_distillation_hvd.py --")


def test_two_ranks_resume_a_run_of_one(data, tmp_path, on_one_rank, on_two_ranks):
    shutil.copytree(on_one_rank, tmp_path / "0", symlinks=True)
    two_ranks(data, tmp_path, start_step=10)
    assert_agree(tmp_path / "0", on_two_ranks / "0")


def test_what_rank_0_refuses_is_one_line_and_another_of_the_other_rank(data, tmp_path, on_one_rank):
    shutil.copytree(on_one_rank, tmp_path / "0", symlinks=True)
    line = two_ranks_line(data, tmp_path, resume=True, batch_size=5)
    refused = launched(["-np", "2", "-H", "localhost:2"], *line)
    assert refused.returncode == 1
    said = [text for text in refused.stderr.splitlines() if text.startswith("[")]
    # The shell of horovodrun may say that it had to end a rank.
    said = [text for text in said if not text.endswith(":Terminated")]
    assert len(said) == 2, said
    assert any("--batch_size 5: the checkpoint was made with 4" in text for text in said)
    assert any("another rank has ended" in text for text in said)


def test_one_rank_resumes_a_run_of_two(data, tmp_path, on_two_ranks):
    folder = tmp_path / "run"
    shutil.copytree(on_two_ranks / "0", folder, symlinks=True)
    finished_run(data, ckpt_dir=folder, start_step=10, **run_flags(data))
    assert_agree(folder, on_two_ranks / "0")


def test_two_ranks_stopped_by_one_and_resumed_are_bit_identical(data, tmp_path, on_two_ranks):
    program = tmp_path / "stopped.py"
    program.write_text(textwrap.dedent(STOPPED_PROGRAM))
    folder = tmp_path / "run"
    line = two_ranks_line(data, folder, program=program)
    stopped = launched(["-np", "2", "-H", "localhost:2"], *line)
    assert stopped.returncode != 0  # as `&&` and Slurm's afterok need it
    assert stopped.stderr.count("stopped after step 7; --resume continues") == 2
    assert (folder / "0" / "checkpoint_last").resolve().name == "step-0000007"
    two_ranks(data, folder, resume=True)
    ours, uninterrupted = stored(folder / "0", STEPS), stored(on_two_ranks / "0", STEPS)
    assert ours.keys() == uninterrupted.keys()
    assert all((ours[name] == uninterrupted[name]).all() for name in ours)
    assert [path.name for path in folder.iterdir()] == ["0"]
