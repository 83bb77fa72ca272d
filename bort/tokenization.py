"""Tokenizers: RoBERTa's byte-level BPE and SentencePiece; BERT's is in bort.wordpiece.

All implement the `Tokenizer` protocol; `load_tokenizer` loads the one that the flags name.
`encode` is for plain text: `<mask>` in a text is six ordinary characters, and special ids are never
returned (except `<unk>`, by a SentencePiece model without byte fallback).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Optional, Protocol, Sequence

import numpy as np

from bort.config import option
from bort.errors import UserError, quoted
from bort.files import WHOLE_BYTES, atomic_write, open_regular, read_json
from bort.sums import check_sum

RELEASED_DATASET = "openwebtext_ccnews_stories_books_cased"
SAMPLE_MODEL = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "test_data", "sample_text.model"
)
SPECIAL_TOKENS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}

# GluonNLP's names; the digits begin the SHA-1 of the content.
_RELEASED_FILES = (
    f"{RELEASED_DATASET}-2b804f8f.vocab",
    "openai_webtext_bpe_ranks-396d4d8e.json",
)
# Above the vocabularies of published models (XLM-V: a million); 4 million take a minute and 3 GB.
MAX_VOCABULARY = 2_000_000
# The folder of the tokenizer beside shards and saved models.
TOKENIZER_FOLDER = "tokenizer"
# The files of `Tokenizer.save`: SentencePiece's model, BPE's two under Hugging Face's names, or
# WordPiece's one.
_SAVED_FILES = ("tokenizer.model", "vocab.json", "merges.txt")
TOKENIZER_JSON = "tokenizer.json"
# GPT-2's division of text into words. The alternatives without look-ahead are grouped: tiktoken's
# regular expressions search the group as one automaton, which makes encoding a third faster.
_GPT2_WORDS = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s"
# Appended to a SentencePiece model, a protocol buffer, which merges repeated fields: field 3
# (normalizer_spec), 2 bytes, in which field 3 (add_dummy_prefix) is 0.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# tiktoken's stack overflows at a million blanks in a row; such a run is encoded in parts.
_ENDLESS_BLANKS = re.compile(r"\s{65536}(?=\s)")


class Tokenizer(Protocol):
    """A vocabulary and its encoder.

    `files` are the names of those that `save` writes.
    `special_tokens` maps bos, pad, eos, unk and mask to their spelling: bos begins a sequence and
    eos ends each of its texts, `<s>` and `</s>`, in BERT [CLS] and [SEP].
    `special_ids` are sorted and never masked; `word_starts[id]` is True for a token that begins a
    word, and for special tokens; `fingerprint` is a SHA-256 over everything that decides the ids.
    """

    name: str
    files: Sequence[str]
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int
    unk_id: int
    special_tokens: Mapping[str, str]
    special_ids: np.ndarray
    word_starts: np.ndarray
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [tokens], without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text; the texts are independent."""

    def encode_sentences(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each sentence of one document, encoded as running text."""

    def encode_continued(self, text: str) -> np.ndarray:
        """Return the ids of a text that follows other tokens: only its own spaces begin words."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, without special tokens."""

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the vocabulary's spelling of each id."""

    def save(self, folder: str) -> None:
        """Write the files from which `load_tokenizer_folder` loads the same tokenizer."""


@dataclass(frozen=True)
class TokenizerSettings:
    """Vocabulary; by default that of the weights or shards read, or the small one in test_data/."""

    dataset_name: Optional[str] = option(
        None, f"{RELEASED_DATASET}: RoBERTa's vocabulary, downloaded once to GluonNLP's cache"
    )
    vocab_file: Optional[str] = option(
        None,
        "BERT's vocab.txt or a WordPiece's tokenizer.json, or the vocabulary of a byte-level BPE: "
        "GluonNLP's .vocab or Hugging Face's vocab.json",
    )
    bpe_ranks: Optional[str] = option(
        None,
        "merges of a byte-level BPE: GluonNLP's openai_webtext_bpe_ranks or Hugging Face's "
        "merges.txt",
    )
    sentencepiece: Optional[str] = option(None, "SentencePiece .model file")

    def check(self) -> None:
        """Raise `UserError` unless the flags name at most one complete vocabulary."""
        if self.vocab_file and is_wordpiece_file(self.vocab_file):
            if self.bpe_ranks:
                raise UserError(
                    f"--vocab_file {self.vocab_file}: a WordPiece has no merges: leave --bpe_ranks "
                    "out"
                )
        elif bool(self.vocab_file) != bool(self.bpe_ranks):
            given, missing = ("vocab_file", "bpe_ranks")[:: 1 if self.vocab_file else -1]
            raise UserError(f"--{given} {getattr(self, given)}: needs --{missing}")
        kinds = ("dataset_name", "vocab_file", "sentencepiece")
        named = [f"--{kind}" for kind in kinds if getattr(self, kind)]
        if len(named) > 1:
            raise UserError(f"{' and '.join(named)} name different vocabularies: give only one")
        if self.dataset_name not in (None, RELEASED_DATASET):
            raise UserError(
                f"--dataset_name {self.dataset_name}: the only known name is {RELEASED_DATASET}; "
                "for another vocabulary give its files by --vocab_file and --bpe_ranks"
            )


def load_tokenizer(settings: TokenizerSettings) -> Tokenizer:
    """Return the tokenizer that the settings name.

    Raises `UserError` when a file is missing or of another format, when a vocabulary lacks a
    special token, and when a download fails.
    """
    settings.check()
    if settings.sentencepiece:
        return _load_sentencepiece(settings.sentencepiece)
    if settings.dataset_name:
        return _load_bpe(*_released_files())
    if settings.vocab_file and settings.bpe_ranks:
        return _load_bpe(settings.vocab_file, settings.bpe_ranks)
    if settings.vocab_file:
        return _load_wordpiece(settings.vocab_file)
    return _load_sentencepiece(SAMPLE_MODEL)


def load_tokenizer_folder(folder: str) -> Optional[Tokenizer]:
    """Return the tokenizer that `Tokenizer.save` wrote to a folder; None if there is none.

    Raises `UserError` when its files are damaged.
    """
    model, vocab_file, bpe_ranks = (os.path.join(folder, name) for name in _SAVED_FILES)
    if os.path.exists(model):
        return _load_sentencepiece(model)
    if os.path.exists(vocab_file):
        return _load_bpe(vocab_file, bpe_ranks)
    return _wordpiece_of(folder)


def _wordpiece_of(folder: str) -> Optional[Tokenizer]:
    from bort.wordpiece import is_wordpiece_json

    file, vocab_file = (os.path.join(folder, name) for name in (TOKENIZER_JSON, "vocab.txt"))
    if os.path.exists(file) and is_wordpiece_json(file):
        return _load_wordpiece(file)
    return _load_wordpiece(vocab_file) if os.path.exists(vocab_file) else None


def save_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Write a tokenizer to a folder of its own, from which `load_tokenizer_folder` loads it.

    Files of a tokenizer of another kind, which would be loaded instead, are renamed: `<name>.old`.
    """
    tokenizer.save(folder)
    for name in {*_SAVED_FILES, TOKENIZER_JSON}.difference(tokenizer.files):
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, f"{path}.old")


def refuse_other_tokenizer(tokenizer: Tokenizer, folder: str, flag: str) -> None:
    """Raise `UserError` when a model or shards in a folder need the tokenizer there, not this one.

    flag: the one that named the folder, for the message.
    """
    pattern = re.compile(r".+\.params|part-[0-9]{5,}\.npz")
    with contextlib.suppress(FileNotFoundError):
        for name in filter(pattern.fullmatch, sorted(os.listdir(folder))):
            before = None
            with contextlib.suppress(UserError):  # a damaged one is written again
                before = load_tokenizer_folder(os.path.join(folder, TOKENIZER_FOLDER))
            if before and before.fingerprint != tokenizer.fingerprint:
                raise UserError(
                    f"{flag} {folder}: has {name} with its {TOKENIZER_FOLDER}/, which another "
                    "vocabulary would replace; name another folder"
                )
            return


def is_wordpiece_file(path: str) -> bool:
    """Return whether the name of a file is that of a WordPiece: .txt, or tokenizer.json."""
    return path.endswith(".txt") or os.path.basename(path) == TOKENIZER_JSON


def _load_wordpiece(path: str) -> Tokenizer:
    from bort.wordpiece import read_wordpiece

    check_sum(path)
    return read_wordpiece(path)


def write_files(folder: str, contents: dict[str, bytes]) -> None:
    """Write files into a folder, except those that have their content already."""
    os.makedirs(folder, exist_ok=True)
    for name, content in contents.items():
        path = os.path.join(folder, name)
        if not _holds(path, content):
            with atomic_write(path, "wb") as handle:
                handle.write(content)


def _holds(path: str, content: bytes) -> bool:
    try:
        with open_regular(path, WHOLE_BYTES) as handle:
            return handle.read() == content
    except OSError:
        return False


class Vocabulary:
    """The tokens by id and the special ids, for all kinds of tokenizer."""

    def __init__(
        self,
        spelling: Sequence[str],
        word_starts: Sequence[bool],
        special_tokens: Mapping[str, str] = SPECIAL_TOKENS,
    ) -> None:
        """Number the tokens in order.

        Raises `ValueError` when there are too many, and when a special token is missing.
        """
        if len(spelling) > MAX_VOCABULARY:
            raise ValueError(f"it has {len(spelling):,} tokens, the limit is {MAX_VOCABULARY:,}")
        ids = {token: index for index, token in enumerate(spelling)}
        missing = [token for token in special_tokens.values() if token not in ids]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        special = {role: ids[token] for role, token in special_tokens.items()}
        self.special_tokens = special_tokens
        self.bos_id, self.pad_id = special["bos"], special["pad"]
        self.eos_id, self.unk_id = special["eos"], special["unk"]
        self.mask_id = special["mask"]
        self.vocab_size = len(spelling)
        self.special_ids = np.array(sorted(special.values()), np.int32)
        self.word_starts = np.array(word_starts)
        self.word_starts[self.special_ids] = True
        self._spelling = spelling

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the vocabulary's spelling of each id."""
        return [self._spelling[index] for index in ids]


class ByteLevelBPE(Vocabulary):
    """Byte-level byte-pair encoding (Radford et al. 2019, section 2.2), as in RoBERTa.

    Equivalent to GluonNLP's `GPT2BPETokenizer` with its vocabulary. tiktoken merges any neighbours
    whose concatenation is a token, GluonNLP those in the list of merges. For a trained list these
    are the same, because each token is then made by one merge only; a list in which a merge does
    not make a new token out of earlier ones is refused.
    """

    name = "byte_level_bpe"
    files: Sequence[str] = _SAVED_FILES[1:]

    def __init__(self, spelling: Sequence[str], merges: Sequence[str]) -> None:
        """Build from the tokens in the order of their ids and the merges ("a b") by rank.

        Raises `ValueError` when a merge does not build on earlier ones, and when the vocabulary
        lacks a token of the merges or a special token.
        """
        import tiktoken

        space = BYTE_TO_CHARACTER[ord(" ")]
        super().__init__(spelling, [token.startswith(space) for token in spelling])
        made = _tokens_made(merges)
        ids = {token: index for index, token in enumerate(spelling)}
        missing = [token for token in made if token not in ids]
        if missing:
            raise ValueError(
                f"{len(missing)} of the {len(made)} tokens that the merges make are not in it, "
                f"the first is {missing[0]!r}"
            )
        self._ids = np.array([ids[token] for token in made], np.int32)  # by rank
        self._sizes = np.array([len(content) for content in made.values()])  # bytes, by rank
        self._made = made
        self._merges = merges
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=_GPT2_WORDS,
            mergeable_ranks={content: rank for rank, content in enumerate(made.values())},
            # Never produced, because `encode_to_numpy` is told to allow none. But tiktoken searches
            # the text for them, and an empty set takes longer: it matches everywhere.
            special_tokens=dict.fromkeys(SPECIAL_TOKENS.values(), len(made)),
        )
        described = json.dumps([self.name, list(spelling), list(merges)]).encode()
        self.fingerprint = hashlib.sha256(described).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [tokens]; a lone surrogate is read as U+FFFD."""
        return self._ids.take(self._ranks(utf8_bytes(text).decode()))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_sentences(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of `" ".join(sentences)`, split before the joining spaces.

        A token of several spaces, where a sentence is empty or begins with a space, belongs to the
        later sentence.
        """
        content = [utf8_bytes(sentence) for sentence in sentences]
        ranks = self._ranks(b" ".join(content).decode())
        sentence_ends = np.cumsum([len(sentence) + 1 for sentence in content])[:-1] - 1
        token_ends = self._sizes.take(ranks).cumsum()
        cuts = token_ends.searchsorted(sentence_ends, side="right").tolist()
        ids = self._ids.take(ranks)
        starts, ends = [0, *cuts], [*cuts, len(ids)]
        return [ids[starts[i] : ends[i]] for i in range(len(sentences))]

    def encode_continued(self, text: str) -> np.ndarray:
        """Return what `encode` returns: a first word without space is no different there."""
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD, special tokens are dropped."""
        content = (self._made.get(self._spelling[index], b"") for index in ids)
        return b"".join(content).decode("utf-8", errors="replace")

    def save(self, folder: str) -> None:
        """Write vocab.json and merges.txt, in Hugging Face's format, to a folder."""
        ids = {token: index for index, token in enumerate(self._spelling)}
        merges = "".join(f"{line}\n" for line in ("#version: 0.2", *self._merges))
        vocabulary = json.dumps(ids, ensure_ascii=False)
        _, vocab_file, bpe_ranks = _SAVED_FILES
        write_files(folder, {bpe_ranks: merges.encode(), vocab_file: vocabulary.encode()})

    def _ranks(self, text: str) -> np.ndarray:
        nothing: frozenset[str] = frozenset()
        cuts = [blanks.end() for blanks in _ENDLESS_BLANKS.finditer(text)]
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])] if cuts else [text]
        ranks = [
            self._encoding.encode_to_numpy(
                part, allowed_special=nothing, disallowed_special=nothing
            )
            for part in parts
        ]
        return np.concatenate(ranks) if cuts else ranks[0]


class SentencePiece(Vocabulary):
    """A SentencePiece model (Kudo and Richardson 2018), unigram or BPE."""

    name = "sentencepiece"
    files: Sequence[str] = _SAVED_FILES[:1]

    def __init__(self, model: bytes) -> None:
        """Build from the content of a .model file.

        Raises `RuntimeError` when it is not one, `ValueError` when it lacks a special token or
        encodes plain text to one.
        """
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._continuing: Optional[SentencePieceProcessor] = None
        self._processor = SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        ids = range(self._processor.vocab_size())
        spelling = self._processor.id_to_piece(list(ids))
        super().__init__(spelling, [piece.startswith("▁") for piece in spelling])
        readable = [
            self._spelling[index]
            for index in self.special_ids.tolist()
            if not self._processor.is_control(index) and index != self._processor.unk_id()
        ]
        if readable:
            raise ValueError(
                f"its {', '.join(readable)} can be encoded from text: not control symbols"
            )
        self.fingerprint = hashlib.sha256(self.name.encode() + b"\0" + model).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [tokens]; a lone surrogate is read as U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        # One thread: the callers use several processes.
        encoded = self._processor.encode([utf8_bytes(text) for text in texts], num_threads=1)
        return [np.array(ids, np.int32) for ids in encoded]

    def encode_sentences(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each sentence; SentencePiece marks the spaces itself."""
        return self.encode_batch(sentences)

    def encode_continued(self, text: str) -> np.ndarray:
        """Return the ids without the mark of a new word, unless the text begins with a space."""
        if text[:1].isspace():
            return self.encode(text)
        if self._continuing is None:
            self._continuing = type(self._processor)()
            self._continuing.LoadFromSerializedProto(self._model + _NO_DUMMY_PREFIX)
        return np.array(self._continuing.encode(utf8_bytes(text)), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text, with ⁇ for `<unk>`; other special tokens are dropped."""
        return self._processor.decode([int(index) for index in ids])

    def save(self, folder: str) -> None:
        """Write tokenizer.model to a folder."""
        write_files(folder, {_SAVED_FILES[0]: self._model})


def utf8_bytes(text: str) -> bytes:
    """Return a text as UTF-8; a lone surrogate becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _byte_alphabet() -> dict[int, str]:
    """Return GPT-2's characters for the 256 bytes: printable ones as is, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + index) for index, byte in enumerate(others)
    }


BYTE_TO_CHARACTER = _byte_alphabet()


def _tokens_made(merges: Sequence[str]) -> dict[str, bytes]:
    """Return the tokens by rank, with their bytes: single ones, then the result of each merge.

    Raises `ValueError` for a merge that does not make a new token out of two earlier ones.
    """
    made = {character: bytes((byte,)) for byte, character in BYTE_TO_CHARACTER.items()}
    for number, merge in enumerate(merges, start=1):
        left, _, right = merge.partition(" ")
        token = left + right
        if left not in made or right not in made or token in made:
            raise ValueError(
                f"merge {number}, {quoted(merge)}, does not make a new token of earlier ones"
            )
        made[token] = made[left] + made[right]
    return made


def _load_bpe(vocab_file: str, bpe_ranks: str) -> ByteLevelBPE:
    check_sum(vocab_file)
    check_sum(bpe_ranks)
    try:
        return ByteLevelBPE(read_vocabulary(vocab_file), read_merges(bpe_ranks))
    except ValueError as error:
        raise UserError(
            f"{vocab_file} with {bpe_ranks}: {error}; give both files of one RoBERTa vocabulary"
        ) from None


def read_vocabulary(path: str) -> list[str]:
    """Return the tokens in the order of their ids, from GluonNLP's or Hugging Face's JSON."""
    content = read_json(path)
    return spelling_of(
        content.get("token_to_idx", content) if isinstance(content, dict) else None, path
    )


def spelling_of(ids: Any, path: str) -> list[str]:
    """Return the tokens of {token: id} in the order of their ids; `path` is for messages.

    Raises `UserError` unless the ids are 0, 1, 2, ...
    """
    if not isinstance(ids, dict) or any(type(index) is not int for index in ids.values()):
        raise UserError(f"{path}: is neither a GluonNLP vocabulary nor a Hugging Face vocab.json")
    if sorted(ids.values()) != list(range(len(ids))):
        raise UserError(
            f"{path}: the ids of its tokens are not 0, 1, 2, ... without gaps; restore the file"
        )
    return sorted(ids, key=ids.__getitem__)


def read_merges(path: str) -> list[str]:
    """Return the merges ("a b") by rank; raises `UserError` for a file that cannot be read."""
    return [line for line in read_lines(path) if line and not line.startswith("#version")]


def read_lines(path: str) -> list[str]:
    """Return the lines of a text, the last one empty if the text ends with a line feed.

    A byte order mark, which editors on Windows write, is not part of the first one.

    Raises `UserError` when it cannot be read.
    """
    try:
        with open_regular(path, WHOLE_BYTES) as handle:
            return io.TextIOWrapper(handle, "utf-8-sig").read().split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start})") from None


def _load_sentencepiece(path: str) -> SentencePiece:
    check_sum(path)
    try:
        with open_regular(path, WHOLE_BYTES) as handle:
            return SentencePiece(handle.read())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except RuntimeError:
        raise UserError(f"{path}: is not a SentencePiece model") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; train one with scripts/train_sentencepiece.py") from None


def _released_files() -> tuple[str, str]:
    """Return the paths of RoBERTa's vocabulary and merges in MXNet's cache.

    They are downloaded if necessary. Without a download GluonNLP is not imported: it imports
    MXNet, which takes seconds.
    """
    home = os.environ.get("MXNET_HOME") or os.path.join("~", ".mxnet")
    folder = os.path.join(os.path.expanduser(home), "models")
    vocab_file, bpe_ranks = (os.path.join(folder, name) for name in _RELEASED_FILES)
    if not (_is_whole(vocab_file) and _is_whole(bpe_ranks)):
        _download_released(folder)
    return vocab_file, bpe_ranks


def _is_whole(path: str) -> bool:
    try:
        with open_regular(path, WHOLE_BYTES) as handle:
            digest = hashlib.sha1(handle.read()).hexdigest()
    except OSError:
        return False
    return digest.startswith(os.path.basename(path).rpartition("-")[2].partition(".")[0])


def _download_released(folder: str) -> None:
    """Let GluonNLP download both files into a temporary folder, then move them to `folder`."""
    from gluonnlp.data import GPT2BPETokenizer
    from gluonnlp.data.utils import _load_pretrained_vocab

    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            with contextlib.redirect_stdout(sys.stderr):
                _load_pretrained_vocab(RELEASED_DATASET, fresh)
                GPT2BPETokenizer(root=fresh)
            for name in _RELEASED_FILES:
                os.replace(os.path.join(fresh, name), os.path.join(folder, name))
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).split("(", 1)[0].strip() or type(error).__name__
        raise UserError(
            f"--dataset_name {RELEASED_DATASET}: {' and '.join(_RELEASED_FILES)} are not in "
            f"{folder} and could not be downloaded ({type(error).__name__}: {reason}); put them "
            "there, or give --vocab_file and --bpe_ranks"
        ) from None
