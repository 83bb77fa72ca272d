"""The report of a run of Agora on text: printed lines, agora.json, images.tsv, a plot."""

from __future__ import annotations

import os
from typing import Mapping, NamedTuple, Optional, Sequence

import numpy as np

from bort.agora.algorithm import Best, Label, Round
from bort.agora.tau import Inputs
from bort.agora.text import TextData
from bort.errors import UserError
from bort.files import atomic_write, read_json, write_json
from bort.plots import figure_file
from bort.sums import write_sums
from bort.types import Hyperparameters, JSONObject

FORMAT_VERSION = 1
COLUMNS = ("round", "replay", "dev_row", "kept", "timaeus", "dev_label", "image", "dev_text")


class ModelMetrics(NamedTuple):
    """The metrics of a model: `dev` was selected on, `test` was not (None without labels)."""

    dev: Mapping[str, float]
    test: Optional[Mapping[str, float]]


class Report:
    """Collects the rounds of a run and writes them after each.

    A run that is resumed does not write those that are in agora.json before it has more: it may yet
    be refused, because it is another one.
    """

    def __init__(
        self, folder: str, data: TextData, space: Sequence[Hyperparameters], timaeus: str
    ) -> None:
        self.folder, self.data = folder, data
        self._path = os.path.join(folder, "agora.json")
        self._before = _rounds_in(self._path)
        self.rounds: list[Round] = []
        self.content: JSONObject = {
            "format": FORMAT_VERSION,
            "task": data.task.name,
            "rows": {"train": len(data.train), "dev": len(data.dev), "test": len(data.test)},
            "train_rows_dropped": data.dropped,
            "timaeus": {"source": timaeus},
            "search_space": list(space),
            "rounds": [],
        }

    def add_timaeus(self, metrics: ModelMetrics) -> None:
        """Add the metrics of Timaeus."""
        self.content["timaeus"].update(metrics._asdict())

    def add(self, record: Round) -> None:
        """Add a round: print it, and write agora.json and images.tsv unless they have it."""
        self.rounds.append(record)
        self.content["rounds"].append({**record.as_dict(), "label_shares": label_shares(record)})
        print(round_line(record), flush=True)
        if len(self.rounds) > self._before:
            self.write()

    def finish(self, best: Best, first: ModelMetrics, last: ModelMetrics) -> None:
        """Add the metrics of the best of the grid (the first round) and of the run's best.

        `seconds` are those of all fits: they survive interruptions.
        """
        self.content["best_of_grid"] = first._asdict()
        self.content["best"] = {
            "theta": dict(best.hparams),
            "place": best.index,
            "round": best.round,
            "replay": best.replay,
            "score": best.score,
            **last._asdict(),
        }
        self.content["seconds"] = sum(record.seconds for record in self.rounds)
        self.write()
        plot_rounds(os.path.join(self.folder, "agora.png"), self.rounds)
        print(f"best of the grid  {metrics_line(first)}")
        print(f"Agora             {metrics_line(last)}")

    def write(self) -> None:
        """Write agora.json and images.tsv."""
        write_json(self._path, self.content)
        write_augmented(os.path.join(self.folder, "images.tsv"), self.rounds, self.data)


def _rounds_in(path: str) -> int:
    """Return how many rounds an agora.json has; 0 where there is none, or a damaged one."""
    try:
        return len(read_json(path)["rounds"])
    except (UserError, KeyError, TypeError):
        return 0


def label_shares(record: Round) -> dict[str, float]:
    """Return the share of each class in the data of a round's fits."""
    return {name: count / record.train_size for name, count in record.label_counts.items()}


def round_line(record: Round) -> str:
    """Return a round in one line."""
    kept = sum(example.kept for example in record.augmented)
    replay = f".{record.replay}" if record.replay else ""
    return (
        f"round {record.number}{replay}  sets {len(record.space)}  train {record.train_size}  "
        f"dev {max(record.scores):.4f}  best so far {record.best_score:.4f}  "
        f"mistakes {len(record.mistakes)}  augmented {len(record.augmented)}, kept {kept}  "
        f"pruned {len(record.pruned)}  {record.seconds:.0f} s"
    )


def metrics_line(model: ModelMetrics) -> str:
    """Return the metrics of a model in one line."""
    parts = [("dev (selected on)", model.dev), ("test", model.test)]
    return "  ".join(
        f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        for name, metrics in parts
        if metrics
    )


def write_augmented(path: str, rounds: Sequence[Round], data: TextData) -> None:
    """Write each augmented example beside its row of dev, tab-separated."""
    lines = ["\t".join(COLUMNS)]
    for record in rounds:
        for example in record.augmented:
            row = data.dev[example.source]
            fields = (
                record.number,
                record.replay,
                example.source,
                "yes" if example.kept else "no",
                label_text(data, example.label),
                label_text(data, row.label),
                inputs_text(example.input),
                inputs_text(row.inputs),
            )
            lines.append("\t".join(map(str, fields)))
    with atomic_write(path) as handle:
        handle.write("\n".join(lines) + "\n")
    write_sums(os.path.dirname(path), [os.path.basename(path)])


def label_text(data: TextData, label: Label) -> str:
    """Return the name of a class, or a value with three decimals."""
    return data.task.labels[int(label)] if data.task.labels else f"{float(label):.3f}"


def inputs_text(inputs: Inputs) -> str:
    """Return an example on one line: " | " between texts, " || " between inputs."""
    return " || ".join(" | ".join(" ".join(text.split()) for text in texts) for texts in inputs)


def plot_rounds(path: str, rounds: Sequence[Round]) -> None:
    """Plot score and size of the training data by round."""
    steps = np.arange(len(rounds))
    with figure_file(path, 8, 3.4) as figure:
        scored, sized = figure.subplots(1, 2)
        for step, record in enumerate(rounds):
            scores = [score for score in record.scores if np.isfinite(score)]
            scored.plot(np.full(len(scores), step), scores, ".", color="0.7")
        best = [max(record.scores) for record in rounds]
        scored.plot(steps, best, "o-", label="best of the round")
        scored.plot(steps, [record.best_score for record in rounds], "--", label="best so far")
        scored.set_ylabel("dev score (selected on)")
        bottom = np.zeros(len(rounds))
        for name in sorted({name for record in rounds for name in record.label_counts}):
            counts = np.array([record.label_counts.get(name, 0) for record in rounds])
            sized.bar(steps, counts, bottom=bottom, label=f"class {name}")
            bottom = bottom + counts
        sized.set_ylabel("rows in train")
        replays = any(record.replay for record in rounds)
        for axes in (scored, sized):
            axes.legend(frameon=False)
            axes.set_xlabel("round or replay" if replays else "round")
            axes.xaxis.get_major_locator().set_params(integer=True)
