"""Every task that trains memorises 64 made-up rows whose labels are drawn at random.

    python -m pytest -m slow -s tests/finetuning/test_overfit.py

prints the table. The rows are in the official layout, and the dev set is the training set: a score
below 1 means that a label, an input or a metric got lost on the way. AX, AX-b and AX-g have no
training set.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest

from bort.tables import markdown_table
from bort.types import TaskKind
from data.tasks import get_task, task_names
from tests.conftest import ROOT
from tests.finetuning.helpers import finetuned
from tests.pretraining.helpers import metrics

pytestmark = pytest.mark.slow

ROWS = 64
# Many words, so that few rows share one.
WORDS = sorted(set(re.findall("[a-z]+", (ROOT / "test_data/sample_text.txt").read_text("utf-8"))))
Draw = Callable[[int], str]


def texts(task: str) -> tuple[Draw, np.random.Generator]:
    """Return a function that draws a text of so many words, and its generator."""
    generator = np.random.default_rng(sum(map(ord, task)))
    return lambda words: " ".join(generator.choice(WORDS, words)), generator


# ---- GLUE ----------------------------------------------------------------------------------------

# The columns of the official training files; "x" stands for those that are not read.
GLUE = {
    "CoLA": "x label x sentence",
    "SST-2": "sentence label",
    "MRPC": "Quality #1_ID #2_ID #1_String #2_String",
    "STS-B": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "QQP": "id qid1 qid2 question1 question2 is_duplicate",
    "MNLI": "index promptID pairID genre parse1 parse2 parse3 parse4 sentence1 sentence2 label1"
    " gold_label",
    "QNLI": "index question sentence label",
    "RTE": "index sentence1 sentence2 label",
    "WNLI": "index sentence1 sentence2 label",
}


def write_glue(folder: Path, name: str) -> None:
    task, (text, generator) = get_task(name), texts(name)
    columns = [column.replace("_String", " String") for column in GLUE[name].split()]
    lines = [] if name == "CoLA" else ["\t".join(columns)]
    for row in range(ROWS):
        values = {column: text(6) for column in task.text_columns}
        values |= {"index": str(row), "id": str(row)}
        label = f"{generator.uniform(0, 5):.3f}"
        values[task.label_column] = str(generator.choice(task.labels)) if task.labels else label
        lines.append("\t".join(values.get(column, "x") for column in columns))
    for file in task.files:
        if not file.split.startswith("test"):
            (folder / file.name).write_text("\n".join(lines) + "\n", "utf-8")


# ---- SuperGLUE -----------------------------------------------------------------------------------


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a task with `ROWS` labels."""
    task, (text, generator) = get_task(name), texts(name)
    labels = list(task.values or task.labels)
    for row in range(ROWS // 4 if name == "MultiRC" else ROWS):
        label = labels[generator.integers(len(labels))]
        yield {"idx": row, **MADE[name](text, row), **({} if name in NESTED else {"label": label})}


def pair(first: str, second: str) -> Callable[[Draw, int], dict[str, Any]]:
    return lambda text, row: {first: text(8), second: text(4)}


def copa(text: Draw, row: int) -> dict[str, Any]:
    question = ("cause", "effect")[row % 2]
    return {"premise": text(6), "choice1": text(3), "choice2": text(3), "question": question}


def wic(text: Draw, row: int) -> dict[str, Any]:
    sentences = {"sentence1": f"plain {text(5)}", "sentence2": f"plain {text(5)}"}
    return {"word": "plain", **sentences, "start1": 0, "end1": 5, "start2": 0, "end2": 5}


def wsc(text: Draw, row: int) -> dict[str, Any]:
    words = text(7).split()
    noun, pronoun = row % 3, 4 + row % 3
    target = {"span1_index": noun, "span1_text": words[noun]}
    target |= {"span2_index": pronoun, "span2_text": words[pronoun]}
    return {"text": " ".join(words), "target": target}


def multirc(text: Draw, row: int) -> dict[str, Any]:
    """Two questions of two answers; a coin of the words decides the labels."""
    questions = []
    for question in range(2):
        answers = [
            {"text": text(3), "idx": answer, "label": int(text(1) > "m")} for answer in range(2)
        ]
        questions.append({"question": text(4), "idx": question, "answers": answers})
    return {"passage": {"text": text(8), "questions": questions}}


def record(text: Draw, row: int) -> dict[str, Any]:
    """One query with two candidates: training has both, as the dev set does."""
    names = [text(2), text(2)]
    passage = f"{names[0]} {text(5)} {names[1]}"
    starts = [0, len(passage) - len(names[1])]
    entities = [{"start": s, "end": s + len(n) - 1} for s, n in zip(starts, names)]
    answers = [{"text": names[int(text(1) > "m")], "start": 0, "end": 0}]
    query = {"query": f"@placeholder {text(3)}", "idx": row, "answers": answers}
    return {"passage": {"text": passage, "entities": entities}, "qas": [query]}


NESTED = ("MultiRC", "ReCoRD")
MADE: dict[str, Callable[[Draw, int], dict[str, Any]]] = {
    "BoolQ": pair("passage", "question"),
    "CB": pair("premise", "hypothesis"),
    "COPA": copa,
    "MultiRC": multirc,
    "ReCoRD": record,
    "SuperGLUERTE": pair("premise", "hypothesis"),
    "WiC": wic,
    "WSC": wsc,
}


def write_super_glue(folder: Path, name: str) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(name))
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")


# ---- RACE ----------------------------------------------------------------------------------------


def write_race(folder: Path, name: str) -> None:
    task, (text, generator) = get_task(name), texts(name)
    for article in range(ROWS // 4):
        level = task.levels[article % len(task.levels)]
        row = {
            "article": text(8),
            "questions": [f"{text(3)} _ {text(1)}" for _ in range(4)],
            "options": [[text(2) for _ in range(4)] for _ in range(4)],
            "answers": [str(generator.choice(list("ABCD"))) for _ in range(4)],
            "id": f"{level}{article}.txt",
        }
        for split in ("train", "dev"):
            path = folder / split / level / f"{article}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row), "utf-8")


# ---- the runs ------------------------------------------------------------------------------------

WRITERS = {"glue": write_glue, "superglue": write_super_glue, "race": write_race}
HEADER = ("task", "rows", "steps", "lr", "final loss", "dev = train score")


@pytest.fixture(scope="module")
def table() -> Iterator[list[list[str]]]:
    """Collect one row per task, and print the table after the last one."""
    rows: list[list[str]] = []
    yield rows
    print("\n" + markdown_table(HEADER, rows), end="")


@pytest.mark.parametrize("name", [name for name in task_names() if get_task(name).train])
def test_64_rows_are_memorised(tmp_path, table, name):
    task = get_task(name)
    data = tmp_path / "data"
    data.mkdir()
    WRITERS[task.suite](data, name)
    # Ranks take longer than classes; a few tasks need another learning rate than the others.
    for lr in (1e-3,) if task.kind == TaskKind.REGRESSION else (5e-4, 1e-3, 3e-4):
        found = run(data, tmp_path / str(lr), name, lr, 60 if lr == 3e-4 or not task.labels else 20)
        score = f"{found['best']['score']:.3f}"
        if score == "1.000":
            break
    assert set(found["rows"].values()) == {ROWS}
    losses = [line["loss"] for line in metrics(tmp_path / str(lr) / name) if "loss" in line]
    table.append([name, str(ROWS), str(found["steps"]), f"{lr:g}", f"{losses[-1]:.4f}", score])
    assert score == "1.000"


def run(data: Path, folder: Path, name: str, lr: float, epochs: int) -> dict[str, Any]:
    return finetuned(
        data,
        folder,
        task_name=name,
        model_name="bort_1_2_128_64",
        epochs=epochs,
        early_stop=10,
        max_len=128,  # nothing is truncated
        lr=lr,
        dropout=0,
        weight_decay=0,
        ckpt_interval=10_000,
    )
