"""Readers, casts, metrics and submission rows of the SuperGLUE tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bort.errors import UserError
from data.tasks import get_task


def read(folder: Path, name: str, split: str, rows: list[Any], **arguments):
    task = get_task(name)
    file = next(file.name for file in task.files if file.split == split)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    # The official test files end without a line feed.
    (folder / file).write_text("\n".join(lines), encoding="utf-8")
    return task.read(folder, split, **arguments)


def submitted(name: str, examples, scores) -> list[dict]:
    return [json.loads(line) for line in get_task(name).submission(examples, np.array(scores))]


def test_boolq_labels_are_json_booleans_and_answers_are_text(tmp_path):
    rows = [
        {"question": "is it", "passage": "It is.", "idx": number, "label": label}
        for number, label in enumerate([True, False])
    ]
    examples = read(tmp_path, "BoolQ", "dev", rows).examples
    assert [e.label for e in examples] == [1, 0]
    assert examples[0].inputs == (("It is.", "is it"),)
    assert submitted("BoolQ", examples, [[0, 1], [1, 0]]) == [
        {"idx": 0, "label": "true"},
        {"idx": 1, "label": "false"},
    ]


def test_wsc_answers_begin_with_a_capital(tmp_path):
    target = {"span1_index": 0, "span1_text": "Nora", "span2_index": 5, "span2_text": "she"}
    rows = [{"text": "Nora waved to Vera when she left.", "target": target, "idx": 0}]
    examples = read(tmp_path, "WSC", "test", rows).examples
    marked = "# Nora # waved to Vera when * she * left."
    assert examples[0].inputs == ((marked, "she means Nora"),)
    assert submitted("WSC", examples, [[0, 1]]) == [{"idx": 0, "label": "True"}]


def wsc(text: str, noun: tuple[int, str], pronoun: tuple[int, str]) -> dict:
    """Return a row of WSC; spans are (index, text)."""
    target = {"span1_index": noun[0], "span1_text": noun[1]}
    target.update(span2_index=pronoun[0], span2_text=pronoun[1])
    return {"text": text, "target": target, "idx": 0, "label": True}


@pytest.mark.parametrize(
    ("text", "noun", "pronoun", "marked"),
    [
        ("He saw him when he ran.", (2, "him"), (4, "he"), "He saw # him # when * he * ran."),
        ("He saw him when he ran.", (2, "him"), (0, "he"), "* He * saw # him # when he ran."),
        (
            "The old cat, it purred.",
            (0, "the old cat"),
            (3, "it"),
            "# The old cat, # * it * purred.",
        ),
        ("Emma's mother had gone.", (0, "Emma"), (1, "mother"), "# Emma's # * mother * had gone."),
        (
            "It was their mothers.",
            (2, "their mothers"),
            (2, "their"),
            "It was # * their * mothers. #",
        ),
    ],
)
def test_wsc_marks_its_spans_by_position(tmp_path, text, noun, pronoun, marked):
    (example,) = read(tmp_path, "WSC", "train", [wsc(text, noun, pronoun)]).examples
    assert example.inputs == ((marked, f"{pronoun[1]} means {noun[1]}"),)


@pytest.mark.parametrize(
    ("noun", "pronoun", "message"),
    [
        ((0, "Nora"), (4, "she"), r"'span2_index' is 4, where the text has 'when', not 'she'"),
        ((1, "Nora"), (5, "she"), r"'span1_index' is 1, where the text has 'waved', not 'Nora'"),
        ((0, "Nora"), (99, "she"), r"'span2_index' is 99, where the text has '', not 'she'"),
        ((-7, "Nora"), (5, "she"), r"'span1_index' is -7"),
        ((0, ""), (5, "she"), r"'span1_text' is empty"),
        ((0, "Nora"), ("5", "she"), r"'span2_index' is '5', expected an integer"),
    ],
)
def test_wsc_span_must_be_at_its_index(tmp_path, noun, pronoun, message):
    row = wsc("Nora waved to Vera when she left.", noun, pronoun)
    with pytest.raises(UserError, match=message):
        read(tmp_path, "WSC", "train", [row])


def test_no_two_rows_of_the_real_wsc_have_equal_inputs_and_different_labels(shared):
    task = get_task("WSC")
    for split in ("train", "dev"):
        examples, skipped = task.read(shared / "data", split)
        assert skipped == []
        labels: dict = {}
        for example in examples:
            labels.setdefault(example.inputs, set()).add(example.label)
        assert all(len(found) == 1 for found in labels.values())


def test_cb_keeps_its_text(tmp_path):
    premise = "It snowed. Uh, she sang. You know why. A: Mhm. B: I, well, I do."
    rows = [{"premise": premise, "hypothesis": "she sang", "label": "neutral", "idx": 0}]
    (example,) = read(tmp_path, "CB", "train", rows).examples
    assert example.inputs == ((premise, "she sang"),)


def test_cb_reports_accuracy_and_macro_f1(tmp_path):
    labels = ["entailment", "entailment", "contradiction", "neutral"]
    rows = [
        {"premise": "P.", "hypothesis": "h", "label": label, "idx": number}
        for number, label in enumerate(labels)
    ]
    examples = read(tmp_path, "CB", "dev", rows).examples
    right = get_task("CB").labels.index("entailment")
    values = get_task("CB").metrics(examples, np.eye(3)[[right] * 4])
    assert values["accuracy"] == 0.5
    assert values["macro_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)


def test_copa_is_a_choice_between_two_inputs(tmp_path):
    row = {"premise": "It broke.", "choice1": "It fell.", "choice2": "It rang.", "idx": 0}
    rows = [{**row, "question": "cause", "label": 0}, {**row, "question": "effect", "label": 1}]
    first, second = read(tmp_path, "COPA", "dev", rows).examples
    assert first.inputs == (("It broke.", "because It fell."), ("It broke.", "because It rang."))
    assert second.inputs[1] == ("It broke.", "so It rang.")
    assert submitted("COPA", [first], [[0.1, 0.2]]) == [{"idx": 0, "label": 1}]


def test_wic_marks_the_target_word(tmp_path):
    row = {"word": "run", "sentence1": "Run home!", "sentence2": "She ran, we ran.", "idx": 4}
    places = {"start1": 0, "end1": 3, "start2": 12, "end2": 15}
    (example,) = read(tmp_path, "WiC", "train", [{**row, **places, "label": True}]).examples
    assert example.inputs == (("* Run * home!", "She ran, we * ran *."),)
    assert (example.uid, example.label) == (4, 1)


def test_index_of_ax_b_is_text_in_the_file_and_a_number_in_the_submission(tmp_path):
    row = {"sentence1": "A.", "sentence2": "B.", "label": "entailment", "logic": "Negation"}
    examples = read(tmp_path, "AX-b", "test", [{**row, "idx": "0"}, {**row, "idx": "1"}]).examples
    assert submitted("AX-b", examples, [[1, 0], [0, 1]]) == [
        {"idx": 0, "label": "entailment"},
        {"idx": 1, "label": "not_entailment"},
    ]


def test_ax_g_parity_is_over_neighbouring_rows(tmp_path):
    row = {"premise": "P.", "hypothesis": "h", "label": "entailment"}
    rows = [{**row, "idx": n, "pair_id": 50 + 2 * n} for n in range(4)]
    examples = read(tmp_path, "AX-g", "test", rows).examples
    values = get_task("AX-g").metrics(examples, np.eye(2)[[0, 0, 0, 1]])
    assert values == {"accuracy": 0.75, "parity": 0.5}


PARAGRAPH = {
    "idx": 3,
    "version": 1.1,
    "passage": {
        "text": "Ada met Ben. They rowed.",
        "questions": [
            {
                "question": "Who met Ben?",
                "idx": 8,
                "answers": [
                    {"text": "Ada", "idx": 20, "label": 1},
                    {"text": "Cid", "idx": 21, "label": 0},
                ],
            },
            {
                "question": "What did they do?",
                "idx": 9,
                "answers": [{"text": "Rowed", "idx": 22, "label": 1}],
            },
        ],
    },
}


def test_multirc_has_one_input_per_answer_and_nested_predictions(tmp_path):
    examples = read(tmp_path, "MultiRC", "dev", [PARAGRAPH]).examples
    assert [(e.uid, e.label) for e in examples] == [
        ((3, 8, 20), 1),
        ((3, 8, 21), 0),
        ((3, 9, 22), 1),
    ]
    assert examples[1].inputs == (("Ada met Ben. They rowed.", "Who met Ben? Cid"),)
    answers = [{"idx": 20, "label": 1}, {"idx": 21, "label": 1}]
    questions = [{"idx": 8, "answers": answers}, {"idx": 9, "answers": [{"idx": 22, "label": 0}]}]
    assert submitted("MultiRC", examples, [[0, 1], [0, 1], [1, 0]]) == [
        {"idx": 3, "passage": {"questions": questions}}
    ]


def test_multirc_metrics_by_hand(tmp_path):
    examples = read(tmp_path, "MultiRC", "dev", [PARAGRAPH]).examples
    values = get_task("MultiRC").metrics(examples, np.eye(2)[[1, 1, 1]])
    # tp 2, fp 1, fn 0; the first question has a mistake, the second none
    assert values == pytest.approx({"f1a": 4 / 5, "exact_match": 1 / 2})


def test_multirc_reads_the_layout_before_version_2(tmp_path):
    text = "<b>Sent 1: </b>Ada met Ben.<br><b>Sent 2: </b>They rowed.<br>"
    answers = [{"text": "Ada", "isAnswer": True, "scores": {}}]
    answers.append({"text": "Cid", "isAnswer": False, "scores": {}})
    question = {"question": "Who met Ben?", "sentences_used": [0], "idx": "4", "answers": answers}
    rows = [{"idx": 0, "paragraph": {"text": text, "questions": [question]}}]
    examples = read(tmp_path, "MultiRC", "train", rows).examples
    assert [(e.uid, e.label) for e in examples] == [((0, 4, 0), 1), ((0, 4, 1), 0)]
    assert examples[0].inputs == (("Ada met Ben. They rowed.", "Who met Ben? Ada"),)


TEXT = "Ada Lund met Ben Orr. Orr sang to Cid and Dee.\n@highlight\nLund meets Orr"
NAMES = ["Ada Lund", "Ben Orr", "Orr", "Cid", "Dee", "Lund"]


def test_record_asks_once_for_an_entity_that_is_named_twice(tmp_path):
    row = record(0, "Dee")
    row["passage"]["text"] += " and Dee"  # the last entity ends where the passage ends
    start = len(row["passage"]["text"]) - 3
    row["passage"]["entities"].append({"start": start, "end": start + 2})
    examples = read(tmp_path, "ReCoRD", "dev", [row]).examples
    assert [e.candidate for e in examples].count("Dee") == 1


def record(number: int, answer: str | None, names: list[str] = NAMES) -> dict:
    starts = [TEXT.index(name, 22 if name == "Orr" else 0) for name in names]
    entities = [{"start": s, "end": s + len(n) - 1} for s, n in zip(starts, names)]
    query: dict[str, Any] = {"query": "All heard @placeholder sing.", "idx": 10 + number}
    if answer is not None:
        query["answers"] = [{"start": 0, "end": 0, "text": answer}]
    passage = {"text": TEXT, "entities": entities}
    return {"source": "Tiny", "passage": passage, "qas": [query], "idx": number}


def test_record_asks_for_every_entity_of_every_query_on_dev_and_test(tmp_path):
    dev = read(tmp_path, "ReCoRD", "dev", [record(0, "Ben Orr"), record(1, "Somebody")]).examples
    # in the order of the passage, "Lund" lies inside "Ada Lund"
    assert [e.candidate for e in dev[:6]] == ["Ada Lund", "Lund", "Ben Orr", "Orr", "Cid", "Dee"]
    assert [e.label for e in dev] == [0, 0, 1, 0, 0, 0] + [0] * 6
    assert dev[2].inputs == (
        (
            "Ada Lund met Ben Orr. Orr sang to Cid and Dee. - Lund meets Orr",
            "All heard Ben Orr sing.",
        ),
    )
    test = read(tmp_path, "ReCoRD", "test", [record(0, None)]).examples
    assert [e.label for e in test] == [None] * 6
    assert get_task("ReCoRD").count_rows(dev) == 2


def test_record_answers_with_the_highest_positive_score(tmp_path):
    examples = read(tmp_path, "ReCoRD", "dev", [record(0, "Ben Orr"), record(1, "Dee")]).examples
    scores = np.zeros((12, 2))
    scores[:, 1] = -5.0  # all rejected, and still the least rejected one is the answer
    scores[3] = [1.0, 0.0]  # Orr: a margin of -1
    scores[4] = [4.0, 0.5]  # Cid: the higher positive logit, but a margin of -3.5
    scores[6 + 5] = [0.0, 2.0]  # Dee
    assert submitted("ReCoRD", examples, scores) == [
        {"idx": 10, "label": "Orr"},
        {"idx": 11, "label": "Dee"},
    ]
    values = get_task("ReCoRD").metrics(examples, scores)
    # "orr" against "ben orr": F1 2/3, no exact match; the other query is right
    assert values == pytest.approx({"f1": (2 / 3 + 1) / 2, "exact_match": 1 / 2})


def test_record_training_set_is_balanced_and_drawn_by_seed(tmp_path):
    rows = [record(n, "Ben Orr") for n in range(40)]
    examples = read(tmp_path, "ReCoRD", "train", rows, seed=1).examples
    assert sum(e.label for e in examples) == 40
    assert len(examples) == 80
    drawn = {e.candidate for e in examples if not e.label}
    assert drawn == {"Ada Lund", "Lund", "Orr", "Cid", "Dee"}
    assert read(tmp_path, "ReCoRD", "train", rows, seed=1).examples == examples
    assert read(tmp_path, "ReCoRD", "train", rows, seed=2).examples != examples
    backwards = read(tmp_path, "ReCoRD", "train", rows[::-1], seed=1).examples
    assert sorted(backwards) == sorted(examples)


def test_record_training_keeps_a_query_whose_answer_no_entity_spells(tmp_path):
    examples = read(tmp_path, "ReCoRD", "train", [record(0, "Benjamin Orr")]).examples
    assert [(e.candidate, e.label) for e in examples if e.label] == [("Benjamin Orr", 1)]
    assert len(examples) == 2


def test_record_answers_count_by_their_normal_form(tmp_path):
    examples = read(tmp_path, "ReCoRD", "train", [record(0, "the DEE.")]).examples
    assert [e.candidate for e in examples if e.label] == ["Dee"]


NLI = {"premise": "P.", "hypothesis": "h", "label": "entailment", "idx": 0}
BOOL = {"passage": "P.", "question": "q", "label": True, "idx": 0}
WIC = {"word": "a", "sentence1": "a b", "sentence2": "a", "idx": 0, "label": True}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("CB", "{", r"train\.jsonl:1: is not JSON"),
        ("CB", "[1]", "is not a JSON object"),
        ("CB", {**NLI, "label": "maybe"}, 'label "maybe" is not one of "entailment", '),
        ("CB", {**NLI, "premise": 3}, "'premise' is 3, expected text"),
        ("CB", {"hypothesis": "h", "label": "neutral", "idx": 0}, "has no 'premise'"),
        ("CB", {"premise": "P.", "hypothesis": "h", "idx": 0}, "has no 'label'"),
        ("CB", {**NLI, "idx": "first"}, "index 'first' is not a non-negative integer"),
        ("BoolQ", {**BOOL, "label": 1}, "label 1 is not one of false, true"),
        ("BoolQ", {**BOOL, "label": "true"}, 'label "true" is not one of false, true'),
        (
            "WiC",
            {**WIC, "start1": 0, "end1": 9, "start2": 0, "end2": 1},
            "start1 0 and end1 9 are outside",
        ),
        ("WiC", {**WIC, "start1": True, "end1": 1, "start2": 0, "end2": 1}, "'start1' is True"),
        ("COPA", {"question": "why", "idx": 0}, "question 'why' is neither"),
        (
            "MultiRC",
            {"idx": 0, "passage": {"text": "T.", "questions": [7]}},
            "'questions' contains 7, expected objects",
        ),
        (
            "MultiRC",
            {
                "idx": 0,
                "passage": {
                    "text": "T.",
                    "questions": [{"question": "Q", "answers": [{"text": "A", "label": 1}]}],
                },
            },
            "has no 'idx'",
        ),
        ("ReCoRD", record(0, None), "has a query without answers"),
        ("ReCoRD", record(0, "Dee", []), "has no entities"),
    ],
)
def test_what_is_wrong_is_reported(tmp_path, name, row, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, name, "train", [row])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 2, "end": len(TEXT)}, "outside the passage"),
        ({"start": -2, "end": 1}, "outside"),
        ({"start": 5, "end": 4}, "outside"),
    ],
)
def test_record_entities_have_to_lie_in_the_passage(tmp_path, change, message):
    row = record(0, "Dee")
    row["passage"]["entities"].append(change)
    with pytest.raises(UserError, match=message):
        read(tmp_path, "ReCoRD", "train", [row])


def test_record_query_needs_its_placeholder(tmp_path):
    row = record(0, "Dee")
    row["qas"][0]["query"] = "Nobody."
    with pytest.raises(UserError, match="without '@placeholder'"):
        read(tmp_path, "ReCoRD", "dev", [row])


def test_skipped_rows_are_counted_and_no_index_shifts(tmp_path):
    rows = [NLI, "{", {**NLI, "idx": 2}]
    examples, skipped = read(tmp_path, "CB", "train", rows, skip_bad_rows=True)
    assert [e.uid for e in examples] == [0, 2]
    assert len(skipped) == 1
    assert "train.jsonl:2" in skipped[0]


def test_rows_without_an_index_are_numbered_by_their_line(tmp_path):
    row = {"premise": "P.", "hypothesis": "h", "label": "neutral"}
    examples, _ = read(tmp_path, "CB", "train", [row, "{", row], skip_bad_rows=True)
    assert [e.uid for e in examples] == [0, 2]


@pytest.mark.parametrize(
    ("name", "row"),
    [("BoolQ", BOOL), ("CB", NLI), ("AX-b", {"sentence1": "A.", "sentence2": "B.", "idx": 0})],
)
def test_label_in_a_test_file_that_is_not_one_counts_as_absent(tmp_path, name, row):
    for label in (-1, "", "?", 7, 0.5, []):
        examples, skipped = read(tmp_path, name, "test", [{**row, "label": label}])
        assert ([e.label for e in examples], skipped) == ([None], [])


def test_labels_of_answers_in_a_test_file_may_be_placeholders(tmp_path):
    paragraph = json.loads(json.dumps(PARAGRAPH).replace('"label": 1', '"label": -1'))
    examples = read(tmp_path, "MultiRC", "test", [paragraph]).examples
    assert [e.label for e in examples] == [None, 0, None]
    row = record(0, "Dee")
    row["qas"][0]["answers"] = [{"text": -1}]
    assert {e.label for e in read(tmp_path, "ReCoRD", "test", [row]).examples} == {None}


@pytest.mark.parametrize("index", ["x", None, 3.0, -1])
def test_prediction_looks_at_neither_labels_nor_indices(index):
    for name, row in (("CB", NLI), ("BoolQ", BOOL)):
        (example,) = get_task(name).cast_row({**row, "idx": index, "label": index}, 4)
        assert (example.uid, example.label) == (4, None)
    paragraph = json.loads(json.dumps(PARAGRAPH).replace('"label": 1', '"label": "no"'))
    paragraph["passage"]["questions"][0]["idx"] = index
    uids = [e.uid for e in get_task("MultiRC").cast_row(paragraph, 2)]
    assert uids == [(2, 0, 0), (2, 0, 1), (2, 1, 0)]
    row = record(0, "Dee")
    row["qas"][0].update(idx=index, answers=index)
    examples = get_task("ReCoRD").cast_row(row, 7)
    assert {(e.uid[0], e.label) for e in examples} == {(7, None)}


def test_first_rows_of_record_are_queries(tmp_path):
    task = get_task("ReCoRD")
    examples = read(tmp_path, "ReCoRD", "train", [record(n, "Dee") for n in range(5)]).examples
    for rows in (1, 3, 5, 9):
        chosen = task.first_rows(examples, rows)
        assert task.count_rows(chosen) == min(rows, 5)
        assert chosen == examples[: len(chosen)]
    assert task.first_rows(examples, None) == examples


def test_an_index_that_comes_twice_would_join_two_questions(tmp_path):
    for name, row in (("MultiRC", PARAGRAPH), ("ReCoRD", record(0, "Dee"))):
        for split in ("train", "dev", "test"):
            with pytest.raises(UserError, match=r":2: has the index .*, as line 1"):
                read(tmp_path, name, split, [row, row])
    twice = {**record(0, "Dee")}
    twice["qas"] = twice["qas"] * 2
    with pytest.raises(UserError, match=r":1: has the index 10, as line 1"):
        read(tmp_path, "ReCoRD", "dev", [twice])


def test_a_key_that_comes_twice_is_named(tmp_path):
    row = json.dumps(NLI)[:-1] + ', "label": "neutral"}'
    with pytest.raises(UserError, match=r":1: has a key twice in"):
        read(tmp_path, "CB", "train", [row])


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    row = json.dumps({**NLI, "premise": "P\ud800"})
    with pytest.raises(UserError, match="'premise' contains half of a surrogate pair"):
        read(tmp_path, "CB", "train", [row])
