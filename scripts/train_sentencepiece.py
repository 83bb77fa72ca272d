"""Train a SentencePiece model (Kudo and Richardson 2018) that Bort can use.

    python scripts/train_sentencepiece.py --input_file 'text/*.txt' --model_file text.model

The special tokens have RoBERTa's ids, except `<mask>`, which has 4; text never encodes to them.
Characters without a token are encoded as bytes, so that nothing becomes `<unk>`.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Iterator, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import option, parse, required
from bort.errors import UserError, entry_point, reasons
from bort.files import (
    atomic_write,
    is_stream,
    refuse_overwriting,
    remove_left_overs_of,
    require_place,
    summary_stream,
)
from bort.sums import write_sums
from bort.tokenization import SPECIAL_TOKENS
from data.corpus import MAX_DOCUMENT_BYTES, open_sources, read_documents, scan
from data.text_formats import TEXT_FIELD, TextSource

_COMMON = frozenset(string.ascii_letters + string.digits + string.punctuation)


@dataclass(frozen=True)
class SentencePieceSettings:
    """Text and vocabulary."""

    input_file: str = required("text, as for create_pretraining_data.py")
    model_file: str = required("the .model file to write")
    text_field: str = option(
        TEXT_FIELD, "field of JSON lines, or column of parquet, that holds the text"
    )
    vocab_size: int = option(
        8000,
        "number of tokens, special tokens and 256 bytes included",
        minimum=1,
        maximum=2**31 - 1,
    )
    model_type: str = option("bpe", "algorithm", choices=("bpe", "unigram"))
    character_coverage: float = option(
        0.9995, "share of the characters that get tokens", minimum=0.98, maximum=1.0
    )
    input_sentence_size: int = option(
        1_000_000, "maximum number of sentences to train on, drawn at random", minimum=1
    )
    random_seed: int = option(0, "random seed of that draw", minimum=0)


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> str:
    """Train the model that the flags describe; returns the path of its file."""
    (settings,) = parse("Train a SentencePiece model.", argv, SentencePieceSettings)
    require_place(settings.model_file)
    with open_sources(settings.input_file, settings.text_field) as sources:
        texts = [source.path for source in sources]
        refuse_overwriting(settings.model_file, *texts, flag="--model_file")
        for source in sources:
            scan(source)
        generator = Random(settings.random_seed)
        sentences = sample(_sentences(sources), settings.input_sentence_size, generator)
    model = train(settings, sentences)
    remove_left_overs_of(settings.model_file)
    with atomic_write(settings.model_file, "wb") as file:
        file.write(model)
    if not is_stream(settings.model_file):
        folder, name = os.path.split(settings.model_file)
        write_sums(folder, [name])
    summary = f"{settings.model_file}: {settings.vocab_size} tokens"
    print(summary, file=summary_stream(settings.model_file))
    return settings.model_file


def sample(sentences: Iterator[str], size: int, generator: Random) -> list[str]:
    """Draw `size` of the sentences uniformly at random (Vitter 1985, algorithm R).

    SentencePiece can draw them itself, but not reproducibly.
    """
    drawn = list(itertools.islice(sentences, size))
    for index, sentence in enumerate(sentences, start=size):
        replaced = generator.randrange(index + 1)
        if replaced < size:
            drawn[replaced] = sentence
    return drawn


def train(settings: SentencePieceSettings, sentences: Sequence[str]) -> bytes:
    """Return the content of a .model file trained on the sentences.

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
            max_sentence_length=MAX_DOCUMENT_BYTES,  # longer ones are skipped silently
            # Only those in the text: versions before 0.2.3 abort when one is not.
            required_chars="".join(sorted(_COMMON.intersection(set().union(*sentences)))),
            byte_fallback=True,
            # RoBERTa's order, except for <mask>, its last token, which follows these.
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=[SPECIAL_TOKENS["mask"]],
            minloglevel=2,  # errors are exceptions
        )
    except RuntimeError as error:
        raise UserError(f"--vocab_size {settings.vocab_size}: {_reason(error)}") from None
    return model.getvalue()


def _reason(error: RuntimeError) -> str:
    """Return why SentencePiece refuses a size, with flags of this program as the cure."""
    message = str(error)
    if fewest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"the text needs at least {fewest[1]}: one for each character, special token and byte; "
            "give as many, or a lower --character_coverage"
        )
    if most := re.search(r"set it to a value <= (\d+)", message):
        return f"the text gives no more than {most[1]} tokens; give as many or fewer, or more text"
    return reasons(error)[-1]


def _sentences(sources: Sequence[TextSource]) -> Iterator[str]:
    for source in sources:
        for document in read_documents(source):
            yield from document.decode().split("\n")


if __name__ == "__main__":
    main()
