"""A static web page that runs a saved model in the reader's browser.

    index.html, page.js, style.css   the page
    page.json                        what the model is, for page.js
    model/                           config, tokenizer, onnx/model_quantized.onnx (int8)
    library/                         transformers.js and ONNX Runtime for browsers
    SHA256SUMS                       of all files

Everything is fetched from the folder itself, which any static web server serves.
"""

from __future__ import annotations

import os
import re
import shutil
from typing import NamedTuple, Optional

import numpy as np

from bort.deployment.npm import write_library
from bort.deployment.onnx_folder import (
    ONNX_FOLDER,
    Comparison,
    onnx_architecture,
    write_graphs,
)
from bort.errors import UserError
from bort.files import new_folder, read_json, write_json
from bort.huggingface.folder import write_description
from bort.huggingface.tokenizer import JSON
from bort.inference.classification import most_texts, num_texts
from bort.inference.masked_lm import readable_text
from bort.parameters import check_finite, parameter_file
from bort.saved_model import MASKED_LM, ModelConfig, SavedModel, load_model
from bort.sums import write_sums
from bort.tokenization import Tokenizer
from bort.types import JSONObject, TaskKind
from data.task import Task
from data.tasks import get_task

_PAGE_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page")
_PRECISION = "int8"  # a quarter of the download
# What page.js loads of a tokenizer and a config.
_MODEL_FILES = ("config.json", JSON, "tokenizer_config.json")
_FIELDS = ("Text", "Second text")
_OPTIONAL_FIELD = "Second text, if the model takes pairs"


class DemoPage(NamedTuple):
    """A written page.

    comparison: of the model with MXNet; megabytes: of all that a browser downloads.
    """

    comparison: Comparison
    megabytes: float


def write_demo_page(model: str, output: str, packages: Optional[str] = None) -> DemoPage:
    """Write a page for a saved classifier of one or two texts, or a masked LM, as a new folder.

    packages: a folder with the JavaScript packages as `npm pack` writes them; None: npm downloads
        them.

    Raises `UserError` when the model cannot be loaded or shown on a page, when the packages cannot
    be had, and when the folder exists; then the folder is not made.
    """
    source = parameter_file(model)
    saved = load_model(source)
    check_finite(source, saved.network)
    require_page_model(source, saved.model_config)
    with new_folder(output) as folder:
        write_library(os.path.join(folder, "library"), packages)
        comparison = _write_model(os.path.join(folder, "model"), source, saved)
        for name in os.listdir(_PAGE_FOLDER):
            shutil.copyfile(os.path.join(_PAGE_FOLDER, name), os.path.join(folder, name))
        megabytes = _size(folder) / 1e6
        described = _describe(saved, round(megabytes))
        write_json(os.path.join(folder, "page.json"), described, with_sum=False)
        write_sums(folder)
    return DemoPage(comparison, megabytes)


def require_page_model(source: str, model_config: ModelConfig) -> None:
    """Raise `UserError` for a model whose inputs are more than two texts."""
    kind = model_config.kind
    if kind in (TaskKind.MULTIPLE_CHOICE, TaskKind.CANDIDATES) or _num_texts(model_config) > 2:
        raise UserError(
            f"{source}: is a model of {model_config.task or kind}, which chooses between texts; a "
            "page takes a classifier of one or two texts, or a masked LM"
        )


def _task(model_config: ModelConfig) -> Optional[Task]:
    if not model_config.task:
        return None
    return get_task(model_config.task, race_cast=model_config.race_cast or "choices")


def _num_texts(model_config: ModelConfig) -> int:
    return 1 if model_config.kind == MASKED_LM else num_texts(model_config, _task(model_config))


def _write_model(folder: str, source: str, saved: SavedModel) -> Comparison:
    """Write what transformers.js loads; the tokenizer reads special tokens as plain text.

    Ours does so, too; only a masked LM's mask is special.
    """
    assert saved.tokenizer is not None  # write_description refuses a model without one
    os.makedirs(folder)
    write_description(folder, saved, onnx_architecture(saved), card="")
    for name in os.listdir(folder):
        if name not in _MODEL_FILES:
            os.remove(os.path.join(folder, name))
    path = os.path.join(folder, JSON)
    content = read_json(path)
    is_masked_lm = saved.model_config.kind == MASKED_LM
    kept = [saved.tokenizer.special_tokens["mask"]] if is_masked_lm else []
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] in kept]
    write_json(path, content, with_sum=False)
    return write_graphs(os.path.join(folder, ONNX_FOLDER), source, saved, (_PRECISION,))


def _size(folder: str) -> int:
    paths = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    return sum(os.path.getsize(path) for path in paths)


# ---- page.json -----------------------------------------------------------------------------------


def _describe(saved: SavedModel, megabytes: int) -> JSONObject:
    """Return the content of page.json."""
    model_config, tokenizer = saved.model_config, saved.tokenizer
    assert tokenizer is not None
    is_masked_lm = model_config.kind == MASKED_LM
    mask = tokenizer.special_tokens["mask"]
    low, high = _range(model_config)
    title = "Fill in the mask" if is_masked_lm else model_config.task or model_config.kind
    return {
        "title": title,
        "subtitle": f"{model_config.model}, int8",
        "model_class": f"AutoModelFor{onnx_architecture(saved).head}",
        "fields": _fields(saved),
        "required": _num_texts(model_config),
        "example": f"The old man went to the {mask}." if is_masked_lm else "",
        "labels": list(model_config.labels),
        "low": low,
        "high": high,
        "max_len": model_config.max_len,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "token_types": model_config.type_separator is not None,
        "mask": mask if is_masked_lm else None,
        "mask_id": tokenizer.mask_id,
        "special_ids": tokenizer.special_ids.tolist(),
        "tokens": _unreadable(tokenizer) if is_masked_lm else {},
        "megabytes": megabytes,
    }


def _fields(saved: SavedModel) -> list[str]:
    """Return the labels of the fields: the names of the task's texts, if it has words for them."""
    model_config, tokenizer = saved.model_config, saved.tokenizer
    assert tokenizer is not None
    count, task = _num_texts(model_config), _task(model_config)
    is_masked_lm = model_config.kind == MASKED_LM
    if not is_masked_lm and count == 1 and most_texts(model_config, task, tokenizer) == 2:
        return [_FIELDS[0], _OPTIONAL_FIELD]
    columns = task.text_columns if task and not is_masked_lm else ()
    if not columns or not all(name[0].isalpha() for name in columns):  # MRPC: #1 String
        return list(_FIELDS[:count])
    return [re.sub(r"(\d+)$", r" \1", name.capitalize()) for name in columns]  # Sentence 1


def _range(model_config: ModelConfig) -> tuple[Optional[float], Optional[float]]:
    """Return the lowest and highest score of a regression task; None where there is no limit."""
    task = _task(model_config)
    if model_config.kind != TaskKind.REGRESSION or task is None:
        return None, None
    low, high = task.predict(np.array([-np.inf, np.inf])).tolist()
    return low, high


def _unreadable(tokenizer: Tokenizer) -> dict[str, str]:
    """Return {id: spelling} of the tokens that are shown by it."""
    unreadable = [i for i in range(tokenizer.vocab_size) if readable_text(tokenizer, i) is None]
    return {str(index): tokenizer.tokens([index])[0] for index in unreadable}
