"""RACE: four-option questions from English exams, for middle and for high schools.

Lai et al., "RACE: Large-scale ReAding Comprehension Dataset From Examinations" (2017). The data
are given out on request; there is no leaderboard server, the test answers are public.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from bort.errors import UserError
from data import metrics
from data.rows import BadRowError, collect, member, parse_object
from data.task import Example, File, Split, Task

CASTS = ("choices", "joined")
_BLANK = re.compile(r"\s*_+\s*")


class Article(NamedTuple):
    """One JSON object of a file: `uid` is "level/file:line"."""

    where: str
    uid: str
    content: bytes


class Question(NamedTuple):
    """One question of an article: `uid` is "level/file:line:number of the question"."""

    where: str
    uid: str
    article: str
    text: str
    options: list[str]
    answer: Optional[str]


class Race(Task):
    """Both levels together; accuracy is also given by level.

    cast "choices": four inputs (article, question with the option), whose scores compete. The
        option stands at the blank ("_") where the question has exactly one, else behind the
        question.
    cast "joined": the original's single input (article + question, option A, ..., option D) with
        the encoder's separator between them, and a decision among four classes.
    """

    name = "RACE"
    kind = "multiple_choice"
    labels = ("A", "B", "C", "D")
    suite = "race"
    suite_folders = ("race",)
    folders = ("RACE", "")
    files = (File("train", "train", 87866), File("dev", "dev", 4887), File("test", "test", 4934))
    levels: tuple[str, ...] = ("high", "middle")

    def __init__(self, cast: str = "choices") -> None:
        if cast not in CASTS:
            raise UserError(f"--race_cast {cast}: must be one of {', '.join(CASTS)}")
        self.cast = cast
        self.kind = "multiple_choice" if cast == "choices" else "classification"

    def _read(self, path: Path, split: str, skip_bad_rows: bool, seed: int) -> Split:
        questions, unread = collect(self._articles(path), _questions, skip_bad_rows)
        examples, skipped = collect(questions, self._example, skip_bad_rows)
        return Split(examples, unread + skipped)

    def _articles(self, folder: Path) -> Iterator[Article]:
        """Yield the articles of the task's levels in the order of level, file number and line."""
        for level in self.levels:
            # Archives packed on a Mac bring .DS_Store and ._1.txt along.
            paths = [p for p in (folder / level).glob("*.txt") if not p.name.startswith(".")]
            for path in sorted(paths, key=lambda p: (len(p.stem), p.stem)):
                for line, content in _objects(path.read_bytes()):
                    yield Article(f"{path}:{line}", f"{level}/{path.name}:{line}", content)

    def cast_row(self, row: Mapping[str, Any], number: int) -> list[Example]:
        """Return an example for each question of one article."""
        questions = _questions_of(row, "", str(number))
        return [example for question in questions for example in self._example(question)]

    def _example(self, question: Question) -> list[Example]:
        if len(question.options) != len(self.labels):
            raise BadRowError(f"has {len(question.options)} options instead of {len(self.labels)}")
        if question.answer not in (None, *self.labels):
            raise BadRowError(f"answer {question.answer!r} is none of {', '.join(self.labels)}")
        label = None if question.answer is None else self.labels.index(question.answer)
        return [Example(question.uid, self._inputs(question), label)]

    def _inputs(self, question: Question) -> tuple[tuple[str, ...], ...]:
        if self.cast == "joined":
            return ((f"{question.article} {question.text}", *question.options),)
        return tuple((question.article, _filled(question, option)) for option in question.options)

    def metrics(self, examples: Sequence[Example], scores: np.ndarray) -> dict[str, float]:
        """Return the accuracy, over all and by level."""
        values = super().metrics(examples, scores)
        labels = np.array([example.label for example in examples])
        levels = np.array([str(example.uid).split("/")[0] for example in examples])
        predictions = self.predict(scores)
        for level in np.unique(levels):
            chosen = levels == level
            values[f"accuracy_{level}"] = metrics.accuracy(labels[chosen], predictions[chosen])
        return values


class RaceHigh(Race):
    """The questions for high schools."""

    name = "RACE-H"
    levels = ("high",)
    files = (File("train", "train", 62445), File("dev", "dev", 3451), File("test", "test", 3498))


class RaceMiddle(Race):
    """The questions for middle schools."""

    name = "RACE-M"
    levels = ("middle",)
    files = (File("train", "train", 25421), File("dev", "dev", 1436), File("test", "test", 1436))


def _objects(content: bytes) -> list[tuple[int, bytes]]:
    """Split a file into (line, JSON text): officially one object, several are one per line."""
    try:
        json.loads(content)
    except ValueError:
        lines = enumerate(content.split(b"\n"), 1)
        return [(number, line) for number, line in lines if line.strip()]
    return [(1, content)]


def _questions(article: Article) -> list[Question]:
    return _questions_of(parse_object(article.content), article.where, article.uid)


def _questions_of(row: Mapping[str, Any], where: str, uid: str) -> list[Question]:
    text = " ".join(member(row, "article", str).split())
    asked, options = member(row, "questions", list), member(row, "options", list)
    answers = member({"answers": [None] * len(asked), **row}, "answers", list)
    if not len(asked) == len(options) == len(answers):
        raise BadRowError(
            f"has {len(asked)} questions, {len(options)} sets of options, {len(answers)} answers"
        )
    return [
        Question(
            where=f"{where}: question {number}",
            uid=f"{uid}:{number}",
            article=text,
            text=str(one).strip(),
            options=_texts(choices),
            answer=answer,
        )
        for number, (one, choices, answer) in enumerate(zip(asked, options, answers), 1)
    ]


def _texts(options: Any) -> list[str]:
    return [str(option).strip() for option in options] if isinstance(options, list) else []


def _filled(question: Question, option: str) -> str:
    """Put the option at the question's only blank, or behind the question."""
    if len(_BLANK.findall(question.text)) == 1:
        return _BLANK.sub(lambda _: f" {option} ", question.text).strip()
    return f"{question.text} {option}"


RACE_TASKS = (RaceHigh, RaceMiddle, Race)
