"""Compares a converted model with its network, on random inputs with padding."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple, Optional

import numpy as np
from mxnet import nd

from bort.bort import decode, encode, masked_hidden
from bort.errors import UserError, quoted
from bort.files import read_json_as
from bort.huggingface.weights import Architecture, HuggingFaceConfig, architecture_of
from bort.saved_model import SavedModel
from bort.shapes import MAX_LENGTH
from bort.tokenization import Tokenizer
from bort.types import Block

TOLERANCE = 1e-4
_LENGTHS = (MAX_LENGTH, 100, 7)  # of the inputs: all positions, and padding
_POSITIONS = 7  # compared per input of a masked LM
_TEXTS = 50


class Comparison(NamedTuple):
    """The largest difference of logits, and the packages that were compared with."""

    difference: float
    packages: str


def compare(saved: SavedModel, folder: str) -> Optional[Comparison]:
    """Compare a network with its Hugging Face folder; None without transformers and torch.

    Raises `UserError` when logits differ by more than `TOLERANCE`, and when the tokenizers differ.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = read_json_as(os.path.join(folder, "config.json"), HuggingFaceConfig)
    (name,) = config.architectures or ("none",)
    architecture = architecture_of(name)
    tokenizer: Any = saved.tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in _texts(tokenizer):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        if ids != tokenizer.encode(text).tolist():
            raise UserError(f"{folder}: its tokenizer and ours differ on {quoted(text)}")
    ids, lengths = _inputs(tokenizer)
    model = getattr(transformers, name).from_pretrained(folder).float()
    expected = _our_logits(saved.network, architecture, ids, lengths)
    found = _their_logits(model.eval(), architecture, ids, lengths)
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE:  # false for NaN, too
        raise UserError(f"{folder}: its logits and ours differ by {difference:.1e}")
    return Comparison(
        difference, f"transformers {transformers.__version__}, torch {torch.__version__}"
    )


def report(comparison: Optional[Comparison]) -> Optional[float]:
    """Print the comparison; returns the largest difference of logits."""
    if comparison is None:
        print("not compared: needs torch and transformers (pip install -e '.[huggingface]')")
        return None
    print(
        f"logits of random inputs with padding differ by at most {comparison.difference:.1e} "
        f"(limit {TOLERANCE}; {comparison.packages})"
    )
    return comparison.difference


def _texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts of random tokens, in ASCII: packages have different versions of Unicode."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, tokenizer.vocab_size, (_TEXTS, 40))
    texts = [tokenizer.decode(row.tolist()) for row in ids]
    return ["".join(c for c in text if c.isascii() and c.isprintable()) for text in texts]


def _inputs(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return random ids [inputs, length] with padding, and the lengths [inputs]."""
    generator = np.random.default_rng(1)
    lengths = np.array(_LENGTHS)
    ids = generator.integers(0, tokenizer.vocab_size - 1, (len(lengths), lengths.max()))
    ids += ids >= tokenizer.pad_id  # RoBERTa takes a pad token anywhere for padding
    ids[np.arange(ids.shape[1]) >= lengths[:, None]] = tokenizer.pad_id
    return ids, lengths


def _positions(lengths: np.ndarray) -> np.ndarray:
    """Return the compared positions of each input, [inputs, positions]; its last is one of them."""
    return np.stack([np.linspace(0, length - 1, _POSITIONS).astype(int) for length in lengths])


def _our_logits(
    network: Block, architecture: Architecture, ids: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    inputs = nd.array(ids), nd.array(lengths)
    if architecture.head != "MaskedLM":
        logits = network(*inputs).asnumpy()
        return logits.reshape(1, -1) if architecture.head == "MultipleChoice" else logits
    # [inputs, positions] -> positions in the flattened [inputs * length]
    flat = _positions(lengths) + ids.shape[1] * np.arange(len(ids))[:, None]
    hidden = masked_hidden(network, encode(network, *inputs), nd.array(flat.reshape(-1)))
    return decode(network, hidden).asnumpy().reshape(*flat.shape, -1)


def _their_logits(
    model: Any, architecture: Architecture, ids: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    import torch

    mask = np.arange(ids.shape[1]) < lengths[:, None]
    # The options of a multiple choice are one example.
    wrapped = (np.s_[None],) if architecture.head == "MultipleChoice" else ()
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(ids[wrapped]),
            attention_mask=torch.tensor(mask[wrapped].astype(np.int64)),
        ).logits.numpy()
    if architecture.head != "MaskedLM":
        return logits
    return np.take_along_axis(logits, _positions(lengths)[..., None], axis=1)
