"""What fine-tuning runs read, reached and took, and whether leaderboards would take their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Sequence

from bort.errors import UserError
from bort.files import read_json
from bort.finetuning.scoreboard import read_runs
from data.submission import check_submission
from data.task import Task
from data.tasks import get_task

HEADER = (
    *("task", "rows read", "trained on", "steps", "dev", "most frequent answer", "seconds"),
    "submission",
)


class RunReport(NamedTuple):
    """One task of a run, each field in words.

    rows: rows of every split, and the official number where fewer are there.
    dev, baseline: the metrics on the dev sets, and those of the most frequent answer.
    submission: the files checked against the test sets they are for, or what is wrong with them.
    """

    task: str
    rows: str
    train_examples: str
    steps: str
    dev: str
    baseline: str
    seconds: str
    submission: str


def report(folders: Sequence[Path]) -> list[RunReport]:
    """Return one report per run under the folders, and per task that a run predicted besides.

    The test sets are read again, from where the run's config.json says. Raises `UserError` where
    there is no run.
    """
    return [line for path, content in read_runs(folders) for line in _reports(path, content)]


def _reports(path: Path, content: dict[str, Any]) -> list[RunReport]:
    task = get_task(content["task"])
    data_dir = read_json(str(path.parent / "config.json"))["TaskSettings"]["data_dir"]
    answers = content["answers"]
    tests = {name: one["rows"] for name, one in answers.items() if name in task.test}
    own = RunReport(
        task=task.name,
        rows=_rows(task, {**content["rows"], **tests}),
        train_examples=f"{content['train_examples']:,}",
        steps=f"{content['steps']:,}",
        dev=_metrics({name: answers[name]["metrics"] for name in task.dev}),
        baseline=_metrics(content["baseline"]),
        seconds=f"{content['seconds']:.0f}",
        submission=_submission(task, tests, data_dir, path.parent),
    )
    return [own, *_predicted(path.parent.parent, data_dir, answers)]


def _predicted(folder: Path, data_dir: str, answers: dict[str, Any]) -> list[RunReport]:
    """Return the reports of the diagnostic sets that a run's model has answered."""
    lines = []
    for name, found in answers.items():
        other, _, split = name.rpartition("/")
        if other:
            task = get_task(other)
            rows = {split: found["rows"]}
            checked = _submission(task, rows, data_dir, folder / task.name)
            reached = _metrics({split: found.get("metrics", {})})
            lines.append(
                RunReport(task.name, _rows(task, rows), "-", "-", reached, "-", "-", checked)
            )
    return lines


def _rows(task: Task, found: dict[str, int]) -> str:
    words = []
    for split, rows in found.items():
        official = task.official_rows(split)
        words.append(f"{split} {rows:,}" + (f" (of {official:,})" if rows < official else ""))
    return ", ".join(words)


def _metrics(found: dict[str, dict[str, float]]) -> str:
    shown = [
        ", ".join(f"{name} {v:.3f}" for name, v in values.items()) for values in found.values()
    ]
    return "; ".join(one for one in shown if one) or "-"


def _submission(task: Task, tests: dict[str, int], data_dir: str, folder: Path) -> str:
    words = []
    for split in tests:
        name = task.submission_file(split)
        if name is None:
            continue
        examples = task.read(data_dir, split).examples
        try:
            words.append(f"{name}: {check_submission(folder / name, task, split, examples):,} good")
        except UserError as error:
            words.append(f"REFUSED: {error}")
    return ", ".join(words) or "-"


def as_markdown(lines: Sequence[RunReport]) -> str:
    """Return the table in Markdown."""
    rows = (HEADER, ["---"] * len(HEADER), *lines)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
