"""Examples to token ids: the form of an input, cuts, the cache, batches."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bort.communicator import SingleProcess
from bort.errors import UserError
from bort.tokenization import TokenizerSettings, load_tokenizer
from data import encoding
from data.encoding import ClassifierLoader, encode_examples, encode_inputs
from data.task import Example

PAIR = ("a warm and funny story", "the cast is a delight")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TokenizerSettings())


def examples(count: int, width: int = 1) -> list[Example]:
    return [
        Example(n, tuple((f"story {n}", "and more " * (n % 5)) for _ in range(width)), n % 2)
        for n in range(count)
    ]


def test_an_input_is_its_texts_between_separators(tokenizer):
    first, second = (tokenizer.encode(text).tolist() for text in PAIR)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    single, pair = encode_inputs(tokenizer, [PAIR[:1], PAIR], 64)
    assert single.tolist() == [bos, *first, eos]
    assert pair.tolist() == [bos, *first, eos, *second, eos]
    assert single.dtype == np.int32


def test_one_text_is_no_input_and_an_input_may_be_walked_through_once(tokenizer):
    with pytest.raises(ValueError, match="expected sequences of texts, found one text"):
        encode_inputs(tokenizer, [PAIR, PAIR[0]], 64)
    (expected,), (found,) = (encode_inputs(tokenizer, [one], 64) for one in (PAIR, iter(PAIR)))
    assert found.tolist() == expected.tolist()


def test_each_text_keeps_a_token_or_the_length_is_refused(tokenizer):
    assert [len(ids) for ids in encode_inputs(tokenizer, [PAIR], 5)] == [5]
    with pytest.raises(UserError, match="max_len 4: leaves no tokens for 2 texts"):
        encode_inputs(tokenizer, [PAIR], 4)


def test_the_longest_text_is_cut_first(tokenizer):
    long, short = "word " * 40, "a cast"
    (cut,) = encode_inputs(tokenizer, [(long, short)], 20)
    ids, kept = tokenizer.encode(long).tolist(), tokenizer.encode(short).tolist()
    budget = 20 - 3 - len(kept)
    assert cut.tolist() == [
        tokenizer.bos_id, *ids[:budget], tokenizer.eos_id, *kept, tokenizer.eos_id
    ]  # fmt: skip


@pytest.mark.parametrize("max_len", [5, 8, 9, 30])
def test_no_input_is_longer_than_asked_for(tokenizer, max_len):
    rows = encode_inputs(tokenizer, [("word " * 50, "text " * 50), ("short", "one")], max_len)
    assert len(rows[0]) == max_len
    assert all(row[-1] == tokenizer.eos_id and row[0] == tokenizer.bos_id for row in rows)


@pytest.mark.parametrize("width", [1, 3])
def test_a_set_holds_every_input_and_label(tokenizer, width):
    made = examples(7, width)
    made[2] = made[2]._replace(label=None)
    encoded = encode_examples(made, tokenizer, 32)
    assert encoded.width == width
    rows = encode_inputs(tokenizer, [one for e in made for one in e.inputs], 32)
    for number, row in enumerate(rows):
        start, end = encoded.offsets[number : number + 2]
        assert encoded.ids[start:end].tolist() == row.tolist()
    assert np.flatnonzero(np.isnan(encoded.labels)).tolist() == [2]
    longest = [max(len(row) for row in rows[n * width :][:width]) for n in range(7)]
    assert encoded.lengths.tolist() == longest


WRITER = """
import os, sys
import numpy as np
from data import encoding

path = sys.argv[1]
ids, lengths = np.arange(50_000, dtype=np.int32), np.full(5_000, 10)
for _ in range(30):
    encoding.write_part(path, ids, lengths)
    found = encoding.read_part(path)
    assert found is not None, "a half-written file was seen"
    assert (found[0] == ids).all() and (found[1] == lengths).all()
"""


def test_writers_of_the_same_part_leave_it_whole_at_any_moment(tmp_path):
    """So the cache has no lock, and any number of runs may share it."""
    path = tmp_path / "cache" / "part.npz"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert [file.name for file in path.parent.iterdir()] == ["part.npz"]


def forbidden(*_: Any) -> None:
    raise AssertionError("encoded again")


def test_encoded_examples_come_from_the_cache(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PART", 4)
    made = examples(10)
    first = encode_examples(made, tokenizer, 32, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_inputs", forbidden)
        second = encode_examples(made, tokenizer, 32, str(tmp_path))
        for one, other in zip(first, second):
            np.testing.assert_array_equal(one, other)
        # Anything that decides the ids is part of the name.
        for changed, max_len in ((made, 31), ([made[1], *made[1:]], 32)):
            with pytest.raises(AssertionError, match="encoded again"):
                encode_examples(changed, tokenizer, max_len, str(tmp_path))
    # Labels do not decide the ids, and are never taken from there.
    relabelled = [example._replace(label=1) for example in made]
    assert encode_examples(relabelled, tokenizer, 32, str(tmp_path)).labels.tolist() == [1.0] * 10


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]


def test_a_damaged_file_of_the_cache_is_replaced(tokenizer, tmp_path):
    first = encode_examples(examples(6), tokenizer, 32, str(tmp_path))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    array = io.BytesIO()
    np.save(array, first.ids)
    without = io.BytesIO()
    np.savez(without, ids=first.ids)
    # Offset 6 of a member's header holds the flag of encryption, 8 its compression.
    member = whole.index(b"PK\x01\x02")
    damaged = [b"", b"nonsense", whole[: len(whole) // 2], whole[:-1], array.getvalue()]
    damaged += [without.getvalue(), flipped(whole, member + 8, 1), flipped(whole, member + 10, 64)]
    damaged += [flipped(whole, position, 255) for position in range(0, len(whole), 37)]
    for damage in damaged:
        path.write_bytes(damage)
        again = encode_examples(examples(6), tokenizer, 32, str(tmp_path))
        np.testing.assert_array_equal(first.ids, again.ids)
        np.testing.assert_array_equal(first.offsets, again.offsets)


def damaged(content: bytes, damage: str) -> bytes:
    """Return the content of a file of the cache, damaged in some way."""
    made = io.BytesIO()
    if damage == "cut":
        return content[: len(content) // 2]
    if damage == "flipped":
        place = len(content) // 3
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
    if damage == "lzma":
        with zipfile.ZipFile(made, "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("ids.npy", content)
        whole = made.getvalue()
        return whole[:100] + bytes(50) + whole[150:]
    if damage == "name":
        return content.replace(b"ids.npy", b"\xff\xfe\xfd.npy")
    with np.load(io.BytesIO(content)) as arrays:
        ids, lengths = arrays["ids"].copy(), arrays["lengths"].copy()
    if damage == "id":
        ids[3] = 10**6
    elif damage == "lengths":
        lengths[0] += 1
    elif damage == "type":
        ids = ids.astype(np.float32)
    np.savez(made, ids=ids, lengths=lengths)
    return made.getvalue()


DAMAGES = ["cut", "flipped", "lzma", "name", "id", "lengths", "type"]


@pytest.mark.parametrize("damage", [b"", b"nonsense", *DAMAGES])
def test_a_damaged_file_of_the_cache_is_rebuilt(tokenizer, tmp_path, damage):
    first = encode_examples(examples(6), tokenizer, 32, str(tmp_path))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage if isinstance(damage, bytes) else damaged(whole, damage))
    again = encode_examples(examples(6), tokenizer, 32, str(tmp_path))
    np.testing.assert_array_equal(first.ids, again.ids)
    np.testing.assert_array_equal(first.offsets, again.offsets)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [EOFError, OSError, KeyError, NotImplementedError, RuntimeError])
def test_any_error_of_reading_the_cache_encodes_again(tokenizer, tmp_path, monkeypatch, error):
    # NumPy 1.26 raises EOFError for an empty file, 1.23 ValueError.
    first = encode_examples(examples(6), tokenizer, 32, str(tmp_path))

    def fail(*_: Any, **__: Any) -> None:
        raise error("damaged")

    monkeypatch.setattr(np, "load", fail)
    np.testing.assert_array_equal(
        first.ids, encode_examples(examples(6), tokenizer, 32, str(tmp_path)).ids
    )


class Rank(SingleProcess):
    """One of two ranks; what it has encoded when the ranks meet is noted."""

    size = 2

    def __init__(self, rank: int, meet: Any) -> None:
        self.rank, self.barrier = rank, meet


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_share_the_encoding(tokenizer, tmp_path, monkeypatch, rank):
    monkeypatch.setattr(encoding, "PART", 3)
    made = examples(12)
    at_meeting = []

    def meet() -> None:
        at_meeting.extend(tmp_path.iterdir())

    found = encode_examples(made, tokenizer, 32, str(tmp_path), Rank(rank, meet))
    assert len(at_meeting) == 2  # of four parts
    np.testing.assert_array_equal(found.ids, encode_examples(made, tokenizer, 32).ids)


def test_what_cannot_be_encoded_is_reported(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"\[1, 2\] inputs"):
        encode_examples([*examples(1), *examples(1, 2)], tokenizer, 32)
    with pytest.raises(UserError, match="--max_len 4: leaves no tokens for 2 texts"):
        encode_examples(examples(3), tokenizer, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache_dir: .* cannot be written"):
        encode_examples(examples(3), tokenizer, 32, str(tmp_path / "file"))


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("seed", [None, 5])
def test_batches_use_every_example_once(tokenizer, width, seed):
    encoded = encode_examples(examples(23, width), tokenizer, 32)
    loader = ClassifierLoader(encoded, 4, 3, tokenizer.pad_id, seed)
    batches = [loader(number) for number in range(loader.batches_per_epoch)]
    assert sorted(np.concatenate([batch.indices for batch in batches])) == list(range(23))
    for batch in batches:
        assert batch.input_ids.shape == (len(batch.indices) * width, batch.valid_length.max())
        np.testing.assert_array_equal(batch.labels, batch.indices % 2)
        for place, ids in enumerate(batch.input_ids):
            number = batch.indices[place // width] * width + place % width
            start, end = encoded.offsets[number : number + 2]
            assert ids[: end - start].tolist() == encoded.ids[start:end].tolist()
            assert batch.valid_length[place] == end - start
            assert (ids[end - start :] == tokenizer.pad_id).all()
    assert sum(batch.tokens for batch in batches) == len(encoded.ids)
