"""The teacher's stored outputs: equal to the live teacher's, restartable, refused when wrong."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest

from bort.communicator import SingleProcess
from bort.errors import UserError
from bort.files import lock_folder, read_json, write_json
from bort.pretraining.row_sums import RowSums
from scripts.build_teacher_cache import main as build
from tests import reference
from tests.pretraining.helpers import (
    ROOT,
    SHAPE,
    VOCAB_SIZE,
    arguments,
    held_out_of,
    horovodrun,
    make_run,
    write_shards,
)

# float16 has 11 significant bits: a hidden state is off by at most 2^-12 of its value, and so,
# within a small factor, are logits, loss and gradient.
FLOAT16_BOUND = 1e-3
# Another batch than the cache was built in: other row counts round differently in float32.
COMPOSITION_BOUND = 1e-6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return a folder with shards in train/ and test/, and a teacher's weights."""
    return write_data_and_teachers(tmp_path_factory.mktemp("data"))


def write_data_and_teachers(folder: Path) -> Path:
    from bort.bort import get_bort_model
    from bort.parameters import save_parameters

    write_shards(folder / "train", sizes=(11, 5, 9), seed=1)
    write_shards(folder / "test", sizes=(7,), seed=2)
    for name, seed in (("teacher", 3), ("other", 4)):
        teacher, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE))
        reference.redraw(teacher, seed=seed, deviation=0.2)
        save_parameters(teacher, str(folder / f"{name}.params"))
    return folder


def build_line(source: Path, folder: Path, **flags: object) -> list[str]:
    settings = {
        "data": f"{source}/train,{source}/test",
        "output_dir": folder,
        "teacher_model": SHAPE,
        "teacher_ckpt_dir": source / "teacher.params",
        "dtype": "float32",
        "batch_size": 4,
        **flags,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory) -> Path:
    """Return the folder of a float32 cache; not to be changed."""
    folder = tmp_path_factory.mktemp("cache") / "float32"
    build(build_line(data, folder))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a cache; of the projection, that of its arrays."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".npz":  # a zip file holds the time it was made
            with np.load(path) as arrays:
                content = b"".join(arrays[name].tobytes() for name in arrays.files)
        else:
            content = path.read_bytes()
        sums[path.name] = hashlib.sha256(content).hexdigest()
    return sums


def copy_of(cache: Path, folder: Path) -> Path:
    shutil.copytree(cache, folder)
    return folder


def rows_file(cache: Path, data: Path, shard: int = 0) -> Path:
    from bort.pretraining.teacher_cache import rows_path
    from data.shards import read_manifest

    return Path(rows_path(str(cache), read_manifest(str(data / "train")).shards[shard]))


# ---- equal to the live teacher -----------------------------------------------------------------


def one_step(source: Path, folder: Path, **flags: object) -> tuple[np.ndarray, list[np.ndarray]]:
    """Make one update; return (sums of the losses, gradients of all parameters)."""
    run = make_run(source, ckpt_dir=folder, log_interval=100, **flags)
    run.setup()
    batches = run.batches()
    run.train_step(batches)
    batches.close()
    gradients = [p.list_grad()[0].asnumpy() for p in run.job.network.collect_params().values()]
    return np.array(run._accumulator.state()), gradients


def live(data: Path) -> dict[str, object]:
    return {"teacher_model": SHAPE, "teacher_ckpt_dir": data / "teacher.params"}


def distance(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Return the norm of the difference of two gradients relative to that of the first."""
    squares = sum(float(((a - b) ** 2).sum()) for a, b in zip(one, other))
    return (squares / sum(float((a**2).sum()) for a in one)) ** 0.5


def test_a_float32_cache_is_bit_identical_to_the_live_teacher_in_batches_of_one(data, tmp_path):
    """With more, the last bits of a row depend on its place in the batch: a product of matrices
    computes the rows that are left over after its blocks by another kernel, on AVX2 for one.
    """
    flags = {"data": data / "test", "num_buckets": 1, "dropout": 0.1}
    flags.update(batch_size=1, accumulate=7)
    build(build_line(data, tmp_path / "cache", data=data / "test", batch_size=1))
    sums, gradients = one_step(data, tmp_path / "live", **flags, **live(data))
    cached_sums, cached = one_step(
        data, tmp_path / "cached", **flags, teacher_cache=tmp_path / "cache"
    )
    np.testing.assert_array_equal(cached_sums, sums)
    assert all((mine == theirs).all() for mine, theirs in zip(cached, gradients))


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", COMPOSITION_BOUND), ("float16", FLOAT16_BOUND)]
)
def test_in_any_batch_loss_and_gradient_are_the_live_teachers_within_the_bound(
    data, tmp_path, dtype, bound
):
    build(build_line(data, tmp_path / "cache", dtype=dtype, batch_size=3))
    sums, gradients = one_step(data, tmp_path / "live", **live(data))
    cached_sums, cached = one_step(data, tmp_path / "cached", teacher_cache=tmp_path / "cache")
    assert sums[2] > 0, "the teacher contributes something"
    np.testing.assert_allclose(cached_sums, sums, rtol=bound)
    assert distance(gradients, cached) < bound
    if dtype == "float16":
        assert distance(gradients, cached) > COMPOSITION_BOUND, "it is float16 that was used"


def test_the_evaluation_is_the_live_teachers(data, tmp_path, cache):
    from bort.pretraining.evaluation import evaluate

    found = []
    for name, flags in (("live", live(data)), ("cached", {"teacher_cache": cache})):
        run = make_run(data, ckpt_dir=tmp_path / name, data_eval=data / "test", **flags)
        held_out = held_out_of(data, ckpt_dir=tmp_path / name, data_eval=data / "test", **flags)
        found.append(
            evaluate(
                run.job.network, run.job.step.teacher, held_out, 2.0, SingleProcess(), mx.cpu()
            )
        )
    assert found[1] == pytest.approx(found[0], rel=COMPOSITION_BOUND)
    assert found[0]["teacher_accuracy"] == found[1]["teacher_accuracy"]


def test_a_float16_cache_takes_half_the_space_and_prints_its_size(data, tmp_path, cache, capsys):
    size = build(build_line(data, tmp_path / "cache", dtype="float16"))
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'cache'}: 0.0 MB for 32 sequences")
    rows = sum(len(np.load(path)) for path in cache.glob("*.npy"))
    headers = 4 * 128
    assert size == rows * 32 * 2 + headers
    assert sum(path.stat().st_size for path in cache.glob("*.npy")) == rows * 32 * 4 + headers


def test_a_comma_in_the_name_of_a_folder_is_escaped(data, tmp_path, capsys):
    shutil.copytree(data / "test", tmp_path / "a,b")
    line = ["--output_dir", str(tmp_path / "cache"), "--teacher_model", SHAPE]
    line += ["--teacher_ckpt_dir", str(data / "teacher.params"), "--data"]
    with pytest.raises(SystemExit):
        build([*line, f"{tmp_path}/a,b"])
    assert "a,b: write \\, for a comma in the name of a folder" in capsys.readouterr().err
    assert build([*line, f"{tmp_path}/a\\,b"]) > 0


# ---- interrupted, repeated, shared ---------------------------------------------------------------

# Dies, as by kill -9, when it has written so many batches.
DYING_BUILD = """
    import os, signal, sys
    from bort.pretraining import teacher_cache
    from scripts.build_teacher_cache import main

    rows_of, batches = teacher_cache._teacher_rows, int(sys.argv[1])

    def dying(*given):
        global batches
        for rows in rows_of(*given):
            if batches == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            batches -= 1
            yield rows

    teacher_cache._teacher_rows = dying
    # Unbuffered, or nothing of a shard this small would have reached the disk.
    def unbuffered(path, mode, **more):
        return open(path, mode, 0 if mode == "ab" else -1, **more)

    teacher_cache.open = unbuffered
    main(sys.argv[2:])
"""


def partials(folder: Path) -> list[Path]:
    return list(folder.glob("*.partial"))


def test_a_killed_build_resumes_and_writes_the_same_bytes(data, tmp_path, cache):
    program = tmp_path / "dying.py"
    program.write_text(textwrap.dedent(DYING_BUILD))
    folder = tmp_path / "cache"
    killed = subprocess.run(
        [sys.executable, str(program), "2", *build_line(data, folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(partials(folder)) == 1
    assert partials(folder)[0].stat().st_size > 128 + 8 * 32 * 4
    build(build_line(data, folder))
    assert contents(folder) == contents(cache)


@pytest.mark.parametrize(
    ("batches", "more", "start"),
    [(0, -200, 0), (0, -60, 0), (0, 0, 0), (0, 1, 0), (1, 7, 4), (2, -1, 4), (2, 0, 8)],
)
def test_a_file_cut_anywhere_is_continued(data, tmp_path, cache, monkeypatch, batches, more, start):
    """The file ends `more` bytes after that number of whole batches of 4."""
    from data.shards import open_shards

    folder = copy_of(cache, tmp_path / "cache")
    victim = rows_file(folder, data)
    shard = open_shards(str(data / "train")).shards[0]
    rows = int(shard.masked_offsets[4 * batches])
    kept = max(0, 128 + rows * 32 * 4 + more)
    unfinished(victim, shard, kept)
    starts = starts_of_builds(monkeypatch)
    build(build_line(data, folder))
    assert starts == [start], "whole batches are kept, and only those"
    assert contents(folder) == contents(cache)


@pytest.mark.parametrize(
    ("file", "place", "start"),
    [
        ("partial", 128 + 5, 0),  # in the rows of the first batch of 4
        ("partial", -5, 4),  # of the second, the last one
        ("partial", 60, 0),  # in the header
        ("sums", 20, 0),
        ("sums", -8, 4),  # in the checksum of the last line
        ("sums", None, 0),  # of an earlier version: there is no file
    ],
)
def test_unfinished_rows_are_compared_with_their_sums(
    data, tmp_path, cache, monkeypatch, file, place, start
):
    from data.shards import open_shards

    folder = copy_of(cache, tmp_path / "cache")
    victim = rows_file(folder, data)
    shard = open_shards(str(data / "train")).shards[0]
    unfinished(victim, shard, 128 + int(shard.masked_offsets[8]) * 32 * 4)
    damaged = Path(f"{victim}.partial{'.sums' * (file == 'sums')}")
    if place is None:
        damaged.unlink()
    else:
        content = bytearray(damaged.read_bytes())
        content[place] ^= 1
        damaged.write_bytes(content)
    starts = starts_of_builds(monkeypatch)
    build(build_line(data, folder))
    assert starts == [start]
    assert contents(folder) == contents(cache)


def test_a_build_with_another_batch_size_continues_where_both_have_whole_batches(tmp_path):
    sums = RowSums(str(tmp_path / "sums"))
    rows = bytes(range(48))
    for end in (16, 32, 48):
        sums.append(end, rows[end - 16 : end])
    for size, expected in ((12, 48), (32, 32), (16, 32), (5, 0)):
        assert sums.undamaged(io.BytesIO(rows), lambda n: n, 100, size) == expected
    sums.close()


def unfinished(rows: Path, shard, size: int) -> None:
    """Cut a shard's rows to a size, as a build in batches of 4 that was killed leaves them."""
    content = rows.read_bytes()
    rows.unlink()
    Path(f"{rows}.partial").write_bytes(content[:size])
    sums = RowSums(f"{rows}.partial.sums")
    for first in range(0, shard.num_sequences, 4):
        last = min(first + 4, shard.num_sequences)
        begin, end = (128 + int(shard.masked_offsets[n]) * 32 * 4 for n in (first, last))
        if end <= size:
            sums.append(last, content[begin:end])
    sums.close()


def starts_of_builds(monkeypatch) -> list[int]:
    """Return a list that gets the first sequence of each build of a shard."""
    from bort.pretraining import teacher_cache

    starts = []
    rows_of = teacher_cache._teacher_rows

    def recording(shard, first, *rest):
        starts.append(first)
        return rows_of(shard, first, *rest)

    monkeypatch.setattr(teacher_cache, "_teacher_rows", recording)
    return starts


def test_a_link_in_place_of_unfinished_rows_is_not_followed(data, tmp_path, cache, capsys):
    folder = copy_of(cache, tmp_path / "cache")
    rows = rows_file(folder, data)
    rows.unlink()
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    Path(f"{rows}.partial").symlink_to(victim)
    with pytest.raises(SystemExit):
        build(build_line(data, folder))
    assert f"{rows}.partial: cannot be written" in capsys.readouterr().err
    assert victim.read_bytes() == b"mine"


def test_a_finished_shard_is_not_rebuilt(data, tmp_path, cache, monkeypatch):
    from bort.pretraining import teacher_cache

    folder = tmp_path / "cache"
    build(build_line(data, folder, data=data / "train"))
    made = []
    rows_of = teacher_cache._teacher_rows
    monkeypatch.setattr(teacher_cache, "_teacher_rows", lambda *a: made.append(a) or rows_of(*a))
    build(build_line(data, folder, data=f"{data}/train,{data}/test,{data}/train"))
    assert len(made) == 1
    assert contents(folder) == contents(cache)


@pytest.mark.distributed
def test_two_ranks_share_the_shards_and_write_the_same_bytes(data, tmp_path, cache):
    folder = tmp_path / "cache"
    said = horovodrun(2, "python", "scripts/build_teacher_cache.py", *build_line(data, folder))
    assert contents(folder) == contents(cache)
    assert said.count("sequences") == 1, "rank 0 alone reports"


# ---- refused -------------------------------------------------------------------------------------


def complaint(capsys, main, line: list[str]) -> str:
    """Return the one line that a program leaves on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == 1
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    return shown[0]


def refused(capsys, source: Path, folder: Path, **flags: object) -> str:
    """Return what training on a cache complains of."""
    from run_pretraining_distillation import main

    run = folder.parent / "run"
    line = arguments(source, ckpt_dir=run, teacher_cache=folder, **flags)
    said = complaint(capsys, main, line)
    assert not run.exists()
    return said


def keep_bytes(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


def short_rows(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def narrow_rows(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float16))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (os.remove, "missing, the rows of shard part-00000.npz; run"),
        (short_rows, "where shard part-00000.npz needs float32"),
        (narrow_rows, "holds float16"),
        (lambda path: keep_bytes(path, -1), "cannot be read"),
        (lambda path: keep_bytes(path, 100), "cannot be read"),
        (lambda path: keep_bytes(path, 0), "cannot be read"),
        (lambda path: path.write_text("no array"), "cannot be read"),
    ],
)
def test_damaged_rows_are_named_with_the_cure(data, tmp_path, cache, capsys, damage, what):
    folder = copy_of(cache, tmp_path / "cache")
    path = rows_file(folder, data)
    damage(path)
    said = refused(capsys, data, folder)
    assert said.startswith(f"error: {path}: ")
    assert what in said
    assert "run scripts/build_teacher_cache.py" in said
    path.unlink(missing_ok=True)
    build(build_line(data, folder))
    assert contents(folder) == contents(cache), "the cure cures"


def nan_projection(path: Path) -> None:
    with np.load(path) as arrays:
        weight, bias = arrays["weight"], arrays["bias"].copy()
    bias[-1] = np.nan
    np.savez(path, weight=weight, bias=bias)


def test_rows_that_are_not_finite_are_refused_whatever_their_sums(data, tmp_path, cache):
    folder = copy_of(cache, tmp_path / "cache")
    for path in folder.glob("*.npy"):
        np.save(path, np.full_like(np.load(path), np.inf))
        path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="--teacher_cache: has rows with values that are not fin"):
        one_step(data, tmp_path / "run", teacher_cache=folder)


def test_pickled_rows_are_never_unpickled(data, tmp_path, cache, capsys):
    folder = copy_of(cache, tmp_path / "cache")
    np.save(rows_file(folder, data), np.array([{}], dtype=object), allow_pickle=True)
    assert "cannot be read" in refused(capsys, data, folder)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (os.remove, "missing"),
        (lambda path: keep_bytes(path, -1), "cannot be read"),
        (lambda path: keep_bytes(path, 0), "cannot be read"),
        (lambda path: np.savez(path, weight=np.zeros((VOCAB_SIZE, 32))), "cannot be read"),
        (lambda path: np.savez(path, weight=np.zeros((9, 8)), bias=np.zeros(9)), "(9, 8)"),
        (nan_projection, "has values that are not finite"),
    ],
)
def test_a_damaged_projection_is_named_with_the_cure(data, tmp_path, cache, capsys, damage, what):
    folder = copy_of(cache, tmp_path / "cache")
    damage(folder / "projection.npz")
    said = refused(capsys, data, folder)
    assert said.startswith(f"error: {folder}/projection.npz: ")
    assert what in said
    assert f"delete {folder}, run scripts/build_teacher_cache.py again" in said


def test_what_is_no_cache_is_refused(data, tmp_path, cache, capsys):
    for folder in (tmp_path / "absent", data):
        assert f"--teacher_cache {folder}: is not a teacher cache; scripts/build" in refused(
            capsys, data, folder
        )
    said = refused(capsys, data, data / "train")
    assert said.startswith(f"error: {data / 'train'}: holds shards, not a teacher cache; name ")
    folder = copy_of(cache, tmp_path / "future")
    manifest = read_json(str(folder / "manifest.json"))
    write_json(str(folder / "manifest.json"), {**manifest, "format_version": 2})
    assert "another format version" in refused(capsys, data, folder)
    write_json(str(folder / "manifest.json"), {**manifest, "dtype": "x" * 5000})
    said = refused(capsys, data, folder)
    assert "is none of float16, float32; delete" in said
    assert len(said) < 1000
    (folder / "manifest.json").write_text("[]")
    assert "manifest.json: Expected `object`" in refused(capsys, data, folder)


def test_a_flipped_bit_of_the_rows_is_refused_on_every_call(data, cache, tmp_path, capsys):
    folder = copy_of(cache, tmp_path / "flipped")
    path = max(folder.glob("*.npy"), key=lambda one: one.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        assert f"{path}: its SHA-256 is not that in {path.stem}.json" in refused(
            capsys, data, folder
        )
    path.with_suffix(".json").unlink()  # as in caches of earlier versions
    make_run(data, teacher_cache=folder)


def test_a_cache_of_another_tokenizer_or_for_other_shards_is_refused(data, tmp_path, cache, capsys):
    write_shards(tmp_path / "foreign", sizes=(3,), seed=1, fingerprint="another")
    said = refused(capsys, data, cache, data=tmp_path / "foreign")
    assert f"--teacher_cache {cache}: made for shards of another tokenizer" in said
    write_shards(tmp_path / "new", sizes=(3,), seed=9)
    assert "missing, the rows of shard" in refused(capsys, data, cache, data=tmp_path / "new")
    foreign = f"{data}/train,{tmp_path}/foreign"
    said = complaint(capsys, build, build_line(data, tmp_path / "cache", data=foreign))
    assert f"--data {tmp_path}/foreign: made with another tokenizer than" in said


def test_a_build_names_the_folders_that_it_cannot_use(data, tmp_path, capsys, monkeypatch):
    for given, what in (
        (f"{data}/train,", "--data .*: has an empty name"),
        (f"{data}/train, {data}/none", r"error: /.*/none: not found; make the folder with"),
        (f"{data}/test, {data}/train", r"--data /.*/test: holds sequences of \d+ tokens, but the"),
    ):
        said = complaint(capsys, build, build_line(data, tmp_path / "cache", data=given))
        assert re.search(what, said)
        monkeypatch.setattr("bort.pretraining.run.MAX_LENGTH", 8)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("flags", "what"),
    [({"teacher_ckpt_dir": "other.params"}, "teacher_sha256"), ({"dtype": "float16"}, "dtype")],
)
def test_a_build_never_mixes_two_teachers_or_types(data, cache, capsys, flags, what):
    before = contents(cache)
    if "teacher_ckpt_dir" in flags:
        flags = {"teacher_ckpt_dir": data / flags["teacher_ckpt_dir"]}
    said = complaint(capsys, build, build_line(data, cache, **flags))
    assert said.startswith(f"error: {cache}: made with {what} ")
    assert "give another --output_dir or delete it" in said
    assert contents(cache) == before


def test_a_teacher_in_bfloat16_prints_its_cost_and_has_a_cache_of_its_own(
    data, tmp_path, cache, capsys, bfloat16
):
    low = {"teacher_dtype": "bfloat16"}
    said = complaint(capsys, build, build_line(data, cache, **low))
    assert f"error: {cache}: made with teacher_dtype float32, now bfloat16" in said
    folder = tmp_path / "cache"
    build(build_line(data, folder, **low))
    printed = capsys.readouterr().out.splitlines()
    cost = r"teacher in bfloat16: (\S+) nats of KL from float32's distributions, the same "
    (kl,) = re.match(cost, printed[0]).groups()
    assert 1e-7 < float(kl) < 1e-3
    exact, rounded = (np.load(rows_file(each, data)) for each in (cache, folder))
    assert 2**-11 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 2**-6
    # In training, too: of a live teacher all products, of a cache the projection.
    for flags in (live(data), {"teacher_cache": copy_of(cache, tmp_path / "copy")}):
        make_run(data, ckpt_dir=tmp_path / "run", **flags, **low).setup()
        assert capsys.readouterr().out.count("teacher in bfloat16: ") == 1


def test_a_full_disk_is_a_one_line_error_and_the_build_resumes(data, tmp_path, cache, monkeypatch):
    from bort.pretraining import teacher_cache

    folder = tmp_path / "cache"

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "_teacher_rows", full)
        with pytest.raises(UserError, match="No space left on device"):
            build.__wrapped__(build_line(data, folder))
    build(build_line(data, folder))
    assert contents(folder) == contents(cache)


# ---- every bit, one writer, one vocabulary -------------------------------------------------------


def test_a_flipped_bit_of_the_rows_is_named(data, tmp_path, cache, capsys):
    folder = copy_of(cache, tmp_path / "cache")
    path = rows_file(folder, data)
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(bytes(content))
    said = refused(capsys, data, folder)
    assert said.startswith(f"error: {path}: its SHA-256 is not that in {path.stem}.json;")
    path.write_bytes(bytes(content) + b"\0")
    assert "it has another size than its header says" in refused(capsys, data, folder)
    path.unlink()
    build(build_line(data, folder))
    assert contents(folder) == contents(cache)


def test_a_cache_of_an_earlier_version_is_used(data, tmp_path, cache):
    folder = copy_of(cache, tmp_path / "cache")
    for record in folder.glob("*.json"):
        if record.name != "manifest.json":
            record.unlink()
    make_run(data, ckpt_dir=tmp_path / "run", teacher_cache=folder)


def test_a_second_build_into_the_same_folder_is_refused(data, tmp_path, capsys):
    folder = tmp_path / "cache"
    with lock_folder(str(folder)):
        said = complaint(capsys, build, build_line(data, folder))
    assert f"--output_dir {folder}: process {os.getpid()} on " in said


def test_sequences_without_masks_have_no_rows(data, tmp_path, cache):
    write_shards(tmp_path / "shards", sizes=(6,), seed=5, masked=False)
    folder = tmp_path / "cache"
    build(build_line(data, folder, data=tmp_path / "shards"))
    (rows,) = folder.glob("*.npy")
    assert np.load(rows).shape == (0, 32)


@pytest.mark.parametrize("flag", ["teacher_ckpt_dir", "student_parameters"])
@pytest.mark.parametrize("beside", ["state.json", "model.json"])
def test_weights_of_another_tokenizer_are_refused_wherever_they_are_given(
    data, tmp_path, capsys, flag, beside
):
    """As a checkpoint says it, and as a converted model does."""
    from run_pretraining_distillation import main

    write_shards(tmp_path / "foreign", sizes=(3,), seed=1, fingerprint="another")
    run = make_run(data, ckpt_dir=tmp_path / "run", data=tmp_path / "foreign", num_steps=1)
    run.run()
    weights = tmp_path / "run" / "checkpoint_last"
    if beside == "model.json":
        copied = tmp_path / "converted"
        copied.mkdir()
        for name in ("model.params", "model.json"):
            shutil.copy(weights / name, copied)
        weights = copied
    given = {flag: weights}
    if flag == "teacher_ckpt_dir":
        given["teacher_model"] = SHAPE
        said = complaint(capsys, build, build_line(data, tmp_path / "cache", **given))
        assert "trained with another tokenizer than the one of the shards" in said
        assert "teacher, student and shards need the same vocabulary" in said
        assert not (tmp_path / "cache").exists()
    said = complaint(capsys, main, arguments(data, ckpt_dir=tmp_path / "new", **given))
    assert "trained with another tokenizer than the one of the shards" in said


def test_two_jobs_at_once_leave_one_valid_result(data, cache, tmp_path, monkeypatch):
    """The second writes another file and finishes first; then the first replaces its rows."""
    from bort.pretraining import teacher_cache

    folder = tmp_path / "cache"
    twice = []
    rows_of = teacher_cache._teacher_rows

    def second_meanwhile(*args):
        rows = rows_of(*args)
        yield next(rows)
        if not twice:
            twice.append(len(list(folder.glob("*.partial"))))
            again(*arguments[0])
            assert len(list(folder.glob("*.npy"))) == 1
        yield from rows

    arguments = []
    again = teacher_cache.cache_shard

    def recorded(*args):
        arguments.append(args)
        again(*args)

    monkeypatch.setattr(teacher_cache, "_teacher_rows", second_meanwhile)
    monkeypatch.setattr(teacher_cache, "cache_shard", recorded)
    build(build_line(data, folder))
    assert twice == [1]
    assert contents(folder) == contents(cache)
