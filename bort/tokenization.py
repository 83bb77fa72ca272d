"""A vocabulary and its encoder: RoBERTa's byte-level BPE and SentencePiece.

Both kinds meet the `Tokenizer` interface; `load_tokenizer` makes the one that the flags name.
`encode` is for plain text: `<mask>` typed in a text is six ordinary characters, and the id of a
special token never comes out (save `<unk>`, from a SentencePiece model without byte fallback).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Optional, Protocol, Sequence

import numpy as np

from bort.config import option, read_json
from bort.errors import UserError

RELEASED_DATASET = "openwebtext_ccnews_stories_books_cased"
SAMPLE_MODEL = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "test_data", "sample_text.model"
)
SPECIAL_TOKENS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}

_BPE_RANKS_FILE = "openai_webtext_bpe_ranks-396d4d8e.json"
# GPT-2's division of text into words. `++` takes what GPT-2's `+` takes, without ever giving back:
# nothing after it could match a shorter run, and the search is a third faster.
_GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# tiktoken's regular expressions overflow their stack at a million blanks in a row.
_ENDLESS_BLANKS = re.compile(r"\s{65536}(?=\s)")


class Tokenizer(Protocol):
    """What the rest of the project knows of a vocabulary and its encoder.

    `special_ids` are sorted and never masked; `word_starts[id]` is True where a token begins a
    word (special tokens do); `fingerprint` is a SHA-256 over all that decides the ids.
    """

    name: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int
    unk_id: int
    special_ids: np.ndarray
    word_starts: np.ndarray
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [tokens], without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each of several unrelated texts."""

    def encode_sentences(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each sentence of one document, as it stands in running text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; special tokens leave nothing in it."""

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the vocabulary's spelling of each id."""


@dataclass(frozen=True)
class TokenizerSettings:
    """Which vocabulary encodes the text; none named: the small one embedded in test_data/."""

    dataset_name: Optional[str] = option(
        None, f"GluonNLP vocabulary, from its cache or downloaded: {RELEASED_DATASET}"
    )
    vocab_file: Optional[str] = option(
        None, "byte-level BPE vocabulary: GluonNLP's .vocab or Hugging Face's vocab.json"
    )
    bpe_ranks: Optional[str] = option(
        None, "its merges: GluonNLP's openai_webtext_bpe_ranks or Hugging Face's merges.txt"
    )
    sentencepiece: Optional[str] = option(None, "SentencePiece .model file")

    def check(self) -> None:
        """Raise `UserError` unless the flags name at most one vocabulary, and all of it."""
        if bool(self.vocab_file) != bool(self.bpe_ranks):
            given, missing = ("vocab_file", "bpe_ranks")[:: 1 if self.vocab_file else -1]
            raise UserError(f"--{given} {getattr(self, given)}: give --{missing} with it")
        kinds = ("dataset_name", "vocab_file", "sentencepiece")
        named = [f"--{kind}" for kind in kinds if getattr(self, kind)]
        if len(named) > 1:
            raise UserError(f"{' and '.join(named)} name different vocabularies: give one of them")


def load_tokenizer(settings: TokenizerSettings) -> Tokenizer:
    """Return the tokenizer that the settings name.

    Raises `UserError` when a file is missing or is not what its flag wants, when a vocabulary
    lacks a special token, and when a download fails.
    """
    settings.check()
    if settings.sentencepiece:
        return _load_sentencepiece(settings.sentencepiece)
    if settings.dataset_name:
        return _load_bpe(*_gluonnlp_files(settings.dataset_name))
    if settings.vocab_file and settings.bpe_ranks:
        return _load_bpe(settings.vocab_file, settings.bpe_ranks)
    return _load_sentencepiece(SAMPLE_MODEL)


class _Vocabulary:
    """What both kinds share: the spelling of every id, and which ids are special."""

    def __init__(self, spelling: Sequence[str], word_mark: str) -> None:
        ids = {token: index for index, token in enumerate(spelling)}
        special = {role: ids[token] for role, token in SPECIAL_TOKENS.items()}
        self.bos_id, self.pad_id = special["bos"], special["pad"]
        self.eos_id, self.unk_id = special["eos"], special["unk"]
        self.mask_id = special["mask"]
        self.vocab_size = len(spelling)
        self.special_ids = np.array(sorted(special.values()), np.int32)
        self.word_starts = np.array([token.startswith(word_mark) for token in spelling])
        self.word_starts[self.special_ids] = True
        self._spelling = spelling

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the vocabulary's spelling of each id."""
        return [self._spelling[index] for index in ids]

    def _plain(self, ids: Iterable[int]) -> list[int]:
        special = set(self.special_ids.tolist()) - {self.unk_id}
        return [int(index) for index in ids if int(index) not in special]


class ByteLevelBPE(_Vocabulary):
    """Byte-level byte-pair encoding (Radford et al. 2019, section 2.2), as in RoBERTa.

    Gives what GluonNLP's `GPT2BPETokenizer` and its vocabulary give. tiktoken merges whichever
    neighbours spell a token of the vocabulary, GluonNLP those that stand in the list of merges:
    the same as long as each merge makes a new token out of older ones, which is checked.
    """

    name = "byte_level_bpe"

    def __init__(self, spelling: Sequence[str], merges: Sequence[str]) -> None:
        """Build from the tokens in the order of their ids and the merges ("a b") by rank.

        Raises `ValueError` when the merges do not build on each other or leave the vocabulary.
        """
        import tiktoken

        super().__init__(spelling, word_mark=_BYTE_TO_CHARACTER[ord(" ")])
        ranks = _ranks(merges)
        ids = {token: index for index, token in enumerate(spelling)}
        missing = [token for token in ranks if token not in ids]
        if missing:
            raise ValueError(
                f"{len(missing)} of its {len(ranks)} tokens are not in the vocabulary, "
                f"the first is {missing[0]!r}"
            )
        self._ids_of_ranks = np.array([ids[token] for token in ranks], np.int32)
        self._bytes = {ids[token]: _token_bytes(token) for token in ranks}
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=_GPT2_WORDS,
            mergeable_ranks={_token_bytes(token): rank for token, rank in ranks.items()},
            special_tokens={},
        )
        content = json.dumps([self.name, list(spelling), list(merges)]).encode()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [tokens]; a lone surrogate counts as U+FFFD."""
        cuts = [0, *(blanks.end() for blanks in _ENDLESS_BLANKS.finditer(text)), len(text)]
        ranks: list[int] = []
        for start, end in zip(cuts, cuts[1:]):
            ranks += self._encoding.encode_ordinary(text[start:end])
        return self._ids_of_ranks[np.array(ranks, np.int64)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_sentences(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each sentence; all but the first are encoded with a space before."""
        return [
            self.encode(f" {sentence}" if place else sentence)
            for place, sentence in enumerate(sentences)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD, special tokens nothing."""
        content = b"".join(self._bytes.get(index, b"") for index in self._plain(ids))
        return content.decode("utf-8", errors="replace")


class SentencePiece(_Vocabulary):
    """A SentencePiece model (Kudo and Richardson 2018), unigram or BPE."""

    name = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        """Build from the content of a .model file; raises `RuntimeError` when it is none."""
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = self._processor.vocab_size()
        super().__init__(self._processor.id_to_piece(list(range(size))), word_mark="▁")
        self.fingerprint = hashlib.sha256(self.name.encode() + b"\0" + model).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [tokens]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        # One thread: the caller's processes are the parallelism.
        pieces = self._processor.encode([_well_formed(text) for text in texts], num_threads=1)
        return [np.array(ids, np.int32) for ids in pieces]

    def encode_sentences(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each sentence: SentencePiece marks the space itself."""
        return self.encode_batch(sentences)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text, with ⁇ for `<unk>`; other special tokens leave nothing in it."""
        return self._processor.decode(self._plain(ids))


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _byte_alphabet() -> dict[int, str]:
    """Return GPT-2's spelling of the 256 bytes: printable ones as they are, others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in sorted(printable)} | {
        byte: chr(0x100 + place) for place, byte in enumerate(others)
    }


_BYTE_TO_CHARACTER = _byte_alphabet()
_CHARACTER_TO_BYTE = {character: byte for byte, character in _BYTE_TO_CHARACTER.items()}


def _token_bytes(token: str) -> bytes:
    return bytes(_CHARACTER_TO_BYTE[character] for character in token)


def _ranks(merges: Sequence[str]) -> dict[str, int]:
    """Return {token: rank}: the 256 bytes, then what each merge makes; raises `ValueError`."""
    ranks = {character: rank for rank, character in enumerate(_BYTE_TO_CHARACTER.values())}
    for number, merge in enumerate(merges, start=1):
        left, _, right = merge.partition(" ")
        if left not in ranks or right not in ranks or left + right in ranks:
            raise ValueError(f"merge {number}, {merge!r}, does not make a new token of older ones")
        ranks[left + right] = len(ranks)
    return ranks


def _load_bpe(vocab_file: str, bpe_ranks: str) -> ByteLevelBPE:
    spelling = _read_vocabulary(vocab_file)
    _check_specials(spelling, vocab_file, "take a RoBERTa vocabulary")
    merges = _read_merges(bpe_ranks)
    try:
        return ByteLevelBPE(spelling, merges)
    except ValueError as error:
        raise UserError(
            f"{bpe_ranks}: {error} ({vocab_file}); take both files from the same model"
        ) from None


def _read_vocabulary(path: str) -> list[str]:
    """Return the tokens in the order of their ids, from GluonNLP's or Hugging Face's JSON."""
    content = read_json(path)
    ids = content.get("token_to_idx", content) if isinstance(content, dict) else None
    if not isinstance(ids, dict) or sorted(_integers(ids)) != list(range(len(ids))):
        raise UserError(
            f"{path}: is neither a GluonNLP vocabulary nor a Hugging Face vocab.json "
            "(a JSON object that numbers its tokens from 0 on)"
        )
    return sorted(ids, key=ids.__getitem__)


def _integers(ids: Mapping[str, Any]) -> list[int]:
    return [index for index in ids.values() if type(index) is int]


def _read_merges(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as handle:
            lines = handle.read().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start})") from None
    return [line for line in lines if line and not line.startswith("#version")]


def _load_sentencepiece(path: str) -> SentencePiece:
    try:
        with open(path, "rb") as handle:
            return SentencePiece(handle.read())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except RuntimeError:
        raise UserError(f"{path}: is not a SentencePiece model") from None


def _check_specials(spelling: Sequence[str], path: str, cure: str) -> None:
    known = set(spelling)
    missing = [token for token in SPECIAL_TOKENS.values() if token not in known]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; {cure}")


def _gluonnlp_files(dataset_name: str) -> tuple[str, str]:
    home = os.environ.get("MXNET_HOME", os.path.join("~", ".mxnet"))
    root = os.path.join(os.path.expanduser(home), "models")
    found = glob.glob(os.path.join(glob.escape(root), f"{dataset_name}-*.vocab"))
    return found[0], os.path.join(root, _BPE_RANKS_FILE)
