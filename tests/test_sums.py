"""SHA256SUMS: files in subfolders, and lists that name files elsewhere."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from bort.bort import get_bort_model
from bort.errors import UserError
from bort.files import sha256_of
from bort.ose.known_errors import read_errors
from bort.parameters import load_parameters, save_parameters
from bort.shapes import Shape
from bort.sums import SUMS, check_sum, check_sums, listed, write_sums
from bort.tokenization import TokenizerSettings, load_tokenizer
from data.submission import check_submission
from data.tasks import get_task
from tests.fuzz.samples import write_bpe
from tests.wordpieces import write_vocabulary

TEST_DATA = Path(__file__).resolve().parents[1] / "test_data"


def test_files_in_subfolders_are_listed_as_sha256sum_reads_them(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "config.json").write_text("{}")
    model = tmp_path / "onnx" / "model.onnx"
    model.write_bytes(b"graph")
    write_sums(str(tmp_path))
    check_sums(str(tmp_path))
    subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, check=True, capture_output=True)
    model.write_bytes(b"grapf")
    with pytest.raises(UserError, match=r"onnx/model.onnx: its SHA-256 is not that in SHA256SUMS"):
        check_sums(str(tmp_path))


def test_a_list_may_not_name_files_outside_its_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name in ("../secret", str(secret), "a/../../secret", ".."):
        (folder / SUMS).write_text(f"{sha256_of(str(secret))}  {name}\n")
        with pytest.raises(UserError, match=r"model/.*: is (missing|not a file), but listed"):
            check_sums(str(folder))


def test_sums_of_other_files_stay_and_those_of_files_that_are_gone_do_not(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
        write_sums(str(tmp_path), [name])
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("changed")
    write_sums(str(tmp_path), ["c"])
    assert listed(str(tmp_path)) == ["b", "c"]
    check_sums(str(tmp_path), ["a", "c"])
    with pytest.raises(UserError, match="b: its SHA-256 is not that in SHA256SUMS"):
        check_sum(str(tmp_path / "b"))


def test_two_programs_write_one_list_after_each_other(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as the first does while it adds b
    second = threading.Thread(target=write_sums, args=(str(tmp_path), ["a"]))
    second.start()
    second.join(0.5)
    (tmp_path / SUMS).write_text(f"{sha256_of(str(tmp_path / 'b'))}  b\n")
    os.close(handle)
    second.join()
    assert listed(str(tmp_path)) == ["a", "b"]


def test_a_list_that_others_wrote_is_read_and_kept(tmp_path):
    (tmp_path / "theirs").write_text("a")
    made = ["sha256sum", "--binary", "theirs"]
    line = subprocess.run(made, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    (tmp_path / SUMS).write_text(f"# by hand,  of theirs\n{line}")
    check_sums(str(tmp_path))
    (tmp_path / "ours").write_text("b")
    write_sums(str(tmp_path), ["ours"])
    assert listed(str(tmp_path)) == ["ours", "theirs"]
    assert (tmp_path / SUMS).read_text().startswith("# by hand,  of theirs\n")
    (tmp_path / "theirs").write_text("c")
    with pytest.raises(UserError, match=r"theirs: its SHA-256 is not that in SHA256SUMS"):
        check_sum(str(tmp_path / "theirs"))


def test_a_list_of_find_and_one_in_capital_letters_are_compared_and_replaced(tmp_path):
    path = tmp_path / "model"
    path.write_text("a")
    digest = sha256_of(str(path))
    for line in (f"{digest}  ./model\n", f"{digest.upper()}  model\n"):
        path.write_text("a")
        (tmp_path / SUMS).write_text(line)
        check_sum(str(path))
        path.write_text("b")
        with pytest.raises(UserError, match=r"model: its SHA-256 is not that in SHA256SUMS"):
            check_sum(str(path))
        write_sums(str(tmp_path), ["model"])
        assert listed(str(tmp_path)) == ["model"]
        check_sums(str(tmp_path))


@pytest.mark.parametrize(
    "name", [b"two\nlines", b"back\\slash\\n", b"not \xff utf-8", "\U0001f600.tsv".encode(), b" "]
)
def test_any_name_of_a_file_can_be_listed(tmp_path, name):
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
    Path(path).write_text("content")
    write_sums(str(tmp_path), [os.fsdecode(name)])
    subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, check=True, capture_output=True)
    check_sum(path)
    Path(path).write_text("contenu")
    with pytest.raises(UserError, match="is not that in SHA256SUMS"):
        check_sum(path)


def sentencepiece(folder: Path) -> None:
    load_tokenizer(TokenizerSettings(sentencepiece=str(folder / "text.model")))


def parameters(folder: Path) -> None:
    network, _ = get_bort_model("bort_1_2_32_32", vocab=range(300))
    load_parameters(network, str(folder / "bort.params"))


def errors(folder: Path) -> None:
    read_errors(str(folder / "ose.csv"), [Shape(1, 2, 32, 16), Shape(2, 2, 32, 16)])


def leaderboard_file(folder: Path) -> None:
    task = get_task("SST-2")
    check_submission(folder / "SST-2.tsv", task, "test", task.read(TEST_DATA, "test").examples)


def task_file(folder: Path) -> None:
    get_task("RTE").read(folder, "dev")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("text.model", sentencepiece), ("bort.params", parameters), ("ose.csv", errors),
        ("SST-2.tsv", leaderboard_file), ("dev.tsv", task_file),
    ],
)  # fmt: skip
def test_what_reads_a_listed_file_notices_a_flipped_bit(tmp_path, name, read):
    path = tmp_path / name
    if name == "text.model":
        shutil.copy(TEST_DATA / "sample_text.model", path)
    elif name == "bort.params":
        network, _ = get_bort_model("bort_1_2_32_32", vocab=range(300))
        save_parameters(network, str(path))
    elif name == "ose.csv":
        path.write_text("architecture,error\nbort_1_2_32_16,3.5\nbort_2_2_32_16,3.25\n")
    elif name == "SST-2.tsv":
        rows = len(get_task("SST-2").read(TEST_DATA, "test").examples)
        path.write_text("index\tprediction\n" + "".join(f"{n}\t1\n" for n in range(rows)))
    else:
        shutil.copy(TEST_DATA / "glue" / "RTE" / name, path)
    write_sums(str(tmp_path), [name])
    read(tmp_path)
    content = bytearray(path.read_bytes())
    # A digit, a value, a letter of a text.
    places = {"bort.params": len(content) // 2, "dev.tsv": content.find(b" ") + 1}
    content[places.get(name, -2)] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: its SHA-256 is not that in SHA256SUMS"):
        read(tmp_path)
    (tmp_path / SUMS).unlink()
    read(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "vocab.txt", "tokenizer.json"])
def test_vocabularies_that_flags_name_are_compared_with_their_sums(tmp_path, name):
    if name in ("vocab.json", "merges.txt"):
        write_bpe(tmp_path)
        flags = TokenizerSettings(
            vocab_file=str(tmp_path / "vocab.json"), bpe_ranks=str(tmp_path / "merges.txt")
        )
    else:
        load_tokenizer(TokenizerSettings(vocab_file=str(write_vocabulary(tmp_path)))).save(
            str(tmp_path)
        )
        flags = TokenizerSettings(vocab_file=str(tmp_path / name))
    write_sums(str(tmp_path))
    load_tokenizer(flags)
    path = tmp_path / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UserError, match=f"{name}: its SHA-256 is not that in SHA256SUMS"):
        load_tokenizer(flags)
