"""Shards by independent jobs: the bytes of the shards that one process makes, in every format."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import signal
from itertools import product

import pytest
import zstandard

import create_pretraining_data
from bort.errors import UserError
from bort.jobs import Serial
from data import corpus, preparation, shard_jobs
from data.corpus import documents_from, read_documents, scan
from data.preparation import read_blocks
from data.shard_jobs import DocumentIndex, ShardPart, grouped, survey_files
from data.text_formats import TextSource
from tests.conftest import ROOT
from tests.data.test_create_pretraining_data import content, flags

SAMPLE = ROOT / "test_data" / "sample_text.txt"


@pytest.fixture
def small(monkeypatch):
    """Make pieces, blocks, documents and groups of files small, so that there are many of each."""
    monkeypatch.setattr(preparation, "BLOCK_BYTES", 700)
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 500)
    monkeypatch.setattr(shard_jobs, "GROUP_BYTES", 3000)
    monkeypatch.setattr("data.text_formats.READ_BYTES", 100)
    monkeypatch.setattr("data.text_formats._ROWS_AT_ONCE", 3)


class Jobs(Serial):
    """An executor in the place of a cluster's that counts its jobs."""

    submitted = 0

    def __init__(self, *_, **__):
        Jobs.submitted = 0

    def submit(self, function, /, *args, **kw):
        Jobs.submitted += 1
        return super().submit(function, *args, **kw)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(shard_jobs, "Cluster", Jobs)
    monkeypatch.setattr("bort.cluster.ClusterSettings.check", lambda self: None)


def create(output, files, **values):
    text = ",".join(map(str, files))
    given = {"input_file": text, "output_dir": output, "num_workers": 1, **values}
    return create_pretraining_data.main(flags(**given))


def write_files(folder, kind):
    """Write the sample, with odd gaps and long documents, to three files of a kind."""
    documents = SAMPLE.read_text(encoding="utf-8").strip().split("\n\n")
    parts = [documents[:7], ["\ufeffodd " + " ".join(documents[7:10]), *documents[10:12]]]
    paths = []
    for number, part in enumerate([*parts, documents[12:]]):
        if kind == "jsonl":
            rows = [{"text": text} for text in part]
            rows[1:1] = [{"text": None}, {"text": "One.\n\nSame row. " + "word " * 300}]
            data = "\ufeff" + "\n".join(json.dumps(row) for row in rows)
        else:
            data = "\ufeff \n" + "\n \t\n\n".join(part) + "\n" * number
        path = folder / f"{number}.{'jsonl' if kind == 'jsonl' else 'txt'}{SUFFIXES.get(kind, '')}"
        path.write_bytes(COMPRESS.get(kind, bytes)(data.encode()))
        paths.append(path)
    return paths


COMPRESS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}
SUFFIXES = {name: f".{name}" for name in COMPRESS}


@pytest.mark.parametrize(
    ("num_outputs", "kind"),
    [*product([1, 4, 20], ["txt", "jsonl"]), *((4, kind) for kind in COMPRESS)],
)
def test_the_bytes_are_those_of_one_process(tmp_path, small, here, num_outputs, kind):
    paths = write_files(tmp_path, kind)
    values = {"num_outputs": num_outputs, "dupe_factor": 2, "max_seq_length": 64}
    create(tmp_path / "one", paths, **values)
    create(tmp_path / "jobs", paths, cluster="tcp://x:1", **values)
    assert content(tmp_path / "jobs") == content(tmp_path / "one")
    assert Jobs.submitted == num_outputs + len(list(grouped([TextSource(str(p)) for p in paths])))


def test_parquet_is_read_from_a_row(tmp_path, small, here):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = [*SAMPLE.read_text(encoding="utf-8").strip().split("\n\n"), None, "word " * 300, "End."]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=4)
    create(tmp_path / "one", [path], num_outputs=9)
    create(tmp_path / "jobs", [path], num_outputs=9, cluster="tcp://x:1")
    assert content(tmp_path / "jobs") == content(tmp_path / "one")
    source = TextSource(str(path))
    everything = list(documents_from(source))
    for row in (0, 3, 4, 9, len(texts) - 1):
        assert list(documents_from(source, row)) == [each for each in everything if each[0] >= row]


@pytest.mark.parametrize("kind", ["txt", "jsonl", *COMPRESS])
def test_documents_are_found_at_their_starts(tmp_path, small, kind):
    for path in write_files(tmp_path, kind):
        source, found = TextSource(str(path)), []
        file = scan(source, locate=lambda start, before, found=found: found.append((start, before)))
        documents = list(read_documents(source))
        assert len(documents) == file.documents == len(found)
        position = 0
        for number, (start, before) in enumerate(found):
            assert before == position
            position += len(documents[number])
            first = [each[0] for each in found].index(start)
            assert [text for _, text in documents_from(source, start)] == documents[first:]


@pytest.mark.parametrize("seed", range(20))
def test_shards_begin_where_those_of_one_process_do(tmp_path, seed):
    generator = random.Random(seed)
    sources = []
    for number in range(generator.randint(1, 4)):
        path = tmp_path / f"{number}.txt"
        sizes = [generator.choice((1, 5, 50, 2000)) for _ in range(generator.randint(1, 12))]
        path.write_text("\n\n".join("x" * size for size in sizes) + generator.choice(("", "\n")))
        sources.append(TextSource(str(path)))
    surveys = [survey_files(str(tmp_path), group) for group in grouped(sources)]
    files = [file for survey in surveys for file in survey.files]
    documents = sum(file.documents for file in files)
    index = DocumentIndex(sources, files, surveys)
    for num_outputs in {1, 2, 3, max(1, documents - 1), documents}:
        if num_outputs <= documents:
            expected = {}
            for block in read_blocks(sources, files, num_outputs):
                expected.setdefault(block.shard, block.first_document)
            parts = list(index.parts(num_outputs, range(num_outputs)))
            assert {part.shard: part.first_document for part in parts} == expected
            assert sum(each.documents for part in parts for each in part.files) == documents
            total = sum(file.bytes for file in files)
            assert sum(each.bytes for part in parts for each in part.files) == total
            lengths = sum(each.length for part in parts for each in part.files)
            assert lengths == total - len(files)


def test_only_missing_shards_are_made(tmp_path, here):
    create(tmp_path / "out", [SAMPLE], num_outputs=4, cluster="tcp://x:1")
    before = content(tmp_path / "out")
    (tmp_path / "out" / "part-00002.npz").unlink()
    create(tmp_path / "out", [SAMPLE], num_outputs=4, cluster="tcp://x:1")
    assert Jobs.submitted == 2  # the survey and one shard
    assert content(tmp_path / "out") == before


def test_a_shard_that_fails_is_named_and_the_others_are_kept(tmp_path, here, monkeypatch, capsys):
    write = shard_jobs.write_shard

    def failing(path, *args):
        if "00001" in path:
            raise UserError("no space here")
        return write(path, *args)

    monkeypatch.setattr(shard_jobs, "write_shard", failing)
    with pytest.raises(SystemExit):
        create(tmp_path / "out", [SAMPLE], num_outputs=3, cluster="tcp://x:1")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: 1 of 3 shards were not made; part-00001.npz: no space here; rerun"
    )
    assert sorted(path.name for path in (tmp_path / "out").glob("*")) == [
        *("manifest.unfinished.json", "part-00000.npz", "part-00002.npz")
    ]


def test_sigterm_lets_the_cluster_end_its_jobs(tmp_path, here, monkeypatch, capsys):
    """Without, batch jobs that the command has submitted would stay in their queue."""
    ended = []

    class Interrupted(Jobs):
        def submit(self, *_, **__):
            os.kill(os.getpid(), signal.SIGTERM)

        def shutdown(self, *_, **__):
            ended.append(True)

    def fail(*_):
        raise AssertionError("the program would have died")

    monkeypatch.setattr(shard_jobs, "Cluster", Interrupted)
    before = signal.signal(signal.SIGTERM, fail)
    try:
        with pytest.raises(SystemExit) as stopped:
            create(tmp_path / "out", [SAMPLE], num_outputs=2, cluster="tcp://x:1")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("interrupted; rerun the same command to resume\n")
    assert ended
    assert not list((tmp_path / "out").glob(".index*"))


def test_another_tokenizer_on_a_machine_is_refused(tmp_path):
    part = ShardPart(0, 0, [])
    settings = preparation.InstanceSettings(
        *(preparation.TokenizerSettings(), shard_jobs.SequenceSettings()),
        *(shard_jobs.MaskingSettings(), 1, 1),
    )
    with pytest.raises(UserError, match=r"the tokenizer .* on .* is not that of the driver"):
        shard_jobs.write_part(settings, "another", str(tmp_path), part)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:5000],
        lambda text: text.rstrip() + b" And more of the last document.\n",
        lambda text: text.replace(b" the ", b" that ", 1),
    ],
)
def test_text_that_changed_after_the_survey_is_reported(
    tmp_path, here, monkeypatch, capsys, change
):
    text = tmp_path / "a.txt"
    text.write_bytes(SAMPLE.read_bytes())
    parts = DocumentIndex.parts

    def changed(self, *args):
        text.write_bytes(change(SAMPLE.read_bytes()))
        return parts(self, *args)

    monkeypatch.setattr(DocumentIndex, "parts", changed)
    with pytest.raises(SystemExit):
        create(tmp_path / "out", [text], cluster="tcp://x:1")
    assert "a.txt: changed while it was read" in capsys.readouterr().err


def test_text_that_only_this_machine_can_read_is_refused(tmp_path, here, capsys):
    with pytest.raises(SystemExit):
        create(tmp_path / "out", ["-"], cluster="tcp://x:1")
    assert "--input_file -: can be read on this machine only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mistakes_in_the_text_leave_nothing(tmp_path, here, capsys):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine\n\nnot \xff here\n")
    with pytest.raises(SystemExit):
        create(tmp_path / "out", [SAMPLE, bad], cluster="tcp://x:1")
    assert "bad.txt, line 3: the byte 0xff" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        create(tmp_path / "out", [SAMPLE], num_outputs=999, cluster="tcp://x:1")
    assert "--num_outputs 999: more than the 25 documents" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_largest_files_are_read_first(tmp_path, small, here, monkeypatch):
    text = SAMPLE.read_text()
    files = [tmp_path / f"{copies}.txt" for copies in (1, 3, 2)]
    for file in files:
        file.write_text(text * int(file.stem))
    sizes = []

    def recorded(folder, group):
        sizes.append(group.bytes)
        return survey_files(folder, group)

    monkeypatch.setattr(shard_jobs, "survey_files", recorded)
    create(tmp_path / "shards", files, cluster="tcp://elsewhere:1")
    assert len(sizes) == len(files)
    assert sizes == sorted(sizes, reverse=True)
