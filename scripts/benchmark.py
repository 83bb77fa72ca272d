#!/usr/bin/env python3
"""Measure one part of the project, against the plain way of doing the same.

    python scripts/benchmark.py NAME [flags]

`python scripts/benchmark.py NAME --help` lists the flags of a benchmark.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

import benchmarks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import entry_point


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Any:
    """Run the benchmark that the first argument names; return what its `main` returns."""
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    names = [name for name in names if not name.startswith("_")]  # parts of several
    parser = OneLineParser(description=__doc__)
    parser.add_argument("name", choices=names)
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = parser.parse_args(arguments[:1]).name
    if argv is None:  # usage and errors name the benchmark: --help alone shows no flags of it
        sys.argv[0] += f" {name}"
    return importlib.import_module(f"benchmarks.{name}").main(arguments[1:])


if __name__ == "__main__":
    main()
