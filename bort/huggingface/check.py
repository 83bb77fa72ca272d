"""Compares a converted model with its network, on random inputs with padding."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple, Optional

import numpy as np
from mxnet import nd

from bort.bort import decode, encode, masked_hidden, options_of, types_of
from bort.errors import UserError, quoted, reasons
from bort.files import read_json_as
from bort.huggingface.config import HuggingFaceConfig, parse_config, with_model_type
from bort.huggingface.families import CHOICE_HEAD, FAMILIES, Architecture
from bort.saved_model import SavedModel
from bort.shapes import MAX_LENGTH
from bort.tokenization import Tokenizer
from bort.types import Block
from bort.wordpiece import TOKENIZER_CONFIG, WordPiece

TOLERANCE = 1e-4
_LENGTHS = (MAX_LENGTH, 100, 7)  # of the inputs: all positions, and padding
_POSITIONS = 7  # compared per input of a masked LM
_TEXTS = 50
# Letters that a normalizer may change, as old as Unicode.
_ACCENTS = "Déjà vu à Ångström: 中文字, ÉCOLE."


class Comparison(NamedTuple):
    """The largest differences, and the packages that were compared with.

    difference: of logits, None for a body without a head; states: of hidden states.
    """

    difference: Optional[float]
    states: float
    packages: str


class Batch(NamedTuple):
    """Inputs [inputs, length] with padding; `types` is None for a model without token types."""

    ids: np.ndarray
    lengths: np.ndarray
    types: Optional[np.ndarray]


def compare(saved: SavedModel, folder: str) -> Optional[Comparison]:
    """Compare a network with its Hugging Face folder; None without transformers and torch.

    Raises `UserError` when logits or hidden states differ by more than `TOLERANCE`, and when the
    tokenizers differ.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = read_json_as(os.path.join(folder, "config.json"), HuggingFaceConfig)
    architecture = parse_config(with_model_type(config, folder)).architecture
    tokenizer: Any = saved.tokenizer
    tokenizer_class = "AutoTokenizer"
    if config.model_type is None:  # by which it would find the class
        tokenizer_class = f"{FAMILIES[architecture.family].class_name}TokenizerFast"
    theirs = _load(folder, "tokenizer", getattr(transformers, tokenizer_class))
    for text in _texts(tokenizer):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        if ids != tokenizer.encode(text).tolist():
            message = f"{folder}: its tokenizer and ours differ on {quoted(text)}"
            raise UserError(message + _cure(theirs, tokenizer, text))
    body = getattr(saved.network, "bort", saved.network)
    batch = _inputs(tokenizer, options_of(body).type_separator)
    # A body comes without the head that it was given here.
    model = _load(folder, "model", getattr(transformers, architecture.name)).float().eval()
    found, their_states = _their_outputs(model, architecture, batch)
    states = _difference(folder, "hidden states", _our_states(body, batch), their_states)
    difference = None
    if found is not None:
        expected = _our_logits(saved.network, architecture, batch)
        difference = _difference(folder, "logits", expected, found)
    packages = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return Comparison(difference, states, packages)


def _load(folder: str, what: str, theirs: Any) -> Any:
    """Return what a class of transformers loads; raises `UserError` when it cannot."""
    try:
        return theirs.from_pretrained(folder)
    except Exception as error:  # of many classes
        raise UserError(
            f"{folder}: transformers cannot load its {what} ({reasons(error)[0]})"
        ) from None


def _cure(theirs: Any, ours: Any, text: str) -> str:
    """Return what the user can do about two tokenizers that differ, where it is known."""
    if ours.name != WordPiece.name:
        return ""
    if not ours.normalizer.lowercase and getattr(theirs, "do_lower_case", False):
        return (
            f": transformers takes a vocabulary for an uncased one unless {TOKENIZER_CONFIG} has "
            '"do_lower_case": false; write it there'
        )
    if text == _ACCENTS:
        return (
            ": transformers takes strip_accents and tokenize_chinese_chars from "
            f"{TOKENIZER_CONFIG}, not from tokenizer.json; write the same values there"
        )
    return ""


def _difference(folder: str, what: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    difference = float(np.abs(theirs - ours).max())
    if not difference <= TOLERANCE:  # false for NaN, too
        raise UserError(f"{folder}: its {what} and ours differ by {difference:.1e}")
    return difference


def report(comparison: Optional[Comparison]) -> Optional[float]:
    """Print the comparison; returns the largest difference, of hidden states without a head."""
    if comparison is None:
        print("not compared: needs torch and transformers (pip install -e '.[huggingface]')")
        return None
    what = "hidden states" if comparison.difference is None else "logits"
    largest = comparison.states if comparison.difference is None else comparison.difference
    print(
        f"{what} of random inputs with padding differ by at most {largest:.1e} "
        f"(limit {TOLERANCE}; {comparison.packages})"
    )
    return largest


def _texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts of random tokens, in ASCII: packages have different versions of Unicode.

    The last one has accents and Chinese characters.
    """
    generator = np.random.default_rng(0)
    ids = generator.integers(0, tokenizer.vocab_size, (_TEXTS, 40))
    texts = [tokenizer.decode(row.tolist()) for row in ids]
    plain = ["".join(c for c in text if c.isascii() and c.isprintable()) for text in texts]
    return [*plain, _ACCENTS]


def _inputs(tokenizer: Tokenizer, separator: Optional[int]) -> Batch:
    """Return random ids with padding; each input has two texts."""
    generator = np.random.default_rng(1)
    lengths = np.array(_LENGTHS)
    ids = generator.integers(0, tokenizer.vocab_size - 1, (len(lengths), lengths.max()))
    ids += ids >= tokenizer.pad_id  # RoBERTa takes a pad token anywhere for padding
    ids[np.arange(len(lengths)), lengths // 2] = tokenizer.eos_id
    is_padding = np.arange(ids.shape[1]) >= lengths[:, None]
    ids[is_padding] = tokenizer.pad_id
    types = None if separator is None else types_of(ids, separator).astype(np.int64)
    return Batch(ids, lengths, types)


def _positions(lengths: np.ndarray) -> np.ndarray:
    """Return the compared positions of each input, [inputs, positions]; its last is one of them."""
    return np.stack([np.linspace(0, length - 1, _POSITIONS).astype(int) for length in lengths])


def _our_states(body: Block, batch: Batch) -> np.ndarray:
    """Return the hidden states [inputs, positions, hidden] at the compared positions."""
    states = encode(body, nd.array(batch.ids), nd.array(batch.lengths)).asnumpy()
    return np.take_along_axis(states, _positions(batch.lengths)[..., None], axis=1)


def _our_logits(network: Block, architecture: Architecture, batch: Batch) -> np.ndarray:
    inputs = nd.array(batch.ids), nd.array(batch.lengths)
    if architecture.is_classifier:
        logits = network(*inputs).asnumpy()
        return logits.reshape(1, -1) if architecture.head == CHOICE_HEAD else logits
    # [inputs, positions] -> positions in the flattened [inputs * length]
    starts = batch.ids.shape[1] * np.arange(len(batch.ids))
    flat = _positions(batch.lengths) + starts[:, None]
    hidden = masked_hidden(network, encode(network, *inputs), nd.array(flat.reshape(-1)))
    return decode(network, hidden).asnumpy().reshape(*flat.shape, -1)


def _their_outputs(
    model: Any, architecture: Architecture, batch: Batch
) -> tuple[Optional[np.ndarray], np.ndarray]:
    """Return logits, None without a head that we have, and hidden states of the positions."""
    import torch

    mask = np.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    given = {"input_ids": batch.ids, "attention_mask": mask.astype(np.int64)}
    if batch.types is not None:
        given["token_type_ids"] = batch.types
    # The options of a multiple choice are one example.
    wrapped = (np.s_[None],) if architecture.head == CHOICE_HEAD else ()
    with torch.no_grad():
        outputs = model(
            **{name: torch.tensor(array[wrapped]) for name, array in given.items()},
            output_hidden_states=True,
        )
    positions = _positions(batch.lengths)[..., None]
    states = np.take_along_axis(outputs.hidden_states[-1].numpy(), positions, axis=1)
    if architecture.is_classifier:
        return outputs.logits.numpy(), states
    if architecture.decoder is None:
        return None, states
    logits = getattr(outputs, "logits", None)
    logits = outputs.prediction_logits if logits is None else logits  # BertForPreTraining's
    return np.take_along_axis(logits.numpy(), positions, axis=1), states
