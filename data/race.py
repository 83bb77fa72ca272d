"""RACE: four-option questions from English exams, for middle and for high schools.

Lai et al., "RACE: Large-scale ReAding Comprehension Dataset From Examinations" (2017). The data
are given out on request; there is no leaderboard server, the test answers are public.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

import numpy as np

from bort.errors import UserError, quoted
from bort.types import JSONMapping, TaskKind
from data import metrics
from data.rows import BadRowError, collect, parse_object, require_field
from data.task import Example, File, Split, Task

CASTS = ("choices", "joined")
_BLANK = re.compile(r"\s*_+\s*")


class ArticleFile(NamedTuple):
    """A .txt file of a level; `extra` if it is beside the numbered files and is not numbered."""

    level: str
    path: Path
    extra: bool

    @property
    def where(self) -> str:
        """The path, for messages."""
        return str(self.path)


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

    cast "choices": four inputs (article, question with the option), whose logits compete. The
        option stands at the blank ("_") where the question has exactly one, else after the
        question.
    cast "joined": the original's single input (article + question, option A, ..., option D) with
        the encoder's separator between them, and a decision among four classes.
    """

    name = "RACE"
    kind = TaskKind.MULTIPLE_CHOICE
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
        choices = cast == "choices"
        self.kind = TaskKind.MULTIPLE_CHOICE if choices else TaskKind.CLASSIFICATION

    def _read(self, path: Path, split: str, skip_bad_rows: Optional[bool], seed: int) -> Split:
        is_test = split in self.test
        answer = _test_answer if is_test else _answer
        places: dict[tuple[str, str], str] = {}  # of articles, by level and id

        def questions_of(article: Article) -> list[Question]:
            """Return the questions of an article, which must not have come before."""
            row = parse_object(article.content)
            _require_new(places, row, article)
            if is_test and not _has_answers(row):
                del row["answers"]
            return _questions_of(row, article.where, article.uid)

        def cast(question: Question) -> list[Example]:
            """Return the example of a question."""
            return self._example(question, answer)

        articles, unread = collect(self._files(path), _articles, skip_bad_rows, _MOVE_AWAY)
        questions, unparsed = collect(articles, questions_of, skip_bad_rows)
        examples, skipped = collect(questions, cast, skip_bad_rows)
        return Split(examples, unread + unparsed + skipped)

    def _files(self, folder: Path) -> Iterator[ArticleFile]:
        """Yield the .txt files of the task's levels in the order of level and file number."""
        for level in self.levels:
            # Archives packed on a Mac contain .DS_Store and ._1.txt.
            paths = [p for p in (folder / level).glob("*.txt") if not p.name.startswith(".")]
            if not paths:
                raise UserError(f"{folder / level}: has no .txt files; unpack the archive again")
            numbered = any(_is_numbered(path) for path in paths)
            for path in sorted(paths, key=lambda p: (len(p.stem), p.stem)):
                yield ArticleFile(level, path, extra=numbered and not _is_numbered(path))

    def cast_row(self, row: JSONMapping, number: int) -> list[Example]:
        """Return an example for each question of one article."""
        unanswered = {key: value for key, value in row.items() if key != "answers"}
        questions = _questions_of(unanswered, "", str(number))
        return [e for question in questions for e in self._example(question, lambda _: None)]

    def source_texts(self, row: JSONMapping) -> list[str]:
        """Return the article, the questions and their options."""
        options = [option for choices in row["options"] for option in choices]
        return [row["article"], *row["questions"], *options]

    def _example(
        self, question: Question, answer: Callable[[Question], Optional[int]]
    ) -> list[Example]:
        if len(question.options) != len(self.labels):
            raise BadRowError(f"has {len(question.options)} options instead of {len(self.labels)}")
        return [Example(question.uid, self._inputs(question), answer(question))]

    def _inputs(self, question: Question) -> tuple[tuple[str, ...], ...]:
        if self.cast == "joined":
            return ((f"{question.article} {question.text}", *question.options),)
        return tuple((question.article, _filled(question, option)) for option in question.options)

    def metrics(self, examples: Sequence[Example], logits: np.ndarray) -> dict[str, float]:
        """Return the accuracy, over all and by level."""
        values = super().metrics(examples, logits)
        labels = np.array([example.label for example in examples])
        levels = np.array([str(example.uid).split("/")[0] for example in examples])
        predictions = self.predict(logits)
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


_MOVE_AWAY = "move it away, or rename it"


def _is_numbered(path: Path) -> bool:
    return re.fullmatch("[0-9]+", path.stem) is not None


def _articles(file: ArticleFile) -> list[Article]:
    """Return the articles of a file: officially one object, several are one per line."""
    if file.extra:
        raise BadRowError("is beside the numbered files, whose articles it may repeat")
    try:
        file.path.name.encode()
    except UnicodeEncodeError:  # it would be part of the names of predictions
        raise BadRowError("has a name that is not UTF-8") from None
    content = _content(file.path)
    try:
        json.loads(content)
        parts = [(1, content)]
    except (ValueError, RecursionError):
        lines = enumerate(content.split(b"\n"), 1)
        parts = [(number, line) for number, line in lines if line.strip()]
    uid = f"{file.level}/{file.path.name}"
    return [Article(f"{file.path}:{line}", f"{uid}:{line}", part) for line, part in parts]


def _content(path: Path) -> bytes:
    if path.is_symlink() and not path.exists():
        raise BadRowError("is a link to a file that does not exist")
    if not path.is_file():
        raise BadRowError("is not a regular file")
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise BadRowError(f"cannot be read ({error.strerror})") from None


def _require_new(places: dict[tuple[str, str], str], row: JSONMapping, article: Article) -> None:
    """Record where an article is; raises `BadRowError` when one with its id came before."""
    name = row.get("id")
    if isinstance(name, str):
        level = article.uid.partition("/")[0]
        before = places.setdefault((level, name), article.where)
        if before != article.where:
            raise BadRowError(f"repeats the article {quoted(name)} of {before}")


def _has_answers(row: JSONMapping) -> bool:
    """Return whether a row has either no key "answers", or as many answers as questions."""
    answers, questions = row.get("answers", []), row.get("questions")
    if "answers" not in row or not isinstance(questions, list):
        return True
    return isinstance(answers, list) and len(answers) == len(questions)


def _questions_of(row: JSONMapping, where: str, uid: str) -> list[Question]:
    text = " ".join(require_field(row, "article", str).split())
    questions, options = require_field(row, "questions", list), require_field(row, "options", list)
    answers = require_field({"answers": [None] * len(questions), **row}, "answers", list)
    if not len(questions) == len(options) == len(answers):
        raise BadRowError(
            f"has {len(questions)} questions, {len(options)} sets of options, "
            f"{len(answers)} answers"
        )
    return [
        Question(
            where=f"{where}: question {number}",
            uid=f"{uid}:{number}",
            article=text,
            text=_text(question, "question"),
            options=_options(choices),
            answer=answer,
        )
        for number, (question, choices, answer) in enumerate(zip(questions, options, answers), 1)
    ]


def _options(choices: object) -> list[str]:
    if not isinstance(choices, list):
        raise BadRowError(f"the options are {quoted(choices)}, expected a list")
    return [_text(choice, "option") for choice in choices]


def _text(value: object, name: str) -> str:
    return require_field({name: value}, name, str).strip()


def _answer(question: Question) -> int:
    """Return the index of the right option; raises `BadRowError` without a valid answer."""
    if question.answer is None:
        raise BadRowError("has no answer")
    if question.answer not in Race.labels:
        known = ", ".join(Race.labels)
        raise BadRowError(f"answer {quoted(question.answer)} is not one of {known}")
    return Race.labels.index(question.answer)


def _test_answer(question: Question) -> Optional[int]:
    """Return the index of the right option, None without a valid answer."""
    return Race.labels.index(question.answer) if question.answer in Race.labels else None


def _filled(question: Question, option: str) -> str:
    """Put the option at the question's only blank, or after the question."""
    if len(_BLANK.findall(question.text)) == 1:
        return _BLANK.sub(lambda _: f" {option} ", question.text).strip()
    return f"{question.text} {option}"


RACE_TASKS = (RaceHigh, RaceMiddle, Race)
