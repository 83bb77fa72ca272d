"""The file format: what is written is read, and what is broken is named."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import zipfile
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest

from bort.errors import UserError
from bort.files import read_json, sha256_of, write_json
from data.corpus import TextFile
from data.shards import (
    MANIFEST_FILE,
    UNFINISHED_FILE,
    VERIFIED_FILE,
    Manifest,
    Shard,
    ShardWriter,
    TokenizerEntry,
    id_type,
    open_shards,
    read_manifest,
    shard_name,
    write_manifest,
)
from tests.conftest import ROOT

TOKENIZER = TokenizerEntry("f", 300, pad_id=1)
TEXT = TextFile("a.txt", sha256="00", bytes=10, documents=1)


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
    shards = open_shards(str(tmp_path))
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
def test_no_space_left_on_the_disk(tmp_path, tokens, limit):
    path = tmp_path / "a.npz"
    command = [sys.executable, "-c", FULL_DISK, str(tokens), str(limit), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"{path}: cannot be written (File too large); free some space")
    assert list(tmp_path.iterdir()) == []


def test_no_space_left_for_the_manifest(tmp_path, monkeypatch):
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
    with pytest.raises(UserError, match=r"part-00002.npz: is missing; run create_pretraining_data"):
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


def test_any_flipped_bit_is_noticed(tmp_path):
    write_folder(tmp_path)
    generator = np.random.default_rng(0)
    for _ in range(150):
        path = tmp_path / shard_name(int(generator.integers(3)))
        whole = path.read_bytes()
        content = bytearray(whole)
        content[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
        path.write_bytes(content)
        with pytest.raises(UserError, match=path.name):
            open_shards(str(tmp_path))
        path.write_bytes(whole)
    open_shards(str(tmp_path))


def change_entry(folder, **changes):
    """Give the first shard's entry other values, such as the SHA-256 of a damaged file."""
    content = read_json(str(folder / MANIFEST_FILE))
    content["shards"][0].update(changes)
    write_json(str(folder / MANIFEST_FILE), content)


WRONG_VALUES = {
    "input_ids": (300, "the token id 300 is out of range"),
    "masked_ids": (65535, "the masked token id 65535 is out of range"),
    "masked_positions": (600, "the masked position 600 is out of range"),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, WRONG_VALUES[name][0]) for name in WRONG_VALUES]
)
def test_ids_and_positions_out_of_range_are_refused(tmp_path, name, value):
    write_folder(tmp_path)
    path = tmp_path / shard_name(0)
    content = bytearray(path.read_bytes())
    place = content.index(f"{name}.npy".encode())
    place = content.index(b"\n", place) + 1  # where the values begin
    content[place : place + 2] = np.uint16(value).tobytes()
    path.write_bytes(content)
    change_entry(tmp_path, sha256=sha256_of(str(path)))
    with pytest.raises(UserError, match=WRONG_VALUES[name][1]):
        open_shards(str(tmp_path))
    # Without verification nothing is read, but no such value ever leaves the shard.
    shards = open_shards(str(tmp_path), verify=False)
    with pytest.raises(UserError, match=r"part-00000.npz: sequence 0 holds an id or a position o"):
        shards.sequence(0)


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [("offsets", 0, 1), ("offsets", 1, -5), ("offsets", 2, 0), ("offsets", -1, 10**9),
     ("masked_offsets", 0, 1), ("masked_offsets", 1, 10**12), ("masked_offsets", -1, 0)],
)  # fmt: skip
def test_offsets_that_do_not_ascend_are_refused(tmp_path, name, index, value):
    write_folder(tmp_path)
    path = tmp_path / shard_name(0)
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays[name] = arrays[name].copy()
    arrays[name][index] = value
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=r"part-00000.npz: cannot be read as a shard \(the offsets"):
        open_shards(str(tmp_path), verify=False)


def test_verified_shards_are_not_read_again_until_they_change(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr("bort.verified._SETTLED_SECONDS", -1.0)
    read = []
    monkeypatch.setattr(
        "data.shards.sha256_of", lambda path: read.append(os.path.basename(path)) or sha256_of(path)
    )
    names = [shard_name(index) for index in range(3)]
    open_shards(str(tmp_path), remember=False)
    assert not (tmp_path / VERIFIED_FILE).exists(), "what only looks writes nothing"
    read.clear()
    open_shards(str(tmp_path))
    assert sorted(read) == names
    open_shards(str(tmp_path))
    assert sorted(read) == names, "read once"
    open_shards(str(tmp_path), remember=False)
    assert sorted(read) == sorted(names * 2)
    # Another file with the same content, size and time of change is read again.
    read.clear()
    path, status = tmp_path / names[1], os.stat(tmp_path / names[1])
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=names[1]):
        open_shards(str(tmp_path))
    # So is everything when the record is damaged or lies.
    content[-200] ^= 1
    path.write_bytes(content)
    for record in (b"nonsense", b"[]", b'{"part-00000.npz": 3}', b"{}"):
        (tmp_path / VERIFIED_FILE).write_bytes(record)
        read.clear()
        open_shards(str(tmp_path))
        assert sorted(read) == names


def test_a_shard_that_has_just_changed_is_not_remembered(tmp_path):
    write_folder(tmp_path)
    open_shards(str(tmp_path))
    # The resolution of a file's times is coarser than a write.
    assert not (tmp_path / VERIFIED_FILE).exists() or read_json(str(tmp_path / VERIFIED_FILE)) == {}


def test_a_folder_that_cannot_be_written_to_is_verified(tmp_path, monkeypatch):
    write_folder(tmp_path)

    def refuse(path, content):
        raise UserError("read-only")

    monkeypatch.setattr("bort.verified._SETTLED_SECONDS", -1.0)
    monkeypatch.setattr("data.shards.write_json", refuse)
    assert open_shards(str(tmp_path)).num_sequences


def test_git_lfs_pointers_are_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    write_folder(tmp_path)
    (tmp_path / shard_name(1)).write_bytes(pointer)
    with pytest.raises(UserError, match=r"part-00001.npz: is a Git LFS pointer.* git lfs pull"):
        open_shards(str(tmp_path))
    (tmp_path / MANIFEST_FILE).write_bytes(pointer)
    with pytest.raises(UserError, match=r"manifest.json: is a Git LFS pointer.* git lfs pull"):
        open_shards(str(tmp_path))


def test_archives_of_other_kinds_are_named(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / shard_name(0)
    whole = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("input_ids.npy", whole)
    with pytest.raises(UserError, match=r"part-00000.npz: cannot be read as a shard"):
        open_shards(str(tmp_path))
    path.write_bytes(whole.replace(b"input_ids.npy", b"\xff\xfeput_ids.npy"))
    with pytest.raises(UserError, match=r"part-00000.npz: cannot be read as a shard"):
        open_shards(str(tmp_path))


def test_the_bytes_are_those_of_zipfile_in_python_311(tmp_path):
    """Every version of Python writes the same archive; the SHA-256 is that of a fixed shard."""
    path = tmp_path / "a.npz"
    with ShardWriter(str(path), np.dtype(np.uint16)) as writer:
        lengths = np.array([3, 4])
        writer.write(np.arange(7), lengths, np.array([1, 2]), np.array([9, 8]), np.array([1, 1]))
        writer.write(np.arange(2), np.array([2]), np.array([1]), np.array([5]), np.array([1]))
        entry = writer.finish(1, 2, 0)
    assert entry.sha256 == "3af6f37473982bd261a8674bb9461bf180a44f9304e4e2a7335c7e12e306490c"
    assert entry.sha256 == sha256_of(str(path))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_shard_may_be_empty_but_a_folder_may_not(tmp_path):
    with ShardWriter(str(tmp_path / shard_name(0)), np.dtype(np.uint16)) as writer:
        nothing = np.zeros(0, np.int64)
        writer.write(nothing, nothing, nothing, nothing, nothing)
        entry = writer.finish(1, 0, 0)
    assert (entry.sequences, entry.tokens) == (0, 0)
    write_manifest(str(tmp_path), MANIFEST_FILE, Manifest(TOKENIZER, {}, [TEXT], [entry]))
    with pytest.raises(UserError, match="its shards hold no sequences"):
        open_shards(str(tmp_path))
    other, sequences = write_shard(tmp_path / shard_name(1))
    write_manifest(str(tmp_path), MANIFEST_FILE, Manifest(TOKENIZER, {}, [TEXT], [entry, other]))
    assert_equal_sequences(open_shards(str(tmp_path)), sequences)


def test_more_shards_than_files_that_a_shell_lets_a_program_open(tmp_path):
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    entries = [write_shard(tmp_path / shard_name(number))[0] for number in range(40)]
    write_manifest(str(tmp_path), MANIFEST_FILE, Manifest(TOKENIZER, {}, [TEXT], entries))
    code = "import sys; from data.shards import open_shards; open_shards(sys.argv[1], False)"

    def run(soft, hard):
        limits = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(
            command, cwd=ROOT, preexec_fn=limits, check=False, capture_output=True, text=True
        )

    done = run(32, most)
    assert done.returncode == 0, done.stderr
    *_, error = run(32, 32).stderr.splitlines()
    assert "cannot be opened (Too many open files)" in error
    assert "delete" not in error, "nothing is wrong with the shard"


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(UserError, match=r"holds no complete set .* create_pretraining_data.py$"):
        open_shards(str(tmp_path))
    write_manifest(str(tmp_path), UNFINISHED_FILE, Manifest(TOKENIZER, {}, [], []))
    with pytest.raises(UserError, match=r"was interrupted: run it again, it resumes"):
        open_shards(str(tmp_path))


def test_a_teacher_cache_in_place_of_shards_is_named(tmp_path):
    write_json(str(tmp_path / MANIFEST_FILE), {"teacher_sha256": "0", "format_version": 1})
    with pytest.raises(UserError, match=f"{tmp_path}: holds a teacher cache, not shards; name"):
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


DAMAGED_MANIFESTS = {
    "no shards": ({"shards": []}, "its shards hold no sequences"),
    "no tokenizer": ({"tokenizer": None}, r"manifest.json: Expected `object`.*make the shards"),
    "text for a number": (
        {"tokenizer": {**asdict(TOKENIZER), "vocab_size": "x"}},
        "Expected `int`",
    ),
    "a pad id outside": ({"tokenizer": {**asdict(TOKENIZER), "pad_id": 300}}, "pad_id 300 is outs"),
    "no vocabulary": ({"tokenizer": {**asdict(TOKENIZER), "vocab_size": 0}}, "pad_id 1 is outside"),
    "a file elsewhere": ({"file": "../part-00000.npz"}, "is not the name of a shard in its folder"),
    "an absolute file": ({"file": "/part-00000.npz"}, "is not the name of a shard in its folder"),
    "the folder above": ({"file": ".."}, "is not the name of a shard in its folder"),
    "no file": ({"file": ""}, "is not the name of a shard in its folder"),
    "an odd file": ({"file": "a\0b"}, "is not the name of a shard in its folder"),
    "a number": ({"file": 3}, "Expected `str`"),
}


@pytest.mark.parametrize(
    ("changes", "message"), DAMAGED_MANIFESTS.values(), ids=list(DAMAGED_MANIFESTS)
)
def test_a_damaged_manifest_is_named(tmp_path, changes, message):
    write_folder(tmp_path)
    content = read_json(str(tmp_path / MANIFEST_FILE))
    if "file" in changes:
        content["shards"][0]["file"] = changes["file"]
    else:
        content.update(changes)
    write_json(str(tmp_path / MANIFEST_FILE), content)
    with pytest.raises(UserError, match=message):
        open_shards(str(tmp_path))


def test_manifests_round_trip_and_report_differences(tmp_path):
    write_folder(tmp_path)
    manifest = read_manifest(str(tmp_path))
    one = dataclasses.replace(manifest, arguments={"dupe_factor": 1, "random_seed": 5})
    write_manifest(str(tmp_path), MANIFEST_FILE, one)
    assert read_manifest(str(tmp_path)) == one
    assert (one.vocab_size, one.pad_id, one.tokenizer_fingerprint) == (300, 1, "f")
    assert one.differences(dataclasses.replace(one, shards=[])) == []
    other = Manifest(
        dataclasses.replace(TOKENIZER, fingerprint="g"),
        {"dupe_factor": 2, "random_seed": 5},
        [dataclasses.replace(TEXT, path="b.txt", sha256="01")],
        [],
    )
    assert one.differences(other) == [
        "the tokenizer differs",
        "--dupe_factor was 1, now 2",
        "new: b.txt",
        "missing: a.txt",
    ]
    renamed = dataclasses.replace(one, inputs=[dataclasses.replace(TEXT, path="b.txt")])
    assert one.differences(renamed) == []
    assert one.differences(dataclasses.replace(one, inputs=[TEXT, TEXT])) == [
        "there were 1 input files, now 2"
    ]
    # Of a thousand files the first is another: those after it are not.
    many = [dataclasses.replace(TEXT, path=f"{n}.txt", sha256=f"{n:x}") for n in range(1000)]
    first = dataclasses.replace(TEXT, path="00.txt", sha256="ff00")
    of_many = dataclasses.replace(one, inputs=many)
    for inputs, says in (
        ([first, *many], ["there were 1000 input files, now 1001", "new: 00.txt"]),
        (many[2:], ["there were 1000 input files, now 998", "missing: 0.txt and 1 more"]),
        ([dataclasses.replace(first, path="0.txt"), *many[1:]], ["with another text: 0.txt"]),
        (many[::-1], ["the input files come in another order"]),
    ):
        assert of_many.differences(dataclasses.replace(one, inputs=inputs)) == says
