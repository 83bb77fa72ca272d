"""verify.py on an intact sample of every format, and on each with one byte changed."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from bort.errors import UserError
from bort.files import read_json, write_json
from bort.wordpiece import read_wordpiece
from scripts import verify
from scripts.verification import checks
from scripts.verification.report import verify as verify_folder
from tests.fuzz import samples
from tests.wordpieces import write_vocabulary

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

# What is written, the kind that is named, and the files of which one byte is changed.
KINDS = {
    "shards": ("shards", ["part-00001.npz", "tokenizer/tokenizer.model", "manifest.json"]),
    "cache": ("teacher cache", ["*.npy", "projection.npz", "manifest.json"]),
    "run": ("pretraining run", ["metrics.jsonl", "config.json"]),
    "run/step-0000004": (
        "checkpoint",
        ["model.params", "trainer.npz", "state.json", "model.json", "tokenizer/tokenizer.model"],
    ),
    "tuned/SST-2": (
        "fine-tuning run",
        ["best.params", "best.json", "tokenizer/tokenizer.model", "metrics.json", "config.json",
         "dev_predictions.jsonl", "metrics.jsonl", "SST-2.tsv"],
    ),
    "tuned/encoded": ("encoded cache", ["*.npz"]),
    "exported": (
        "saved model",
        ["best.params", "best.onnx", "int8/best.onnx", "int8/best-0000.params",
         "int8/best-symbol.json", "int8/best.json"],
    ),
    "sweep": ("sweep", ["sweep.json", "sweep.tsv"]),
    "sweep/lr=0.001/SST-2": ("fine-tuning run", ["best.params"]),
    "agora/SST-2": (
        "Agora run",
        ["journal.jsonl", "agora.json", "best.params", "config.json", "images.tsv",
         "dev_predictions.jsonl"],
    ),
    "ose": ("OSE search", ["journal-0.jsonl", "ose.json", "ose.csv"]),
    "huggingface": (
        "Hugging Face export",
        ["model.safetensors", "config.json", "tokenizer.model", "tokenizer.json"],
    ),
    "onnx": (
        "ONNX export for Hugging Face",
        ["onnx/model.onnx", "onnx/model_quantized.onnx", "config.json", "tokenizer.json"],
    ),
    "submission/glue.zip": ("leaderboard archive", [""]),
    "submission/runs": ("submission", ["SST-2.tsv"]),
    "answers/SST-2": ("submission", ["dev_predictions.jsonl"]),
    "plain": ("saved model", ["bort.params"]),
    "masked-lm": ("saved model", ["bort.params", "bort.onnx"]),
    "lone/bort.onnx": ("ONNX export", [""]),
    "data/CoLA": ("task data", ["train.tsv"]),
    "data/AX-b": ("task data", ["AX-b.jsonl"]),
}  # fmt: skip
EVERY_FILE = [(name, file) for name, (_, files) in KINDS.items() for file in files]


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """Return a folder with an intact sample of every format; not to be changed."""
    folder = tmp_path_factory.mktemp("intact")
    samples.write_shards(folder / "shards")
    samples.write_pretraining(folder / "run", folder / "shards")
    samples.write_teacher_cache(folder / "cache", folder / "shards", folder / "run")
    samples.write_finetuning(folder / "tuned")
    samples.write_int8(folder / "exported")
    samples.write_onnx(folder / "exported", classifier=False)
    samples.write_sweep(folder / "sweep", folder / "tuned" / "SST-2")
    samples.write_agora(folder / "agora")
    samples.write_ose(folder / "ose")
    samples.write_huggingface(folder / "huggingface")
    samples.write_onnx_folder(folder / "onnx")
    samples.write_submission(folder / "submission")
    samples.write_answers(folder / "answers", folder / "tuned" / "SST-2" / "best.params")
    samples.write_plain_parameters(folder / "plain", folder / "run")
    write_masked_lm(folder / "masked-lm", folder / "run" / "step-0000006")
    (folder / "lone").mkdir()
    shutil.copy(folder / "masked-lm" / "bort.onnx", folder / "lone")
    samples.write_task_data(folder / "data" / "CoLA")
    samples.write_task_data(folder / "data" / "AX-b", "superglue/AX-b")
    return folder


def write_masked_lm(folder: Path, checkpoint: Path) -> None:
    """Write a pretrained model as the released one lies in model/, with an ONNX file beside it."""
    folder.mkdir()
    for suffix in ("params", "json"):
        shutil.copy(checkpoint / f"model.{suffix}", folder / f"bort.{suffix}")
    shutil.copytree(checkpoint / "tokenizer", folder / "tokenizer")
    samples.write_onnx(folder, classifier=False)


def table(capsys, path: Path) -> tuple[int, dict[str, list[str]]]:
    """Run the program; returns its result and [kind, state, details] by path."""
    found = verify.main([str(path)])
    header, *lines = capsys.readouterr().out.splitlines()
    columns = [header.index(name) for name in ("KIND", "STATE", "DETAILS")]
    cells = [[line[i:j].strip() for i, j in zip([0, *columns], [*columns, None])] for line in lines]
    return found, {name: rest for name, *rest in cells}


def test_every_valid_folder_is_named_and_complete(intact, capsys):
    status, rows = table(capsys, intact)
    assert status == 0
    for name, (kind, _) in KINDS.items():
        assert rows[str(intact / name)][:2] == [kind, "complete"], name


def test_a_run_without_a_test_set_is_complete(intact, tmp_path, capsys):
    copy = tmp_path / "SST-2"
    shutil.copytree(intact / "tuned/SST-2", copy)
    (copy / "SST-2.tsv").unlink()
    path = copy / "metrics.json"
    metrics = read_json(str(path))
    del metrics["answers"]["test"]
    write_json(str(path), metrics)
    sums = copy / "SHA256SUMS"
    kept = [line for line in sums.read_text().splitlines() if "SST-2.tsv" not in line]
    sums.write_text("\n".join(kept) + "\n")
    assert table(capsys, copy)[1][str(copy)][:2] == ["fine-tuning run", "complete"]


@pytest.mark.parametrize("name", ["run", "tuned/SST-2"])
def test_a_run_that_was_stopped_before_its_first_line_is_unfinished(intact, tmp_path, capsys, name):
    copy = tmp_path / Path(name).name
    copy.mkdir()
    shutil.copy(intact / name / "config.json", copy)
    (copy / "metrics.jsonl").touch()
    assert table(capsys, copy)[1][str(copy)][1] == "unfinished"
    shutil.copytree(intact / name, copy, symlinks=True, dirs_exist_ok=True)
    (copy / "metrics.jsonl").write_bytes(b"")
    assert table(capsys, copy)[1][str(copy)][1] == "damaged"


@pytest.mark.parametrize(
    ("source", "name"),
    [("superglue/AX-g/AX-g.jsonl", "AX-g.jsonl"), ("glue/AX/diagnostic.tsv", "AX.tsv")],
)
def test_task_data_without_a_record_of_its_download_is_no_submission(tmp_path, source, name):
    shutil.copy(samples.TEST_DATA / source, tmp_path / name)
    with pytest.raises(UserError, match="holds nothing that this project writes"):
        verify_folder(str(tmp_path))


@pytest.mark.parametrize(("name", "file"), EVERY_FILE)
def test_one_changed_byte_is_detected(intact, tmp_path, capsys, name, file):
    source, copy = intact / name, tmp_path / Path(name).name
    if source.is_dir():
        shutil.copytree(source, copy, symlinks=True)
        path = next(copy.glob(file))
    else:
        path = copy = shutil.copyfile(source, copy)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    status, rows = table(capsys, copy)
    damaged = [rest for rest in rows.values() if rest[1] == "damaged"]
    assert status == len(damaged) > 0
    assert path.name in damaged[0][2] or path.parent.name == "tokenizer"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *(("shards", "part-00000.npz"), ("run/step-0000004", "model.params"), ("cache", "*.npy")),
        *(("tuned/SST-2", "SST-2.tsv"), ("tuned/SST-2", "best.params")),
    ],
)
def test_a_missing_file_is_detected(intact, tmp_path, capsys, name, file):
    copy = tmp_path / Path(name).name
    shutil.copytree(intact / name, copy, symlinks=True)
    next(copy.glob(file)).unlink()
    assert table(capsys, copy)[0] == 1


def test_a_classifier_without_its_tokenizer_is_damaged(intact, tmp_path, capsys):
    shutil.copytree(intact / "tuned/SST-2", tmp_path / "SST-2")
    shutil.rmtree(tmp_path / "SST-2" / "tokenizer")
    status, rows = table(capsys, tmp_path)
    assert status == 1
    assert "best.params: has no tokenizer/ beside it" in rows[str(tmp_path / "SST-2")][2]


def test_a_wordpiece_alone_is_a_tokenizer(tmp_path):
    read_wordpiece(write_vocabulary(tmp_path)).save(str(tmp_path / "tokenizer"))
    (row,) = verify_folder(str(tmp_path / "tokenizer"))
    assert (row.what, row.state) == ("tokenizer", "complete")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    (row,) = verify_folder(str(tmp_path / "tokenizer"))
    assert (row.what, row.state) == ("tokenizer", "damaged")


def test_shards_in_the_folder_of_a_run_are_checked(intact, tmp_path):
    shutil.copytree(intact / "run", tmp_path / "run")
    shutil.copytree(intact / "shards", tmp_path / "run", dirs_exist_ok=True)
    found = [row for row in verify_folder(str(tmp_path)) if row.path == str(tmp_path / "run")]
    assert [(row.what, row.state) for row in found] == [
        *(("pretraining run", "complete"), ("shards", "complete"))
    ]
    (tmp_path / "run/part-00000.npz").write_bytes(b"damaged")
    assert [row.state for row in verify_folder(str(tmp_path))].count("damaged") == 1


@pytest.mark.parametrize(
    ("config", "is_known"),
    [
        ({"model_type": "t5"}, False),
        ({"model_type": "gpt2"}, False),
        ({"model_type": "bert", "architectures": ["BertForQuestionAnswering"]}, False),
        ({"architectures": ["DistilBertForSequenceClassification"]}, False),
        ({"model_type": "bert", "architectures": ["BertModel"]}, True),
        ({"model_type": "bert", "architectures": []}, True),
        ({"model_type": "bert"}, True),
    ],
)
def test_a_network_of_another_family_or_head_is_not_damaged(tmp_path, config, is_known):
    write_json(str(tmp_path / "config.json"), config, with_sum=False)
    for name in ("model.safetensors", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes(b"")
    if is_known:
        assert [row.state for row in verify_folder(str(tmp_path))] == ["damaged"]
    else:
        with pytest.raises(UserError, match="holds nothing that this project writes"):
            verify_folder(str(tmp_path))


def test_what_is_not_finished_is_reported(intact, tmp_path, capsys):
    shutil.copytree(intact / "tuned" / "SST-2", tmp_path / "SST-2")
    (tmp_path / "SST-2" / "metrics.json").unlink()
    shutil.copytree(intact / "run", tmp_path / "run", symlinks=True)
    shutil.copytree(tmp_path / "run" / "step-0000004", tmp_path / "SST-2" / "step-0000004")
    shutil.rmtree(tmp_path / "run" / "step-0000006")
    for link in ("checkpoint_last", "checkpoint_best"):
        (tmp_path / "run" / link).unlink()
    fit = tmp_path / "agora" / "fits" / "tmp"
    shutil.copytree(tmp_path / "run" / "step-0000004", fit / "step-0000004")
    write_json(str(fit / "config.json"), {"Fit": {"lr": 1e-3}})
    status, rows = table(capsys, tmp_path)
    assert status == 3
    assert rows[str(fit)][:2] == ["fit of Agora", "unfinished"]
    assert rows[str(tmp_path / "SST-2")][:2] == ["fine-tuning run", "unfinished"]
    assert rows[str(tmp_path / "run")] == ["pretraining run", "unfinished", "step 4 of 6"]


def test_folders_behind_links_are_checked_once(intact, tmp_path, capsys):
    elsewhere, runs = tmp_path / "disk" / "SST-2", tmp_path / "runs"
    shutil.copytree(intact / "tuned" / "SST-2", elsewhere)
    runs.mkdir()
    (runs / "SST-2").symlink_to(elsewhere, target_is_directory=True)
    (runs / "again").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "loop").symlink_to(runs, target_is_directory=True)
    status, rows = table(capsys, runs)
    assert (status, list(rows)) == (0, [str(runs / "SST-2")])
    (elsewhere / "best.params").write_bytes(b"")
    status, rows = table(capsys, runs)
    assert (status, rows[str(runs / "SST-2")][1]) == (1, "damaged")


def test_links_hide_nothing_that_is_below_the_folder(intact, tmp_path, capsys):
    """A link that is named as a part of a run may lead to a run of its own."""
    for name in ("runs/a", "runs/b"):
        shutil.copytree(intact / "tuned" / "SST-2", tmp_path / name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.json").write_text("{}")
    shutil.rmtree(tmp_path / "runs" / "a" / "tensorboard")
    (tmp_path / "runs" / "a" / "tensorboard").symlink_to("../b", target_is_directory=True)
    (tmp_path / "runs" / "a" / "link").symlink_to("../b", target_is_directory=True)
    (tmp_path / "runs" / "up").symlink_to("..", target_is_directory=True)
    (tmp_path / "runs" / "self").symlink_to("self", target_is_directory=True)
    status, rows = table(capsys, tmp_path / "runs")
    assert (status, list(rows)) == (0, [str(tmp_path / "runs" / name) for name in "ab"])


@pytest.mark.parametrize(
    ("journal", "measured"),
    [("", 0), ('{"sea', 0), ('{"search": {}}\n', 0), ('{"search": {}}\n{"candidate": "a"}\n', 1)],
)
def test_measurements_of_a_search_that_was_stopped(tmp_path, journal, measured):
    (tmp_path / "journal-0.jsonl").write_text(journal)
    (row,) = verify_folder(str(tmp_path))
    assert (row.state, row.detail) == (
        "unfinished",
        f"{measured} measurements; run its command again",
    )


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("second", "message"),
    [("SST-2.tsv", "has SST-2.tsv twice"), ("CB.jsonl", "mixes the files of glue and superglue")],
)
def test_an_archive_that_no_leaderboard_takes(tmp_path, second, message):
    contents = {"SST-2.tsv": "index\tprediction\n0\t1\n", "CB.jsonl": ""}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("SST-2.tsv", second):
            archive.writestr(name, contents[name])
    (row,) = verify_folder(str(tmp_path / "x.zip"))
    assert row.state == "damaged"
    assert message in row.detail


def test_an_archive_of_others_is_left_out_and_a_damaged_one_named(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "SST-2.tsv").write_text("index\tprediction\n0\t1\n")
    for name, member in (("photos", "a.jpg"), ("torn", "\u00e9.tsv")):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(member, "x")
    torn = tmp_path / "torn.zip"
    torn.write_bytes(torn.read_bytes().replace("\u00e9".encode(), b"\xff\xfe"))
    (tmp_path / "absent.zip").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe.zip")
    rows = {Path(row.path).name: row.state for row in verify_folder(str(tmp_path))}
    damaged = dict.fromkeys(("absent.zip", "pipe.zip", "torn.zip"), "damaged")
    assert rows == {**damaged, "runs": "complete"}
    (row,) = verify_folder(str(tmp_path / "photos.zip"))
    assert row.detail == f"{tmp_path / 'photos.zip'}: a.jpg: no file of a leaderboard"


def test_a_score_that_no_float_holds_is_damage(tmp_path):
    path = tmp_path / "dev_predictions.jsonl"
    path.write_text(f'{{"scores": [1{"0" * 400}]}}\n')
    with pytest.raises(UserError, match=r"dev_predictions\.jsonl:1: int too large"):
        checks.check_answers(path)


def test_any_name_of_a_folder_is_one_line(intact, tmp_path, capsys):
    for name in (b"two\nlines", b"esc\x1b[31m", b"not \xff utf-8", "\u00e9\u6f22".encode()):
        path = os.path.join(os.fsencode(tmp_path), name)
        shutil.copytree(os.fsencode(intact / "submission" / "runs"), path)
    status, rows = table(capsys, tmp_path)
    assert status == 0
    names = ["esc\\x1b[31m", "not \\udcff utf-8", "two\\nlines", "\u00e9\u6f22"]
    assert sorted(rows) == sorted(str(tmp_path / name) for name in names)


def test_nothing_is_written(intact, capsys):
    def state():
        files = [path for path in intact.rglob("*") if path.is_file() and path.name[0] != "."]
        return sorted((str(path), path.stat().st_mtime_ns) for path in files)

    before = state()
    table(capsys, intact)
    assert state() == before


@pytest.mark.parametrize("name", ["missing", "empty", "file.txt"])
def test_files_of_other_programs_are_a_one_line_error(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(SystemExit) as stopped:
        verify.main([str(tmp_path / name)])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line


@pytest.mark.parametrize("steps", [{}, "8", None])
def test_a_number_of_steps_of_another_type_is_refused(tmp_path, steps):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"OptimizerSettings": {"num_steps": steps}}))
    with pytest.raises(UserError, match=r"has no OptimizerSettings.num_steps of type int"):
        checks.setting(path, "OptimizerSettings", "num_steps", int)
