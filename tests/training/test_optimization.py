from __future__ import annotations

import io
import sys
from typing import Any, Sequence

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, nd

from bort.bort import BortModel, decode, encode, get_bort_model, masked_hidden
from bort.communicator import Communicator, SingleProcess
from bort.pretraining.distillation import masked_lm_loss
from bort.training import bert_adam
from bort.training.optimization import (
    LossScale,
    Trainer,
    linear_warmup_decay,
    sum_of_squares,
)
from tests.reference import BERTAdam, parameters_of

SHAPES = {"weight": (4, 3), "embedding": (7, 2), "bias": (4,), "gamma": (5,), "beta": (5,)}
DECAYED = ("weight", "embedding")
EPSILON, DECAY = 1e-6, 0.3


def fresh_parameters(ctx: Any = None) -> dict[str, Any]:
    """Return one parameter of each kind, with the same values at every call."""
    generator = np.random.default_rng(1)
    parameters = {}
    for name, shape in SHAPES.items():
        parameters[name] = gluon.Parameter(f"model0_{name}", shape=shape)
        parameters[name].initialize(ctx=ctx or mx.cpu())
        parameters[name].set_data(nd.array(generator.normal(size=shape)))
    return parameters


def trainer_of(
    parameters: dict[str, Any],
    max_norm: float = 1.0,
    communicator: Communicator | None = None,
    **more: Any,
) -> Trainer:
    ranks = communicator or SingleProcess()
    return Trainer(list(parameters.values()), ranks, DECAY, EPSILON, max_norm, **more)


def draw_gradients(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(0, scale, shape) for name, shape in SHAPES.items()}


def put_gradients(parameters: dict[str, Any], gradients: dict[str, np.ndarray]) -> None:
    for name, parameter in parameters.items():
        for gradient in parameter.list_grad():
            gradient[:] = nd.array(gradients[name])


def step(trainer: Trainer, parameters: dict[str, Any], seed: int, rate: float = 0.01) -> None:
    put_gradients(parameters, draw_gradients(seed))
    trainer.update(trainer.sum_gradients(3), rate)


def values_of(parameters: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: parameter.list_data()[0].asnumpy() for name, parameter in parameters.items()}


def assert_identical(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)


# ---- the schedule ------------------------------------------------------------------------------


def rates(warmup: int, total: int, beyond: int = 0) -> list[float]:
    return [linear_warmup_decay(step, 0.5, warmup, total) for step in range(1, total + beyond + 1)]


def test_the_rate_rises_to_its_peak_and_falls_but_not_to_zero() -> None:
    assert rates(warmup=4, total=10) == pytest.approx(
        [0.5 * part for part in (1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7)]
    )


def test_without_warm_up_the_rate_only_falls() -> None:
    assert rates(warmup=0, total=4) == pytest.approx([0.5 * n / 5 for n in (4, 3, 2, 1)])


def test_a_warm_up_of_all_steps_only_rises() -> None:
    assert rates(warmup=4, total=4) == pytest.approx([0.125, 0.25, 0.375, 0.5])


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (0, 9), (3, 9), (9, 9), (1, 1000)])
def test_the_rate_never_jumps_and_never_is_zero(warmup: int, total: int) -> None:
    values = rates(warmup, total, beyond=3)
    assert 0 < min(values) <= max(values) <= 0.5
    assert (0.5 in values) == (warmup > 0)
    slope = max(1 / max(warmup, 1), 1 / (total - warmup + 1))
    assert max(abs(np.diff(values))) <= 0.5 * slope + 1e-12
    assert len(set(values[total - 1 :])) == 1


# ---- the norm ----------------------------------------------------------------------------------


def test_squares_are_summed_over_all_arrays() -> None:
    arrays = [np.arange(5.0), np.full((2, 3), 2.0), np.array([7.0])]
    assert sum_of_squares([nd.array(a) for a in arrays]).asnumpy() == [30 + 24 + 49]


def test_a_vocabularys_gradient_has_its_full_norm() -> None:
    """MXNet's own multi_sum_sq loses 4 % of this one and 15 % of 50,265 normal rows."""
    values = np.full((16384, 1024), 0.001, dtype=np.float32)
    expected = (values[0, 0].astype(np.float64) ** 2) * values.size
    assert sum_of_squares([nd.array(values)]).asscalar() == pytest.approx(expected, rel=3e-4)


# ---- the update --------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.05, 1.0, 1e6])
def test_updates_are_those_of_numpy(max_norm: float) -> None:
    parameters = fresh_parameters()
    trainer = trainer_of(parameters, max_norm)
    decay = {name: DECAY * (name in DECAYED) for name in SHAPES}
    expected = BERTAdam(values_of(parameters), decay, EPSILON)
    for number, (positions, rate) in enumerate([(1, 0.1), (5, 0.03), (40, 0.2), (2, 0.001)]):
        sums = draw_gradients(number, scale=2.0)
        put_gradients(parameters, sums)
        norm = trainer.update(trainer.sum_gradients(positions), rate)
        means = {name: values / positions for name, values in sums.items()}
        assert norm.shape == (1,)
        assert norm.asscalar() == pytest.approx(expected.step(means, rate, max_norm), rel=1e-5)
        assert trainer.rate == rate
    state = trainer.state()
    for index, (name, parameter) in enumerate(parameters.items()):
        close = {"rtol": 1e-4, "atol": 1e-6, "err_msg": name}
        np.testing.assert_allclose(parameter.data().asnumpy(), expected.weights[name], **close)
        np.testing.assert_allclose(
            state[f"mean.{index}"].asnumpy(), expected.means[name], rtol=1e-4, atol=1e-8
        )
        np.testing.assert_allclose(
            state[f"variance.{index}"].asnumpy(), expected.variances[name], rtol=1e-4, atol=1e-12
        )


def first_mean(max_norm: float, scale: float, positions: int) -> np.ndarray:
    """Return ten times the first moment after one update: the gradient as the optimiser saw it."""
    parameters = fresh_parameters()
    trainer = trainer_of(parameters, max_norm)
    put_gradients(parameters, draw_gradients(0, scale))
    trainer.update(trainer.sum_gradients(positions), 0.1)
    state = trainer.state()
    return 10 * np.concatenate([state[f"mean.{i}"].asnumpy().ravel() for i in range(len(SHAPES))])


@pytest.mark.parametrize("threads", ["1", "3"])
def test_an_update_in_chunks_is_that_of_mxnets_kernel(monkeypatch, threads: str) -> None:
    parameters, others = fresh_parameters(), fresh_parameters()
    trainer, other = trainer_of(parameters), trainer_of(others)
    monkeypatch.setattr(bert_adam, "CHUNK", 5)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    for seed in range(4):
        step(trainer, parameters, seed)
    monkeypatch.setattr(bert_adam, "runs_on_cpu", lambda array: False)
    for seed in range(4):
        step(other, others, seed)
    # The kernel's 1 - 0.999 is of float32, five digits of it right.
    for name, values in values_of(others).items():
        np.testing.assert_allclose(values_of(parameters)[name], values, atol=1e-5)
    for name, state in other.state().items():
        np.testing.assert_allclose(trainer.state()[name].asnumpy(), state.asnumpy(), rtol=1e-4)


@pytest.mark.parametrize("decay", [0.01, 0.0])
def test_the_compiled_update_has_the_bits_of_numpys(decay: float) -> None:
    pytest.importorskip("numba")
    one_loop = bert_adam.compiled_update()
    draws = np.random.default_rng(0).normal(size=(4, 10_007)).astype(np.float32)
    draws *= np.float32([[2e-2], [1e-3], [1e-4], [1e-3]])
    draws[3] *= draws[3]  # the second moment
    optimizer = bert_adam.BERTAdam(epsilon=EPSILON)
    compiled, plain = draws.copy(), draws.copy()
    for factor in (0.37, 1.0):
        optimizer.update_chunks([bert_adam.Chunk(*compiled, 1e-3, decay)], factor, one_loop)
        buffers = np.empty((2, draws.shape[1]), np.float32)
        optimizer.update_chunk(bert_adam.Chunk(*plain, 1e-3, decay), factor, *buffers)
    assert (plain[[0, 2, 3]] != draws[[0, 2, 3]]).mean() > 0.9
    np.testing.assert_array_equal(compiled, plain)


def test_without_numba_updates_are_numpys(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    bert_adam.compiled_update.cache_clear()
    try:
        assert bert_adam.compiled_update() is None
        parameters = fresh_parameters()
        step(trainer_of(parameters), parameters, 0)
    finally:
        bert_adam.compiled_update.cache_clear()


def test_an_update_reaches_weights_that_inference_has_reordered() -> None:
    """oneDNN keeps the weight of a convolution in a layout of its own between two calls."""
    layer = gluon.nn.Conv2D(64, 3, in_channels=64, prefix="model0_")
    layer.initialize()
    layer.hybridize(static_alloc=True)
    picture = nd.ones((2, 64, 16, 16))
    expected = layer.weight.data().asnumpy().reshape(-1)
    raw = bert_adam.view(layer.weight.data())
    for _ in range(3):
        before = layer(picture).asnumpy()
    assert (raw != expected).any(), "the layout is the old one: nothing is tested"
    trainer = trainer_of(dict(layer.collect_params()))
    for parameter in layer.collect_params().values():
        parameter.grad()[:] = 1.0
    trainer.update(trainer.sum_gradients(1), 0.01)
    found = layer.weight.data().asnumpy()
    # One step from no moments: the same for all values, but for the decay.
    moved = found.reshape(-1) - expected * (1 - 0.01 * DECAY)
    np.testing.assert_allclose(moved, moved[0], rtol=1e-3)
    after = layer(picture).asnumpy()
    sums = found.sum(axis=(1, 2, 3)) + layer.bias.data().asnumpy()
    np.testing.assert_allclose(after[0, :, 0, 0], sums, rtol=1e-4, atol=1e-5)
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.parametrize("rate", [1e-4, 2e-6])
def test_a_small_rate_shrinks_weights_by_a_small_share(rate: float) -> None:
    """1 - rate * decay is 1 in float32 at the rates of fine-tuning: it cannot be the factor."""
    weights = np.random.default_rng(0).normal(0, 0.02, 200_000).astype(np.float32)
    ends = []
    for decay in (0.01, 0.0):
        generator = np.random.default_rng(1)
        parameter = gluon.Parameter("model0_weight", shape=weights.shape)
        parameter.initialize()
        parameter.set_data(nd.array(weights))
        trainer = Trainer([parameter], SingleProcess(), decay, EPSILON, 1.0)
        for _ in range(60):
            parameter.grad()[:] = nd.array(generator.normal(size=weights.shape))
            trainer.update(trainer.sum_gradients(1), rate)
        ends.append(parameter.data().asnumpy().astype(np.float64))
    shrunk = (ends[1] - ends[0]) @ weights / (weights @ weights)
    assert shrunk == pytest.approx(60 * rate * 0.01, rel=0.02)


@pytest.mark.parametrize("threads", [None, "", "0", "2,1", "many"])
def test_an_update_needs_no_number_of_threads(monkeypatch, threads: str | None) -> None:
    if threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    parameters = fresh_parameters()
    before = values_of(parameters)
    step(trainer_of(parameters), parameters, seed=0)
    assert all((values != before[name]).all() for name, values in values_of(parameters).items())


def test_gradients_above_the_norm_are_shortened_to_it_and_others_left_alone() -> None:
    flat = np.concatenate([values.ravel() for values in draw_gradients(0).values()])
    length = np.linalg.norm(flat)
    np.testing.assert_allclose(first_mean(1.0, 1.0, 1), flat / length, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(first_mean(1.0, 1.0, 100), flat / 100, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(first_mean(length * 1.01, 1.0, 1), flat, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(first_mean(0.25, 50.0, 7)), 0.25, rtol=1e-5)


def test_biases_and_layer_norms_are_not_shrunk(tiny_model: BortModel) -> None:
    parameters = tiny_model._collect_params_with_prefix()
    before = parameters_of(tiny_model)
    trainer = Trainer(
        list(tiny_model.collect_params().values()), SingleProcess(), 0.5, EPSILON, 1.0
    )
    for parameter in parameters.values():
        parameter.grad()[:] = 0
    trainer.update(trainer.sum_gradients(1), 0.1)
    for name, values in parameters_of(tiny_model).items():
        shrunk = 1.0 if name.endswith((".bias", ".gamma", ".beta")) else 1 - 0.1 * 0.5
        np.testing.assert_allclose(values, before[name] * shrunk, rtol=1e-6, err_msg=name)


def test_frozen_parameters_are_left_alone() -> None:
    parameters = fresh_parameters()
    parameters["weight"].grad_req = "null"
    trainer = trainer_of(parameters)
    before = values_of(parameters)
    put_gradients({n: p for n, p in parameters.items() if n != "weight"}, draw_gradients(0))
    trainer.update(trainer.sum_gradients(1), 0.1)
    after = values_of(parameters)
    assert {name for name in SHAPES if (before[name] == after[name]).all()} == {"weight"}


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing_and_shows(poison: float) -> None:
    parameters = fresh_parameters()
    trainer = trainer_of(parameters)
    before = values_of(parameters)
    gradients = draw_gradients(0)
    gradients["weight"][0, 0] = poison
    put_gradients(parameters, gradients)
    assert not np.isfinite(trainer.update(trainer.sum_gradients(2), 0.1).asscalar())
    assert_identical(values_of(parameters), before)
    assert all((array.asnumpy() == 0).all() for array in trainer.state().values())


# ---- float16 -----------------------------------------------------------------------------------


def test_the_loss_scale_is_halved_by_an_overflow_and_doubled_after_a_window() -> None:
    scale = LossScale(window=3)
    assert scale.value == 32768
    seen = []
    for overflowed in (True, False, False, True, False, False, False, False, False, False, False):
        scale.update(overflowed)
        seen.append(scale.value / 32768)
    assert seen == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 1, 1]


def test_the_loss_scale_does_not_fall_below_one() -> None:
    scale = LossScale(value=3.0)
    for _ in range(4):
        scale.update(overflowed=True)
    assert scale.value == 1.0


def test_gradients_of_a_scaled_loss_update_as_those_of_the_loss() -> None:
    plain, scaled = fresh_parameters(), fresh_parameters()
    expected, trainer = trainer_of(plain), trainer_of(scaled, loss_scale=LossScale(value=1024.0))
    gradients = draw_gradients(0)
    put_gradients(plain, gradients)
    put_gradients(scaled, {name: 1024 * values for name, values in gradients.items()})
    norms = [one.update(one.sum_gradients(2), 0.1).asscalar() for one in (expected, trainer)]
    assert norms[0] == norms[1]
    assert_identical(values_of(scaled), values_of(plain))


def float16_parameters() -> dict[str, Any]:
    parameters = fresh_parameters()
    for parameter in parameters.values():
        parameter.cast("float16")
    return parameters


def test_float16_parameters_do_not_lose_small_steps() -> None:
    """Steps of 3e-5 are below half a float16 ulp near 1; the float32 master copies add them up."""
    parameters = float16_parameters()
    trainer = trainer_of(parameters, max_norm=1e6)
    weights = {name: values.astype(np.float64) for name, values in values_of(parameters).items()}
    decay = {name: DECAY * (name in DECAYED) for name in SHAPES}
    expected = BERTAdam(weights, decay, EPSILON)
    gradients = {n: v.astype(np.float16).astype(float) for n, v in draw_gradients(0).items()}
    for _ in range(40):
        put_gradients(parameters, gradients)
        trainer.update(trainer.sum_gradients(1), 1e-5)
        expected.step(gradients, 1e-5, 1e6)
    for name, parameter in parameters.items():
        assert parameter.data().dtype == np.float16
        moved = abs(expected.weights[name] - weights[name])
        assert (moved > 1e-3).all()
        np.testing.assert_allclose(
            parameter.data().asnumpy(), expected.weights[name], rtol=6e-4, atol=1e-5, err_msg=name
        )


def test_the_state_of_float16_parameters_holds_their_master_copies() -> None:
    parameters, restored = float16_parameters(), float16_parameters()
    trainer, other = trainer_of(parameters), trainer_of(restored)
    for seed in range(3):
        step(trainer, parameters, seed, rate=1e-4)
    other.load_state({name: array.asnumpy() for name, array in trainer.state().items()})
    assert len(trainer.state()) == 3 * len(SHAPES)
    assert {array.dtype for array in trainer.state().values()} == {np.float32}
    for one, own in ((trainer, parameters), (other, restored)):
        step(one, own, seed=3, rate=1e-4)
    assert_identical(values_of(restored), values_of(parameters))


# ---- devices and ranks -------------------------------------------------------------------------


class TwoEqualRanks(SingleProcess):
    """As one of two ranks that have the same gradients sees the other."""

    size = 2

    def allreduce_(
        self, arrays: Sequence[Any], name: str = "sum", compression: str = "none"
    ) -> None:
        self.compression = compression
        for array in arrays:
            array[:] = 2 * array


def test_two_ranks_with_the_same_batch_update_as_one() -> None:
    one, two = fresh_parameters(), fresh_parameters()
    alone, joined = trainer_of(one), trainer_of(two, communicator=TwoEqualRanks())
    for seed in range(3):
        step(alone, one, seed)
        step(joined, two, seed)
    assert joined.sum_gradients(3).asscalar() == 6
    assert_identical(values_of(two), values_of(one))


def test_the_ranks_are_told_how_to_compress() -> None:
    ranks = TwoEqualRanks()
    parameters = fresh_parameters()
    step(trainer_of(parameters, communicator=ranks, compression="fp16"), parameters, seed=0)
    assert ranks.compression == "fp16"


class Float16Ranks(SingleProcess):
    """As one of two equal ranks sees the other when what is sent is rounded to float16."""

    size = 2

    def allreduce_(
        self, arrays: Sequence[Any], name: str = "sum", compression: str = "none"
    ) -> None:
        for array in arrays:
            sent = array.astype("float16") if compression == "fp16" else array
            array[:] = (2 * sent).astype("float32")


def test_compressed_gradients_are_means_that_float16_holds() -> None:
    one, two = fresh_parameters(), fresh_parameters()
    alone = trainer_of(one)
    joined = trainer_of(two, communicator=Float16Ranks(), compression="fp16")
    gradients = {name: 3e5 * values for name, values in draw_gradients(0).items()}
    for parameters in (one, two):
        put_gradients(parameters, gradients)
    norms = [trainer.update(trainer.sum_gradients(20_000), 0.1) for trainer in (alone, joined)]
    # As sums they would be infinite in float16.
    assert norms[1].asscalar() == pytest.approx(norms[0].asscalar(), rel=1e-3)
    for name, values in values_of(one).items():
        np.testing.assert_allclose(values_of(two)[name], values, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("positions", "mean"), [(0, 0.0), (100, 0.5), (200_000, 2.5e-4)])
def test_compressed_gradients_are_means_over_any_number(
    dtype: str, positions: int, mean: float
) -> None:
    parameter = gluon.Parameter("model0_weight", shape=(4,), dtype=dtype)
    parameter.initialize()
    trainer = Trainer([parameter], SingleProcess(), DECAY, EPSILON, 1.0, compression="fp16")
    parameter.list_grad()[0][:] = mean * positions
    assert trainer.sum_gradients(positions).asscalar() == 1
    np.testing.assert_allclose(parameter.list_grad()[0].asnumpy(), mean, rtol=1e-3)


def test_two_devices_update_as_one_with_their_summed_gradients() -> None:
    one, two = fresh_parameters(), fresh_parameters([mx.cpu(0), mx.cpu(1)])
    alone, joined = trainer_of(one), trainer_of(two)
    for seed in range(3):
        halves = draw_gradients(2 * seed), draw_gradients(2 * seed + 1)
        put_gradients(one, {name: halves[0][name] + halves[1][name] for name in SHAPES})
        for device, half in enumerate(halves):
            for name, parameter in two.items():
                parameter.list_grad()[device][:] = nd.array(half[name])
        alone.update(alone.sum_gradients(5), 0.1)
        joined.update(joined.sum_gradients(5), 0.1)
    for name, parameter in two.items():
        first, second = (array.asnumpy() for array in parameter.list_data())
        np.testing.assert_array_equal(first, second, err_msg=name)
        np.testing.assert_allclose(first, one[name].data().asnumpy(), atol=2e-5, err_msg=name)


# ---- accumulation and state --------------------------------------------------------------------


def trained(batches: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Make three updates, each over all micro-batches; returns the parameters after them."""
    mx.random.seed(1)
    model, _ = get_bort_model("bort_2_4_24_32", vocab=range(50), dropout=0.0)
    model.collect_params().setattr("grad_req", "add")
    trainer = Trainer(list(model.collect_params().values()), SingleProcess(), DECAY, 1e-6, 1.0)
    for _ in range(3):
        trainer.zero_gradients()
        for ids, truth in zip(batches, labels):
            with autograd.record():
                sequence = encode(model, nd.array(ids), nd.full(len(ids), ids.shape[1]))
                hidden = masked_hidden(model, sequence, nd.array(np.arange(ids.size)))
                loss = masked_lm_loss(decode(model, hidden), nd.array(truth.ravel())).sum()
            loss.backward()
        trainer.update(trainer.sum_gradients(sum(truth.size for truth in labels)), 0.01)
    return parameters_of(model)


def test_accumulated_micro_batches_train_as_one_batch() -> None:
    ids, labels = np.random.default_rng(0).integers(0, 50, (2, 6, 9))
    whole = trained([ids], [labels])
    # Of different sizes: a mean of their means would be another gradient.
    parts = [slice(0, 1), slice(1, 3), slice(3, 6)]
    split = trained([ids[part] for part in parts], [labels[part] for part in parts])
    for name, values in whole.items():
        # Steps are 0.03 long. Some gradients are 0 but for rounding, so nothing relative holds.
        np.testing.assert_allclose(split[name], values, atol=1e-4, err_msg=name)


def test_zeroed_gradients_are_zero_on_every_device() -> None:
    parameters = fresh_parameters([mx.cpu(0), mx.cpu(1)])
    put_gradients(parameters, draw_gradients(0))
    trainer_of(parameters).zero_gradients()
    for parameter in parameters.values():
        assert all((gradient.asnumpy() == 0).all() for gradient in parameter.list_grad())


def test_a_restored_trainer_continues_bit_identically() -> None:
    parameters = fresh_parameters()
    trainer = trainer_of(parameters)
    for seed in range(3):
        step(trainer, parameters, seed)
    stored = io.BytesIO()
    np.savez(stored, **{name: array.asnumpy() for name, array in trainer.state().items()})
    restored = fresh_parameters()
    for name, parameter in restored.items():
        parameter.set_data(parameters[name].data())
    other = trainer_of(restored)
    stored.seek(0)
    with np.load(stored) as arrays:
        other.load_state({name: arrays[name] for name in arrays.files})
    for seed in range(3, 6):
        step(trainer, parameters, seed)
        step(other, restored, seed)
    assert_identical(values_of(restored), values_of(parameters))
    for name, array in trainer.state().items():
        np.testing.assert_array_equal(other.state()[name].asnumpy(), array.asnumpy())


def test_the_state_has_two_arrays_for_each_parameter_from_the_start() -> None:
    state = trainer_of(fresh_parameters()).state()
    kinds = ("mean", "variance")
    expected = {f"{kind}.{i}": s for i, s in enumerate(SHAPES.values()) for kind in kinds}
    assert {name: array.shape for name, array in state.items()} == expected


# ---- SGD over a compact set --------------------------------------------------------------------


def test_sgd_steps_against_the_gradient_and_stays_within_the_bound() -> None:
    parameters = fresh_parameters()
    trainer = trainer_of(parameters, max_norm=0.5, weight_bound=0.9)
    expected = {name: values.astype(np.float64) for name, values in values_of(parameters).items()}
    for seed, rate in enumerate((0.3, 1.0, 0.7)):
        gradients = draw_gradients(seed)
        length = np.linalg.norm(np.concatenate([g.ravel() for g in gradients.values()])) / 3
        put_gradients(parameters, gradients)
        norm = trainer.update(trainer.sum_gradients(3), rate)
        assert norm.asscalar() == pytest.approx(length, rel=1e-5)
        for name, weight in expected.items():
            direction = gradients[name] / 3 * min(1, 0.5 / length)
            direction = direction + DECAY * (name in DECAYED) * weight
            expected[name] = np.clip(weight - rate * direction, -0.9, 0.9)
    for name, values in values_of(parameters).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert max(abs(values).max() for values in values_of(parameters).values()) <= np.float32(0.9)
    assert trainer.state() == {}


def test_sgd_leaves_everything_alone_when_a_gradient_is_not_finite() -> None:
    parameters = fresh_parameters()
    trainer = trainer_of(parameters, weight_bound=0.1)
    before = values_of(parameters)
    gradients = draw_gradients(0)
    gradients["weight"][0, 0] = np.nan
    put_gradients(parameters, gradients)
    trainer.update(trainer.sum_gradients(2), 0.1)
    assert_identical(values_of(parameters), before)
