"""The code path for GPUs, on CPU devices, and what only a GPU can show."""

from __future__ import annotations

from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, nd

from bort import devices
from bort.encoder import gather_indices
from bort.errors import UserError
from bort.pretraining.distillation import correct_predictions
from bort.pretraining.mlm import to_device
from bort.training.optimization import MOST_AGGREGATED, sum_of_squares
from data.batches import Batch
from tests.pretraining.helpers import (
    assert_same_training,
    finished_run,
    make_run,
    teacher_flags,
    write_data,
    write_shards,
)
from tests.reference import parameters_of


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture
def gpu_code(monkeypatch) -> None:
    """Let CPU devices take the code path for GPUs."""
    monkeypatch.setattr(devices, "uses_gpu_code", lambda device: True)


def test_a_run_of_the_gpu_code_path_is_that_of_the_cpu(data, tmp_path, monkeypatch):
    """Two devices, accumulation, a live teacher; without dropout, which is drawn otherwise."""
    flags = {**teacher_flags(data), "data_eval": data / "test", "accumulate": 2, "cpu_contexts": 2}
    flags.update(num_steps=8, lr=0.001, dropout=0.0, log_interval=2, eval_interval=4)
    folders = tmp_path / "cpu", tmp_path / "gpu"
    cpu = finished_run(data, ckpt_dir=folders[0], **flags)
    taken = []
    with monkeypatch.context() as patch:
        patch.setattr(devices, "uses_gpu_code", lambda device: taken.append(device) or True)
        gpu = finished_run(data, ckpt_dir=folders[1], **flags)
    assert taken, "the other path is taken"
    assert_same_training(
        folders[0], parameters_of(cpu.job.network), folders[1], parameters_of(gpu.job.network)
    )


def test_batches_are_widened_to_multiples_of_8_without_other_ids_or_positions(gpu_code):
    ids = np.arange(30, dtype=np.int32).reshape(2, 15)
    batch = Batch(ids, np.array([15, 9]), np.array([3, 14, 15, 23]), np.array([1, 2, 3, 4]))
    found = to_device(batch, mx.cpu())
    assert found.host_ids.shape == found.input_ids.shape == (2, 16)
    np.testing.assert_array_equal(found.host_ids[:, :15], ids)
    assert set(found.host_ids[:, 15]) == {0, 15}, "an id of the batch: no further embedding"
    flat = found.masked.padded.asnumpy()[found.masked.flat.asnumpy()]
    np.testing.assert_array_equal(
        found.host_ids.reshape(-1)[flat], ids.reshape(-1)[[3, 14, 15, 23]]
    )
    assert devices.widened(found.host_ids, mx.cpu()) is found.host_ids


def test_the_parallel_kernels_agree_with_those_of_the_cpu(monkeypatch):
    generator = np.random.default_rng(0)
    logits, labels = nd.array(generator.normal(size=(50, 7))), nd.array(np.arange(50) % 7)
    arrays = [nd.array(generator.normal(size=shape)) for shape in ((5, 3), (40,), (2, 2, 2))]
    expected = correct_predictions(logits, labels).asscalar(), sum_of_squares(arrays).asscalar()
    monkeypatch.setattr(devices, "uses_gpu_code", lambda device: True)
    found = correct_predictions(logits, labels).asscalar(), sum_of_squares(arrays).asscalar()
    assert found == pytest.approx(expected, rel=1e-6)
    halves = [nd.full((64,), 300.0, dtype="float16")]  # its squares are infinite in float16
    assert sum_of_squares(halves).asscalar() == pytest.approx(64 * 300.0**2)


def counted(monkeypatch, where, name):
    """Let calls of a function be recorded in the list that is returned."""
    original, calls = getattr(where, name), []
    monkeypatch.setattr(where, name, lambda *a, **k: calls.append(a) or original(*a, **k))
    return calls


def test_a_step_uses_kernels_that_run_in_parallel_and_few_of_them(
    data, tmp_path, monkeypatch, gpu_code
):
    """`take` has a serial gradient kernel; every call of BERTAdam's waits for the device."""
    run = make_run(data, ckpt_dir=tmp_path / "run", num_steps=1)
    run.setup()
    gathers = counted(monkeypatch, nd, "Embedding")
    squares = counted(monkeypatch, nd, "multi_sum_sq")
    from gluonnlp.optimizer import bert_adam

    updates = counted(monkeypatch, bert_adam, "multi_adamw_update")
    argmax = counted(monkeypatch, nd.NDArray, "argmax")
    run.train()
    assert len(gathers) >= 2, "word embeddings and masked positions"
    assert (len(squares), len(argmax)) == (1, 0)
    sizes = [np.prod(p.shape) for p in run.job.network.collect_params().values()]
    assert len(updates) == len(set(sizes)) < len(sizes) < MOST_AGGREGATED


def test_every_dropout_layer_is_keyed_by_mxnets_seed(data, tmp_path):
    """By graph: cuDNN's would be seeded once per process, whatever `mx.random.seed` is given."""
    from mxnet.gluon import nn

    from bort.bort import KeyedDropout

    run = make_run(data, ckpt_dir=tmp_path, dropout=0.1, **teacher_flags(data))
    found = []
    for network in (run.job.network, run.job.step.teacher.network):
        network.apply(lambda block: found.append(block) if isinstance(block, nn.Dropout) else None)
    assert len(found) > 3
    assert {type(layer) for layer in found} == {KeyedDropout}
    graph = found[0](mx.sym.var("x")).tojson()
    assert '"cudnn_off": "True"' in graph


def test_gpus_are_checked_before_anything_is_loaded(monkeypatch):
    from bort.communicator import SingleProcess

    monkeypatch.setattr(mx.context, "num_gpus", lambda: 2)
    ranks = SingleProcess()
    assert devices.devices_of("1,0", 1, ranks) == [mx.gpu(1), mx.gpu(0)]
    with pytest.raises(
        UserError, match=r"--gpus 2: MXNet sees 2 GPU\(s\) here; give numbers from 0"
    ):
        devices.devices_of("2", 1, ranks)
    ranks.size, ranks.local_size, ranks.local_rank = 2, 2, 1
    assert devices.devices_of("0,1", 1, ranks) == [mx.gpu(1)]
    with pytest.raises(UserError, match="--gpus 0: 2 ranks on this machine need a GPU each"):
        devices.devices_of("0", 1, ranks)
    assert "this machine has 2 GPU(s)" in devices.unused_gpus([mx.cpu()])
    assert devices.unused_gpus([mx.gpu(0)]) == ""


def test_float16_accumulates_safely(monkeypatch):
    import os

    monkeypatch.setenv("MXNET_SAFE_ACCUMULATION", "0")  # so that what the call sets is undone
    monkeypatch.delenv("MXNET_SAFE_ACCUMULATION")
    devices.resolve_dtype("float32", [mx.gpu(0)])
    assert "MXNET_SAFE_ACCUMULATION" not in os.environ
    devices.resolve_dtype("float16", [mx.gpu(0)])
    assert os.environ["MXNET_SAFE_ACCUMULATION"] == "1"


def test_the_first_line_names_each_device(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mx.context, "num_gpus", lambda: 3)
    run = make_run(data, ckpt_dir=tmp_path, cpu_contexts=2, accumulate=1)
    run.setup()
    said = capsys.readouterr().out.splitlines()
    assert "1 rank(s) x 2 device(s) (cpu(0), cpu(1))" in said[0]
    assert said[1] == (
        "warning: this machine has 3 GPU(s) and the run uses none; --gpus 0,1,2 uses them"
    )


# ---- sequences without masks, and sequences that are too long ------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("contexts", [1, 2])
def test_batches_without_masks_change_nothing_but_the_count(data, tmp_path, accumulate, contexts):
    write_shards(tmp_path / "none", sizes=(9,), seed=5, masked=False)
    flags = {"accumulate": accumulate, "cpu_contexts": contexts, "num_steps": 4, "log_interval": 2}
    flags.update(ckpt_dir=tmp_path / "run", data_eval=tmp_path / "none", weight_decay=0.0)
    run = make_run(data, data=tmp_path / "none", **flags)
    before = parameters_of(run.job.network)
    evaluations = run.run()
    after = parameters_of(run.job.network)
    assert all((before[name] == after[name]).all() for name in before)
    assert evaluations == [{}, {}]
    assert run.progress.batches == 4 * accumulate * contexts


def test_a_batch_without_masks_leaves_no_gradient_of_the_update_before(data, tmp_path):
    run = make_run(data, ckpt_dir=tmp_path, batch_size=4, num_steps=4)
    run.setup()
    run.train_step(run.batches())
    parameters = run.job.network.collect_params().values()
    assert all(parameter.grad().asnumpy().any() for parameter in parameters)
    batch = run.job.stream.source(1)
    empty = batch._replace(labels=batch.labels[:0], masked_positions=batch.masked_positions[:0])
    run.add_empty(empty, run.devices[0])
    assert not any(parameter.grad().asnumpy().any() for parameter in parameters)


def test_shards_longer_than_the_models_positions_are_refused_at_the_start(
    data, tmp_path, capsys, monkeypatch
):
    from bort.pretraining import run as pretraining
    from run_pretraining_distillation import main
    from tests.pretraining.helpers import arguments

    monkeypatch.setattr(pretraining, "MAX_LENGTH", 20)
    for check in (False, True):
        with pytest.raises(SystemExit):
            main(arguments(data, ckpt_dir=tmp_path / "run", check=check))
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert "but the models have 20 positions; make the shards with --max_seq_length 20" in said
    assert not (tmp_path / "run").exists()


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> mx.Context:
    if not mx.context.num_gpus():
        pytest.skip("MXNet sees no GPU here")
    return mx.gpu(0)


@pytest.mark.gpu
def test_dropout_on_a_gpu_follows_the_seed(gpu):
    from bort.bort import KeyedDropout

    layer = KeyedDropout(0.5)

    def dropped(seed: int) -> np.ndarray:
        mx.random.seed(seed, ctx=gpu)
        with autograd.train_mode():
            return layer(nd.ones((1000,), ctx=gpu)).asnumpy()

    np.testing.assert_array_equal(dropped(1), dropped(1))
    assert (dropped(1) != dropped(2)).any()


@pytest.mark.gpu
def test_a_gpu_trains_like_the_cpu(data, tmp_path, gpu):
    flags = {**teacher_flags(data), "data_eval": data / "test", "num_steps": 8, "lr": 0.001}
    flags.update(dropout=0.0, log_interval=2)
    cpu = finished_run(data, ckpt_dir=tmp_path / "cpu", **flags)
    on_gpu = finished_run(data, ckpt_dir=tmp_path / "gpu", gpus="0", **flags)
    for name, values in parameters_of(cpu.job.network).items():
        found = parameters_of(on_gpu.job.network)[name]
        np.testing.assert_allclose(found, values, atol=1e-4, err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_resumed_run_on_a_gpu_draws_the_dropout_of_an_uninterrupted_one(
    data, tmp_path, gpu, dtype
):
    flags = {"gpus": "0", "dtype": dtype, "dropout": 0.3, "ckpt_interval": 5, "num_steps": 10}
    whole = finished_run(data, ckpt_dir=tmp_path / "whole", **flags)
    resumed = make_run(data, ckpt_dir=tmp_path / "whole", **flags, start_step=5)
    resumed.run()
    for name, values in parameters_of(whole.job.network).items():
        np.testing.assert_allclose(
            parameters_of(resumed.job.network)[name], values, atol=1e-3, err_msg=name
        )


@pytest.mark.gpu
def test_gathering_on_a_gpu_is_that_of_the_cpu(gpu):
    positions = np.array([1, 4, 11])
    on_cpu, on_gpu = (gather_indices(positions, 3, 4, device) for device in (mx.cpu(), gpu))
    for mine, theirs in zip(on_cpu, on_gpu):
        np.testing.assert_array_equal(mine.asnumpy(), theirs.asnumpy())
