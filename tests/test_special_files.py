"""FIFOs, devices and sockets in place of files: named at once, never waited for, never endless."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from bort import files
from bort.agora.labellers import FileTimaeus
from bort.arrays import map_npy, read_npz
from bort.checkpoint import load, save
from bort.errors import UserError
from bort.files import open_regular, read_json, read_json_as, read_yaml, sha256_of
from bort.huggingface.tensors import read_tensors
from bort.inference.onnx_file import read_metadata, verify_onnx_file
from bort.journal import Journal, line_of
from bort.ose.known_errors import read_errors
from bort.parameters import read_arrays
from bort.reporter import cut_after, read_records
from bort.sums import check_sums, write_sums
from bort.tokenization import TokenizerSettings, load_tokenizer, load_tokenizer_folder
from data.shards import Shard
from data.submission import check_submission
from data.tasks import get_task
from data.text_formats import TextSource, is_parquet, parquet_texts, text_pieces
from scripts.plot_metrics import read_run

SECONDS = 10


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def noise(path: Path) -> None:
    path.symlink_to("/dev/urandom")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))


def folder(path: Path) -> None:
    path.mkdir()


@contextmanager
def limited() -> Iterator[None]:
    """Raise `TimeoutError` when something takes too long."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def parquet(path: str) -> None:
    is_parquet(path)
    list(parquet_texts(TextSource(path)))


def labels(path: str) -> Any:
    return FileTimaeus(get_task("SST-2"), path, f"{path}.wanted")


# The name of the file, and what reads it.
READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "JSON": ("a.json", read_json),
    "typed JSON": ("a.json", lambda path: read_json_as(path, dict)),
    "SHA-256": ("a", sha256_of),
    "sums": ("SHA256SUMS", lambda path: check_sums(os.path.dirname(path))),
    "shard": ("part-00000.npz", Shard),
    "arrays": ("a.npz", read_npz),
    "mapped array": ("a.npy", map_npy),
    "parameters": ("a.params", read_arrays),
    "state of a checkpoint": ("state.json", lambda path: load(os.path.dirname(path))),
    "safetensors": ("model.safetensors", lambda path: read_tensors(os.path.dirname(path))),
    "graph": ("a.onnx", verify_onnx_file),
    "metadata": ("a.onnx", lambda path: read_metadata(path, path)),
    "journal": ("journal.jsonl", lambda path: Journal(path, bool)),
    "metrics": ("metrics.jsonl", read_run),
    "errors": ("ose.csv", lambda path: read_errors(path, [])),
    "labels": ("labels.jsonl", labels),
    "--sentencepiece": ("a.model", lambda p: load_tokenizer(TokenizerSettings(sentencepiece=p))),
    "tokenizer": ("vocab.json", lambda path: load_tokenizer_folder(os.path.dirname(path))),
    "words": ("vocab.txt", lambda path: load_tokenizer(TokenizerSettings(vocab_file=path))),
    "text": ("a.txt", lambda path: list(text_pieces(TextSource(path)))),
    "compressed text": ("a.txt.gz", lambda path: list(text_pieces(TextSource(path)))),
    "parquet": ("a.parquet", parquet),
    "task": ("train.tsv", lambda path: get_task("CoLA").read(os.path.dirname(path), "train")),
    "leaderboard file": (
        "SST-2.tsv",
        lambda path: check_submission(Path(path), get_task("SST-2"), "test"),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_named_at_once(tmp_path, monkeypatch, name):
    if name == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    if name == "words":
        pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    file, read = READERS[name]
    for make in (fifo, zeros, noise, listening):
        place = tmp_path / make.__name__
        place.mkdir()
        monkeypatch.chdir(place)  # the names of sockets are short
        make(place / file)
        with limited(), pytest.raises((UserError, OSError, ValueError)) as refused:
            read(str(place / file))
        assert file in str(refused.value), make.__name__


def terabyte(path: Path) -> None:
    """Write a sparse file, which takes no space."""
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize("name", sorted(READERS.keys() - {"SHA-256", "journal", "mapped array"}))
def test_a_terabyte_of_zeros_is_named_at_once(tmp_path, name):
    if name == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    if name == "words":
        pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    file, read = READERS[name]
    terabyte(tmp_path / file)
    with limited(), pytest.raises((UserError, OSError, ValueError)) as refused:
        read(str(tmp_path / file))
    assert file in str(refused.value)


@pytest.mark.parametrize("name", ["best.params", "int8.onnx"])
def test_a_terabyte_that_is_listed_is_not_hashed(tmp_path, name):
    (tmp_path / name).write_bytes(b"content")
    write_sums(str(tmp_path), [name])
    terabyte(tmp_path / name)
    with limited(), pytest.raises(OSError, match=f"it is larger than .* bytes, the limit.*{name}"):
        check_sums(str(tmp_path))


def test_a_checkpoint_of_a_terabyte_is_damaged(tmp_path):
    save(str(tmp_path), 2, lambda path: Path(path).touch(), {}, {})
    terabyte(tmp_path / "step-0000002" / "trainer.npz")
    with limited(), pytest.raises(UserError, match=r"trainer.npz: it is larger than .*; altered"):
        load(str(tmp_path / "step-0000002"))


def test_a_terabyte_behind_records_does_not_stop_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WHOLE_BYTES", 1 << 20)
    records = [{"step": step, "phase": "train", "time": 1.0} for step in range(1, 4)]
    for name in ("metrics.jsonl", "journal.jsonl"):
        (tmp_path / name).write_bytes(b"".join(map(line_of, records)))
        terabyte(tmp_path / name)
    journal = Journal(str(tmp_path / "journal.jsonl"), bool)
    assert journal.records == records
    cut_after(str(tmp_path / "metrics.jsonl"), 3, evaluate=False)
    for name in ("metrics.jsonl", "journal.jsonl"):
        assert (tmp_path / name).stat().st_size < 1000
    assert read_records(str(tmp_path / "metrics.jsonl")) == records


@pytest.mark.parametrize("make", [fifo, zeros, noise, folder])
def test_only_regular_files_are_opened(tmp_path, make):
    make(tmp_path / "file")
    with limited(), pytest.raises(OSError, match=r"Not a regular file|Is a directory"):
        open_regular(tmp_path / "file")
    (tmp_path / "regular").write_bytes(b"content")
    (tmp_path / "link").symlink_to("regular")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"


def test_a_read_that_fails_in_the_middle_names_its_file(tmp_path):
    (tmp_path / "file").symlink_to("/proc/self/mem")  # regular, but its start is not mapped
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/file'"):
        sha256_of(str(tmp_path / "file"))


def test_yaml_may_come_from_a_command_but_not_without_end(tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"lr: [1]\n")
    os.close(writer)
    assert read_yaml(f"/dev/fd/{reader}") == {"lr": [1]}
    os.close(reader)
    zeros(tmp_path / "grid.yaml")
    with limited(), pytest.raises(UserError, match="has more than the 1048576 bytes"):
        read_yaml(str(tmp_path / "grid.yaml"))
