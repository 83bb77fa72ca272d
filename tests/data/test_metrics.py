"""Whole-set metrics against scikit-learn, SciPy and hand-worked examples."""

from __future__ import annotations

import numpy as np
import pytest

from data import metrics
from data.task import Example
from data.tasks import get_task

# Labels 1 1 1 0 0 0 0 1, predictions 1 0 1 0 1 0 0 1: tp 3, fn 1, fp 1, tn 3.
LABELS = np.array([1, 1, 1, 0, 0, 0, 0, 1])
PREDICTIONS = np.array([1, 0, 1, 0, 1, 0, 0, 1])


def random_classes(seed: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=200)
    noise = generator.integers(classes, size=200)
    return labels, np.where(generator.random(200) < 0.6, labels, noise)


def test_hand_worked_example():
    assert metrics.accuracy(LABELS, PREDICTIONS) == 0.75
    assert metrics.f1(LABELS, PREDICTIONS) == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    # (tp tn - fp fn) / sqrt((tp+fp)(tp+fn)(tn+fp)(tn+fn)) = (9 - 1) / 16
    assert metrics.matthews(LABELS, PREDICTIONS) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "name", ["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "exact_groups"]
)
@pytest.mark.parametrize(
    "predictions", [PREDICTIONS[:1], PREDICTIONS[:-1], PREDICTIONS[:-2], PREDICTIONS[:, None]]
)
def test_predictions_of_another_shape_than_the_labels_are_refused(name, predictions):
    groups = [range(8)] if name == "exact_groups" else []
    with pytest.raises(ValueError, match=r"labels have shape \(8,\), predictions \("):
        getattr(metrics, name)(*groups, LABELS, predictions)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_classes_equal_scikit_learn(seed, classes):
    reference = pytest.importorskip("sklearn.metrics")
    labels, predictions = random_classes(seed, classes)
    assert metrics.accuracy(labels, predictions) == pytest.approx(
        reference.accuracy_score(labels, predictions)
    )
    assert metrics.matthews(labels, predictions) == pytest.approx(
        reference.matthews_corrcoef(labels, predictions)
    )
    assert metrics.macro_f1(labels, predictions) == pytest.approx(
        reference.f1_score(labels, predictions, average="macro")
    )
    if classes == 2:
        assert metrics.f1(labels, predictions) == pytest.approx(
            reference.f1_score(labels, predictions)
        )


@pytest.mark.parametrize("seed", range(3))
def test_multirc_cb_and_ax_g_equal_scikit_learn_as_the_tasks_report_them(seed):
    reference = pytest.importorskip("sklearn.metrics")
    labels, predictions = random_classes(seed, 2)
    uids = [(row // 12, row // 4, row) for row in range(200)]  # questions of four answers
    examples = [Example(uid, (), label) for uid, label in zip(uids, labels.tolist())]
    values = get_task("MultiRC").metrics(examples, np.eye(2)[predictions])
    right = (labels == predictions).reshape(-1, 4).all(axis=1)
    f1a = reference.f1_score(labels, predictions)
    assert values == pytest.approx({"f1a": f1a, "exact_match": right.mean()})
    examples = [Example(row, (), label) for row, label in enumerate(labels.tolist())]
    values = get_task("AX-g").metrics(examples, np.eye(2)[predictions])
    same = predictions[::2] == predictions[1::2]
    accuracy = reference.accuracy_score(labels, predictions)
    assert values == pytest.approx({"accuracy": accuracy, "parity": same.mean()})
    labels, predictions = random_classes(seed, 3)
    examples = [Example(row, (), label) for row, label in enumerate(labels.tolist())]
    values = get_task("CB").metrics(examples, np.eye(3)[predictions])
    macro = reference.f1_score(labels, predictions, average="macro")
    assert values["macro_f1"] == pytest.approx(macro)


def test_record_scores_the_chosen_candidate_of_each_query():
    def candidates(query: int, answers: tuple[str, ...], *names: str) -> list[Example]:
        return [Example((query, n), (), 0, name, answers) for n, name in enumerate(names)]

    examples = candidates(0, ("The Vik",), "Per Vik", "Orsa") + candidates(1, ("Lund",), "a Lund")
    margins = np.array([2.0, 1.0, -3.0])  # chosen: "Per Vik" (F1 2/3), and "a Lund" (exact)
    values = get_task("ReCoRD").metrics(examples, np.stack([-margins, margins], axis=1))
    assert values == pytest.approx({"f1": (2 / 3 + 1) / 2, "exact_match": 1 / 2})


@pytest.mark.parametrize("digits", [0, 1, 6])
@pytest.mark.parametrize("seed", range(5))
def test_correlations_equal_scipy_with_and_without_ties(seed, digits):
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(seed)
    labels = np.round(5 * generator.random(150), digits)
    predictions = np.round(labels + generator.normal(size=150), digits)
    pearson = stats.pearsonr(labels, predictions)[0]
    spearman = stats.spearmanr(labels, predictions)[0]
    assert metrics.pearson(labels, predictions) == pytest.approx(pearson)
    assert metrics.spearman(labels, predictions) == pytest.approx(spearman)


def test_correlations_by_hand():
    labels, predictions = np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 6.0])
    # deviations -1 0 1 and -1 -2 3: covariance 4, squares 2 and 14
    assert metrics.pearson(labels, predictions) == pytest.approx(4 / np.sqrt(28))
    assert metrics.spearman(labels, predictions) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_with_nan_is_nan_as_in_scipy(name):
    labels, predictions = np.array([1, 2, 3]), np.array([1.0, np.nan, 2.0])
    stats = pytest.importorskip("scipy.stats")
    assert np.isnan(stats.spearmanr(labels, predictions)[0])
    assert np.isnan(getattr(metrics, name)(labels, predictions))


def test_whole_set_is_not_the_mean_of_its_batches():
    labels, predictions = random_classes(1, 2)
    batches = [metrics.f1(labels[i : i + 8], predictions[i : i + 8]) for i in range(0, 200, 8)]
    assert metrics.f1(labels, predictions) != pytest.approx(np.mean(batches), abs=1e-3)


def test_undefined_metrics_are_zero():
    constant = np.ones(6)
    assert metrics.pearson(np.arange(6), constant) == 0
    assert metrics.spearman(constant, np.arange(6)) == 0
    assert metrics.matthews(np.array([0, 1, 0]), np.array([1, 1, 1])) == 0
    assert metrics.f1(np.zeros(3), np.zeros(3)) == 0


def test_correlation_of_tiny_differences_does_not_cancel():
    labels = np.array([0.0, 1.0, 2.0])
    assert metrics.pearson(labels, 1e8 + labels) == pytest.approx(1.0)
    assert metrics.pearson(labels, 1e-200 * labels) == pytest.approx(1.0)


def test_class_that_is_only_predicted_counts_in_macro_f1():
    # class 0: 2 of 3 right, F1 4/5; class 2 has no example, F1 0
    value = metrics.macro_f1(np.array([0, 0, 0]), np.array([0, 0, 2]))
    assert value == pytest.approx((4 / 5 + 0) / 2)


def test_exact_groups_counts_questions_without_a_mistake():
    groups = [(0, 1), (0, 1), (0, 2), (1, 1), (1, 1)]
    labels, predictions = np.array([1, 0, 1, 0, 0]), np.array([1, 0, 0, 0, 0])
    assert metrics.exact_groups(groups, labels, predictions) == pytest.approx(2 / 3)


def test_parity_counts_pairs_with_equal_predictions():
    assert metrics.parity([0, 0, 1, 1, 2, 2], np.array([0, 0, 1, 0, 1, 1])) == pytest.approx(2 / 3)
    assert metrics.parity([0, 0, 1], np.array([0, 0, 1])) == 1  # a member is missing: no pair


def test_answers_are_compared_without_case_punctuation_and_articles():
    assert metrics.normalise_answer("The  U.S. Army, an army") == "us army army"
    assert metrics.answer_match("the Lund", ["Orsa", "Lund."]) == 1
    assert metrics.answer_match("Lunden", ["Lund"]) == 0


def test_answer_f1_is_the_best_over_the_right_answers():
    # "per vik" against "vik": precision 1/2, recall 1
    assert metrics.answer_f1("Per Vik", ["Holm", "Vik"]) == pytest.approx(2 / 3)
    assert metrics.answer_f1("Orsa", ["Holm"]) == 0
    # words count as often as they occur: 1 common word, 3 + 2 words
    assert metrics.answer_f1("new new york", ["new jersey"]) == pytest.approx(2 / 5)
