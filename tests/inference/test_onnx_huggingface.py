"""ONNX graphs with Hugging Face's names, against the formulas in float64 and our own graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from mxnet import nd

from bort.bort import BortClassifier, get_bort_model, initialize
from bort.inference.onnx_graph import build, describe
from bort.inference.onnx_huggingface import build_huggingface
from bort.shapes import BodyOptions
from tests import reference
from tests.inference.test_onnx_graph import (
    BATCHES,
    HEADS,
    SHAPE,
    VOCAB_SIZE,
    classifier,
    expected_logits,
    random_batch,
)


def session_of(graph: onnx.ModelProto) -> Any:
    onnx.checker.check_model(graph, full_check=True)
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def session(network: Any, kind: str, precision: str = "float32") -> Any:
    return session_of(build_huggingface(describe(network), kind, precision, {}))


def mask_of(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return (np.arange(ids.shape[-1]) < lengths[..., None]).astype(np.int64)


def described(values: Any) -> list[tuple[str, str, list[Any]]]:
    return [(one.name, one.type, one.shape) for one in values]


@pytest.fixture(scope="module")
def masked_lm() -> Any:
    network, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE))
    reference.redraw(network, seed=2, deviation=0.3)
    return network


def test_names_types_and_axes_are_hugging_faces(masked_lm):
    def inputs(*axes: str) -> list[tuple[str, str, list[Any]]]:
        return [(name, "tensor(int64)", list(axes)) for name in ("input_ids", "attention_mask")]

    def logits(*axes: Any) -> list[tuple[str, str, list[Any]]]:
        return [("logits", "tensor(float)", list(axes))]

    found = session(masked_lm, "masked_lm")
    assert described(found.get_inputs()) == inputs("batch_size", "sequence_length")
    assert described(found.get_outputs()) == logits("batch_size", "sequence_length", VOCAB_SIZE)
    found = session(classifier(), "classification")
    assert described(found.get_inputs()) == inputs("batch_size", "sequence_length")
    assert described(found.get_outputs()) == logits("batch_size", 3)
    found = session(classifier(), "multiple_choice")
    assert described(found.get_inputs()) == inputs("batch_size", "num_choices", "sequence_length")
    assert described(found.get_outputs()) == logits("batch_size", "num_choices")


@pytest.mark.parametrize("extra_layer", [False, True])
def test_a_classifier_follows_the_formulas(extra_layer):
    network = classifier(extra_layer)
    found = session(network, "classification")
    for lengths in BATCHES:
        ids, valid_length = random_batch(lengths)
        feed = {"input_ids": ids, "attention_mask": mask_of(ids, valid_length)}
        (logits,) = found.run(None, feed)
        np.testing.assert_allclose(logits, expected_logits(network, ids, valid_length), atol=2e-5)


def test_a_multiple_choice_scores_each_choice():
    network = classifier()
    graph = build_huggingface(describe(network), "classification", "float32", {})
    ids, valid_length = random_batch([9, 4, 7, 1, 3, 9])
    feed = {"input_ids": ids, "attention_mask": mask_of(ids, valid_length)}
    (flat,) = session_of(graph).run(None, feed)
    body = describe(network)
    weight, bias, tanh = body.head[-1]
    body = body._replace(head=[*body.head[:-1], (weight[:1], bias[:1], tanh)])  # one score
    choices = session_of(build_huggingface(body, "multiple_choice", "float32", {}))
    shaped = {name: array.reshape(2, 3, -1) for name, array in feed.items()}
    (logits,) = choices.run(None, shaped)
    np.testing.assert_allclose(logits, flat[:, 0].reshape(2, 3), atol=1e-6)


def test_a_masked_lm_returns_the_logits_of_every_token(masked_lm):
    parameters = reference.parameters_of(masked_lm)
    found = session(masked_lm, "masked_lm")
    for lengths in ([17, 3, 1, 9], [1]):
        ids, valid_length = random_batch(lengths)
        feed = {"input_ids": ids, "attention_mask": mask_of(ids, valid_length)}
        (logits,) = found.run(None, feed)
        assert logits.shape == (*ids.shape, VOCAB_SIZE)
        for row, length in enumerate(lengths):
            hidden = reference.encode(parameters, HEADS, ids[row, :length])
            expected = reference.decode(parameters, hidden)
            np.testing.assert_allclose(logits[row, :length], expected, atol=5e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_token_types_are_an_input(pooling):
    separator = 7
    body, _ = get_bort_model(
        SHAPE, vocab=range(VOCAB_SIZE), use_decoder=False, options=BodyOptions(1e-12, separator)
    )
    network = BortClassifier(body, 3, pooling=pooling)
    initialize(network, None)
    reference.redraw(network, seed=4, deviation=0.3)
    found = session(network, "classification")
    assert [one.name for one in found.get_inputs()] == [
        *("input_ids", "attention_mask", "token_type_ids")
    ]
    ids, valid_length = random_batch([17, 3, 1, 9])
    ids[0, 5] = ids[1, 1] = separator
    ends = np.cumsum(ids == separator, axis=1) - (ids == separator)
    feed = {
        "input_ids": ids,
        "attention_mask": mask_of(ids, valid_length),
        "token_type_ids": (ends > 0).astype(np.int64),
    }
    (logits,) = found.run(None, feed)
    expected = network(nd.array(ids), nd.array(valid_length)).asnumpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    (untyped,) = found.run(None, {**feed, "token_type_ids": np.zeros_like(ids)})
    assert np.abs(untyped[:2] - expected[:2]).max() > 0.01


def test_an_int8_classifier_is_that_of_quantize():
    network = classifier()
    ids, valid_length = random_batch([17, 3, 1, 9])
    (expected,) = session_of(build(network, "int8")).run(
        None, {"input_ids": ids, "valid_length": valid_length}
    )
    feed = {"input_ids": ids, "attention_mask": mask_of(ids, valid_length)}
    (found,) = session(network, "classification", "int8").run(None, feed)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_int8_masked_lm_is_close(masked_lm):
    ids, valid_length = random_batch([17, 3, 1, 9])
    feed = {"input_ids": ids, "attention_mask": mask_of(ids, valid_length)}
    valid = feed["attention_mask"].astype(bool)
    exact, rounded = (
        session(masked_lm, "masked_lm", precision).run(None, feed)[0][valid].ravel()
        for precision in ("float32", "int8")
    )
    cosine = exact @ rounded / np.sqrt(exact @ exact * (rounded @ rounded))
    assert 0.99 < cosine < 1 - 1e-7


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_masked_lm_holds_its_vocabulary_once(precision, masked_lm):
    for graph in (
        build(masked_lm, precision),
        build_huggingface(describe(masked_lm), "masked_lm", precision, {}),
    ):
        tables = [
            one for one in graph.graph.initializer if VOCAB_SIZE in one.dims and 32 in one.dims
        ]
        assert [list(one.dims) for one in tables] == [[VOCAB_SIZE, 32]]
