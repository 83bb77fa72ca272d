#!/usr/bin/env python3
"""Kill a training run at random moments, resume it, and compare its end with an undisturbed run.

    python scripts/kill_test.py --data SHARDS --work_dir FOLDER --kills 20 --seed 1

scripts/kill_test.sh makes the shards and calls this. Exit status 1 when anything differs.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence

from bort import checkpoint
from bort.config import option, parse, required
from bort.errors import UserError, door

DOOR = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "run_pretraining_distillation.py"
)
# Dropout, accumulation, evaluation and checkpoints whose intervals do not divide one another.
RUN = {
    "student_model": "bort_2_4_128_64",
    "dropout": 0.1,
    "batch_size": 4,
    "accumulate": 2,
    "ckpt_interval": 7,
    "eval_interval": 45,
    "log_interval": 10,
    "lr": 1e-3,
    "seed": 3,
}
# What is printed when a run is ready for its first step.
READY = "from step"
# Of an equal share of the training time, so that no attempt but the last reaches the end.
SHARE = 0.5


@dataclass(frozen=True)
class KillTestSettings:
    """How often and where."""

    data: str = required("folder of shards, of training and held-out data alike")
    work_dir: str = required("folder for the two runs")
    kills: int = option(20, "times the run is killed", minimum=1)
    num_steps: int = option(600, "updates of the run", minimum=1)
    seed: int = option(0, "of the moments", minimum=0)


class Timing(NamedTuple):
    """How long an undisturbed run takes, in seconds."""

    start: float  # until its first step
    training: float


@door
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the test; returns the number of kills survived."""
    (settings,) = parse(str(__doc__), argv, KillTestSettings)
    undisturbed, killed = (os.path.join(settings.work_dir, n) for n in ("undisturbed", "killed"))
    for folder in (undisturbed, killed):
        shutil.rmtree(folder, ignore_errors=True)
    begun = time.monotonic()
    timing = _to_the_end(_command(settings, undisturbed))
    print(
        f"undisturbed run: {timing.start:.1f} s until its first step, {timing.training:.1f} s for "
        f"{settings.num_steps} steps; moments by seed {settings.seed}",
        flush=True,
    )
    moments = random.Random(settings.seed)
    latest_moment = timing.start + SHARE * timing.training / settings.kills
    for number in range(1, settings.kills + 1):
        delay = moments.uniform(timing.start / 2, latest_moment)
        _kill_after(delay, [*_command(settings, killed), "--resume"])
        print(f"kill {number:>3}: after {delay:6.3f} s, {_left_behind(killed)}", flush=True)
    _to_the_end([*_command(settings, killed), "--resume"])
    _compare(undisturbed, killed)
    print(
        f"{settings.kills} of {settings.kills}: weights and optimiser state are those of the "
        f"undisturbed run, bit for bit ({time.monotonic() - begun:.0f} s)"
    )
    return settings.kills


def _command(settings: KillTestSettings, folder: str) -> list[str]:
    flags = {
        **RUN,
        "data": settings.data,
        "data_eval": settings.data,
        "num_steps": settings.num_steps,
        "ckpt_dir": folder,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, DOOR, *words]


def _to_the_end(command: list[str]) -> Timing:
    """Run a command; raises `UserError` with its complaint when it fails."""
    begun = time.monotonic()
    ready = begun
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if READY in line:
                ready = time.monotonic()
    if process.returncode:
        raise UserError(f"the run ended with status {process.returncode}: {''.join(said[-5:])}")
    return Timing(ready - begun, time.monotonic() - ready)


def _kill_after(seconds: float, command: list[str]) -> None:
    """Start a command and kill it; raises `UserError` when it ends by itself before."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        complaint = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        complaint = process.communicate()[1]
    if process.returncode != -signal.SIGKILL:
        raise UserError(
            f"the run ended with status {process.returncode} before it was killed: "
            f"{complaint.strip() or 'it was done; give more --num_steps'}"
        )


def _left_behind(folder: str) -> str:
    """Return what a killed run has left, in words."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    half_written = sum(name.endswith(".tmp") for name in names)
    last = os.path.join(folder, checkpoint.LAST)
    newest = os.readlink(last) if os.path.islink(last) else "no checkpoint"
    return f"newest {newest}" + f", {half_written} half-written" * bool(half_written)


def _compare(undisturbed: str, killed: str) -> None:
    """Raise `UserError` unless both runs ended with the same bits."""
    sums = [
        checkpoint.load(os.path.join(folder, checkpoint.LAST)).state["sha256"]
        for folder in (undisturbed, killed)
    ]
    different = [name for name in sums[0] if sums[0][name] != sums[1][name]]
    if different:
        raise UserError(
            f"{killed}: {' and '.join(different)} differ from those of {undisturbed}; "
            "the same --seed repeats the moments"
        )
    print("\n".join(f"SHA-256 of {name:<14}{sums[0][name]}" for name in sums[0]))


if __name__ == "__main__":
    main()
