"""Text to shards, compared with plain GluonNLP on the same text.

    python scripts/benchmark.py data --input_file FILE [--repeats 3] [--parallel_megabytes 200]

One table compares both on one core; the other compares this project with one and with two processes
on repeated text. Loading the vocabulary is not counted. The runs are interleaved, so that changes
in the machine's speed affect all alike; the tables show medians.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import random
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Optional, Sequence

import numpy as np

from bort.config import option, parse, required
from bort.mxnet_setup import usable_cores
from bort.tokenization import RELEASED_DATASET, TokenizerSettings, load_tokenizer
from data.corpus import open_sources, read_documents, scan
from data.masking import MaskingSettings, SequenceSettings
from data.preparation import CorpusSettings, InstanceMaker, InstanceSettings, make_shards
from data.text_formats import TextSource

_MAX_TOKENS = 510
_SHORT_SEQ_PROB = 0.1
_MASKED_LM_PROB = 0.15
_MAX_PREDICTIONS = 80


# Prepares a run, which is not timed; the function that it returns is.
Contender = Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class DataBenchmarkSettings:
    """Measurement."""

    input_file: str = required("real text, as for create_pretraining_data.py")
    repeats: int = option(3, "runs of each contender", minimum=1)
    parallel_megabytes: int = option(200, "size of the text for two processes, in MB", minimum=1)
    dataset_name: str = option(RELEASED_DATASET, "vocabulary")


def main(argv: Optional[Sequence[str]] = None) -> dict[str, float]:
    """Measure, print two tables, return {name: median seconds}."""
    (settings,) = parse(str(__doc__), argv, DataBenchmarkSettings)
    # GluonNLP's own message about a missing vocabulary is a page long.
    load_tokenizer(TokenizerSettings(dataset_name=settings.dataset_name))
    with open_sources(settings.input_file) as sources, tempfile.TemporaryDirectory() as folder:
        text, shards = os.path.join(folder, "text.txt"), os.path.join(folder, "shards")
        medians = {}
        # First, because GluonNLP imports MXNet, after which workers start more slowly.
        if usable_cores() > 1:
            write_text(sources, settings.parallel_megabytes * 1_000_000, text)
            contenders: dict[str, Contender] = {
                f"ours, {count} process{'es' * (count > 1)}": functools.partial(
                    ours, text, shards, settings.dataset_name, count
                )
                for count in (1, 2)
            }
            medians.update(compare(text, contenders, settings.repeats, cores=2))
        write_text(sources, sum(scan(source).bytes for source in sources), text)
        plain = os.path.join(folder, "plain.npz")
        contenders = {
            "plain GluonNLP, one core": lambda: plain_gluonnlp(text, plain, settings.dataset_name),
            "ours, one core": lambda: ours(text, shards, settings.dataset_name, 1),
        }
        medians.update(compare(text, contenders, settings.repeats, cores=1))
    return medians


def compare(
    text: str, contenders: dict[str, Contender], repeats: int, cores: int
) -> dict[str, float]:
    """Run the contenders in turn, `repeats` times, on `cores` cores; print and return medians."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, prepare in list(contenders.items()) * repeats:
        run = prepare()
        with restricted_to(cores):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    size = os.path.getsize(text) / 1e6
    print(f"{size:.1f} MB of text, {repeats} runs each")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        spread = f"({min(seconds[name]):.2f}-{max(seconds[name]):.2f})"
        print(f"{name:<26}{median:8.2f} s {spread:<14}{size / median:7.2f} MB/s", end="")
        print(f"   x {first / median:.2f}", flush=True)
    return medians


@contextlib.contextmanager
def restricted_to(count: int) -> Iterator[None]:
    """Restrict this process to the first `count` of its cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(cores)[:count]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def write_text(sources: Sequence[TextSource], size: int, target: str) -> int:
    """Write `size` bytes of the files' documents to `target`, repeated if necessary.

    They become plain text, whatever the format of the files. Returns the size; raises `UserError`
    for a file that cannot be read or holds no text.
    """
    for source in sources:
        scan(source)
    documents = itertools.chain.from_iterable(map(read_documents, itertools.cycle(sources)))
    left = size
    with open(target, "wb") as file:
        while left > 0:
            # The part of a character that is cut in two is dropped.
            piece = (next(documents) + b"\n\n")[:left].decode(errors="ignore").encode() or b" "
            file.write(piece)
            left -= len(piece)
    return size


def ours(text: str, output: str, dataset_name: str, num_workers: int) -> Callable[[], object]:
    """Return a run of this project, with the vocabulary loaded."""
    corpus = CorpusSettings(text, output, num_workers=num_workers)
    vocabulary = TokenizerSettings(dataset_name=dataset_name)
    settings = InstanceSettings(
        vocabulary, SequenceSettings(), MaskingSettings(), corpus.dupe_factor, corpus.random_seed
    )
    maker = InstanceMaker(settings)
    shutil.rmtree(output, ignore_errors=True)

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            make_shards(corpus, maker)

    return run


def plain_gluonnlp(text: str, output: str, dataset_name: str) -> Callable[[], object]:
    """Return a run with GluonNLP's tokenizer and Python lists, as in GluonNLP's BERT scripts."""
    import gluonnlp as nlp
    from gluonnlp.model.utils import _load_vocab

    vocabulary = _load_vocab(dataset_name, None, os.path.join(nlp.base.get_home_dir(), "models"))
    # A new one for each run: it caches every word.
    tokenizer = nlp.data.GPT2BPETokenizer()

    def run() -> None:
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

    return run


def _packed(document: list[list[int]], generator: random.Random) -> Iterator[list[int]]:
    """Yield sequences of as many sentences as fit; longer sentences are cut off."""
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
    """Return input ids with masks applied, masked positions, original ids there."""
    bos, eos = vocabulary[vocabulary.bos_token], vocabulary[vocabulary.eos_token]
    mask, special = vocabulary["<mask>"], {bos, eos}
    input_ids = [bos, *sequence, eos]
    candidates = [position for position, token in enumerate(input_ids) if token not in special]
    generator.shuffle(candidates)
    count = min(_MAX_PREDICTIONS, max(1, round(len(candidates) * _MASKED_LM_PROB)))
    positions = sorted(candidates[:count])
    original_ids = [input_ids[position] for position in positions]
    for position in positions:
        draw = generator.random()
        if draw < 0.8:
            input_ids[position] = mask
        elif draw < 0.9:
            input_ids[position] = generator.randrange(len(vocabulary))
    return input_ids, positions, original_ids


def _ragged(rows: Sequence[list[int]]) -> np.ndarray:
    arrays = np.empty(len(rows), object)
    arrays[:] = [np.array(row, np.int32) for row in rows]
    return arrays
