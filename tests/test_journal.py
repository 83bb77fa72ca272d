"""The journal: records survive kills and damage, damage is kept aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bort.journal import Journal

RECORDS = [{"n": number} for number in range(5)]


def is_record(value):
    return isinstance(value["n"], int)


def write(path, lines):
    Path(path).write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "journal.jsonl"
    journal = Journal(str(file), is_record)
    for record in RECORDS:
        journal.append(record)
    return file


def test_records_are_read_back(path):
    assert Journal(str(path), is_record).records == RECORDS
    assert path.read_text() == "".join(f'{{"n": {n}}}\n' for n in range(5))


def test_an_absent_file_has_no_records_and_is_not_made(tmp_path):
    assert Journal(str(tmp_path / "none.jsonl"), is_record).records == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_torn_last_line_is_dropped(path, cut, capsys):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    journal = Journal(str(path), is_record)
    assert journal.records == RECORDS[:4]
    journal.append(RECORDS[4])
    assert path.read_bytes() == whole
    assert capsys.readouterr().err == ""


def test_an_intact_file_is_not_touched(path):
    before = path.stat()
    Journal(str(path), is_record)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


DAMAGE = [
    *(b"", b"{", b"[]", b"7", b"null", b'{"n": "x"}', b"\xff\xfe\x00", b"\x00" * 50),
    *(b"[" * 200_000, b'{"n": ' + b"9" * 10_000 + b"}", b'{"n": 1}{"n": 2}'),
]


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_line_anywhere_costs_itself_only(path, capsys, place, damage):
    lines = path.read_bytes().splitlines()
    lines[place] = damage
    write(path, lines)
    journal = Journal(str(path), is_record)
    assert journal.records == [record for record in RECORDS if record["n"] != place]
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {path}:{place + 1}: damaged record, moved to {path}.damaged")
    assert (error.count("\n"), len(error) < 700) == (1, True)
    assert Path(f"{path}.damaged").read_bytes() == damage + b"\n"
    journal.append(RECORDS[place])
    again = Journal(str(path), is_record)
    assert sorted(record["n"] for record in again.records) == list(range(5))
    assert capsys.readouterr().err == ""


def test_damaged_lines_accumulate_aside(path, capsys):
    for number in range(2):
        lines = path.read_bytes().splitlines()
        lines[0] = str(number).encode()
        write(path, lines)
        Journal(str(path), is_record)
    assert Path(f"{path}.damaged").read_bytes() == b"0\n1\n"


def test_all_records_are_set_aside(path, capsys):
    journal = Journal(str(path), is_record)
    content = path.read_bytes()
    journal.set_aside("another search")
    assert (journal.records, path.read_bytes()) == ([], b"")
    assert Path(f"{path}.damaged").read_bytes() == content
    assert "another search; its 5 records" in capsys.readouterr().err
    journal.append(RECORDS[0])
    assert json.loads(path.read_text()) == RECORDS[0]
