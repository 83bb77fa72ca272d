"""Fetch the official archives of GLUE and SuperGLUE, verify them, and put them in place whole.

A task's folder appears in one rename, after everything in it was checked: the checksums inside
the archive, the SHA-256 of every file for which two independent copies agree (`FILE_HASHES`), and
the official number of rows of every split. No published hash of the archives themselves is known;
theirs is recorded in the folder's source.json.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Callable, Iterator, Sequence

from bort.errors import UserError
from bort.files import sha256_of, write_json
from data.rows import Line, collect, decode, read_lines
from data.task import Task
from data.tasks import SUITES, get_task, task_names

SERVER = "https://dl.fbaipublicfiles.com"
RACE_PAGE = "https://www.cs.cmu.edu/~glai1/data/race/"

_MRPC_RAW = ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")
_SUPER_GLUE = "glue/superglue/data/v2"
# Path on the server, and the name under which the file is kept until it is unpacked.
SOURCES: dict[str, tuple[tuple[str, str], ...]] = {
    "CoLA": (("glue/data/CoLA.zip", "CoLA.zip"),),
    "SST-2": (("glue/data/SST-2.zip", "SST-2.zip"),),
    "MRPC": (
        *((f"senteval/senteval_data/{name}", name) for name in _MRPC_RAW),
        ("glue/data/mrpc_dev_ids.tsv", "dev_ids.tsv"),
    ),
    "STS-B": (("glue/data/STS-B.zip", "STS-B.zip"),),
    "QQP": (("glue/data/QQP-clean.zip", "QQP.zip"),),
    "MNLI": (("glue/data/MNLI.zip", "MNLI.zip"),),
    "QNLI": (("glue/data/QNLIv2.zip", "QNLI.zip"),),
    "RTE": (("glue/data/RTE.zip", "RTE.zip"),),
    "WNLI": (("glue/data/WNLI.zip", "WNLI.zip"),),
    "AX": (("glue/data/AX.tsv", "AX.tsv"),),
    **{
        name: ((f"{_SUPER_GLUE}/{name}.zip", f"{name}.zip"),)
        for name in ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "WiC", "WSC", "AX-b", "AX-g")
    },
    "SuperGLUERTE": ((f"{_SUPER_GLUE}/RTE.zip", "SuperGLUE-RTE.zip"),),
}

# The copies compared: GluonNLP 0.10's dataset archive, and another mirror of the official files.
FILE_HASHES: dict[tuple[str, str], str] = {
    ("SST-2", "dev.tsv"): ("54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0"),
    ("SST-2", "test.tsv"): ("69a938605609b3e6663b4487918fe1565eb293734e6e520d0366d1d412fd2a13"),
    ("SST-2", "train.tsv"): ("48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1"),
    ("STS-B", "dev.tsv"): ("fe7dc0632a5033562f3cadff991f6e8d9b9b6311861660e78c3c82eb7db67f59"),
    ("BoolQ", "train.jsonl"): ("5a0cc1d6cb971a7a177b74bde27b8355de4b0f0e4d86d0a8435ec92cfeb63ba6"),
    ("BoolQ", "val.jsonl"): ("0c86a5045886e5795fe9052003873f7d94b88ed3028a33007c51d99e44fd66d9"),
    ("CB", "test.jsonl"): ("860679c4ef6f56758f5530bfbcbf2fd7905667184144f3594ace9bb4c435618d"),
    ("CB", "train.jsonl"): ("32017480d3a10508646e3efd64502c639f13d4d15077f278d2fd0992c33a3126"),
    ("CB", "val.jsonl"): ("c6125587e9601560cb16ea223c33964c5a915568d2af68a81f651b6ef25395ec"),
    ("COPA", "train.jsonl"): ("e74ed25f36119fff954d90900ebbaae277e2cc4864be4b961e7a46c8f67d11a9"),
    ("COPA", "val.jsonl"): ("fa61467cc251010178ed72f8ca82a0fceefc4ca9a85f87ec3b6102955e1a1f1a"),
    ("SuperGLUERTE", "test.jsonl"): (
        "fb4025a8b072862f0323423dff1de8980a024bfb8775e09c80ff3cf1c77677b1"
    ),
    ("SuperGLUERTE", "train.jsonl"): (
        "fdfb03443abe3ec0424b7fc5d1a8863361719bc061338b7a63e56b94d615f201"
    ),
    ("SuperGLUERTE", "val.jsonl"): (
        "ab990507bf5f35dc176cba7770a72bfa2c50a88ed72b8cc95cfbf9db95ab1af1"
    ),
    ("WSC", "test.jsonl"): ("e278b00238f9f01764f39a934a6515379016c908b2191ff9174bd74296f28310"),
    ("WSC", "train.jsonl"): ("0ffaa3fd8d21e58a0805962565d1619aa4819bc3d034255777f606f801ae5a42"),
    ("WSC", "val.jsonl"): ("e5c685ea4bdc347354036a28176459f6feeb0b6870375ecfb3d6ddb1f0e28bef"),
}

# Python 3.9 has a timeout of its own for sockets.
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, socket.timeout)
_ATTEMPTS = 3
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20
MAX_BYTES = 2 << 30  # of one download, and of one unpacked file


def expand(names: Sequence[str]) -> list[str]:
    """Return the task names that tasks, suites and "all" stand for, each once."""
    found: list[str] = []
    for name in names:
        suite = name.lower().replace("_", "")
        if suite in (*SUITES, "all"):
            found += task_names("" if suite == "all" else suite)
        else:
            found.append(get_task(name).name)
    return list(dict.fromkeys(found))


def download(
    names: Sequence[str], data_dir: Path, server: str = SERVER, say: Callable[[str], None] = print
) -> None:
    """Bring the data of tasks, suites or "all" into `data_dir`/<suite>/<task>; restartable.

    say: takes one line of progress per task. Raises `UserError` at the first task that cannot be
    had; at the end for RACE, which is given out on request, unless it was asked for as "all".
    """
    on_request = []
    for name in expand(names):
        task = get_task(name)
        missing = [split for split in _splits(task) if task.find(data_dir, split) is None]
        if not missing:
            say(f"{name}: in place")
        elif name in SOURCES:
            say(f"{name}: {_bring(task, data_dir, server)}")
        else:
            on_request.append(name)
    if on_request:
        notice = (
            f"{', '.join(on_request)}: given out on request, see {RACE_PAGE}; unpack the archive "
            f"in {data_dir / 'race'}, so that {data_dir / 'race' / 'RACE' / 'train'} exists"
        )
        if "all" not in [name.lower() for name in names]:
            raise UserError(notice)
        say(notice)


def _splits(task: Task) -> list[str]:
    return list(dict.fromkeys(file.split for file in task.files))


def _bring(task: Task, data_dir: Path, server: str) -> str:
    """Fetch, verify and place one task; return what was done in words."""
    folder = data_dir / task.suite / task.folders[0]
    if folder.exists():
        raise UserError(f"{folder}: exists but is not complete; move it away and run this again")
    waiting = data_dir / ".downloads"
    with _file_errors(data_dir):
        waiting.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fetched = [waiting / name for _, name in SOURCES[task.name]]
        for path, (remote, _) in zip(fetched, SOURCES[task.name]):
            if not path.exists():
                fetch(f"{server.rstrip('/')}/{remote}", path)
        with _staging(folder) as staging:
            try:
                _assemble(task, fetched, staging)
                rows = _verify(task, staging)
            except UserError as error:
                for path in fetched:
                    path.unlink()
                raise UserError(f"{error}; deleted: run this again to fetch it anew") from None
            _record(task, fetched, server, staging)
            os.rename(staging, folder)
    for path in fetched:
        path.unlink()
    return f"{folder} ({rows})"


@contextlib.contextmanager
def _file_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from None


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder` that is gone afterwards, unless it was renamed."""
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path`, going on where an earlier call broke off (in `path`.part).

    Raises `UserError` when the server has no such file or the connection keeps breaking.
    """
    part = path.with_name(f"{path.name}.part")
    problem = ""
    for _ in range(_ATTEMPTS):
        try:
            wanted = _continue(url, part)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise UserError(f"{url}: the server says {error.code} {error.reason}") from None
            part.unlink()  # not a beginning of what the server has
            problem = "its size has changed"
        except _BROKEN as error:
            problem = str(getattr(error, "reason", error) or type(error).__name__)
        else:
            if wanted is None or part.stat().st_size == wanted:
                os.replace(part, path)
                return
            problem = f"broke off at {part.stat().st_size} of {wanted} bytes"
    raise UserError(f"{url}: {problem}; run this again, it goes on where it broke off")


def _continue(url: str, part: Path) -> int | None:
    """Append what is missing to `part`; return the size of the whole, None if unknown."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        # A server that does not know ranges sends the whole file with status 200.
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        length = answer.headers.get("Content-Length")
        wanted = None if length is None else int(length) + (have if resumed else 0)
        with open(part, "ab" if resumed else "wb") as handle:
            while chunk := answer.read(_CHUNK):
                handle.write(chunk)
                if handle.tell() > MAX_BYTES:
                    raise UserError(f"{url}: is larger than {MAX_BYTES} bytes")
    return wanted


def _assemble(task: Task, fetched: Sequence[Path], folder: Path) -> None:
    """Put the task's official files into `folder`."""
    if task.name == "AX":
        shutil.copyfile(fetched[0], folder / "diagnostic.tsv")
    elif task.name == "MRPC":
        for path in fetched:
            shutil.copyfile(path, folder / path.name)
        split_mrpc(folder)
    else:
        unpack(fetched[0], [file.name for file in task.files], folder)


def unpack(archive: Path, names: Sequence[str], folder: Path) -> None:
    """Take the named files out of a zip archive, from whatever folder in it, into `folder`.

    Only these names are ever written. Raises `UserError` for a damaged archive, a missing or
    oversized file, and for one that holds links or paths that lead outside.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                _refuse_unsafe(archive, info)
            for name in names:
                _extract(opened, _find_member(opened, name), folder / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{archive}: is damaged ({error})") from None


def _refuse_unsafe(archive: Path, info: zipfile.ZipInfo) -> None:
    path = PurePosixPath(info.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in info.filename:
        raise UserError(f"{archive}: holds {info.filename!r}, which leads outside")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise UserError(f"{archive}: holds the link {info.filename!r}")


def _find_member(opened: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return the entry of that name that lies least deep; archives bring raw data along."""
    entries = [
        info
        for info in opened.infolist()
        if PurePosixPath(info.filename).name == name and "__MACOSX" not in info.filename
    ]
    if not entries:
        raise UserError(f"{opened.filename}: holds no {name}")
    entry = min(entries, key=lambda info: info.filename.count("/"))
    if entry.file_size > MAX_BYTES:
        raise UserError(f"{opened.filename}: {name} would take {entry.file_size} bytes")
    return entry


def _extract(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    with opened.open(entry) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target, _CHUNK)


def split_mrpc(folder: Path) -> None:
    """Make GLUE's train, dev and test.tsv from the raw paraphrase corpus and dev_ids.tsv."""
    rows = [_raw_rows(folder / name) for name in _MRPC_RAW]
    dev_ids = {tuple(row) for row in _raw_rows(folder / "dev_ids.tsv")}
    (header, *train), (_, *test) = rows
    chosen = [tuple(row[1:3]) in dev_ids for row in train]
    _write_rows(folder / "train.tsv", [header, *(r for r, dev in zip(train, chosen) if not dev)])
    _write_rows(folder / "dev.tsv", [header, *(r for r, dev in zip(train, chosen) if dev)])
    numbered = [[str(number), *row[1:]] for number, row in enumerate(test)]
    _write_rows(folder / "test.tsv", [["index", *header[1:]], *numbered])


def _raw_rows(path: Path) -> list[list[str]]:
    rows, _ = collect(read_lines(path), _fields, False, "it is not the official file")
    if not rows:
        raise UserError(f"{path}: is empty")
    return rows


def _fields(line: Line) -> list[list[str]]:
    return [decode(line.content).split("\t")]


def _write_rows(path: Path, rows: list[list[str]]) -> None:
    lines = ("\t".join(row) + "\n" for row in rows)
    path.write_bytes("".join(lines).encode("utf-8"))


def _verify(task: Task, folder: Path) -> str:
    """Check hashes and numbers of rows in the task's folder; return the numbers in words."""
    for file in task.files:
        known = FILE_HASHES.get((task.name, file.name))
        if known and sha256_of(str(folder / file.name)) != known:
            raise UserError(f"{task.name}: {file.name} is not the official file (its SHA-256)")
    counts = []
    for split in _splits(task):
        examples, skipped = task.read(folder, split, skip_bad_rows=True)
        rows, official = task.count_rows(examples), task.official_rows(split)
        if rows < official:
            broken = f", {len(skipped)} broken: {skipped[0]}" if skipped else ""
            raise UserError(f"{task.name}: {rows} {split} rows instead of {official}{broken}")
        counts.append(f"{split} {rows}" + (f", {len(skipped)} broken" if skipped else ""))
    return "; ".join(counts)


def _record(task: Task, fetched: Sequence[Path], server: str, folder: Path) -> None:
    sources = [
        {"url": f"{server}/{remote}", "bytes": path.stat().st_size, "sha256": sha256_of(str(path))}
        for path, (remote, _) in zip(fetched, SOURCES[task.name])
    ]
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(str(folder / "source.json"), {"fetched": when, "sources": sources})
