"""Runtimes of one classifier: all say the same, and what cannot be run is one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mxnet import nd

from bort import mxnet_setup, saved_model
from bort.errors import UserError
from bort.inference import onnx_graph as onnx_export
from bort.inference import runtime
from bort.inference.quantization import Quantization, padded_batch
from bort.inference.runtime import RUNTIMES, available_runtimes, load_runtime, runtime_of
from bort.tokenization import TokenizerSettings, load_tokenizer
from scripts.export_onnx import main as export_onnx
from scripts.quantize import main as quantize
from tests import reference

ROOT = Path(__file__).resolve().parents[2]
SHAPE = "bort_2_4_64_32"
# How far the scores may be from MXNet's in float32, of values up to about 1.
# On processors without VNNI the int8 products of ONNX Runtime saturate, which costs some more.
CLOSE = {"mxnet": 0, "onnx": 1e-5, "mxnet-bfloat16": 0.03, "mxnet-int8": 0.1, "onnx-int8": 0.15}
EVERY_RUNTIME = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in available_runtimes(), reason=f"this processor cannot run {name}"
        ),
    )
    for name in RUNTIMES
]


def save_classifier(folder: Path, kind: str = "classification", task: str = "SST-2") -> Path:
    """Save a classifier of drawn values; returns its .params file."""
    tokenizer = load_tokenizer(TokenizerSettings())
    labels = ("0", "1") if kind == "classification" else ()
    model_config = saved_model.ModelConfig(
        SHAPE,
        tokenizer.vocab_size,
        tokenizer.fingerprint,
        kind,
        task,
        labels,
        num_outputs=max(1, len(labels)),
        max_len=64,
    )
    network = saved_model.build_network(model_config)
    reference.redraw(network, seed=3)
    saved_model.save_model(str(folder / "best.params"), network, model_config, tokenizer)
    return folder / "best.params"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """Return the folder of a classifier that was quantised; the table stands in a file there."""
    folder = tmp_path_factory.mktemp("SST-2")
    save_classifier(folder)
    quantize([str(folder), "--data_dir", str(ROOT / "test_data" / "glue")])
    return folder


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Return ids with padding, and lengths."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 1000, (5, 13)), np.array([13, 1, 7, 12, 2])


@pytest.mark.parametrize("name", EVERY_RUNTIME)
def test_every_runtime_says_the_same(quantized, batch, name):
    network = saved_model.load_model(str(quantized)).network
    expected = network(*map(nd.array, batch)).asnumpy()
    assert 0.1 < np.abs(expected).max() < 3
    loaded = load_runtime(str(quantized / "best.params"), name)
    found = loaded.scores(*batch)
    assert (found.dtype, found.shape) == (np.float32, (5, 2))
    assert np.abs(found - expected).max() <= CLOSE[name]
    if "int8" in name or "16" in name:
        assert np.abs(found - expected).max() > 1e-5, "is not of reduced precision"
    # Another batch, another length, and the padding makes no difference.
    one = loaded.scores(batch[0][2:3, :7], batch[1][2:3])
    assert np.abs(one - expected[2:3]).max() <= max(1e-6, CLOSE[name])


@pytest.mark.parametrize("name", EVERY_RUNTIME)
def test_too_long_an_input_is_an_error(quantized, name):
    with pytest.raises(ValueError, match="sequence length 513: the model has 512 positions"):
        load_runtime(str(quantized), name).scores(np.zeros((1, 513), int), np.array([513]))


def test_an_exported_file_is_taken_while_it_fits(quantized, tmp_path, batch, monkeypatch):
    shutil.copytree(quantized, tmp_path / "copy")
    parameters = tmp_path / "copy" / "best.params"
    export_onnx([str(parameters)])
    expected = load_runtime(str(parameters), "mxnet").scores(*batch)

    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("built anew")

    with monkeypatch.context() as patched:
        patched.setattr(onnx_export, "build", build)
        found = load_runtime(str(parameters), "onnx").scores(*batch)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        found = load_runtime(str(tmp_path / "copy" / "best.onnx"), "onnx").scores(*batch)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    saved = saved_model.load_model(str(parameters))
    reference.redraw(saved.network, seed=4)
    saved_model.save_model(str(parameters), *saved)
    expected = saved.network(*map(nd.array, batch)).asnumpy()
    np.testing.assert_allclose(
        load_runtime(str(parameters), "onnx").scores(*batch), expected, atol=1e-5
    )
    with pytest.raises(UserError, match="of other parameters than"):
        load_runtime(str(parameters), "onnx-int8")


def test_bfloat16_needs_avx512(quantized, monkeypatch):
    monkeypatch.setattr(runtime, "processor_flags", lambda: frozenset(("avx2", "avx512f")))
    assert "mxnet-bfloat16" not in available_runtimes()
    said = refusal(quantized, "mxnet-bfloat16")
    assert "runtime mxnet-bfloat16: needs a processor with AVX-512 (avx512bw, " in said
    assert said.endswith("; use one of mxnet, mxnet-int8, onnx, onnx-int8")
    network = saved_model.load_model(str(quantized)).network
    with pytest.raises(UserError, match="needs a processor with AVX-512"):
        runtime_of(network, "mxnet-bfloat16")
    avx512_core = frozenset(("avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"))
    monkeypatch.setattr(runtime, "processor_flags", lambda: avx512_core)
    assert available_runtimes() == RUNTIMES


def test_the_flags_of_the_processor_are_those_that_linux_lists():
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    expected = next((line for line in text.splitlines() if line.startswith("flags")), "flags:")
    assert runtime.processor_flags() == set(expected.split(":")[1].split())


@pytest.mark.parametrize("name", ["onnx", "onnx-int8"])
def test_onnx_runs_without_mxnet(quantized, name):
    program = f"""
        import sys
        from bort.predict import predict
        (answer,) = predict({str(quantized)!r}, ["a fine film"], runtime={name!r})
        assert answer.label in "01" and "mxnet" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=ROOT)


def test_threads_follow_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert mxnet_setup.cpu_threads() == 3
    for value in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert mxnet_setup.cpu_threads() == mxnet_setup.usable_cores()


def refusal(path: object, name: str) -> str:
    with pytest.raises(UserError) as refused:
        load_runtime(str(path), name)
    (line,) = str(refused.value).splitlines()
    return line


def test_what_cannot_be_run_is_one_line(quantized, tmp_path):
    parameters = save_classifier(tmp_path)
    assert "no int8 model yet; make it with scripts/quantize.py" in refusal(tmp_path, "onnx-int8")
    assert "runtime 'tensorrt': unknown" in refusal(tmp_path, "tensorrt")
    assert "absent: not found" in refusal(tmp_path / "absent", "onnx")
    assert "absent.onnx: not found; scripts/export_onnx.py" in refusal("absent.onnx", "onnx")
    int8 = quantized / "int8" / "best.onnx"
    assert "an ONNX file runs in onnx alone" in refusal(int8, "mxnet")
    assert "is in int8, not in float32" in refusal(int8, "onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(int8.read_bytes()[:1000])
    assert "damaged.onnx': ONNX Runtime cannot load it (" in refusal(damaged, "onnx-int8")
    tokenizer = load_tokenizer(TokenizerSettings())
    model_config = saved_model.ModelConfig(
        SHAPE, 1000, tokenizer.fingerprint, saved_model.MASKED_LM
    )
    network = saved_model.build_network(model_config)
    saved_model.save_model(str(tmp_path / "lm" / "bort.params"), network, model_config, tokenizer)
    assert "a masked_lm network; fine-tune it on a task first" in refusal(tmp_path / "lm", "onnx")
    export_onnx([str(tmp_path / "lm")])
    assert "is no classifier" in refusal(tmp_path / "lm" / "bort.onnx", "onnx")
    assert parameters.exists()


# ---- scripts/quantize.py -------------------------------------------------------------------------


def test_the_record_says_how_the_models_were_made(quantized):
    record = runtime.read_json(str(quantized / "int8" / "best.json"))
    assert record["mxnet-int8"]["calibration"] == {"task": "SST-2", "split": "train", "inputs": 8}
    assert [check["runtime"] for check in record["checks"]] == list(available_runtimes())
    assert not list(quantized.glob("*.tmp"))


def test_the_comparison_is_printed_and_true(tmp_path, capsys):
    parameters = save_classifier(tmp_path)
    checks = quantize([str(parameters), "--data_dir", str(ROOT / "test_data" / "glue")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "SST-2, dev: accuracy in points"
    assert [line.split()[0] for line in lines[2:-1]] == list(available_runtimes())
    work = Quantization(str(parameters), str(ROOT / "test_data" / "glue"))
    encoded, examples = work._encoded("dev")
    ids, lengths = padded_batch(encoded, 100, work.tokenizer.pad_id)
    assert len(ids) == len(examples)
    labels = np.array([example.label for example in examples])
    exact = load_runtime(str(parameters), "mxnet").scores(ids, lengths).astype(float)
    for check in checks:
        scores = load_runtime(str(parameters), check.runtime).scores(ids, lengths).astype(float)
        cosine = (scores * exact).sum() / np.linalg.norm(scores) / np.linalg.norm(exact)
        assert check.cosine == pytest.approx(cosine, abs=2e-3)
        assert check.cosine > 0.99
        right = (scores.argmax(axis=1) == labels).mean()
        assert check.score == pytest.approx(100 * right, abs=100 / len(labels) + 1e-9)
    assert checks[0].score == pytest.approx(100 * (exact.argmax(axis=1) == labels).mean())


@pytest.mark.parametrize(("kind", "task"), [("regression", "STS-B"), ("multiple_choice", "COPA")])
def test_other_kinds_of_tasks(tmp_path, kind, task):
    parameters = save_classifier(tmp_path, kind, task)
    suite = "glue" if task == "STS-B" else "superglue"
    checks = quantize([str(parameters), "--data_dir", str(ROOT / "test_data" / suite)])
    assert checks[1].score == pytest.approx(checks[0].score, abs=1e-3)
    assert min(check.cosine for check in checks) > 0.98


def test_calibration_inputs_are_spread_over_the_set(tmp_path):
    work = Quantization(str(save_classifier(tmp_path)), str(ROOT / "test_data" / "glue"))
    encoded, examples = work._encoded("train")
    ids, lengths = padded_batch(encoded, 2, pad_id=7)
    expected = work.tokenizer.encode_batch([one.inputs[0][0] for one in examples])
    for row, length, text in zip(ids, lengths, (expected[0], expected[-1])):
        assert row[1 : length - 1].tolist() == list(text)
        assert (row[length:] == 7).all()


def complaint(capsys: Any, *line: object) -> str:
    """Return the one line that the program leaves on stderr."""
    with pytest.raises(SystemExit) as stopped:
        quantize([str(word) for word in line])
    assert stopped.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    return said


def test_mistakes_are_one_line_and_keep_what_was_there(quantized, tmp_path, capsys):
    shutil.copytree(quantized, tmp_path / "copy")
    before = sorted(path.name for path in (tmp_path / "copy" / "int8").iterdir())
    folder = tmp_path / "copy"
    assert "no train set" in complaint(capsys, folder, "--data_dir", tmp_path)
    assert sorted(path.name for path in (folder / "int8").iterdir()) == before
    assert not (folder / "int8.tmp").exists()
    shutil.rmtree(folder / "tokenizer")
    assert "no tokenizer beside it" in complaint(capsys, folder)


def test_runtime_of_a_network_needs_no_file(tiny_classifier, batch):
    expected = tiny_classifier(*map(nd.array, batch)).asnumpy()
    for name in {*available_runtimes()} - {"mxnet-int8"}:
        found = runtime_of(tiny_classifier, name, threads=1).scores(*batch)
        assert np.abs(found - expected).max() <= CLOSE[name]


@pytest.fixture
def tiny_classifier(tmp_path) -> Any:
    return saved_model.load_model(str(save_classifier(tmp_path))).network
