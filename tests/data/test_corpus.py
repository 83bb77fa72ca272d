"""Text files to documents: blank lines, compressed files, huge documents, bad input."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma

import numpy as np
import pytest
import zstandard

from bort.errors import UserError
from data import corpus
from data.corpus import find_inputs, read_documents, read_pieces, split_documents, survey

TEXT = "One.\nTwo.\n\n\n Three \n \t\r\n\r\nFöur 四.\nFive.\r\n".encode()
DOCUMENTS = [["One.", "Two."], ["Three"], ["Föur 四.", "Five."]]


def sentences(document):
    return [line.strip() for line in document.decode().split("\n") if line.strip()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_documents_are_parted_by_blank_lines(size, mark):
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
        b"eight\n",
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
    found = survey(str(path))
    assert found.sha256 == hashlib.sha256(LONG_TEXT).hexdigest()
    assert found.documents == 20_000
    assert found.bytes == sum(map(len, read_documents(str(path)))) < len(LONG_TEXT)


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
        survey(str(path))


def test_survey_tells_of_its_progress(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(LONG_TEXT)
    monkeypatch.setattr(corpus, "READ_BYTES", 1 << 16)
    sizes = []
    survey(str(path), sizes.append)
    assert sum(sizes) == len(LONG_TEXT)
    assert len(sizes) > 3


@pytest.mark.parametrize("pieces", [1 << 20, 7])
def test_bytes_that_are_not_utf8_are_found(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr(corpus, "READ_BYTES", pieces)
    path = tmp_path / "a.txt"
    path.write_bytes("Good.\n\nÜber\nNö ".encode() + "naïve".encode("latin1") + b" text.\n")
    with pytest.raises(UserError) as caught:
        survey(str(path))
    assert str(caught.value) == (
        f"{path}, line 4: the byte 0xef at offset 19 is not UTF-8; "
        "convert the file, e.g. with iconv -f latin1 -t utf-8"
    )


def test_a_character_cut_at_the_end_of_the_file_is_found(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("One\n四".encode()[:-1])
    with pytest.raises(UserError, match=r"a.txt, line 2: the byte 0xe5 at offset 4 is not UTF-8"):
        survey(str(path))


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"a.txt: holds no text"):
        survey(str(tmp_path / "a.txt"))


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a.txt: cannot be read \(No such file"):
        survey(str(tmp_path / "a.txt"))


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
    with pytest.raises(UserError, match=r"folder.txt: no such file; give .*folder.txt/\*"):
        found("folder.txt")
    with pytest.raises(UserError, match=r"--input_file ' ,': names no file"):
        find_inputs(" ,")


def test_zstd_expands_a_little_at_a_time(tmp_path):
    path, text = tmp_path / "a.zst", LONG_TEXT * 50
    path.write_bytes(zstandard.ZstdCompressor().compress(text))
    assert path.stat().st_size < len(text) / 100
    sizes = list(map(len, read_pieces(str(path))))
    assert sum(sizes) == len(text)
    assert max(sizes) < 10 * corpus.READ_BYTES
