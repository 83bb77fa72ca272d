"""Prediction for new text with a saved model: labels with probabilities, or words for masks.

for prediction in predict("runs/finetuning/SST-2", ["a fine film", "a bore"]):
    print(prediction.label, prediction.value)
"""

from __future__ import annotations

import os
from typing import Iterable, Iterator, Optional, Union

from bort.inference.base import BATCH_SIZE, Input, locate, predictions
from bort.inference.classification import ClassificationPipeline, Prediction, load_classifier
from bort.inference.masked_lm import FillMaskPipeline, MaskPrediction, load_mask_filler


def predict(
    model: Union[str, os.PathLike[str], ClassificationPipeline],
    inputs: Iterable[Input],
    *,
    task: Optional[str] = None,
    runtime: str = "mxnet",
    batch_size: int = BATCH_SIZE,
) -> Iterator[Prediction]:
    """Yield the prediction of each input, in order; an official row may have several.

    model: a saved classifier's .params file or folder, or a loaded `ClassificationPipeline`.
    inputs: texts, sequences of texts (of a pair; of a choice the common text and the options; of
        ReCoRD passage, query with "@placeholder" and the candidates) or rows of the task's
        official files as dictionaries.
    runtime: one of `bort.inference.runtime.BACKENDS`, or auto.
    task, runtime, batch_size: for a path; a loaded pipeline has its own.

    Raises `UserError` for a path without a classifier, a wrong task, and an invalid input;
    `TypeError` for another kind of pipeline.
    """
    if isinstance(model, (str, os.PathLike)):
        model = load_classifier(model, task, runtime, batch_size)
    elif not isinstance(model, ClassificationPipeline):
        raise TypeError(f"predict: expected a path or a classifier, found {type(model).__name__}")
    for window in predictions(model, locate(inputs)):
        yield from (prediction for _, prediction in window)


def fill_mask(
    model: Union[str, os.PathLike[str], FillMaskPipeline],
    texts: Iterable[Input],
    *,
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[MaskPrediction, ...]]:
    """Yield the five most probable words for each `<mask>` (BERT: `[MASK]`) of each text, in order.

    model: a pretraining run, a checkpoint, a saved model, or a loaded `FillMaskPipeline`, which
        has its own batch_size.

    Raises `UserError` for a path without a pretrained model and for a text without a mask;
    `TypeError` for another kind of pipeline.
    """
    if isinstance(model, (str, os.PathLike)):
        model = load_mask_filler(model, batch_size)
    elif not isinstance(model, FillMaskPipeline):
        raise TypeError(
            f"fill_mask: expected a path or a mask filler, found {type(model).__name__}"
        )
    for window in predictions(model, locate(texts)):
        yield from (words for _, words in window)
