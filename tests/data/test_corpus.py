"""Text files to documents: blank lines, compressed files, huge documents, invalid input."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import json
import lzma
import os
import sys
import tempfile
import threading

import numpy as np
import pytest
import zstandard

from bort.errors import UserError
from data import corpus, text_formats
from data.corpus import find_inputs, open_sources, read_documents, scan, split_documents
from data.text_formats import TextSource, read_pieces

TEXT = "One.\nTwo.\n\n\n Three \n \t\r\n\r\nFöur 四.\nFive.\r\n".encode()
DOCUMENTS = [["One.", "Two."], ["Three"], ["Föur 四.", "Five."]]


def sentences(document):
    return [line.strip() for line in document.decode().split("\n") if line.strip()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_documents_are_separated_by_blank_lines(size, mark):
    text = mark + TEXT
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert [sentences(one) for one in split_documents(pieces)] == DOCUMENTS


@pytest.mark.parametrize("text", [b"", b"\n", b" \r\n\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"])
def test_blank_text_has_no_documents(text):
    assert list(split_documents([text])) == []


def test_where_pieces_end_changes_nothing(monkeypatch):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 40)
    generator = np.random.default_rng(0)
    words = ["a", "bcd", "é四é四é四", "\n", "\n\n", " \n \n", "\r\n", " ", "x" * 50, "四" * 30]
    for _ in range(2000):
        text = "".join(generator.choice(words, generator.integers(1, 60))).encode()
        whole = list(split_documents([text]))
        cuts = np.sort(generator.integers(0, len(text) + 1, 5)).tolist()
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)]) if i < j]
        assert list(split_documents(pieces)) == whole
        assert max(map(len, whole), default=0) <= 40
        # Nothing but blanks is lost, and no character is cut in two.
        assert "".join("".join(one.decode().split()) for one in whole) == "".join(
            text.decode().split()
        )


def test_a_huge_document_is_cut_after_a_line_else_after_a_word(monkeypatch):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 20)
    assert list(split_documents([b"one two three\nfour five six seven eight\n"])) == [
        b"one two three",
        b"four five six seven",
        b"eight",
    ]


def zstd(content):
    # Two frames, as zstd gives for two files one after the other.
    compress = zstandard.ZstdCompressor().compress
    return compress(content[:50]) + compress(content[50:])


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
LONG_TEXT = b"".join(b"Sentence number %d.\n\n" % (i * i) for i in range(20_000))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](LONG_TEXT))
    assert b"".join(read_pieces(str(path))) == LONG_TEXT
    found = scan(TextSource(str(path)))
    assert found.sha256 == hashlib.sha256(LONG_TEXT).hexdigest()
    assert found.documents == 20_000
    documents = list(read_documents(TextSource(str(path))))
    assert found.bytes == sum(map(len, documents)) + 1 < len(LONG_TEXT)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["truncated", "changed", "something else"])
def test_damaged_files_are_named(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    content = COMPRESS[suffix](LONG_TEXT)
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "changed":
        middle = len(content) // 2
        content = content[:middle] + bytes(64) + content[middle + 64 :]
    else:
        content = b"Plain text.\n"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\{suffix}: damaged, or not a \{suffix} file"):
        scan(TextSource(str(path)))


def test_scanning_reports_its_progress(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(LONG_TEXT)
    monkeypatch.setattr(text_formats, "READ_BYTES", 1 << 16)
    sizes = []
    scan(TextSource(str(path)), sizes.append)
    assert sum(sizes) == len(LONG_TEXT)
    assert len(sizes) > 3


@pytest.mark.parametrize("pieces", [1 << 20, 7])
def test_bytes_that_are_not_utf8_are_found(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr(text_formats, "READ_BYTES", pieces)
    path = tmp_path / "a.txt"
    path.write_bytes("Good.\n\nÜber\nNö ".encode() + "naïve".encode("latin1") + b" text.\n")
    with pytest.raises(UserError) as caught:
        scan(TextSource(str(path)))
    assert str(caught.value) == (
        f"{path}, line 4: the byte 0xef at offset 19 is not UTF-8; "
        "convert the file, e.g. with iconv -f latin1 -t utf-8"
    )


def test_a_character_cut_at_the_end_of_the_file_is_found(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("One\n四".encode()[:-1])
    with pytest.raises(UserError, match=r"a.txt, line 2: the byte 0xe5 at offset 4 is not UTF-8"):
        scan(TextSource(str(path)))


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"a.txt: holds no text"):
        scan(TextSource(str(tmp_path / "a.txt")))


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a.txt: cannot be read \(No such file"):
        scan(TextSource(str(tmp_path / "a.txt")))


def test_inputs_come_in_order_and_once(tmp_path):
    for name in ("b.txt", "a.txt", "c.text", "odd[1].txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.txt").mkdir()

    def found(*patterns):
        paths = find_inputs(", ".join(str(tmp_path / pattern) for pattern in patterns))
        return [path[len(str(tmp_path)) + 1 :] for path in paths]

    assert found("*.txt") == ["a.txt", "b.txt", "odd[1].txt"]
    assert found("c.text", "b.txt", "*.txt") == ["c.text", "b.txt", "a.txt", "odd[1].txt"]
    assert found("odd[1].txt") == ["odd[1].txt"]
    with pytest.raises(UserError, match=r"--input_file .*/x\*: no such file"):
        found("a.txt", "x*")
    with pytest.raises(UserError, match=r"--input_file .*/nope/\*\*: no such file"):
        found("nope/**")
    with pytest.raises(UserError, match=r"folder.txt: the folder holds no files$"):
        found("folder.txt")
    with pytest.raises(UserError, match=r"--input_file ' ,': names no file"):
        find_inputs(" ,")


def test_folders_and_recursive_globs(tmp_path, monkeypatch):
    names = ["tree/a.txt", "tree/b/c.txt", "tree/b/d/e.txt", "tree/b/f.jsonl", "tree/.hidden/g.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert find_inputs("tree/**/*.txt") == names[:3]
    assert find_inputs("tree") == names[:4]
    assert find_inputs("tree/b/,tree/a.txt") == [
        "tree/b/c.txt",
        "tree/b/d/e.txt",
        "tree/b/f.jsonl",
        names[0],
    ]
    assert find_inputs("-,tree/a.txt") == ["-", "tree/a.txt"]
    other_spellings = f"tree/a.txt,./tree/a.txt,tree//a.txt,{tmp_path}/tree/*.txt,tree/b/../a.txt"
    assert find_inputs(other_spellings) == ["tree/a.txt"]


def test_links_are_followed_and_files_come_once(tmp_path, monkeypatch):
    for name in ("text/own/a.txt", "elsewhere/below/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "text" / "linked").symlink_to("../elsewhere")
    (tmp_path / "text" / "own" / "loop").symlink_to("..")
    (tmp_path / "text" / "same.txt").symlink_to("own/a.txt")
    monkeypatch.chdir(tmp_path)
    assert find_inputs("text") == ["text/linked/below/b.txt", "text/own/a.txt"]
    assert find_inputs("text/same.txt,text") == ["text/same.txt", "text/linked/below/b.txt"]
    (tmp_path / "text" / "own" / "loop").unlink()
    assert find_inputs("text/**") == ["text/linked/below/b.txt", "text/own/a.txt"]


@pytest.mark.parametrize("pattern", ["text", "text/*"])
def test_a_link_to_nothing_is_named(tmp_path, monkeypatch, pattern):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    (tmp_path / "text" / "b.txt").symlink_to("missing")  # as git-annex leaves it
    monkeypatch.chdir(tmp_path)
    message = r"text/b\.txt: cannot be read \(No such file"
    with pytest.raises(UserError, match=message), open_sources(pattern):
        pass


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "text" / "closed").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").touch()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # root may read every folder
    with pytest.raises(UserError, match=r"text/closed cannot be read \(Permission denied\); name"):
        find_inputs(str(tmp_path / "text"))


def test_a_comma_in_a_name_is_escaped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c.txt", "d,e.txt"):
        (tmp_path / name).touch()
    assert find_inputs("a\\,b.txt,c.txt") == ["a,b.txt", "c.txt"]
    assert find_inputs("*\\,*.txt") == ["a,b.txt", "d,e.txt"]
    with pytest.raises(UserError, match=r"--input_file a: no such file; write \\, for a comma"):
        find_inputs("a,b.txt")


def test_blanks_around_a_name_count_where_a_file_has_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (" a.txt", "a.txt", "b.txt\n"):
        (tmp_path / name).touch()
    assert find_inputs(" a.txt") == [" a.txt"]
    assert find_inputs("b.txt\n, a.txt,a.txt , a.txt") == ["b.txt\n", " a.txt", "a.txt"]


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "caf\udce9.txt").write_text("One.")
    with pytest.raises(UserError, match=r"caf\\xe9.txt': the name is not UTF-8; rename the file"):
        find_inputs(f"{tmp_path}/*.txt")


def documents_of(path, text_field="text"):
    source = TextSource(str(path), text_field)
    found = scan(source)
    documents = list(read_documents(source))
    assert found.documents == len(documents)
    assert found.bytes == sum(map(len, documents)) + 1
    return [document.decode() for document in documents]


ROWS = [
    {"text": " One.\nTwo.\n", "id": 1},
    {"text": ""},
    {"text": None},
    {"text": "A\r\n\r\nB\n \t\n\nC", "meta": {"text": 3}},
    {"text": "Lone \ud800 surrogate, \u0000 and \u2028."},
]
ROW_DOCUMENTS = ["One.\nTwo.", "A\r\nB\nC", "Lone \ufffd surrogate, \0 and \u2028."]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL", "a.json.gz", "a.GZ"])
@pytest.mark.parametrize("pieces", [3, 1 << 20])
def test_json_lines(tmp_path, monkeypatch, name, pieces):
    monkeypatch.setattr(text_formats, "READ_BYTES", pieces)
    if name == "a.GZ" and pieces == 3:
        pytest.skip("told by the first line, which has to be in the first piece")
    lines = "\n\n".join(json.dumps(row) for row in ROWS).encode()
    content = b"\xef\xbb\xbf" + lines.replace(b"\n\n", b"\r\n", 1)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert documents_of(path) == ROW_DOCUMENTS


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_json_lines_under_another_name_are_told_by_their_first_line(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": "One."}\n{"text": "Two."}\n')
    assert documents_of(path) == ["One.", "Two."]
    for text in ("{ is a brace.\nTwo.", '{"other": 1}\nTwo.', "[1]", '{"text": 1}'):
        path.write_text(text)
        assert documents_of(path) == [text]


def test_json_lines_without_a_name_are_not_taken_for_text(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text('{"text": null}\n{"text": "One."}\n')
    assert documents_of(path) == ["One."]
    path.write_text('{"body": "One."}\n\n{"body": "Two."}\n')
    with pytest.raises(UserError, match=r"line 1: has no field 'text'; name .* by --text_field: b"):
        scan(TextSource(str(path)))
    monkeypatch.setattr(text_formats, "READ_BYTES", 64)  # a first row longer than a piece
    long = "One." * 40
    for row in ({"text": long}, {"id": 1, "text": long}, {"meta": {}, "text": long}):
        path.write_text(f'{json.dumps(row)}\n{{"text": "Two."}}\n')
        assert documents_of(path) == [long, "Two."]
    path.write_text("{ is a brace." * 40)
    assert documents_of(path) == [path.read_text()]


BAD_ROWS = {
    "no JSON": (
        '{"text": "a"}\n{"text": ',
        r"a.jsonl, line 2: is not JSON \(.*one object per line",
    ),
    "an array": ('[\n{"text": "a"}]', r"a.jsonl, line 1: is not JSON"),
    "no object": ('["a"]\n', r"a.jsonl, line 1: is \['a'\], expected an object with 'text'"),
    "no field": (
        '{"body": "a", "b": 1}',
        r"line 1: has no field 'text'; name .* by --text_field: b",
    ),
    "no string": ('\n{"text": 5}', r"a.jsonl, line 2: 'text' is 5, expected a string"),
    "too deep": ('{"text": ' + "[" * 100_000, r"a.jsonl, line 1: is nested too deeply|is not JSON"),
    "not UTF-8": ('{"text": "\udce9"}', r"a.jsonl, line 1: the byte 0xe9 at offset 10 of the line"),
    "nothing": ('{"text": " "}\n{"text": "\\u00a0"}', r"a.jsonl: holds no text"),
}


@pytest.mark.parametrize(("text", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_invalid_rows_are_named(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        scan(TextSource(str(path)))


def test_an_endless_row_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_formats, "MAX_ROW_BYTES", 1 << 20)
    monkeypatch.setattr(text_formats, "READ_BYTES", 1 << 16)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "a" * (3 << 20))
    with pytest.raises(UserError, match=r"a.jsonl, line 2: longer than 1 MiB"):
        scan(TextSource(str(path)))


def write_parquet(path, column, name="text"):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(len(column))), name: column}), path)


@pytest.mark.parametrize("name", ["a.parquet", "a.PQ", "a"])
def test_parquet(tmp_path, name):
    texts = [row["text"] for row in ROWS[:4]]
    write_parquet(tmp_path / name, texts)
    assert documents_of(tmp_path / name) == ROW_DOCUMENTS[:2]
    write_parquet(tmp_path / name, texts, "body")
    assert documents_of(tmp_path / name, "body") == ROW_DOCUMENTS[:2]
    with pytest.raises(UserError, match=r"has no column 'text'; name the one .* id, body"):
        scan(TextSource(str(tmp_path / name)))


def test_parquet_with_columns_of_one_name_and_of_a_name_with_a_dot(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts, others = pa.array(["One.", "Two."]), pa.array([{"b": "x"}, {"b": "y"}])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([others, texts], names=["a", "a.b"]), path)
    assert documents_of(path, "a.b") == ["One.", "Two."]
    pq.write_table(pa.Table.from_arrays([texts, texts], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"has several columns 'text'; rename all but one"):
        scan(TextSource(str(path)))


def test_invalid_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [1, 2])
    with pytest.raises(UserError, match=r"column 'text' holds int64, expected strings"):
        scan(TextSource(str(path)))
    write_parquet(path, [f"Row {number}." for number in range(1000)])
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:200], b"PAR1", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a.parquet: damaged, or not a parquet file"):
            scan(TextSource(str(path)))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a.parquet: to read parquet, install the package pyarrow"):
        scan(TextSource(str(tmp_path / "a.parquet")))


BINARY = {
    "zip": (b"PK\x03\x04rest", "a zip archive"),
    "pdf": (b"%PDF-1.7\n", "a PDF file"),
    "lz4": (b"\x04\x22\x4d\x18abc", "compressed with lz4"),
    "utf-16": ("Text.\n".encode("utf-16"), "UTF-16 text"),
    "tar": (b"name".ljust(257, b"\0") + b"ustar", "a tar archive"),
    "zeros": (b"Text.\n\0\0", "binary"),
    "twice": (gzip.compress(b"Text."), "compressed twice"),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", BINARY)
def test_binary_files_are_named(tmp_path, kind, compressed):
    content, what = BINARY[kind]
    path = tmp_path / ("a.txt.gz" if compressed else "a.txt")
    if kind == "twice":
        content = gzip.compress(content)
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(UserError, match=rf"{path}: is {what}.*, not text; give UTF-8 text or JSON"):
        scan(TextSource(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "id,text\n1,One.\n", "is a table, not text; give UTF-8 text"),
        ("a.tsv.gz", "id\ttext\n1\tOne.\n", "is a table, not text"),
        ("a.txt", "\ufeff\n<!DOCTYPE HTML>\n<p>One.</p>\n", "is HTML, not text"),
        ("a", "<html lang='en'>\nOne.\n</html>\n", "is HTML, not text"),
        ("a.xml", "<?xml version='1.0'?>\n<a>One.</a>\n", "is XML, not text"),
        ("wiki_00", '<doc id="1">\nOne.\n</doc>\n', "is marked by WikiExtractor, whose --json"),
        ("a.wet", "WARC/1.0\r\nWARC-Type: conversion\r\n\r\nOne.\r\n", "is a web archive, not t"),
        ("a.rtf", "{\\rtf1\\ansi One.}\n", "is an RTF document, not text"),
        ("a.txt", '[{"text": "One."},\n{"text": "Two."}]\n', "line 1: is not JSON .*; JSON lines"),
        ("a.txt", '[{"text": "One."}]\n', "line 1: is \\[.*, expected an object with 'text'"),
        ("a", '{\n "text": "One."\n}\n', "line 1: is not JSON .*; JSON lines hold one object per"),
    ],
)
def test_text_of_other_formats_is_named(tmp_path, name, content, says):
    path, compress = tmp_path / name, gzip.compress if name.endswith(".gz") else bytes
    path.write_bytes(compress(content.encode()))
    with pytest.raises(UserError, match=rf"{path}(: |, ){says}"):
        scan(TextSource(str(path)))


@pytest.mark.parametrize("text", ["<unk> is a token.\n", "[1] One.\n", "{One}\n", "<documents>\n"])
def test_text_that_begins_with_a_bracket_is_text(tmp_path, text):
    (tmp_path / "a").write_text(text)
    assert list(read_documents(TextSource(str(tmp_path / "a")))) == [text.strip().encode()]


def test_git_lfs_pointers_are_named(tmp_path):
    pytest.importorskip("pyarrow")
    for name in ("a.txt", "a.parquet", "a.jsonl"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer.* git lfs pull"):
            scan(TextSource(str(tmp_path / name)))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_told_by_content_or_by_a_name_in_capitals(tmp_path, suffix):
    for name in ("a", "a.txt", f"a{suffix.upper()}"):
        path = tmp_path / name
        path.write_bytes(COMPRESS[suffix](LONG_TEXT))
        assert b"".join(read_pieces(str(path))) == LONG_TEXT


def test_a_stream_is_copied_and_the_copy_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    rows = b'{"text": "One."}\n' * 3
    writer = threading.Thread(target=(tmp_path / "pipe.jsonl").write_bytes, args=(rows,))
    writer.start()
    with open_sources(str(tmp_path / "pipe.jsonl")) as sources:
        for _ in range(2):
            assert list(read_documents(sources[0])) == [b"One."] * 3
        assert scan(sources[0]).path == str(tmp_path / "pipe.jsonl")
    writer.join()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_zstd_with_a_long_window_is_read(tmp_path):
    long = zstandard.ZstdCompressionParameters(window_log=31, write_content_size=False)
    compress = zstandard.ZstdCompressor(compression_params=long).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress.compress(b'{"text": "One."}\n') + compress.flush())
    assert documents_of(path) == ["One."]


def test_zstd_expands_a_little_at_a_time(tmp_path):
    path, text = tmp_path / "a.zst", LONG_TEXT * 50
    path.write_bytes(zstandard.ZstdCompressor().compress(text))
    assert path.stat().st_size < len(text) / 100
    sizes = list(map(len, read_pieces(str(path))))
    assert sum(sizes) == len(text)
    assert max(sizes) < 10 * text_formats.READ_BYTES


def test_lines_that_end_with_cr_alone_are_refused(tmp_path):
    """All documents would be one, of a single sentence."""
    path = tmp_path / "mac.txt"
    path.write_bytes(b"One.\rTwo.\r\rThree.\r")
    with pytest.raises(UserError, match=r"mac\.txt: its lines end with CR alone.*tr '.r' '.n'"):
        scan(TextSource(str(path)))
    path.write_bytes(b"One sentence.\r")
    assert scan(TextSource(str(path))).documents == 1
