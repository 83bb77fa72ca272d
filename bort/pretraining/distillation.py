"""The losses of masked-LM distillation: pure functions that return sums and a gradient.

All take masked positions only. They return sums, not means: micro-batches have different
numbers of masked positions, so the mean over a global batch is formed once, from the sums of all
its micro-batches. The gradient is computed in closed form: autograd would pass over the vocabulary
several times more. Gluon's KLDivLoss is not used: its reduction changed between versions of MXNet,
and it applies softmax to what is already a distribution.
"""

from __future__ import annotations

from typing import NamedTuple

from mxnet import nd

from bort.devices import runs_on_cpu
from bort.types import NDArray


class LossParts(NamedTuple):
    """Sums over the n masked positions of a micro-batch, as NDArrays of shape [1]; a gradient."""

    total: NDArray  # mlm_weight * mlm + teacher_ce_weight * kl
    mlm: NDArray  # cross-entropy with the true tokens, nats
    kl: NDArray  # temperature^2 * KL(teacher || student) at the temperature; 0 without teacher
    gradient: NDArray  # of the total, with respect to the student's logits [n, vocabulary]


def masked_lm_loss(logits: NDArray, labels: NDArray) -> NDArray:
    """Cross-entropy, in nats, of logits [n, vocabulary] with token ids [n]; returns [n]."""
    return -nd.pick(nd.log_softmax(logits, axis=-1), labels, axis=-1)


def distillation_kl(
    student_logits: NDArray, teacher_logits: NDArray, temperature: float
) -> NDArray:
    """Return temperature^2 * KL(teacher / T || student / T) per position [n], in nats.

    Summed over the vocabulary: logits [n, vocabulary]. The factor T^2 keeps the size of the
    gradient independent of the temperature (Hinton et al., Distilling the Knowledge, section 2).
    """
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    return temperature**2 * _divergence(student, teacher, nd.softmax(teacher, axis=-1))


def _softened(
    student_logits: NDArray, teacher_logits: NDArray, temperature: float
) -> tuple[NDArray, NDArray]:
    # MXNet's softmax with a temperature is slow.
    return student_logits * (1 / temperature), teacher_logits * (1 / temperature)


def _divergence(student: NDArray, teacher: NDArray, probabilities: NDArray) -> NDArray:
    """Return KL(teacher || student) [n] of logits [n, m], given the teacher's probabilities."""
    terms = nd.elemwise_sub(nd.log_softmax(teacher, axis=-1), nd.log_softmax(student, axis=-1))
    # A product with ones: MXNet's sum along an axis is slow.
    ones = nd.ones((terms.shape[1], 1), ctx=terms.context, dtype=terms.dtype)
    return nd.dot(nd.elemwise_mul(terms, probabilities), ones).reshape((-1,))


def distillation_loss(
    student_logits: NDArray,
    labels: NDArray,
    teacher_logits: NDArray | None,
    mlm_weight: float,
    teacher_ce_weight: float,
    temperature: float,
) -> LossParts:
    """Return the weighted sum of masked-LM and distillation loss (teacher None: the former only).

    Args:
        student_logits: [n, vocabulary].
        labels: true token ids [n].
        teacher_logits: [n, vocabulary], or None.
        mlm_weight: weight of the cross-entropy with the true tokens.
        teacher_ce_weight: weight of the divergence from the teacher.
        temperature: softens both distributions in the divergence.
    """
    mlm = masked_lm_loss(student_logits, labels).sum()
    gradient = nd.softmax(student_logits, axis=-1)
    _subtract_truth(gradient, labels)
    gradient *= mlm_weight
    if teacher_logits is None:
        return LossParts(mlm_weight * mlm, mlm, nd.zeros_like(mlm), gradient)
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    probabilities = nd.softmax(teacher, axis=-1)
    kl = temperature**2 * _divergence(student, teacher, probabilities).sum()
    difference = nd.elemwise_sub(nd.softmax(student, axis=-1), probabilities)
    difference *= teacher_ce_weight * temperature
    gradient += difference
    return LossParts(mlm_weight * mlm + teacher_ce_weight * kl, mlm, kl, gradient)


def _subtract_truth(probabilities: NDArray, labels: NDArray) -> None:
    """Subtract 1 from the probability of the label in each row [n, vocabulary], in place."""
    rows = nd.arange(len(labels), ctx=labels.context, dtype=labels.dtype)
    true = nd.pick(probabilities, labels, axis=-1) - 1
    nd._internal._scatter_set_nd(
        lhs=probabilities,
        rhs=true,
        indices=nd.stack(rows, labels.astype(labels.dtype, copy=False)),
        shape=probabilities.shape,
        out=probabilities,
    )


def correct_predictions(logits: NDArray, labels: NDArray) -> NDArray:
    """Count the positions whose highest logit [n, vocabulary] is the label's [n]; returns [1].

    Called for every micro-batch, so that an accuracy is over the same positions as the losses
    beside it; those of a single step are too few. It takes 0.7 % of a step on a CPU (RESULTS.md).
    """
    if runs_on_cpu(logits):
        return (logits.argmax(axis=-1) == labels.astype("float32")).sum()
    # On a GPU a single thread of argmax walks through a row; the maximum is a parallel reduction.
    return (nd.pick(logits, labels, axis=-1) >= logits.max(axis=-1)).sum()


def squared_distance(student_logits: NDArray, teacher_logits: NDArray) -> NDArray:
    """Return the mean square between the two distributions [n, vocabulary] per position, [n].

    For the log only, as the original printed it.
    """
    difference = nd.softmax(student_logits, axis=-1) - nd.softmax(teacher_logits, axis=-1)
    return nd.square(difference).mean(axis=-1)
