"""Text to shards, against the plain GluonNLP path, in one run on the same text.

    python scripts/benchmark.py data --input_file FILE [--megabytes 24] [--repeats 3]

Both load their vocabulary and write their output. Runs of the two take turns, so that a change in
the machine's pace meets both; the table has medians. One process on one core (the others may not be
used), then ours with two processes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Optional, Sequence

import numpy as np

from bort.config import option, parse, required
from bort.masking import MaskingSettings, SequenceSettings
from bort.preparation import CorpusSettings, prepare
from bort.stack import usable_cores
from bort.tokenization import RELEASED_DATASET, TokenizerSettings
from data.corpus import find_inputs, read_pieces

_MAX_TOKENS = 510
_SHORT_SEQ_PROB = 0.1
_MASKED_LM_PROB = 0.15
_MAX_PREDICTIONS = 80


@dataclass(frozen=True)
class DataBenchmarkSettings:
    """How text to shards is measured."""

    input_file: str = required("real text: paths and globs, separated by commas")
    megabytes: float = option(24.0, "text to use; repeated or cut to this size", minimum=0.1)
    repeats: int = option(3, "times each way is run", minimum=1)
    dataset_name: str = option(RELEASED_DATASET, "vocabulary of both ways")


def main(argv: Optional[Sequence[str]] = None) -> dict[str, float]:
    """Measure, print a table, return {name: median seconds}."""
    (settings,) = parse(str(__doc__), argv, DataBenchmarkSettings)
    with tempfile.TemporaryDirectory() as folder:
        text = os.path.join(folder, "text.txt")
        size = write_text(find_inputs(settings.input_file), int(settings.megabytes * 1e6), text)
        ways = _ways(text, folder, settings.dataset_name)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for name, way in list(ways.items()) * settings.repeats:
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{size / 1e6:.1f} MB of text, {settings.repeats} runs each, {usable_cores()} cores")
    first = next(iter(medians.values()))
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.2f}-{max(seconds[name]):.2f}"
        rate = f"{size / median / 1e6:6.2f} MB/s   x {first / median:.2f}"
        print(f"{name:<30}{median:8.2f} s ({spread})   {rate}")
    return medians


def write_text(paths: Sequence[str], size: int, target: str) -> int:
    """Write `size` bytes of the files' text to `target`, over and over if need be; return it."""
    pieces = itertools.chain.from_iterable(
        itertools.chain(read_pieces(path), [b"\n\n"]) for path in itertools.cycle(paths)
    )
    left = size
    with open(target, "wb") as file:
        while left > 0:
            # What is left of a character that is cut in two is dropped.
            piece = next(pieces)[:left].decode(errors="ignore").encode() or b" "
            file.write(piece)
            left -= len(piece)
    return size


def _ways(text: str, folder: str, dataset_name: str) -> dict[str, Callable[[], None]]:
    # Imports before the clock starts: neither way is charged for them.
    import gluonnlp  # noqa: F401
    import tiktoken  # noqa: F401

    def ours(num_workers: int) -> Callable[[], None]:
        def run() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as shards:
                corpus = CorpusSettings(text, shards, num_workers=num_workers)
                vocabulary = TokenizerSettings(dataset_name=dataset_name)
                with contextlib.redirect_stdout(io.StringIO()):
                    prepare(corpus, vocabulary, SequenceSettings(), MaskingSettings())

        return run

    ways = {
        "plain GluonNLP, one core": on_one_core(
            lambda: plain_gluonnlp(text, os.path.join(folder, "plain.npz"), dataset_name)
        ),
        "ours, one core": on_one_core(ours(1)),
    }
    if usable_cores() > 1:
        ways["ours, two processes"] = ours(2)
    return ways


def on_one_core(way: Callable[[], None]) -> Callable[[], None]:
    """Return `way`, run with the first usable core only."""

    def run() -> None:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            way()
        finally:
            os.sched_setaffinity(0, cores)

    return run


def plain_gluonnlp(text: str, output: str, dataset_name: str) -> None:
    """Do the same with GluonNLP's tokenizer and Python lists, in memory, as its BERT scripts do."""
    import gluonnlp as nlp
    from gluonnlp.model.utils import _load_vocab

    vocabulary = _load_vocab(dataset_name, None, os.path.join(nlp.base.get_home_dir(), "models"))
    tokenizer = nlp.data.GPT2BPETokenizer()
    generator = random.Random(0)
    documents: list[list[list[int]]] = [[]]
    with open(text, encoding="utf-8") as lines:
        for line in map(str.strip, lines):
            if line:
                documents[-1].append(vocabulary[tokenizer(line)])
            else:
                documents.append([])
    instances = [
        _masked(sequence, vocabulary, generator)
        for document in documents
        for sequence in _packed(document, generator)
    ]
    names = ("input_ids", "masked_lm_positions", "masked_lm_ids")
    np.savez(output, **{name: _ragged(rows) for name, rows in zip(names, zip(*instances))})


def _packed(document: list[list[int]], generator: random.Random) -> Iterator[list[int]]:
    """Yield as many sentences as fit, one after the other; too long ones are cut off."""
    sequence: list[int] = []
    limit = _MAX_TOKENS
    for sentence in document:
        if sequence and len(sequence) + len(sentence) > limit:
            yield sequence
            is_short = generator.random() < _SHORT_SEQ_PROB
            sequence, limit = [], generator.randint(2, _MAX_TOKENS) if is_short else _MAX_TOKENS
        sequence += sentence[:_MAX_TOKENS]
    if sequence:
        yield sequence


def _masked(
    sequence: list[int], vocabulary: Any, generator: random.Random
) -> tuple[list[int], list[int], list[int]]:
    """Return input ids with masks applied, masked positions, true ids there."""
    bos, eos = vocabulary[vocabulary.bos_token], vocabulary[vocabulary.eos_token]
    mask, special = vocabulary["<mask>"], {bos, eos}
    input_ids = [bos, *sequence, eos]
    candidates = [place for place, token in enumerate(input_ids) if token not in special]
    generator.shuffle(candidates)
    count = min(_MAX_PREDICTIONS, max(1, round(len(candidates) * _MASKED_LM_PROB)))
    positions = sorted(candidates[:count])
    true_ids = [input_ids[place] for place in positions]
    for place in positions:
        fate = generator.random()
        if fate < 0.8:
            input_ids[place] = mask
        elif fate < 0.9:
            input_ids[place] = generator.randrange(len(vocabulary))
    return input_ids, positions, true_ids


def _ragged(rows: Sequence[list[int]]) -> np.ndarray:
    arrays = np.empty(len(rows), object)
    arrays[:] = [np.array(row, np.int32) for row in rows]
    return arrays
