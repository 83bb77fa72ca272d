#!/usr/bin/env python3
"""Write the language reference that every Python carries as text to pretrain on.

    python scripts/experiments/python_reference.py FOLDER

writes FOLDER/train.txt and FOLDER/test.txt: a sentence per line, a blank line between topics, of
which every fifth is held out. Markup and code are left as they are.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import UserError, entry_point
from bort.files import atomic_write

HELD_OUT = 5
PARAGRAPH = re.compile(r"\n\s*\n")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Write both files; the held-out one last."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the files go")
    folder = parser.parse_args(argv).folder
    documents = [sentences_of(text) for _, text in sorted(read_topics().items())]
    held_out = documents[HELD_OUT - 1 :: HELD_OUT]
    trained = [document for n, document in enumerate(documents, 1) if n % HELD_OUT]
    for name, part in (("train.txt", trained), ("test.txt", held_out)):
        with atomic_write(str(folder / name)) as file:
            file.writelines(f"{document}\n\n" for document in part)


def read_topics() -> dict[str, str]:
    """Return the topics of Python's help(); raises `UserError` where Python comes without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data; install its complete library") from None
    return topics


def sentences_of(text: str) -> str:
    """Return a text with one sentence per line and no blank lines."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in PARAGRAPH.split(text))
    return "\n".join(
        sentence for paragraph in paragraphs if paragraph for sentence in SENTENCE.split(paragraph)
    )


if __name__ == "__main__":
    main()
