"""What a run of Agora on text shows: lines, agora.json, a table of its images, a plot."""

from __future__ import annotations

import os
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from bort.agora.algorithm import Best, Round
from bort.agora.tau import Inputs
from bort.agora.text import TextData
from bort.files import write_json
from bort.types import Hyperparameters

FORMAT_VERSION = 1
COLUMNS = ("round", "replay", "dev_row", "kept", "timaeus", "dev_label", "image", "dev_text")


class Outcome(NamedTuple):
    """A model's metrics: `dev` was selected on, `test` (None without labels) never looked at."""

    dev: Mapping[str, float]
    test: Optional[Mapping[str, float]]


class Report:
    """Gathers the rounds of a run, and writes them after each one, so that a run can be watched."""

    def __init__(
        self, folder: str, data: TextData, space: Sequence[Hyperparameters], timaeus: str
    ) -> None:
        self.folder, self.data = folder, data
        self.rounds: list[Round] = []
        self.content: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "task": data.task.name,
            "rows": {"train": len(data.train), "dev": len(data.dev), "test": len(data.test)},
            "train_rows_dropped": data.dropped,
            "timaeus": {"source": timaeus},
            "search_space": list(space),
            "rounds": [],
        }

    def timaeus(self, outcome: Outcome) -> None:
        """Take Timaeus' own metrics."""
        self.content["timaeus"].update(outcome._asdict())

    def add(self, record: Round) -> None:
        """Take a round: print it, write agora.json and images.tsv."""
        self.rounds.append(record)
        self.content["rounds"].append({**record.as_dict(), "label_shares": label_shares(record)})
        print(round_line(record), flush=True)
        self.write()
        write_images(os.path.join(self.folder, "images.tsv"), self.rounds, self.data)

    def finish(self, best: Best, first: Outcome, last: Outcome, seconds: float) -> None:
        """Take the outcome of the first round, which is the best of the grid, and of the run."""
        self.content["best_of_grid"] = first._asdict()
        self.content["best"] = {
            "theta": dict(best.theta),
            "place": best.place,
            "round": best.round,
            "replay": best.replay,
            "score": best.score,
            **last._asdict(),
        }
        self.content["seconds"] = seconds
        self.write()
        plot(os.path.join(self.folder, "agora.png"), self.rounds)
        print(f"best of the grid  {outcome_line(first)}")
        print(f"Agora             {outcome_line(last)}")

    def write(self) -> None:
        """Write agora.json, whole or not at all."""
        write_json(os.path.join(self.folder, "agora.json"), self.content)


def label_shares(record: Round) -> dict[str, float]:
    """Return the share of each class in the data that a round's fits saw."""
    return {name: count / record.train_size for name, count in record.label_counts.items()}


def round_line(record: Round) -> str:
    """Return a round in one line."""
    kept = sum(image.kept for image in record.images)
    again = f".{record.replay}" if record.replay else ""
    return (
        f"round {record.number}{again}  sets {len(record.space)}  train {record.train_size}  "
        f"dev {max(record.scores):.4f}  best so far {record.best_score:.4f}  "
        f"mistakes {len(record.mistakes)}  images {len(record.images)}, kept {kept}  "
        f"pruned {len(record.pruned)}  {record.seconds:.0f} s"
    )


def outcome_line(outcome: Outcome) -> str:
    """Return the metrics of a model in one line."""
    parts = [("dev (selected on)", outcome.dev), ("test", outcome.test)]
    return "  ".join(
        f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        for name, metrics in parts
        if metrics
    )


def write_images(path: str, rounds: Sequence[Round], data: TextData) -> None:
    """Write every tau-image beside its row of dev, tab-separated, the whole file or nothing."""
    lines = ["\t".join(COLUMNS)]
    for record in rounds:
        for image in record.images:
            row = data.dev[image.source]
            fields = (
                record.number,
                record.replay,
                image.source,
                "yes" if image.kept else "no",
                spelt_label(data, image.label),
                spelt_label(data, row.label),
                spelt_inputs(image.input),
                spelt_inputs(row.inputs),
            )
            lines.append("\t".join(map(str, fields)))
    with open(f"{path}.tmp", "w", encoding="utf-8") as handle:
        handle.write("\n".join(lines) + "\n")
    os.replace(f"{path}.tmp", path)


def spelt_label(data: TextData, label: Any) -> str:
    """Return the name of a class, or a value with three decimals."""
    return data.task.labels[int(label)] if data.task.labels else f"{float(label):.3f}"


def spelt_inputs(inputs: Inputs) -> str:
    """Return an example in one line: " | " between texts, " || " between inputs."""
    return " || ".join(" | ".join(" ".join(text.split()) for text in texts) for texts in inputs)


def plot(path: str, rounds: Sequence[Round]) -> None:
    """Draw score and data size by round."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    scored, sized = figure.subplots(1, 2)
    steps = np.arange(len(rounds))
    for step, record in enumerate(rounds):
        scores = [score for score in record.scores if np.isfinite(score)]
        scored.plot(np.full(len(scores), step), scores, ".", color="0.7")
    scored.plot(steps, [max(record.scores) for record in rounds], "o-", label="best of the round")
    scored.plot(steps, [record.best_score for record in rounds], "--", label="best so far")
    scored.set_ylabel("dev score (selected on)")
    scored.legend(frameon=False)
    bottom = np.zeros(len(rounds))
    for name in sorted({name for record in rounds for name in record.label_counts}):
        counts = np.array([record.label_counts.get(name, 0) for record in rounds])
        sized.bar(steps, counts, bottom=bottom, label=f"class {name}")
        bottom = bottom + counts
    sized.set_ylabel("rows in train")
    sized.legend(frameon=False)
    for axes in (scored, sized):
        axes.set_xlabel("round" if not any(r.replay for r in rounds) else "round or replay")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(f"{path}.tmp", dpi=120, format="png")
    os.replace(f"{path}.tmp", path)
