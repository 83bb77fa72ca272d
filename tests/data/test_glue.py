"""Readers, casts and submission rows of the GLUE tasks: the quirks of their official files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bort.errors import UserError
from data.rows import read_lines
from data.tasks import get_task

MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


def read(folder: Path, name: str, split: str, content: str | bytes, **arguments):
    task = get_task(name)
    file = next(file.name for file in task.files if file.split == split)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return task.read(folder, split, **arguments)


def test_cola_has_a_header_only_in_its_test_file(tmp_path):
    train = read(tmp_path, "CoLA", "train", "a\t1\t\tBirds sing.\nb\t0\t*\tSing birds the.\n")
    assert [(e.uid, e.inputs, e.label) for e in train.examples] == [
        (0, (("Birds sing.",),), 1),
        (1, (("Sing birds the.",),), 0),
    ]
    test = read(tmp_path, "CoLA", "test", "index\tsentence\n0\tBirds sing.\n1\tThey do.\n")
    assert [(e.uid, e.label) for e in test.examples] == [(0, None), (1, None)]


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    train = read(tmp_path, "MRPC", "train", "\ufeff" + MRPC_HEADER + "1\t7\t8\tIt rained.\tRain.\n")
    assert train.examples[0].label == 1


def test_quotes_and_odd_line_ends_are_text(tmp_path):
    row = '1\t7\t8\t"It\u2028 rained\x85 .\t" Rain , " he said .\n'
    train = read(tmp_path, "MRPC", "train", MRPC_HEADER + row + row)
    assert [e.inputs for e in train.examples] == [
        (('"It\u2028 rained\x85 .', '" Rain , " he said .'),)
    ] * 2


def test_trailing_space_of_sst_is_dropped(tmp_path):
    train = read(tmp_path, "SST-2", "train", "sentence\tlabel\na fine film \t1\n")
    assert train.examples[0].inputs == (("a fine film",),)


@pytest.mark.parametrize("labels", [["label1"], [f"label{n}" for n in range(1, 6)]])
def test_mnli_takes_the_gold_label_of_12_and_of_16_columns(tmp_path, labels):
    names = ["index", "promptID", "pairID", "genre", "b1", "b2", "p1", "p2"]
    header = "\t".join([*names, "sentence1", "sentence2", *labels, "gold_label"])
    row = "\t".join(["0", "1", "1n", "x", *"abcd", "One.", "Two.", *["neutral"] * len(labels)])
    split = "train" if len(labels) == 1 else "dev_mismatched"
    found = read(tmp_path, "MNLI", split, f"{header}\n{row}\tcontradiction\n")
    assert found.examples[0].inputs == (("One.", "Two."),)
    assert get_task("MNLI").labels[found.examples[0].label] == "contradiction"


def test_ax_reads_crlf_and_prefers_the_file_with_labels(tmp_path):
    (tmp_path / "diagnostic.tsv").write_text("index\tsentence1\tsentence2\n0\tA.\tB.\n")
    ax = get_task("AX")
    assert [e.label for e in ax.read(tmp_path, "test").examples] == [None]
    header = "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain"
    full = f"{header}\tPremise\tHypothesis\tLabel\r\n\t\tNegation\t\tNews\tA.\tB.\tneutral\r\n"
    (tmp_path / "diagnostic-full.tsv").write_bytes(full.encode())
    (example,) = ax.read(tmp_path, "test").examples
    assert (example.uid, example.inputs) == (0, (("A.", "B."),))
    assert ax.labels[example.label] == "neutral"


QQP = "id\tquestion1\tquestion2\n0\tA?\tB?\n1\tA?\n2\tC?\tD?\n"


def test_broken_row_stops_and_is_named(tmp_path):
    """With the flag that skips it, where the program has that."""
    for flags, cure in (({}, ""), ({"skip_bad_rows": False}, " or give --skip_bad_rows")):
        with pytest.raises(UserError) as raised:
            read(tmp_path, "QQP", "test", QQP, **flags)
        message = "test.tsv:3: expected 3 columns, found 2; fix the row"
        assert str(raised.value).endswith(f"{message}{cure}")


def test_skipped_row_is_counted_and_no_index_shifts(tmp_path):
    examples, skipped = read(tmp_path, "QQP", "test", QQP, skip_bad_rows=True)
    assert [example.uid for example in examples] == [0, 2]
    assert len(skipped) == 1
    assert "test.tsv:3" in skipped[0]
    lines = get_task("QQP").submission(examples, np.array([[1, 0], [0, 1]]))
    assert lines == ["index\tprediction", "0\t0", "2\t1"]


def test_index_is_the_one_in_the_file(tmp_path):
    rows = "id\tquestion1\tquestion2\n7\tA?\tB?\n9\tC?\tD?\n"
    assert [e.uid for e in read(tmp_path, "QQP", "test", rows).examples] == [7, 9]


def test_skipped_row_without_an_index_column_shifts_nothing_either(tmp_path):
    rows = "a\t1\t\tOne.\na\t7\t\tTwo.\na\t0\t\tThree.\n"
    examples, skipped = read(tmp_path, "CoLA", "train", rows, skip_bad_rows=True)
    assert [example.uid for example in examples] == [0, 2]
    assert "train.tsv:2: label '7' is not one of 0, 1" in skipped[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("SST-2", b"sentence\tlabel\nfine\t1\nb\xe9te\t0\n", r":3: is not UTF-8 at byte 2"),
        ("SST-2", b"sentence\tlabel\nfine\t1\n\nbad\t0\n", r":3: expected 2 columns, found 1"),
        ("SST-2", b"text\tlabel\nfine\t1\n", r":1: the header has no column sentence;"),
        ("SST-2", b"sentence\nfine\n", r":1: the header has no column label;"),
        ("SST-2", b"sentence,label\nfine,1\n", r"tab separated, .*; found \['sentence,label'\]"),
        (
            "SST-2",
            b'"sentence"\t"label"\n',
            r"without quotes; found \['\"sentence\"', '\"label\"'\]",
        ),
        (
            "SST-2",
            b"sentence\tlabel\tlabel\nfine\t1\t0\n",
            r":1: the header has the column label twice",
        ),
        ("SST-2", b"", r"is empty"),
        ("WNLI", b"index\tsentence1\tsentence2\tlabel\nx\tA\tB\t1\n", r":2: index 'x' is not a"),
        (
            "STS-B",
            b"index\tsentence1\tsentence2\tscore\n0\tA\tB\t5.1\n",
            r":2: score 5.1 is not between 0 and 5",
        ),
        ("STS-B", b"index\tsentence1\tsentence2\tscore\n0\tA\tB\tnan\n", r":2: score 'nan' is not"),
        (
            "STS-B",
            b"index\tsentence1\tsentence2\tscore\n0\tA\tB\thigh\n",
            r"'high' is not a number",
        ),
        (
            "RTE",
            b"index\tsentence1\tsentence2\tlabel\n0\tA\tB\tneutral\n",
            r"'neutral' is not one of",
        ),
    ],
)
def test_what_is_wrong_is_reported(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, name, "train", content)


def test_unreadable_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(read_lines(tmp_path))


def test_blank_lines_at_the_end_are_no_rows(tmp_path):
    train = read(tmp_path, "SST-2", "train", "sentence\tlabel\nfine\t1\n\n\n")
    assert len(train.examples) == 1


def test_empty_text_is_a_row(tmp_path):
    train = read(tmp_path, "SST-2", "train", "sentence\tlabel\n\t1\n")
    assert train.examples[0].inputs == (("",),)


def test_regression_is_limited_to_its_range_and_has_three_digits(tmp_path):
    rows = "".join(f"{n}\tA\tB\n" for n in range(3))
    examples = read(tmp_path, "STS-B", "test", "index\tsentence1\tsentence2\n" + rows).examples
    task = get_task("STS-B")
    lines = task.submission(examples, np.array([[-0.2], [2.34567], [7.0]]))
    assert lines == ["index\tprediction", "0\t0.000", "1\t2.346", "2\t5.000"]


def test_regression_metrics_are_over_the_whole_set(tmp_path):
    rows = "".join(f"{n}\tA\tB\t{n}\n" for n in range(5))
    content = "index\tsentence1\tsentence2\tscore\n" + rows
    examples = read(tmp_path, "STS-B", "dev", content).examples
    values = get_task("STS-B").metrics(examples, np.array([0.1, 2.0, 1.0, 3.0, 4.0]))
    assert values["spearman"] == pytest.approx(0.9)
    assert values["pearson"] == pytest.approx(
        np.corrcoef([0, 1, 2, 3, 4], [0.1, 2.0, 1.0, 3.0, 4.0])[0, 1]
    )


def test_classes_are_spelt_out_where_the_leaderboard_wants_names(tmp_path):
    content = "index\tsentence1\tsentence2\n0\tA\tB\n1\tA\tB\n"
    examples = read(tmp_path, "RTE", "test", content).examples
    lines = get_task("RTE").submission(examples, np.array([[2.0, 1.0], [0.0, 1.0]]))
    assert lines == ["index\tprediction", "0\tentailment", "1\tnot_entailment"]


def test_mnli_has_a_file_for_each_test_set():
    mnli = get_task("MNLI")
    assert mnli.dev == ("dev_matched", "dev_mismatched")
    assert [mnli.submission_file(split) for split in mnli.test] == ["MNLI-m.tsv", "MNLI-mm.tsv"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("SST-2", "index\tsentence\tlabel\n0\tfine\t-1\n1\tbad\t-1\n"),
        ("QQP", "id\tquestion1\tquestion2\tis_duplicate\n0\tA?\tB?\t-1\n1\tA?\tC?\t\n"),
        ("STS-B", "index\tsentence1\tsentence2\tscore\n0\tA\tB\t-1\n1\tA\tB\tnan\n"),
        ("RTE", "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t-1\n1\tA\tB\t?\n"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_label_in_a_test_file_that_is_not_one_counts_as_absent(tmp_path, name, content, skip):
    examples, skipped = read(tmp_path, name, "test", content, skip_bad_rows=skip)
    assert ([example.label for example in examples], skipped) == ([None, None], [])
    with pytest.raises(UserError):
        read(tmp_path, name, "train", content)


def test_a_file_of_invalid_rows_only_is_reported(tmp_path):
    content = "sentence\tlabel\nfine\t-1\nbad\t-1\n"
    with pytest.raises(UserError, match=r"all 2 rows are broken, the first: .*:2: label '-1'"):
        read(tmp_path, "SST-2", "train", content, skip_bad_rows=True)


def test_index_is_ascii_digits(tmp_path):
    for index in ("\u0661", "-1", "1.0", "+1", ""):
        with pytest.raises(UserError, match="is not a non-negative integer"):
            read(tmp_path, "QQP", "test", f"id\tquestion1\tquestion2\n{index}\tA?\tB?\n")
