"""The journal: records survive kills and damage, damage is kept aside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bort import files
from bort.errors import UserError
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
    written = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [{"n": line["n"]} for line in written] == RECORDS
    assert [list(line) for line in written] == [["n", "crc32"]] * 5


def test_a_journal_may_have_any_size(path, monkeypatch):
    size = path.stat().st_size
    monkeypatch.setattr(files, "WHOLE_BYTES", size // 2)
    assert Journal(str(path), is_record).records == RECORDS
    assert path.stat().st_size == size


def test_lines_of_earlier_versions_without_a_sum_are_read(path):
    write(path, [json.dumps(record).encode() for record in RECORDS[:3]])
    assert Journal(str(path), is_record).records == RECORDS[:3]


def test_a_number_that_no_float_holds_is_damage(path, capsys):
    with open(path, "ab") as file:
        file.write(b'{"n": 1%s}\n' % (b"0" * 400))
    assert Journal(str(path), lambda value: float(value["n"]) >= 0).records == RECORDS
    assert "damaged record" in capsys.readouterr().err


def test_no_flipped_bit_changes_a_record(path, capsys):
    written = path.read_bytes()
    for place in range(0, 8 * len(written), 3):  # three is prime to eight: each bit of a byte
        damaged = bytearray(written)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = [{"n": record["n"]} for record in Journal(str(path), is_record).records]
        assert found == [record for record in RECORDS if record in found]
        assert len(found) >= 3, "a flipped end of a line costs two records"
        warned = "damaged record" in capsys.readouterr().err
        # A last line without its end is one that a kill cut short.
        assert warned or len(found) == 5 or not damaged.endswith(b"\n")


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
def test_a_damaged_line_loses_only_its_own_record(path, capsys, place, damage):
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
    assert Journal(str(path), is_record).records == RECORDS[:1]


def test_a_full_disk_is_a_one_line_error(path):
    journal = Journal(str(path), is_record)
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=re.escape(f"{path}: cannot be written (No space left")):
        journal.append({"n": 1})
