"""The official metrics of GLUE, SuperGLUE and RACE, each over a whole set at once.

Nothing here averages over batches. A set on which a metric is undefined (constant predictions
under a correlation, no positive under F1) scores 0, so that no `nan` reaches early stopping.
Labels and predictions of different shapes, which NumPy might broadcast, raise `ValueError`.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from typing import Hashable, Sequence

import numpy as np


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Fraction of predictions that equal their label; both [n]."""
    labels, predictions = _paired(labels, predictions)
    return float(np.mean(labels == predictions))


def _paired(labels: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(labels), np.asarray(predictions)
    if first.shape != second.shape:
        raise ValueError(f"labels have shape {first.shape}, predictions {second.shape}")
    return first, second


def f1(labels: np.ndarray, predictions: np.ndarray, positive: int = 1) -> float:
    """F1 of the class `positive`: 2 tp / (2 tp + fp + fn); both arrays [n]."""
    labels, predictions = _paired(labels, predictions)
    actual, predicted = labels == positive, predictions == positive
    total = actual.sum() + predicted.sum()
    return float(2 * (actual & predicted).sum() / total) if total else 0.0


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Unweighted mean of F1 over the classes that occur among labels or predictions."""
    classes = np.union1d(labels, predictions)
    return float(np.mean([f1(labels, predictions, positive) for positive in classes]))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews correlation of two or more classes (Gorodkin's R_K); arrays [n] of class numbers.

    GLUE scores CoLA and AX by it, SuperGLUE AX-b.
    """
    labels, predictions = _paired(labels, predictions)
    classes, numbers = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    actual, predicted = np.split(np.eye(len(classes))[numbers], 2)  # one-hot, [n, classes]
    covariance = _covariance(actual, predicted)
    variances = _covariance(actual, actual) * _covariance(predicted, predicted)
    return float(covariance / np.sqrt(variances)) if variances > 0 else 0.0


def _covariance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sum((first - first.mean(axis=0)) * (second - second.mean(axis=0))))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson's linear correlation of two arrays [n]."""
    labels, predictions = _paired(labels, predictions)
    first, second = labels.astype(np.float64), predictions.astype(np.float64)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    # Each is scaled to the range 1, as squares of very small values would be 0.
    first, second = first / np.ptp(first), second / np.ptp(second)
    deviations = np.sqrt(_covariance(first, first)) * np.sqrt(_covariance(second, second))
    return float(_covariance(first, second) / deviations)


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays [n]; equal values share their mean rank."""
    labels, predictions = _paired(labels, predictions)
    if np.isnan(labels).any() or np.isnan(predictions).any():
        return float("nan")  # as SciPy's: NaN has no rank
    return pearson(_ranks(labels), _ranks(predictions))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def exact_groups(groups: Sequence[Hashable], labels: np.ndarray, predictions: np.ndarray) -> float:
    """Fraction of groups in which every prediction is right: MultiRC's exact match (EM).

    groups: [n] the question that each answer belongs to.
    """
    labels, predictions = _paired(labels, predictions)
    right: dict[Hashable, bool] = defaultdict(lambda: True)
    for group, same in zip(groups, labels == predictions):
        right[group] &= bool(same)
    return sum(right.values()) / len(right)


def parity(groups: Sequence[Hashable], predictions: np.ndarray) -> float:
    """Fraction of pairs whose two members get the same class: AX-g's gender parity.

    groups: [n] the minimal pair of each example; a group that is not a pair does not count.
    """
    pairs: dict[Hashable, list[int]] = defaultdict(list)
    for group, prediction in zip(groups, predictions):
        pairs[group].append(int(prediction))
    complete = [pair for pair in pairs.values() if len(pair) == 2]
    return sum(pair[0] == pair[1] for pair in complete) / len(complete) if complete else 0.0


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Lower-case, and remove punctuation, articles and double spaces: how ReCoRD compares."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the answer equals one of the right `answers` after normalisation, else 0.0."""
    return float(normalise_answer(prediction) in map(normalise_answer, answers))


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 between the words of the answer and those of one of the right `answers`."""
    return max(_word_f1(prediction, answer) for answer in answers)


def _word_f1(prediction: str, answer: str) -> float:
    predicted = normalise_answer(prediction).split()
    actual = normalise_answer(answer).split()
    common = sum((Counter(predicted) & Counter(actual)).values())
    return 2 * common / (len(predicted) + len(actual)) if common else 0.0
