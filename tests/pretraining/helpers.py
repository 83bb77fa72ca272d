"""What the tests of pretraining share: tiny shards, tiny runs, and ways to compare them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
import pytest

from bort.communicator import Communicator, SingleProcess
from bort.config import parse
from bort.reporter import read_records
from data.shards import (
    Manifest,
    ShardWriter,
    TokenizerEntry,
    id_type,
    shard_name,
    write_manifest,
)
from tests.reference import redraw

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 61
BOS, PAD, EOS, UNK, MASK = range(5)
FIRST_WORD = 5
SHAPE = "bort_1_2_32_32"


def write_shards(
    folder: str | os.PathLike,
    sizes: Sequence[int],
    seed: int,
    fingerprint: str = "one",
    masked: bool = True,
) -> None:
    """Write shards of `sizes` sequences whose words count upwards: 9 10 11 ...

    Any unmasked neighbour tells a masked word, so even a tiny model learns something, and no two
    sequences of a folder are alike. Lengths are 8 to 24 tokens, masks are always `<mask>`.
    """
    generator = np.random.default_rng(seed)
    kinds = [(n, first) for n in range(6, 23) for first in range(FIRST_WORD, VOCAB_SIZE - n)]
    chosen = iter(generator.permutation(kinds)[: sum(sizes)])
    os.makedirs(folder, exist_ok=True)
    entries = []
    for index, size in enumerate(sizes):
        path = os.path.join(folder, shard_name(index))
        with ShardWriter(path, id_type(VOCAB_SIZE)) as writer:
            for _ in range(size):
                words, first = next(chosen)
                _write_sequence(writer, np.arange(first, first + words), generator, masked)
            entries.append(writer.finish(documents=size, sentences=size, unknown=0))
    tokenizer = TokenizerEntry(fingerprint, VOCAB_SIZE, PAD)
    write_manifest(str(folder), "manifest.json", Manifest(tokenizer, {}, [], entries))


def _write_sequence(
    writer: ShardWriter, words: np.ndarray, generator: np.random.Generator, masked: bool
) -> None:
    ids = np.concatenate([[BOS], words, [EOS]])
    masks = max(1, round(0.15 * len(words))) if masked else 0
    positions = np.sort(1 + generator.choice(len(words), masks, replace=False))
    labels = ids[positions]
    ids[positions] = MASK
    writer.write(ids, np.array([len(ids)]), positions, labels, np.array([masks]))


def write_data(folder: Path) -> None:
    """Write shards into train/ and test/, and a teacher's weights into teacher.params."""
    from bort.bort import get_bort_model
    from bort.parameters import save_parameters

    write_shards(folder / "train", sizes=(11, 5, 9), seed=1)
    write_shards(folder / "test", sizes=(7, 6), seed=2)
    teacher, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE))
    redraw(teacher, seed=3, deviation=0.2)
    save_parameters(teacher, str(folder / "teacher.params"))


def teacher_flags(folder: Path) -> dict[str, object]:
    """Return the flags that name the teacher of `write_data`."""
    return {"teacher_model": SHAPE, "teacher_ckpt_dir": folder / "teacher.params"}


def arguments(folder: Path, **flags: Any) -> list[str]:
    """Return the command line of a tiny run on the shards of `folder`; `flags` override it."""
    settings = {
        "data": folder / "train",
        "student_model": SHAPE,
        "batch_size": 4,
        "num_buckets": 3,
        "num_steps": 20,
        "lr": 0.01,
        "warmup_ratio": 0.1,
        "log_interval": 5,
        **flags,
    }
    line = []
    for name, value in settings.items():
        if value is not False:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def settings_of_run(folder: Path, **flags: Any) -> Any:
    """Return the settings of a tiny run."""
    from bort.pretraining.config import SETTINGS_CLASSES, PretrainingSettings

    return PretrainingSettings(*parse("", arguments(folder, **flags), *SETTINGS_CLASSES))


def make_run(folder: Path, communicator: Communicator | None = None, **flags: Any) -> Any:
    """Return the loop of a run that is ready to start."""
    from bort.devices import devices_of
    from bort.pretraining.run import pretraining_loop
    from bort.reporter import FolderReporter

    settings = settings_of_run(folder, **flags)
    ranks = communicator or SingleProcess()
    devices = devices_of(settings.run.gpus, settings.run.cpu_contexts, ranks)
    return pretraining_loop(settings, ranks, devices, FolderReporter(settings.run.ckpt_dir, ranks))


def held_out_of(folder: Path, **flags: Any) -> Any:
    """Return the held-out batches of a tiny run."""
    from bort.pretraining.run import open_data

    settings = settings_of_run(folder, **flags)
    return open_data(settings.data, settings.run.seed, settings.teacher.teacher_cache).held_out


def finished_run(folder: Path, **flags: Any) -> Any:
    """Return a run that has trained to its end."""
    run = make_run(folder, **flags)
    run.run()
    return run


def arrays_of(run: Any) -> dict[str, np.ndarray]:
    """Return parameters and optimizer state of a run, by name."""
    parameters = run.job.network._collect_params_with_prefix()
    arrays = {name: parameter.data().asnumpy() for name, parameter in parameters.items()}
    return {**arrays, **{name: array.asnumpy() for name, array in run.trainer.state().items()}}


def digest(run: Any) -> str:
    """Return one SHA-256 over parameters, optimiser state, step and place in the data."""
    total = hashlib.sha256(f"{run.progress.step} {run.progress.batches}".encode())
    for name, array in sorted(arrays_of(run).items()):
        total.update(name.encode())
        total.update(array.tobytes())
    return total.hexdigest()


def metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl without what the clock decides."""
    records = read_records(str(Path(folder, "metrics.jsonl")))
    return [
        {
            name: value
            for name, value in record.items()
            if name not in ("time", "tokens_per_second") and not name.endswith("_share")
        }
        for record in records
    ]


def assert_same_training(
    folder: str | os.PathLike,
    weights: Mapping[str, np.ndarray],
    other_folder: str | os.PathLike,
    other_weights: Mapping[str, np.ndarray],
    tolerance: float = 1e-5,
) -> None:
    """Compare two runs: metrics, norms of gradients included, and each array of weights."""
    lines, others = metrics(folder), metrics(other_folder)
    assert [line.pop("phase") for line in lines] == [line.pop("phase") for line in others]
    for line, same in zip(lines, others):
        assert line == pytest.approx(same, rel=tolerance)
    assert weights.keys() == other_weights.keys()
    for name, mine in weights.items():
        # Softmax does not see the biases of keys: they follow nothing but rounding.
        if not name.endswith("proj_key.bias"):
            distance = np.linalg.norm(mine - other_weights[name])
            # What started at 0 is small yet, and BERTAdam makes a whole step of a gradient that is
            # nearly rounding.
            assert distance <= tolerance * np.linalg.norm(mine) + 1e-6, name


def horovodrun(ranks: int, *command: str) -> str:
    """Run a command on so many ranks of this machine and return what they printed.

    Fails with the output when a rank fails.
    """
    done = launched(["-np", str(ranks), "-H", f"localhost:{ranks}"], *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launched(flags: Sequence[str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command under `horovodrun` with these flags; `python` stands for this interpreter."""
    folder = os.path.dirname(sys.executable)
    words = [sys.executable if word == "python" else word for word in command]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([folder, os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [os.path.join(folder, "horovodrun"), *flags, *words],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
