"""Fine-tuning in closed form, and a small task, for the tests of Agora on text."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.task import Example

GOOD = ["warm", "funny", "bright", "fresh", "lively", "moving"]
BAD = ["dull", "flat", "stale", "clumsy", "lifeless", "tired"]
FILLER = ["a", "the", "story", "film", "scene", "plot", "with", "of", "very", "rather"]


def review(generator, words=8):
    """Return a review and whether it is positive: more good words than bad ones."""
    balance = 0
    while not balance:
        chosen = generator.choice([*GOOD, *BAD, *FILLER], words).tolist()
        balance = sum(word in GOOD for word in chosen) - sum(word in BAD for word in chosen)
    return " ".join(chosen), int(balance > 0)


def reviews(rows, seed=0):
    generator = np.random.default_rng(seed)
    made = dict(review(generator) for _ in range(2 * rows))
    return [
        Example(number, ((text,),), label)
        for number, (text, label) in enumerate(list(made.items())[:rows])
    ]


def rule(rows):
    """Score reviews rightly."""
    words = [row.inputs[0][0].split() for row in rows]
    balance = [sum(w in GOOD for w in each) - sum(w in BAD for w in each) for each in words]
    return np.stack([np.zeros(len(rows)), np.array(balance, float)], axis=1)


@dataclass(frozen=True)
class RidgeTuner:
    """Ridge regression on hashed words, once per class; hparams is a decay and a seed."""

    dev: Any
    outputs: int = 2
    width: int = 24

    def features(self, rows, seed):
        table = np.zeros((len(rows), self.width))
        for index, row in enumerate(rows):
            for texts in row.inputs:
                for word in " ".join(texts).split():
                    table[index, zlib.crc32(f"{seed}{word}".encode()) % self.width] += 1
        return table

    def fit(self, rows, hparams, start, folder):
        x = self.features(rows, hparams["seed"])
        labels = np.array([row.label for row in rows])
        y = np.eye(self.outputs)[labels.astype(int)] if self.outputs > 1 else labels[:, None]
        origin = np.zeros((self.width, self.outputs))
        if start:
            with np.load(os.path.join(start, "model.npz")) as arrays:
                origin = arrays["weights"]
        penalty = hparams["decay"] * np.eye(self.width)
        weights = np.linalg.solve(x.T @ x + penalty, x.T @ y + penalty @ origin)
        np.savez(os.path.join(folder, "model.npz"), weights=weights, seed=hparams["seed"])
        return self.score(folder, self.dev)

    def score(self, folder, rows):
        with np.load(os.path.join(folder, "model.npz")) as arrays:
            return self.features(rows, int(arrays["seed"])) @ arrays["weights"]
