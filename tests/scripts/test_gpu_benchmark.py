"""The benchmark of GPUs on a CPU: that it measures, and what it counts."""

from __future__ import annotations

import mxnet as mx
import pytest

from scripts.benchmarks import gpu


def test_steps_are_counted_and_their_operations(tmp_path, monkeypatch):
    monkeypatch.setattr("bort.devices.devices_of", lambda *_: [mx.cpu()])
    monkeypatch.setattr(gpu, "VOCABULARY", 97)
    settings = gpu.GpuBenchmarkSettings(
        student_model="bort_1_2_16_16", batch_size=2, length=16, seconds=0.05, peak_tflops=1e-3
    )
    gpu.write_shards(str(tmp_path / "shards"), settings.length, sequences=8)
    speed = gpu.measure(settings, "float32", str(tmp_path))
    assert speed.tokens_per_second > 0
    # One layer: four projections, two feed-forward matrices, scores and values; then the decoder.
    layer = 4 * 16 * 16 + 2 * 16 * 16 + 2 * 16 * 16
    decoder = 0.15 * (16 * 16 + 16 * 97)
    flops = 6 * (layer + decoder)
    assert gpu.flops_per_token("bort_1_2_16_16", 16) == pytest.approx(flops)
    assert speed.tflops == pytest.approx(flops * speed.tokens_per_second / 1e12)
    said = gpu.table([speed], settings).splitlines()
    assert said[0] == "bort_1_2_16_16, 1 GPU(s), batches of 2 x 16 tokens"
    assert said[1].endswith("of the peak")
