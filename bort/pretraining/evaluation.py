"""Evaluation on held-out shards: masked-LM loss, accuracy, and the distance from the teacher."""

from __future__ import annotations

import numpy as np
from mxnet import nd

from bort.communicator import Communicator
from bort.pretraining.distillation import correct_predictions, distillation_kl, masked_lm_loss
from bort.pretraining.mlm import masked_logits, to_device
from bort.pretraining.teacher import Teacher
from bort.training.job import Interrupted, Metrics, StopRequested
from bort.types import Block, Context
from data.batches import PretrainingLoader


def evaluate(
    student: Block,
    teacher: Teacher | None,
    source: PretrainingLoader,
    temperature: float,
    communicator: Communicator,
    device: Context,
    stop_requested: StopRequested = lambda: False,
) -> Metrics:
    """Measure a model on every batch of a held-out set, split over the ranks.

    Returns means over all masked positions, nothing without any: mlm_loss (nats), accuracy, with a
    teacher teacher_accuracy and kl: temperature^2 * KL(teacher || student) at the temperature.

    Raises `Interrupted` when `stop_requested` on any rank; it is asked between two batches.
    """
    sums = np.zeros(6)
    for number in range(communicator.rank, source.batches_per_epoch, communicator.size):
        if stop_requested():
            break
        host_batch = source(number)
        if not len(host_batch.labels):
            continue
        batch = to_device(host_batch, device)
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
    # Counted with the sums: all ranks have to leave together.
    sums[5] = stop_requested()
    mlm, correct, kl, teacher_correct, positions, stopped = communicator.allreduce(sums)
    if stopped:
        raise Interrupted
    if not positions:
        return {}
    result = {"mlm_loss": mlm / positions, "accuracy": correct / positions}
    if teacher is not None:
        result.update(kl=kl / positions, teacher_accuracy=teacher_correct / positions)
    return result
