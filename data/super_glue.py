"""The eight tasks of SuperGLUE and its diagnostic sets AX-b and AX-g: one JSON object per line.

Wang et al., "SuperGLUE: A Stickier Benchmark for General-Purpose Language Understanding Systems"
(2019).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np

from data import metrics
from data.glue import BINARY, ENTAILMENT
from data.rows import BadRowError, Line, collect, member, parse_object, read_lines
from data.task import REWRITE, Example, File, Split, Task, Uid, three_files


class SuperGlueTask(Task):
    """A task in JSON lines.

    values, answers: the labels as data files and as the leaderboard spell them, in the order of
        `labels`; the labels themselves if empty.
    """

    suite = "superglue"
    suite_folders = ("superglue", "super_glue", "SuperGLUE")
    text_columns: tuple[str, ...] = ("premise", "hypothesis")
    label_key = "label"
    values: tuple[Union[int, bool], ...] = ()
    answers: tuple[int, ...] = ()

    def _read(self, path: Path, split: str, skip_bad_rows: bool, seed: int) -> Split:
        def cast(line: Line) -> list[Example]:
            """Return the examples of one line."""
            row = parse_object(line.content)
            examples = self._examples(row, _index(row, line.number - 1))
            if split not in self.test and any(e.label is None for e in examples):
                raise BadRowError(f"has no {self.label_key!r}")
            return examples

        return Split(*collect(read_lines(path), cast, skip_bad_rows))

    def cast_row(self, row: Mapping[str, Any], number: int) -> list[Example]:
        """Return the examples of one row: MultiRC and ReCoRD may have several."""
        unlabelled = {key: value for key, value in row.items() if key != self.label_key}
        return self._examples(unlabelled, _index(unlabelled, number))

    def _examples(self, row: dict[str, Any], index: int) -> list[Example]:
        return [Example(index, self._inputs(row), self._label(row))]

    def _inputs(self, row: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
        return (tuple(member(row, key, str).strip() for key in self.text_columns),)

    def _label(self, row: dict[str, Any]) -> Optional[int]:
        value = row.get(self.label_key)
        return None if value is None else _class_number(value, self.values or self.labels)

    def submission_file(self, split: str) -> Optional[str]:
        """Return the official file name, such as BoolQ.jsonl."""
        return f"{self.folders[0]}.jsonl"

    def submission(self, examples: Sequence[Example], scores: np.ndarray) -> list[str]:
        """Return one JSON object {"idx": ..., "label": ...} per line."""
        answers = self.answers or self.labels
        return [
            json.dumps({"idx": example.uid, "label": answers[prediction]})
            for example, prediction in zip(examples, self.predict(scores))
        ]

    def parse_submission(
        self, path: Path, examples: Optional[Sequence[Example]] = None
    ) -> list[Uid]:
        """Check keys and labels of every line, and return the indices."""

        def parse(line: Line) -> list[Uid]:
            """Return the indices that one line predicts."""
            return self._parse_prediction(parse_object(line.content))

        return collect(read_lines(path), parse, False, REWRITE)[0]

    def _parse_prediction(self, row: dict[str, Any]) -> list[Uid]:
        if set(row) != {"idx", "label"}:
            raise BadRowError(f"has the keys {', '.join(row)} instead of idx, label")
        _class_number(row["label"], self.answers or self.labels)
        return [member(row, "idx", int)]


def _class_number(value: Any, known: Sequence[Any]) -> int:
    """Return which of the known labels a value is."""
    # Compared as JSON: for Python, true equals 1.
    spelt = [json.dumps(one) for one in known]
    if json.dumps(value) not in spelt:
        raise BadRowError(f"label {json.dumps(value)} is none of {', '.join(spelt)}")
    return spelt.index(json.dumps(value))


def _index(row: dict[str, Any], number: int) -> int:
    """Return the official index of a row; AX-b spells it as text, old files lack it."""
    index = row.get("idx", number)
    if isinstance(index, str) and index.isdecimal():
        return int(index)
    return member({"idx": index}, "idx", int)


class BoolQ(SuperGlueTask):
    """Answer a yes/no question about a passage."""

    name = "BoolQ"
    labels = ("false", "true")
    folders = ("BoolQ", "superglue_boolq")
    files = three_files(".jsonl", 9427, 3270, 3245, "val")
    text_columns = ("passage", "question")
    values = (False, True)


class CB(SuperGlueTask):
    """CommitmentBank: does the hypothesis follow? The premise is kept as it is."""

    name = "CB"
    labels = ("entailment", "neutral", "contradiction")
    folders = ("CB", "superglue_cb")
    files = three_files(".jsonl", 250, 56, 250, "val")
    measures = (metrics.accuracy, metrics.macro_f1)
    headline = ("accuracy", "macro_f1")


class COPA(SuperGlueTask):
    """Which of two sentences is the cause or the effect of the premise?

    Multiple choice: each option is an input (premise, "because" or "so" + option).
    """

    name = "COPA"
    kind = "multiple_choice"
    labels = BINARY
    folders = ("COPA", "superglue_copa")
    files = three_files(".jsonl", 400, 100, 500, "val")
    text_columns = ()
    values = answers = (0, 1)

    def _inputs(self, row: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
        question = member(row, "question", str)
        if question not in ("cause", "effect"):
            raise BadRowError(f"question {question!r} is neither 'cause' nor 'effect'")
        link = "because" if question == "cause" else "so"
        premise = member(row, "premise", str).strip()
        options = [member(row, key, str).strip() for key in ("choice1", "choice2")]
        return tuple((premise, f"{link} {option}") for option in options)


class SuperGlueRTE(SuperGlueTask):
    """Textual entailment, SuperGLUE's files of it."""

    name = "SuperGLUERTE"
    labels = ENTAILMENT
    folders = ("RTE", "superglue_rte")
    files = three_files(".jsonl", 2490, 277, 3000, "val")


class WiC(SuperGlueTask):
    """Does a word have the same sense in two sentences?

    The word is marked in the text: asterisks stand around it, spaced ("a * place * to sit"), so
    that the word's own tokens are those it has in running text.
    """

    name = "WiC"
    labels = ("false", "true")
    folders = ("WiC", "superglue_wic")
    files = three_files(".jsonl", 5428, 638, 1400, "val")
    text_columns = ()
    values = (False, True)

    def _inputs(self, row: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
        return (tuple(_marked(row, number) for number in "12"),)


def _marked(row: dict[str, Any], number: str) -> str:
    text = member(row, f"sentence{number}", str)
    start, end = member(row, f"start{number}", int), member(row, f"end{number}", int)
    if not 0 <= start < end <= len(text):
        raise BadRowError(f"start{number} {start} and end{number} {end} lie outside the sentence")
    return f"{text[:start]}* {text[start:end]} *{text[end:]}".strip()


class WSC(SuperGlueTask):
    """Does the pronoun (span 2) mean the noun (span 1)? Input: (text, "pronoun means noun")."""

    name = "WSC"
    labels = ("False", "True")
    folders = ("WSC", "superglue_wsc")
    files = three_files(".jsonl", 554, 104, 146, "val")
    text_columns = ()
    values = (False, True)

    def _inputs(self, row: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
        target = member(row, "target", dict)
        noun, pronoun = (member(target, key, str).strip() for key in ("span1_text", "span2_text"))
        return ((member(row, "text", str).strip(), f"{pronoun} means {noun}"),)


class AXb(SuperGlueTask):
    """Broad-coverage diagnostics, predicted with a SuperGLUE RTE model."""

    name = "AX-b"
    labels = ENTAILMENT
    folders = ("AX-b", "superglue_ax_b")
    files = (File("test", "AX-b.jsonl", 1104),)
    text_columns = ("sentence1", "sentence2")
    measures = (metrics.matthews,)
    headline = ("matthews",)
    model_task = "SuperGLUERTE"


class AXg(SuperGlueTask):
    """Winogender as inference, predicted with a SuperGLUE RTE model.

    Rows 2k and 2k + 1 are a minimal pair that differs in the gender of a pronoun; parity is the
    share of the pairs with the same prediction for both.
    """

    name = "AX-g"
    labels = ENTAILMENT
    folders = ("AX-g", "superglue_ax_g")
    files = (File("test", "AX-g.jsonl", 356),)
    headline = ("accuracy", "parity")
    model_task = "SuperGLUERTE"

    def metrics(self, examples: Sequence[Example], scores: np.ndarray) -> dict[str, float]:
        """Return accuracy and gender parity."""
        pairs = [int(example.uid) // 2 for example in examples]  # type: ignore[arg-type]
        parity = metrics.parity(pairs, self.predict(scores))
        return {**super().metrics(examples, scores), "parity": parity}


class MultiRC(SuperGlueTask):
    """Which of the answers to a question about a paragraph are right? One input per answer.

    Input: (paragraph, question + answer). Both the current layout and the one before SuperGLUE's
    version 2, which GluonNLP's cache has, are read.
    """

    name = "MultiRC"
    labels = BINARY
    folders = ("MultiRC", "superglue_multirc")
    files = three_files(".jsonl", 27243, 4848, 9693, "val")
    text_columns = ()
    headline = ("f1a", "exact_match")
    counts_from_zero = False
    values = answers = (0, 1)

    def _examples(self, row: dict[str, Any], index: int) -> list[Example]:
        old = "paragraph" in row
        passage = member(row, "paragraph" if old else "passage", dict)
        text = _running_text(member(passage, "text", str))
        examples = []
        for place, question in enumerate(map(_object, member(passage, "questions", list))):
            asked = member(question, "question", str).strip()
            for rank, answer in enumerate(map(_object, member(question, "answers", list))):
                # Only the old layout may do without indices; no leaderboard takes it.
                uid = (
                    index,
                    _index(question, place) if old else member(question, "idx", int),
                    _index(answer, rank) if old else member(answer, "idx", int),
                )
                pair = (text, f"{asked} {member(answer, 'text', str).strip()}")
                examples.append(Example(uid, (pair,), self._label(answer)))
        return examples

    def _label(self, row: dict[str, Any]) -> Optional[int]:
        if "isAnswer" in row:  # the layout before version 2
            return int(bool(row["isAnswer"]))
        return super()._label(row)

    def metrics(self, examples: Sequence[Example], scores: np.ndarray) -> dict[str, float]:
        """Return F1 over all answers (F1a) and the share of questions without a mistake."""
        labels = np.array([example.label for example in examples])
        predictions = self.predict(scores)
        questions = [_parts(example)[:2] for example in examples]
        return {
            "f1a": metrics.f1(labels, predictions),
            "exact_match": metrics.exact_groups(questions, labels, predictions),
        }

    def submission(self, examples: Sequence[Example], scores: np.ndarray) -> list[str]:
        """Return one nested JSON object per paragraph."""
        paragraphs: dict[int, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
        for example, prediction in zip(examples, self.predict(scores)):
            paragraph, question, answer = _parts(example)
            paragraphs[paragraph][question].append({"idx": answer, "label": int(prediction)})
        return [
            json.dumps({"idx": paragraph, "passage": {"questions": [
                {"idx": question, "answers": answers} for question, answers in questions.items()
            ]}})
            for paragraph, questions in paragraphs.items()
        ]  # fmt: skip

    def _parse_prediction(self, row: dict[str, Any]) -> list[Uid]:
        paragraph = member(row, "idx", int)
        index: list[Uid] = []
        for question in map(_object, member(member(row, "passage", dict), "questions", list)):
            for answer in map(_object, member(question, "answers", list)):
                (number,) = super()._parse_prediction(answer)
                index.append((paragraph, member(question, "idx", int), number))  # type: ignore
        return index


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRowError(f"holds {json.dumps(value)} where an object belongs")
    return value


def _parts(example: Example) -> tuple[int, ...]:
    assert isinstance(example.uid, tuple)
    return example.uid


def _running_text(text: str) -> str:
    """Take the sentence numbers and line breaks of the old layout out of a paragraph."""
    return " ".join(re.sub(r"<b>Sent \d+: </b>|<br>", " ", text).split())


class Query(NamedTuple):
    """A ReCoRD query: official index, passage, text, its entities, and the answers if known."""

    number: int
    passage: str
    text: str
    entities: tuple[str, ...]
    answers: tuple[str, ...]


class ReCoRD(SuperGlueTask):
    """Which entity of the passage belongs at the query's placeholder?

    Input per entity: (passage, query with the entity in place). The entity with the highest
    positive score answers the query, on dev and test among all entities. Training keeps the
    right entities and as many wrong ones, drawn by seed. In the passage a dash stands for each
    "@highlight".
    """

    name = "ReCoRD"
    kind = "candidates"
    labels = BINARY
    folders = ("ReCoRD", "superglue_record")
    files = three_files(".jsonl", 100730, 10000, 10000, "val")
    text_columns = ()
    label_key = "answers"
    headline = ("f1", "exact_match")
    counts_from_zero = False

    def count_rows(self, examples: Sequence[Example]) -> int:
        """Return the number of queries."""
        return len(self.submission_index(examples))

    def _read(self, path: Path, split: str, skip_bad_rows: bool, seed: int) -> Split:
        def cast(line: Line) -> list[Example]:
            """Return the examples of one passage."""
            row = parse_object(line.content)
            queries = _queries(row)
            if split not in self.test and not all(query.answers for query in queries):
                raise BadRowError("has a query without answers")
            if split == self.train:
                return [e for query in queries for e in _balanced(query, seed)]
            return self._examples(row, line.number)

        return Split(*collect(read_lines(path), cast, skip_bad_rows))

    def _examples(self, row: dict[str, Any], index: int) -> list[Example]:
        return [e for query in _queries(row) for e in _candidates(query, query.entities)]

    def _chosen(self, examples: Sequence[Example], scores: np.ndarray) -> dict[int, Example]:
        """Return the best candidate of each query; the first one of equals."""
        # The margin orders candidates as the probability of the positive class does.
        margins = np.asarray(scores)[:, 1] - np.asarray(scores)[:, 0]
        best: dict[int, tuple[float, Example]] = {}
        for example, margin in zip(examples, margins):
            query = _parts(example)[0]
            if query not in best or margin > best[query][0]:
                best[query] = (float(margin), example)
        return {query: example for query, (_, example) in best.items()}

    def metrics(self, examples: Sequence[Example], scores: np.ndarray) -> dict[str, float]:
        """Return F1 and exact match of the chosen answers, the best over the right ones."""
        chosen = self._chosen(examples, scores).values()
        return {
            "f1": float(np.mean([metrics.answer_f1(e.candidate, e.answers) for e in chosen])),
            "exact_match": float(
                np.mean([metrics.answer_match(e.candidate, e.answers) for e in chosen])
            ),
        }

    def submission(self, examples: Sequence[Example], scores: np.ndarray) -> list[str]:
        """Return one {"idx": query, "label": answer text} per line."""
        return [
            json.dumps({"idx": query, "label": example.candidate}, ensure_ascii=False)
            for query, example in self._chosen(examples, scores).items()
        ]

    def submission_index(self, examples: Sequence[Example]) -> list[Uid]:
        """Return the indices of the queries."""
        return list(dict.fromkeys(_parts(example)[0] for example in examples))

    def parse_submission(
        self, path: Path, examples: Optional[Sequence[Example]] = None
    ) -> list[Uid]:
        """Check every line; with `examples` the answers have to be entities of the query."""
        entities: dict[int, set[str]] = defaultdict(set)
        for example in examples or ():
            entities[_parts(example)[0]].add(example.candidate)

        def parse(line: Line) -> list[Uid]:
            """Return the query that one line answers."""
            row = parse_object(line.content)
            query, answer = member(row, "idx", int), member(row, "label", str)
            if answer not in entities.get(query, {answer}):
                raise BadRowError(f"label {answer!r} is no entity of query {query}")
            return [query]

        return collect(read_lines(path), parse, False, REWRITE)[0]


def _queries(row: dict[str, Any]) -> list[Query]:
    passage = member(row, "passage", dict)
    text = member(passage, "text", str)
    entities = tuple(dict.fromkeys(_spans(text, member(passage, "entities", list))))
    running = re.sub(r"\s*@highlight\s*", " - ", text).strip()
    queries = []
    for query in map(_object, member(row, "qas", list)):
        asked = member(query, "query", str)
        if "@placeholder" not in asked:
            raise BadRowError("has a query without '@placeholder'")
        right = map(_object, member({"answers": [], **query}, "answers", list))
        answers = dict.fromkeys(member(answer, "text", str) for answer in right)
        queries.append(Query(member(query, "idx", int), running, asked, entities, tuple(answers)))
    return queries


def _spans(text: str, entities: list[Any]) -> list[str]:
    """Return the entities' texts in the order of the passage; their ends are inclusive."""
    if not entities:
        raise BadRowError("has no entities")
    places = sorted(
        (member(e, "start", int), member(e, "end", int)) for e in map(_object, entities)
    )
    if places[0][0] < 0 or any(not start <= end < len(text) for start, end in places):
        raise BadRowError("has an entity outside the passage")
    return [text[start : end + 1] for start, end in places]


def _candidates(query: Query, entities: Sequence[str]) -> list[Example]:
    right = set(map(metrics.normalise_answer, query.answers))
    return [
        Example(
            uid=(query.number, number),
            inputs=((query.passage, query.text.replace("@placeholder", entity).strip()),),
            label=int(metrics.normalise_answer(entity) in right) if right else None,
            candidate=entity,
            answers=query.answers,
        )
        for number, entity in enumerate(entities)
    ]


def _balanced(query: Query, seed: int) -> list[Example]:
    """Return the right candidates of a query and as many wrong ones, drawn by seed.

    An answer that no entity spells is a candidate itself: no query is dropped.
    """
    candidates = _candidates(query, query.entities)
    if not any(example.label for example in candidates):
        candidates = _candidates(query, (*query.entities, *query.answers))
    wrong = [number for number, example in enumerate(candidates) if not example.label]
    order = np.random.default_rng([seed, query.number]).permutation(wrong)
    drawn = set(order[: len(candidates) - len(wrong)].tolist())
    return [e for number, e in enumerate(candidates) if e.label or number in drawn]


SUPER_GLUE_TASKS = (BoolQ, CB, COPA, MultiRC, ReCoRD, SuperGlueRTE, WiC, WSC, AXb, AXg)
