from __future__ import annotations

from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, nd

from bort.bort import BortModel, build_network, decode, encode, masked_hidden
from bort.errors import UserError
from bort.parameters import save_parameters
from bort.pretraining.mlm import to_device
from bort.pretraining.teacher import LiveTeacher, OpenVinoTeacher, load_teacher, require_openvino
from bort.processor import multiplies_bfloat16
from data.batches import Batch
from tests.reference import parameters_of, redraw
from tests.test_parameters import save_checkpoint

TINY = "bort_2_4_24_32"


def load(path: Path, vocab_size: int = 50, fingerprint: str = "f1", name: str = TINY) -> Any:
    return load_teacher(name, str(path), vocab_size, fingerprint, [mx.cpu()])


# ---- loading -----------------------------------------------------------------------------------


def test_a_teacher_has_the_weights_of_its_file(tiny_model: BortModel, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_model)
    expected = parameters_of(tiny_model)
    for name, values in parameters_of(load(tmp_path)).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_a_teacher_is_frozen_and_without_dropout(tiny_model: BortModel, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_model)
    teacher = load(tmp_path)
    assert {p.grad_req for p in teacher.collect_params().values()} == {"null"}
    ids, lengths = nd.array([[3, 14, 15, 9, 2], [6, 5, 3, 5, 8]]), nd.array([5, 3])
    expected = encode(tiny_model, ids, lengths).asnumpy()
    with autograd.train_mode():
        sequence = encode(teacher, ids, lengths).asnumpy()
    np.testing.assert_allclose(sequence, expected, atol=1e-6)


def test_a_teacher_encodes_batches_of_changing_size(tiny_model: BortModel, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_model)
    teacher = load(tmp_path)
    for size, length in ((2, 7), (1, 30), (5, 3), (2, 7)):
        ids = nd.array(np.random.default_rng(length).integers(0, 50, (size, length)))
        lengths = nd.array(1 + np.arange(size) % length)
        np.testing.assert_allclose(
            encode(teacher, ids, lengths).asnumpy(),
            encode(tiny_model, ids, lengths).asnumpy(),
            atol=1e-6,
        )


def test_a_teacher_of_another_tokenizer_is_refused(tiny_model: BortModel, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_model, fingerprint="f2")
    for given in (path, tmp_path, path / "model.params"):
        with pytest.raises(UserError, match="trained with another tokenizer"):
            load(given)
    load(path, fingerprint="f2")


def test_a_bare_file_does_not_know_its_tokenizer(tiny_model: BortModel, tmp_path: Path) -> None:
    save_parameters(tiny_model, str(tmp_path / "x.params"))
    load(tmp_path, fingerprint="any")


def test_a_teacher_of_another_size_is_refused(tiny_model: BortModel, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_model)
    with pytest.raises(UserError, match=r"\(50, 32\), the model \(49, 32\)"):
        load(tmp_path, vocab_size=49)
    with pytest.raises(UserError, match=r"missing encoder\.transformer_cells\.2"):
        load(tmp_path, name="bort_3_4_24_32")
    with pytest.raises(UserError, match=r"surplus encoder\.transformer_cells\.1"):
        load(tmp_path, name="bort_1_4_24_32")


def test_an_unknown_teacher_is_told_what_there_is() -> None:
    with pytest.raises(UserError) as caught:
        build_network("bert_12_768_12", 50, mx.cpu())
    message = str(caught.value)
    assert message.startswith("model name 'bert_12_768_12'")
    assert message.endswith("or one of roberta_12_768_12, roberta_24_1024_16")


# ---- OpenVINO ----------------------------------------------------------------------------------


def test_openvino_gives_the_logits_of_mxnet(tiny_model: BortModel, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    save_checkpoint(tmp_path, tiny_model)
    expected, found = LiveTeacher(load(tmp_path)), OpenVinoTeacher(load(tmp_path))
    batches = []
    for size, length in ((3, 12), (1, 5), (4, 12), (3, 12)):
        generator = np.random.default_rng(size)
        lengths = 3 + np.arange(size) % (length - 2)
        places = np.flatnonzero(np.arange(length) < lengths[:, None])[::2]
        ids = generator.integers(0, 50, (size, length))
        batches.append(to_device(Batch(ids, lengths, places, ids.flat[places]), mx.cpu()))
    for batch in batches:
        logits = found.logits(batch).asnumpy()
        assert logits.std() > 0.01
        np.testing.assert_allclose(logits, expected.logits(batch).asnumpy(), atol=1e-5)
    if not multiplies_bfloat16():
        return
    exact = found.logits(batches[0]).asnumpy()
    found.use_bfloat16()
    rounded = found.logits(batches[0]).asnumpy()
    assert 0 < np.abs(rounded - exact).max() < 0.03 * np.abs(exact).max()


def test_openvino_is_not_for_gpus() -> None:
    with pytest.raises(UserError, match="--teacher_runtime openvino: is for CPUs"):
        require_openvino([mx.gpu(0)])


# ---- GluonNLP's RoBERTa ------------------------------------------------------------------------


@pytest.mark.slow
def test_roberta_is_gluonnlps_and_decodes_as_it_does(tmp_path: Path) -> None:
    import gluonnlp as nlp

    original, _ = nlp.model.get_model(
        "roberta_12_768_12", vocab=range(60), pretrained=False, use_decoder=True
    )
    original.initialize(mx.init.Normal(0.02))
    ids = nd.array(np.random.default_rng(0).integers(0, 60, (2, 11)))
    lengths, table = nd.array([11, 6]), np.array([[1, 10, 4], [0, 5, 2]])
    original(ids, lengths, nd.array(table))
    redraw(original, seed=3, deviation=0.05)
    # As GluonNLP publishes its models: tied matrix twice, names of a parameter file.
    original.save_parameters(str(tmp_path / "roberta_12_768_12.params"))
    expected_sequence, expected_logits = original(ids, lengths, nd.array(table))

    teacher = load(tmp_path, vocab_size=60, name="roberta_12_768_12")
    assert len(teacher.encoder.transformer_cells) == 12
    sequence = encode(teacher, ids, lengths)
    np.testing.assert_allclose(sequence.asnumpy(), expected_sequence.asnumpy(), atol=1e-5)
    positions = nd.array((table + np.array([[0], [11]])).ravel())
    logits = decode(teacher, masked_hidden(teacher, sequence, positions)).asnumpy()
    np.testing.assert_allclose(logits, expected_logits.asnumpy().reshape(6, 60), atol=2e-5)
