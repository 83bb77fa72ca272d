"""Backends of one classifier: equal logits, checked inputs and files, one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from mxnet import nd
from onnx import helper

from bort import mxnet_setup, processor, saved_model
from bort.errors import UserError
from bort.files import sha256_of
from bort.inference import onnx_file, onnx_graph, runtime
from bort.inference.classification import _short_turns, load_classifier
from bort.inference.onnx_file import maps_constants, read_metadata
from bort.inference.pipelines import predict
from bort.inference.quantization import Quantization, calibration_batch
from bort.inference.runtime import BACKENDS, available_backends, backend_for, load_runtime
from bort.tokenization import TokenizerSettings, load_tokenizer
from scripts.export_onnx import main as export_onnx
from scripts.predict import PredictSettings
from scripts.quantize import main as quantize
from tests import reference

ROOT = Path(__file__).resolve().parents[2]
SHAPE = "bort_2_4_64_32"
# How far the scores may be from MXNet's in float32, of values up to about 1.
# On processors without VNNI the int8 products of ONNX Runtime saturate, which costs some more.
CLOSE = {
    "mxnet": 0,
    "onnx": 1e-5,
    "mxnet-bfloat16": 0.03,
    "mxnet-int8": 0.1,
    "onnx-int8": 0.15,
    "openvino": 1e-5,
    "openvino-bfloat16": 0.03,
}
EVERY_BACKEND = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in available_backends(), reason=f"{name} cannot run here"
        ),
    )
    for name in BACKENDS
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


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_every_backend_gives_the_same_logits(quantized, batch, name):
    network = saved_model.load_model(str(quantized)).network
    expected = network(*map(nd.array, batch)).asnumpy()
    assert 0.1 < np.abs(expected).max() < 3
    loaded = load_runtime(str(quantized / "best.params"), name)
    found = loaded.logits(*batch)
    assert (found.dtype, found.shape) == (np.float32, (5, 2))
    assert np.abs(found - expected).max() <= CLOSE[name]
    if "int8" in name or "16" in name:
        assert np.abs(found - expected).max() > 1e-5, "is not of reduced precision"
    # Another batch, another length, and the padding makes no difference.
    one = loaded.logits(batch[0][2:3, :7], batch[1][2:3])
    assert np.abs(one - expected[2:3]).max() <= max(1e-6, CLOSE[name])


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_inputs_that_the_model_cannot_take_are_errors(quantized, name):
    backend = load_runtime(str(quantized), name)
    vocab_size = load_tokenizer(TokenizerSettings()).vocab_size
    ids = np.ones((2, 5), int)
    for bad_ids, lengths, message in (
        (np.zeros((1, 513), int), [513], "sequence length 513: the model has 512 positions"),
        (ids, [5, 6], "valid_length: 6 is not between 1 and 5"),
        (ids, [5, 0], "valid_length: 0 is not between 1 and 5"),
        (ids, [-(2**40), 5], "valid_length: -1099511627776 is not between"),
        (ids, [2**62, 5], "valid_length: 4611686018427387904 is not between"),
        (ids, [5], "valid_length: has 1 entries for 2 sequences"),
        (ids, [[5, 5]], r"valid_length: expected shape \[batch\], found \(1, 2\)"),
        (ids, [5.0, 5.0], "valid_length: expected integers, found float64"),
        (ids * vocab_size, [5, 5], f"input_ids: {vocab_size} is not between 0 and"),
        (-ids, [5, 5], "input_ids: -1 is not between 0 and"),
        (np.full((2, 5), 2**64 - 1, np.uint64), [5, 5], "input_ids: 18446744073709551615 is not"),
        (ids * 1.0, [5, 5], "input_ids: expected integers, found float64"),
        (ids > 0, [5, 5], "input_ids: expected integers, found bool"),
        (ids[0], [5], r"input_ids: expected shape \[batch, length\], found \(5,\)"),
        (np.zeros((0, 5), int), np.zeros(0, int), r"input_ids: expected shape .*\(0, 5\)"),
        (np.zeros((2, 0), int), [1, 1], r"input_ids: expected shape .*\(2, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.logits(bad_ids, lengths)
    last = np.full((1, 3), vocab_size - 1, np.uint16)
    np.testing.assert_array_equal(backend.logits(last, [3]), backend.logits(last.tolist(), [3]))


def test_logits_that_are_not_finite_are_an_error(tiny_classifier, batch):
    tiny_classifier.classifier[3].bias.set_data(nd.array([0, np.inf]))
    for name in ("mxnet", "onnx"):
        with pytest.raises(UserError, match="logits are NaN or infinite"):
            backend_for(tiny_classifier, name).logits(*batch)


@pytest.mark.parametrize("name", ["mxnet", "onnx"])
def test_parameters_that_are_not_finite_are_an_error(tmp_path, name):
    path = save_classifier(tmp_path)
    saved = saved_model.load_model(str(path))
    table = saved.network.bort.word_embed[0].weight
    values = table.data().asnumpy()
    values[7, 3] = np.nan
    table.set_data(nd.array(values))
    saved_model.save_model(str(path), *saved)
    assert "best.params: bort.word_embed.0.weight" in (said := refusal(path, name))
    assert "has values that are NaN or infinite" in said


def test_an_exported_file_is_taken_while_it_fits(quantized, tmp_path, batch, monkeypatch):
    shutil.copytree(quantized, tmp_path / "copy")
    parameters = tmp_path / "copy" / "best.params"
    export_onnx([str(parameters)])
    expected = load_runtime(str(parameters), "mxnet").logits(*batch)

    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("built again")

    with monkeypatch.context() as patched:
        patched.setattr(onnx_graph, "build", build)
        found = load_runtime(str(parameters), "onnx").logits(*batch)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        found = load_runtime(str(tmp_path / "copy" / "best.onnx"), "onnx").logits(*batch)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    saved = saved_model.load_model(str(parameters))
    reference.redraw(saved.network, seed=4)
    saved_model.save_model(str(parameters), *saved)
    expected = saved.network(*map(nd.array, batch)).asnumpy()
    np.testing.assert_allclose(
        load_runtime(str(parameters), "onnx").logits(*batch), expected, atol=1e-5
    )
    with pytest.raises(UserError, match="was made from other parameters than"):
        load_runtime(str(parameters), "onnx-int8")


def test_bfloat16_needs_avx512(quantized, monkeypatch):
    monkeypatch.setattr(processor, "processor_flags", lambda: frozenset(("avx2", "avx512f")))
    assert "mxnet-bfloat16" not in available_backends()
    said = refusal(quantized, "mxnet-bfloat16")
    assert "runtime mxnet-bfloat16: needs a processor with AVX-512 (avx512bw, " in said
    assert said.rpartition("; use one of ")[2].startswith("mxnet, mxnet-int8, onnx, onnx-int8")
    network = saved_model.load_model(str(quantized)).network
    with pytest.raises(UserError, match="needs a processor with AVX-512"):
        backend_for(network, "mxnet-bfloat16")
    avx512_core = frozenset(("avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"))
    monkeypatch.setattr(processor, "processor_flags", lambda: avx512_core)
    assert set(BACKENDS) - {*available_backends()} <= {"openvino", "openvino-bfloat16"}


def without(monkeypatch: Any, *packages: str) -> None:
    """Let the backends find some packages missing, and every other one installed."""
    monkeypatch.setattr(runtime, "find_spec", lambda name: None if name in packages else name)


@pytest.mark.parametrize("package", ["openvino", "onnxruntime"])
def test_a_package_that_is_missing_is_named(quantized, monkeypatch, package):
    without(monkeypatch, package)
    kind = "onnx" if package == "onnxruntime" else package
    assert not [name for name in available_backends() if name.split("-")[0] == kind]
    for name in (backend for backend in BACKENDS if backend.split("-")[0] == kind):
        said = refusal(quantized, name)
        assert f"runtime {name}: needs the package {package}; run: pip install {package}" in said
        with pytest.raises(UserError, match=f"needs the package {package}"):
            load_classifier(str(quantized), runtime=name)


def test_openvino_in_bfloat16_needs_a_processor_that_multiplies_it(quantized, monkeypatch):
    without(monkeypatch)
    monkeypatch.setattr(runtime, "multiplies_bfloat16", lambda: False)
    assert "openvino-bfloat16" not in available_backends()
    assert "needs a processor with AVX512-BF16 or AMX" in refusal(quantized, "openvino-bfloat16")


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    ("missing", "exported", "expected"),
    [
        ((), False, "openvino"),
        (("openvino",), False, "onnx"),
        (("openvino", "onnxruntime"), True, "mxnet"),
        (("onnx",), False, "mxnet"),  # nothing can build the graph
        (("onnx",), True, "openvino"),
        (("onnx", "openvino", "mxnet"), True, "onnx"),
    ],
)
def test_auto_is_the_fastest_in_float32_that_can_run(
    tmp_path, monkeypatch, missing, exported, expected, bfloat16
):
    without(monkeypatch, *missing)
    monkeypatch.setattr(runtime, "multiplies_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(runtime, "computes_bfloat16", lambda: bfloat16)
    if exported:
        (tmp_path / "best.onnx").touch()
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "best.onnx").touch()
    assert runtime.fastest_runtime(str(tmp_path / "best.params")) == expected


def test_auto_says_when_nothing_can_run(tmp_path, monkeypatch):
    without(monkeypatch, "openvino", "onnxruntime", "mxnet")
    with pytest.raises(UserError, match="--runtime auto: none of openvino, onnxruntime"):
        runtime.fastest_runtime(str(tmp_path / "best.params"))


def test_a_graph_that_cannot_be_built_is_one_line(quantized, tmp_path, monkeypatch):
    folder = copied(quantized, tmp_path)
    without(monkeypatch, "onnx")
    assert "best.onnx: not found, or made from other parameters" in refusal(folder, "onnx")
    assert "or: pip install onnx" in refusal(folder, "onnx")


def test_auto_predicts_as_mxnet_does(quantized):
    answers = [
        list(predict(str(quantized), ["a fine film", "a dull film"], runtime=name))
        for name in ("mxnet", "auto")
    ]
    assert [len(each) for each in answers] == [2, 2]
    for exact, fast in zip(*answers):
        assert exact.label == fast.label
        assert fast.probabilities == pytest.approx(exact.probabilities, abs=1e-5)


def test_auto_fills_masks_with_mxnet():
    PredictSettings("model", fill_mask=True, runtime="auto").check()
    with pytest.raises(UserError, match="--runtime onnx: --fill_mask supports mxnet only"):
        PredictSettings("model", fill_mask=True, runtime="onnx").check()


# ---- what is read, and what is verified ----------------------------------------------------------


def copied(folder: Path, target: Path) -> Path:
    """Copy the folder of a model, the parameters first."""
    copy = target / "copy"
    copy.mkdir()
    shutil.copy(folder / "best.params", copy)
    shutil.copytree(folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("best.params"))
    return copy


def wait_for_another_time(path: Path) -> None:
    """Wait until a file that is written now is newer than another: the clock of files is coarse."""
    probe = path.parent / "probe"
    while True:
        probe.write_bytes(b"")
        newer = probe.stat().st_ctime_ns > path.stat().st_ctime_ns
        probe.unlink()
        if newer:
            return


@pytest.mark.parametrize("name", ["onnx", "onnx-int8"])
def test_parameters_are_read_once_they_have_changed(quantized, tmp_path, monkeypatch, batch, name):
    folder = copied(quantized, tmp_path)
    parameters = folder / "best.params"
    wait_for_another_time(parameters)
    export_onnx([str(folder)])
    (folder / "int8" / "best.json").write_bytes((quantized / "int8" / "best.json").read_bytes())

    def read(path: str, *_: Any) -> None:
        raise AssertionError(f"{path} was read")

    with monkeypatch.context() as patched:
        patched.setattr(runtime, "verify_parameters", read)
        expected = load_runtime(str(folder), name).logits(*batch)
    made = folder / ("best.onnx" if name == "onnx" else "int8/best.json")
    wait_for_another_time(made)
    status = parameters.stat()
    os.utime(parameters, ns=(status.st_atime_ns, status.st_mtime_ns))
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "verify_parameters", read)
        with pytest.raises(AssertionError, match=r"best\.params was read"):
            load_runtime(str(folder), name)
    np.testing.assert_array_equal(load_runtime(str(folder), name).logits(*batch), expected)
    content = bytearray(parameters.read_bytes())
    content[len(content) // 2] ^= 4
    parameters.write_bytes(content)
    os.utime(parameters, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "best.params: its SHA-256 is not that in best.json" in refusal(folder, name)


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_nothing_is_written_beside_a_model(quantized, tmp_path, name):
    folder = copied(quantized, tmp_path)
    export_onnx([str(folder)])
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    list(predict(str(folder), ["a fine film"], runtime=name))
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before


@pytest.mark.parametrize(
    "name", [value for value in EVERY_BACKEND if value.values[0] in ("onnx", "openvino")]
)
def test_the_parameters_in_a_file_are_mapped(quantized, tmp_path, batch, name):
    path = tmp_path / "best.onnx"
    export_onnx([str(quantized), "--output", str(path)])
    backend = load_runtime(str(path), name)
    onnxruntime = pytest.importorskip("onnxruntime")
    if name == "openvino" or maps_constants(onnxruntime.__version__):  # all but Python 3.9's
        assert str(path) in Path("/proc/self/maps").read_text("utf-8")
    earlier = tmp_path / "earlier.onnx"  # as files were before their constants were aligned
    model = onnx.load(str(path))
    for constant in model.graph.initializer:
        constant.doc_string = ""
    model.metadata_props.pop()
    write_onnx_unaligned(model, earlier)
    found = load_runtime(str(earlier), name).logits(*batch)
    np.testing.assert_allclose(found, backend.logits(*batch), atol=1e-6)


def test_a_signal_is_handled_after_two_openvino_runtimes(quantized):
    """OpenVINO 2026.4 crashes there when each has a Core of its own."""
    pytest.importorskip("openvino")
    program = f"""
        import os, signal
        from bort.inference.runtime import load_runtime
        signal.signal(signal.SIGTERM, lambda *_: print("handled"))
        first, second = (load_runtime({str(quantized)!r}, "openvino") for _ in range(2))
        del first
        del second
        os.kill(os.getpid(), signal.SIGTERM)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr


def write_onnx_unaligned(model: Any, path: Path) -> None:
    """Write a model and its SHA-256, with constants where they come."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnx_file, "align_constants", lambda model: None)
        onnx_file.write_onnx(model, str(path))


def test_the_metadata_of_a_file_are_read_without_its_graph(quantized, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx([str(quantized), "--output", str(path)])
    content = path.read_bytes()
    expected = {prop.key: prop.value for prop in onnx.load(str(path)).metadata_props}
    assert read_metadata("a file", content) == read_metadata("a file", str(path)) == expected
    for damaged in (content[:-5], b"\xff" * 40, b"no protocol buffer", content[:1000]):
        with pytest.raises(UserError, match="a file: is not an ONNX file, or damaged"):
            read_metadata("a file", damaged)


def test_the_flags_of_the_processor_are_those_that_linux_lists():
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    expected = next((line for line in text.splitlines() if line.startswith("flags")), "flags:")
    assert processor.processor_flags() == set(expected.split(":")[1].split())


@pytest.mark.parametrize("name", ["onnx", "onnx-int8"])
def test_onnx_runs_without_mxnet(quantized, name):
    program = f"""
        import sys
        from bort.predict import predict
        (answer,) = predict({str(quantized)!r}, ["a fine film"], runtime={name!r})
        assert answer.label in "01" and "mxnet" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=ROOT)


def test_one_thread_at_a_time_runs_a_network_of_mxnet():
    """Two first calls at once failed: they shared the name scopes in which MXNet traces it."""
    running, most = [], []

    class Network:
        def hybridize(self, **options):
            """Do nothing."""

        def __call__(self, ids, lengths):
            running.append(1)
            most.append(len(running))
            time.sleep(0.02)
            running.pop()
            return nd.zeros((ids.shape[0], 2))

    backend = runtime.MXNetBackend(Network(), vocab_size=9)
    ids, lengths = np.ones((1, 3), int), np.full(1, 3)
    with ThreadPoolExecutor(4) as pool:
        for answer in [pool.submit(backend.logits, ids, lengths) for _ in range(4)]:
            assert answer.result().shape == (1, 2)
    assert most == [1] * 4


def test_threads_do_not_get_each_others_answers_from_openvino():
    class Request:
        """As OpenVINO's: it keeps its answers until the next ones replace them."""

        def infer(self, feed):
            self.found = feed["input_ids"][:, :1].astype(np.float32)
            time.sleep(0.01)

        def get_output_tensor(self, number):
            return SimpleNamespace(data=self.found)

    backend = runtime.OpenVinoBackend.__new__(runtime.OpenVinoBackend)
    runtime.Backend.__init__(backend, vocab_size=9, positions=9)
    backend._request, backend._lock = Request(), threading.Lock()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: backend.logits([[n]], [1]).item(), range(8)))
    assert answers == list(range(8))


def test_threads_get_their_own_answers_from_openvino(tmp_path):
    pytest.importorskip("openvino")
    backend = load_runtime(str(save_classifier(tmp_path)), "openvino")
    asked = [np.full((1 + n % 3, 4), 5 + n) for n in range(30)]
    lengths = [np.full(len(ids), 4) for ids in asked]
    expected = list(map(backend.logits, asked, lengths))
    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(backend.logits, asked, lengths), expected):
            np.testing.assert_allclose(found, one, atol=1e-5)


def test_loadings_that_overlap_restore_the_interval_of_threads():
    before = sys.getswitchinterval()
    first, second = _short_turns(), _short_turns()
    for enter in (first, second):
        enter.__enter__()
    for leave in (first, second):
        assert sys.getswitchinterval() < before
        leave.__exit__(None, None, None)
    assert sys.getswitchinterval() == before


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


def test_what_cannot_be_run_is_a_one_line_error(quantized, tmp_path):
    parameters = save_classifier(tmp_path)
    assert "no int8 model; make it with scripts/quantize.py" in refusal(tmp_path, "onnx-int8")
    assert "runtime 'tensorrt': expected one of mxnet, " in refusal(tmp_path, "tensorrt")
    assert "absent: not found" in refusal(tmp_path / "absent", "onnx")
    assert "absent.onnx: not found; scripts/export_onnx.py" in refusal("absent.onnx", "onnx")
    int8 = quantized / "int8" / "best.onnx"
    assert "an ONNX file needs the runtime onnx, not mxnet" in refusal(int8, "mxnet")
    assert "is int8, not float32" in refusal(int8, "onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(int8.read_bytes()[:1000])
    assert "damaged.onnx: is not an ONNX file, or damaged" in refusal(damaged, "onnx-int8")
    damaged.write_bytes(b"")
    assert "damaged.onnx: is not an ONNX file: it is empty" in refusal(damaged, "onnx-int8")
    tokenizer = load_tokenizer(TokenizerSettings())
    model_config = saved_model.ModelConfig(
        SHAPE, 1000, tokenizer.fingerprint, saved_model.MASKED_LM
    )
    network = saved_model.build_network(model_config)
    saved_model.save_model(str(tmp_path / "lm" / "bort.params"), network, model_config, tokenizer)
    assert "a masked_lm network; fine-tune it on a task first" in refusal(tmp_path / "lm", "onnx")
    export_onnx([str(tmp_path / "lm")])
    assert "is not a classifier" in refusal(tmp_path / "lm" / "bort.onnx", "onnx")
    assert parameters.exists()


def test_int8_files_are_verified(quantized, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(quantized, folder)
    generator = np.random.default_rng(0)
    for suffix, name in (
        ("-symbol.json", "mxnet-int8"),
        ("-0000.params", "mxnet-int8"),
        (".onnx", "onnx-int8"),
    ):
        path = folder / "int8" / f"best{suffix}"
        content = path.read_bytes()
        for place in generator.integers(0, len(content), 5):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(generator.integers(8))
            path.write_bytes(damaged)
            assert f"{path}: its SHA-256 is not that in best.json" in refusal(folder, name)
        path.unlink()
        assert f"{path}: not found; run scripts/quantize.py again" in refusal(folder, name)
        path.write_bytes(content)
        load_runtime(str(folder), name)


def test_int8_files_of_before_the_sha256_are_read_with_care(quantized, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(quantized, folder)
    record = folder / "int8" / "best.json"
    content = runtime.read_json(str(record))
    del content["sha256"]
    record.write_text(json.dumps(content), "utf-8")
    load_runtime(str(folder), "mxnet-int8")
    for suffix, damage in (
        ("-symbol.json", b"{"),
        ("-symbol.json", b"{}"),
        ("-symbol.json", b"\xff" * 9),
        ("-0000.params", b""),
        ("-0000.params", b"\x12\x01" + b"\xff" * 100),
    ):
        path = folder / "int8" / f"best{suffix}"
        before = path.read_bytes()
        path.write_bytes(damage)
        assert str(path.with_name("best")) in refusal(folder, "mxnet-int8")
        path.write_bytes(before)
    for text in ("[]", "{}", '{"parameters_sha256": 1}', "{", '{"parameters_sha256": "", "a": '):
        record.write_text(text, "utf-8")
        assert f"{record}: " in refusal(folder, "mxnet-int8")


def test_an_int8_graph_that_cannot_run_is_a_one_line_error(quantized, tmp_path, batch):
    folder = tmp_path / "copy"
    shutil.copytree(quantized, folder)
    record, symbol = folder / "int8" / "best.json", folder / "int8" / "best-symbol.json"
    content = runtime.read_json(str(record))
    del content["sha256"]
    record.write_text(json.dumps(content), "utf-8")
    graph = json.loads(symbol.read_text("utf-8"))
    added = next(one for one in graph["nodes"] if one["op"] == "elemwise_add")
    added["inputs"][1] = [0, 0, 0]
    symbol.write_text(json.dumps(graph), "utf-8")
    backend = load_runtime(str(folder), "mxnet-int8")
    with pytest.raises(UserError, match=r"best-symbol.json: MXNet cannot run it \(.*; run "):
        backend.logits(*batch)


def test_an_onnx_file_of_another_program_is_a_one_line_error(tmp_path):
    path = tmp_path / "other.onnx"
    inputs = [helper.make_tensor_value_info(name, 7, ["n"]) for name in ("input_ids", "mask")]
    output = helper.make_tensor_value_info("scores", 7, ["n"])
    node = helper.make_node("Add", ["input_ids", "mask"], ["scores"])
    graph = helper.make_graph([node], "other", inputs, [output])
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.save(model, str(path))
    assert "was not written by scripts/export_onnx.py" in refusal(path, "onnx")
    ours = {"vocab_size": "9", "positions": "1", "precision": "float32"}
    helper.set_model_props(model, ours)
    onnx.save(model, str(path))
    assert "is not a classifier" in refusal(path, "onnx")
    graph.node[0].input[1] = graph.input[1].name = "valid_length"
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    for metadata, message in (
        ({"model config": "{}"}, "its model config: Object missing required field `vocab_size`"),
        ({"vocab_size": "9"}, "was not written by scripts/export_onnx.py"),
        ({"vocab_size": "x", "positions": "1", "precision": "float32"}, "was not written by"),
        ({"vocab_size": "9", "positions": "513", "precision": "float32"}, "is damaged: 513"),
    ):
        helper.set_model_props(model, metadata)
        onnx.save(model, str(path))
        assert message in refusal(path, "onnx")


# ---- scripts/quantize.py -------------------------------------------------------------------------


def test_the_record_holds_how_the_models_were_made(quantized):
    record = runtime.read_json(str(quantized / "int8" / "best.json"))
    assert record["mxnet-int8"]["calibration"] == {"task": "SST-2", "split": "train", "inputs": 8}
    assert [check["runtime"] for check in record["checks"]] == list(available_backends())
    assert not list(quantized.glob("*.tmp"))


def test_the_comparison_is_printed_and_true(tmp_path, capsys):
    parameters = save_classifier(tmp_path)
    checks = quantize([str(parameters), "--data_dir", str(ROOT / "test_data" / "glue")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "SST-2, dev: accuracy in points"
    assert [line.split()[0] for line in lines[2:-1]] == list(available_backends())
    work = Quantization(str(parameters), str(ROOT / "test_data" / "glue"))
    encoded, examples = work.encode("dev")
    ids, lengths = calibration_batch(encoded, 100, work.tokenizer.pad_id)
    assert len(ids) == len(examples)
    labels = np.array([example.label for example in examples])
    exact = load_runtime(str(parameters), "mxnet").logits(ids, lengths).astype(float)
    for check in checks:
        scores = load_runtime(str(parameters), check.runtime).logits(ids, lengths).astype(float)
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


@pytest.mark.parametrize("value", [0.0, 0.01])
def test_biases_without_a_negative_value_become_int8(tmp_path, value):
    """As of a network whose biases were never updated."""
    path = save_classifier(tmp_path)
    model = saved_model.load_model(str(path))
    cells = [layer.attention_cell for layer in model.network.bort.encoder.transformer_cells]
    for bias in (getattr(cells[1], f"{name}_bias") for name in ("query", "key", "value")):
        bias.set_data(nd.full(bias.shape, value))
    saved_model.save_model(str(path), *model)
    checks = quantize([str(path), "--data_dir", str(ROOT / "test_data" / "glue")])
    assert min(check.cosine for check in checks) > 0.98
    work = Quantization(str(path), str(ROOT / "test_data" / "glue"))
    before = {name: p.data().asnumpy() for name, p in work.network.collect_params().items()}
    work.quantize(calibration_inputs=4, batch_size=4)
    for name, parameter in work.network.collect_params().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), before[name])


def test_a_channel_of_large_values_leaves_the_others_their_levels_in_int8(tmp_path):
    """Such channels are in every pretrained BERT; with sums of residuals in int8: 0.9975."""
    path, outlier = save_classifier(tmp_path), 40
    model = saved_model.load_model(str(path))
    for name, parameter in model.network.collect_params().items():
        value = parameter.data().asnumpy().copy()
        if name.endswith("gamma"):  # keeps the other channels at 1 in the next LayerNorm
            value *= outlier / len(value) ** 0.5
            value[0] = 0
        elif name.endswith("beta"):
            value[0] = outlier
        elif name.endswith("weight") and value.shape[-1:] == (32,) and "embed" not in name:
            value[:, 0] = 0  # what reads the channel gives it no weight
        parameter.set_data(nd.array(value))
    saved_model.save_model(str(path), *model)
    checks = quantize([str(path), "--data_dir", str(ROOT / "test_data" / "glue")])
    assert {check.runtime: check.cosine for check in checks}["mxnet-int8"] > 0.999


def test_calibration_inputs_are_spread_over_the_set(tmp_path):
    work = Quantization(str(save_classifier(tmp_path)), str(ROOT / "test_data" / "glue"))
    _, all_examples = work.encode("train")
    encoded, examples = work.encode("train", 2)
    assert examples == [all_examples[0], all_examples[-1]]  # no others are tokenized
    ids, lengths = calibration_batch(encoded, 2, pad_id=7)
    expected = work.tokenizer.encode_batch([one.inputs[0][0] for one in examples])
    assert len(ids) == 2
    for row, length, text in zip(ids, lengths, expected):
        assert row[1 : length - 1].tolist() == list(text)
        assert (row[length:] == 7).all()


def complaint(capsys: Any, *line: object) -> str:
    """Return the one line that the program leaves on stderr."""
    with pytest.raises(SystemExit) as stopped:
        quantize([str(word) for word in line])
    assert stopped.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    return said


def test_mistakes_are_reported_in_one_line_and_keep_what_was_there(quantized, tmp_path, capsys):
    shutil.copytree(quantized, tmp_path / "copy")
    before = sorted(path.name for path in (tmp_path / "copy" / "int8").iterdir())
    folder = tmp_path / "copy"
    assert "no train set" in complaint(capsys, folder, "--data_dir", tmp_path)
    assert sorted(path.name for path in (folder / "int8").iterdir()) == before
    (folder / "int8" / "notes.txt").write_text("mine", "utf-8")
    quantize([str(folder), "--data_dir", str(ROOT / "test_data" / "glue")])
    after = [path.name for path in (folder / "int8").iterdir()]
    assert sorted(after) == sorted([*before, "notes.txt"])
    shutil.rmtree(folder / "tokenizer")
    assert "has no tokenizer/ beside it; restore it" in complaint(capsys, folder)


def test_a_record_names_the_parameters_that_were_loaded(tmp_path):
    """A fine-tuning that still runs replaces them while the models are made."""
    path = save_classifier(tmp_path)
    model = saved_model.load_model(str(path))
    loaded = model.model_config.sha256
    reference.redraw(model.network, seed=4)
    saved_model.save_model(str(path), *model)
    assert sha256_of(str(path)) != loaded
    metadata = runtime.metadata_of(str(path), model.model_config)
    assert metadata["parameters_sha256"] == loaded


def test_what_a_killed_quantization_left_is_removed_by_the_next(tmp_path, monkeypatch):
    quantization, folders = Quantization(str(save_classifier(tmp_path)), None), []

    def stop(_self: Any, files: Any, *_: int) -> None:
        folders.append(Path(files.folder))
        raise UserError("stopped")

    monkeypatch.setattr(Quantization, "_make", stop)
    with pytest.raises(UserError, match="stopped"):
        quantization.quantize(1, 1)
    assert not (tmp_path / "int8").exists()
    # As the folder of a process that is no more.
    left = Path(str(folders[0]).replace(f"{os.getpid():08x}", f"{2**31:08x}"))
    left.mkdir(parents=True)
    (left / "best.onnx").touch()
    with pytest.raises(UserError, match="stopped"):
        quantization.quantize(1, 1)
    assert not left.exists()


def test_backend_for_a_network_needs_no_file(tiny_classifier, batch):
    expected = tiny_classifier(*map(nd.array, batch)).asnumpy()
    for name in {*available_backends()} - {"mxnet-int8"}:
        found = backend_for(tiny_classifier, name, threads=1).logits(*batch)
        assert np.abs(found - expected).max() <= CLOSE[name]


@pytest.fixture
def tiny_classifier(tmp_path) -> Any:
    return saved_model.load_model(str(save_classifier(tmp_path))).network
