#!/usr/bin/env python3
"""Write a static web page that runs a saved model in the browser, with model and library beside it.

    python scripts/demo_page.py MODEL --output FOLDER
    python -m http.server 8000 --directory FOLDER

MODEL is a saved model: its .params file or folder, or a pretraining checkpoint or run. For a
classifier of one or two texts the page shows labels with bars, for regression the score, for a
masked LM the five best words. The page fetches nothing from other hosts. transformers.js is
downloaded by npm while the page is written; without npm, --packages names its files.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for, required
from bort.errors import entry_point

if TYPE_CHECKING:
    from bort.deployment.demo_page import DemoPage


@dataclass(frozen=True)
class DemoPageSettings:
    """Output."""

    output: str = required("new folder for the page")
    packages: Optional[str] = option(
        None, "folder with the .tgz files of `npm pack` (default: npm downloads them)"
    )


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> DemoPage:
    """Write a page; returns what is known of it."""
    parser = parser_for(str(__doc__), DemoPageSettings)
    parser.add_argument("model", metavar="MODEL", help="a saved model, a checkpoint or a run")
    parsed = vars(parser.parse_args(argv))
    settings = build(DemoPageSettings, parsed)

    from bort.deployment.demo_page import write_demo_page

    page = write_demo_page(parsed["model"], settings.output, settings.packages)
    print(f"{settings.output}: a browser downloads {page.megabytes:,.1f} MB")
    print(f"int8: the cosine similarity of its logits to MXNet's is {page.comparison.cosine:.5f}")
    print(f"serve it: python -m http.server 8000 --directory {shlex.quote(settings.output)}")
    return page


if __name__ == "__main__":
    main()
