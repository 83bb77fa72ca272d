"""The original's format: what we write GluonNLP's own classes load, and we load what they write."""

from __future__ import annotations

import dataclasses
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gluonnlp as nlp
import numpy as np
import pytest
from mxnet import gluon, nd

from bort import checkpoint
from bort.bort import get_bort_model
from bort.parameters import load_parameters
from bort.saved_model import (
    ModelConfig,
    build_network,
    load_model,
    read_model_config,
    save_model,
    save_model_config,
)
from scripts.export_params import main
from tests import reference

SHAPE = "bort_4_2_24_32"  # the released model's number of layers
VOCAB_SIZE = 50
CARD = ModelConfig(model=SHAPE, vocab_size=VOCAB_SIZE, tokenizer_fingerprint="f", kind="masked_lm")
EMBEDDING, PROJECTION = "word_embed.0.weight", "decoder.3.weight"


@pytest.fixture(scope="module")
def trained() -> Any:
    """Return a model whose values are all drawn."""
    model, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE))
    reference.redraw(model, seed=3)
    return model


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """Return the folder of a run with a checkpoint of the model."""
    folder = tmp_path / "run"
    folder.mkdir()
    write = partial(save_model, network=trained, model_config=CARD, tokenizer=None)
    checkpoint.save(str(folder), 12, write, {"mean.0": np.zeros(2)}, {})
    return folder


def gluonnlps_own(use_decoder: bool = True) -> Any:
    """Return GluonNLP's model of that shape, without a line of ours."""
    encoder = nlp.model.BERTEncoder(
        num_layers=4,
        units=32,
        hidden_size=24,
        max_length=512,
        num_heads=2,
        dropout=0.0,
        layer_norm_eps=1e-5,
    )
    return nlp.model.BERTModel(
        encoder,
        vocab_size=VOCAB_SIZE,
        token_type_vocab_size=None,
        units=32,
        embed_size=32,
        use_pooler=False,
        use_decoder=use_decoder,
        use_classifier=False,
        use_token_type_embed=False,
    )


@pytest.mark.parametrize("given", ["", "step-0000012"])
def test_the_file_has_the_released_layout(trained, run, tmp_path, capsys, given):
    output = tmp_path / "bort.params"
    names = main([str(run / given), "--output", str(output)])
    stored = nd.load(str(output))
    assert sorted(stored) == names
    assert len(names) == 74
    np.testing.assert_array_equal(stored[EMBEDDING].asnumpy(), stored[PROJECTION].asnumpy())
    for name, values in reference.parameters_of(trained).items():
        assert stored[name].dtype == np.float32
        np.testing.assert_array_equal(stored[name].asnumpy(), values, err_msg=name)
    said = capsys.readouterr().out
    assert said.startswith(f"{output}: 74 arrays of {SHAPE}, masked_lm, float32, ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", "bort.params", "run"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-2)])
def test_gluonnlps_own_classes_load_it_and_give_the_same_answers(
    trained, run, tmp_path, dtype, tolerance
):
    output = str(tmp_path / "bort.params")
    main([str(run), "--output", output, "--dtype", dtype])
    assert {array.dtype.__name__ for array in nd.load(output).values()} == {dtype}
    model = gluonnlps_own()
    model.load_parameters(output, cast_dtype=True, dtype_source="current")
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, 11))
    places = np.array([[1, 4, 10]])
    _, logits = model(nd.array(ids), None, nd.array([11]), nd.array(places))
    parameters = reference.parameters_of(trained)
    hidden = reference.encode(parameters, 2, ids[0])[places[0]]
    expected = reference.decode(parameters, hidden)
    np.testing.assert_allclose(logits[0].asnumpy(), expected, atol=tolerance)


def test_our_loader_reads_it(trained, run, tmp_path):
    output = str(tmp_path / "bort.params")
    main([str(run), "--output", output, "--dtype", "float16"])
    other, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE))
    load_parameters(other, output)
    expected = reference.parameters_of(trained)
    for name, values in reference.parameters_of(other).items():
        np.testing.assert_array_equal(values, expected[name].astype(np.float16), err_msg=name)


def test_what_gluonnlps_own_classes_write_we_load(tmp_path):
    stock = gluonnlps_own()
    stock.initialize()
    ids, length, places = nd.array([[0, 7, 9, 30, 2]]), nd.array([5]), nd.array([[1, 3]])
    stock(ids, None, length, places)  # shapes of parameters are known after a forward pass
    reference.redraw(stock, seed=8)
    path = str(tmp_path / "stock.params")
    stock.save_parameters(path)
    ours, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE))
    load_parameters(ours, path)
    expected = stock(ids, None, length, places)
    for mine, theirs in zip(ours(ids, length, places), expected):
        np.testing.assert_array_equal(mine.asnumpy(), theirs.asnumpy())


# ---- classifiers --------------------------------------------------------------------------------


class OriginalClassifier(gluon.HybridBlock):
    """The original's classifier, of GluonNLP's and Gluon's blocks alone."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        with self.name_scope():
            self.bort = gluonnlps_own(use_decoder=False)
            self.classifier = gluon.nn.HybridSequential()
            self.classifier.add(
                gluon.nn.Dropout(0.1),
                gluon.nn.Dense(32, activation="tanh"),
                gluon.nn.Dropout(0.1),
                gluon.nn.Dense(classes),
            )

    def forward(self, ids: Any, length: Any) -> Any:
        return self.classifier(self.bort(ids, None, length)[:, 0])


IDS, LENGTHS = nd.array([[0, 7, 9, 30, 2], [0, 8, 2, 1, 1]]), nd.array([5, 3])


@pytest.fixture
def classifier(tmp_path) -> Any:
    """Return a classifier of ours whose values are all drawn, saved in a folder."""
    labels = ("a", "b", "c")
    model_config = dataclasses.replace(CARD, kind="classification", labels=labels, num_outputs=3)
    network = build_network(model_config)
    reference.redraw(network, seed=6)
    save_model(str(tmp_path / "run" / "best.params"), network, model_config, None)
    return network


def test_the_originals_classifier_loads_ours(classifier, tmp_path):
    output = str(tmp_path / "exported.params")
    names = main([str(tmp_path / "run"), "--output", output])
    assert {one.split(".")[0] for one in names} == {"bort", "classifier"}
    original = OriginalClassifier(3)
    original.load_parameters(output)
    found, expected = (one(IDS, LENGTHS).asnumpy() for one in (original, classifier))
    np.testing.assert_array_equal(found, expected)


def test_gluonnlps_roberta_classifier_loads_ours_under_its_own_name(classifier, tmp_path):
    output = str(tmp_path / "exported.params")
    main([str(tmp_path / "run"), "--output", output])
    renamed = {one.replace("bort.", "roberta."): v for one, v in nd.load(output).items()}
    nd.save(output, renamed)
    body, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE), use_decoder=False)
    stock = nlp.model.RoBERTaClassifier(body, num_classes=3, dropout=0.1)
    stock.load_parameters(output)
    found, expected = (one(IDS, LENGTHS).asnumpy() for one in (stock, classifier))
    np.testing.assert_array_equal(found, expected)


def test_we_load_what_the_originals_classifier_writes(classifier, tmp_path):
    original = OriginalClassifier(3)
    original.initialize()
    original(IDS, LENGTHS)
    reference.redraw(original, seed=7)
    path = str(tmp_path / "run" / "best.params")
    original.save_parameters(path)
    save_model_config(path, read_model_config(path), None)  # of the new file
    ours = load_model(str(tmp_path / "run")).network
    found, expected = (one(IDS, LENGTHS).asnumpy() for one in (ours, original))
    np.testing.assert_array_equal(found, expected)
    assert (found != classifier(IDS, LENGTHS).asnumpy()).all()


def complaint(capsys, *line: object) -> str:
    """Return the one line that the program leaves on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in line])
    assert stopped.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    return said


def test_an_invalid_checkpoint_is_a_one_line_error(run, tmp_path, capsys):
    output = tmp_path / "bort.params"
    absent = complaint(capsys, tmp_path / "absent", "--output", output)
    assert "absent: not found" in absent
    bare = tmp_path / "bare.params"
    shutil.copy(run / "step-0000012" / "model.params", bare)
    assert "no bare.json beside it, which says what it is; restore it" in complaint(
        capsys, bare, "--output", output
    )
    with open(run / "step-0000012" / "model.params", "ab") as handle:
        handle.write(b"x")
    assert "altered or truncated" in complaint(capsys, run, "--output", output)
    assert not output.exists()


def test_an_output_that_cannot_be_written_is_a_one_line_error(run, tmp_path, capsys):
    output = tmp_path / "absent" / "bort.params"
    assert f"{output}: there is no folder" in complaint(capsys, run, "--output", output)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "folder: is a folder; name a file" in complaint(capsys, run, "--output", folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run"]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["model.params", "model.json"])
def test_an_output_never_replaces_the_model(run, capsys, name):
    own = run / "step-0000012" / name
    before = own.read_bytes()
    said = complaint(capsys, run, "--output", own, "--dtype", "float16")
    assert said == f"error: --output {own}: would overwrite what it is made from; name another file"
    assert own.read_bytes() == before


def test_an_output_never_replaces_another_model(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run / "step-0000012", other)
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    said = complaint(capsys, run, "--output", other / "model.params")
    assert said.startswith(f"error: --output {other}/model.params: {other}/model.json says that")
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_an_output_that_is_a_link_or_a_fifo_stays_one(run, tmp_path, capsys):
    target, link, fifo = tmp_path / "target", tmp_path / "link", tmp_path / "fifo"
    link.symlink_to(target)
    main([str(run), "--output", str(link)])
    assert link.is_symlink()
    assert capsys.readouterr().out.startswith(f"{link}: ")
    os.mkfifo(fifo)
    with ThreadPoolExecutor(1) as pool:
        content = pool.submit(fifo.read_bytes)
        main([str(run), "--output", str(fifo)])
        assert content.result() == target.read_bytes()
    assert fifo.is_fifo()
    printed = capsys.readouterr()
    assert (printed.out, printed.err[: len(f"{fifo}: ")]) == ("", f"{fifo}: ")


def test_values_that_float16_cannot_hold_are_named(run, tmp_path, capsys):
    model, _ = get_bort_model(SHAPE, vocab=range(VOCAB_SIZE))
    model.decoder[0].bias.data()[3] = 70_000
    write = partial(save_model, network=model, model_config=CARD, tokenizer=None)
    checkpoint.save(str(run), 13, write, {"mean.0": np.zeros(2)}, {})
    output = tmp_path / "bort.params"
    said = complaint(capsys, run, "--output", output, "--dtype", "float16")
    assert "in float16: decoder.0.bias has values that are NaN or infinite" in said
    assert not output.exists()


def test_a_model_with_other_options_is_refused(tmp_path, capsys):
    model_config = dataclasses.replace(CARD, layer_norm_eps=1e-12, type_separator=3)
    path = str(tmp_path / "model" / "model.params")
    save_model(path, build_network(model_config), model_config, None)
    with pytest.raises(SystemExit):
        main([path, "--output", str(tmp_path / "bort.params")])
    assert "cannot say that the model has token types or the layer_norm_eps 1e-12" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "bort.params").exists()


def test_a_classifier_of_the_mean_over_the_tokens_is_refused(classifier, tmp_path, capsys):
    path = str(tmp_path / "run" / "best.params")
    model_config = dataclasses.replace(read_model_config(path), pooling="mean")
    save_model(path, build_network(model_config), model_config, None)
    said = complaint(capsys, path, "--output", tmp_path / "exported.params")
    assert "was trained with --pooling mean, and the original's takes the first token" in said
    assert not (tmp_path / "exported.params").exists()
