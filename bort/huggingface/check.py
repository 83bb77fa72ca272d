"""A converted model against the network it was made of, on random inputs with padding."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple, Optional

import numpy as np
from mxnet import nd

from bort.bort import decode, encode, masked_hidden
from bort.errors import UserError
from bort.files import read_json
from bort.huggingface.weights import Architecture, architecture_of
from bort.saved_model import SavedModel
from bort.shapes import MAX_LENGTH
from bort.tokenization import Tokenizer

LIMIT = 1e-4
_LENGTHS = (MAX_LENGTH, 100, 7)  # of the inputs: the whole position table, and padding
_POSITIONS = 7  # whose logits of a masked LM are compared, in each input
_TEXTS = 50


class Comparison(NamedTuple):
    """What was compared: the greatest difference of two logits, and with which packages."""

    difference: float
    packages: str


def compare(saved: SavedModel, folder: str) -> Optional[Comparison]:
    """Compare a network with the folder of transformers' that stands for it.

    Returns None when transformers or torch are not installed. Raises `UserError` when logits
    differ by more than `LIMIT`, and when the tokenizers differ.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    (name,) = read_json(os.path.join(folder, "config.json"))["architectures"]
    architecture = architecture_of(name)
    tokenizer: Any = saved.tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in _texts(tokenizer):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        if ids != tokenizer.encode(text).tolist():
            raise UserError(f"{folder}: its tokenizer and ours differ on {text!r}")
    ids, lengths = _inputs(tokenizer)
    model = getattr(transformers, name).from_pretrained(folder).float()
    expected = _our_logits(saved.network, architecture, ids, lengths)
    found = _their_logits(model.eval(), architecture, ids, lengths)
    difference = float(np.abs(found - expected).max())
    if not difference <= LIMIT:  # asked the other way round, so that NaN is refused
        raise UserError(f"{folder}: its logits and ours differ by {difference:.1e}")
    return Comparison(
        difference, f"transformers {transformers.__version__}, torch {torch.__version__}"
    )


def report(comparison: Optional[Comparison]) -> Optional[float]:
    """Print what was measured; returns the greatest difference of logits."""
    if comparison is None:
        print("not compared: needs torch and transformers (pip install -e '.[huggingface]')")
        return None
    print(
        f"logits of random inputs with padding differ by at most {comparison.difference:.1e} "
        f"(limit {LIMIT}; {comparison.packages})"
    )
    return comparison.difference


def _texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts of random tokens; of ASCII, as packages know different editions of Unicode."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, tokenizer.vocab_size, (_TEXTS, 40))
    texts = [tokenizer.decode(row.tolist()) for row in ids]
    return ["".join(one for one in text if one.isascii() and one.isprintable()) for text in texts]


def _inputs(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return random ids [inputs, length] with padding, and the lengths [inputs]."""
    generator = np.random.default_rng(1)
    lengths = np.array(_LENGTHS)
    ids = generator.integers(0, tokenizer.vocab_size - 1, (len(lengths), lengths.max()))
    ids += ids >= tokenizer.pad_id  # RoBERTa takes a pad anywhere for padding
    ids[np.arange(ids.shape[1]) >= lengths[:, None]] = tokenizer.pad_id
    return ids, lengths


def _positions(lengths: np.ndarray) -> np.ndarray:
    """Return which positions of each input are compared, [inputs, positions], the last included."""
    return np.stack([np.linspace(0, length - 1, _POSITIONS).astype(int) for length in lengths])


def _our_logits(
    network: Any, architecture: Architecture, ids: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    inputs = nd.array(ids), nd.array(lengths)
    if architecture.head != "MaskedLM":
        scores = network(*inputs).asnumpy()
        return scores.reshape(1, -1) if architecture.head == "MultipleChoice" else scores
    flat = _positions(lengths) + ids.shape[1] * np.arange(len(ids))[:, None]
    hidden = masked_hidden(network, encode(network, *inputs), nd.array(flat.reshape(-1)))
    return decode(network, hidden).asnumpy().reshape(*flat.shape, -1)


def _their_logits(
    model: Any, architecture: Architecture, ids: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    import torch

    mask = np.arange(ids.shape[1]) < lengths[:, None]
    # The options of one multiple choice come as one example.
    wrapped = (np.s_[None],) if architecture.head == "MultipleChoice" else ()
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(ids[wrapped]),
            attention_mask=torch.tensor(mask[wrapped].astype(np.int64)),
        ).logits.numpy()
    if architecture.head != "MaskedLM":
        return logits
    return np.take_along_axis(logits, _positions(lengths)[..., None], axis=1)
