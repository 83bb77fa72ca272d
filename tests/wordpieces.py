"""A small uncased WordPiece vocabulary for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["un", "##aff", "##able", "want", "##want", "##ed", "runn", "##ing", "the", ",", "cafe"]
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
VOCABULARY = [*SPECIAL, *WORDS, *(one for one in LETTERS if one not in WORDS)]
VOCABULARY += [f"##{letter}" for letter in LETTERS] + list("éßσς中文ı") + ["##́", "##é"]


def write_vocabulary(
    folder: Path, spelling: Sequence[str] = VOCABULARY, name: str = "vocab.txt"
) -> str:
    path = folder / name
    path.write_text("".join(f"{token}\n" for token in spelling), "utf-8")
    return str(path)
