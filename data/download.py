"""Download the official archives of GLUE and SuperGLUE, verify them, and put them in place whole.

A task's folder appears in one rename, after its content was verified: the SHA-256 of everything
that is downloaded (`SHA256`), the checksums in the archive, and the official number of rows of
every split. source.json says where the files come from, and SHA256SUMS is compared whenever they
are read.

Only https is used, in redirects too; http is for a server on this machine.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import ipaddress
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, Callable, Iterator, Optional, Sequence

from bort.errors import UserError, escaped, quoted
from bort.files import lock_folder, open_regular, sha256_of, write_json
from bort.sums import write_sums
from data.rows import Line, collect, decode, read_lines
from data.task import Task
from data.tasks import SUITES, get_task, task_names

SERVER = "https://dl.fbaipublicfiles.com"
RACE_PAGE = "https://www.cs.cmu.edu/~glai1/data/race/"

_MRPC_RAW = ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")
_SUPER_GLUE = "glue/superglue/data/v2"
# Path on the server, and the file's name until it is unpacked.
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

# Of every path on the server, as Hugging Face's datasets library recorded them when it read these
# URLs (datasets/glue and datasets/super_glue/dataset_infos.json, at commit 040102f of its
# repository). TensorFlow Datasets recorded the same ones for GLUE (url_checksums/glue.txt; its QQP
# is an older archive).
SHA256: dict[str, str] = {
    "glue/data/CoLA.zip": ("f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "glue/data/SST-2.zip": ("d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "glue/data/QQP-clean.zip": ("40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "glue/data/STS-B.zip": ("e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    "glue/data/MNLI.zip": ("e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "glue/data/QNLIv2.zip": ("e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "glue/data/RTE.zip": ("6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    "glue/data/WNLI.zip": ("ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
    "glue/data/AX.tsv": ("0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"),
    "glue/data/mrpc_dev_ids.tsv": (
        "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"
    ),
    "senteval/senteval_data/msr_paraphrase_train.txt": (
        "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"
    ),
    "senteval/senteval_data/msr_paraphrase_test.txt": (
        "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"
    ),
    "glue/superglue/data/v2/BoolQ.zip": (
        "853fbe7922f70c59629f06a39e8d9ca440c3d740e760fd3b87a5ddf3dcba2436"
    ),
    "glue/superglue/data/v2/CB.zip": (
        "8d641383298d54554066ba1c93f56ae7410af75df621b90c63028806bbbbb535"
    ),
    "glue/superglue/data/v2/COPA.zip": (
        "405906cddac74bc1e1ce8220f1107d1025b66a25ef10149d91b10bb30651125f"
    ),
    "glue/superglue/data/v2/MultiRC.zip": (
        "b3cd440856e72eb166b2edcd37b798455f1ebd51f2c3de64c0c2a4e1971d2737"
    ),
    "glue/superglue/data/v2/ReCoRD.zip": (
        "30c7b651ab21b8bf8fab986495cd1084333010e040548f861b839eec0044ac18"
    ),
    "glue/superglue/data/v2/RTE.zip": (
        "6310aab3f000424c9d0318a1ff20692e07c7f4aa15e8f17a5972ea0a35c398b9"
    ),
    "glue/superglue/data/v2/WiC.zip": (
        "ee7e67f4ae9eafbf533780faa198e62167f3cda54256cdf261877be3c0e90900"
    ),
    "glue/superglue/data/v2/WSC.zip": (
        "2ed6dfa94556b4a128ff0441efe365b2e883124e7e6aa00fb8d3a6cb1fd520a9"
    ),
    "glue/superglue/data/v2/AX-b.zip": (
        "43b45c55a273575c58a33cd68f10a971f83daa3aa223bfbc4077b92fbdf960b3"
    ),
    "glue/superglue/data/v2/AX-g.zip": (
        "2d4e00d3a7d23d2c3787ee4c1382cc81a72cb05a76fc9d78d142949247ed61b9"
    ),
}

# In Python 3.9 the timeout of a socket is an exception of its own.
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, socket.timeout)
_ATTEMPTS = 3
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20
MAX_BYTES = 2 << 30  # of one download, and of one unpacked file


def expand(names: Sequence[str]) -> list[str]:
    """Return the task names that tasks, suites and "all" stand for, each once."""
    expanded: list[str] = []
    for name in names:
        suite = name.lower().replace("_", "")
        if suite in (*SUITES, "all"):
            expanded += task_names("" if suite == "all" else suite)
        else:
            expanded.append(get_task(name).name)
    return list(dict.fromkeys(expanded))


def download(
    names: Sequence[str], data_dir: Path, server: str = SERVER, say: Callable[[str], None] = print
) -> None:
    """Download tasks, suites or "all" to `data_dir`/<suite>/<task>; the same call resumes.

    say: takes one line per task. Raises `UserError` for a server that is not https, at the first
    task that cannot be downloaded, and at the end for RACE, which is given out on request, unless
    it was asked for as "all".
    """
    check_server(server)
    server = server.rstrip("/")
    on_request = []
    for name in expand(names):
        task = get_task(name)
        found = [task.find(data_dir, split) for split in task.splits]
        if all(path and path.exists() for path in found):  # no link to nothing
            say(f"{name}: in place")
        elif name in SOURCES:
            with lock_folder(str(data_dir / ".downloads"), "--data_dir"):
                say(f"{name}: {_download_task(task, data_dir, server)}")
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


def check_server(server: str) -> None:
    """Raise `UserError` unless a server is https://host/path, or http on this machine.

    A user name, password or query is refused, and not repeated: what is a secret must not be in a
    message or in source.json.
    """
    try:
        parts = urllib.parse.urlsplit(server)
        is_address = parts.port != 0 and re.fullmatch("[!-~]+", server)
    except ValueError:  # brackets of IPv6, a port that is no number
        is_address = None
    if not is_address:
        raise UserError("--server: is no web address; give https://host/path, in ASCII")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError("--server: must be https://host/path without user name, password or query")
    if not _is_allowed(server, from_this_machine=True):
        raise UserError(f"--server {server}: must begin with https://")


def _is_allowed(url: str, from_this_machine: bool) -> bool:
    """Return whether a URL is https, or http on this machine where that is allowed."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    if parts.scheme == "https":
        return bool(host)
    return parts.scheme == "http" and from_this_machine and _is_loopback(host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only, or from this machine to this machine."""

    def redirect_request(
        self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """Return the request for the new URL; raises `UserError` when it is not https."""
        if not _is_allowed(newurl, from_this_machine=_is_loopback(req.host.split(":")[0])):
            scheme = quoted(newurl.partition(":")[0])
            raise UserError(f"{req.full_url}: redirects to {scheme} instead of https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download_task(task: Task, data_dir: Path, server: str) -> str:
    """Download, verify and place one task; returns folder, rows and how they were verified."""
    folder = data_dir / task.suite / task.folders[0]
    if folder.exists():
        raise UserError(f"{folder}: exists but is not complete; move it away and run this again")
    downloads = data_dir / ".downloads"
    with _file_errors(data_dir):
        folder.parent.mkdir(parents=True, exist_ok=True)
        fetched = [downloads / name for _, name in SOURCES[task.name]]
        for path, (remote, _) in zip(fetched, SOURCES[task.name]):
            if not path.exists():
                fetch(f"{server}/{remote}", path)
            _check_sha256(path, remote)
        with _staging(folder) as staging:
            try:
                _assemble(task, fetched, staging)
                verified = _verify(task, staging)
            except UserError as error:
                for path in fetched:
                    path.unlink()
                raise UserError(f"{error}; deleted, run this again to download it") from None
            _record(task, fetched, server, staging)
            os.rename(staging, folder)
    for path in fetched:
        path.unlink()
    return f"{folder} ({verified})"


def _check_sha256(path: Path, remote: str) -> None:
    """Delete a download that is not the official file, and raise `UserError`."""
    found = sha256_of(str(path))
    if found != SHA256[remote]:
        path.unlink()
        raise UserError(
            f"{path}: is not the official file: its SHA-256 is {found}, expected {SHA256[remote]}; "
            "deleted, run this again to download it"
        )


@contextlib.contextmanager
def _file_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Give a new folder beside `folder`; afterwards it is removed, unless it was renamed."""
    for left in folder.parent.glob(f".{folder.name}*.partial"):  # of a killed download
        if not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    staging = Path(
        tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent)
    )
    staging.chmod(0o777 & ~_umask())  # mkdtemp gives access to the owner alone
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path`; a download that broke off before is continued (`path`.part).

    Raises `UserError` when the server has no such file, sends something else than was asked for,
    or the connection keeps breaking.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        _fetch(url, part)
        os.replace(part, path)
    finally:
        if part.is_file() and part.stat().st_size == 0:
            part.unlink()


def _fetch(url: str, part: Path) -> None:
    problem = ""
    for _ in range(_ATTEMPTS):
        try:
            total = _continue(url, part)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise UserError(f"{url}: {_refusal(error)}") from None
            part.unlink()  # longer than the server's file
            problem = "its size has changed"
        except _BROKEN as error:
            problem = escaped(str(getattr(error, "reason", error) or type(error).__name__))
        else:
            size = part.stat().st_size if part.exists() else 0
            if total is None or size == total:
                return
            problem = f"broke off at {size} of {total} bytes"
    raise UserError(f"{url}: {problem}; run this again, the download is continued")


def _refusal(error: urllib.error.HTTPError) -> str:
    """Return what a server answers; of a redirect not its target, which may contain a secret."""
    if 300 <= error.code < 400:
        return f"redirects ({error.code}) to what is not https or no file"
    return f"the server answers {error.code} {escaped(error.reason)}"


def _continue(url: str, part: Path) -> Optional[int]:
    """Append what is missing to `part`; returns the size of the whole, None if unknown."""
    with _open_part(part) as handle:
        have = handle.seek(0, os.SEEK_END)
        headers = {"Range": f"bytes={have}-"} if have else {}
        opener = urllib.request.build_opener(_CheckedRedirects())
        with _connection_errors():
            answer = opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
        with answer:
            start, total = _range_of(answer, have)
            handle.seek(start)
            handle.truncate()
            while chunk := _read(answer):
                if handle.tell() + len(chunk) > MAX_BYTES:
                    raise UserError(f"{url}: is larger than {MAX_BYTES} bytes")
                handle.write(chunk)
    return total


def _read(answer: Any) -> bytes:
    with _connection_errors():
        return answer.read(_CHUNK)


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
    """Turn any `OSError` into one of `_BROKEN`: it is of the connection, not of a file."""
    try:
        yield
    except _BROKEN:
        raise
    except OSError as error:
        raise urllib.error.URLError(error) from None


def _range_of(answer: Any, have: int) -> tuple[int, Optional[int]]:
    """Return where the bytes of an answer belong, and the size of the whole file.

    A server that does not know ranges sends the whole file with status 200. Raises
    `HTTPException` for a range that was not asked for.
    """
    if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
        content_range = answer.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes ([0-9]{1,15})-[0-9]{1,15}/([0-9]{1,15}|\*)", content_range)
        if found is None or int(found[1]) != have:
            raise http.client.HTTPException(
                f"asked for bytes from {have}, the server sent {quoted(content_range)}"
            )
        return have, None if found[2] == "*" else int(found[2])
    length = answer.headers.get("Content-Length")
    return 0, int(length) if length is not None and re.fullmatch(r"[0-9]{1,15}", length) else None


def _open_part(path: Path) -> BinaryIO:
    """Open a partial download for writing; raises `UserError` for a link or a special file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        number = os.open(path, flags, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); remove it") from None
    handle = os.fdopen(number, "r+b")
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        handle.close()
        raise UserError(f"{path}: is not a partial download but a link; remove it")
    return handle


def _assemble(task: Task, fetched: Sequence[Path], folder: Path) -> None:
    """Make the task's official files in `folder`."""
    if task.name == "AX":
        shutil.copyfile(fetched[0], folder / "diagnostic.tsv")
    elif task.name == "MRPC":
        for path in fetched:
            shutil.copyfile(path, folder / path.name)
        split_mrpc(folder)
    else:
        unpack(fetched[0], [file.name for file in task.files], folder)


def unpack(archive: Path, names: Sequence[str], folder: Path) -> None:
    """Extract the named files of a zip archive, from any folder in it, into `folder`.

    Only these names are ever written. Raises `UserError` for a damaged archive, a missing or
    oversized file, and for an archive with links or with paths that lead outside.
    """
    with _damage_named(archive), zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            _refuse_unsafe(archive, info)
        for name in names:
            _extract(opened, _find_member(opened, name), folder / name)


def member_names(archive: Path) -> list[str]:
    """Return the names in a zip archive; raises `UserError` when it is damaged."""
    with (
        _damage_named(archive),
        open_regular(archive) as file,
        zipfile.ZipFile(file) as opened,
    ):
        return opened.namelist()


@contextlib.contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    """Turn what zipfile raises for a damaged archive into a `UserError`."""
    try:
        yield
    except _DAMAGED as error:
        raise UserError(f"{archive}: is damaged ({escaped(str(error))})") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # else: the archive names an offset before its start
            raise
        raise UserError(f"{archive}: is damaged ({error.strerror})") from None


# ValueError: a name that is not UTF-8, a negative offset.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError),
    *(ValueError, OverflowError),
)


def _refuse_unsafe(archive: Path, info: zipfile.ZipInfo) -> None:
    path = PurePosixPath(info.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in info.filename:
        raise UserError(f"{archive}: contains {quoted(info.filename)}, which leads outside")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise UserError(f"{archive}: contains the link {quoted(info.filename)}")


def _find_member(opened: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return the entry of that name in the topmost folder; archives contain raw data, too."""
    entries = [
        info
        for info in opened.infolist()
        if PurePosixPath(info.filename).name == name and "__MACOSX" not in info.filename
    ]
    if not entries:
        raise UserError(f"{opened.filename}: contains no {name}")
    entry = min(entries, key=lambda info: info.filename.count("/"))
    if entry.file_size > MAX_BYTES:
        raise UserError(f"{opened.filename}: {name} would take {entry.file_size} bytes")
    if not entry.file_size:
        raise UserError(f"{opened.filename}: {name} in it is empty")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{opened.filename}: {name} is compressed in a way that is not official")
    return entry


def _extract(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    with opened.open(entry) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target, _CHUNK)
        # zipfile takes an entry of no compressed bytes and a CRC of 0 for whole, whatever its size.
        if target.tell() != entry.file_size:
            raise zipfile.BadZipFile(f"{entry.filename} is shorter than its size says")


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
    rows, _ = collect(read_lines(path), _fields, None, "it is not the official file")
    if not rows:
        raise UserError(f"{path}: is empty")
    return rows


def _fields(line: Line) -> list[list[str]]:
    return [decode(line.content).split("\t")]


def _write_rows(path: Path, rows: list[list[str]]) -> None:
    lines = ("\t".join(row) + "\n" for row in rows)
    path.write_bytes("".join(lines).encode("utf-8"))


def _verify(task: Task, folder: Path) -> str:
    """Compare the numbers of rows with the official ones; returns them in words."""
    counts = []
    for split in task.splits:
        examples, skipped = task.read(folder, split, skip_bad_rows=True)
        rows, official = task.count_rows(examples), task.official_rows(split)
        if rows < official:
            broken = f", {len(skipped)} broken: {skipped[0]}" if skipped else ""
            raise UserError(f"{task.name}: {rows} {split} rows instead of {official}{broken}")
        counts.append(f"{split} {rows}" + (f", {len(skipped)} broken" if skipped else ""))
    return "; ".join(counts)


def _record(task: Task, fetched: Sequence[Path], server: str, folder: Path) -> None:
    """Write source.json, where the files come from, and their SHA-256."""
    sources = [
        {"url": f"{server}/{remote}", "bytes": path.stat().st_size, "sha256": SHA256[remote]}
        for path, (remote, _) in zip(fetched, SOURCES[task.name])
    ]
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(str(folder / "source.json"), {"fetched": when, "sources": sources})
    write_sums(str(folder), [file.name for file in task.files if (folder / file.name).exists()])
