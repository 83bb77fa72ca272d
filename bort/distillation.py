"""The losses of teacher-student masked-LM distillation: pure functions with reductions of our own.

All work on masked positions only. They return sums, not means: micro-batches hold different
numbers of masked positions, so the mean over a global batch is formed once, from the sums of all
its micro-batches. Gluon's KLDivLoss is not used: its reduction changed between versions of MXNet
and it takes a second softmax of what is already one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mxnet import autograd, nd


class LossParts(NamedTuple):
    """Sums over the n masked positions of a micro-batch, as NDArrays of shape [1]."""

    total: Any  # mlm_weight * mlm + teacher_ce_weight * kl: what is differentiated
    mlm: Any  # cross-entropy with the true tokens, nats
    kl: Any  # temperature^2 * KL(teacher || student) at the temperature, nats; 0 without teacher


def masked_lm_loss(logits: Any, labels: Any) -> Any:
    """Cross-entropy, in nats, of logits [n, vocabulary] with token ids [n]; returns [n]."""
    return -nd.pick(nd.log_softmax(logits, axis=-1), labels, axis=-1)


def distillation_kl(student_logits: Any, teacher_logits: Any, temperature: float) -> Any:
    """Return temperature^2 * KL(teacher / T || student / T) per position [n], in nats.

    Summed over the vocabulary: logits [n, vocabulary]. The factor T^2 keeps the size of the
    gradient independent of the temperature (Hinton et al., Distilling the Knowledge, section 2).
    The gradient of the student's logits is known, T * (student - teacher), and is not left to
    autograd, which would go over the vocabulary four more times; the teacher gets none.
    """
    recording = autograd.is_recording()
    with autograd.pause():
        # Divided beforehand: MXNet's own softmax with a temperature is a slow one.
        student, teacher = (one / temperature for one in (student_logits, teacher_logits))
        probabilities = nd.softmax(teacher, axis=-1)
        terms = nd.log_softmax(teacher, axis=-1) - nd.log_softmax(student, axis=-1)
        divergence = temperature**2 * _row_products(terms, probabilities)
        if not recording:
            return divergence
        gradient = temperature * (nd.softmax(student, axis=-1) - probabilities)
    # Linear in the logits with that slope; what it adds to the value is 0.
    tangent = _row_products(student_logits, gradient)
    return divergence + (tangent - tangent.detach())


def _row_products(first: Any, second: Any) -> Any:
    """Return the sums of products [n] of two [n, m]: MXNet's sum along an axis is slow."""
    ones = nd.ones((first.shape[1], 1), ctx=first.context, dtype=first.dtype)
    return nd.dot(nd.elemwise_mul(first, second), ones).reshape((-1,))


def distillation_loss(
    student_logits: Any,
    labels: Any,
    teacher_logits: Any | None,
    mlm_weight: float,
    teacher_ce_weight: float,
    temperature: float,
) -> LossParts:
    """Weigh the masked-LM loss and the distance from the teacher (None: masked LM only).

    Args:
        student_logits: [n, vocabulary].
        labels: true token ids [n].
        teacher_logits: [n, vocabulary], or None.
        mlm_weight: weight of the cross-entropy with the true tokens.
        teacher_ce_weight: weight of the divergence from the teacher.
        temperature: softens both distributions in the divergence.
    """
    mlm = masked_lm_loss(student_logits, labels).sum()
    if teacher_logits is None:
        return LossParts(mlm_weight * mlm, mlm, nd.zeros_like(mlm))
    kl = distillation_kl(student_logits, teacher_logits, temperature).sum()
    return LossParts(mlm_weight * mlm + teacher_ce_weight * kl, mlm, kl)


def correct_predictions(logits: Any, labels: Any) -> Any:
    """Count positions whose highest logit [n, vocabulary] is the label [n]; returns [1]."""
    return (logits.argmax(axis=-1) == labels.astype("float32")).sum()


def squared_distance(student_logits: Any, teacher_logits: Any) -> Any:
    """Return the mean square between the two distributions [n, vocabulary] per position, [n].

    A figure for the log, as the original printed it; not part of the loss.
    """
    difference = nd.softmax(student_logits, axis=-1) - nd.softmax(teacher_logits, axis=-1)
    return nd.square(difference).mean(axis=-1)
