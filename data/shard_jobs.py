"""Text to shards on a cluster: files are surveyed, and shards made, by jobs on its workers.

No text passes through this process. A job of the survey checks files, and writes an index of their
documents to the output folder: where each begins in its file, and how much text is before it. From
the index follows where each shard begins; a job of a shard reads its part of the text from there,
and writes the shard. The result is that of `data.preparation` on one machine, byte by byte.
"""

from __future__ import annotations

import itertools
import os
import socket
import stat
import time
from array import array
from bisect import bisect_right
from functools import partial
from typing import Iterator, NamedTuple, Optional, Sequence

import numpy as np

from bort.arrays import map_npy
from bort.cluster import Cluster
from bort.errors import UserError
from bort.files import lock_folder, temporary_folder, temporary_name
from bort.jobs import Executor, Failures, stopped_by_sigterm
from bort.progress import ProgressBar
from bort.tokenization import TOKENIZER_FOLDER, TokenizerSettings, save_tokenizer
from data.corpus import CHANGED, STANDARD_INPUT, TextFile, documents_from, find_inputs, scan
from data.masking import MaskingSettings, SequenceSettings
from data.preparation import (
    CorpusSettings,
    InstanceMaker,
    InstanceSettings,
    blocks_of_shard,
    check_number_of_documents,
    complete,
    make_shards,
    missing_shards,
    plan_of,
    report,
    sized,
    unfinished_manifest,
    write_shard,
)
from data.shards import Manifest, ShardEntry, is_output, shard_name
from data.text_formats import TextSource, size_of

GROUP_BYTES = 256 << 20  # small files are surveyed together


class Group(NamedTuple):
    """Files that one job surveys."""

    number: int
    sources: list[TextSource]
    bytes: int

    def __str__(self) -> str:
        return self.sources[0].shown


class Survey(NamedTuple):
    """What a job found in its files.

    `index_file` is a file of int64 [2, documents]: the start of each document, and the
    bytes of those of its file before it.
    """

    group: int
    files: list[TextFile]
    index_file: str


class FilePart(NamedTuple):
    """Consecutive documents of one file."""

    source: TextSource
    start: int  # of the first one, as `documents_from` gives it
    skip: int  # documents with the same start that come before it
    documents: int
    bytes: int  # of their text
    length: int  # the same without the last line end of a file


class ShardPart(NamedTuple):
    """The text of one shard."""

    shard: int
    first_document: int  # of all
    files: list[FilePart]

    def __str__(self) -> str:
        return shard_name(self.shard)


def prepare(
    corpus: CorpusSettings,
    tokenizer_settings: TokenizerSettings,
    sequences: SequenceSettings,
    masking: MaskingSettings,
    cluster: Optional[str] = None,
) -> Manifest:
    """Make the shards that are missing, here or on a cluster; return the manifest of all.

    Raises `UserError` as `make_shards` and `make_shards_on` do.
    """
    settings = InstanceSettings(
        tokenizer_settings, sequences, masking, corpus.dupe_factor, corpus.random_seed
    )
    maker = InstanceMaker(settings)
    return make_shards_on(cluster, corpus, maker) if cluster else make_shards(corpus, maker)


def make_shards_on(cluster: str, corpus: CorpusSettings, maker: InstanceMaker) -> Manifest:
    """Do what `data.preparation.make_shards` does, on a cluster.

    Raises `UserError` as that does, and for text that other machines cannot read.
    """
    start = time.perf_counter()
    sources = _readable_everywhere(corpus)
    # SIGTERM cancels the batch jobs, too.
    with lock_folder(corpus.output_dir, "--output_dir"), stopped_by_sigterm():
        cluster_executor = Cluster(cluster, corpus.output_dir, threads=1)
        # The index lies on the disk that all machines share.
        index_folder = temporary_folder(os.path.abspath(corpus.output_dir), "index")
        with cluster_executor as executor, index_folder as folder:
            surveys = _survey(executor, sources, folder)
            files = [file for each in surveys for file in each.files]
            check_number_of_documents(files, corpus.num_outputs)
            plan = plan_of(maker, corpus, files)
            index = DocumentIndex(sources, plan.inputs, surveys)
            size = _make_missing_shards(executor, corpus, maker, index, plan)
        save_tokenizer(maker.tokenizer, os.path.join(corpus.output_dir, TOKENIZER_FOLDER))
        complete(corpus.output_dir, plan)
    report(plan, maker.settings, size, time.perf_counter() - start)
    return plan


def _readable_everywhere(corpus: CorpusSettings) -> list[TextSource]:
    paths = find_inputs(corpus.input_file, partial(is_output, corpus.output_dir))
    for path in paths:
        if path == STANDARD_INPUT or (os.path.exists(path) and not _is_regular(path)):
            raise UserError(
                f"--input_file {path}: can be read on this machine only; with --cluster write the "
                "text to files that all machines share"
            )
    return [TextSource(path, corpus.text_field) for path in paths]


def _is_regular(path: str) -> bool:
    return stat.S_ISREG(os.stat(path).st_mode)


# ---- the survey ----------------------------------------------------------------------------------


def _survey(executor: Executor, sources: Sequence[TextSource], folder: str) -> list[Survey]:
    """Return what jobs find in the files, in the order of the files; the largest are read first."""
    groups = sorted(grouped(sources), key=lambda group: -group.bytes)
    found: list[Survey] = []
    with ProgressBar("checking the text", sum(group.bytes for group in groups)) as progress:
        sizes = {group.number: group.bytes for group in groups}
        for survey in executor.as_completed(partial(survey_files, folder), groups):
            progress.advance(sizes[survey.group])
            found.append(survey)
    return sorted(found)


def grouped(sources: Sequence[TextSource]) -> Iterator[Group]:
    """Yield consecutive files together that have up to `GROUP_BYTES`, or one larger file alone."""
    members: list[TextSource] = []
    total = number = 0
    for source in sources:
        size = size_of(source)
        if members and total + size > GROUP_BYTES:
            yield Group(number, members, total)
            members, total, number = [], 0, number + 1
        members.append(source)
        total += size
    yield Group(number, members, total)


def survey_files(folder: str, group: Group) -> Survey:
    """Check and measure files, and write the index of their documents to a folder (a job)."""
    starts, positions = array("q"), array("q")

    def locate(start: int, position: int) -> None:
        starts.append(start)
        positions.append(position)

    files = [scan(source, locate=locate) for source in group.sources]
    path = temporary_name(os.path.join(folder, "index.npy"))  # another job may do the same
    with open(path, "xb") as handle:
        np.save(handle, np.array([starts, positions], np.int64))
    return Survey(group.number, files, path)


# ---- where shards begin --------------------------------------------------------------------------


class DocumentIndex:
    """Where documents are, and where shards begin; the numbers of documents stay on the disk."""

    def __init__(
        self,
        sources: Sequence[TextSource],
        files: Sequence[TextFile],
        surveys: Sequence[Survey],
    ) -> None:
        self._sources, self._files = sources, files
        self._surveyed = [file for survey in surveys for file in survey.files]
        # The number of the first document of each file, and the text before it; then the totals.
        self._firsts = [0, *itertools.accumulate(file.documents for file in files)]
        self._positions = [0, *itertools.accumulate(file.bytes for file in files)]
        self._places: list[tuple[str, int]] = []  # of each file: an index, where it begins there
        for survey in surveys:
            column = 0
            for file in survey.files:
                self._places.append((survey.index_file, column))
                column += file.documents

    def parts(self, num_outputs: int, wanted: Sequence[int]) -> Iterator[ShardPart]:
        """Yield the parts of the wanted shards, of all in the rule of `data.preparation`.

        Shard i begins with the first document that starts in part i of `num_outputs` equal parts of
        the text, or earlier when the remaining documents are no more than the shards.
        """
        total, documents = self._positions[-1], self._firsts[-1]
        asked, begin = set(wanted), 0
        for shard in range(num_outputs):
            end = documents
            if shard + 1 < num_outputs:
                first = self._first_from(-(-(shard + 1) * total // num_outputs))
                end = max(begin + 1, min(first, documents - num_outputs + shard + 1))
            if shard in asked:
                yield ShardPart(shard, begin, list(self._file_parts(begin, end)))
            begin = end

    def _open(self, file: int) -> np.ndarray:
        """Return int64 [2, documents] of a file, mapped into memory."""
        path, column = self._places[file]
        arrays = map_npy(path)
        return arrays[:, column : column + self._files[file].documents]

    def _first_from(self, position: int) -> int:
        """Return the number of the first document with at least so much text before it."""
        file = bisect_right(self._positions, position) - 1
        if file >= len(self._files):
            return self._firsts[-1]
        inside = position - self._positions[file]
        return self._firsts[file] + int(np.searchsorted(self._open(file)[1], inside))

    def _file_parts(self, begin: int, end: int) -> Iterator[FilePart]:
        """Yield the parts of files that hold the documents from `begin` to before `end`."""
        file = bisect_right(self._firsts, begin) - 1
        while begin < end:
            first, after = begin - self._firsts[file], min(end, self._firsts[file + 1])
            starts, positions = self._open(file)
            count = after - begin
            whole = self._files[file]
            is_last = first + count == whole.documents
            stop = whole.bytes if is_last else int(positions[first + count])
            text_end = self._surveyed[file].bytes - 1 if is_last else stop
            yield FilePart(
                self._sources[file],
                int(starts[first]),
                first - int(np.searchsorted(starts, starts[first])),
                count,
                stop - int(positions[first]),
                text_end - int(positions[first]),
            )
            begin, file = after, file + 1


# ---- shards --------------------------------------------------------------------------------------


def _make_missing_shards(
    executor: Executor,
    corpus: CorpusSettings,
    maker: InstanceMaker,
    index: DocumentIndex,
    plan: Manifest,
) -> int:
    """Make the shards that `plan` lacks and add them to it; return the bytes of their text.

    A shard that cannot be made does not keep the others from being made.
    """
    wanted = missing_shards(corpus, plan)
    if not wanted:
        return 0
    failures = Failures()
    function = partial(
        write_part, maker.settings, maker.tokenizer.fingerprint, os.path.abspath(corpus.output_dir)
    )
    made, total = 0, sum(file.bytes for file in plan.inputs)
    with (
        unfinished_manifest(corpus.output_dir, plan) as add,
        ProgressBar("making shards", total) as progress,
    ):
        parts = index.parts(corpus.num_outputs, wanted)
        results = executor.as_completed(function, parts, on_error=failures.keep)
        for result in results:
            if result is None:
                continue
            entry, size = result
            add(entry)
            made += size
            progress.advance(size)
            if corpus.verbose:
                progress.write(
                    f"{entry.file}: {entry.sequences} sequences of {entry.tokens} tokens"
                )
    failures.raise_first("shards were not made", len(wanted))
    return made


def write_part(
    settings: InstanceSettings, fingerprint: str, folder: str, part: ShardPart
) -> tuple[ShardEntry, int]:
    """Make one shard of its part of the text (a job); return its entry and the bytes of its text.

    Raises `UserError` when the tokenizer of this machine is another one, or the text has changed.
    """
    maker = InstanceMaker(settings)
    if maker.tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"--cluster: the tokenizer {maker.tokenizer.name} on {socket.gethostname()} is not "
            "that of the driver; put the same vocabulary files there (MXNET_HOME)"
        )
    blocks = blocks_of_shard(part.shard, part.first_document, _sized_documents(part))
    path = os.path.join(folder, shard_name(part.shard))
    return write_shard(path, map(maker, blocks), maker.tokenizer.vocab_size)


def _sized_documents(part: ShardPart) -> Iterator[tuple[bytes, int]]:
    for each in part.files:
        located = documents_from(each.source, each.start)
        chosen = itertools.islice(located, each.skip, each.skip + each.documents)
        found = sized((text for _, text in chosen), each.documents, each.bytes)
        documents = length = 0
        for document, size in found:
            documents, length = documents + 1, length + len(document)
            yield document, size
        if (documents, length) != (each.documents, each.length):
            raise UserError(f"{each.source.shown}: {CHANGED}")
