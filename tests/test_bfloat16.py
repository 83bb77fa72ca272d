"""Products in bfloat16: their values, their gradients, and that the copies follow the weights."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Callable

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, nd

from bort import devices, processor, saved_model
from bort.bfloat16 import DTYPE, operand, refresh, use_bfloat16
from bort.bort import (
    BortModel,
    SparseEmbeddingGrad,
    decode,
    decoder_hidden,
    encode,
    encode_for_backward,
    get_bort_model,
    set_dtype,
)
from bort.communicator import SingleProcess
from bort.encoder import fuse_qkv, gather_indices
from bort.errors import UserError
from bort.finetuning.scoring import classification_loss
from bort.parameters import load_parameters, save_parameters
from bort.saved_model import ModelConfig
from bort.training.optimization import Trainer
from tests.conftest import ROOT
from tests.reference import redraw

MULTIPLIES = processor.multiplies_bfloat16  # before the fixture replaces it
pytestmark = pytest.mark.usefixtures("bfloat16")

IDS = np.random.default_rng(4).integers(0, 50, (3, 12))
LENGTHS = np.array([12, 4, 7])
POSITIONS = np.array([1, 5, 11, 13, 24, 26, 30])  # in the grid of 3 x 12
WEIGHTS = np.random.default_rng(6).normal(size=(len(POSITIONS), 50))
# bfloat16 has 8 bits: a value is off by up to 2^-9 of itself.
ROUNDING = 2.0**-9


def model_of(dtype: str, seed: int = 5, **options: Any) -> BortModel:
    """Return a model with the weights of a seed that computes in a type."""
    model, _ = get_bort_model("bort_2_4_48_32", vocab=range(50), dropout=0.0, **options)
    redraw(model, seed)
    set_dtype(model, dtype)
    return model


def logits_of(model: BortModel) -> np.ndarray:
    """Return the logits at POSITIONS, as in an evaluation."""
    masked = gather_indices(POSITIONS, *IDS.shape, mx.cpu())
    dtype = model.word_embed[0].weight.dtype
    ids, lengths = (nd.array(each, dtype=dtype) for each in (IDS, LENGTHS))
    return decode(model, decoder_hidden(model, encode(model, ids, lengths, positions=masked)))


def differentiate(model: BortModel) -> None:
    """Differentiate a fixed weighing of the logits, as a step of training does."""
    dtype = model.word_embed[0].weight.dtype
    rows = SparseEmbeddingGrad(model, IDS, mx.cpu())
    masked = gather_indices(POSITIONS, *IDS.shape, mx.cpu())
    lengths = nd.array(LENGTHS, dtype=dtype)
    with autograd.record():
        encoded = encode_for_backward(model, rows, lengths, positions=masked)
        logits = decode(model, decoder_hidden(model, encoded))
    rows.backward(logits, nd.array(WEIGHTS, dtype=dtype))


def gradients_of(model: BortModel) -> dict[str, np.ndarray]:
    return {n: p.grad().asnumpy() for n, p in model._collect_params_with_prefix().items()}


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_logits_are_those_of_float64_within_bfloat16s_rounding() -> None:
    expected = logits_of(model_of("float64")).asnumpy()
    logits = logits_of(model_of("bfloat16"))
    assert logits.dtype == np.float32
    # Each of about a dozen roundings on the way is a random one.
    assert ROUNDING / 4 < distance(logits.asnumpy(), expected) < 4 * ROUNDING


def test_gradients_are_those_of_float64_within_bfloat16s_rounding() -> None:
    exact, rounded, single = (model_of(dtype) for dtype in ("float64", "bfloat16", "float32"))
    for model in (exact, rounded, single):
        differentiate(model)
    expected, found, close = map(gradients_of, (exact, rounded, single))
    for name, values in expected.items():
        # Softmax does not see the keys' bias; the gradient of the last bias is no product.
        if name.endswith(("proj_key.bias", "decoder.3.bias")):
            continue
        assert found[name].dtype == np.float32
        assert distance(close[name], values) < 1e-4, name
        assert ROUNDING / 4 < distance(found[name], values) < 12 * ROUNDING, name


def test_gradients_of_micro_batches_are_summed_in_float32() -> None:
    model = model_of("bfloat16")
    differentiate(model)
    once = gradients_of(model)
    model.collect_params().setattr("grad_req", "add")
    model.collect_params().zero_grad()
    for _ in range(3):
        differentiate(model)
    for name, values in gradients_of(model).items():
        # In bfloat16, two times a value plus the value would be rounded.
        np.testing.assert_allclose(values, 3 * once[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_a_product_that_is_not_recorded_leaves_the_gradients_alone() -> None:
    model = model_of("bfloat16")
    differentiate(model)
    before = gradients_of(model)
    logits_of(model)  # an evaluation
    rows = SparseEmbeddingGrad(model, IDS, mx.cpu())
    model.collect_params().zero_grad()
    with autograd.record():  # the last layer's attention from one token takes no copies
        encoded = encode_for_backward(model, rows, nd.array(LENGTHS), cls_only=True)
        total = (encoded * nd.array(WEIGHTS[0, :32])).sum()
    rows.backward(total)
    query = "encoder.transformer_cells.1.attention_cell.proj_query.weight"
    after = gradients_of(model)
    assert after[query].any()
    assert distance(after[query], before[query]) > 0.1
    assert not after["decoder.0.weight"].any()


def assert_fresh(model: BortModel) -> None:
    """Check that every copy is its parameter, rounded."""
    count = 0
    for parameter in model.collect_params().values():
        copy = operand(parameter, mx.cpu())
        if copy.dtype == DTYPE:
            values = nd.amp_cast(copy, dtype="float32").asnumpy()
            np.testing.assert_allclose(values, parameter.data().asnumpy(), rtol=2 * ROUNDING)
            count += 1
    # Weights and biases of six products a layer, the decoder's transform, the vocabulary's matrix.
    assert count == 2 * (2 * 6) + 2 + 1


def test_copies_follow_an_update() -> None:
    model = model_of("bfloat16")
    trainer = Trainer(list(model.collect_params().values()), SingleProcess(), 0.01, 1e-6, 1.0)
    differentiate(model)
    before = logits_of(model).asnumpy()
    trainer.update(trainer.sum_gradients(7), 0.1)
    assert distance(logits_of(model).asnumpy(), before) > 0.1
    assert_fresh(model)


def test_copies_follow_loaded_parameters(tmp_path) -> None:
    path = str(tmp_path / "other.params")
    other = model_of("float32", seed=6)
    save_parameters(other, path)
    model = model_of("bfloat16")
    load_parameters(model, path)
    assert_fresh(model)
    assert distance(logits_of(model).asnumpy(), logits_of(other).asnumpy()) < 4 * ROUNDING


def test_copies_on_several_devices_follow() -> None:
    model = model_of("bfloat16", ctx=[mx.cpu(0), mx.cpu(1)])
    parameter = model.decoder[3].weight
    for device in (mx.cpu(0), mx.cpu(1)):
        parameter.data(device)[:] = 3
    refresh([parameter])
    for device in (mx.cpu(0), mx.cpu(1)):
        assert (nd.amp_cast(operand(parameter, device), dtype="float32").asnumpy() == 3).all()


def test_a_frozen_network_has_fused_projections_in_bfloat16() -> None:
    expected = logits_of(model_of("float64")).asnumpy()
    model = model_of("bfloat16", trainable=False)
    apart = logits_of(model).asnumpy()
    fuse_qkv(model.encoder)
    assert model.encoder.transformer_cells[0].attention_cell.fused_qkv[mx.cpu()][0].dtype == DTYPE
    for logits in (apart, logits_of(model).asnumpy()):
        assert ROUNDING / 4 < distance(logits, expected) < 4 * ROUNDING


# ---- a classifier ------------------------------------------------------------------------------


def classifier_gradients(dtype: str) -> dict[str, np.ndarray]:
    """Return the gradients of a classifier's loss on a batch, as in a step of fine-tuning."""
    config = ModelConfig("bort_2_4_48_32", 50, "x", "classification", "SST-2", ("0", "1"), 2)
    network = saved_model.build_network(config)
    redraw(network, seed=5)
    set_dtype(network, dtype)
    numpy_type = "float64" if dtype == "float64" else "float32"
    lengths, labels = (nd.array(each, dtype=numpy_type) for each in (LENGTHS, [0, 1, 1]))
    rows = SparseEmbeddingGrad(network.bort, IDS, mx.cpu())
    network.bort.word_embed[0].weight.zero_grad()
    with autograd.record():
        hidden = encode_for_backward(network.bort, rows, lengths, cls_only=True)
        losses = classification_loss(network.head(hidden, lengths), labels, config.kind)
        total = losses.sum()
    rows.backward(total)
    return gradients_of(network)


def test_gradients_of_a_classifier_are_those_of_float64_within_bfloat16s_rounding() -> None:
    expected, found = map(classifier_gradients, ("float64", "bfloat16"))
    for name, values in expected.items():
        if not name.endswith("proj_key.bias"):  # softmax does not see it
            assert distance(found[name], values) < 12 * ROUNDING, name
    inner = "bort.encoder.transformer_cells.0.ffn.ffn_1.weight"
    assert distance(found[inner], expected[inner]) > ROUNDING / 4


# ---- the processor -----------------------------------------------------------------------------


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that lets this processor have other flags."""

    def pretend(names: str) -> None:
        monkeypatch.setattr(processor, "processor_flags", lambda: frozenset(names.split()))
        for module in (devices, processor):
            monkeypatch.setattr(module, "multiplies_bfloat16", MULTIPLIES)

    return pretend


CORE = "avx2 avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("names", "fast"),
    [
        ("", False),
        ("avx2", False),
        (CORE, False),  # oneDNN would emulate it
        ("avx2 avx512_bf16", False),  # MXNet would fail
        (f"{CORE} avx512_bf16", True),
        (f"{CORE} amx_tile amx_bf16", True),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_it(flags: Any, names: str, fast: bool) -> None:
    flags(names)
    cpus = [mx.cpu(0), mx.cpu(1)]
    assert devices.resolve_dtype("auto", cpus) == ("bfloat16" if fast else "float32")
    assert devices.resolve_dtype("float32", cpus) == "float32"
    if fast:
        assert devices.resolve_dtype("bfloat16", cpus) == "bfloat16"
        return
    with pytest.raises(UserError) as refused:
        devices.resolve_dtype("bfloat16", cpus)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("--dtype bfloat16: this processor has neither AVX512-BF16 nor AMX")


def test_on_gpus_auto_is_float32_and_bfloat16_is_refused() -> None:
    assert devices.resolve_dtype("auto", [mx.gpu(0)]) == "float32"
    with pytest.raises(UserError, match="--teacher_dtype bfloat16: is for CPUs"):
        devices.resolve_dtype("bfloat16", [mx.gpu(0)], "--teacher_dtype")


def test_a_network_without_decoder_can_compute_in_bfloat16() -> None:
    network = model_of("float32", use_decoder=False)
    ids, lengths = nd.array(IDS), nd.array(LENGTHS)
    expected = encode(network, ids, lengths).asnumpy()
    use_bfloat16(network)
    assert 0 < distance(encode(network, ids, lengths).asnumpy(), expected) < 4 * ROUNDING


def test_batches_of_many_lengths_need_no_more_memory() -> None:
    """oneDNN keeps an operator for each length, with a buffer of 2 MB in this case."""
    code = """
import os
import bort
from mxnet import autograd, nd
from bort.bfloat16 import product

weight = nd.amp_cast(nd.ones((1024, 32)), dtype="bfloat16")
weight.attach_grad()

def megabytes(lengths):
    for length in lengths:
        with autograd.record():
            products = product(nd.ones((length, 32)), weight)
        products.backward()
        products.wait_to_read()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

print(-megabytes(range(400, 440)) + megabytes(range(440, 600)))
"""
    command = [sys.executable, "-c", code]
    assert int(subprocess.check_output(command, cwd=ROOT, text=True)) < 60  # 690 without the bound
