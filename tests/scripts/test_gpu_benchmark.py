"""The benchmark of GPUs on a CPU: that it measures, and what it counts."""

from __future__ import annotations

from pathlib import Path

import mxnet as mx
import pytest

from data.shards import open_shards
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_steps_are_counted_and_their_operations(tmp_path, monkeypatch):
    from benchmarks import gpu, workers

    monkeypatch.setattr("bort.devices.devices_of", lambda *_: [mx.cpu()])
    monkeypatch.setattr(gpu, "VOCABULARY", 97)
    settings = gpu.GpuBenchmarkSettings(
        student_model="bort_1_2_16_16", batch_size=2, length=16, seconds=0.05, peak_tflops=1e-3
    )
    workers.write_shards(str(tmp_path / "shards"), 1, 8, settings.length, 97)
    speed = gpu.measure(settings, "float32", str(tmp_path))
    assert speed.tokens_per_second > 0
    # One layer: four projections, two feed-forward matrices, scores and values; then the decoder.
    layer = 4 * 16 * 16 + 2 * 16 * 16 + 2 * 16 * 16
    decoder = 0.15 * (16 * 16 + 16 * 97)
    flops = 6 * (layer + decoder)
    assert gpu.flops_per_token("bort_1_2_16_16", 16) == pytest.approx(flops)
    assert speed.tflops == pytest.approx(flops * speed.tokens_per_second / 1e12)
    said = gpu.table([speed, speed._replace(dtype="float16")], settings).splitlines()
    assert said[0] == "bort_1_2_16_16, 1 GPU(s), batches of 2 x 16 tokens"
    assert said[1].endswith("of the peak")
    assert said[2].endswith("TFLOP/s")  # the peak is float32's


@pytest.mark.parametrize(("batch_size", "sequences"), [(32, 512), (48, 528), (600, 600)])
def test_every_step_is_a_full_one(monkeypatch, batch_size, sequences):
    """Steps are counted as full ones, also the one at the end of an epoch."""
    from benchmarks import gpu

    def measured(settings, dtype, folder):
        assert open_shards(str(Path(folder, "shards"))).num_sequences == sequences
        return gpu.Speed(dtype, 1.0, 1.0)

    monkeypatch.setattr(gpu, "measure", measured)
    assert len(gpu.main(["--batch_size", str(batch_size), "--length", "16"])) == 2
