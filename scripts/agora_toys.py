"""Agora on three toy tasks whose training sets are scarce and biased: a table and a plot.

    python -m scripts.agora_toys --seeds 30 --plot agora_toys.png --table agora_toys.md

For every seed a task is drawn: a biased training set (a part of the inputs never occurs), a small
representative dev set, a labeller (Timaeus: nearest neighbours on a few other rows) and a test set
that nothing is chosen on. Four models are compared on it: the best of the grid by dev score (the
first round of Agora), Agora, Agora with as many images of random dev rows instead of mistakes, and
Timaeus itself. Socrates is a small network; needs scikit-learn and matplotlib.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.agora import algorithm as agora
from bort.config import option, parse
from bort.errors import entry_point
from bort.types import Hyperparameters

TRAIN, DEV, TIMAEUS, TEST = 40, 100, 30, 2000  # rows
POOL = 600  # rows that the biased training set is taken from
METHODS = ("best of grid", "Agora", "Agora, random images", "Timaeus")
SPACE = agora.grid({"width": [2, 4, 8, 16], "decay": [1e-3, 0.1, 1.0], "seed": [0, 1]})

Task = Callable[[int, np.random.Generator], "tuple[np.ndarray, np.ndarray, np.ndarray]"]


@dataclasses.dataclass(frozen=True)
class ToySettings:
    """How often the toys are drawn, and where the outcome goes."""

    seeds: int = option(30, "draws of each task", minimum=2)
    plot: Optional[str] = option(None, "write a plot of the test accuracies here (PNG, PDF, SVG)")
    table: Optional[str] = option(None, "write the table here, in Markdown")


def two_moons(rows: int, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return inputs [rows, 2], classes [rows], and which rows training may see: the left half."""
    classes = generator.integers(0, 2, rows)
    angle = np.pi * generator.random(rows)
    x = np.where(classes, 1 - np.cos(angle), np.cos(angle))
    y = np.where(classes, 0.5 - np.sin(angle), np.sin(angle))
    inputs = np.stack([x, y], 1) + 0.3 * generator.standard_normal((rows, 2))
    return inputs, classes, inputs[:, 0] < 0.5


def xor(rows: int, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return inputs [rows, 2], classes [rows] and a mask: one quadrant is missing in training."""
    inputs = generator.uniform(-1, 1, (rows, 2))
    classes = (inputs[:, 0] * inputs[:, 1] > 0).astype(int)
    inputs = inputs + 0.1 * generator.standard_normal((rows, 2))
    return inputs, classes, (inputs[:, 0] < 0) | (inputs[:, 1] < 0)


def twenty_dimensions(rows: int, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return inputs [rows, 20], classes [rows] and a mask: half of the second axis is missing.

    Each class has two clusters: the first axis tells one pair apart, the third axis the other, and
    the second axis says which pair a row is of. Seventeen axes are noise.
    """
    classes = generator.integers(0, 2, rows)
    pair = generator.integers(0, 2, rows)
    inputs = generator.standard_normal((rows, 20))
    inputs[np.arange(rows), 2 * pair] += np.where(classes, 2.0, -2.0)
    inputs[:, 1] += np.where(pair, 2.5, -2.5)
    return inputs, classes, inputs[:, 1] < 0


TASKS: dict[str, tuple[Task, agora.Jitter]] = {
    "two moons": (two_moons, agora.Jitter(0.05, 0.3)),
    "XOR": (xor, agora.Jitter(0.05, 0.3)),
    "20 dimensions": (twenty_dimensions, agora.Jitter(0.5, 3.0)),
}


class Network:
    """Socrates: a network with one hidden layer, fitted by L-BFGS."""

    def fit(self, dataset: agora.Examples, theta: Hyperparameters) -> Any:
        """Return the fitted network; theta names its width, weight decay and seed."""
        from sklearn.neural_network import MLPClassifier

        network = MLPClassifier(
            (theta["width"],),
            alpha=theta["decay"],
            random_state=theta["seed"],
            solver="lbfgs",
            max_iter=200,
        )
        return network.fit(np.stack(dataset.inputs), dataset.labels)

    def predict(self, model: Any, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Return the classes of n inputs."""
        return model.predict(np.stack(inputs))


class Neighbours:
    """Timaeus: a vote of the five nearest rows of a small representative sample."""

    def __init__(self, sample: agora.Examples) -> None:
        from sklearn.neighbors import KNeighborsClassifier

        self.model = KNeighborsClassifier(5).fit(np.stack(sample.inputs), sample.labels)

    def label(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Return the classes of n inputs."""
        return self.model.predict(np.stack(inputs))


@dataclasses.dataclass(frozen=True)
class Draw:
    """One draw of a task: four sets that share no row."""

    train: agora.Examples
    dev: agora.Examples
    sample: agora.Examples
    test: agora.Examples


def draw(task: Task, seed: int) -> Draw:
    """Draw a task; only the training set is biased."""
    inputs, classes, seen = task(POOL + DEV + TIMAEUS + TEST, np.random.default_rng(seed))
    train = np.flatnonzero(seen[:POOL])[:TRAIN]
    ends = np.cumsum([POOL, DEV, TIMAEUS, TEST])
    rest = [np.arange(first, last) for first, last in zip(ends, ends[1:])]
    return Draw(*(agora.Examples(inputs[rows], classes[rows]) for rows in (train, *rest)))


def compare(task: Task, tau: agora.Tau, seed: int) -> list[float]:
    """Return the test accuracy of each of `METHODS` on one draw of the task."""
    data, socrates = draw(task, seed), Network()
    timaeus = Neighbours(data.sample)
    enumerated = agora.Store()  # Agora goes on from the grid's fits: they are its first round
    runs = (
        (agora.AgoraSettings(max_rounds=1), enumerated),
        (agora.AgoraSettings(), enumerated),
        (agora.AgoraSettings(images_from="random"), agora.Store()),
    )
    answers = []
    for settings, store in runs:
        result = agora.agora(
            socrates, timaeus, data.train, data.dev, SPACE, tau, settings, seed=seed, store=store
        )
        answers.append(socrates.predict(result.best.model, data.test.inputs))
    answers.append(timaeus.label(data.test.inputs))
    return [agora.accuracy(data.test.labels, each) for each in answers]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return mean and half width of its 95 % confidence interval (Student's t)."""
    from scipy.stats import t

    spread = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(t.ppf(0.975, len(values) - 1) * spread)


def table_of(accuracies: dict[str, np.ndarray]) -> str:
    """Return a Markdown table of means and gains, from accuracies [seeds, methods] by task."""
    heads = ["task", *METHODS, "Agora - best of grid", "draws won", "Agora - random images"]
    lines = [heads, ["---"] * len(heads)]
    for name, values in accuracies.items():
        columns = [*values.T, values[:, 1] - values[:, 0], values[:, 1] - values[:, 2]]
        means = ["{:.3f} ± {:.3f}".format(*interval(column)) for column in columns]
        won = f"{np.sum(values[:, 1] > values[:, 0])} of {len(values)}"
        lines.append([name, *means[:-1], won, means[-1]])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(accuracies: dict[str, np.ndarray], path: str) -> None:
    """Draw every draw's test accuracies, the means and their 95 % confidence intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(accuracies), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(accuracies), sharey=True, squeeze=False)[0]
    places = np.arange(len(METHODS))
    for panel, (name, values) in zip(panels, accuracies.items()):
        panel.plot(places, values.T, color="0.8", linewidth=0.7)
        means, halves = zip(*(interval(column) for column in values.T))
        panel.errorbar(places, means, halves, fmt="o", color="black", capsize=4)
        panel.set_title(name)
        panel.set_xticks(places, METHODS, rotation=20, ha="right")
    panels[0].set_ylabel("test accuracy: draws, mean, 95 % interval")
    figure.savefig(path, dpi=120)


@entry_point
def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Compare the methods on every task; print, and if asked write, the table and the plot."""
    (settings,) = parse(__doc__ or "", argv, ToySettings)
    warnings.simplefilter("ignore")  # a biased train set and fits cut short are the point here
    start = time.perf_counter()
    accuracies = {
        name: np.array([compare(task, tau, seed) for seed in range(settings.seeds)])
        for name, (task, tau) in TASKS.items()
    }
    table = table_of(accuracies)
    print(table)
    print(f"{settings.seeds} draws of each task, {time.perf_counter() - start:.0f} s")
    if settings.table:
        with open(settings.table, "w", encoding="utf-8") as handle:
            handle.write(table)
    if settings.plot:
        plot(accuracies, settings.plot)
    return accuracies


if __name__ == "__main__":
    main()
