"""Masked language modelling: the most probable words for each mask of a text.

A mask is spelled as in the vocabulary: `<mask>`, or `[MASK]` in BERT's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Iterator, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np

from bort.errors import UserError
from bort.inference.base import (
    BATCH_SIZE,
    Input,
    InputSchema,
    TokenBatch,
    check_texts,
    numbered_columns,
    texts_of,
    token_batches,
)
from bort.parameters import check_finite, parameter_file
from bort.saved_model import (
    MASKED_LM,
    ModelConfig,
    load_model,
    read_model_config,
    require_tokenizer,
)
from bort.tokenization import Tokenizer
from bort.types import Block
from data.rows import BadRowError, require_field

TOP_K = 5
# Masks projected onto the vocabulary at once: 51 MB of logits with 50,265 tokens.
MASKS_AT_ONCE = 256
# Control characters, which a terminal would obey, and what a part of a character becomes.
_UNREADABLE = re.compile("[\x00-\x1f\x7f-\x9f\ufffd]")


class MaskPrediction(NamedTuple):
    """A word for a mask: its text, its token in the vocabulary, and its probability."""

    text: str
    token: str
    probability: float


@dataclass(frozen=True)
class FillMaskPipeline:
    """A loaded pretrained model."""

    model_config: ModelConfig
    tokenizer: Tokenizer
    network: Block
    batch_size: int = BATCH_SIZE

    @property
    def schema(self) -> InputSchema:
        """Return the name of an input's text."""
        return InputSchema(numbered_columns(1))

    def prepare(self, content: Input) -> np.ndarray:
        """Return the ids of a text, int32 [tokens]; what is spelled as the mask becomes the mask.

        Raises `BadRowError` for a text without mask and one longer than the model's positions.
        """
        if isinstance(content, Mapping):
            content = require_field(content, "text", str)
        texts = texts_of(content)
        if len(texts) != 1:
            raise BadRowError(f"has {len(texts)} texts, expected 1")
        mask = self.tokenizer.special_tokens["mask"]
        if mask not in texts[0]:
            raise BadRowError(f"has no {mask} where a word is missing")
        check_texts(texts)
        ids = mask_ids(self.tokenizer, texts[0].strip())
        if len(ids) > self.model_config.max_len:
            raise BadRowError(f"has {len(ids)} tokens, the model takes {self.model_config.max_len}")
        return ids

    def predict(self, window: Sequence[np.ndarray]) -> list[list[tuple[MaskPrediction, ...]]]:
        """Return the words for each mask of each text.

        Raises `UserError` when a probability is NaN.
        """
        results: list[list[tuple[MaskPrediction, ...]]] = [[] for _ in window]
        max_len, pad_id = self.model_config.max_len, self.tokenizer.pad_id
        for batch in token_batches(window, self.batch_size, max_len, pad_id):
            rows, columns = np.nonzero(batch.ids == self.tokenizer.mask_id)
            positions = rows * batch.ids.shape[1] + columns  # in the flattened [n * length]
            probabilities = mask_probabilities(self.network, batch, positions)
            for row, values in zip(rows, probabilities):
                results[batch.indices[row]].append(self._top_words(values))
        return results

    def _top_words(self, probabilities: np.ndarray) -> tuple[MaskPrediction, ...]:
        """Return the most probable words of probabilities [vocabulary]; no special tokens.

        Training never masks a special token. A very small vocabulary has fewer words.
        """
        special = self.tokenizer.special_ids
        probabilities[special] = -1
        count = min(TOP_K, len(probabilities) - len(special))
        best = np.argpartition(-probabilities, count)[:count]
        best = best[np.argsort(-probabilities[best], kind="stable")]
        words = []
        for index in best.tolist():
            token = self.tokenizer.tokens([index])[0]
            text = readable_text(self.tokenizer, index) or token
            words.append(MaskPrediction(text, token, float(probabilities[index])))
        return tuple(words)


def readable_text(tokenizer: Tokenizer, index: int) -> Optional[str]:
    """Return the text of a token; None if it is blank, a control or a part of a character."""
    text = tokenizer.decode([index]).strip()
    return None if not text or _UNREADABLE.search(text) else text


def mask_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the ids, int32 [tokens], of a text with masks, between bos and eos.

    A mask stands for a whole token, including the space before it.
    """
    first, *others = text.split(tokenizer.special_tokens["mask"])
    parts = [[tokenizer.bos_id], tokenizer.encode(first.rstrip())]
    for number, piece in enumerate(others, 1):
        text = piece.rstrip() if number < len(others) else piece
        parts += [[tokenizer.mask_id], tokenizer.encode_continued(text)]
    return np.concatenate([*parts, [tokenizer.eos_id]]).astype(np.int32)


def mask_probabilities(
    network: Block, batch: TokenBatch, positions: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield probabilities [vocabulary] at each of `positions` [masks] of the flattened batch.

    The hidden states are projected in pieces: all at once, 32 texts of 505 masks took 6 GB.
    """
    from mxnet import nd

    from bort.bort import decode, encode, masked_hidden

    arrays = (nd.array(array, dtype="float32") for array in (batch.ids, batch.valid_length))
    sequence = encode(network, *arrays)
    for start in range(0, len(positions), MASKS_AT_ONCE):
        piece = nd.array(positions[start : start + MASKS_AT_ONCE], dtype="int32")
        logits = decode(network, masked_hidden(network, sequence, piece))  # [piece, vocabulary]
        probabilities = nd.softmax(logits, axis=-1).asnumpy()
        if not np.isfinite(probabilities).all():
            raise UserError(
                "the model's logits are NaN or infinite: its parameters are damaged, or its "
                "training diverged"
            )
        yield from probabilities


def load_mask_filler(
    path: Union[str, os.PathLike[str]], batch_size: int = BATCH_SIZE
) -> FillMaskPipeline:
    """Load a pretrained model: a run, a checkpoint, or a parameter file with its model config.

    Raises `UserError` when there is none or when it is damaged.
    """
    path = os.fspath(path)
    found = parameter_file(path)
    model_config = read_model_config(found)
    if model_config.kind != MASKED_LM:
        raise UserError(
            f"--fill_mask: {path} is a model of {model_config.task or model_config.kind}; "
            "give a pretrained model"
        )
    network, model_config, tokenizer = load_model(found)
    check_finite(found, network)
    network.encoder.hybridize()
    return FillMaskPipeline(model_config, require_tokenizer(tokenizer, path), network, batch_size)
