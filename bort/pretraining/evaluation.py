"""What a model says at the masked positions of a batch, and how good that is on a held-out set."""

from __future__ import annotations

from typing import Any

import numpy as np
from mxnet import nd

from bort.communicator import Communicator
from bort.pretraining.distillation import correct_predictions, distillation_kl, masked_lm_loss
from bort.pretraining.mlm import masked_logits, to_device
from bort.pretraining.teacher import Teacher
from data.batches import PretrainingLoader


def evaluate(
    student: Any,
    teacher: Teacher | None,
    source: PretrainingLoader,
    temperature: float,
    communicator: Communicator,
    device: Any,
) -> dict[str, float]:
    """Measure a model on every batch of a held-out set, split over the ranks.

    Returns means over all masked positions: mlm_loss (nats), accuracy, and with a teacher
    teacher_accuracy and kl, which is temperature^2 * KL(teacher || student) at the temperature.
    """
    sums = np.zeros(5)
    for number in range(communicator.rank, source.batches_per_epoch, communicator.size):
        batch = to_device(source(number), device)
        logits = masked_logits(student, batch)
        parts = [masked_lm_loss(logits, batch.labels).sum()]
        parts.append(correct_predictions(logits, batch.labels))
        if teacher is not None:
            teacher_logits = teacher.logits(batch)
            parts.append(distillation_kl(logits, teacher_logits, temperature).sum())
            parts.append(correct_predictions(teacher_logits, batch.labels))
        values = nd.concat(*parts, dim=0).asnumpy()
        sums[: len(values)] += values
        sums[4] += len(batch.labels)
    mlm, correct, kl, teacher_correct, positions = communicator.allreduce(sums)
    result = {"mlm_loss": mlm / positions, "accuracy": correct / positions}
    if teacher is not None:
        result.update(kl=kl / positions, teacher_accuracy=teacher_correct / positions)
    return result
