#!/usr/bin/env python3
"""Print the tables of the experiment on distillation, and draw its curves.

    python scripts/experiments/distillation.py FOLDER
    python scripts/experiments/distillation.py --best RUN ...

FOLDER is that of scripts/experiments/distillation.sh: runs/ARM/SEED are pretraining runs,
times/ARM the processor seconds of 20 and of 80 steps, tasks/ARM/SEED fine-tuning runs.
--best prints the run with the lowest held-out masked-LM loss.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's code

import numpy as np

from bort.config import OneLineParser
from bort.errors import UserError, entry_point
from bort.finetuning.scoreboard import read_scores
from bort.plots import figure_file
from bort.tables import markdown_table, spread
from scripts.plot_metrics import Run, read_run

Arms = dict[str, list[Run]]
TIMED_STEPS = (20, 80)
REFERENCE = "mlm"  # the arm whose time the others get


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Print the tables of a folder, or the best of some runs."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("--best", action="store_true", help="print the best of the runs")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="FOLDER, or RUN ...")
    parsed = parser.parse_args(argv)
    if parsed.best:
        print(min(parsed.paths, key=final_loss))
        return
    for folder in map(Path, parsed.paths):
        arms = read_arms(folder / "runs")
        print(steps_table(arms))
        seconds = step_seconds(folder / "times")
        if REFERENCE in arms.keys() & seconds.keys():  # an unfinished experiment may have no times
            print(seconds_table(arms, seconds))
        print(tasks_table(folder / "tasks"), end="")
        draw(arms, str(folder / "curves.png"))


def final_loss(path: str) -> float:
    """Return the last held-out masked-LM loss of a run."""
    return read_evaluated(path).curve("eval", "mlm_loss").values[-1]


def read_evaluated(path: str) -> Run:
    """Read a run; raises `UserError` before its first evaluation."""
    run = read_run(path)
    if not run.curve("eval", "mlm_loss").steps:
        raise UserError(f"{path}: has no held-out loss yet; wait for the first evaluation")
    return run


def read_arms(folder: Path) -> Arms:
    """Return the runs of each arm, folder/ARM/SEED; raises `UserError` when there is none."""
    arms = {
        arm.name: [read_evaluated(str(run)) for run in sorted(arm.iterdir())]
        for arm in sorted(folder.glob("*"))
    }
    if not arms:
        raise UserError(f"{folder}: holds no runs; run scripts/experiments/distillation.sh")
    return arms


def last_steps(arms: Arms) -> list[int]:
    """Return the steps of the evaluations of the run that has come farthest."""
    runs = (run for of_arm in arms.values() for run in of_arm)
    return max((run.curve("eval", "mlm_loss").steps for run in runs), key=lambda steps: steps[-1])


def held_out(run: Run, metric: str, steps: Sequence[float]) -> np.ndarray:
    """Return a held-out metric at steps, interpolated; NaN after the last evaluation."""
    return np.interp(steps, *run.curve("eval", metric), right=np.nan)


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and deviation over the seeds, "-" where a run has not come so far."""
    return spread(values, digits) if np.isfinite(values).all() else "-"


def step_seconds(folder: Path) -> dict[str, float]:
    """Return the processor seconds of a step of each arm.

    A file has a line for 20 steps and one for 80, each with user and system time. Their difference
    contains neither start nor end, and other work on the machine hardly changes it.
    """
    seconds = {}
    for path in sorted(folder.glob("*")):
        few, many = (
            sum(map(float, line.split())) for line in path.read_text(encoding="utf-8").splitlines()
        )
        seconds[path.name] = (many - few) / (TIMED_STEPS[1] - TIMED_STEPS[0])
    return seconds


def steps_table(arms: Arms) -> str:
    """Return held-out loss by step, and loss and accuracy at the end, over the seeds.

    A run that has not come so far is not taken for one that has ended: its arm shows "-" there.
    """
    steps = last_steps(arms)
    rows = []
    for arm, runs in arms.items():
        losses = [held_out(run, "mlm_loss", steps) for run in runs]
        accuracies = [100 * held_out(run, "accuracy", steps)[-1] for run in runs]
        rows.append([arm, str(len(runs)), *map(shown, zip(*losses)), shown(accuracies, 2)])
    header = ["arm", "seeds", *(f"step {step:,}" for step in steps), "accuracy at the end, %"]
    return markdown_table(header, rows)


def seconds_table(arms: Arms, seconds: dict[str, float], reference: str = REFERENCE) -> str:
    """Return the held-out loss of each arm when the reference arm has made its last step.

    Losses between two evaluations are interpolated; an arm that would be past its end shows the
    loss of its last step, one with a run that has not come so far "-".
    """
    end = last_steps(arms)[-1]
    budget = last_steps({reference: arms[reference]})[-1] * seconds[reference]
    rows = []
    for arm in sorted(arms.keys() & seconds.keys()):
        reached = budget / seconds[arm]
        losses = [held_out(run, "mlm_loss", [min(reached, end)])[0] for run in arms[arm]]
        rows.append([arm, f"{1000 * seconds[arm]:.0f}", f"{reached:,.0f}", shown(losses)])
    return markdown_table(
        ["arm", "ms of a core a step", f"steps in {budget:.0f} s", "held-out loss"], rows
    )


def tasks_table(folder: Path) -> str:
    """Return the dev scores of folder/ARM/SEED, 0 to 100, by arm and task, over the seeds.

    A cell with fewer seeds than others says how many; "" before any run has finished.
    """
    arms = sorted({path.parents[2] for path in folder.glob("*/*/*/metrics.json")})
    scores = {arm.name: read_scores([arm]) for arm in arms}
    tasks = sorted({task for of_arm in scores.values() for task in of_arm})
    seeds = max((len(runs) for of_arm in scores.values() for runs in of_arm.values()), default=0)
    rows = [
        [arm, *(_score(of_arm.get(task, []), seeds) for task in tasks)]
        for arm, of_arm in scores.items()
    ]
    return markdown_table(["arm", *tasks], rows) if rows else ""


def _score(runs: Sequence[float], seeds: int) -> str:
    if not runs:
        return "-"
    return spread(runs, 1) + (f" ({len(runs)} of {seeds})" if len(runs) < seeds else "")


def draw(arms: Arms, path: str) -> None:
    """Plot the held-out loss of the arms by step: means, and a band of a standard deviation.

    Step 0 is left out: beside its loss, the arms would look the same.
    """
    with figure_file(path, 7, 4.5) as figure:
        axes = figure.add_subplot()
        for number, (arm, runs) in enumerate(arms.items()):
            steps = [step for step in last_steps({arm: runs}) if step > 0]
            losses = np.array([held_out(run, "mlm_loss", steps) for run in runs])
            mean, deviation = losses.mean(axis=0), losses.std(axis=0, ddof=len(runs) > 1)
            label = f"{arm}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
            axes.plot(steps, mean, color=f"C{number}", marker=".", label=label)
            axes.fill_between(
                steps, mean - deviation, mean + deviation, color=f"C{number}", alpha=0.2
            )
        axes.set_xlabel("step")
        axes.set_ylabel("held-out masked-LM loss, nats")
        axes.grid(alpha=0.3)
        axes.legend()


if __name__ == "__main__":
    main()
