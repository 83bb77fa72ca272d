"""Text at addresses: the shards of the same text in files, read by ranges; here in memory://."""

from __future__ import annotations

import gzip
import io
import json

import pytest

import create_pretraining_data
from bort.errors import UserError
from data import corpus, remote, shard_jobs
from data.corpus import documents_from, find_inputs, read_documents
from data.shard_jobs import survey_files
from data.text_formats import TextSource, parquet_texts
from tests.conftest import ROOT
from tests.data.test_create_pretraining_data import content, flags
from tests.data.test_shard_jobs import Jobs

SAMPLE = ROOT / "test_data" / "sample_text.txt"
fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def bucket(tmp_path):
    """Put the sample in three formats under memory://bucket and in a folder."""
    documents = SAMPLE.read_text(encoding="utf-8").strip().split("\n\n")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents[5:])
    files = {
        "a.txt": "\n\n".join(documents).encode(),
        "b.jsonl.gz": gzip.compress(rows.encode()),
        "below/c.txt": "\n\n".join(documents[:3]).encode(),
        ".hidden.txt": b"not read",
    }
    system = fsspec.filesystem("memory")
    for name, data in files.items():
        path = tmp_path / "bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        system.pipe(f"/bucket/{name}", data)
    yield tmp_path / "bucket"
    system.rm("/bucket", recursive=True)


def create(text, output, **values):
    given = {"input_file": text, "output_dir": output, "num_workers": 1, **values}
    return create_pretraining_data.main(flags(**given))


def shards(folder):
    return {name: data for name, data in content(folder).items() if name.endswith(".npz")}


@pytest.mark.parametrize("cluster", [None, "tcp://x:1"])
def test_the_shards_are_those_of_files(tmp_path, bucket, monkeypatch, cluster):
    monkeypatch.setattr(shard_jobs, "Cluster", Jobs)
    monkeypatch.setattr("bort.cluster.ClusterSettings.check", lambda self: None)
    create(bucket, tmp_path / "files", num_outputs=4)
    more = {"cluster": cluster} if cluster else {}
    manifest = create("memory://bucket", tmp_path / "remote", num_outputs=4, **more)
    assert shards(tmp_path / "remote") == shards(tmp_path / "files")
    names = ["a.txt", "b.jsonl.gz", "below/c.txt"]
    assert [file.path for file in manifest.inputs] == [f"memory:///bucket/{name}" for name in names]


def test_globs_folders_and_files_are_found(bucket):
    assert find_inputs("memory://bucket/*.txt") == ["memory:///bucket/a.txt"]
    assert find_inputs("memory://bucket/**/*.txt")[-1] == "memory:///bucket/below/c.txt"
    both = find_inputs(f"memory://bucket/below,{bucket / 'a.txt'}")
    assert both == ["memory:///bucket/below/c.txt", str(bucket / "a.txt")]
    assert find_inputs("memory://bucket/a.txt") == ["memory://bucket/a.txt"]


def test_parquet_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = [f"Row {number}." for number in range(9)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2)
    data = (tmp_path / "a.parquet").read_bytes()
    fsspec.filesystem("memory").pipe("/rows/a.parquet", data)
    source = TextSource("memory://rows/a.parquet")
    assert [one.decode().strip() for one in read_documents(source)] == texts
    assert [start for start, _ in documents_from(source, 5)] == [5, 6, 7, 8]


def test_a_server_that_fails_in_the_middle_of_parquet_is_named(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["A row of text."] * 90}), path, row_group_size=30)

    class Failing(io.FileIO):
        """A file whose server fails after the end, where parquet has its schema, was read."""

        def read(self, size=-1):
            if self.tell() < 100:
                raise StatusError(503)  # no OSError
            return super().read(size)

    monkeypatch.setattr("data.text_formats.open_remote", lambda address: Failing(path))
    monkeypatch.setattr("data.text_formats.is_lfs_pointer", lambda address: False)
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read \(StatusError: 503"):
        list(parquet_texts(TextSource("https://a.example/a.parquet")))


def test_a_part_is_read_by_ranges(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("data.text_formats.READ_BYTES", 1000)
    source, read = TextSource("memory://bucket/a.txt"), []

    class Counting:
        def __init__(self, path):
            self.file = remote.open_remote(path)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def seek(self, position):
            self.file.seek(position)

        def read(self, size):
            read.append((self.file.tell(), size))
            return self.file.read(size)

    located = list(documents_from(source))
    monkeypatch.setattr("data.text_formats.open_remote", Counting)
    start, text = located[20]
    assert next(documents_from(source, start)) == (start, text)
    assert sum(size for at, size in read if at < start) <= 2 * 16 + 2 * 1000
    assert max(at for at, _ in read) <= start + len(text) + 1000


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://bucket/none.txt", "memory://bucket/none.txt: no such file"),
        ("nonsense://x/y", "nonsense://x/y: Protocol not known"),
    ],
)
def test_mistakes_are_reported_in_one_line(tmp_path, bucket, capsys, address, message):
    with pytest.raises(SystemExit):
        create(address, tmp_path / "out")
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_and_a_failing_server_are_named(tmp_path, bucket, capsys, monkeypatch):
    def missing(path):
        raise ImportError("Install s3fs to access S3")

    with monkeypatch.context() as patched:
        patched.setattr(fsspec.core, "url_to_fs", missing)
        with pytest.raises(SystemExit):
            create("s3://bucket/a.txt", tmp_path / "out")
    assert "Install s3fs to access S3; pip install -e '.[s3]'" in capsys.readouterr().err

    class CredentialsError(Exception):
        """As those of botocore, which are no OSError."""

    def refused(path):
        raise CredentialsError("Unable to locate\ncredentials")

    monkeypatch.setattr("data.text_formats.open_remote", refused)
    with pytest.raises(SystemExit):
        create("memory://bucket/a.txt", tmp_path / "out")
    line = capsys.readouterr().err
    assert "a.txt: cannot be read (CredentialsError: Unable to locate credentials)" in line
    assert line.count("\n") == 1


class WebServer:
    """fsspec's file system of web servers: every failure is a FileNotFoundError."""

    def __init__(self, failure=None):
        self.failure = failure

    def info(self, address):
        if self.failure is not None:
            raise FileNotFoundError(address) from self.failure
        return {"name": address, "size": None, "type": "file"}


class StatusError(Exception):
    """As aiohttp's ClientResponseError."""

    def __init__(self, status):
        super().__init__(f"{status}, message='Forbidden'")
        self.status = status


def test_what_a_web_server_says_is_reported(monkeypatch):
    """One that is away, or refuses, does not say that there is no such file."""
    address = "https://a.example/text.txt?part=1"
    for failure, message in (
        (None, None),
        (StatusError(404), "--input_file .*: no such file"),
        (StatusError(403), r"text.txt\?part=1: cannot be read \(StatusError: 403"),
        (ConnectionRefusedError(111, "refused"), "cannot be read .ConnectionRefusedError"),
    ):
        server = WebServer(failure)
        monkeypatch.setattr(remote, "_file_system", lambda path, server=server: (server, path))
        if message is None:
            assert find_inputs(address) == [address]
            continue
        with pytest.raises(UserError, match=message):
            find_inputs(address)


def test_damaged_bytes_are_named(tmp_path, bucket):
    fsspec.filesystem("memory").pipe("/bucket/bad.txt", b"fine\n\nnot \xff\n")
    source = TextSource("memory://bucket/bad.txt")
    with pytest.raises(corpus.UserError, match=r"bad\.txt, line 3: the byte 0xff"):
        survey_files(str(tmp_path), shard_jobs.Group(0, [source], 1))
