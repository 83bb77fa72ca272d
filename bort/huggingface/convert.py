"""Conversion of a saved model to a Hugging Face folder and back, each compared afterwards."""

from __future__ import annotations

import os
from typing import NamedTuple, Optional, Sequence

from bort.files import new_folder
from bort.huggingface.check import Comparison, compare
from bort.huggingface.folder import KEEP, read_folder, write
from bort.huggingface.hub import locate
from bort.saved_model import load_model, save_model


class Conversion(NamedTuple):
    """A description in one line, the comparison (None without transformers and torch), notices."""

    description: str
    comparison: Optional[Comparison]
    notices: Sequence[str] = ()


def to_huggingface(model: str, output: str, family: Optional[str] = None) -> Conversion:
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


def from_huggingface(
    source: str, output: str, token_types: str = KEEP, revision: Optional[str] = None
) -> Conversion:
    """Write a Hugging Face folder, or a model of the hub, into a new folder as a saved model.

    token_types: see `bort.huggingface.folder.read_folder`. revision: of a model of the hub.

    Raises `UserError` when a file is damaged or computes something else than our networks, when
    the output folder exists, and when the logits differ; then the folder is not made.
    """
    located = locate(source, revision)
    saved, notices = read_folder(located.folder, token_types, located.origin)
    model_config = saved.model_config
    name = f"{model_config.model}.params"
    with new_folder(output) as folder:
        path = os.path.join(folder, name)
        save_model(path, *saved)
        size = os.path.getsize(path) / 1e6
        comparison = compare(load_model(path), located.folder)
    where = f" of {located.origin}" if located.origin else ""
    description = f"{os.path.join(output, name)}: {model_config.kind}{where}, {size:,.1f} MB"
    return Conversion(description, comparison, notices)
