"""The eight tasks of SuperGLUE and its diagnostic sets AX-b and AX-g: one JSON object per line.

Wang et al., "SuperGLUE: A Stickier Benchmark for General-Purpose Language Understanding Systems"
(2019).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np

from bort.errors import escaped, quoted
from bort.types import JSONMapping, JSONObject, TaskKind
from data import metrics
from data.glue import BINARY, ENTAILMENT
from data.rows import (
    BadRowError,
    Line,
    collect,
    parse_index,
    parse_object,
    read_lines,
    read_submission_lines,
    require_field,
    require_index,
    require_keys,
    submission_object,
)
from data.task import REWRITE, Example, File, Split, Task, Uid, split_files


class Fields(NamedTuple):
    """How the label and the index of a JSON object are read; the object may be inside another one.

    label: returns the label of an object, None where there is none.
    number: returns the index of an object, given its position among its neighbours.
    """

    label: Callable[[JSONObject], Optional[int]]
    number: Callable[[JSONObject, int], int]


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

    def _read(self, path: Path, split: str, skip_bad_rows: Optional[bool], seed: int) -> Split:
        fields = self._fields(split)
        lines: dict[Uid, int] = {}

        def cast(line: Line) -> list[Example]:
            """Return the examples of one line."""
            examples = self._examples(parse_object(line.content), line.number - 1, fields)
            if not self.counts_from_zero:
                _require_new(lines, line, (example.uid for example in examples))
            if split not in self.test and any(e.label is None for e in examples):
                raise BadRowError(f"has no {self.label_key!r}")
            return examples

        return Split(*collect(read_lines(path), cast, skip_bad_rows))

    def _fields(self, split: str) -> Fields:
        return Fields(self._test_label if split in self.test else self._label, _index)

    def cast_row(self, row: JSONMapping, number: int) -> list[Example]:
        """Return the examples of one row: MultiRC and ReCoRD may have several."""
        return self._examples(dict(row), number, Fields(lambda _: None, lambda _, number: number))

    def _examples(self, row: JSONObject, number: int, fields: Fields) -> list[Example]:
        return [Example(fields.number(row, number), self._inputs(row), fields.label(row))]

    def _inputs(self, row: JSONObject) -> tuple[tuple[str, ...], ...]:
        return (tuple(require_field(row, key, str).strip() for key in self.text_columns),)

    def _label(self, row: JSONObject) -> Optional[int]:
        value = row.get(self.label_key)
        return None if value is None else _class_index(value, self.values or self.labels)

    def _test_label(self, row: JSONObject) -> Optional[int]:
        try:
            return self._label(row)
        except BadRowError:  # a placeholder, such as Hugging Face's -1
            return None

    def submission_file(self, split: str) -> Optional[str]:
        """Return the official file name, such as BoolQ.jsonl."""
        return f"{self.folders[0]}.jsonl"

    def submission(self, examples: Sequence[Example], logits: np.ndarray) -> list[str]:
        """Return one JSON object {"idx": ..., "label": ...} per line."""
        answers = self.answers or self.labels
        return [
            json.dumps({"idx": example.uid, "label": answers[prediction]})
            for example, prediction in zip(examples, self.predict(logits))
        ]

    def parse_submission(
        self, path: Path, examples: Optional[Sequence[Example]] = None
    ) -> list[Uid]:
        """Check keys and labels of every line, and return the indices."""

        def parse(line: Line) -> list[Uid]:
            """Return the indices that one line predicts."""
            return self._parse_prediction(submission_object(line))

        return collect(read_submission_lines(path), parse, None, REWRITE)[0]

    def _parse_prediction(self, row: JSONObject) -> list[Uid]:
        require_keys(row, "idx", "label")
        _class_index(row["label"], self.answers or self.labels)
        return [require_index(row)]


def _class_index(value: Any, known: Sequence[Any]) -> int:
    """Return the position of a value among the known labels."""
    # Compared as JSON: in Python, True equals 1.
    texts = [json.dumps(label) for label in known]
    try:
        text = json.dumps(value)
    except RecursionError:
        text = quoted(value)
    if text not in texts:
        raise BadRowError(f"label {escaped(text)} is not one of {', '.join(texts)}")
    return texts.index(text)


def _index(row: JSONObject, number: int) -> int:
    """Return the official index of an object; AX-b's is text, old files have none."""
    index = row.get("idx", number)
    return parse_index(index) if isinstance(index, str) else require_index({"idx": index})


def _require_new(lines: dict[Uid, int], line: Line, indices: Iterable[Uid]) -> None:
    """Record the line of each index; raises `BadRowError` when one has come before.

    MultiRC's and ReCoRD's answers are grouped by index: two questions would become one.
    """
    for index in indices:
        if index in lines:
            raise BadRowError(f"has the index {index}, as line {lines[index]}")
        lines[index] = line.number


class BoolQ(SuperGlueTask):
    """Answer a yes/no question about a passage."""

    name = "BoolQ"
    labels = ("false", "true")
    folders = ("BoolQ", "superglue_boolq")
    files = split_files(".jsonl", 9427, 3270, 3245, "val")
    text_columns = ("passage", "question")
    values = (False, True)


class CB(SuperGlueTask):
    """CommitmentBank: does the hypothesis follow? The premise is kept as it is."""

    name = "CB"
    labels = ("entailment", "neutral", "contradiction")
    folders = ("CB", "superglue_cb")
    files = split_files(".jsonl", 250, 56, 250, "val")
    measures = (metrics.accuracy, metrics.macro_f1)
    headline = ("accuracy", "macro_f1")


class COPA(SuperGlueTask):
    """Which of two sentences is the cause or the effect of the premise?

    Multiple choice: each option is an input (premise, "because" or "so" + option).
    """

    name = "COPA"
    kind = TaskKind.MULTIPLE_CHOICE
    labels = BINARY
    folders = ("COPA", "superglue_copa")
    files = split_files(".jsonl", 400, 100, 500, "val")
    text_columns = ()
    values = answers = (0, 1)

    def _inputs(self, row: JSONObject) -> tuple[tuple[str, ...], ...]:
        question = require_field(row, "question", str)
        if question not in ("cause", "effect"):
            raise BadRowError(f"question {quoted(question)} is neither 'cause' nor 'effect'")
        link = "because" if question == "cause" else "so"
        premise = require_field(row, "premise", str).strip()
        options = [require_field(row, key, str).strip() for key in ("choice1", "choice2")]
        return tuple((premise, f"{link} {option}") for option in options)

    def fixed_part(self, place: int, text: str) -> str:
        """Return the word before an option: without it nobody knows which way to look."""
        return text.partition(" ")[0] if place else ""

    def source_texts(self, row: JSONMapping) -> list[str]:
        """Return the premise and both options."""
        return [row["premise"], row["choice1"], row["choice2"]]


class SuperGlueRTE(SuperGlueTask):
    """Textual entailment, SuperGLUE's files of it."""

    name = "SuperGLUERTE"
    labels = ENTAILMENT
    folders = ("RTE", "superglue_rte")
    files = split_files(".jsonl", 2490, 277, 3000, "val")


class WiC(SuperGlueTask):
    """Does a word have the same sense in two sentences?

    The word is marked in the text by asterisks with spaces ("a * place * to sit"), so that its
    tokens are the same as in running text.
    """

    name = "WiC"
    labels = ("false", "true")
    folders = ("WiC", "superglue_wic")
    files = split_files(".jsonl", 5428, 638, 1400, "val")
    text_columns = ()
    values = (False, True)

    def _inputs(self, row: JSONObject) -> tuple[tuple[str, ...], ...]:
        return (tuple(_marked(row, number) for number in "12"),)

    def fixed_part(self, place: int, text: str) -> str:
        """Return the marked word with its marks."""
        return _marked_parts(text)

    def source_texts(self, row: JSONMapping) -> list[str]:
        """Return both sentences."""
        return [row["sentence1"], row["sentence2"]]


def _marked_parts(text: str) -> str:
    return " ".join(found.group() for found in re.finditer(r"\S*([*#]) .+? \1\S*", text))


def _marked(row: JSONObject, number: str) -> str:
    text = require_field(row, f"sentence{number}", str)
    start, end = require_field(row, f"start{number}", int), require_field(row, f"end{number}", int)
    if not 0 <= start < end <= len(text):
        raise BadRowError(f"start{number} {start} and end{number} {end} are outside the sentence")
    return f"{text[:start]}* {text[start:end]} *{text[end:]}".strip()


class WSC(SuperGlueTask):
    """Does the pronoun (span 2) mean the noun (span 1)?

    Input: (text, "pronoun means noun"). The same words may occur elsewhere in the text, so that
    the pronoun is marked by asterisks and the noun by number signs, each with spaces: "# Ann #
    told Sue that * she * had won". Version 1 of the inputs had no marks.
    """

    name = "WSC"
    labels = ("False", "True")
    folders = ("WSC", "superglue_wsc")
    files = split_files(".jsonl", 554, 104, 146, "val")
    text_columns = ()
    values = (False, True)
    inputs_version = 2

    def _inputs(self, row: JSONObject) -> tuple[tuple[str, ...], ...]:
        target = require_field(row, "target", dict)
        words = require_field(row, "text", str).split()
        noun, pronoun = (_span(words, target, number) for number in "12")
        marks = [(noun, "#"), (pronoun, "*")]
        # One span may contain the other: the marks of the shorter one are the inner ones.
        for span, mark in sorted(marks, key=lambda marked: marked[0].end - marked[0].start):
            if span.end > span.start:
                words[span.start] = f"{mark} {words[span.start]}"
                words[span.end - 1] = f"{words[span.end - 1]} {mark}"
        return ((" ".join(words), f"{pronoun.text} means {noun.text}"),)

    def fixed_part(self, place: int, text: str) -> str:
        """Return both spans with their marks, and the whole of what names them again."""
        return text if place else _marked_parts(text)


class Span(NamedTuple):
    """A span of WSC: words `start` to `end` (exclusive) of the text."""

    start: int
    end: int
    text: str


# Official rows whose index is wrong, by index and text: the index meant, None where the text names
# two persons who stand apart.
_WRONG_INDICES: Mapping[tuple[int, str], Optional[int]] = {
    (30, "it"): 31,
    (4, "Stalin and Kamenev"): 14,
    (3, "Kamenev and Zinoviev"): None,
    (4, "Kamenev, Zinoviev, and Stalin"): None,
}


def _span(words: Sequence[str], target: JSONObject, number: str) -> Span:
    """Return a span of WSC; raises `BadRowError` when its text is not at its index."""
    text = require_field(target, f"span{number}_text", str).strip()
    index = require_index(target, f"span{number}_index")
    wanted = text.split()
    if not wanted:
        raise BadRowError(f"'span{number}_text' is empty")
    if _bare(words[index : index + len(wanted)]) != _bare(wanted):
        corrected = _WRONG_INDICES.get((index, text), -1)
        if corrected is None:
            return Span(0, 0, text)
        if corrected < 0 or _bare(words[corrected : corrected + len(wanted)]) != _bare(wanted):
            found = quoted(" ".join(words[index : index + len(wanted)]))
            raise BadRowError(
                f"'span{number}_index' is {index}, where the text has {found}, not {quoted(text)}"
            )
        index = corrected
    return Span(index, index + len(wanted), text)


def _bare(words: Sequence[str]) -> str:
    """Return words in lower case without the punctuation and the 's that may follow them."""
    text = " ".join(words).casefold().replace("\u2019", "'").strip(_PUNCTUATION)
    return text[:-2].strip(_PUNCTUATION) if text.endswith("'s") else text


_PUNCTUATION = ".,;:!?\"'()[]\u201c\u201d\u2018\u2019- "


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
    fraction of pairs with the same prediction for both.
    """

    name = "AX-g"
    labels = ENTAILMENT
    folders = ("AX-g", "superglue_ax_g")
    files = (File("test", "AX-g.jsonl", 356),)
    headline = ("accuracy", "parity")
    model_task = "SuperGLUERTE"

    def metrics(self, examples: Sequence[Example], logits: np.ndarray) -> dict[str, float]:
        """Return accuracy and gender parity."""
        self.check_scored(examples, logits)
        pairs = [int(example.uid) // 2 for example in examples]  # type: ignore[arg-type]
        parity = metrics.parity(pairs, self.predict(logits))
        return {**super().metrics(examples, logits), "parity": parity}


class MultiRC(SuperGlueTask):
    """Which of the answers to a question about a paragraph are right? One input per answer.

    Input: (paragraph, question + answer). Read in the current layout and in that before
    SuperGLUE's version 2, which GluonNLP's cache has.
    """

    name = "MultiRC"
    labels = BINARY
    folders = ("MultiRC", "superglue_multirc")
    files = split_files(".jsonl", 27243, 4848, 9693, "val")
    text_columns = ()
    headline = ("f1a", "exact_match")
    counts_from_zero = False
    values = answers = (0, 1)

    def _examples(self, row: JSONObject, number: int, fields: Fields) -> list[Example]:
        old = "paragraph" in row
        passage = require_field(row, "paragraph" if old else "passage", dict)
        text = _running_text(require_field(passage, "text", str))
        paragraph = fields.number(row, number)
        if fields.number is _index and not old:  # no leaderboard takes the old layout
            fields = fields._replace(number=lambda item, _: require_index(item))
        examples = []
        for position, question in enumerate(_objects(passage, "questions")):
            question_text = require_field(question, "question", str).strip()
            for rank, answer in enumerate(_objects(question, "answers")):
                uid = (paragraph, fields.number(question, position), fields.number(answer, rank))
                pair = (text, f"{question_text} {require_field(answer, 'text', str).strip()}")
                examples.append(Example(uid, (pair,), fields.label(answer)))
        return examples

    def source_texts(self, row: JSONMapping) -> list[str]:
        """Return the paragraph, and each question with its answers."""
        passage = row["paragraph" if "paragraph" in row else "passage"]
        texts = [passage["text"]]
        for question in passage["questions"]:
            texts += [question["question"], *(answer["text"] for answer in question["answers"])]
        return texts

    def _label(self, row: JSONObject) -> Optional[int]:
        if "isAnswer" in row:  # the layout before version 2
            return int(bool(row["isAnswer"]))
        return super()._label(row)

    def metrics(self, examples: Sequence[Example], logits: np.ndarray) -> dict[str, float]:
        """Return F1 over all answers (F1a) and the fraction of questions without a mistake."""
        self.check_scored(examples, logits)
        labels = np.array([example.label for example in examples])
        predictions = self.predict(logits)
        questions = [_parts(example)[:2] for example in examples]
        return {
            "f1a": metrics.f1(labels, predictions),
            "exact_match": metrics.exact_groups(questions, labels, predictions),
        }

    def submission(self, examples: Sequence[Example], logits: np.ndarray) -> list[str]:
        """Return one nested JSON object per paragraph."""
        paragraphs: dict[int, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
        for example, prediction in zip(examples, self.predict(logits)):
            paragraph, question, answer = _parts(example)
            paragraphs[paragraph][question].append({"idx": answer, "label": int(prediction)})
        return [
            json.dumps({"idx": paragraph, "passage": {"questions": [
                {"idx": question, "answers": answers} for question, answers in questions.items()
            ]}})
            for paragraph, questions in paragraphs.items()
        ]  # fmt: skip

    def _parse_prediction(self, row: JSONObject) -> list[Uid]:
        require_keys(row, "idx", "passage")
        passage = require_field(row, "passage", dict)
        require_keys(passage, "questions")
        index: list[Uid] = []
        for question in _objects(passage, "questions"):
            require_keys(question, "idx", "answers")
            if not question["answers"]:
                raise BadRowError("has a question without answers")
            for answer in _objects(question, "answers"):
                (number,) = super()._parse_prediction(answer)
                uid = (require_index(row), require_index(question), number)
                index.append(uid)  # type: ignore[arg-type]
        return index


def _objects(row: JSONObject, key: str) -> list[JSONObject]:
    """Return the list of objects `row[key]`."""
    items = require_field(row, key, list)
    for item in items:
        if not isinstance(item, dict):
            raise BadRowError(f"{key!r} contains {quoted(item)}, expected objects")
    return items


def _parts(example: Example) -> tuple[int, ...]:
    assert isinstance(example.uid, tuple)
    return example.uid


def _running_text(text: str) -> str:
    """Remove the sentence numbers and line breaks of the old layout from a paragraph."""
    return " ".join(re.sub(r"<b>Sent \d+: </b>|<br>", " ", text).split())


class Query(NamedTuple):
    """A ReCoRD query: official index, passage, text, entities, and the right answers if known."""

    number: int
    passage: str
    text: str
    entities: tuple[str, ...]
    answers: tuple[str, ...]


class ReCoRD(SuperGlueTask):
    """Which entity of the passage belongs at the query's placeholder?

    Input per entity: (passage, query with the entity in place). The entity with the highest
    positive logit margin answers the query, on dev and test among all entities. Training keeps
    the right entities and as many wrong ones, drawn by seed. In the passage a dash stands for each
    "@highlight".
    """

    name = "ReCoRD"
    kind = TaskKind.CANDIDATES
    labels = BINARY
    folders = ("ReCoRD", "superglue_record")
    files = split_files(".jsonl", 100730, 10000, 10000, "val")
    text_columns = ()
    label_key = "answers"
    headline = ("f1", "exact_match")
    counts_from_zero = False

    def count_rows(self, examples: Sequence[Example]) -> int:
        """Return the number of queries."""
        return len(self.submission_index(examples))

    def first_rows(self, examples: Sequence[Example], rows: Optional[int]) -> Sequence[Example]:
        """Return the examples of the first `rows` queries."""
        queries = set(self.submission_index(examples)[:rows])
        return [example for example in examples if _parts(example)[0] in queries]

    def _read(self, path: Path, split: str, skip_bad_rows: Optional[bool], seed: int) -> Split:
        answers = _test_answers if split in self.test else _right_answers
        lines: dict[Uid, int] = {}

        def cast(line: Line) -> list[Example]:
            """Return the examples of one passage."""
            queries = _queries(parse_object(line.content), answers, _query_index)
            _require_new(lines, line, (query.number for query in queries))
            if split not in self.test and not all(query.answers for query in queries):
                raise BadRowError("has a query without answers")
            if split == self.train:
                return [e for query in queries for e in _balanced(query, seed)]
            return [e for query in queries for e in _candidates(query, query.entities)]

        return Split(*collect(read_lines(path), cast, skip_bad_rows))

    def cast_row(self, row: JSONMapping, number: int) -> list[Example]:
        """Return an example per query and entity of a passage."""
        queries = _queries(dict(row), lambda _: (), lambda _, position: number + position)
        return [e for query in queries for e in _candidates(query, query.entities)]

    def source_texts(self, row: JSONMapping) -> list[str]:
        """Return the passage, the queries and the entities."""
        passage, queries = row["passage"], [query["query"] for query in row["qas"]]
        return [passage["text"], *queries, *_spans(passage["text"], passage["entities"])]

    def _chosen(self, examples: Sequence[Example], logits: np.ndarray) -> dict[int, Example]:
        """Return the best candidate of each query; the first one of equals."""
        # The margin orders candidates as the probability of the positive class does.
        margins = np.asarray(logits)[:, 1] - np.asarray(logits)[:, 0]
        best: dict[int, tuple[float, Example]] = {}
        for example, margin in zip(examples, margins):
            query = _parts(example)[0]
            if query not in best or margin > best[query][0]:
                best[query] = (float(margin), example)
        return {query: example for query, (_, example) in best.items()}

    def metrics(self, examples: Sequence[Example], logits: np.ndarray) -> dict[str, float]:
        """Return F1 and exact match of the chosen answers, each the best over the right ones."""
        self.check_scored(examples, logits)
        chosen = self._chosen(examples, logits).values()
        return {
            "f1": float(np.mean([metrics.answer_f1(e.candidate, e.answers) for e in chosen])),
            "exact_match": float(
                np.mean([metrics.answer_match(e.candidate, e.answers) for e in chosen])
            ),
        }

    def submission(self, examples: Sequence[Example], logits: np.ndarray) -> list[str]:
        """Return one {"idx": query, "label": answer text} per line."""
        return [
            json.dumps({"idx": query, "label": example.candidate}, ensure_ascii=False)
            for query, example in self._chosen(examples, logits).items()
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
            row = submission_object(line)
            require_keys(row, "idx", "label")
            query, answer = require_index(row), require_field(row, "label", str)
            if not answer.strip():
                raise BadRowError("'label' is empty")
            if answer not in entities.get(query, {answer}):
                raise BadRowError(f"label {quoted(answer)} is not an entity of query {query}")
            return [query]

        return collect(read_submission_lines(path), parse, None, REWRITE)[0]


def _query_index(query: JSONObject, position: int) -> int:
    """Return the official index of a query."""
    return require_index(query)


def _right_answers(query: JSONObject) -> tuple[str, ...]:
    """Return the right answers of a query without repetitions, () where none are given."""
    if "answers" not in query:
        return ()
    texts = [require_field(answer, "text", str) for answer in _objects(query, "answers")]
    return tuple(dict.fromkeys(texts))


def _test_answers(query: JSONObject) -> tuple[str, ...]:
    """Return the right answers of a query of a test set, () where they cannot be read."""
    try:
        return _right_answers(query)
    except BadRowError:
        return ()


def _queries(
    row: JSONObject,
    answers: Callable[[JSONObject], tuple[str, ...]],
    index: Callable[[JSONObject, int], int],
) -> list[Query]:
    """Return the queries of a passage; `answers` and `index` read those of a query."""
    passage = require_field(row, "passage", dict)
    text = require_field(passage, "text", str)
    entities = tuple(dict.fromkeys(_spans(text, _objects(passage, "entities"))))
    running = re.sub(r"\s*@highlight\s*", " - ", text).strip()
    queries = []
    for position, query in enumerate(_objects(row, "qas")):
        query_text = require_field(query, "query", str)
        if "@placeholder" not in query_text:
            raise BadRowError("has a query without '@placeholder'")
        number = index(query, position)
        queries.append(Query(number, running, query_text, entities, answers(query)))
    return queries


def _spans(text: str, entities: Sequence[JSONObject]) -> list[str]:
    """Return the entities' texts in the order of the passage; their ends are inclusive."""
    if not entities:
        raise BadRowError("has no entities")
    spans = sorted(
        (require_field(entity, "start", int), require_field(entity, "end", int))
        for entity in entities
    )
    if spans[0][0] < 0 or any(not start <= end < len(text) for start, end in spans):
        raise BadRowError("has an entity outside the passage")
    return [text[start : end + 1] for start, end in spans]


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

    An answer that is not spelled like an entity becomes a candidate: no query is dropped.
    """
    candidates = _candidates(query, query.entities)
    if not any(example.label for example in candidates):
        candidates = _candidates(query, (*query.entities, *query.answers))
    wrong = [number for number, example in enumerate(candidates) if not example.label]
    order = np.random.default_rng([seed, query.number]).permutation(wrong)
    drawn = set(order[: len(candidates) - len(wrong)].tolist())
    return [e for number, e in enumerate(candidates) if e.label or number in drawn]


SUPER_GLUE_TASKS = (BoolQ, CB, COPA, MultiRC, ReCoRD, SuperGlueRTE, WiC, WSC, AXb, AXg)
