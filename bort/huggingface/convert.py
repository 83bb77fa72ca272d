"""Conversion of a saved model to a Hugging Face folder and back, each compared afterwards."""

from __future__ import annotations

import os
from typing import NamedTuple, Optional

from bort.files import new_folder
from bort.huggingface.check import Comparison, compare
from bort.huggingface.folder import read, write
from bort.saved_model import load_model, save_model


class Conversion(NamedTuple):
    """A description in one line, and the comparison (None without transformers and torch)."""

    description: str
    comparison: Optional[Comparison]


def to_huggingface(model: str, output: str, family: str) -> Conversion:
    """Write a saved model, checkpoint or run into a new folder that transformers loads.

    Raises `UserError` when it cannot be converted, when the folder exists, and when the logits
    differ; then the folder is not made.
    """
    saved = load_model(model)
    with new_folder(output) as folder:
        architecture = write(folder, saved, family)
        size = sum(entry.stat().st_size for entry in os.scandir(folder)) / 1e6
        comparison = compare(saved, folder)
    description = f"{output}: {architecture.name} of {saved.model_config.model}, {size:,.1f} MB"
    return Conversion(description, comparison)


def from_huggingface(source: str, output: str) -> Conversion:
    """Write a Hugging Face folder into a new folder as a saved model.

    Raises `UserError` when a file is damaged or computes something else than our networks, when
    the output folder exists, and when the logits differ; then the folder is not made.
    """
    network, model_config, tokenizer = read(source)
    name = f"{model_config.model}.params"
    with new_folder(output) as folder:
        path = os.path.join(folder, name)
        save_model(path, network, model_config, tokenizer)
        size = os.path.getsize(path) / 1e6
        comparison = compare(load_model(path), source)
    description = f"{os.path.join(output, name)}: {model_config.kind}, {size:,.1f} MB"
    return Conversion(description, comparison)
