from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from mxnet import nd

from bort.pretraining.distillation import (
    LossParts,
    correct_predictions,
    distillation_kl,
    distillation_loss,
    masked_lm_loss,
    squared_distance,
)
from tests import reference

TEMPERATURES = [0.5, 1.0, 2.0, 7.0]


class Case(NamedTuple):
    student: np.ndarray
    teacher: np.ndarray
    labels: np.ndarray


@pytest.fixture
def case() -> Case:
    generator = np.random.default_rng(8)
    student, teacher = generator.normal(0, 3, (2, 6, 11))
    return Case(student, teacher, generator.integers(0, 11, 6))


def array(values: np.ndarray, dtype: str = "float32") -> Any:
    return nd.array(values, dtype=dtype)


def loss_of(
    case: Case,
    mlm_weight: float = 0.3,
    teacher_ce_weight: float = 0.7,
    temperature: float = 2.0,
    dtype: str = "float32",
) -> LossParts:
    """Evaluate the loss under test on NumPy arrays."""
    return distillation_loss(
        array(case.student, dtype),
        array(case.labels, dtype),
        array(case.teacher, dtype),
        mlm_weight,
        teacher_ce_weight,
        temperature,
    )


def gradient_of(case: Case, *weights: float) -> np.ndarray:
    """Return the gradient of the total with respect to the student's logits, in float64."""
    return loss_of(case, *weights, dtype="float64").gradient.asnumpy()


def test_cross_entropy_is_that_of_numpy(case: Case) -> None:
    losses = masked_lm_loss(array(case.student), array(case.labels)).asnumpy()
    expected = reference.cross_entropy(case.student, case.labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_divergence_is_that_of_numpy(case: Case, temperature: float) -> None:
    values = distillation_kl(array(case.student), array(case.teacher), temperature).asnumpy()
    expected = reference.distillation_kl(case.student, case.teacher, temperature)
    # oneDNN's log-softmax is exact to 4e-6 nats, which T^2 multiplies.
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=8e-6 * temperature**2)
    assert values.shape == (6,)
    assert (values > 0).all()


def test_divergence_by_hand() -> None:
    """The teacher says (1/2, 1/2), the student (1/4, 3/4): KL = ln 2 - ln 3 / 2."""
    student = array(np.log([[1.0, 3.0]]))
    value = distillation_kl(student, array(np.zeros((1, 2))), 1.0).asscalar()
    assert value == pytest.approx(np.log(2) - np.log(3) / 2, abs=8e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_teacher_against_itself_is_zero(case: Case, temperature: float) -> None:
    parts = loss_of(case._replace(student=case.teacher), 0.0, 1.0, temperature)
    np.testing.assert_array_equal(parts.kl.asnumpy(), 0)
    np.testing.assert_allclose(parts.gradient.asnumpy(), 0, atol=1e-6)


def test_logits_that_differ_by_a_constant_are_the_same_teacher(case: Case) -> None:
    shifted = case.teacher + 5
    value = distillation_kl(array(shifted), array(case.teacher), 2.0).asnumpy()
    np.testing.assert_allclose(value, 0, atol=1e-5)


def test_the_factor_keeps_the_gradient_at_high_temperatures(case: Case) -> None:
    """T^2 KL tends to half the squared distance of the centred logits, over the vocabulary."""

    def centred(logits: np.ndarray) -> np.ndarray:
        return logits - logits.mean(axis=-1, keepdims=True)

    distance = centred(case.student) - centred(case.teacher)
    value = distillation_kl(array(case.student, "float64"), array(case.teacher, "float64"), 1e4)
    np.testing.assert_allclose(value.asnumpy(), (distance**2).mean(axis=-1) / 2, rtol=1e-3)
    gradient = gradient_of(case, 0.0, 1.0, 1e4)
    np.testing.assert_allclose(gradient, distance / 11, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.1, 0.5)])
def test_gradient_is_the_one_derived_by_hand(
    case: Case, weights: tuple[float, float], temperature: float
) -> None:
    gradient = gradient_of(case, *weights, temperature)
    expected = reference.distillation_gradient(
        case.student, case.labels, case.teacher, *weights, temperature
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)


def test_gradient_is_the_slope_of_the_loss(case: Case) -> None:
    step = 1e-5
    slopes = np.empty_like(case.student)
    for place in np.ndindex(case.student.shape):
        totals = []
        for sign in (1, -1):
            moved = case.student.copy()
            moved[place] += sign * step
            parts = loss_of(case._replace(student=moved), 0.3, 0.7, 2.0, "float64")
            totals.append(parts.total.asscalar())
        slopes[place] = (totals[0] - totals[1]) / (2 * step)
    np.testing.assert_allclose(gradient_of(case, 0.3, 0.7, 2.0), slopes, atol=1e-8)


def test_float32_gradient_is_that_of_float64(case: Case) -> None:
    gradient = loss_of(case, 0.1, 0.5, 2.0).gradient.asnumpy()
    np.testing.assert_allclose(gradient, gradient_of(case, 0.1, 0.5, 2.0), atol=1e-6)


def test_parts_are_weighed_sums(case: Case) -> None:
    parts = loss_of(case, mlm_weight=0.3, teacher_ce_weight=0.7, temperature=2.0)
    assert all(part.shape == (1,) for part in parts[:3])
    mlm = reference.cross_entropy(case.student, case.labels).sum()
    kl = reference.distillation_kl(case.student, case.teacher, 2.0).sum()
    assert parts.mlm.asscalar() == pytest.approx(mlm, rel=1e-5)
    assert parts.kl.asscalar() == pytest.approx(kl, rel=1e-5)
    assert parts.total.asscalar() == pytest.approx(0.3 * mlm + 0.7 * kl, rel=1e-5)


def test_the_sums_of_micro_batches_add_up_to_those_of_the_batch(case: Case) -> None:
    whole = loss_of(case)
    pieces = [loss_of(Case(*(values[part] for values in case))) for part in (slice(1), slice(1, 6))]
    for name in ("total", "mlm", "kl"):
        total = sum(getattr(piece, name).asscalar() for piece in pieces)
        assert total == pytest.approx(getattr(whole, name).asscalar(), rel=1e-5)


def test_without_teacher_the_loss_is_masked_lm(case: Case) -> None:
    parts = distillation_loss(array(case.student), array(case.labels), None, 0.3, 0.7, 2.0)
    mlm = reference.cross_entropy(case.student, case.labels).sum()
    assert parts.total.asscalar() == pytest.approx(0.3 * mlm, rel=1e-5)
    assert parts.mlm.asscalar() == pytest.approx(mlm, rel=1e-5)
    assert parts.kl.shape == (1,)
    assert parts.kl.asscalar() == 0
    expected = 0.3 * (reference.softmax(case.student) - np.eye(11)[case.labels])
    np.testing.assert_allclose(parts.gradient.asnumpy(), expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_extreme_logits_stay_finite(temperature: float) -> None:
    student = np.array([[80.0, -80.0, 0.0], [0.0, 0.0, 0.0]])
    teacher = np.array([[-80.0, 80.0, 0.0], [90.0, 0.0, -90.0]])
    case = Case(student, teacher, np.array([1, 2]))
    parts = loss_of(case, temperature=temperature)
    kl = reference.distillation_kl(student, teacher, temperature).sum()
    assert parts.kl.asscalar() == pytest.approx(kl, rel=1e-5)
    assert parts.mlm.asscalar() == pytest.approx(160 + np.log(3), rel=1e-5)
    assert np.isfinite(gradient_of(case, 0.3, 0.7, temperature)).all()


def test_correct_predictions_are_counted(case: Case) -> None:
    labels = case.student.argmax(axis=-1)
    labels[[0, 3]] += 1
    count = correct_predictions(array(case.student), array(labels % 11))
    assert count.shape == (1,)
    assert count.asscalar() == 4


def test_squared_distance_is_the_mean_over_the_vocabulary(case: Case) -> None:
    values = squared_distance(array(case.student), array(case.teacher)).asnumpy()
    difference = reference.softmax(case.student) - reference.softmax(case.teacher)
    np.testing.assert_allclose(values, (difference**2).mean(axis=-1), rtol=1e-5)


def test_float32_holds_over_the_whole_vocabulary() -> None:
    student, teacher = np.random.default_rng(0).normal(0, 2, (2, 3, 50265))
    # The last token and its neighbour: ids this large still have to be distinguished.
    labels = np.array([50264, 50263, 0])
    mlm = masked_lm_loss(array(student), array(labels)).asnumpy()
    np.testing.assert_allclose(mlm, reference.cross_entropy(student, labels), rtol=1e-5)
    kl = distillation_kl(array(student), array(teacher), 2.0).asnumpy()
    np.testing.assert_allclose(kl, reference.distillation_kl(student, teacher, 2.0), rtol=3e-4)
    logits = np.zeros((2, 50265))
    logits[:, 50264] = 1
    assert correct_predictions(array(logits), array(labels[:2])).asscalar() == 1
