"""Saved models: the round trip, and what is refused."""

from __future__ import annotations

import json
import os
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet import nd

from bort.bort import BortClassifier, get_bort_model
from bort.bort import build_network as build_body
from bort.errors import UserError
from bort.files import read_json
from bort.saved_model import ModelConfig, build_network, load_model, read_model_config, save_model
from bort.tokenization import TokenizerSettings, load_tokenizer
from scripts import describe_released
from tests.pretraining.helpers import SHAPE, finished_run, write_data
from tests.reference import redraw

IDS = nd.array([[0, 7, 9, 2], [0, 8, 2, 1]])
LENGTHS = nd.array([4, 3])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TokenizerSettings())


def card_of(tokenizer: Any, **others: Any) -> ModelConfig:
    values = {
        "model": SHAPE,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "kind": "classification",
        "task": "CoLA",
        "labels": ("0", "1"),
        "num_outputs": 2,
        "max_len": 64,
    }
    return ModelConfig(**{**values, **others})


@pytest.mark.parametrize("extra_layer", [False, True])
def test_a_classifier_survives_the_round_trip(tmp_path, tokenizer, extra_layer):
    model_config = card_of(
        tokenizer, extra_layer=extra_layer, details={"metrics": {"accuracy": 0.5}}
    )
    network = build_network(model_config)
    redraw(network, seed=1)
    save_model(str(tmp_path / "best.params"), network, model_config, tokenizer)
    for path in (tmp_path, tmp_path / "best.params"):
        loaded = load_model(str(path))
        assert loaded.model_config == model_config
        assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
        expected, found = (one(IDS, LENGTHS).asnumpy() for one in (network, loaded.network))
        np.testing.assert_array_equal(found, expected)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("kind", ["classification", "masked_lm"])
def test_gradients_are_for_those_who_train(tmp_path, tokenizer, kind):
    model_config = card_of(tokenizer, kind=kind)
    save_model(str(tmp_path / "best.params"), build_network(model_config), model_config, tokenizer)
    for trainable, kept in ((False, "null"), (True, "write")):
        network = load_model(str(tmp_path), trainable=trainable).network
        assert {p.grad_req for p in network.collect_params().values()} == {kept}


def test_the_extra_layer_is_one_more_dense_layer(tokenizer):
    network = build_network(card_of(tokenizer, extra_layer=True))
    redraw(network, seed=2)
    values = {n: p.data().asnumpy() for n, p in network._collect_params_with_prefix().items()}
    first = network.bort(IDS, LENGTHS)[:, 0].asnumpy().astype(np.float64)
    first = first @ values["extra.weight"].T + values["extra.bias"]
    inner = np.tanh(first @ values["classifier.1.weight"].T + values["classifier.1.bias"])
    expected = inner @ values["classifier.3.weight"].T + values["classifier.3.bias"]
    np.testing.assert_allclose(network(IDS, LENGTHS).asnumpy(), expected, atol=1e-5)


def test_a_roberta_classifier_is_saved_the_same_way(tmp_path, tokenizer, monkeypatch):
    """A small stand-in for RoBERTa: the network of another class, without our length check."""
    import gluonnlp as nlp

    from bort.pretraining import teacher

    def small(name: str, vocab: Any, use_decoder: bool, dropout: float, **_: Any) -> Any:
        encoder = nlp.model.BERTEncoder(
            num_layers=1, units=16, hidden_size=32, max_length=32, num_heads=2, dropout=dropout
        )
        size = {"vocab_size": len(vocab), "units": 16, "embed_size": 16}
        return nlp.model.RoBERTaModel(encoder, use_decoder=use_decoder, **size), vocab

    monkeypatch.setattr(teacher.nlp.model, "get_model", small)
    model_config = card_of(tokenizer, model="roberta_12_768_12")
    network = build_network(model_config)
    assert type(network.bort) is nlp.model.RoBERTaModel
    assert isinstance(network, BortClassifier)
    save_model(str(tmp_path / "best.params"), network, model_config, tokenizer)
    loaded = load_model(str(tmp_path))
    found = loaded.network(IDS, LENGTHS).asnumpy()
    np.testing.assert_array_equal(found, network(IDS, LENGTHS).asnumpy())


@pytest.mark.parametrize("where", ["", "checkpoint_last", "step-0000004"])
def test_a_pretraining_run_is_a_saved_model(tmp_path, where):
    write_data(tmp_path / "data")
    run = finished_run(tmp_path / "data", ckpt_dir=tmp_path / "run", num_steps=4)
    loaded = load_model(str(tmp_path / "run" / where))
    assert (loaded.model_config.kind, loaded.model_config.model) == ("masked_lm", SHAPE)
    assert loaded.tokenizer is None  # these shards have none
    assert loaded.model_config.details["data"] == str(tmp_path / "data" / "train")
    command = loaded.model_config.details["command"]
    assert command.startswith(f"python run_pretraining_distillation.py --data {tmp_path}")
    assert "--num_steps 4" in command
    expected = run.job.network.word_embed[0].weight.data().asnumpy()
    np.testing.assert_array_equal(loaded.network.word_embed[0].weight.data().asnumpy(), expected)


def test_loading_draws_no_random_numbers(tmp_path, tokenizer):
    model_config = card_of(tokenizer, extra_layer=True)
    save_model(str(tmp_path / "best.params"), build_network(model_config), model_config, tokenizer)
    mx.random.seed(3)
    expected = nd.random.uniform(shape=4).asnumpy()
    mx.random.seed(3)
    load_model(str(tmp_path))
    np.testing.assert_array_equal(nd.random.uniform(shape=4).asnumpy(), expected)
    empty = build_network(model_config, random_init=False)
    ours = (name for name in empty.collect_params() if not name.endswith("gamma"))
    assert not any(empty.collect_params()[name].data().asnumpy().any() for name in ours)


def test_what_is_no_saved_model_is_refused(tmp_path, tokenizer):
    model_config = card_of(tokenizer)
    path = tmp_path / "best.params"
    with pytest.raises(UserError, match=r"holds no parameters"):
        load_model(str(tmp_path))
    save_model(str(path), build_network(model_config), model_config, tokenizer)
    written = read_json(str(tmp_path / "best.json"))
    for content in (
        [],
        {**written, "format": 2},
        {"format": 1},
        {**written, "vocab_size": "x"},
        {**written, "model": "bort_1999999999_2_16_16"},
        {**written, "num_outputs": 10**9},
        {**written, "kind": "poem"},
        {**written, "num_outputs": 3},
        {**written, "labels": ["0"]},
    ):
        (tmp_path / "best.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(UserError, match=r"best\.json"):
            read_model_config(str(path))
    (tmp_path / "best.json").unlink()
    with pytest.raises(UserError, match=r"no best\.json beside it"):
        load_model(str(path))


def test_another_shape_than_the_cards_is_refused(tmp_path, tokenizer):
    model_config = card_of(tokenizer)
    save_model(str(tmp_path / "best.params"), build_network(model_config), model_config, tokenizer)
    other = read_json(str(tmp_path / "best.json"))
    (tmp_path / "best.json").write_text(json.dumps({**other, "model": "bort_1_2_32_64"}))
    with pytest.raises(UserError, match="shape"):
        load_model(str(tmp_path))


def test_bodies_are_built_with_and_without_decoder():
    assert "decoder.3.bias" in build_body(SHAPE, 30, mx.cpu())._collect_params_with_prefix()
    bare = build_body(SHAPE, 30, mx.cpu(), use_decoder=False)._collect_params_with_prefix()
    assert not [name for name in bare if name.startswith("decoder")]


def test_the_released_model_gets_a_card(tmp_path, tokenizer, monkeypatch):
    assert os.path.isabs(describe_released.MODEL)  # else it would be in the current folder
    monkeypatch.setattr(describe_released, "load_tokenizer", lambda settings: tokenizer)
    monkeypatch.setattr(describe_released, "MODEL", str(tmp_path / "model" / "bort.params"))
    monkeypatch.setattr(describe_released, "SHAPE", SHAPE)
    model_config = describe_released.main([])
    network, _ = get_bort_model(SHAPE, vocab=tokenizer)
    network.save_parameters(str(tmp_path / "model" / "bort.params"))
    loaded = load_model(str(tmp_path / "model"))
    assert (loaded.model_config, model_config.kind) == (model_config, "masked_lm")
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint


def test_a_flipped_bit_of_the_parameters_is_named(tmp_path, tokenizer):
    model_config = card_of(tokenizer)
    path = tmp_path / "best.params"
    save_model(str(path), build_network(model_config), model_config, tokenizer)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"best\.params: its SHA-256 is not that in best\.json"):
        load_model(str(tmp_path))


def test_a_model_saved_without_a_sha_256_is_loaded(tmp_path, tokenizer):
    model_config = card_of(tokenizer)
    save_model(str(tmp_path / "best.params"), build_network(model_config), model_config, tokenizer)
    written = read_json(str(tmp_path / "best.json"))
    del written["sha256"]
    (tmp_path / "best.json").write_text(json.dumps({**written, "of a later version": 1}))
    assert load_model(str(tmp_path)).model_config == model_config


def test_another_tokenizer_of_equal_size_is_refused(tmp_path, tokenizer):
    model_config = card_of(tokenizer, tokenizer_fingerprint="0" * 64)
    save_model(str(tmp_path / "best.params"), build_network(model_config), model_config, tokenizer)
    with pytest.raises(UserError, match=r"another tokenizer than the one that best\.params was"):
        load_model(str(tmp_path))
