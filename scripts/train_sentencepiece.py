"""Train a SentencePiece model (Kudo and Richardson 2018) that Bort can use.

    python scripts/train_sentencepiece.py --input_file 'text/*.txt' --model_file text.model

The special tokens have RoBERTa's ids, save `<mask>`, which has 4; no text can spell them.
Characters without a token of their own are spelt in bytes, so that nothing becomes `<unk>`.
"""

from __future__ import annotations

import io
import itertools
import os
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Iterator, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import option, parse, required
from bort.errors import UserError, entry_point
from bort.tokenization import SPECIAL_TOKENS
from data.corpus import MAX_DOCUMENT_BYTES, find_inputs, read_documents, survey

_COMMON = frozenset(string.ascii_letters + string.digits + string.punctuation)


@dataclass(frozen=True)
class SentencePieceSettings:
    """What is learnt from, and the size and kind of the vocabulary."""

    input_file: str = required("text, one sentence per line: paths and globs, commas between")
    model_file: str = required("the .model file to write")
    vocab_size: int = option(8000, "number of tokens, special ones and 256 bytes included")
    model_type: str = option("bpe", "kind of model", choices=("bpe", "unigram"))
    character_coverage: float = option(
        0.9995, "share of the characters that get tokens", minimum=0.0, maximum=1.0
    )
    input_sentence_size: int = option(
        1_000_000, "learn from at most this many sentences, drawn at random", minimum=1
    )
    random_seed: int = option(0, "seed of that draw", minimum=0)


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> str:
    """Train the model that the flags describe; returns the path of its file."""
    (settings,) = parse("Train a SentencePiece model.", argv, SentencePieceSettings)
    files = find_inputs(settings.input_file)
    for path in files:
        survey(path)
    generator = Random(settings.random_seed)
    sentences = sample(_sentences(files), settings.input_sentence_size, generator)
    model = train(settings, sentences)
    temporary = f"{settings.model_file}.tmp"
    try:
        with open(temporary, "wb") as handle:
            handle.write(model)
        os.replace(temporary, settings.model_file)
    except OSError as error:
        raise UserError(
            f"--model_file {settings.model_file}: cannot be written ({error.strerror})"
        ) from None
    print(f"{settings.model_file}: {settings.vocab_size} tokens")
    return settings.model_file


def sample(sentences: Iterator[str], size: int, generator: Random) -> list[str]:
    """Draw `size` of the sentences, each with the same chance (Vitter 1985, algorithm R).

    SentencePiece can draw them itself, but not twice the same ones.
    """
    drawn = list(itertools.islice(sentences, size))
    for place, sentence in enumerate(sentences, start=size):
        replaced = generator.randrange(place + 1)
        if replaced < size:
            drawn[replaced] = sentence
    return drawn


def train(settings: SentencePieceSettings, sentences: Sequence[str]) -> bytes:
    """Return the content of a .model file learnt from the sentences.

    Raises `UserError` when the sentences are too few or too many for the size of the vocabulary.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=settings.model_type,
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            max_sentence_length=MAX_DOCUMENT_BYTES,  # longer ones are left out without a word
            # Not all of the common ones: versions before 0.2.3 abort when one is not in the text.
            required_chars="".join(sorted(_COMMON.intersection(set().union(*sentences)))),
            byte_fallback=True,
            # RoBERTa's order, but for <mask>, its last token, which follows these.
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=[SPECIAL_TOKENS["mask"]],
            minloglevel=1,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or str(error)
        raise UserError(f"--vocab_size {settings.vocab_size}: {reason}") from None
    return model.getvalue()


def _sentences(files: Sequence[str]) -> Iterator[str]:
    for path in files:
        for document in read_documents(path):
            yield from document.decode().split("\n")


if __name__ == "__main__":
    main()
