"""The harness tells every outcome apart, with readers that are made to have it."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from bort.errors import UserError
from tests.fuzz import formats, harness, mutators
from tests.fuzz.harness import Format, Noticed, Tally, WrongValueError

VALID = b"a valid file\n"

pytestmark = pytest.mark.integration


def make(folder: Path) -> None:
    (folder / "file.txt").write_bytes(VALID)


def run(tmp_path: Path, read, cases: int = 4, **more) -> Tally:
    def guard(folder: Path):
        content = mutators.content_of(folder / "file.txt")
        return "valid" if content == VALID else read(folder)

    form = Format("made up", make, guard, **more)
    samples = harness.make_samples([form], tmp_path / "samples")
    (tmp_path / "work").mkdir()
    return harness.run([form], samples, cases, 5, 2, tmp_path / "work")["made up"]


def raising(error: BaseException):
    def read(folder: Path):
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (raising(UserError("file: is wrong; restore it")), "clean error"),
        (raising(FileNotFoundError(2, "No such file", "file")), "clean error"),
        (raising(OSError("no name")), "traceback"),
        (raising(UserError("x" * 5000)), "traceback"),
        (raising(UserError("two\nlines")), "traceback"),
        (raising(KeyError("x")), "traceback"),
        (raising(MemoryError()), "hang"),
        (raising(WrongValueError("NaN")), "accepted wrongly"),
        (lambda folder: "another value", "handled"),
        (lambda folder: Noticed("without it"), "handled"),
        (lambda folder: os.kill(os.getpid(), signal.SIGSEGV), "crash"),
        (lambda folder: (folder / "file.tmp").touch(), "leftovers"),
    ],
)
def test_outcomes_are_classified(tmp_path, read, outcome):
    tally = run(tmp_path, read)
    assert set(tally.counts) == {outcome}
    assert sum(tally.counts.values()) == 4


def test_a_changed_value_of_a_checksummed_file_is_wrong(tmp_path):
    tally = run(tmp_path, lambda folder: "another value", checksummed=("*.txt",))
    assert set(tally.counts) == {"accepted wrongly"}


def endless(folder: Path) -> None:
    while True:
        pass


def greedy(folder: Path) -> None:
    held = np.ones(60_000_000)
    time.sleep(10)
    del held


def sleeping(folder: Path) -> None:
    time.sleep(10)


@pytest.mark.parametrize(
    ("limit", "most", "read", "why"),
    [
        ("CPU_SECONDS", 0.2, endless, "0.2 s of computation"),
        ("MEGABYTES", 200, greedy, "200 MB"),
        ("WALL_SECONDS", 0.2, sleeping, "0.2 s without an end"),
    ],
)
def test_what_takes_too_long_or_too_much_is_ended(tmp_path, monkeypatch, limit, most, read, why):
    monkeypatch.setattr(harness, limit, most)
    tally = run(tmp_path, read, cases=1)
    assert set(tally.counts) == {"hang"}
    assert [case.detail for case in tally.problems] == [why]


def test_the_case_of_a_format_is_found_by_its_name():
    names = [form.name for form in formats.all_formats()]
    assert [formats.one_named(name).name for name in names] == names


def test_a_case_needs_one_format():
    assert formats.one_named("DOWNLOADED").name == "downloaded archive"
    for name in ("", "journal"):
        with pytest.raises(SystemExit, match=f"--only {name}: --case needs one format; there are"):
            formats.one_named(name)


def test_flipped_bits_are_counted_where_they_have_an_effect():
    tally = Tally()
    flip = mutators.Damage("flip_bit", "file")
    for outcome, detail in (("clean error", "file: x"), ("handled", "equal"), ("handled", ""),
                            ("handled", "noticed"), ("accepted wrongly", "x")):  # fmt: skip
        tally.add(harness.Case("made up", 0, flip, outcome, detail))
    row = harness.table({"made up": tally}).split("\n")[1]
    assert row.split()[-1] == "2/4"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.yaml", "a.npz", "a.tsv", "a.params"])
def test_the_same_seed_makes_the_same_damage(tmp_path, name):
    contents = {".json": b'{"a": [1, {"b": 2}]}', ".jsonl": b'{"a": 1}\n{"a": 2}\n'}
    if name.endswith("npz"):
        np.savez(tmp_path / "valid", one=np.arange(5), two=np.zeros((2, 2)))
        valid = (tmp_path / "valid.npz").read_bytes()
    else:
        valid = contents.get(Path(name).suffix, b"a: [1, 2]\tb\nc: [1]\td\n")
    path = tmp_path / name
    found: dict[int, set] = {}
    for _ in range(2):
        for seed in range(200):
            path.write_bytes(valid)
            done = mutators.damage(random.Random(seed), path, tmp_path)
            found.setdefault(seed, set()).add((done, mutators.content_of(path)))
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
    assert all(len(one) == 1 for one in found.values())
    changed = [content for one in found.values() for _, content in one if content != valid]
    assert len(changed) > 150
