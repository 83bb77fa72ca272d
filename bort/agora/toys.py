"""Three toy tasks for Agora whose training sets are scarce and biased.

For every seed a task is drawn: a biased training set (some of the inputs never occur), a small
representative dev set, a labeller (Timaeus: nearest neighbours on a few other rows) and a test set
on which nothing is selected. Socrates is a small network. Needs scikit-learn and Matplotlib.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import Any, Callable, Optional, Sequence

import numpy as np

from bort.agora import algorithm as agora
from bort.config import option
from bort.files import atomic_write, require_place
from bort.grids import combinations
from bort.plots import figure_file, picture_kind
from bort.tables import markdown_table
from bort.types import Hyperparameters
from data.metrics import accuracy

TRAIN, DEV, TIMAEUS, TEST = 40, 100, 30, 2000  # rows
POOL = 600  # rows of which the biased training set is a part
METHODS = ("best of grid", "Agora", "Agora, random augmentation", "Timaeus")
SPACE = combinations({"width": [2, 4, 8, 16], "decay": [1e-3, 0.1, 1.0], "seed": [0, 1]})

Task = Callable[[int, np.random.Generator], "tuple[np.ndarray, np.ndarray, np.ndarray]"]


@dataclasses.dataclass(frozen=True)
class ToySettings:
    """The number of draws, and the files to write."""

    seeds: int = option(30, "draws of each task", minimum=2)
    plot: Optional[str] = option(None, "file for a plot of the test accuracies (PNG, PDF, SVG)")
    table: Optional[str] = option(None, "file for the table, in Markdown")


def two_moons(
    rows: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return inputs [rows, 2], classes [rows] and the rows allowed in training: the left half."""
    classes = generator.integers(0, 2, rows)
    angle = np.pi * generator.random(rows)
    x = np.where(classes, 1 - np.cos(angle), np.cos(angle))
    y = np.where(classes, 0.5 - np.sin(angle), np.sin(angle))
    inputs = np.stack([x, y], 1) + 0.3 * generator.standard_normal((rows, 2))
    return inputs, classes, inputs[:, 0] < 0.5


def xor(rows: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return inputs [rows, 2], classes [rows] and a mask: one quadrant is missing in training."""
    inputs = generator.uniform(-1, 1, (rows, 2))
    classes = (inputs[:, 0] * inputs[:, 1] > 0).astype(int)
    inputs = inputs + 0.1 * generator.standard_normal((rows, 2))
    return inputs, classes, (inputs[:, 0] < 0) | (inputs[:, 1] < 0)


def twenty_dimensions(
    rows: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return inputs [rows, 20], classes [rows] and a mask: half of the second axis is missing.

    Each class has two clusters: the first axis separates one pair, the third axis the other, and
    the second axis says to which pair a row belongs. Seventeen axes are noise.
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


class ToyNetwork:
    """Socrates: a network with one hidden layer, fitted by L-BFGS."""

    def fit(self, dataset: agora.Examples, hparams: Hyperparameters, start: Any = None) -> Any:
        """Return the network fitted with a width, weight decay and seed."""
        from sklearn.neural_network import MLPClassifier

        network = MLPClassifier(
            (hparams["width"],),
            alpha=hparams["decay"],
            random_state=hparams["seed"],
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


def draw_task(task: Task, seed: int) -> Draw:
    """Draw a task; only the training set is biased."""
    inputs, classes, seen = task(POOL + DEV + TIMAEUS + TEST, np.random.default_rng(seed))
    train = np.flatnonzero(seen[:POOL])[:TRAIN]
    ends = np.cumsum([POOL, DEV, TIMAEUS, TEST])
    rest = [np.arange(first, last) for first, last in zip(ends, ends[1:])]
    return Draw(*(agora.Examples(inputs[rows], classes[rows]) for rows in (train, *rest)))


def compare_methods(task: Task, tau: agora.Tau, seed: int) -> list[float]:
    """Return the test accuracy of each of `METHODS` on one draw of the task."""
    data, socrates = draw_task(task, seed), ToyNetwork()
    timaeus = Neighbours(data.sample)
    enumerated = agora.Store()  # the fits of the grid are the first round of Agora
    runs = (
        (agora.AgoraSettings(max_rounds=1), enumerated),
        (agora.AgoraSettings(), enumerated),
        (agora.AgoraSettings(images_from="random"), agora.Store()),
    )
    predictions = []
    for settings, store in runs:
        result = agora.agora(
            socrates, timaeus, data.train, data.dev, SPACE, tau, settings, seed=seed, store=store
        )
        predictions.append(socrates.predict(result.best.model, data.test.inputs))
    predictions.append(timaeus.label(data.test.inputs))
    return [accuracy(data.test.labels, each) for each in predictions]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return mean and half width of its 95 % confidence interval (Student's t)."""
    from scipy.stats import t

    spread = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(t.ppf(0.975, len(values) - 1) * spread)


def table_of(accuracies: dict[str, np.ndarray]) -> str:
    """Return a Markdown table of means and gains, from accuracies [seeds, methods] by task."""
    rows = []
    for name, values in accuracies.items():
        columns = [*values.T, values[:, 1] - values[:, 0], values[:, 1] - values[:, 2]]
        means = ["{:.3f} ± {:.3f}".format(*interval(column)) for column in columns]
        won = f"{np.sum(values[:, 1] > values[:, 0])} of {len(values)}"
        rows.append([name, *means[:-1], won, means[-1]])
    gains = ["Agora - best of grid", "draws won", "Agora - random augmentation"]
    return markdown_table(["task", *METHODS, *gains], rows)


def plot_accuracies(accuracies: dict[str, np.ndarray], path: str) -> None:
    """Plot the test accuracies of all draws, their means and 95 % confidence intervals."""
    with figure_file(path, 4 * len(accuracies), 4) as figure:
        panels = figure.subplots(1, len(accuracies), sharey=True, squeeze=False)[0]
        positions = np.arange(len(METHODS))
        for panel, (name, values) in zip(panels, accuracies.items()):
            panel.plot(positions, values.T, color="0.8", linewidth=0.7)
            means, halves = zip(*(interval(column) for column in values.T))
            panel.errorbar(positions, means, halves, fmt="o", color="black", capsize=4)
            panel.set_title(name)
            panel.set_xticks(positions, METHODS, rotation=20, ha="right")
        panels[0].set_ylabel("test accuracy: draws, mean, 95 % interval")


def run_toys(settings: ToySettings) -> dict[str, np.ndarray]:
    """Compare the methods on every task; print, and if asked write, the table and the plot."""
    if settings.plot:  # both before minutes of computation
        picture_kind(settings.plot)
    for path in filter(None, (settings.plot, settings.table)):
        require_place(path)
    warnings.simplefilter("ignore")  # biased training sets and short fits are intended here
    start = time.perf_counter()
    accuracies = {
        name: np.array([compare_methods(task, tau, seed) for seed in range(settings.seeds)])
        for name, (task, tau) in TASKS.items()
    }
    table = table_of(accuracies)
    print(table)
    print(f"{settings.seeds} draws of each task, {time.perf_counter() - start:.0f} s")
    if settings.table:
        with atomic_write(settings.table) as handle:
            handle.write(table)
    if settings.plot:
        plot_accuracies(accuracies, settings.plot)
    return accuracies
