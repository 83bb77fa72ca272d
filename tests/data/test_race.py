"""RACE: the archive's noise, both casts, and accuracy by level."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bort.errors import UserError
from data.tasks import get_task

OPTIONS = ["red", "green", "blue", "white"]


def article(text: str = "The door is red.", questions=("The door is _ .",), answers=("A",)) -> str:
    row = {"article": text, "questions": list(questions), "answers": list(answers)}
    row["options"] = [OPTIONS] * len(row["questions"])
    return json.dumps(row)


def write(root: Path, place: str, content: str | bytes) -> None:
    path = root / "RACE" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_each_option_is_scored_with_passage_and_question(tmp_path):
    text = "The door is red.\nThe wall is  white."
    questions = ("The door is _ .", "What is white?", "_ and _ ?")
    write(tmp_path, "train/high/1.txt", article(text, questions, "ADB"))
    examples = get_task("RACE-H").read(tmp_path, "train").examples
    passage = "The door is red. The wall is white."
    assert examples[0].inputs == tuple((passage, f"The door is {one} .") for one in OPTIONS)
    assert examples[1].inputs[2] == (passage, "What is white? blue")
    assert examples[2].inputs[0] == (passage, "_ and _ ? red")
    assert [e.label for e in examples] == [0, 3, 1]


def test_joined_cast_is_one_input_with_four_options(tmp_path):
    write(tmp_path, "train/high/1.txt", article())
    task = get_task("RACE-H", race_cast="joined")
    (example,) = task.read(tmp_path, "train").examples
    assert example.inputs == (("The door is red. The door is _ .", *OPTIONS),)
    assert (task.kind, task.num_outputs) == ("classification", 4)


def test_unknown_cast_is_refused():
    with pytest.raises(UserError, match="--race_cast both: must be one of choices, joined"):
        get_task("RACE-H", race_cast="both")


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    """It would be part of the names of predictions, which are written as UTF-8 after training."""
    write(tmp_path, "dev/high/a.txt", article())
    write(tmp_path, "dev/high/caf\udce9.txt", article())
    with pytest.raises(UserError, match=r"txt:? ?.*has a name that is not UTF-8; move it away, or"):
        get_task("RACE-H").read(tmp_path, "dev")
    found = get_task("RACE-H").read(tmp_path, "dev", skip_bad_rows=True)
    assert (len(found.examples), len(found.skipped)) == (1, 1)


def test_other_files_of_the_archive_are_skipped(tmp_path):
    write(tmp_path, "dev/high/1.txt", article())
    write(tmp_path, "dev/high/.DS_Store", b"\x00\x01")
    write(tmp_path, "dev/high/._1.txt", b"\x00\x05\x16\x07")
    write(tmp_path, "dev/.DS_Store", b"\x00\x01")
    assert len(get_task("RACE-H").read(tmp_path, "dev").examples) == 1


def test_levels_and_order_of_the_files(tmp_path):
    for place in ("high/10", "high/9", "middle/2"):
        write(tmp_path, f"dev/{place}.txt", article())
    uids = {
        name: [e.uid for e in get_task(name).read(tmp_path, "dev").examples]
        for name in ("RACE-H", "RACE-M", "RACE")
    }
    assert uids["RACE-H"] == ["high/9.txt:1:1", "high/10.txt:1:1"]
    assert uids["RACE-M"] == ["middle/2.txt:1:1"]
    assert uids["RACE"] == uids["RACE-H"] + uids["RACE-M"]


def test_accuracy_by_level(tmp_path):
    write(tmp_path, "dev/high/1.txt", article(questions="ab", answers="AB"))
    write(tmp_path, "dev/middle/1.txt", article(questions="ab", answers="AA"))
    task = get_task("RACE")
    examples = task.read(tmp_path, "dev").examples
    values = task.metrics(examples, np.eye(4)[[0, 0, 0, 0]])
    assert values == {"accuracy": 0.75, "accuracy_high": 0.5, "accuracy_middle": 1.0}


def test_file_with_several_lines(tmp_path):
    write(tmp_path, "dev/high/1.txt", f"{article()}\n\n{article(answers='B')}\n")
    examples = get_task("RACE-H").read(tmp_path, "dev").examples
    assert [(e.uid, e.label) for e in examples] == [("high/1.txt:1:1", 0), ("high/1.txt:3:1", 1)]


@pytest.mark.parametrize("articles", [1, 2])
def test_byte_order_mark_and_crlf(tmp_path, articles):
    content = f"\ufeff{article()}\r\n" + f"{article()}\r\n" * (articles - 1)
    write(tmp_path, "dev/high/1.txt", content)
    assert len(get_task("RACE-H").read(tmp_path, "dev").examples) == articles


def test_one_object_over_several_lines(tmp_path):
    write(tmp_path, "dev/high/1.txt", json.dumps(json.loads(article()), indent=2))
    assert len(get_task("RACE-H").read(tmp_path, "dev").examples) == 1


def test_test_set_without_answers(tmp_path):
    row = json.loads(article())
    del row["answers"]
    write(tmp_path, "test/high/1.txt", json.dumps(row))
    assert [e.label for e in get_task("RACE-H").read(tmp_path, "test").examples] == [None]


SHORT = json.loads(article())
SHORT["options"] = [OPTIONS[:3]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (article(answers="E"), r"high/1\.txt:1: question 1: answer 'E' is not one of A, B, C, D"),
        (json.dumps(SHORT), r"question 1: has 3 options instead of 4"),
        (article()[:40], r"high/1\.txt:1: is not JSON"),
        (article(answers="AB"), r"has 1 questions, 1 sets of options, 2 answers"),
        (article().encode()[:-1] + b"\xff}", r"is not UTF-8"),
    ],
)
def test_what_is_wrong_is_reported(tmp_path, content, message):
    write(tmp_path, "train/high/1.txt", content)
    with pytest.raises(UserError, match=message):
        get_task("RACE-H").read(tmp_path, "train")


def test_skipped_questions_are_counted_and_shift_nothing(tmp_path):
    write(tmp_path, "dev/high/1.txt", article(questions="abc", answers="AEB"))
    write(tmp_path, "dev/high/2.txt", "{")
    examples, skipped = get_task("RACE-H").read(tmp_path, "dev", skip_bad_rows=True)
    assert [e.uid for e in examples] == ["high/1.txt:1:1", "high/1.txt:1:3"]
    assert len(skipped) == 2


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("answers", ["absent", None, [None]])
def test_answers_are_required_outside_the_test_set(tmp_path, split, answers):
    row = json.loads(article())
    row["answers"] = answers
    if answers == "absent":
        del row["answers"]
    write(tmp_path, f"{split}/high/1.txt", json.dumps(row))
    with pytest.raises(UserError, match=r"1\.txt:1: (question 1: has no answer|'answers' is None)"):
        get_task("RACE-H").read(tmp_path, split)


@pytest.mark.parametrize("answer", ["E", "-1", "", 0])
def test_answer_in_the_test_set_that_is_not_one_counts_as_absent(tmp_path, answer):
    write(tmp_path, "test/high/1.txt", article(answers=[answer]))
    assert [e.label for e in get_task("RACE-H").read(tmp_path, "test").examples] == [None]


@pytest.mark.parametrize("answers", [None, [], ["A", "B"], "A", -1])
def test_answers_of_a_test_article_that_cannot_be_read_count_as_absent(tmp_path, answers):
    row = {**json.loads(article()), "answers": answers}
    write(tmp_path, "test/high/1.txt", json.dumps(row))
    assert [e.label for e in get_task("RACE-H").read(tmp_path, "test").examples] == [None]


def test_an_article_that_comes_twice_is_named(tmp_path):
    copied = json.dumps({**json.loads(article()), "id": "high1.txt"})
    write(tmp_path, "dev/high/1.txt", copied)
    write(tmp_path, "dev/middle/1.txt", copied)
    assert len(get_task("RACE").read(tmp_path, "dev").examples) == 2
    write(tmp_path, "dev/high/01.txt", copied)
    message = r"high/01\.txt:1: repeats the article 'high1.txt' of .*high/1\.txt:1"
    with pytest.raises(UserError, match=message):
        get_task("RACE").read(tmp_path, "dev")
    examples, skipped = get_task("RACE").read(tmp_path, "dev", skip_bad_rows=True)
    assert (len(examples), len(skipped)) == (2, 1)


def test_a_level_without_files_is_named(tmp_path):
    write(tmp_path, "dev/high/1.txt", article())
    with pytest.raises(UserError, match=r"dev/middle: has no \.txt files"):
        get_task("RACE").read(tmp_path, "dev")
    assert len(get_task("RACE-H").read(tmp_path, "dev").examples) == 1


def test_extra_file_beside_the_numbered_ones_is_named(tmp_path):
    write(tmp_path, "dev/high/1.txt", article())
    write(tmp_path, "dev/high/all.txt", f"{article()}\n{article()}\n")
    with pytest.raises(UserError, match=r"high/all\.txt: is beside the numbered.*move it away"):
        get_task("RACE-H").read(tmp_path, "dev")
    examples, skipped = get_task("RACE-H").read(tmp_path, "dev", skip_bad_rows=True)
    assert (len(examples), len(skipped)) == (1, 1)
    (tmp_path / "RACE/dev/high/1.txt").unlink()
    assert len(get_task("RACE-H").read(tmp_path, "dev").examples) == 2


def test_links_to_nothing_and_folders_are_named(tmp_path):
    write(tmp_path, "dev/high/1.txt", article())
    (tmp_path / "RACE/dev/high/2.txt").symlink_to("missing.txt")
    with pytest.raises(UserError, match=r"2\.txt: is a link to a file that does not exist"):
        get_task("RACE-H").read(tmp_path, "dev")
    (tmp_path / "RACE/dev/high/2.txt").unlink()
    (tmp_path / "RACE/dev/high/3.txt").mkdir()
    with pytest.raises(UserError, match=r"3\.txt: is not a regular file"):
        get_task("RACE-H").read(tmp_path, "dev")
    examples, skipped = get_task("RACE-H").read(tmp_path, "dev", skip_bad_rows=True)
    assert (len(examples), len(skipped)) == (1, 1)
