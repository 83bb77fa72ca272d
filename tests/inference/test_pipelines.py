"""Prediction: what finetuning says of the same rows, in order, as the inputs come."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterable

import numpy as np
import pytest
from mxnet import nd

import bort.bort
import finetune_classifier
from bort.errors import UserError
from bort.finetuning.scoring import predict_logits
from bort.inference import masked_lm, prediction_files
from bort.inference.base import (
    BATCH_SIZE,
    WINDOW,
    InputSchema,
    Located,
    locate,
    predictions,
    windows,
)
from bort.inference.classification import Prediction, load_classifier
from bort.inference.masked_lm import MASKS_AT_ONCE, load_mask_filler, mask_ids
from bort.inference.pipelines import fill_mask, predict
from bort.inference.prediction_files import InputReader, LineReader, open_input
from bort.inference.runtime import load_runtime
from bort.saved_model import (
    MASKED_LM,
    ModelConfig,
    SavedModel,
    build_network,
    load_model,
    save_model,
)
from bort.tokenization import (
    BYTE_TO_CHARACTER,
    SPECIAL_TOKENS,
    ByteLevelBPE,
    TokenizerSettings,
    load_tokenizer,
)
from bort.wordpiece import Normalizer, WordPiece
from data.encoding import ClassifierLoader, encode_examples
from data.tasks import get_task
from scripts import predict as program
from tests import reference
from tests.wordpieces import SPECIAL, VOCABULARY

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "test_data"
SHAPE = "bort_1_2_16_16"
TEXTS = ["a fine film", "the the old man went to the market " * 3, "no", "rain, and more rain"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TokenizerSettings())


def saved(folder: Path, tokenizer: Any, name: str = "SST-2", race_cast: str = "") -> SavedModel:
    """Save a classifier of a task, with weights that make answers differ."""
    task = get_task(name, race_cast=race_cast or "choices")
    model_config = ModelConfig(
        model=SHAPE,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        kind=task.kind,
        task=task.name,
        labels=task.labels,
        num_outputs=task.num_outputs,
        max_len=64,
        race_cast=race_cast,
        inputs_version=task.inputs_version,
    )
    return _saved(folder / "best.params", model_config, tokenizer)


def saved_masked_lm(folder: Path, tokenizer: Any, max_len: int = 64) -> SavedModel:
    model_config = ModelConfig(
        SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, MASKED_LM, max_len=max_len
    )
    return _saved(folder / "bort.params", model_config, tokenizer)


def _saved(path: Path, model_config: ModelConfig, tokenizer: Any) -> SavedModel:
    network = build_network(model_config)
    reference.redraw(network, seed=4, deviation=0.5)
    save_model(str(path), network, model_config, tokenizer)
    return SavedModel(network, model_config, tokenizer)


def run(capfdbinary: Any, folder: Path, *flags: str) -> list[str]:
    """Run the program and return the lines it printed."""
    program.main(["--model_parameters", str(folder), *map(str, flags)])
    return capfdbinary.readouterr().out.decode().splitlines()


def by_itself(model: SavedModel, *texts: str) -> np.ndarray:
    """Return the probabilities of one input by a direct forward pass without padding."""
    tokenizer = model.tokenizer
    ids = [tokenizer.bos_id]
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.eos_id]
    scores = model.network(nd.array([ids]), nd.array([len(ids)])).asnumpy()
    return reference.softmax(scores.astype(np.float64))[0]


def test_paths_may_be_objects_everywhere(tmp_path, tokenizer):
    model = saved(tmp_path / "first", tokenizer)
    path = tmp_path / "second" / "best.params"
    save_model(path, *model)
    assert load_model(path).model_config == model.model_config
    for runtime in ("mxnet", "onnx"):
        assert load_runtime(path, runtime).logits([[0, 2]], [2]).shape == (1, 2)
    assert load_classifier(path).model_config == model.model_config
    saved_masked_lm(tmp_path / "third", tokenizer)
    assert load_mask_filler(tmp_path / "third" / "bort.params").batch_size == BATCH_SIZE


def test_a_pipeline_of_the_other_kind_is_refused(tmp_path, tokenizer):
    saved(tmp_path / "classifier", tokenizer)
    saved_masked_lm(tmp_path / "filler", tokenizer)
    with pytest.raises(TypeError, match="expected a path or a mask filler, found Classification"):
        list(fill_mask(load_classifier(tmp_path / "classifier"), ["a <mask>"]))
    with pytest.raises(TypeError, match="expected a path or a classifier, found FillMaskPipeline"):
        list(predict(load_mask_filler(tmp_path / "filler"), ["a film"]))


def test_predictions_are_in_the_order_of_the_input(tmp_path, tokenizer):
    model = saved(tmp_path, tokenizer)
    texts = [f"{text} {number}" for number in range(15) for text in TEXTS]
    found = list(predict(tmp_path, texts, batch_size=7))
    expected = np.array([by_itself(model, text) for text in texts])
    assert len({answer.label for answer in found}) == 2
    assert [answer.label for answer in found] == [str(row.argmax()) for row in expected]
    values = [[answer.probabilities[label] for label in ("0", "1")] for answer in found]
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert [answer.value for answer in found] == [max(row) for row in values]


def expected_answers(task: Any, model: SavedModel, split: str) -> list[Any]:
    """Return what finetuning answers to the rows of a task's file."""
    examples = task.read(DATA, split).examples
    encoded = encode_examples(examples, model.tokenizer, model.model_config.max_len)
    source = ClassifierLoader(encoded, 8, 3, model.tokenizer.pad_id, None)
    scores = predict_logits(model.network, source, task.kind, nd.array([0]).context)
    if task.kind == "candidates":
        return [json.loads(line)["label"] for line in task.submission(examples, scores)]
    predictions = task.predict(scores)
    return [task.labels[p] if task.labels else float(p) for p in predictions]


@pytest.mark.parametrize(
    "name",
    ["CoLA", "SST-2", "QNLI", "STS-B", "BoolQ", "COPA", "MultiRC", "ReCoRD", "WiC", "WSC", "RTE"],
)
def test_official_rows_are_answered_as_finetuning_does(tmp_path, tokenizer, capfdbinary, name):
    model, task = saved(tmp_path, tokenizer, name), get_task(name)
    path = str(task.find(DATA, "test"))
    lines = run(capfdbinary, tmp_path, "--input", path, "--format", "json")
    found = [json.loads(line) for line in lines]
    expected = expected_answers(task, model, "test")
    if task.kind == "regression":
        np.testing.assert_allclose([one["score"] for one in found], expected, atol=1e-5)
    else:
        assert [one["label"] for one in found] == expected
        for one in found:
            assert one["probability"] == one["probabilities"][one["label"]]


@pytest.mark.parametrize("cast", ["choices", "joined"])
def test_articles_of_race_are_answered_as_finetuning_does(tmp_path, tokenizer, cast):
    model, task = saved(tmp_path, tokenizer, "RACE-H", cast), get_task("RACE-H", race_cast=cast)
    folder = task.find(DATA, "test") / "high"
    files = sorted(folder.glob("*.txt"), key=lambda path: (len(path.stem), path.stem))
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    found = [answer.label for answer in predict(str(tmp_path), rows)]
    assert found == expected_answers(task, model, "test")


def test_text_and_tables_and_json_say_the_same(tmp_path, tokenizer, capfdbinary):
    saved(tmp_path, tokenizer, "MNLI")
    pairs = [("it rains", "it is wet"), ("he sleeps", "he runs"), ("é ü", "a")]
    text = "\n".join(map("\t".join, pairs))
    contents = {
        "pairs.txt": text,
        "crlf.txt": f"\ufeff{text}\n".replace("\n", "\r\n"),
        "official.tsv": "\n".join(
            ["id\tsentence1\tsentence2", *map("7\t{}\t{}".format, *zip(*pairs))]
        ),
        "ours": "\n".join(["text2\ttext1", *(f"{b}\t{a}" for a, b in pairs)]),
        "official": "\n".join(json.dumps({"sentence1": a, "sentence2": b}) for a, b in pairs),
        "ours.jsonl": "\n".join(json.dumps({"text1": a, "text2": b}) for a, b in pairs) + "\n\n",
    }
    expected = [f"{a.label}\t{a.value:.4f}" for a in predict(str(tmp_path), pairs)]
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content.encode())
        assert run(capfdbinary, tmp_path, "--input", str(path)) == expected, name


def assert_same(found: Iterable[Prediction], expected: Iterable[Prediction]) -> None:
    """Compare answers; those of other batches may differ in the last bits."""
    for one, other in itertools.zip_longest(found, expected):
        assert one.label == other.label
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
        assert one.value == one.probabilities[one.label]


def test_choices_and_candidates_as_plain_texts(tmp_path, tokenizer):
    copa, record = tmp_path / "copa", tmp_path / "record"
    saved(copa, tokenizer, "COPA")
    row = {
        "premise": "It rained.",
        "choice1": "it got wet",
        "choice2": "I ran",
        "question": "effect",
    }
    texts = ("It rained.", "so it got wet", "so I ran")
    assert_same(predict(str(copa), [row]), predict(str(copa), [texts]))
    saved(record, tokenizer, "ReCoRD")
    passage = {
        "text": "Ann saw Bob.",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}],
    }
    row = {"idx": 1, "passage": passage, "qas": [{"idx": 5, "query": "@placeholder sat."}]}
    texts = ("Ann saw Bob.", "@placeholder sat.", "Ann", "Bob")
    numbered = {f"text{number}": text for number, text in enumerate(texts, 1)}
    first, *others = predict(str(record), [row, texts, numbered])
    assert_same(others, [first, first])
    assert set(first.probabilities) == {"Ann", "Bob"}


def test_a_bert_of_another_program_takes_single_texts_and_pairs(tmp_path, capfdbinary):
    """It does not say which it was trained with; RoBERTa's pairs have another form."""
    tokenizer = WordPiece(VOCABULARY, Normalizer())
    model_config = ModelConfig(
        SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, "regression", num_outputs=1
    )
    bert = replace(model_config, type_separator=tokenizer.eos_id)
    model = _saved(tmp_path / "bert.params", bert, tokenizer)
    rows = ["the man", "the man\tran", {"text": "the man"}, {"text1": "the man", "text2": "ran"}]
    inputs = [row.split("\t") if isinstance(row, str) else row for row in rows]
    values = [one.value for one in predict(str(tmp_path), inputs)]
    expected = []
    for texts in (["the man"], ["the man", "ran"]):
        ends = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        ids = [tokenizer.bos_id, *itertools.chain(*ends)]
        expected.append(model.network(nd.array([ids]), nd.array([len(ids)])).asnumpy().item())
    assert values == pytest.approx(2 * expected, abs=1e-6)
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)
    table = tmp_path / "rows"  # whose header is recognized
    table.write_text("text1\ttext2\nthe man\tran\n")
    assert run(capfdbinary, tmp_path, "--input", table) == [f"{expected[1]:.4f}"]
    with pytest.raises(UserError, match="needs the data of a task, and it has none"):
        load_classifier(str(tmp_path), runtime="onnx-int8")
    for row, message in (
        (["the", "man", "ran"], "has 3 texts, expected 1 or 2"),
        ({"text1": "the"}, "has no 'text2'"),
        ({"sentence": "the"}, "has no 'text'"),
    ):
        with pytest.raises(UserError, match=message):
            list(predict(str(tmp_path), [row]))


@pytest.mark.parametrize("one_separator", [True, False])
def test_pairs_without_token_types(tmp_path, one_separator):
    """Of a BERT whose tokenizer gives none, and of a RoBERTa whose tokenizer was written here."""
    bert = WordPiece(VOCABULARY, Normalizer())
    roberta = ByteLevelBPE([*SPECIAL_TOKENS.values(), *BYTE_TO_CHARACTER.values()], [])
    vocabulary = roberta if one_separator else bert
    model_config = ModelConfig(
        *(SHAPE, vocabulary.vocab_size, vocabulary.fingerprint, "regression"),
        num_outputs=1,
        one_separator=one_separator,
    )
    model = _saved(tmp_path / "best.params", model_config, vocabulary)
    ends = [[*vocabulary.encode(text), vocabulary.eos_id] for text in ("the man", "ran")]
    ids = [vocabulary.bos_id, *itertools.chain(*ends)]
    expected = model.network(nd.array([ids]), nd.array([len(ids)])).asnumpy().item()
    (found,) = predict(str(tmp_path), [["the man", "ran"]])
    assert found.value == pytest.approx(expected, abs=1e-5)


def test_a_roberta_of_another_program_takes_no_pairs(tmp_path):
    vocabulary = ByteLevelBPE([*SPECIAL_TOKENS.values(), *BYTE_TO_CHARACTER.values()], [])
    model_config = ModelConfig(
        SHAPE, vocabulary.vocab_size, vocabulary.fingerprint, "regression", num_outputs=1
    )
    _saved(tmp_path / "best.params", model_config, vocabulary)
    with pytest.raises(UserError, match="has 2 texts, expected 1 "):
        list(predict(str(tmp_path), [["the man", "ran"]]))


def test_a_choice_without_labels_takes_any_number_of_options(tmp_path, tokenizer, capfdbinary):
    """One that another program has trained: transformers does not record how many there are."""
    model_config = ModelConfig(
        SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, "multiple_choice", num_outputs=1
    )
    model = _saved(tmp_path / "best.params", model_config, tokenizer)
    texts = ("It rained.", "so it got wet", "so I ran", "no")
    rows = tmp_path / "rows.tsv"
    rows.write_text("\t".join(f"text{number}" for number in range(1, 5)) + "\n" + "\t".join(texts))
    scores = []
    for option in texts[1:]:
        first, second = (tokenizer.encode(text) for text in (texts[0], option))
        ids = [tokenizer.bos_id, *first, tokenizer.eos_id, *second, tokenizer.eos_id]
        scores.append(model.network(nd.array([ids]), nd.array([len(ids)])).asnumpy().item())
    expected = reference.softmax(np.array(scores, np.float64))
    (found,) = predict(str(tmp_path), [texts])
    assert list(found.probabilities) == ["0", "1", "2"]
    assert list(found.probabilities.values()) == pytest.approx(expected, abs=1e-6)
    (line,) = run(capfdbinary, tmp_path, "--input", rows)
    assert line == f"{expected.argmax()}\t{expected.max():.4f}"
    with pytest.raises(UserError, match="has 2 texts, expected 3 or more"):
        list(predict(str(tmp_path), [texts[:2]]))
    roberta = ByteLevelBPE([*SPECIAL_TOKENS.values(), *BYTE_TO_CHARACTER.values()], [])
    model_config = replace(
        model_config,
        vocab_size=roberta.vocab_size,
        tokenizer_fingerprint=roberta.fingerprint,
    )
    _saved(tmp_path / "roberta" / "best.params", model_config, roberta)
    with pytest.raises(UserError, match="RoBERTa puts two separators before an option"):
        list(predict(str(tmp_path / "roberta"), [texts]))


def test_a_model_predicts_the_task_that_depends_on_it(tmp_path, tokenizer, capfdbinary):
    model, task = saved(tmp_path, tokenizer, "SuperGLUERTE"), get_task("AX-b")
    lines = run(capfdbinary, tmp_path, "--task", "AX-b", "--input", task.find(DATA, "test"))
    assert [line.split("\t")[0] for line in lines] == expected_answers(task, model, "test")


@pytest.mark.parametrize("single", ["a fine film", {"sentence": "a fine film"}])
def test_a_single_input_is_not_taken_for_a_list(tmp_path, tokenizer, single):
    """Its letters or its keys would be predicted."""
    saved(tmp_path, tokenizer)
    with pytest.raises(UserError, match="expected a list of inputs, found a single one"):
        list(predict(str(tmp_path), single))


@pytest.mark.parametrize("wrong", [float("nan"), None, b"a", ["a", 5]])
def test_what_is_no_text_is_named(tmp_path, tokenizer, wrong):
    """Empty cells of pandas are NaN."""
    saved(tmp_path / "a", tokenizer, "MNLI")
    saved_masked_lm(tmp_path / "b", tokenizer)
    for answer, model in ((predict, "a"), (fill_mask, "b")):
        with pytest.raises(UserError, match=r"^input 1: is .*, expected text; fix"):
            list(answer(str(tmp_path / model), [wrong]))


def test_windows_grow():
    sizes = [len(window) for window in windows(locate([""] * 2000), lambda: True)]
    assert sizes == [*(2**power for power in range(10)), WINDOW, 2000 - 1023 - WINDOW]
    assert [len(window) for window in windows(locate([""] * 3), lambda: False)] == [1, 1, 1]
    large = [Located("", number, "", 1 << 22) for number in range(20)]
    assert [len(window) for window in windows(large, lambda: True)] == [1, 2, 4, 4, 4, 4, 1]


def test_no_more_than_a_window_is_read_ahead(tmp_path, tokenizer):
    saved(tmp_path, tokenizer)
    taken = itertools.count()
    endless = (f"film {next(taken)}" for _ in itertools.count())
    for number, _ in enumerate(predict(str(tmp_path), endless), 1):
        assert next(taken) - number < WINDOW + number
        if number == 1300:
            break


def test_a_slow_pipe_is_answered_line_by_line(tmp_path, tokenizer):
    saved(tmp_path, tokenizer)
    end, start = os.pipe()
    os.write(start, b"one\n")
    pipeline = load_classifier(str(tmp_path))
    inputs = InputReader(LineReader(end, "pipe"), "text", pipeline.schema)
    found = predictions(pipeline, inputs, inputs.ready)
    # Each would wait forever if it wanted more than is there.
    assert [number for number, _ in next(found)] == [1]
    os.write(start, b"two\nthr")
    assert [number for number, _ in next(found)] == [2]
    os.write(start, b"ee\nfour\n\n")
    assert [number for number, _ in next(found)] == [3, 4]
    os.close(start)
    assert list(found) == []
    os.close(end)


def test_a_stream_that_does_not_wait_is_waited_for():
    """As a terminal is that another program has left in this state."""
    end, start = os.pipe()
    os.set_blocking(end, False)
    reader = LineReader(end, "pipe")
    assert not reader.ready()
    later = threading.Timer(0.2, lambda: (os.write(start, b"one\n"), os.close(start)))
    later.start()
    assert [line.content for line in reader] == [b"one"]
    later.join()
    os.close(end)


def test_standard_input(tmp_path, tokenizer, capfdbinary, monkeypatch):
    saved(tmp_path, tokenizer)
    texts = ["ein Film", "wäre gut"]
    (tmp_path / "in").write_text("\n".join(texts), encoding="utf-8")
    with open(tmp_path / "in", encoding="ascii") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        lines = run(capfdbinary, tmp_path)
    assert lines == [f"{a.label}\t{a.value:.4f}" for a in predict(str(tmp_path), texts)]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("SST-2", "one\ntwo\tthree\n", r"in:2: has 2 texts, expected 1 \(tabs separate texts"),
        ("SST-2", "one\n\nthree\n", r"in:2: is blank"),
        ("SST-2", "one\n   \n", r"in:2: has an empty text"),
        ("SST-2", b"one\n\xff\n", r"in:2: is not UTF-8 at byte 1"),
        ("MNLI", "one\n", r"in:1: has 1 texts, expected 2"),
        ("MNLI", "sentence1\tsentence2\na\tb\tc\n", r"in:2: expected 2 columns, found 3"),
        ("BoolQ", '{"passage": "x"}\n', r"in:1: has no 'question'"),
        ("BoolQ", '{"passage": "x"\n', r"in:1: is not JSON"),
        ("COPA", "a\tb\n", r"in:1: has 2 texts, expected 3"),
        ("ReCoRD", "a\tb\tc\n", r"in:1: has no @placeholder in its second text"),
    ],
)
def test_invalid_lines_are_named_and_nothing_is_left(
    tmp_path, tokenizer, capsys, task, content, message
):
    saved(tmp_path, tokenizer, task)
    path = tmp_path / "in"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = ["--input", str(path), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        program.main(["--model_parameters", str(tmp_path), *flags])
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "CoLA"], r"--task CoLA: .* is a model of SST-2"),
        (["--task", "none"], r"--task none: unknown"),
        (["--fill_mask"], r"--fill_mask: .* is a model of SST-2"),
        (["--fill_mask", "--task", "SST-2"], r"leave --task out"),
        (["--fill_mask", "--runtime", "onnx"], r"--runtime onnx: --fill_mask supports mxnet"),
        (["--runtime", "onnx-int8"], r"has no int8 model; make it with scripts/quantize.py"),
        (["--input", "missing"], r"--input missing: cannot be read"),
        (["--input", str(DATA)], r"test_data: cannot be read \(Is a directory\)"),
        (
            ["--input", str(DATA / "glue/CoLA/dev.tsv")],
            r"dev.tsv:1: the header has no column sentence, or text; rename its columns, or give",
        ),
        (["--output", "no/where"], r"no/where: there is no folder"),
        (["--output", str(DATA)], r"test_data: is a folder; name a file"),
    ],
)
def test_invalid_flags_are_named(tmp_path, tokenizer, capsys, flags, message):
    saved(tmp_path, tokenizer)
    given = ["--model_parameters", str(tmp_path), "--input", str(ROOT / "LICENSE")]
    with pytest.raises(SystemExit):
        program.main([*given, *flags])
    assert re.search(message, capsys.readouterr().err)


def test_a_header_is_told_the_columns_once(tmp_path):
    path = tmp_path / "in.tsv"
    path.write_text("word\tsentence1\na\tb\n")
    own = ("text1", "text2")
    for official, wanted in (
        (("premise", "hypothesis"), "premise and hypothesis, or text1 and text2"),
        ((), "text1 and text2"),  # WiC's rows, and those of others, are not texts as they are
        (own, "text1 and text2"),  # a model of no task
    ):
        says = f"in.tsv:1: the header has no column {wanted}; rename its columns"
        with open_input(str(path)) as lines, pytest.raises(UserError, match=says):
            InputReader(lines, "auto", InputSchema(own, official))


@pytest.mark.parametrize("kind", ["classification", "regression", "multiple_choice"])
def test_a_model_without_a_task_predicts_none_that_is_named(tmp_path, tokenizer, kind):
    """Its outputs are others: a score was printed as the class 0."""
    labels = ("no", "yes") if kind == "classification" else ()
    model_config = ModelConfig(
        SHAPE,
        tokenizer.vocab_size,
        tokenizer.fingerprint,
        kind,
        labels=labels,
        num_outputs=len(labels) or 1,
        max_len=64,
    )
    _saved(tmp_path / "best.params", model_config, tokenizer)
    for name in ("SST-2", "STS-B", "COPA", "AX"):
        with pytest.raises(UserError, match=rf"--task {name}: .* is a model of no task"):
            list(predict(str(tmp_path), ["a"], task=name))


def test_an_empty_input_has_no_answers(tmp_path, tokenizer, capfdbinary):
    saved(tmp_path, tokenizer)
    (tmp_path / "in").write_text("\n\n", encoding="utf-8")
    assert run(capfdbinary, tmp_path, "--input", str(tmp_path / "in")) == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_inputs(tmp_path, tokenizer, batch_size):
    """A negative size made no batches: answers came from memory that nothing was written to."""
    saved(tmp_path / "classifier", tokenizer)
    saved_masked_lm(tmp_path / "pretrained", tokenizer)
    with pytest.raises(UserError, match=f"batch_size {batch_size}: expected 1 or more"):
        list(predict(str(tmp_path / "classifier"), ["a"], batch_size=batch_size))
    with pytest.raises(UserError, match=f"batch_size {batch_size}: expected 1 or more"):
        list(fill_mask(str(tmp_path / "pretrained"), ["<mask>"], batch_size=batch_size))


def test_a_pretrained_model_has_no_answers(tmp_path, tokenizer):
    saved_masked_lm(tmp_path, tokenizer)
    with pytest.raises(UserError, match="fine-tune it with finetune_classifier"):
        list(predict(str(tmp_path), ["a"]))


def test_another_runtime_gives_the_same_answers(tmp_path, tokenizer, capfdbinary):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    saved(tmp_path, tokenizer)
    (tmp_path / "in").write_text("\n".join(TEXTS), encoding="utf-8")
    flags = ["--input", tmp_path / "in", "--format", "json", "--runtime"]
    ours, others = (
        [json.loads(line) for line in run(capfdbinary, tmp_path, *flags, name)]
        for name in ("mxnet", "onnx")
    )
    assert len(ours) == len(others) == len(TEXTS)
    for one, other in zip(ours, others):
        assert one["label"] == other["label"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


# ---- one rule for every form ---------------------------------------------------------------------


def first_line(tmp_path: Path, content: str | bytes, name: str = "in") -> Path:
    """Write an input file."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_indices_and_labels_of_official_rows_are_ignored(tmp_path, tokenizer):
    boolq, multirc, record, race = (tmp_path / name for name in ("b", "m", "r", "race"))
    saved(boolq, tokenizer, "BoolQ")
    rows: list[dict[str, Any]] = [
        {"passage": "p", "question": "q", **other}
        for other in ({}, {"idx": "x"}, {"idx": None}, {"idx": 3.0, "label": "?"}, {"idx": []})
    ]
    first, *others = predict(str(boolq), rows)
    assert_same(others, [first] * 4)
    saved(multirc, tokenizer, "MultiRC")
    answers: list[dict[str, Any]] = [{"text": "a", "idx": 0}, {"text": "b", "idx": 1}]
    question = {"question": "q?", "answers": answers, "idx": 0}
    expected = list(predict(str(multirc), [{"passage": {"text": "t", "questions": [question]}}]))
    answers[0] |= {"idx": "x", "label": "yes"}
    answers[1] |= {"idx": 2.5, "isAnswer": "no"}
    row = {"passage": {"text": "t", "questions": [{**question, "idx": None}]}, "idx": "?"}
    assert_same(predict(str(multirc), [row]), expected)
    saved(record, tokenizer, "ReCoRD")
    passage = {
        "text": "Ann saw Bob.",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}],
    }
    queries = [{"query": "@placeholder sat.", "idx": "same", "answers": 7} for _ in range(2)]
    found = list(predict(str(record), [{"passage": passage, "qas": queries}]))
    assert len(found) == 2
    assert_same(found[1:], found[:1])
    saved(race, tokenizer, "RACE-H")
    article = {"article": "a", "questions": ["q _"], "options": [list("abcd")]}
    expected = list(predict(str(race), [article]))
    assert_same(predict(str(race), [{**article, "answers": ["?"], "id": 3}]), expected)


def test_keys_that_are_no_texts_are_ignored(tmp_path, tokenizer):
    saved(tmp_path, tokenizer)
    row: dict[Any, Any] = {0: "a", None: 1, "text": "a fine film"}  # as pandas may make it
    assert [*predict(tmp_path, [row])] == [*predict(tmp_path, ["a fine film"])]


def test_official_files_without_a_header(tmp_path, tokenizer, capfdbinary):
    model, task = saved(tmp_path, tokenizer, "CoLA"), get_task("CoLA")
    path = str(task.find(DATA, "dev"))
    expected = expected_answers(task, model, "dev")
    for flags in ([], ["--input_format", "tsv"]):
        lines = run(capfdbinary, tmp_path, "--input", path, *flags)
        assert [line.split("\t")[0] for line in lines] == expected
    renamed = first_line(tmp_path, Path(path).read_bytes(), "renamed")
    assert len(run(capfdbinary, tmp_path, "--input", str(renamed))) == len(expected)


def test_the_diagnostic_set_with_labels(tmp_path, tokenizer, capfdbinary):
    saved(tmp_path, tokenizer, "MNLI")
    full = "Lexical Semantics\tPremise\tHypothesis\tLabel\nx\ta cat\ta dog\tneutral\n"
    path = first_line(tmp_path, full, "diagnostic-full.tsv")
    (line,) = run(capfdbinary, tmp_path, "--task", "AX", "--input", str(path))
    path = first_line(tmp_path, json.dumps({"Premise": "a cat", "Hypothesis": "a dog"}))
    assert run(capfdbinary, tmp_path, "--task", "AX", "--input", str(path)) == [line]
    assert run(capfdbinary, tmp_path, "--input", str(first_line(tmp_path, "a cat\ta dog"))) == [
        line
    ]


EMPTY = r"has an empty text \(number 1\)"
WIC = {"sentence1": "a b", "sentence2": "a b", "start1": 0, "end1": 1, "start2": 0, "end2": 1}
RECORD = json.dumps(
    {
        "passage": {"text": "Ann saw", "entities": [{"start": 3, "end": 3}]},
        "qas": [{"query": "@placeholder went"}],
    }
)


def multirc(question: str, answer: str) -> str:
    questions = [{"question": question, "answers": [{"text": answer}]}]
    return json.dumps({"passage": {"text": "a", "questions": questions}})


def race(question: str, *options: str) -> str:
    choices = [*options, *["d"] * (2 - len(options)), "", "e"]
    return json.dumps({"article": "a", "questions": [question], "options": [choices]})


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("MNLI", " \tb\n", EMPTY),
        ("MNLI", "sentence1\tsentence2\n \tb\n", EMPTY),
        ("MNLI", '{"sentence1": "", "sentence2": "b"}\n', EMPTY),
        ("MNLI", '{"text1": "\u00a0", "text2": "b"}\n', EMPTY),
        ("COPA", "a\t \tb\n", r"has an empty text \(number 2\)"),
        (
            "COPA",
            '{"premise": "a", "choice1": " ", "choice2": "b", "question": "cause"}\n',
            r"has an empty text \(number 2\)",
        ),
        ("WiC", json.dumps(WIC | {"sentence2": "  "}), r"has an empty text \(number 2\)"),
        ("MultiRC", multirc("", "a"), r"has an empty text \(number 2\)"),
        ("MultiRC", multirc("q", "\t"), r"has an empty text \(number 3\)"),
        ("MultiRC", '{"passage": {"text": "a", "questions": []}}\n', r"has no question to answer"),
        ("RACE-M", race("q _", "b"), r"has an empty text \(number 5\)"),
        ("RACE-M", race("", "b", "c"), r"has an empty text \(number 2\)"),
        ("ReCoRD", RECORD, r"has an empty text \(number 3\)"),
        (
            "ReCoRD",
            '{"text1": "a", "text2": "@placeholder", "text3": "b", "text5": "c"}\n',
            r"has 'text5' but no 'text4'",
        ),
        ("SST-2", '{ "text": 3}\n', r"in:1: 'text' is 3, expected text"),
        ("SST-2", '[{"text": "a"}]\n', r"in:1: is not a JSON object; for plain text give"),
        ("SST-2", '{"text": "a", "text": "b"}\n', r"has a key twice"),
        ("SST-2", "text\ttext\na\tb\n", r"in:1: the header has a column twice"),
        (
            "SST-2",
            '{"} is a smiley\n',
            r"in:1: is not JSON .*for plain text give --input_format text",
        ),
        ("SST-2", '[\n  {"text": "a"}\n]\n', r"in:1: is not JSON .*give --input_format text"),
        ("SST-2", '{\n  "text": "a"\n}\n', r"in:1: is not JSON .*give --input_format text"),
        ("SST-2", '[ {\r\n  "text": "a"\n}]\n', r"in:1: is not JSON .*give --input_format text"),
        ("SST-2", '{"text": 3}\n', r"in:1: 'text' is 3, expected text"),
        ("SST-2", '{"text": "\\ud83d"}\n', r"half of a surrogate pair"),
        ("ReCoRD", '{"text1": "a", "text2": "@placeholder", "text3": "\\ud83d"}', r"half of a sur"),
        ("SST-2", '{"text": ' + "[" * 100_000, r"nested too deeply"),
        ("SST-2", b"x" * ((1 << 24) + 1), r"in:1: the line is longer than 16 MiB"),
        ("SST-2", "a\n" + "\n" * 200_000 + "b\n", r"in:2: is blank"),
    ],
)
def test_every_form_refuses_the_same(tmp_path, tokenizer, capsys, task, content, message):
    saved(tmp_path, tokenizer, task)
    path = first_line(tmp_path, content)
    with pytest.raises(SystemExit) as stopped:
        program.main(["--model_parameters", str(tmp_path), "--input", str(path)])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert len(line) < 500


def test_a_smiley_is_text_where_the_flag_asks_for_it(tmp_path, tokenizer, capfdbinary):
    saved(tmp_path, tokenizer)
    path = first_line(tmp_path, '{"} is a smiley\n')
    (line,) = run(capfdbinary, tmp_path, "--input", str(path), "--input_format", "text")
    assert line.split("\t")[0] in "01"


def test_csv_is_not_taken_for_text(tmp_path, tokenizer, capfdbinary):
    saved(tmp_path, tokenizer)
    path = first_line(tmp_path, 'sentence,label\n"a fine, good film",1\n', "in.csv")
    with pytest.raises(SystemExit):
        run(capfdbinary, tmp_path, "--input", str(path))
    said = capfdbinary.readouterr().err.decode()
    assert said.startswith(f"error: {path}: CSV is not read; convert it to TSV or JSON lines")
    assert len(run(capfdbinary, tmp_path, "--input", str(path), "--input_format", "text")) == 2


def test_a_long_line_is_read_in_linear_time(tmp_path, monkeypatch):
    """Reading joins each line once, however many pieces it comes in."""
    path = first_line(tmp_path, b"x" * (1 << 20) + b"\nshort")
    monkeypatch.setattr(prediction_files, "READ_BYTES", 64)
    descriptor = os.open(path, os.O_RDONLY)
    reader = LineReader(descriptor, "in")
    while not reader._waiting:
        reader._read()
        assert all(len(piece) <= 64 for piece in reader._pending[-3:])
        assert len(reader._pending) >= reader._pending_bytes // 64
    assert [len(line.content) for line in reader] == [1 << 20, 5]
    os.close(descriptor)


# ---- outputs -------------------------------------------------------------------------------------


def test_outputs_that_are_links_devices_and_fifos_stay_so(tmp_path, tokenizer):
    saved(tmp_path, tokenizer)
    path = first_line(tmp_path, "a film\n")
    flags = ["--model_parameters", str(tmp_path), "--input", str(path), "--output"]
    target, link, fifo = tmp_path / "target", tmp_path / "link", tmp_path / "fifo"
    link.symlink_to(target)
    program.main([*flags, str(link)])
    assert link.is_symlink()
    assert target.read_text("utf-8").count("\n") == 1
    os.mkfifo(fifo)
    with ThreadPoolExecutor(1) as pool:
        content = pool.submit(fifo.read_bytes)
        program.main([*flags, str(fifo)])
        assert content.result() == target.read_bytes()
    assert fifo.is_fifo()
    program.main([*flags, os.devnull])
    assert Path(os.devnull).is_char_device()


def test_an_output_never_replaces_what_is_read(tmp_path, tokenizer, capsys):
    saved(tmp_path, tokenizer)
    source, link = tmp_path / "in.txt", tmp_path / "link"
    source.write_text("a fine film\n")
    link.symlink_to(source)
    own = [tmp_path / f"best.{suffix}" for suffix in ("params", "json", "onnx")]
    own[-1].write_bytes(b"a graph")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for output in (source, link, *own):
        line = ["--model_parameters", tmp_path, "--input", source, "--output", output]
        with pytest.raises(SystemExit):
            program.main([str(word) for word in line])
        message = f"error: --output {output}: would overwrite what it is made from; name another"
        assert capsys.readouterr().err.startswith(message)
    assert {path: path.read_bytes() for path in before} == before


def test_an_output_never_replaces_what_standard_input_reads(tmp_path, tokenizer, capsys):
    saved(tmp_path, tokenizer)
    source = tmp_path / "in.txt"
    source.write_text("a fine film\n")
    before = os.dup(0)
    with open(source, encoding="utf-8") as file:
        os.dup2(file.fileno(), 0)
    try:
        with pytest.raises(SystemExit):
            program.main(["--model_parameters", str(tmp_path), "--output", str(source)])
    finally:
        os.dup2(before, 0)
        os.close(before)
    assert "would overwrite what it is made from" in capsys.readouterr().err
    assert source.read_text() == "a fine film\n"


def test_an_interrupt_leaves_no_output(tmp_path, tokenizer, capsys, monkeypatch):
    saved(tmp_path, tokenizer)
    path = first_line(tmp_path, "a film\n")

    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(prediction_files, "format_tsv", interrupt)
    flags = ["--model_parameters", str(tmp_path), "--input", str(path)]
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        program.main([*flags, "--output", str(tmp_path / "out")])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert set(tmp_path.iterdir()) == before


def test_closed_standard_input_is_an_error(tmp_path, tokenizer, capsys, monkeypatch):
    saved(tmp_path, tokenizer)
    monkeypatch.setattr(sys, "__stdin__", None)
    with pytest.raises(SystemExit):
        program.main(["--model_parameters", str(tmp_path)])
    assert capsys.readouterr().err == "error: standard input is closed; give --input FILE\n"


@pytest.mark.parametrize("masked_lm", [False, True])
def test_parameters_that_are_not_finite_predict_nothing(tmp_path, tokenizer, masked_lm):
    model = (saved_masked_lm if masked_lm else saved)(tmp_path, tokenizer)
    body = model.network if masked_lm else model.network.bort
    body.encoder.layer_norm.gamma.set_data(nd.array([np.nan] * 16))
    (path,) = tmp_path.glob("*.params")
    save_model(str(path), *model)
    with pytest.raises(UserError, match=r"layer_norm.gamma has values that are NaN or infinite"):
        list((fill_mask if masked_lm else predict)(str(tmp_path), ["<mask>"]))


# ---- masks ---------------------------------------------------------------------------------------


def test_words_for_masks_are_those_of_a_direct_forward_pass(tmp_path, tokenizer, capfdbinary):
    model = saved_masked_lm(tmp_path, tokenizer)
    texts = ["The <mask> is old.", "<mask> and <mask>!", "rain on the <mask> and more rain"]
    (tmp_path / "in").write_text("\n".join(texts), encoding="utf-8")
    lines = run(
        capfdbinary, tmp_path, "--fill_mask", "--format", "json", "--input", tmp_path / "in"
    )
    found = [json.loads(line) for line in lines]
    assert [one["line"] for one in found] == [1, 2, 2, 3]
    parameters = reference.parameters_of(model.network)
    expected = []
    for text in texts:
        ids = mask_ids(tokenizer, text)
        hidden = reference.encode(parameters, 2, ids)[ids == tokenizer.mask_id]
        expected += list(reference.softmax(reference.decode(parameters, hidden)))
    for one, probabilities in zip(found, expected):
        probabilities[tokenizer.special_ids] = 0
        best = np.argsort(-probabilities)[:5]
        assert [word["token"] for word in one["words"]] == tokenizer.tokens(best)
        values = [word["probability"] for word in one["words"]]
        np.testing.assert_allclose(values, probabilities[best], rtol=1e-3)
    for words, one in zip(fill_mask(tmp_path, texts), found):
        assert [word.text for word in words] == [word["word"] for word in one["words"]]


def test_masks_of_a_wordpiece_model(tmp_path):
    tokenizer = WordPiece(VOCABULARY, Normalizer())
    model = saved_masked_lm(tmp_path, tokenizer)
    pieces = tokenizer.tokens(mask_ids(tokenizer, "The [MASK] runn[MASK], <mask>"))
    assert pieces[:6] == ["[CLS]", "the", "[MASK]", "runn", "[MASK]", ","]
    assert pieces[-1] == "[SEP]"
    assert "[MASK]" not in pieces[6:]
    ids = mask_ids(tokenizer, "The [MASK] runs")
    (words,) = fill_mask(str(tmp_path), ["The [MASK] runs"])
    parameters = reference.parameters_of(model.network)
    hidden = reference.encode(parameters, 2, ids)[ids == tokenizer.mask_id]
    scores = reference.decode(parameters, hidden)[0]
    scores[tokenizer.special_ids] = -np.inf
    best = np.argsort(-scores)[:5]
    # A token that continues a word keeps its mark.
    assert [word.text for word in words] == [word.token for word in words]
    assert [word.token for word in words] == tokenizer.tokens(best)
    with pytest.raises(UserError, match=r"has no \[MASK\] where a word is missing"):
        list(fill_mask(str(tmp_path), ["The <mask>"]))


def test_a_very_small_vocabulary_has_fewer_words(tmp_path):
    for spelling in ([*SPECIAL, "a", "##a"], SPECIAL):
        saved_masked_lm(tmp_path, WordPiece(spelling, Normalizer()))
        (words,) = fill_mask(str(tmp_path), ["a [MASK]"])
        assert sorted(word.token for word in words) == sorted(spelling[len(SPECIAL) :])
        assert all(word.probability > 0 for word in words)


def test_tokens_that_show_nothing_have_no_text(tokenizer):
    def text_of(token: str) -> str | None:
        (index,) = (i for i in range(tokenizer.vocab_size) if tokenizer.tokens([i]) == [token])
        return masked_lm.readable_text(tokenizer, index)

    assert text_of("\u2581was") == "was"
    for token in ("<0x1B>", "<0x00>", "<0x7F>", "<0x0A>", "<0xE4>", "\u2581"):
        assert text_of(token) is None


def test_many_masks_are_projected_in_pieces(tmp_path, tokenizer, monkeypatch):
    saved_masked_lm(tmp_path, tokenizer)
    text = "<mask>" * 60
    pipeline = masked_lm.load_mask_filler(str(tmp_path))
    expected = list(fill_mask(pipeline, [text, "a <mask>"]))
    assert len(expected) == 61
    sizes, decode = [], bort.bort.decode

    def counted(network: Any, hidden: Any) -> Any:
        sizes.append(len(hidden))
        return decode(network, hidden)

    monkeypatch.setattr(bort.bort, "decode", counted)
    monkeypatch.setattr(masked_lm, "MASKS_AT_ONCE", 25)
    found = list(fill_mask(pipeline, [text, "a <mask>"]))
    assert sizes == [25, 25, 10, 1]
    assert MASKS_AT_ONCE > 60
    for words, others in zip(found, expected):
        assert [word.token for word in words] == [word.token for word in others]
        np.testing.assert_allclose(
            [word.probability for word in words], [word.probability for word in others], rtol=1e-5
        )


def test_masks_take_the_space_before_them(tokenizer):
    pieces = tokenizer.tokens(mask_ids(tokenizer, "the <mask> of un<mask>."))
    assert pieces == ["<s>", "▁the", "<mask>", "▁of", "▁un", "<mask>", ".", "</s>"]
    assert tokenizer.tokens(mask_ids(tokenizer, "<mask>")) == ["<s>", "<mask>", "</s>"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no mask", r"has no <mask>"),
        ("a\tb <mask>", r"has 2 texts, expected 1"),
        ("the old man " * 60 + "<mask>", r"has \d+ tokens, the model takes 64"),
    ],
)
def test_texts_that_cannot_be_filled(tmp_path, tokenizer, text, message):
    saved_masked_lm(tmp_path, tokenizer)
    with pytest.raises(UserError, match=f"input 1: {message}"):
        list(fill_mask(str(tmp_path), [text.split("\t")]))


# ---- whole runs ----------------------------------------------------------------------------------


def test_a_trained_model_gives_the_answers_of_its_training(tmp_path, capfdbinary):
    folder = tmp_path / "data" / "SST-2"
    folder.mkdir(parents=True)
    words = {"1": ("old man", "sea", "light"), "0": ("rain", "snow", "market")}
    rows = [f"{a} {b}\t{label}" for label, of in words.items() for a in of for b in of]
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]), "utf-8")
    finetune_classifier.main(
        f"--task_name SST-2 --data_dir {tmp_path / 'data'} --model_name {SHAPE} --epochs 15"
        f" --batch_size 6 --lr 0.02 --max_len 16 --dropout 0 --output_dir {tmp_path}"
        f" --cache_dir {tmp_path / 'cache'}".split()
    )
    (tmp_path / "in").write_text("snow rain\nsea sea light\nmarket\nlight\n", "utf-8")
    capfdbinary.readouterr()
    lines = run(capfdbinary, tmp_path / "SST-2", "--task", "sst2", "--input", tmp_path / "in")
    assert [line.split("\t")[0] for line in lines] == ["0", "1", "0", "1"]
    assert all(float(line.split("\t")[1]) > 0.6 for line in lines)


def command(folder: Path, source: Path) -> list[str]:
    flags = ["--model_parameters", str(folder), "--input", str(source)]
    return [sys.executable, str(ROOT / "scripts" / "predict.py"), *flags]


def test_a_reader_may_leave(tmp_path, tokenizer):
    saved(tmp_path, tokenizer)
    (tmp_path / "in").write_text("a film\n" * 30_000, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command(tmp_path, tmp_path / "in"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def peak_kilobytes(arguments: list[str]) -> tuple[bytes, int]:
    """Run a Python program; returns its output and its peak memory."""
    # Not ru_maxrss: before the exec the child was as large as this process.
    code = (
        "import re, runpy, sys; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__');"
        "status = open('/proc/self/status').read();"
        "print(re.search(r'VmHWM:\\s+(\\d+)', status)[1], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout, int(done.stderr)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path, tokenizer):
    """Peak memory of 100,000 lines is that of 5,000, but for 10 MB."""
    saved(tmp_path, tokenizer)
    peaks = []
    for count in (5_000, 100_000):
        source = tmp_path / str(count)
        source.write_text(
            "".join(f"{'film ' * (number % 40)}{number}\n" for number in range(count)), "utf-8"
        )
        output, peak = peak_kilobytes(command(tmp_path, source)[1:])
        assert output.count(b"\n") == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 10_000, peaks


@pytest.mark.slow
def test_memory_does_not_grow_with_the_masks(tmp_path):
    """All logits of 32 lines of 505 masks take 3 GB; projected in pieces, 51 MB."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = WordPiece([*special, *(f"w{n}" for n in range(50_000))], Normalizer())
    saved_masked_lm(tmp_path, tokenizer, max_len=512)
    peaks = []
    for lines in (1, 32):
        source = tmp_path / str(lines)
        source.write_text(f"{'[MASK] ' * 505}\n" * lines, "utf-8")
        output, peak = peak_kilobytes([*command(tmp_path, source)[1:], "--fill_mask"])
        assert output.count(b"\n") == 505 * lines
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 500_000, peaks
