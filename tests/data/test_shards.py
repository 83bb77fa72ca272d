"""The file format: what is written is read, and what is broken is named."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from bort.errors import UserError
from bort.files import read_json, sha256_of, write_json
from data.shards import (
    MANIFEST_FILE,
    UNFINISHED_FILE,
    Manifest,
    Shard,
    ShardWriter,
    id_type,
    open_shards,
    read_manifest,
    shard_name,
    write_manifest,
)

TOKENIZER = {"fingerprint": "f", "vocab_size": 300, "pad_id": 1}
TEXT = {"path": "a.txt", "sha256": "00", "bytes": 10, "documents": 1}


def random_blocks(seed, blocks=3):
    """Return the arguments of `ShardWriter.write` for some blocks, and their sequences."""
    generator = np.random.default_rng(seed)
    sequences, arguments = [], []
    for _ in range(blocks):
        rows = []
        for length in generator.integers(3, 40, generator.integers(1, 9)):
            positions = np.sort(generator.permutation(length)[: generator.integers(0, 3)])
            rows.append(
                (
                    generator.integers(0, 300, length),
                    positions,
                    generator.integers(0, 300, len(positions)),
                )
            )
        ids, positions, true_ids = map(list, zip(*rows))
        arguments.append(
            (
                np.concatenate(ids),
                np.array([len(one) for one in ids]),
                np.concatenate(positions),
                np.concatenate(true_ids),
                np.array([len(one) for one in positions]),
            )
        )
        sequences += rows
    return arguments, sequences


def write_shard(path, seed=0, vocab_size=300):
    arguments, sequences = random_blocks(seed)
    with ShardWriter(str(path), id_type(vocab_size)) as writer:
        for block in arguments:
            writer.write(*block)
        return writer.finish(documents=4, sentences=7, unknown=2), sequences


def write_folder(folder, shards=3):
    """Write a complete folder; return its sequences."""
    folder.mkdir(exist_ok=True)
    written = [write_shard(folder / shard_name(index), index) for index in range(shards)]
    manifest = Manifest(TOKENIZER, {}, [TEXT], [entry for entry, _ in written])
    write_manifest(str(folder), MANIFEST_FILE, manifest)
    return [sequence for _, sequences in written for sequence in sequences]


def assert_equal_sequences(reader, sequences):
    for index, expected in enumerate(sequences):
        for found, one in zip(reader.sequence(index), expected):
            np.testing.assert_array_equal(found, one)


@pytest.mark.parametrize(("vocab_size", "kind"), [(300, np.uint16), (65537, np.int32)])
def test_what_is_written_is_read(tmp_path, vocab_size, kind):
    entry, sequences = write_shard(tmp_path / "a.npz", vocab_size=vocab_size)
    shard = Shard(str(tmp_path / "a.npz"))
    assert shard.num_sequences == len(sequences) == entry.sequences
    assert shard.lengths.tolist() == [len(ids) for ids, _, _ in sequences]
    assert_equal_sequences(shard, sequences)
    assert shard.input_ids.dtype == shard.masked_ids.dtype == kind
    assert shard.masked_positions.dtype == np.uint16
    assert (entry.tokens, entry.masked) == (len(shard.input_ids), len(shard.masked_ids))
    assert (entry.documents, entry.sentences, entry.unknown) == (4, 7, 2)


def test_numpy_reads_it_without_pickle(tmp_path):
    _, sequences = write_shard(tmp_path / "a.npz")
    shard = Shard(str(tmp_path / "a.npz"))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert set(archive) == {
            "input_ids", "offsets", "masked_positions", "masked_ids", "masked_offsets"
        }  # fmt: skip
        for name, array in archive.items():
            np.testing.assert_array_equal(array, getattr(shard, name))
        assert (
            archive["offsets"].tolist()
            == np.cumsum([0, *(len(ids) for ids, _, _ in sequences)]).tolist()
        )


def test_members_are_mapped_aligned_and_read_only(tmp_path):
    write_shard(tmp_path / "a.npz")
    shard = Shard(str(tmp_path / "a.npz"))
    for array in (shard.input_ids, shard.offsets, shard.masked_positions, shard.masked_ids):
        assert array.ctypes.data % 64 == 0
        assert not array.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_the_same_data_give_the_same_bytes(tmp_path):
    first, _ = write_shard(tmp_path / "a.npz")
    second, _ = write_shard(tmp_path / "b.npz")
    assert first.sha256 == second.sha256 == sha256_of(str(tmp_path / "a.npz"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_smallest_type_that_holds_every_id():
    assert id_type(65536) == np.uint16
    assert id_type(65537) == np.int32
    assert id_type(2**31) == np.int32
    with pytest.raises(UserError, match=r"vocabulary of 2147483649 tokens: shards hold ids of at"):
        id_type(2**31 + 1)


def test_a_folder_is_numbered_through(tmp_path):
    sequences = write_folder(tmp_path)
    shards = open_shards(str(tmp_path), verify=True)
    assert shards.num_sequences == len(sequences)
    assert shards.lengths.tolist() == [len(ids) for ids, _, _ in sequences]
    assert_equal_sequences(shards, sequences)
    assert shards.manifest.totals["sequences"] == len(sequences)
    assert shards.manifest.totals["documents"] == 12


def test_a_writer_left_early_leaves_nothing(tmp_path):
    arguments, _ = random_blocks(0)
    writer = ShardWriter(str(tmp_path / "a.npz"), np.dtype(np.uint16))
    with writer:
        writer.write(*arguments[0])
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
import numpy as np
from bort.errors import UserError
from data.shards import ShardWriter

tokens, limit, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
one = np.ones(1, int)
try:
    with ShardWriter(path, np.dtype(np.uint16)) as writer:
        writer.write(np.ones(tokens, int), one * tokens, one, one, one)
        writer.finish(1, 1, 0)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("tokens", "limit"), [(1 << 20, 1 << 20), (1 << 20, (1 << 21) + 100)], ids=["write", "finish"]
)
def test_no_room_on_the_disk(tmp_path, tokens, limit):
    path = tmp_path / "a.npz"
    command = [sys.executable, "-c", FULL_DISK, str(tokens), str(limit), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"{path}: cannot be written (File too large); make room and run")
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_manifest(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"manifest.json: cannot be written \(No space left"):
        write_manifest(str(tmp_path), MANIFEST_FILE, Manifest(TOKENIZER, {}, [], []))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.999, -1])
def test_a_truncated_shard_is_named(tmp_path, kept):
    write_folder(tmp_path)
    path = tmp_path / shard_name(1)
    size = path.stat().st_size
    os.truncate(path, size - 1 if kept == -1 else int(kept * size if kept < 1 else kept))
    with pytest.raises(UserError, match=r"part-00001.npz: cannot be read as a shard"):
        open_shards(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / shard_name(2)).unlink()
    with pytest.raises(UserError, match=r"part-00002.npz: cannot be read .*No such file"):
        open_shards(str(tmp_path))


def test_an_archive_of_something_else_is_named(tmp_path):
    write_folder(tmp_path)
    np.savez(tmp_path / shard_name(0), offsets=np.zeros(3))
    with pytest.raises(UserError, match=r"part-00000.npz: cannot be read as a shard"):
        open_shards(str(tmp_path))


def test_a_shard_that_unpickles_is_refused(tmp_path):
    write_folder(tmp_path)
    names = ("input_ids", "offsets", "masked_positions", "masked_ids", "masked_offsets")
    np.savez(tmp_path / shard_name(0), **{name: np.array([{}], object) for name in names})
    with pytest.raises(UserError, match=r"part-00000.npz: cannot be read as a shard"):
        open_shards(str(tmp_path))


def test_a_compressed_shard_is_refused(tmp_path):
    write_folder(tmp_path)
    with np.load(tmp_path / shard_name(0)) as archive:
        content = dict(archive)
    np.savez_compressed(tmp_path / shard_name(0), **content)
    with pytest.raises(UserError, match=r"part-00000.npz: cannot be read as a shard"):
        open_shards(str(tmp_path))


def test_a_shard_of_another_run_is_named(tmp_path):
    write_folder(tmp_path)
    os.replace(tmp_path / shard_name(0), tmp_path / shard_name(1))
    write_shard(tmp_path / shard_name(0), seed=0)
    with pytest.raises(UserError, match=r"part-00001.npz: holds .* where the manifest says"):
        open_shards(str(tmp_path))


def test_a_changed_byte_is_found_on_request(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / shard_name(1)
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    open_shards(str(tmp_path))
    with pytest.raises(UserError, match=r"part-00001.npz: its SHA-256 is not that of the manifest"):
        open_shards(str(tmp_path), verify=True)


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(UserError, match=r"holds no complete set .* create_pretraining_data.py$"):
        open_shards(str(tmp_path))
    write_manifest(str(tmp_path), UNFINISHED_FILE, Manifest(TOKENIZER, {}, [], []))
    with pytest.raises(UserError, match=r"was interrupted: run it again"):
        open_shards(str(tmp_path))


def test_a_manifest_of_another_format(tmp_path):
    write_folder(tmp_path)
    content = read_json(str(tmp_path / MANIFEST_FILE))
    write_json(str(tmp_path / MANIFEST_FILE), {**content, "format_version": 7})
    with pytest.raises(UserError, match=r"manifest.json: is of format 7, this program reads"):
        open_shards(str(tmp_path))
    write_json(str(tmp_path / MANIFEST_FILE), [])
    with pytest.raises(UserError, match=r"manifest.json: is of format None"):
        open_shards(str(tmp_path))


def test_manifests_round_trip_and_tell_what_differs(tmp_path):
    write_folder(tmp_path)
    manifest = read_manifest(str(tmp_path))
    one = dataclasses.replace(manifest, arguments={"dupe_factor": 1, "random_seed": 5})
    write_manifest(str(tmp_path), MANIFEST_FILE, one)
    assert read_manifest(str(tmp_path)) == one
    assert (one.vocab_size, one.pad_id, one.tokenizer_fingerprint) == (300, 1, "f")
    assert one.differences(dataclasses.replace(one, shards=[])) == []
    other = Manifest(
        {**TOKENIZER, "fingerprint": "g"},
        {"dupe_factor": 2, "random_seed": 5},
        [{**TEXT, "path": "b.txt", "sha256": "01"}],
        [],
    )
    assert one.differences(other) == [
        "the tokenizer is another one",
        "--dupe_factor was 1, now 2",
        "the text of b.txt is not that of a.txt then",
    ]
    renamed = dataclasses.replace(one, inputs=[{**TEXT, "path": "b.txt"}])
    assert one.differences(renamed) == []
    assert one.differences(dataclasses.replace(one, inputs=[TEXT, TEXT])) == [
        "1 input files, now 2"
    ]
