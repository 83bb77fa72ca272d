"""Leaderboard files and archives: what is gathered, filled, and refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from bort.errors import UserError
from data.submission import check_submission, gather, write_archive, write_submission
from data.task import Example
from data.tasks import get_task, task_names
from scripts import make_submission

TEST_DATA = Path(__file__).resolve().parents[2] / "test_data"
GLUE_ROWS = {
    "CoLA": 1063,
    "SST-2": 1821,
    "MRPC": 1725,
    "STS-B": 1379,
    "QQP": 390965,
    "MNLI-m": 9796,
    "MNLI-mm": 9847,
    "QNLI": 5463,
    "RTE": 3000,
    "WNLI": 146,
    "AX": 1104,
}


def make(suite: str, runs: Path, output: Path, *flags: str) -> list:
    """Run scripts/make_submission.py over the tiny data."""
    places = ["--runs", str(runs), "--output", str(output), "--data_dir", str(TEST_DATA)]
    return make_submission.main([suite, *places, *flags])


def predict(suite: str, folder: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Write the predictions of every task of a suite where fine-tuning does: <folder>/<task>/."""
    for name in task_names(suite):
        task = get_task(name)
        if name in leave_out:
            continue
        (folder / name).mkdir(parents=True)
        for split in task.test:
            examples = task.read(TEST_DATA, split).examples
            scores = np.random.default_rng(1).normal(size=(len(examples), max(1, len(task.labels))))
            write_submission(task, split, examples, scores, folder / name)


def test_the_archive_does_not_replace_a_file_that_it_packs(tmp_path):
    predict("superglue", tmp_path)
    packed = tmp_path / "CB" / "CB.jsonl"
    before = packed.read_bytes()
    with pytest.raises(UserError, match=r"--output .* would overwrite what it is made from"):
        write_archive(packed, gather("superglue", tmp_path, TEST_DATA))
    assert packed.read_bytes() == before


@pytest.mark.parametrize(("suite", "files"), [("glue", 11), ("superglue", 10)])
def test_archive_holds_every_official_file(tmp_path, suite, files):
    predict(suite, tmp_path / "runs")
    output = tmp_path / "out.zip"
    make(suite, tmp_path / "runs", output)
    with zipfile.ZipFile(output) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == files
        assert all("/" not in name for name in archive.namelist())
        for path in (tmp_path / "runs").rglob("*.*"):
            assert archive.read(path.name) == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.zip"]


def test_same_predictions_make_the_same_archive(tmp_path):
    predict("superglue", tmp_path / "runs")
    entries = gather("superglue", tmp_path / "runs", TEST_DATA)
    write_archive(tmp_path / "a.zip", entries)
    write_archive(tmp_path / "b.zip", entries)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {info.date_time[0] for info in archive.infolist()} == {2020}


def test_missing_tasks_are_named_or_filled_on_request(tmp_path, capsys):
    predict("superglue", tmp_path / "runs", leave_out=("WSC", "MultiRC", "ReCoRD", "COPA"))
    with pytest.raises(UserError, match=r"no COPA\.jsonl, MultiRC\.jsonl, .*--fill_missing"):
        gather("superglue", tmp_path / "runs", TEST_DATA)
    entries = make("superglue", tmp_path / "runs", tmp_path / "o.zip", "--fill_missing")
    assert len(entries) == 10
    filled = {entry.name: entry for entry in entries if "filled" in entry.origin}
    assert set(filled) == {"WSC.jsonl", "MultiRC.jsonl", "ReCoRD.jsonl", "COPA.jsonl"}
    assert filled["COPA.jsonl"].content.splitlines()[0] == b'{"idx": 0, "label": 0}'
    assert filled["ReCoRD.jsonl"].content.splitlines()[0] == b'{"idx": 0, "label": "Tarn Bridge"}'
    assert "not predicted, filled with the first entity" in capsys.readouterr().out
    for entry in filled.values():
        (tmp_path / entry.name).write_bytes(entry.content)
        task = get_task(entry.name.split(".")[0])
        examples = task.read(TEST_DATA, "test").examples
        assert check_submission(tmp_path / entry.name, task, "test", examples) == entry.rows


def test_filled_files_have_the_official_numbers_of_rows(tmp_path):
    rows = "".join(f"{number}\t1\n" for number in range(146))
    (tmp_path / "WNLI.tsv").write_text(f"{HEADER}{rows}")
    entries = gather("glue", tmp_path, fill_missing=True)
    assert {entry.name[:-4]: entry.rows for entry in entries} == GLUE_ROWS
    contents = {entry.name[:-4]: entry.content.decode().splitlines() for entry in entries}
    assert {name: len(lines) - 1 for name, lines in contents.items()} == GLUE_ROWS
    assert contents["MNLI-mm"][-1] == "9846\tentailment"
    assert contents["STS-B"][1] == "0\t0.000"


def test_rows_of_multirc_and_record_are_known_only_from_the_data(tmp_path):
    (tmp_path / "WSC.jsonl").write_text(
        "".join(f'{{"idx": {number}, "label": "True"}}\n' for number in range(146))
    )
    with pytest.raises(UserError, match=r"MultiRC\.jsonl: --fill_missing needs --data_dir"):
        gather("superglue", tmp_path, fill_missing=True)


def test_two_runs_of_a_task_are_not_guessed_between(tmp_path):
    predict("glue", tmp_path / "seed1")
    predict("glue", tmp_path / "seed2")
    with pytest.raises(UserError, match=r"seed1/CoLA/CoLA\.tsv and .*seed2.*one run of each task"):
        gather("glue", tmp_path, TEST_DATA)


def test_a_folder_of_links_to_runs_is_a_folder_of_runs(tmp_path):
    predict("glue", tmp_path / "runs")
    best = tmp_path / "best"
    best.mkdir()
    for path in (tmp_path / "runs").iterdir():
        (best / path.name).symlink_to(path)
    (best / "again").symlink_to(tmp_path / "runs" / "CoLA")
    found = gather("glue", best, TEST_DATA)
    assert [entry.content for entry in found] == [
        entry.content for entry in gather("glue", tmp_path / "runs", TEST_DATA)
    ]


def write_cola(folder: Path, content: str, name: str = "CoLA.tsv") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


HEADER = "index\tprediction\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has 0 rows instead of 3"),
        ("id\tlabel\n0\t1\n1\t1\n2\t0\n", ":1: expected the header"),
        (HEADER + "0\t1\n1\t1\n", "has 2 rows instead of 3"),
        (HEADER + "0\t1\n1\t1\n2\t0\n3\t0\n", "has 4 rows instead of 3"),
        (HEADER + "0\t1\n2\t1\n1\t0\n", "row 2 has the index 2 instead of 1"),
        (HEADER + "0\t1\n1\t1\n1\t0\n", "has an index twice"),
        (HEADER + "0\t1\n1\tyes\n2\t0\n", ":3: label 'yes' is not one of 0, 1"),
        (HEADER + "0\t1\n1\n2\t0\n", ":3: expected 2 columns, found 1"),
        (HEADER + "0\t1\nb\t1\n2\t0\n", ":3: index 'b' is not a non-negative integer"),
        (HEADER + "0\t1\n1\t1.0\n2\t0\n", ":3: label '1.0' is not one of"),
    ],
)
def test_what_glue_would_refuse(tmp_path, content, message):
    task = get_task("CoLA")
    examples = task.read(TEST_DATA, "test").examples
    with pytest.raises(UserError, match=message):
        check_submission(write_cola(tmp_path, content), task, "test", examples)


def test_another_name_is_refused(tmp_path):
    path = write_cola(tmp_path, HEADER, "CoLA0.53.tsv")
    with pytest.raises(UserError, match=r"the official name is CoLA\.tsv"):
        check_submission(path, get_task("CoLA"), "test")


def test_without_data_the_official_number_of_rows_counts(tmp_path):
    rows = "".join(f"{n}\t1\n" for n in range(1063))
    path = write_cola(tmp_path, HEADER + rows)
    assert check_submission(path, get_task("CoLA"), "test") == 1063
    path = write_cola(tmp_path, HEADER + rows.replace("\n7\t", "\n8\t"))
    with pytest.raises(UserError, match="has an index twice"):
        check_submission(path, get_task("CoLA"), "test")
    path = write_cola(tmp_path, HEADER + "0\t1\n")
    with pytest.raises(UserError, match=r"1 rows instead of 1063; for another.*--data_dir"):
        check_submission(path, get_task("CoLA"), "test")


def test_scores_of_sts_b_have_to_be_numbers_in_range(tmp_path):
    task = get_task("STS-B")
    examples = task.read(TEST_DATA, "test").examples
    for wrong in ("nan", "5.2", "-0.1", "high"):
        path = write_cola(tmp_path, f"{HEADER}0\t1.000\n1\t{wrong}\n2\t0.500\n", "STS-B.tsv")
        with pytest.raises(UserError, match=r"STS-B\.tsv:3"):
            check_submission(path, task, "test", examples)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("BoolQ", '{"idx": 0, "label": "true"}\n{"idx": 1, "label": true}\n', ":2: label true is"),
        ("BoolQ", '{"idx": 0, "label": "true"}\n{"idx": 1, "answer": "true"}\n', "has the keys"),
        ("WSC", '{"idx": 0, "label": "true"}\n', 'label "true" is not one of "False", "True"'),
        ("COPA", '{"idx": 0, "label": "1"}\n', 'label "1" is not one of 0, 1'),
        ("CB", '{"idx": "0", "label": "neutral"}\n', "'idx' is '0'"),
        ("CB", '{"idx": 0, "label": "neutral"\n', "is not JSON"),
        ("ReCoRD", '{"idx": 0, "label": "Paris"}\n', "'Paris' is not an entity of query 0"),
        ("ReCoRD", '{"idx": 0, "label": "Selby"}\n', "1 rows instead of 2"),
        (
            "MultiRC",
            '{"idx": 0, "passage": {"questions": [{"idx": 0}]}}\n',
            "has the keys idx instead of idx, answers",
        ),
        (
            "MultiRC",
            '{"idx": 0, "passage": {"questions": [{"idx": 0, "answers": [{"idx": 0, "label": 2}]}]'
            "}}\n",
            "label 2 is not one of 0, 1",
        ),
    ],
)
def test_what_superglue_would_refuse(tmp_path, name, content, message):
    task = get_task(name)
    (tmp_path / f"{name}.jsonl").write_text(content)
    examples = task.read(TEST_DATA, "test").examples
    with pytest.raises(UserError, match=message):
        check_submission(tmp_path / f"{name}.jsonl", task, "test", examples)


def test_skipped_row_leaves_a_gap_that_is_named(tmp_path):
    task = get_task("CoLA")
    examples = task.read(TEST_DATA, "test").examples
    path = write_submission(task, "test", examples[:1] + examples[2:], np.zeros((2, 2)), tmp_path)
    with pytest.raises(UserError, match="2 rows instead of 3"):
        check_submission(path, task, "test", examples)


def test_race_has_no_leaderboard(tmp_path):
    task = get_task("RACE-H")
    examples = task.read(TEST_DATA, "test").examples
    assert write_submission(task, "test", examples, np.zeros((2, 4)), tmp_path) is None


def test_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/o\.zip: cannot be written"):
        write_archive(tmp_path / "file" / "o.zip", [])
    write_archive(tmp_path / "new" / "folder" / "o.zip", [])
    assert (tmp_path / "new" / "folder" / "o.zip").exists()


def test_missing_files_are_a_one_line_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        make_submission.main(["glue", "--runs", str(tmp_path), "--output", str(tmp_path / "o.zip")])
    assert caught.value.code == 1
    assert "has no file of glue (CoLA.tsv, SST-2.tsv" in capsys.readouterr().err
    assert not (tmp_path / "o.zip").exists()


@pytest.mark.parametrize("fill", [(), ("--fill_missing",)])
def test_folder_without_any_submission_file_is_refused(tmp_path, capsys, fill):
    (tmp_path / "empty").mkdir()
    for runs, message in (("typo", "is not a folder"), ("empty", "has no file of glue (CoLA.tsv")):
        with pytest.raises(SystemExit) as caught:
            make("glue", tmp_path / runs, tmp_path / "o.zip", *fill)
        assert caught.value.code == 1
        error = capsys.readouterr().err
        assert f"--runs {tmp_path / runs}: {message}" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "o.zip").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "CoLA.tsv",
            b"\xef\xbb\xbfindex\tprediction\n0\t1\n1\t1\n2\t0\n",
            ":1: starts with a byte",
        ),
        ("CoLA.tsv", b"index\tprediction\r\n0\t1\r\n1\t1\r\n2\t0\r\n", ":1: ends with CRLF"),
        ("CoLA.tsv", b"index\tprediction\n0\t1\n1\t1\r\n2\t0\n", ":3: ends with CRLF"),
        ("CoLA.tsv", b"index\tprediction\n0\t1\n\n1\t1\n2\t0\n", ":3: is blank"),
        ("CoLA.tsv", b"index\tprediction\n0\t1\n1\t1\n2\t0\n\n", ":5: is blank"),
        ("CoLA.tsv", "index\tprediction\n\u0660\t1\n1\t1\n2\t0\n".encode(), "is not a non-neg"),
        ("CoLA.tsv", b"index\tprediction\n00\t1\n1\t1\n2\t0\n", "'00' is not a non-negative"),
        ("CoLA.tsv", b"index\tprediction\n-1\t1\n1\t1\n2\t0\n", "'-1' is not a non-negative"),
        ("STS-B.tsv", "index\tprediction\n0\t\u0661.5\n1\t1\n2\t0\n".encode(), "is not a number"),
        ("STS-B.tsv", b"index\tprediction\n0\t1_0\n1\t1\n2\t0\n", "'1_0' is not a number"),
        ("STS-B.tsv", b"index\tprediction\n0\tinf\n1\t1\n2\t0\n", "'inf' is not a number"),
        ("CB.jsonl", b'\xef\xbb\xbf{"idx": 0, "label": "neutral"}\n', ":1: starts with a byte"),
        ("CB.jsonl", b'{"idx": 0, "label": "neutral"}\r\n', ":1: ends with CRLF"),
        ("CB.jsonl", b'{"idx": -1, "label": "neutral"}\n', "'idx' is -1"),
        (
            "CB.jsonl",
            b'{"idx": 0, "label": "neutral", "p": 1}\n',
            "has the keys idx, label, p inst",
        ),
        ("CB.jsonl", b'{"idx": 0, "idx": 1, "label": "neutral"}\n', "has a key twice"),
        ("ReCoRD.jsonl", b'{"idx": 0, "label": ""}\n', "'label' is empty"),
        ("ReCoRD.jsonl", b'{"idx": 0, "label": "Selby", "x": 0}\n', "has the keys"),
        ("ReCoRD.jsonl", b'{"idx": -3, "label": "Selby"}\n', "'idx' is -3"),
        (
            "MultiRC.jsonl",
            b'{"idx": 0, "passage": {"questions": [], "text": ""}}\n',
            "has the keys questions, text instead of questions",
        ),
        (
            "MultiRC.jsonl",
            b'{"idx": 0, "passage": {"questions": [{"idx": 0, "answers": [{"idx": -1, '
            b'"label": 1}]}]}}\n',
            "'idx' is -1",
        ),
        (
            "MultiRC.jsonl",
            b'{"idx": 0, "passage": {"questions": [{"idx": 9, "answers": []}]}}\n',
            "has a question without answers",
        ),
    ],
)
def test_bytes_and_keys_that_no_leaderboard_takes(tmp_path, name, content, message):
    task = get_task(name.split(".")[0])
    (tmp_path / name).write_bytes(content)
    examples = task.read(TEST_DATA, "test").examples
    with pytest.raises(UserError, match=message):
        check_submission(tmp_path / name, task, "test", examples)


def test_a_drawn_set_may_have_an_index_twice_itself(tmp_path):
    examples = [Example(index, ()) for index in (4, 0, 4)]
    path = write_cola(tmp_path, f"{HEADER}4\t1\n0\t0\n4\t1\n")
    assert check_submission(path, get_task("CoLA"), "test", examples) == 3
    write_cola(tmp_path, f"{HEADER}4\t1\n0\t0\n0\t1\n")
    with pytest.raises(UserError, match="has an index twice"):
        check_submission(path, get_task("CoLA"), "test", examples)


def test_answers_for_the_withdrawn_qnli_are_named(tmp_path):
    rows = "".join(f"{number}\tentailment\n" for number in range(5740))
    path = write_cola(tmp_path, HEADER + rows, "QNLI.tsv")
    of_old_data = [Example(number, ()) for number in range(5740)]
    for examples in (None, of_old_data):
        with pytest.raises(UserError, match=r"5740 rows instead of 5463: they answer QNLI v1"):
            check_submission(path, get_task("QNLI"), "test", examples)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_numbers_never_reach_a_file(tmp_path, value):
    for name in ("CoLA", "STS-B", "ReCoRD"):
        task = get_task(name)
        examples = task.read(TEST_DATA, "test").examples
        logits = np.zeros((len(examples), max(1, len(task.labels))))
        logits[-1] = value
        with pytest.raises(UserError, match=r"not written, the model's outputs contain NaN"):
            write_submission(task, "test", examples, logits, tmp_path)
    assert list(tmp_path.iterdir()) == []
