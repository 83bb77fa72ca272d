"""LayerNorm's epsilon, token types and mean pooling, on every path that computes a body."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnxruntime
import pytest
from mxnet import autograd, nd

from bort.bort import (
    BortClassifier,
    SparseEmbeddingGrad,
    build_network,
    decode,
    encode,
    encode_for_backward,
    get_bort_model,
    masked_hidden,
    options_of,
)
from bort.encoder import gather_indices
from bort.errors import UserError
from bort.finetuning.scoring import forward, to_device
from bort.inference.onnx_graph import build, describe, describe_file
from bort.inference.onnx_huggingface import build_huggingface
from bort.inference.runtime import OnnxBackend, available_backends, backend_for
from bort.saved_model import (
    ModelConfig,
    body_options_of,
    load_model,
    read_model_config,
    save_model,
)
from bort.saved_model import build_network as network_of
from bort.shapes import BORT_OPTIONS, BodyOptions, array_shapes, shape_of
from data.encoding import ClassifierBatch
from tests import reference

SHAPE, HEADS, VOCAB_SIZE, SEPARATOR = "bort_2_4_24_32", 4, 50, 3
# An epsilon that shows in the results.
ALL = BodyOptions(layer_norm_eps=0.3, type_separator=SEPARATOR)
OPTIONS = [BORT_OPTIONS, BodyOptions(0.3), BodyOptions(type_separator=SEPARATOR), ALL]
CONFIG = ModelConfig(
    SHAPE,
    VOCAB_SIZE,
    "",
    "classification",
    labels=("a", "b", "c"),
    num_outputs=3,
    layer_norm_eps=0.3,
    type_separator=SEPARATOR,
)
# One text, two, three, none; the last ends in the middle of its second text.
ROWS = [[5, 7, 9, 3], [5, 7, 3, 9, 9, 3], [5, 3, 4, 3, 4, 4, 3], [5, 7], [5, 3, 8, 8, 8]]


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Return ids [5, 8], padded with ids that must not matter, and their lengths."""
    ids = np.full((len(ROWS), 8), 11)
    for row, content in enumerate(ROWS):
        ids[row, : len(content)] = content
    return ids, np.array([len(row) for row in ROWS])


def masked_lm(options: BodyOptions, seed: int = 1) -> Any:
    model, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE), dropout=0.0, options=options)
    reference.redraw(model, seed, deviation=0.3)
    return model


def classifier(model_config: ModelConfig) -> Any:
    network = network_of(model_config)
    reference.redraw(network, seed=2, deviation=0.3)
    return network


def expected_states(network: Any) -> list[np.ndarray]:
    parameters, options = reference.parameters_of(network), options_of(network)
    return [reference.encode(parameters, HEADS, np.array(row), *options) for row in ROWS]


def expected_logits(network: Any) -> np.ndarray:
    head = reference.parameters_of(network)
    pooled = [
        states.mean(axis=0) if network.pooling == "mean" else states[0]
        for states in expected_states(network.bort)
    ]
    inner = np.tanh(reference.dense(np.array(pooled), head, "classifier.1"))
    return reference.dense(inner, head, "classifier.3")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("hybridized", [False, True])
def test_hidden_states(options, hybridized):
    model = masked_lm(options)
    ids, lengths = (nd.array(array, dtype="float32") for array in batch())
    if hybridized:
        model.encoder.hybridize(static_alloc=True)
    for found in (encode(model, ids, lengths), model._encode_sequence(ids, [], lengths)[0]):
        for row, expected in zip(found.asnumpy(), expected_states(model)):
            np.testing.assert_allclose(row[: len(expected)], expected, atol=2e-5)
            assert not row[len(expected) :].any()


@pytest.mark.parametrize("options", OPTIONS)
def test_masked_lm_logits(options):
    model = masked_lm(options)
    ids, lengths = (nd.array(array, dtype="float32") for array in batch())
    states = encode(model, ids, lengths)
    positions = np.array([0, 9, 22])
    found = decode(model, masked_hidden(model, states, nd.array(positions))).asnumpy()
    expected = np.concatenate(
        [np.pad(row, ((0, 8 - len(row)), (0, 0))) for row in expected_states(model)]
    )[positions]
    parameters = reference.parameters_of(model)
    np.testing.assert_allclose(
        found, reference.decode(parameters, expected, options.layer_norm_eps), atol=1e-4
    )


def test_gradients_are_those_of_gluonnlp():
    model = masked_lm(ALL)
    model.collect_params().setattr("grad_req", "write")
    ids, lengths = batch()
    values = nd.array(ids, dtype="float32"), nd.array(lengths, dtype="float32")
    weights = nd.array(np.random.default_rng(0).standard_normal((5, 8, 32)))
    with autograd.record():
        loss = (model._encode_sequence(values[0], [], values[1])[0] * weights).sum()
    loss.backward()
    parameters = {
        name: parameter
        for name, parameter in model._collect_params_with_prefix().items()
        if not name.startswith("decoder")
    }
    expected = {name: each.grad().asnumpy().copy() for name, each in parameters.items()}
    assert np.abs(expected["token_type_embed.0.weight"]).min() > 0
    for parameter in parameters.values():
        parameter.grad()[:] = 0
    embeddings = SparseEmbeddingGrad(model, ids, values[0].context)
    with autograd.record():
        loss = (encode_for_backward(model, embeddings, values[1]) * weights).sum()
    embeddings.backward(loss)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.grad().asnumpy(), expected[name], atol=2e-4)


def test_some_positions_alone():
    model = masked_lm(ALL)
    ids, lengths = batch()
    values = nd.array(ids, dtype="float32"), nd.array(lengths, dtype="float32")
    positions = np.array([1, 8, 12, 35])
    indices = gather_indices(positions, *ids.shape, values[0].context)
    found = encode(model, *values, positions=indices).asnumpy()
    whole = encode(model, *values).asnumpy().reshape(-1, 32)
    np.testing.assert_allclose(found, whole[positions], atol=1e-5)


# ---- classifiers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kept", [False, True])
def test_logits_of_classifiers(pooling, kept, tmp_path):
    separator = SEPARATOR if kept else None
    model_config = dataclasses.replace(CONFIG, pooling=pooling, type_separator=separator)
    network = classifier(model_config)
    expected = expected_logits(network)
    ids, lengths = batch()
    values = nd.array(ids, dtype="float32"), nd.array(lengths, dtype="float32")
    found = {"network": network(*values).asnumpy()}
    given = ClassifierBatch(ids, lengths, np.zeros(5, np.float32), np.arange(5))
    device_batch = to_device(given, values[0].context)
    found["evaluation"] = forward(network, device_batch, "classification").asnumpy()
    embeddings = SparseEmbeddingGrad(network.bort, ids, values[0].context)
    with autograd.record(train_mode=False):
        logits = forward(network, device_batch, "classification", embeddings)
    found["training"] = logits.asnumpy()
    path = str(tmp_path / "model.params")
    save_model(path, network, model_config, None)
    graph = build(describe_file(path, model_config)).SerializeToString()
    found["onnx from the file"] = OnnxBackend(graph).logits(ids, lengths)
    assert read_model_config(path) == model_config
    found["loaded"] = load_model(path).network(*values).asnumpy()
    limits = {"mxnet": 2e-5, "onnx": 2e-5, "mxnet-bfloat16": 0.1, "onnx-int8": 0.1}
    for name in set(limits) & set(available_backends()):
        logits = backend_for(load_model(path).network, name).logits(ids, lengths)
        np.testing.assert_allclose(logits, expected, atol=limits[name], err_msg=name)
    for name, logits in found.items():
        np.testing.assert_allclose(logits, expected, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_graph_with_the_inputs_of_huggingface(pooling):
    network = classifier(dataclasses.replace(CONFIG, pooling=pooling))
    ids, lengths = batch()
    graph = build_huggingface(describe(network), "classification", "float32", {})
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    types = np.zeros_like(ids)
    for row, content in enumerate(ROWS):
        if SEPARATOR in content:
            types[row, content.index(SEPARATOR) + 1 : len(content)] = 1
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    assert {each.name for each in session.get_inputs()} == feed.keys()
    (found,) = session.run(None, feed)
    np.testing.assert_allclose(found, expected_logits(network), atol=2e-5)
    (others,) = session.run(None, {**feed, "token_type_ids": 1 - types})
    assert np.abs(found - others).max() > 1e-2


# ---- files ---------------------------------------------------------------------------------------


def test_shapes_of_the_arrays():
    model, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE), use_decoder=False, options=ALL)
    found = {name: p.shape for name, p in model._collect_params_with_prefix().items()}
    assert found == array_shapes(shape_of(SHAPE), VOCAB_SIZE, token_types=True)


def test_borts_own_parameters_are_drawn_as_before():
    import mxnet as mx

    drawn = []
    for options in (BORT_OPTIONS, BodyOptions(1e-12)):
        mx.random.seed(3)
        model, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE), dropout=0.0, options=options)
        drawn.append(reference.parameters_of(model))
    assert drawn[0].keys() == drawn[1].keys()
    assert all(np.array_equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any("token_type" in name for name in drawn[0])


def test_a_model_without_the_entries_has_borts(tmp_path):
    path = tmp_path / "model.params"
    config = {"model": SHAPE, "vocab_size": 50, "tokenizer_fingerprint": "", "kind": "masked_lm"}
    import json

    (tmp_path / "model.json").write_text(json.dumps({"format": 1, **config}))
    assert read_model_config(str(path)).body_options == BORT_OPTIONS
    assert body_options_of(str(tmp_path / "bare.params")) == BORT_OPTIONS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"),
        ({"layer_norm_eps": 7.0}, "layer_norm_eps is 7.0"),
        ({"layer_norm_eps": 1e-38}, "layer_norm_eps is 1e-38"),
        ({"type_separator": -1}, "type_separator is -1"),
        ({"type_separator": VOCAB_SIZE}, "type_separator is 50"),
        ({"pooling": "max"}, "pooling is 'max', expected cls or mean"),
    ],
)
def test_impossible_entries_are_refused(tmp_path, changes, message):
    path = str(tmp_path / "model.params")
    save_model(path, classifier(CONFIG), dataclasses.replace(CONFIG, **changes), None)
    with pytest.raises(UserError, match=message):
        load_model(path)


def test_a_roberta_of_gluonnlp_keeps_its_class():
    name = "roberta_12_768_12"
    network = build_network(name, 5, None, use_decoder=False, random_init=False, trainable=False)
    assert options_of(network) == BORT_OPTIONS
    assert not isinstance(BortClassifier(network).bort, type(masked_lm(ALL)))
