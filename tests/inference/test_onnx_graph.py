"""ONNX graphs against the formulas in float64 and against MXNet, and their program."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gluonnlp as nlp
import numpy as np
import onnx
import onnxruntime
import pytest
from mxnet import nd

from bort import saved_model
from bort.bort import BortClassifier, get_bort_model, initialize
from bort.errors import UserError
from bort.files import sha256_of
from bort.inference import onnx_graph
from bort.inference.onnx_file import verify_onnx_file, write_onnx
from bort.inference.runtime import load_runtime
from bort.parameters import save_parameters
from bort.tokenization import TokenizerSettings, load_tokenizer
from scripts.export_onnx import main
from tests import reference
from tests.pretraining.helpers import finished_run, write_data

VOCAB_SIZE, HEADS = 50, 4
SHAPE = "bort_3_4_24_32"
# As long as all of the padding is at the end, also of one token, and as long as the position table.
BATCHES = [[17, 3, 1, 9], [1], [512], [40, 40, 39]]


def random_batch(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return random ids, in the places of padding too, and the lengths."""
    generator = np.random.default_rng(len(lengths))
    return generator.integers(0, VOCAB_SIZE, (len(lengths), max(lengths))), np.array(lengths)


def classifier(extra_layer: bool = False, body: Any = None) -> Any:
    """Return a classifier whose values are all drawn."""
    body = body or get_bort_model(SHAPE, vocab=range(VOCAB_SIZE), use_decoder=False)[0]
    network = BortClassifier(body, 3, extra_layer=extra_layer)
    initialize(network, None)
    reference.redraw(network, seed=1, deviation=0.3)
    return network


def run(graph: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    """Run a graph that the onnx package finds valid; its one output."""
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, inputs)
    return found


def expected_logits(network: Any, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Score each sequence for itself, without its padding, in float64."""
    body = reference.parameters_of(network.bort)
    head = reference.parameters_of(network)
    rows = []
    for sequence, length in zip(ids, lengths):
        first = reference.encode(body, HEADS, sequence[:length])[0]
        if network.extra is not None:
            first = reference.dense(first, head, "extra")
        inner = np.tanh(reference.dense(first, head, "classifier.1"))
        rows.append(reference.dense(inner, head, "classifier.3"))
    return np.array(rows)


@pytest.mark.parametrize("extra_layer", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_is_described_as_its_network_is(extra_layer, dtype, tmp_path):
    network, path = classifier(extra_layer), str(tmp_path / "best.params")
    network.cast(dtype)
    save_parameters(network, path)
    model_config = saved_model.ModelConfig(
        SHAPE, VOCAB_SIZE, "", "classification", num_outputs=3, extra_layer=extra_layer
    )
    found, expected = onnx_graph.describe_file(path, model_config), onnx_graph.describe(network)
    assert found[1:4] == expected[1:4]
    np.testing.assert_equal(found.parameters, dict(expected.parameters))
    assert len(found.head) == 2 + extra_layer
    for one, other in zip(found.head, expected.head):
        np.testing.assert_equal(one[0], other[0].astype(np.float32))
        np.testing.assert_equal(one[1], other[1].astype(np.float32))
        assert one[2] == other[2]
    wider = dataclasses.replace(model_config, num_outputs=2, model="bort_3_4_24_16")
    with pytest.raises(UserError, match=r"not hold the parameters of bort_3_4_24_16: see"):
        onnx_graph.describe_file(path, wider)


@pytest.mark.parametrize("extra_layer", [False, True])
def test_a_classifier_follows_the_formulas(extra_layer):
    network = classifier(extra_layer)
    graph = onnx_graph.build(network)
    for lengths in BATCHES:
        ids, valid_length = random_batch(lengths)
        found = run(graph, input_ids=ids, valid_length=valid_length)
        expected = expected_logits(network, ids, valid_length)
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(found, expected, atol=2e-5)
        in_mxnet = network(nd.array(ids), nd.array(valid_length)).asnumpy()
        assert np.abs(found - in_mxnet).max() < 1e-4


def test_masked_lm_follows_the_formulas():
    network, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE))
    reference.redraw(network, seed=2, deviation=0.3)
    parameters = reference.parameters_of(network)
    graph = onnx_graph.build(network)
    for lengths in BATCHES:
        ids, valid_length = random_batch(lengths)
        rows = np.repeat(np.arange(len(lengths)), 2)
        places = np.stack([valid_length - 1, valid_length // 2], axis=1).reshape(-1)
        positions = rows * ids.shape[1] + places
        found = run(graph, input_ids=ids, valid_length=valid_length, positions=positions)
        expected = [
            reference.decode(
                parameters, reference.encode(parameters, HEADS, ids[row, : lengths[row]])[[place]]
            )[0]
            for row, place in zip(rows, places)
        ]
        np.testing.assert_allclose(found, expected, atol=5e-5)


def test_gluonnlps_roberta_can_be_exported():
    encoder = nlp.model.BERTEncoder(
        num_layers=2, units=32, hidden_size=64, num_heads=HEADS, max_length=60, dropout=0.0
    )
    body = nlp.model.RoBERTaModel(
        encoder, vocab_size=VOCAB_SIZE, units=32, embed_size=32, use_decoder=False
    )
    body.initialize()
    network = classifier(body=body)
    ids, valid_length = random_batch([5, 2])
    found = run(onnx_graph.build(network), input_ids=ids, valid_length=valid_length)
    in_mxnet = network(nd.array(ids), nd.array(valid_length)).asnumpy()
    assert np.abs(found - in_mxnet).max() < 1e-4


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_only_standard_operators_are_used(precision):
    graph = onnx_graph.build(classifier(), precision)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", onnx_graph.OPSET)]


def test_the_last_layer_of_a_classifier_multiplies_no_matrix_by_all_tokens():
    graph = onnx_graph.build(classifier())
    constants = {one.name for one in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type in ("MatMul", "Gemm")]
    multiplied = [node.input[0] for node in products if node.input[1] in constants]
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(multiplied))
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    ids, valid_length = random_batch([37, 5])
    shapes = [
        one.shape for one in session.run(None, {"input_ids": ids, "valid_length": valid_length})
    ]
    # Of 3 layers two, with 4 products each: all projections, output, and the feed-forward's two.
    assert sum(shape[1] == 37 for shape in shapes) == 2 * 4
    assert [shape[1] for shape in shapes].count(HEADS) == 2


def test_int8_is_a_quarter_of_the_size_and_close():
    network = classifier()
    full, small = (onnx_graph.build(network, precision) for precision in ("float32", "int8"))
    matrices = [one for one in small.graph.initializer if len(one.dims) == 2 and one.dims[1] > 4]
    stored = {one.dims[0]: one.data_type for one in matrices if one.dims[0] == VOCAB_SIZE}
    assert stored == {VOCAB_SIZE: onnx.TensorProto.INT8}
    assert small.ByteSize() < full.ByteSize() - 2 * VOCAB_SIZE * 32
    scores = []
    for lengths in ([17, 3, 1, 9], [40, 40, 39]):
        ids, valid_length = random_batch(lengths)
        scores.append(
            [run(one, input_ids=ids, valid_length=valid_length).ravel() for one in (full, small)]
        )
    exact, rounded = np.concatenate(scores, axis=1)
    cosine = exact @ rounded / np.sqrt(exact @ exact * (rounded @ rounded))
    assert 0.99 < cosine < 1 - 1e-7


def test_a_matrix_is_rounded_to_half_a_step_of_each_column():
    matrix = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32) * [1, 10, 0, 3, 1e-3]
    rounded, scales = onnx_graph.quantize_matrix(matrix, axis=0)
    assert rounded.dtype == np.int8
    assert scales.shape == (1, 5)
    assert (np.abs(rounded * scales - matrix) <= scales / 2 * (1 + 1e-6)).all()
    np.testing.assert_array_equal(np.abs(rounded).max(axis=0), [127, 127, 0, 127, 127])


# ---- the program ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Return the .params file of a saved classifier."""
    tokenizer = load_tokenizer(TokenizerSettings())
    model_config = saved_model.ModelConfig(
        SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, "classification", "CoLA", ("0", "1"), 2
    )
    network = saved_model.build_network(model_config)
    reference.redraw(network, seed=3)
    path = tmp_path_factory.mktemp("CoLA") / "best.params"
    saved_model.save_model(str(path), network, model_config, tokenizer)
    return path


def test_a_saved_classifier_is_written_beside_its_parameters(saved, capsys):
    difference = main([str(saved.parent)])
    file = saved.with_name("best.onnx")
    network = saved_model.load_model(str(saved)).network
    ids, valid_length = random_batch([9, 4])
    found = run(onnx.load(str(file)), input_ids=ids, valid_length=valid_length)
    in_mxnet = network(nd.array(ids), nd.array(valid_length)).asnumpy()
    assert np.abs(found - in_mxnet).max() < 1e-4
    assert 0 < difference < 1e-4
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{file}: classification of {SHAPE}, ")
    assert said[1].startswith(f"largest difference from MXNet {difference:.1e}, of values up to ")
    notes = {one.key: one.value for one in onnx.load(str(file)).metadata_props}
    assert notes["parameters_sha256"] == sha256_of(str(saved))
    assert '"task": "CoLA"' in notes["model config"]
    assert notes["positions"] == "512"


def test_a_pretraining_run_is_exported_with_its_decoder(tmp_path, capsys):
    write_data(tmp_path / "data")
    finished_run(tmp_path / "data", ckpt_dir=tmp_path / "run", num_steps=2)
    output = tmp_path / "bort.onnx"
    main([str(tmp_path / "run"), "--output", str(output)])
    assert ": masked_lm of " in capsys.readouterr().out
    assert [one.name for one in onnx.load(str(output)).graph.input] == [
        "input_ids",
        "valid_length",
        "positions",
    ]


def complaint(capsys: Any, *line: object) -> str:
    """Return the one line that the program leaves on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in line])
    assert stopped.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    return said


def test_mistakes_are_reported_in_one_line_and_leave_nothing(saved, tmp_path, capsys):
    assert "absent: not found" in complaint(capsys, tmp_path / "absent")
    output = tmp_path / "absent" / "best.onnx"
    assert f"{output}: there is no folder" in complaint(capsys, saved, "--output", output)
    (tmp_path / "folder").mkdir()
    assert "folder: is a folder" in complaint(capsys, saved, "--output", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert not list((tmp_path / "folder").iterdir())
    before = saved.read_bytes()
    assert "would overwrite what it is made from" in complaint(capsys, saved, "--output", saved)
    assert saved.read_bytes() == before


def test_an_output_that_is_a_link_or_a_fifo_stays_one(saved, tmp_path):
    target, link, fifo = tmp_path / "target.onnx", tmp_path / "link.onnx", tmp_path / "fifo"
    link.symlink_to(target)
    main([str(saved), "--output", str(link)])
    assert link.is_symlink()
    assert verify_onnx_file(str(target))
    os.mkfifo(fifo)
    with ThreadPoolExecutor(1) as pool:
        content = pool.submit(fifo.read_bytes)
        main([str(saved), "--output", str(fifo)])
        assert content.result() == target.read_bytes()
    assert fifo.is_fifo()


def test_parameters_that_are_not_finite_are_named(tmp_path, capsys):
    tokenizer = load_tokenizer(TokenizerSettings())
    model_config = saved_model.ModelConfig(
        SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, "classification", "CoLA", ("0", "1"), 2
    )
    network = saved_model.build_network(model_config)
    network.classifier[1].bias.set_data(nd.array([np.nan] * 32))
    path = tmp_path / "best.params"
    saved_model.save_model(str(path), network, model_config, tokenizer)
    assert "has values that are NaN or infinite" in complaint(capsys, path)
    assert not path.with_name("best.onnx").exists()


# ---- the SHA-256 ---------------------------------------------------------------------------------


def test_a_file_ends_with_its_sha256_which_onnx_takes_for_metadata(tmp_path):
    path = tmp_path / "best.onnx"
    write_onnx(onnx_graph.build(classifier()), str(path))
    onnx.checker.check_model(str(path), full_check=True)
    content = path.read_bytes()
    digest = hashlib.sha256(content[:-76]).hexdigest()
    metadata = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    assert metadata["sha256"] == digest
    assert verify_onnx_file(str(path))
    path.write_bytes(content[:-76])
    assert not verify_onnx_file(str(path))


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "best.onnx"
    write_onnx(onnx_graph.build(classifier()), str(path))
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    places = [*generator.integers(0, len(content), 20), *range(len(content) - 76, len(content), 5)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|cannot load it"):
            load_runtime(str(path), "onnx")


def test_a_graph_that_differs_is_not_written(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_graph.Writer, "gelu", lambda self, values: values)
    output = tmp_path / "best.onnx"
    assert "ONNX Runtime differs from MXNet by" in complaint(capsys, saved, "--output", output)
    assert not list(tmp_path.iterdir())
