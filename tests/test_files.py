from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import stat
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from bort import files
from bort.errors import UserError
from bort.inference.prediction_files import open_output
from bort.plots import figure_file
from data.submission import write_archive
from tests.conftest import ROOT


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# ---- writing -------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with files.atomic_write(str(path)) as handle:
        handle.write("né")
        assert path.read_text() == "old"
    assert path.read_bytes() == "né".encode()
    assert left(tmp_path) == ["x.txt"]


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with contextlib.suppress(RuntimeError), files.atomic_write(str(path)) as handle:
        handle.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert left(tmp_path) == ["x.txt"]


def test_a_full_disk_is_a_user_error_and_leaves_nothing(tmp_path):
    path = str(tmp_path / "x.txt")

    def fill() -> None:
        with files.atomic_write(path) as handle:
            handle.write("new")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"x.txt: cannot be written \(No space left"):
        fill()
    assert left(tmp_path) == []


def test_an_error_of_another_file_is_not_taken_for_this_one(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_write(str(tmp_path / "x")):
        os.stat(tmp_path / "missing")


def test_a_private_file_stays_private(tmp_path):
    path = tmp_path / "answers"
    path.touch()
    path.chmod(0o640)
    with files.atomic_write(str(path)) as file:
        file.write("new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o640)


def test_symbolic_links_are_followed(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    files.write_json(str(tmp_path / "link"), [1])
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "target").read_text()) == [1]


def test_a_fifo_is_written_to_and_stays(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    with files.atomic_write(str(path)) as handle:
        handle.write("through")
    reader.join()
    assert read == ["through"]
    assert path.is_fifo()


@pytest.mark.parametrize(
    ("name", "message"),
    [(".", "is a folder"), ("no/x", "there is no folder"), ("fifo", "not a regular file")],
)
def test_what_cannot_be_replaced_is_refused(tmp_path, name, message):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match=message), files.atomic_path(str(tmp_path / name)):
        pass


def test_a_planted_link_at_a_guessed_temporary_name_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("x.tmp", ".x.tmp"):
        (tmp_path / name).symlink_to(victim)
    with files.atomic_write(str(tmp_path / "x")) as handle:
        handle.write("new")
    assert victim.read_text() == "mine"


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with contextlib.suppress(RuntimeError), files.new_folder(str(tmp_path / "a")) as folder:
        Path(folder, "file").touch()
        raise RuntimeError
    assert left(tmp_path) == []
    with files.new_folder(str(tmp_path / "a")) as folder:
        Path(folder, "file").touch()
    assert left(tmp_path / "a") == ["file"]
    with pytest.raises(UserError, match="already exists"), files.new_folder(str(tmp_path / "a")):
        pass


def test_the_folders_above_a_new_folder_stay_with_it_alone(tmp_path):
    path = str(tmp_path / "new" / "below" / "a")
    with contextlib.suppress(RuntimeError), files.new_folder(path):
        raise RuntimeError
    assert left(tmp_path) == []
    with files.new_folder(path):
        pass
    assert left(Path(path)) == []


def test_a_file_of_a_new_folder_that_cannot_be_written_is_named_as_it_was_to_be(tmp_path):
    said = f"^{tmp_path}/a/file: cannot be written"
    with pytest.raises(UserError, match=said), files.new_folder(f"{tmp_path}/a") as folder:
        raise UserError(f"{folder}/file: cannot be written (No space left on device)")
    assert left(tmp_path) == []


# ---- locks ---------------------------------------------------------------------------------------

HOLDER = """
import sys
from bort.files import lock_folder

with lock_folder(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_by_name_until_the_first_has_ended(tmp_path):
    folder = str(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        message = f"--ckpt_dir {folder}: process {holder.pid} on .* is writing there"
        with pytest.raises(UserError, match=message), files.lock_folder(folder, "--ckpt_dir"):
            pass
        holder.kill()
    with files.lock_folder(folder):
        Path(folder, "file").touch()
    assert left(Path(folder)) == ["file"]


def test_what_a_killed_writer_of_a_new_folder_left_is_removed(tmp_path):
    dead, alive = 0x3FFFFFFF, os.getppid()
    kept = [f".a.{alive:08x}01234567.tmp", f".ab.{dead:08x}01234567.tmp", ".a.tmp", ".a.b.tmp"]
    for name in [f".a.{dead:08x}01234567.tmp", *kept]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    with files.new_folder(str(tmp_path / "a")) as folder:
        Path(folder, "file").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a", *kept])


def test_an_empty_folder_is_not_left_behind(tmp_path):
    (tmp_path / "there").mkdir()
    for folder in ("run", "new/below/run", "there"):
        with files.lock_folder(str(tmp_path / folder)):
            pass
    assert left(tmp_path) == ["there"]
    too_long = str(tmp_path / "new" / "below" / ("x" * 300))
    with pytest.raises(UserError, match="too long"), files.lock_folder(too_long):
        pass
    assert left(tmp_path) == ["there"]


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    dead, alive = (f"{pid:08x}01234567" for pid in (ended_process(), os.getppid()))
    left_over = [
        f".part-00000.npz.{dead}.tmp",
        f".step-0000003.{dead}.tmp/model.params",
        f"step-0000002/.state.json.{dead}.tmp",
        f"step-0000002/tokenizer/.vocab.json.{dead}.tmp",
    ]
    kept = [
        f".model.onnx.{alive}.tmp",  # of an export into this folder, which has no lock
        "notes.tmp",
        ".mine.tmp",
        f".x.{dead}.tmp.bak",
        f".{dead}.tmp",
        f"run/.config.json.{dead}.tmp",  # the folder of another run
        "run/.lock",
        f"a/b/c/.too_deep.{dead}.tmp",
    ]
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").mkdir()
    beyond_a_link = tmp_path / "elsewhere" / f".x.{dead}.tmp"
    beyond_a_link.touch()
    for name in [*left_over, *kept]:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / f".checkpoint_last.{dead}.tmp").symlink_to("step-0000002")
    with files.lock_folder(str(tmp_path / "folder")):
        pass
    folder = tmp_path / "folder"
    found = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    assert {str(path.relative_to(folder)) for path in found} == {*kept, "link"}
    assert beyond_a_link.exists()


def write_predictions(path: str) -> None:
    with open_output(path) as file:
        file.write(b"positive")


def write_plot(path: str) -> None:
    with figure_file(path, 1, 1):
        pass


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("out.txt", write_predictions), ("out.png", write_plot),
        ("out.zip", lambda path: write_archive(Path(path), [])),
    ],
)  # fmt: skip
def test_an_output_that_is_written_again_removes_what_a_killed_writer_left(tmp_path, name, write):
    if name == "out.png":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    dead, lives = "7fffffff00000000", f"{os.getppid():08x}00000000"
    kept = [f".{name}.{lives}.tmp", f".other.{dead}.tmp", f"{name}.{dead}.tmp"]
    for each in (f".{name}.{dead}.tmp", *kept):
        (tmp_path / each).touch()
    write(str(tmp_path / name))
    assert left(tmp_path) == sorted([name, *kept])


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_a_file_that_is_the_output_already_is_added_to_and_stays(tmp_path, name):
    program = f"""
from bort import files

print("before")
with files.atomic_write({name!r}) as file:
    file.write("written\\n")
print("after")
"""
    output = tmp_path / "output"
    with open(output, "w") as opened:
        opened.write("first\n")
        opened.flush()
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=opened, check=True)
    assert output.read_text() == "first\nbefore\nwritten\nafter\n"
    assert left(tmp_path) == ["output"]


@pytest.mark.parametrize("writer", ["atomic_path", "new_folder"])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, writer):
    program = f"""
import os, signal
from bort import files

with files.{writer}({str(tmp_path / "run" / "made")!r}) as temporary:
    open(temporary if {writer!r} == "atomic_path" else temporary + "/x", "w").write("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "run").mkdir()
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert len(left(tmp_path / "run")) == 1
    with files.lock_folder(str(tmp_path / "run")):
        assert left(tmp_path / "run") == [".lock"]


def test_a_folder_that_cannot_be_made_is_a_one_line_error(tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "run")
    message = "cannot be written"
    with pytest.raises(UserError, match=message), files.lock_folder(folder, "--ckpt_dir"):
        pass


# ---- reading -------------------------------------------------------------------------------------


class Entry(NamedTuple):
    file: str
    size: int


@dataclass
class Listing:
    entries: list  # type: ignore[type-arg]
    total: int


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"file": "a"}', "Expected `array`"),
        ('["a", "b"]', "Expected `int`"),
        ('["a", ' + "9" * 5000 + "]", r"JSON|out of range|Expected"),
    ],
)
def test_json_of_another_shape_is_refused(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        files.read_json_as(str(path), Entry)


def test_json_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'["\xff", 1]')
    for read in (files.read_json, lambda name: files.read_json_as(name, Entry)):
        with pytest.raises(UserError, match=r"x\.json: "):
            read(str(path))
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        files.read_json(str(path))


def test_json_nested_just_not_too_deeply_to_be_parsed_is_refused(tmp_path):
    path = tmp_path / "x.json"
    for depth in range(800, 1000):
        nested = "[" * depth + "]" * depth
        path.write_text(f'{{"{files.OWN_SUM}": "x", "entries": {nested}, "total": 1}}')
        for read in (files.read_json, lambda name: files.read_json_as(name, Listing)):
            with pytest.raises(UserError, match=r"nested too deeply|its content is not"):
                read(str(path))


def test_typed_json(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(str(path), {"entries": [1], "total": 2, "of a later version": 3})
    assert files.read_json_as(str(path), Listing) == Listing([1], 2)


def test_every_flipped_bit_of_json_is_named_or_changes_nothing(tmp_path):
    path = tmp_path / "x.json"
    content = {"entries": [1, 2.5, None], "total": 4, "name": "na\u00efve"}
    files.write_json(str(path), content)
    written = path.read_bytes()
    harmless = 0
    for place in range(8 * len(written)):
        damaged = bytearray(written)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            read = files.read_json(str(path))
            assert {name: read[name] for name in content} == content
            harmless += 1  # in the key of the sum, or in white space
        with contextlib.suppress(UserError):
            assert files.read_json_as(str(path), Listing) == Listing([1, 2.5, None], 4)
    assert harmless < len(written)


def test_json_that_was_edited_is_named_and_its_sum_may_be_left_out(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(str(path), {"entries": [1], "total": 4})
    summed = json.loads(path.read_text())
    path.write_text(json.dumps({**summed, "total": 5}, indent=7, sort_keys=True))
    for read in (files.read_json, lambda name: files.read_json_as(name, Listing)):
        with pytest.raises(UserError, match=r"x\.json: its content is not .* delete that line"):
            read(str(path))
    assert files.read_json(str(path), verify=False)["total"] == 5
    files.write_json(str(path), {"entries": [1], "total": 4})
    edited = path.read_text().replace("4", "5", 1)
    path.write_text(edited)
    with pytest.raises(UserError, match="or delete that line and the comma before it to accept"):
        files.read_json(str(path))
    path.write_text(edited[: edited.rindex(",")] + "\n}\n")  # as the message says
    assert files.read_json_as(str(path), Listing) == Listing([1], 5)
    path.write_text(json.dumps(summed, indent=7, sort_keys=True))  # reformatted
    assert files.read_json_as(str(path), Listing) == Listing([1], 4)
    files.write_json(str(path), {"entries": [1], "total": 5}, with_sum=False)
    assert json.loads(path.read_text()) == {"entries": [1], "total": 5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "key 'a' is on line 1 and again on line 3"),
        ("a: 1\n<<: {a: 2}\n", r"line 2: merge keys \(<<\) are not allowed"),
        ("a: &x [1]\nb: *x\n", r"line 2: aliases \(\*name\) are not allowed"),
        ("a: [", "is not YAML"),
        ("[" * 50_000, "nested too deeply"),
        ("? [1]\n: 2\n", "a key must be a plain value"),
        ("#" * (files.MAX_YAML_BYTES + 1), "a YAML file may have"),
    ],
)
def test_yaml_that_is_not_plain_is_refused(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        files.read_yaml(str(path))


def test_plain_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("\ufefflr: [1e-5, 0.1]\nseed: [1]\n", encoding="utf-8")
    assert files.read_yaml(str(path)) == {"lr": ["1e-5", 0.1], "seed": [1]}


@pytest.mark.parametrize(
    "program",
    [
        "finetune_classifier --task_name CB --output_dir",
        "run_pretraining_distillation --data absent --ckpt_dir",
        "create_pretraining_data --input_file absent --output_dir",
        "scripts.build_teacher_cache --data a --teacher_model b --teacher_ckpt_dir c --output_dir",
    ],
)
def test_a_folder_below_a_file_is_refused_before_anything_is_read(
    tmp_path, monkeypatch, capsys, program
):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    name, *flags = program.split()
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit):
        main([*flags, "file/run"])
    folder = "file/run/CB" if "CB" in flags else "file/run"
    message = f"error: {flags[-1]} {folder}: {tmp_path / 'file'} is not a folder; name another one"
    assert capsys.readouterr().err.splitlines() == [message]


def test_the_lines_of_a_small_file_take_little_memory(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_bytes(b"one\ntwo")
    tracemalloc.start()
    try:
        assert files.lines_of(str(tmp_path / "metrics.jsonl")) == [b"one\n", b"two"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20  # bytes
    monkeypatch.setattr(files, "WHOLE_BYTES", 4)  # of a line: a long run may write more of them
    assert files.lines_of(str(tmp_path / "metrics.jsonl")) == [b"one\n", b"two"]
    (tmp_path / "metrics.jsonl").write_bytes(b"one\nthree\nfour\n")
    assert files.lines_of(str(tmp_path / "metrics.jsonl")) == [b"one\n", b"thre"]


def test_files_below_links_are_found_once(tmp_path):
    (tmp_path / "b" / "run").mkdir(parents=True)
    (tmp_path / "b" / "run" / "metrics.json").touch()
    (tmp_path / "b" / "metrics.json").symlink_to("run/metrics.json")
    (tmp_path / "a").symlink_to("b/run")
    (tmp_path / "b" / "run" / "back").symlink_to("../..")
    (tmp_path / "c").symlink_to("missing")
    assert [parent for parent, _, _ in files.walk(tmp_path)] == [
        str(tmp_path), str(tmp_path / "a"), str(tmp_path / "b"),
    ]  # fmt: skip
    assert files.files_named("metrics.json", tmp_path) == [str(tmp_path / "a" / "metrics.json")]
    with pytest.raises(FileNotFoundError):
        files.files_named("metrics.json", tmp_path / "missing")
