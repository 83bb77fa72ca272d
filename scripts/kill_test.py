#!/usr/bin/env python3
"""Kill a training run at random moments, resume it, and compare its end with an uninterrupted run.

    python scripts/kill_test.py --data SHARDS --work_dir FOLDER --kills 20 --seed 1

scripts/kill_test.sh makes the shards and calls this. Exit status 1 when anything differs.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort import checkpoint
from bort.config import option, parse, required
from bort.errors import UserError, entry_point

PROGRAM = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "run_pretraining_distillation.py"
)
# With dropout and accumulation; intervals of evaluations and checkpoints that do not coincide.
RUN = {
    "student_model": "bort_2_4_128_64",
    "dropout": 0.1,
    "batch_size": 4,
    "accumulate": 2,
    "ckpt_interval": 7,
    "eval_interval": 45,
    "log_interval": 3,
    "lr": 1e-3,
    "seed": 3,
}
# Lines that a run prints before its first step, and after some steps.
READY = re.compile(r"from step (\d+)$")
STEP = re.compile(r"^step +(\d+) +train ")
# One in so many kills comes before the first step.
STARTS = 5
# Kills come within this fraction of twice an equal share of the remaining steps, so that only the
# last attempt reaches the end.
SHARE = 0.8
# A kill comes up to so many steps after the line it waits for, so also while saving.
SCATTER = 8


@dataclass(frozen=True)
class KillTestSettings:
    """Data and kills."""

    data: str = required("folder of shards, of training and held-out data alike")
    work_dir: str = required("folder for the two runs")
    kills: int = option(20, "times the run is killed", minimum=1)
    num_steps: int = option(600, "updates of the run", minimum=1)
    seed: int = option(0, "random seed of the moments", minimum=0)


class Timing(NamedTuple):
    """How long an uninterrupted run takes, in seconds."""

    start: float  # until its first step
    step: float


class Moment(NamedTuple):
    """When a run is killed: so many seconds after it was started, or after its first `steps`."""

    steps: Optional[int]
    seconds: float

    def __str__(self) -> str:
        after = "its start" if self.steps is None else f"{self.steps} steps"
        return f"{self.seconds:.3f} s after {after}"


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the test; returns the number of kills survived."""
    (settings,) = parse(str(__doc__), argv, KillTestSettings)
    uninterrupted, killed = (
        os.path.join(settings.work_dir, n) for n in ("uninterrupted", "killed")
    )
    for folder in (uninterrupted, killed):
        shutil.rmtree(folder, ignore_errors=True)
    begun = time.monotonic()
    timing = _to_the_end(_command(settings, uninterrupted), settings.num_steps)
    print(
        f"uninterrupted run: {timing.start:.1f} s until its first step, {timing.step * 1e3:.0f} ms "
        f"a step, {settings.num_steps} steps; moments by seed {settings.seed}",
        flush=True,
    )
    generator = random.Random(settings.seed)
    for number in range(1, settings.kills + 1):
        left = settings.num_steps - _steps_saved(killed)
        share = 2 * SHARE * left / (settings.kills - number + 2)
        moment = draw_moment(generator, share, timing)
        kill_at(moment, [*_command(settings, killed), "--resume"])
        print(f"kill {number:>3}: {moment!s:<29} leaves {_left_behind(killed)}", flush=True)
    _to_the_end([*_command(settings, killed), "--resume"], settings.num_steps)
    compare(uninterrupted, killed)
    print(
        f"{settings.kills} of {settings.kills}: weights and optimizer state are those of the "
        f"uninterrupted run, bit for bit ({time.monotonic() - begun:.0f} s)"
    )
    return settings.kills


def draw_moment(generator: random.Random, most_steps: float, timing: Timing) -> Moment:
    """Draw when to kill: before the first step, or anywhere in the first `most_steps` steps."""
    place, scatter = generator.random(), generator.random()
    if generator.randrange(STARTS) == 0:
        return Moment(None, place * timing.start)
    return Moment(int(place * most_steps), scatter * SCATTER * timing.step)


def _command(settings: KillTestSettings, folder: str) -> list[str]:
    flags = {
        **RUN,
        "data": settings.data,
        "data_eval": settings.data,
        "num_steps": settings.num_steps,
        "ckpt_dir": folder,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, PROGRAM, *words]


def _to_the_end(command: list[str], steps: int) -> Timing:
    """Run a command to its end; raises `UserError` with its last lines when it fails."""
    begun = ready = time.monotonic()
    said = []
    with _started(command) as process:
        for line in process.stdout:
            said.append(line)
            if READY.search(line):
                ready = time.monotonic()
    if process.returncode:
        raise UserError(f"the run ended with status {process.returncode}: {''.join(said[-5:])}")
    return Timing(ready - begun, (time.monotonic() - ready) / steps)


def _started(command: list[str]) -> Any:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_at(moment: Moment, command: list[str]) -> None:
    """Start a command and kill it; raises `UserError` when it ends by itself before."""
    last = ""
    with _started(command) as process:
        wanted = None
        for last in process.stdout if moment.steps is not None else ():
            ready, step = READY.search(last), STEP.search(last)
            if ready:
                wanted = int(ready[1]) + moment.steps
            if wanted is not None and (step or ready) and int((step or ready)[1]) >= wanted:
                break
        time.sleep(moment.seconds)
        process.kill()
    if process.returncode != -signal.SIGKILL:
        raise UserError(
            f"the run ended with status {process.returncode} before it was killed ({last.strip()})"
        )


def _steps_saved(folder: str) -> int:
    last = os.path.join(folder, checkpoint.LAST)
    return checkpoint.load(last).state["step"] if os.path.exists(last) else 0


def _left_behind(folder: str) -> str:
    """Describe the checkpoints that a killed run has left."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    half_written = sum(name.endswith(".tmp") for name in names)
    return f"step {_steps_saved(folder)}" + f" and {half_written} half-written" * bool(half_written)


def compare(uninterrupted: str, killed: str) -> None:
    """Raise `UserError` unless both runs ended with the same bits."""
    sums = [
        checkpoint.load(os.path.join(folder, checkpoint.LAST)).state["sha256"]
        for folder in (uninterrupted, killed)
    ]
    # The model config may differ: it says by which command it was made.
    names = (checkpoint.MODEL, checkpoint.TRAINER)
    different = [name for name in names if sums[0][name] != sums[1][name]]
    if different:
        raise UserError(
            f"{killed}: {' and '.join(different)} differ from those of {uninterrupted}; "
            "the same --seed repeats the moments"
        )
    print("\n".join(f"SHA-256 of {name:<14}{sums[0][name]}" for name in names))


if __name__ == "__main__":
    main()
