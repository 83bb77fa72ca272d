"""Train a SentencePiece model whose special tokens are numbered as in RoBERTa's vocabulary."""

from __future__ import annotations

import io
import string
from dataclasses import dataclass
from typing import Optional, Sequence

from bort.config import option, parse, required
from bort.errors import door


@dataclass(frozen=True)
class SentencePieceSettings:
    """What is learnt from, and the size and kind of the vocabulary."""

    input_file: str = required("text, one sentence per line; several with commas between")
    model_file: str = required("the .model file to write")
    vocab_size: int = option(8000, "number of tokens, special ones included", minimum=300)
    model_type: str = option("bpe", "kind of model", choices=("unigram", "bpe"))
    character_coverage: float = option(
        0.9995, "share of the characters that get tokens; others are spelt in bytes", maximum=1.0
    )


@door
def main(argv: Optional[Sequence[str]] = None) -> str:
    """Train the model that the flags describe and return the path of its file."""
    import sentencepiece

    (settings,) = parse("Train a SentencePiece model.", argv, SentencePieceSettings)
    model = io.BytesIO()
    lines = open(settings.input_file, encoding="utf-8").read().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=settings.model_type,
        vocab_size=settings.vocab_size,
        character_coverage=settings.character_coverage,
        byte_fallback=True,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=["<mask>"],
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        minloglevel=1,
    )
    with open(settings.model_file, "wb") as handle:
        handle.write(model.getvalue())
    return settings.model_file


if __name__ == "__main__":
    main()
