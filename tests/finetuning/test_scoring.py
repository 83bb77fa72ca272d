"""Scores and losses of classifiers, against NumPy in float64 and against one example at a time."""

from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, nd

from bort.bort import SparseEmbeddingGrad
from bort.communicator import SingleProcess
from bort.finetuning.run import ClassificationStep
from bort.finetuning.scoring import (
    classification_loss,
    forward,
    predict_logits,
    to_device,
)
from bort.saved_model import ModelConfig, build_network
from bort.tokenization import TokenizerSettings, load_tokenizer
from bort.training.reporting import PhaseTimer
from data.encoding import ClassifierLoader, encode_examples
from data.task import Example
from tests.reference import redraw


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TokenizerSettings())


def network_of(tokenizer: Any, kind: str, outputs: int) -> Any:
    network = build_network(
        ModelConfig("bort_1_2_32_32", tokenizer.vocab_size, "", kind, num_outputs=outputs)
    )
    redraw(network, seed=4)
    return network


def source_of(tokenizer: Any, width: int, batch_size: int = 3) -> ClassifierLoader:
    made = [
        Example(n, tuple((f"story {n} {k}", "more " * (n % 4)) for k in range(width)), n % 2)
        for n in range(11)
    ]
    encoded = encode_examples(made, tokenizer, 32)
    return ClassifierLoader(encoded, batch_size, 3, tokenizer.pad_id, None)


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=1, keepdims=True)
    logarithms = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -logarithms[np.arange(len(labels)), labels.astype(int)]


@pytest.mark.parametrize("kind", ["classification", "multiple_choice", "regression"])
def test_losses_and_gradients_are_those_of_the_formulas(kind):
    generator = np.random.default_rng(0)
    width = 1 if kind == "regression" else 3
    scores = generator.normal(0, 3, (6, width))
    labels = generator.uniform(0, 5, 6) if kind == "regression" else generator.integers(0, 3, 6)
    given = nd.array(scores)
    given.attach_grad()
    with autograd.record():
        loss = classification_loss(given, nd.array(labels), kind)
        total = loss.sum()
    total.backward()
    if kind == "regression":
        expected, gradient = (scores[:, 0] - labels) ** 2 / 2, scores - labels[:, None]
    else:
        expected = cross_entropy(scores, labels)
        soft = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        gradient = soft - np.eye(3)[labels]
    np.testing.assert_allclose(loss.asnumpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(given.grad.asnumpy(), gradient, atol=1e-5)


@pytest.mark.parametrize(("kind", "outputs", "width"), [
    ("classification", 3, 1), ("regression", 1, 1), ("multiple_choice", 1, 4), ("candidates", 2, 1),
])  # fmt: skip
def test_every_example_is_scored_in_its_place(tokenizer, kind, outputs, width):
    network, source = network_of(tokenizer, kind, outputs), source_of(tokenizer, width)
    scores = predict_logits(network, source, kind, nd.zeros(1).context)
    encoded = source.encoded
    for example in range(11):
        alone = []
        for number in range(example * width, (example + 1) * width):
            ids = encoded.ids[encoded.offsets[number] : encoded.offsets[number + 1]]
            alone.append(network(nd.array([ids]), nd.array([len(ids)])).asnumpy()[0])
        np.testing.assert_allclose(scores[example], np.concatenate(alone), atol=1e-5)


class Rank(SingleProcess):
    """One of several ranks whose sums are made by the test."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("batch_size", [3, 11])
def test_ranks_score_what_one_alone_does(tokenizer, batch_size):
    network = network_of(tokenizer, "multiple_choice", 1)
    source = source_of(tokenizer, 2, batch_size)
    alone = predict_logits(network, source, "multiple_choice", nd.zeros(1).context)
    parts = [
        predict_logits(network, source, "multiple_choice", nd.zeros(1).context, Rank(rank, 5))
        for rank in range(5)
    ]
    np.testing.assert_array_equal(sum(parts), alone)


@pytest.mark.parametrize("alone", [True, False])
def test_a_step_leaves_nothing_of_the_last_gradient_of_the_embeddings(tokenizer, alone):
    network = network_of(tokenizer, "classification", 2)
    weight = network.bort.word_embed[0].weight
    source = source_of(tokenizer, 1, 3)
    first, second = (to_device(source(number), mx.cpu()) for number in (0, 1))
    gradients = []
    for batches in ([second], [first, second]):
        step = ClassificationStep(network, "classification", 1)
        weight.grad()[:] = 7.0  # of a run before
        for batch in batches:
            step.clear_embeddings(alone)
            step(batch, 1.0, PhaseTimer())
        gradients.append(weight.grad().asnumpy())
    assert (gradients[0] != 0).any(axis=1).sum() < len(gradients[0])
    np.testing.assert_array_equal(*gradients)


def test_embedding_rows_give_the_same_scores_and_the_gradient_of_the_matrix(tokenizer):
    network = network_of(tokenizer, "classification", 2)
    batch = to_device(source_of(tokenizer, 1)(0), nd.zeros(1).context)
    weight = network.bort.word_embed[0].weight
    gradients = []
    for with_rows in (False, True):
        network.collect_params().zero_grad()
        rows = SparseEmbeddingGrad(network.bort, batch.host_ids, mx.cpu()) if with_rows else None
        with autograd.record():
            scores = forward(network, batch, "classification", rows)
            loss = classification_loss(scores, batch.labels, "classification").sum()
        if rows is None:
            loss.backward()
        else:
            rows.backward(loss)
        gradients.append((scores.asnumpy(), weight.grad().asnumpy()))
    for plain, by_rows in zip(*gradients):
        np.testing.assert_allclose(by_rows, plain, atol=1e-6)
    assert np.abs(gradients[0][1]).max() > 0
