"""WordPiece, the tokenizer of BERT (Devlin et al. 2019), through Hugging Face's `tokenizers`.

It is read from a vocab.txt, one token on a line, or from a tokenizer.json, which also says how
texts are normalized. What a vocab.txt leaves open is read from a tokenizer_config.json beside it;
without one, a vocabulary without capital letters is taken for an uncased one.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from typing import Dict, Iterable, Optional, Sequence

import numpy as np

from bort.errors import UserError, quoted
from bort.files import read_json_as
from bort.tokenization import (
    TOKENIZER_JSON,
    Vocabulary,
    read_lines,
    spelling_of,
    utf8_bytes,
    write_files,
)
from bort.types import JSONMapping, JSONObject

TOKENIZER_CONFIG = "tokenizer_config.json"
WORDPIECE_TOKENS = {
    "bos": "[CLS]",
    "pad": "[PAD]",
    "eos": "[SEP]",
    "unk": "[UNK]",
    "mask": "[MASK]",
}
CONTINUATION = "##"  # begins a token that continues a word
_MAX_WORD = 100  # characters; a longer word is [UNK]
# Words whose ids are remembered: most of a text are among them, and looking them up is 10 times
# as fast as the library. 200,000 take about 50 MB.
_REMEMBERED, _LONGEST_REMEMBERED = 200_000, 32


@dataclass(frozen=True)
class Normalizer:
    """How texts are normalized: `tokenizers`' BertNormalizer.

    clean_text: control characters are dropped, and every kind of white space is a space.
    handle_chinese_chars: every Chinese character is a word.
    strip_accents: accents are removed; None: if lowercase.
    """

    clean_text: bool = True
    handle_chinese_chars: bool = True
    strip_accents: Optional[bool] = None
    lowercase: bool = True


class WordPiece(Vocabulary):
    """Words are split into the longest tokens of the vocabulary, from left to right.

    Texts give the ids of transformers' BertTokenizerFast, except that a special token in a text,
    such as [MASK], is plain text here.
    """

    name = "wordpiece"
    files: Sequence[str] = (TOKENIZER_JSON,)

    def __init__(
        self, spelling: Sequence[str], normalizer: Normalizer, max_word: int = _MAX_WORD
    ) -> None:
        """Build from the tokens in the order of their ids.

        Raises `ValueError` when a special token is missing.
        """
        from tokenizers import Tokenizer

        word_starts = [not token.startswith(CONTINUATION) for token in spelling]
        super().__init__(spelling, word_starts, WORDPIECE_TOKENS)
        self.normalizer = normalizer
        self._parts = _parts(spelling, normalizer, max_word)
        self._tokenizer = Tokenizer.from_str(json.dumps(self.file_content()))
        self._special = frozenset(self.special_ids.tolist())
        self._ids_of_word: dict[str, list[int]] = {}
        described = json.dumps([self.name, list(spelling), asdict(normalizer), max_word]).encode()
        self.fingerprint = hashlib.sha256(described).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [tokens]; a lone surrogate is read as U+FFFD."""
        known, ids = self._ids_of_word, []
        for word in utf8_bytes(text).decode().split(" "):  # no step looks beyond a space
            found = known.get(word)
            ids += self._encode_word(word) if found is None else found
        return np.array(ids, np.int32)

    def _encode_word(self, word: str) -> list[int]:
        ids = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(word) <= _LONGEST_REMEMBERED and len(self._ids_of_word) < _REMEMBERED:
            self._ids_of_word[word] = ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_sentences(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each sentence; no token reaches across a space."""
        return self.encode_batch(sentences)

    def encode_continued(self, text: str) -> np.ndarray:
        """Return what `encode` returns: what follows another token begins a word."""
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text, words separated by spaces; special tokens are dropped."""
        return self._tokenizer.decode([int(i) for i in ids if int(i) not in self._special])

    def save(self, folder: str) -> None:
        """Write tokenizer.json to a folder."""
        content = json.dumps(self.file_content(), ensure_ascii=False, indent=1)
        write_files(folder, {TOKENIZER_JSON: content.encode()})

    def file_content(self) -> JSONObject:
        """Return the content of a tokenizer.json that finds no special tokens in texts."""
        return _file_content(self._parts)


def _file_content(parts: JSONMapping) -> JSONObject:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
        **parts,
    }


def _parts(spelling: Sequence[str], normalizer: Normalizer, max_word: int) -> JSONObject:
    return {
        "normalizer": {"type": "BertNormalizer", **asdict(normalizer)},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": CONTINUATION, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": WORDPIECE_TOKENS["unk"],
            "continuing_subword_prefix": CONTINUATION,
            "max_input_chars_per_word": max_word,
            "vocab": {token: index for index, token in enumerate(spelling)},
        },
    }


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    """What is read of a tokenizer_config.json; None where an entry is missing."""

    do_lower_case: Optional[bool] = None
    strip_accents: Optional[bool] = None
    tokenize_chinese_chars: Optional[bool] = None


@dataclass(frozen=True)
class _NormalizerEntry(Normalizer):
    type: str = ""


@dataclass(frozen=True)
class _Kind:
    type: str = ""


@dataclass(frozen=True)
class _Model:
    vocab: Dict[str, int]
    type: str = ""
    unk_token: str = ""
    continuing_subword_prefix: str = CONTINUATION
    max_input_chars_per_word: int = _MAX_WORD


@dataclass(frozen=True)
class _AddedToken:
    content: str
    id: int
    special: bool = False


@dataclass(frozen=True)
class _TokenizerFile:
    """What is read of a tokenizer.json."""

    model: _Model
    normalizer: Optional[_NormalizerEntry] = None
    pre_tokenizer: Optional[_Kind] = None
    added_tokens: Sequence[_AddedToken] = ()


@dataclass(frozen=True)
class _AnyModel:
    type: str = ""


@dataclass(frozen=True)
class _AnyFile:
    model: _AnyModel = _AnyModel()


def is_wordpiece_json(path: str) -> bool:
    """Return whether a tokenizer.json holds a WordPiece; raises `UserError` if it is not JSON."""
    return read_json_as(path, _AnyFile).model.type == "WordPiece"


def read_wordpiece(path: str) -> WordPiece:
    """Read a tokenizer.json or, of any other name, a vocab.txt.

    Raises `UserError` when the file cannot be read, is a tokenizer of another kind or lacks a
    special token.
    """
    config_path = os.path.join(os.path.dirname(path), TOKENIZER_CONFIG)
    config = read_json_as(config_path, _Config) if os.path.exists(config_path) else _Config()
    try:
        if path.endswith(".json"):
            return _from_json(path, config)
        spelling = _read_spelling(path)
        return WordPiece(spelling, _configured(Normalizer(lowercase=_is_uncased(spelling)), config))
    except ValueError as error:
        raise UserError(f"{path}: {error}; it is not a BERT vocabulary") from None


def _read_spelling(path: str) -> list[str]:
    lines = read_lines(path)
    spelling = lines[:-1] if lines[-1] == "" else lines
    first_lines: dict[str, int] = {}
    for number, token in enumerate(spelling, 1):
        if first_lines.setdefault(token, number) != number:
            raise UserError(
                f"{path}:{number}: {quoted(token)} is already on line {first_lines[token]}"
            )
    return spelling


def _is_uncased(spelling: Iterable[str]) -> bool:
    special = set(WORDPIECE_TOKENS.values())
    return not any(
        token != token.lower()
        for token in spelling
        if token not in special and not token.startswith("[unused")
    )


def _configured(normalizer: Normalizer, config: _Config) -> Normalizer:
    """Return the normalizer with the entries of a tokenizer_config.json, as transformers does."""
    given = {
        "lowercase": config.do_lower_case,
        "strip_accents": config.strip_accents,
        "handle_chinese_chars": config.tokenize_chinese_chars,
    }
    return replace(normalizer, **{name: v for name, v in given.items() if v is not None})


def _from_json(path: str, config: _Config) -> WordPiece:
    if not is_wordpiece_json(path):
        raise UserError(f"{path}: is not a WordPiece, BERT's kind of tokenizer")
    file = read_json_as(path, _TokenizerFile)
    model, normalizer = file.model, file.normalizer
    kinds = {
        "the normalizer": (normalizer.type if normalizer else "none", "BertNormalizer"),
        "the pre_tokenizer": (
            file.pre_tokenizer.type if file.pre_tokenizer else "none",
            "BertPreTokenizer",
        ),
        "the prefix": (model.continuing_subword_prefix, CONTINUATION),
        "the unk_token": (model.unk_token, WORDPIECE_TOKENS["unk"]),
    }
    for what, (found, expected) in kinds.items():
        if found != expected:
            raise UserError(f"{path}: {what} is {quoted(found)}, BERT's is {expected}")
    for token in file.added_tokens:
        if model.vocab.get(token.content) != token.id:
            raise UserError(f"{path}: the added token {quoted(token.content)} is not in its vocab")
    if not 1 <= model.max_input_chars_per_word <= 10_000:
        raise UserError(f"{path}: max_input_chars_per_word is {model.max_input_chars_per_word}")
    assert normalizer is not None
    plain = Normalizer(**{name: getattr(normalizer, name) for name in asdict(Normalizer())})
    spelling = spelling_of(model.vocab, path)
    return WordPiece(spelling, _configured(plain, config), model.max_input_chars_per_word)
