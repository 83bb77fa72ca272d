"""Downloads against a local web server: whole, broken off, truncated, tampered, hostile."""

from __future__ import annotations

import errno
import hashlib
import http.client
import http.server
import io
import json
import os
import re
import stat
import threading
import urllib.request
import zipfile
from pathlib import Path

import pytest

from bort.errors import UserError
from bort.files import lock_folder
from bort.sums import SUMS, check_sums
from data import download as module
from data.download import SOURCES, download, expand, fetch, split_mrpc, unpack
from data.task import Task
from data.tasks import get_task, task_names
from scripts import download_data

HASHES = dict(module.SHA256)
TEST_DATA = Path(__file__).resolve().parents[2] / "test_data"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; knows ranges; breaks off after `server.break_after` bytes."""

    def do_GET(self):
        content = self.server.files.get(self.path)
        requested = self.headers.get("Range")
        self.server.requests.append((self.path, requested))
        if self.path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[self.path])
            self.end_headers()
            return
        if content is None:
            self.send_error(404)
            return
        start = int(requested[len("bytes=") : -1]) if requested and self.server.ranges else 0
        if start > len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            shown = self.server.content_range or f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", shown)
        self.end_headers()
        self.wfile.write(content[start:][: self.server.break_after])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.requests = {}, []
        running.ranges, running.break_after = True, None
        running.redirects, running.content_range = {}, ""
        running.address = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


class HashesOfServer(dict):
    """The hashes of what a server offers, in place of the official ones."""

    def __init__(self, server) -> None:
        self.server = server

    def __missing__(self, remote: str) -> str:
        path = f"/{remote}"
        for _ in range(len(self.server.redirects)):
            path = self.server.redirects.get(path, path).replace(self.server.address, "")
        return hashlib.sha256(self.server.files[path]).hexdigest()


@pytest.fixture(autouse=True)
def tiny_archives(monkeypatch, server):
    """The tiny sets are no official files: neither their hashes nor their rows are."""
    monkeypatch.setattr(module, "SHA256", HashesOfServer(server))
    monkeypatch.setattr(Task, "official_rows", lambda task, split: 2)


def zipped(files: dict[str, bytes]) -> bytes:
    """An archive of `files`: the same bytes at any time, as a ZipInfo is dated 1980."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def task_archive(name: str) -> bytes:
    task = get_task(name)
    folder = TEST_DATA / task.suite / task.folders[0]
    files = {f"X/{file.name}": (folder / file.name).read_bytes() for file in task.files}
    # The official archives bring raw data of the same name along, deeper down, and macOS noise.
    return zipped({"X/original/" + task.files[0].name: b"raw", "__MACOSX/._x": b"", **files})


def offer(server, name: str, content: bytes | None = None) -> str:
    path = "/" + SOURCES[name][0][0]
    server.files[path] = task_archive(name) if content is None else content
    return path


def get(server, tmp_path: Path, *names: str) -> list[str]:
    said: list[str] = []
    download(names, tmp_path, server.address, said.append)
    return said


def left_over(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", ["CoLA", "MNLI", "BoolQ", "SuperGLUERTE", "AX-g", "ReCoRD"])
def test_archive_is_fetched_checked_and_placed(server, tmp_path, name):
    offer(server, name)
    (line,) = get(server, tmp_path, name)
    assert line.startswith(f"{name}: {tmp_path}")
    task = get_task(name)
    for file in task.files:
        assert task.read(tmp_path, file.split) == task.read(TEST_DATA, file.split)
    record = json.loads((tmp_path / task.suite / task.folders[0] / "source.json").read_text())
    assert record["sources"][0]["url"].startswith(server.address)
    assert len(record["sources"][0]["sha256"]) == 64
    assert not (tmp_path / ".downloads").exists()
    check_sums(str(tmp_path / task.suite / task.folders[0]))
    assert get(server, tmp_path, name) == [f"{name}: in place"]
    assert len(server.requests) == 1


def test_leftovers_of_a_killed_run_do_not_matter(server, tmp_path):
    (tmp_path / "glue" / ".CoLA.partial").mkdir(parents=True)
    (tmp_path / "glue" / ".CoLA.partial" / "train.tsv").write_text("half a row")
    (tmp_path / ".downloads").mkdir()
    (tmp_path / ".downloads" / "CoLA.zip").write_bytes(task_archive("CoLA"))
    offer(server, "CoLA")
    get(server, tmp_path, "CoLA")
    assert server.requests == []
    assert [path.name for path in (tmp_path / "glue").iterdir()] == ["CoLA"]


def test_ax_is_a_single_file(server, tmp_path):
    offer(server, "AX", (TEST_DATA / "glue" / "AX" / "diagnostic.tsv").read_bytes())
    get(server, tmp_path, "AX")
    assert len(get_task("AX").read(tmp_path, "test").examples) == 4


def raw_mrpc(rows: int, first: int) -> str:
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    lines = [
        f"{n % 2}\t{first + n}\t{first + n + 50}\tOne {n} .\tTwo {n} .\r\n" for n in range(rows)
    ]
    return header + "".join(lines)


def test_mrpc_is_split_by_the_official_dev_ids(server, tmp_path):
    ids = "".join(f"{100 + n}\t{150 + n}\n" for n in (1, 4))
    contents = [raw_mrpc(6, 100), raw_mrpc(3, 200), ids]
    for (path, _), content in zip(SOURCES["MRPC"], contents):
        server.files[f"/{path}"] = content.encode()
    get(server, tmp_path, "MRPC")
    mrpc = get_task("MRPC")
    texts = {
        split: [e.inputs[0][0] for e in mrpc.read(tmp_path, split).examples]
        for split in ("train", "dev", "test")
    }
    assert texts["train"] == ["One 0 .", "One 2 .", "One 3 .", "One 5 ."]
    assert texts["dev"] == ["One 1 .", "One 4 ."]
    assert [e.uid for e in mrpc.read(tmp_path, "test").examples] == [0, 1, 2]
    test = (tmp_path / "glue" / "MRPC" / "test.tsv").read_bytes()
    assert test.startswith(b"index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t200\t250\tOne 0 .\t")


def test_broken_connection_is_continued(server, tmp_path):
    path = offer(server, "CoLA")
    server.break_after = 400
    get(server, tmp_path, "CoLA")
    assert [requested for _, requested in server.requests] == [None, "bytes=400-", "bytes=800-"]
    assert len(server.files[path]) < 1200


@pytest.mark.parametrize("step", ["begin", "read"])
def test_an_error_of_the_network_is_not_one_of_the_disk(server, tmp_path, monkeypatch, step):
    """No route and errors of TLS are an OSError without a class of their own."""
    offer(server, "CoLA")
    whole, failures = getattr(http.client.HTTPResponse, step), [1]

    def lost(*arguments):
        if failures and failures.pop():
            raise OSError(errno.EHOSTUNREACH, "No route to host")
        return whole(*arguments)

    monkeypatch.setattr(http.client.HTTPResponse, step, lost)
    get(server, tmp_path, "CoLA")
    failures += [1] * 3
    offer(server, "RTE")
    with pytest.raises(UserError, match=r"RTE\.zip: \[Errno 113\] No route to host; run this"):
        get(server, tmp_path, "RTE")


def test_a_download_that_was_given_up_is_resumed(server, tmp_path):
    content = offer(server, "CoLA")
    server.break_after = 100
    with pytest.raises(UserError, match=r"broke off at 300 of \d+ bytes; run this again"):
        get(server, tmp_path, "CoLA")
    assert left_over(tmp_path) == [".downloads/CoLA.zip.part"]
    server.break_after = None
    get(server, tmp_path, "CoLA")
    assert server.requests[-1] == (content, "bytes=300-")
    assert get_task("CoLA").find(tmp_path, "dev")


def test_server_without_ranges_is_asked_for_the_whole(server, tmp_path):
    server.files["/file"] = bytes(range(256))
    server.ranges = False
    (tmp_path / "file.part").write_bytes(b"wrong beginning")
    fetch(f"{server.address}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == bytes(range(256))


def test_a_part_longer_than_the_file_is_discarded(server, tmp_path):
    server.files["/file"] = b"short"
    (tmp_path / "file.part").write_bytes(b"much longer than that")
    fetch(f"{server.address}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"short"


def test_missing_file_and_missing_server_are_user_errors(server, tmp_path):
    with pytest.raises(UserError, match=r"CoLA\.zip: the server answers 404"):
        get(server, tmp_path, "CoLA")
    assert left_over(tmp_path) == []
    with pytest.raises(UserError, match=r"Connection refused; run this again"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file")


def test_endless_download_is_stopped(server, tmp_path, monkeypatch):
    server.files["/file"] = bytes(1000)
    monkeypatch.setattr(module, "MAX_BYTES", 999)
    with pytest.raises(UserError, match="is larger than 999 bytes"):
        fetch(f"{server.address}/file", tmp_path / "file")


def changed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def stored(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"X/{name}", content)
    return changed(buffer.getvalue())


LONG = b"a\t1\t\tBirds sing.\n" * 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (task_archive("CoLA")[:-40], "is damaged"),
        (task_archive("CoLA")[:500], "is damaged"),
        (b"<html>moved</html>", "is damaged"),
        (stored("train.tsv", LONG), r"is damaged \(Bad CRC-32"),
        (zipped({"X/train.tsv": LONG}), r"contains no dev\.tsv"),
        (zipped({"train.tsv": LONG, "dev.tsv": b"", "test.tsv": LONG}), r"dev\.tsv in it is empty"),
        (
            zipped({"train.tsv": b"a\t1\t\tOne.\n", "dev.tsv": LONG, "test.tsv": LONG}),
            "CoLA: 1 train rows instead of 2",
        ),
        (
            zipped({"train.tsv": LONG, "dev.tsv": b"a\t1\t\tA.\nb\n", "test.tsv": LONG}),
            r"CoLA: 1 dev rows instead of 2, 1 broken: .*dev\.tsv:2",
        ),
        (zipped({"../train.tsv": LONG}), "leads outside"),
        (zipped({"/etc/train.tsv": LONG}), "leads outside"),
        (zipped({"X\\..\\..\\train.tsv": LONG}), "leads outside"),
        (zipped({"C:/train.tsv": LONG}), "leads outside"),
    ],
)
def test_damaged_or_hostile_archive_leaves_nothing(server, tmp_path, content, message):
    offer(server, "CoLA", content)
    with pytest.raises(UserError, match=message) as caught:
        get(server, tmp_path, "CoLA")
    assert "deleted, run this again" in str(caught.value)
    assert left_over(tmp_path) == []
    assert list((tmp_path / "glue").iterdir()) == []
    offer(server, "CoLA")  # the next try starts from the beginning
    get(server, tmp_path, "CoLA")


def test_servers_that_are_not_https_are_refused(tmp_path, capsys):
    for server in ("file:///etc", "http://example.org", "ftp://example.org", "example.org"):
        with pytest.raises(SystemExit):
            download_data.main(["CoLA", "--data_dir", str(tmp_path), "--server", server])
        assert capsys.readouterr().err == f"error: --server {server}: must begin with https://\n"
    assert left_over(tmp_path) == []


def test_the_recorded_address_is_the_one_that_was_asked(server, tmp_path):
    path = offer(server, "CoLA")
    download(["CoLA"], tmp_path, f"{server.address}/", lambda line: None)
    record = json.loads((tmp_path / "glue" / "CoLA" / "source.json").read_text())
    assert [source["url"] for source in record["sources"]] == [f"{server.address}{path}"]
    assert server.requests == [(path, None)]


@pytest.mark.parametrize(
    "server",
    ["http://[::1", "https://example.org:port", "https://example.org/ä", "https://example.org\n"],
)
def test_a_server_that_is_no_address_is_one_line(tmp_path, capsys, server):
    with pytest.raises(SystemExit):
        download_data.main(["CoLA", "--data_dir", str(tmp_path), "--server", server])
    expected = "error: --server: is no web address; give https://host/path, in ASCII\n"
    assert capsys.readouterr().err == expected
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    "server", ["https://ada:s3cret@example.org", "https://example.org/?k=s3cret"]
)
def test_credentials_are_refused_and_not_repeated(tmp_path, capsys, server):
    with pytest.raises(SystemExit):
        download_data.main(["CoLA", "--data_dir", str(tmp_path), "--server", server])
    captured = capsys.readouterr()
    assert "--server: must be https://host/path without user name, password" in captured.err
    assert "s3cret" not in captured.out + captured.err
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("target", ["http://example.org/x", "file:///etc/passwd", "ftp://h/x"])
def test_redirects_that_leave_https_are_refused(server, tmp_path, target):
    server.redirects["/" + SOURCES["CoLA"][0][0]] = target
    with pytest.raises(UserError, match=r"redirects .*https"):
        get(server, tmp_path, "CoLA")
    assert not (tmp_path / "glue" / "CoLA").exists()


def test_redirects_on_this_machine_are_followed(server, tmp_path):
    path = offer(server, "CoLA")
    server.files["/moved"] = server.files.pop(path)
    server.redirects[path] = f"{server.address}/moved"
    get(server, tmp_path, "CoLA")
    record = json.loads((tmp_path / "glue" / "CoLA" / "source.json").read_text())
    assert record["sources"][0]["url"] == f"{server.address}{path}"


def test_a_redirect_from_https_to_this_machine_is_refused():
    request = urllib.request.Request("https://example.org/x")
    with pytest.raises(UserError, match="redirects to 'http' instead of https"):
        module._CheckedRedirects().redirect_request(
            request, io.BytesIO(), 302, "", {}, "http://127.0.0.1/x"
        )


@pytest.mark.parametrize("content_range", ["bytes 0-9/10", "bytes 401-900/901", "bytes", "x"])
def test_a_range_that_was_not_asked_for_is_not_appended(server, tmp_path, content_range):
    offer(server, "CoLA")
    server.break_after, server.content_range = 400, content_range
    with pytest.raises(UserError, match="asked for bytes from 400, the server sent"):
        get(server, tmp_path, "CoLA")
    assert (tmp_path / ".downloads" / "CoLA.zip.part").stat().st_size == 400


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_link_in_place_of_a_download_is_not_followed(server, tmp_path, kind):
    offer(server, "CoLA")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".downloads").mkdir()
    part = tmp_path / ".downloads" / "CoLA.zip.part"
    part.symlink_to(victim) if kind == "symbolic" else os.link(victim, part)
    with pytest.raises(UserError, match=r"CoLA\.zip\.part: .*remove it"):
        get(server, tmp_path, "CoLA")
    assert victim.read_text() == "mine"


def test_a_second_download_into_a_folder_is_refused(server, tmp_path):
    offer(server, "CoLA")
    locked = lock_folder(str(tmp_path / ".downloads"))
    with locked, pytest.raises(UserError, match=r"--data_dir .*\.downloads: process \d+ on"):
        get(server, tmp_path, "CoLA")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compression_is_refused(server, tmp_path, method):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("X/train.tsv", LONG)
    offer(server, "CoLA", buffer.getvalue())
    with pytest.raises(UserError, match=r"train\.tsv is compressed in a way"):
        get(server, tmp_path, "CoLA")


def test_a_name_that_is_not_utf_8_is_named(server, tmp_path):
    archive = zipped({"X/tr\u00e4in.tsv": LONG}).replace("\u00e4".encode(), b"\xff\xfe")
    offer(server, "CoLA", archive)
    with pytest.raises(UserError, match="is damaged"):
        get(server, tmp_path, "CoLA")


@pytest.mark.parametrize("name", ["MRPC", "CoLA", "AX", "WSC"])
def test_what_is_not_the_official_file_is_refused(server, tmp_path, name):
    for path, _ in SOURCES[name]:
        server.files[f"/{path}"] = zipped({"x": b"y"})
    module.SHA256[SOURCES[name][-1][0]] = "0" * 64
    with pytest.raises(UserError, match=r"is not the official file: its SHA-256 is [0-9a-f]{64}, "):
        get(server, tmp_path, name)
    assert not [path for path in left_over(tmp_path) if path.endswith(SOURCES[name][-1][1])]


def test_every_download_has_a_hash():
    remotes = {remote for sources in SOURCES.values() for remote, _ in sources}
    assert set(HASHES) == remotes
    assert all(re.fullmatch("[0-9a-f]{64}", known) for known in HASHES.values())


def test_a_downloaded_file_that_changes_is_noticed_when_it_is_read(server, tmp_path):
    offer(server, "CoLA")
    get(server, tmp_path, "CoLA")
    task, folder = get_task("CoLA"), tmp_path / "glue" / "CoLA"
    path = folder / "train.tsv"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.tsv: its SHA-256 is not that in SHA256SUMS"):
        task.read(tmp_path, "train")
    assert task.read(tmp_path, "dev").examples
    (folder / SUMS).unlink()
    assert task.read(tmp_path, "train").examples


def test_links_in_an_archive_are_refused(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("train.tsv")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match=r"contains the link 'train\.tsv'"):
        unpack(path, ["train.tsv"], tmp_path)


def test_oversized_file_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "x.zip"
    path.write_bytes(zipped({"train.tsv": bytes(10_000)}))
    monkeypatch.setattr(module, "MAX_BYTES", 9_999)
    with pytest.raises(UserError, match=r"train\.tsv would take 10000 bytes"):
        unpack(path, ["train.tsv"], tmp_path)
    assert not (tmp_path / "train.tsv").exists()


def test_only_the_official_files_are_taken(tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(zipped({"X/train.tsv": b"right", "X/raw/train.tsv": b"raw", "run.sh": b"x"}))
    (tmp_path / "out").mkdir()
    unpack(path, ["train.tsv"], tmp_path / "out")
    assert left_over(tmp_path / "out") == ["train.tsv"]
    assert (tmp_path / "out" / "train.tsv").read_bytes() == b"right"


def test_folder_of_the_user_is_never_touched(server, tmp_path):
    (tmp_path / "glue" / "CoLA").mkdir(parents=True)
    (tmp_path / "glue" / "CoLA" / "train.tsv").write_text("mine")
    offer(server, "CoLA")
    with pytest.raises(UserError, match="glue/CoLA: exists but is not complete; move it away"):
        get(server, tmp_path, "CoLA")
    assert left_over(tmp_path) == ["glue/CoLA/train.tsv"]
    for name in ("dev.tsv", "test.tsv"):
        (tmp_path / "glue" / "CoLA" / name).symlink_to("missing")
    with pytest.raises(UserError, match="glue/CoLA: exists but is not complete; move it away"):
        get(server, tmp_path, "CoLA")


def test_cache_of_gluonnlp_is_left_in_place(server, tmp_path):
    cached = tmp_path / "glue_cola"
    cached.mkdir()
    for path in (TEST_DATA / "glue" / "CoLA").iterdir():
        (cached / path.name).write_bytes(path.read_bytes())
    assert get(server, tmp_path, "CoLA") == ["CoLA: in place"]
    assert server.requests == []


def test_race_says_where_to_ask(server, tmp_path):
    with pytest.raises(
        UserError, match=r"RACE-H: given out on request, see https://www\.cs\.cmu\.edu"
    ):
        get(server, tmp_path, "RACE-H")
    for name in SOURCES:
        if name != "MRPC":
            offer(server, name, b"" if name == "AX" else None)
    server.files["/" + SOURCES["AX"][0][0]] = b"index\tsentence1\tsentence2\n0\tA\tB\n1\tA\tB\n"
    for (path, _), rows in zip(SOURCES["MRPC"], (9, 3, 0)):
        server.files[f"/{path}"] = raw_mrpc(rows, 100).encode()
    server.files["/" + SOURCES["MRPC"][2][0]] = b"100\t150\n101\t151\n"
    said = get(server, tmp_path, "all")
    assert len(said) == len(SOURCES) + 1
    assert said[-1].startswith("RACE-H, RACE-M, RACE: given out on request")
    (tmp_path / "race" / "RACE").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (tmp_path / "race" / "RACE" / split).mkdir()
    assert get(server, tmp_path, "race")[0] == "RACE-H: in place"


def test_every_task_has_a_source_or_is_on_request():
    assert set(SOURCES) == {*task_names("glue"), *task_names("superglue")}


def test_names_select_tasks_and_suites():
    assert expand(["glue", "SST"]) == task_names("glue")
    assert expand(["axb", "RACE-M", "AX-b"]) == ["AX-b", "RACE-M"]
    assert expand(["ALL"]) == task_names()
    assert expand(["race"]) == ["RACE-H", "RACE-M", "RACE"]


def test_empty_raw_file_is_refused(tmp_path):
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"msr_paraphrase_train\.txt: is empty"):
        split_mrpc(tmp_path)


def test_door(server, tmp_path, capsys):
    offer(server, "WNLI")
    arguments = ["WNLI", "--data_dir", str(tmp_path), "--server", server.address]
    assert download_data.main(arguments) == tmp_path
    assert "train 4; dev 2; test 2" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        download_data.main(["CoLA", *arguments[1:]])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: http://127.0.0.1")


def test_an_entry_that_says_it_has_no_bytes_is_not_taken_for_a_whole_file(tmp_path):
    path = tmp_path / "SST-2.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.tsv", "sentence\tlabel\n")
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + 16 : entry + 24] = bytes(8)  # CRC-32 and compressed size
    path.write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"train\.tsv is shorter than its size says"):
        unpack(path, ["train.tsv"], tmp_path / "out")
