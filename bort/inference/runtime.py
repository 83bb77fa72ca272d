"""Backends: ways to run a fine-tuned classifier on a CPU, behind one interface.

    backend = load_runtime("runs/finetuning/SST-2", "onnx")
    logits = backend.logits(input_ids, valid_length)

scripts/quantize.py makes the int8 models, in a folder `int8` beside the parameters. Every backend
uses OMP_NUM_THREADS threads, by default one per usable core.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Callable, Mapping, NamedTuple, Union

import numpy as np

from bort.errors import UserError, quoted, reasons
from bort.files import MODEL_BYTES, read_json, read_json_as, sha256_of
from bort.inference.onnx_file import (
    OUTPUT,
    OnnxMetadata,
    onnx_session,
    parse_metadata,
    read_metadata,
    read_separated,
    verify_onnx_file,
)
from bort.mxnet_setup import cpu_threads
from bort.parameters import check_finite, check_finite_arrays, parameter_file, read_arrays
from bort.processor import BFLOAT16_FLAGS, computes_bfloat16, multiplies_bfloat16
from bort.saved_model import ModelConfig, load_model, read_model_config, verify_parameters
from bort.shapes import MAX_LENGTH
from bort.types import Block

if TYPE_CHECKING:
    import openvino
    from numpy.typing import ArrayLike

BACKENDS = (
    "mxnet",
    "mxnet-bfloat16",
    "mxnet-int8",
    "onnx",
    "onnx-int8",
    "openvino",
    "openvino-bfloat16",
)
# In float32, the fastest first: what `auto` chooses from.
FASTEST = ("openvino", "onnx", "mxnet")
INT8_FOLDER = "int8"
DATA_NAMES = ("data0", "data1")  # of token ids and lengths in an exported MXNet symbol


class Backend(abc.ABC):
    """One way to run one classifier; it checks its inputs and its outputs.

    MXNet reads and writes out of bounds for a wrong length and clips a wrong id silently.
    """

    def __init__(self, vocab_size: int, positions: int) -> None:
        self._vocab_size, self._positions = vocab_size, positions

    def logits(self, input_ids: ArrayLike, valid_length: ArrayLike) -> np.ndarray:
        """Return the logits, float32 [batch, outputs].

        input_ids: integers [batch, length], padded at the end; valid_length: integers [batch].

        Raises `ValueError` for ids outside the vocabulary, lengths outside 1 to `length`, more
        tokens than the model has positions and arrays of another dtype or shape; `UserError` when
        a logit is NaN or infinite.
        """
        ids, lengths = check_batch(input_ids, valid_length, self._vocab_size, self._positions)
        logits = self._forward(ids, lengths)
        if not np.isfinite(logits).all():
            raise UserError(
                "the model's logits are NaN or infinite: its parameters are damaged, or its "
                "training diverged"
            )
        return logits

    @abc.abstractmethod
    def _forward(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the logits of checked inputs, both int32."""


def check_batch(
    input_ids: ArrayLike, valid_length: ArrayLike, vocab_size: int, positions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids [batch, length] and lengths [batch] as int32.

    Raises `ValueError` for what a model with `vocab_size` tokens and `positions` cannot take.
    """
    ids, lengths = np.asarray(input_ids), np.asarray(valid_length)
    for name, array, dimensions in (("input_ids", ids, 2), ("valid_length", lengths, 1)):
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name}: expected integers, found {array.dtype}")
        if array.ndim != dimensions or not array.size:
            shape = "[batch, length]" if dimensions == 2 else "[batch]"
            raise ValueError(f"{name}: expected shape {shape}, found {array.shape}")
    batch, length = ids.shape
    if len(lengths) != batch:
        raise ValueError(f"valid_length: has {len(lengths)} entries for {batch} sequences")
    if length > positions:
        raise ValueError(f"sequence length {length}: the model has {positions} positions")
    _check_range("valid_length", lengths, 1, length)
    _check_range("input_ids", ids, 0, vocab_size - 1)
    return ids.astype(np.int32), lengths.astype(np.int32)


def _check_range(name: str, values: np.ndarray, low: int, high: int) -> None:
    smallest, largest = int(values.min()), int(values.max())
    if smallest < low or largest > high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"{name}: {wrong} is not between {low} and {high}")


class MXNetBackend(Backend):
    """A block of MXNet that takes token ids and lengths; one thread at a time runs it."""

    def __init__(self, network: Block, vocab_size: int, positions: int = MAX_LENGTH) -> None:
        """Take a network and hybridize it."""
        super().__init__(vocab_size, positions)
        self._network = network
        # Two first calls at once would both trace the network, in name scopes that they share.
        self._lock = threading.Lock()
        network.hybridize(static_alloc=True)

    def _forward(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        from mxnet import nd

        arrays = (nd.array(array, dtype="float32") for array in (ids, lengths))
        with self._lock:
            return self._network(*arrays).astype("float32", copy=False).asnumpy()


class SymbolBackend(MXNetBackend):
    """A classifier that MXNet exported, from its files; damage may show when it runs."""

    def __init__(self, prefix: str, vocab_size: int) -> None:
        """Load `<prefix>-symbol.json` and its parameters; raises `UserError` for damaged files."""
        super().__init__(load_symbol_block(prefix), vocab_size)
        self._symbol, _ = symbol_files(prefix)

    def _forward(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        from mxnet.base import MXNetError

        try:
            return super()._forward(ids, lengths)
        except MXNetError as error:
            raise _unusable(self._symbol, "run", error) from None


class OnnxBackend(Backend):
    """A graph written by bort.inference.onnx_graph, in ONNX Runtime."""

    def __init__(
        self, model: bytes | str, threads: int | None = None, verified: bool = False
    ) -> None:
        """Take the path of a file or its content; `verified`: the file's SHA-256 was compared.

        Raises `UserError` for a damaged file and for a graph that is not a classifier of ours.
        """
        name = model if isinstance(model, str) else "the ONNX graph"
        self.metadata = _metadata(name, model, verified)
        self._session = onnx_session(model, threads or cpu_threads())
        inputs = {array.name for array in self._session.get_inputs()}
        outputs = [array.name for array in self._session.get_outputs()]
        if outputs != [OUTPUT] or inputs != {"input_ids", "valid_length"}:
            raise UserError(f"{name}: is not a classifier; it has no output `{OUTPUT}` alone")
        super().__init__(self.metadata.vocab_size, self.metadata.positions)

    def _forward(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        feed = {"input_ids": ids.astype(np.int64), "valid_length": lengths.astype(np.int64)}
        return self._session.run([OUTPUT], feed)[0]


class OpenVinoBackend(Backend):
    """A graph written by bort.inference.onnx_graph, in OpenVINO; one thread at a time runs it."""

    def __init__(
        self, model: bytes | str, precision: str = "float32", threads: int | None = None
    ) -> None:
        """Take the path of a file or its content; multiply in `precision`.

        Raises `UserError` for a damaged file and for a graph that is not a classifier of ours.
        """
        name = model if isinstance(model, str) else "the ONNX graph"
        self.metadata = _metadata(name, model)
        super().__init__(self.metadata.vocab_size, self.metadata.positions)
        core = openvino_core()  # after verifying the file: another thread may import it meanwhile
        try:
            graph = _openvino_graph(core, model)
            inputs, outputs = (
                {port.any_name for port in ports} for ports in (graph.inputs, graph.outputs)
            )
            if outputs != {OUTPUT} or inputs != {"input_ids", "valid_length"}:
                raise UserError(f"{name}: is not a classifier; it has no output `{OUTPUT}` alone")
            compiled = core.compile_model(graph, "CPU", openvino_options(precision, threads))
        except RuntimeError as error:
            reason = reasons(error)[-1]
            raise UserError(f"{name}: OpenVINO cannot load it ({reason})") from None
        self._request = compiled.create_infer_request()
        # The answers lie in the request until the next ones replace them.
        self._lock = threading.Lock()

    def _forward(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        feed = {"input_ids": ids.astype(np.int64), "valid_length": lengths.astype(np.int64)}
        with self._lock:
            self._request.infer(feed)
            return self._request.get_output_tensor(0).data.copy()


@functools.lru_cache(maxsize=1)
def openvino_core() -> openvino.Core:
    """Return OpenVINO's `Core`, one for the life of this process.

    Each one replaces the stack on which signals are handled, and puts back the one before it when
    it goes. Of two, the first to go leaves the second with a freed one: the next signal would crash
    the process.
    """
    import openvino

    return openvino.Core()


def openvino_options(precision: str, threads: int | None = None) -> dict[str, str | int]:
    """Return OpenVINO's options for products in `precision` and answers as soon as possible."""
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": threads or cpu_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }


def _openvino_graph(core: openvino.Core, model: bytes | str) -> openvino.Model:
    """Return the graph of a file, or of its content; a file's large constants stay in it."""
    import openvino

    if not isinstance(model, str):
        return core.read_model(model, b"")  # without separate weights
    separated = read_separated(model)
    if separated is None:
        return core.read_model(model)
    graph = core.read_model(separated.with_inputs(), b"")
    # Mapped; OpenVINO asks for arrays that may be written to, and such a change stays in memory.
    content = np.asarray(np.memmap(model, np.uint8, "c"))
    values = {constant.name: constant.values(content) for constant in separated.constants}
    for parameter in graph.get_parameters():
        if parameter.output(0).any_name in values:
            array = values[parameter.output(0).any_name]
            constant = openvino.op.Constant(array, shared_memory=True)
            parameter.output(0).replace(constant.output(0))
            graph.remove_parameter(parameter)
    return graph


def _metadata(name: str, model: bytes | str, verified: bool = False) -> OnnxMetadata:
    """Return the metadata of a file or its content; a file is verified, unless it was before.

    Raises `UserError` for a damaged file and for a graph that is not of ours.
    """
    verified = verified or not isinstance(model, str) or verify_onnx_file(model)
    metadata = parse_metadata(name, read_metadata(name, model))
    if metadata.has_digest and not verified:
        raise UserError(f"{name}: its SHA-256 is missing: the file is damaged; write it again")
    return metadata


# ---- the processor -------------------------------------------------------------------------------


def available_backends() -> tuple[str, ...]:
    """Return those of `BACKENDS` that this processor and this environment can run."""
    left_out = set()
    if not computes_bfloat16():  # MXNet fails in the first layer
        left_out.add("mxnet-bfloat16")
    if not multiplies_bfloat16():
        left_out.add("openvino-bfloat16")
    # MXNet is not looked for: that would prepare its import (bort.mxnet_setup).
    others = (name for name in BACKENDS if not name.startswith("mxnet"))
    left_out |= {name for name in others if _missing_packages(name)}
    return tuple(name for name in BACKENDS if name not in left_out)


def fastest_runtime(parameters: str) -> str:
    """Return the fastest backend for a .params file that computes in float32 and is installed."""
    for name in FASTEST:
        if not _missing_packages(name, os.path.exists(onnx_path(parameters))):
            return name
    raise UserError("--runtime auto: none of openvino, onnxruntime and mxnet is installed")


def _missing_packages(name: str, exported: bool = True) -> list[str]:
    """Return the packages that a backend needs and are not installed.

    exported: the graph lies in a file of export_onnx.py; without it the package onnx builds it.
    """
    needed = [package_of(name)] + ["onnx"] * (not exported and not name.startswith("mxnet"))
    return [package for package in needed if not find_spec(package)]


def package_of(name: str) -> str:
    """Return the package that a backend needs."""
    kind = name.partition("-")[0]
    return "onnxruntime" if kind == "onnx" else kind


def require_processor(name: str) -> None:
    """Raise `UserError` when a backend cannot run on this processor or in this environment."""
    available = available_backends()
    if name in available:
        return
    if missing := _missing_packages(name):
        needed = f"the package {missing[0]}; run: pip install {missing[0]}, or"
    elif name.startswith("openvino"):
        needed = "a processor with AVX512-BF16 or AMX;"
    else:
        needed = f"a processor with AVX-512 ({', '.join(sorted(BFLOAT16_FLAGS))});"
    raise UserError(f"runtime {name}: needs {needed} use one of {', '.join(available)}")


# ---- from a network in memory --------------------------------------------------------------------


def backend_for(network: Block, name: str, threads: int | None = None) -> Backend:
    """Return a backend for a BortClassifier; not mxnet-int8, which needs data for calibration.

    `threads` applies to ONNX Runtime only: MXNet's number of threads is fixed when it is imported.

    Raises `UserError` for a backend that this processor cannot run.
    """
    require_processor(name)
    if name.startswith("openvino"):
        from bort.inference.onnx_graph import build

        content = build(network).SerializeToString()
        return OpenVinoBackend(content, _precision(name), threads)
    if name.startswith("onnx"):
        from bort.inference.onnx_graph import build

        precision = "int8" if name == "onnx-int8" else "float32"
        return OnnxBackend(build(network, precision).SerializeToString(), threads)
    vocab_size = network.bort.word_embed[0].weight.shape[0]
    positions = network.bort.encoder._max_length
    block = _to_bfloat16(network) if name == "mxnet-bfloat16" else network
    return MXNetBackend(block, vocab_size, positions)


def _precision(name: str) -> str:
    return "bfloat16" if name.endswith("bfloat16") else "float32"


def _to_bfloat16(network: Block) -> Block:
    """Convert a network; attention's interleaved products stay: they support float32 only."""
    import mxnet as mx
    from mxnet.contrib import amp

    network.hybridize()
    network(mx.nd.zeros((1, 2)), mx.nd.ones(1))  # the first call makes the graph
    nodes = json.loads(network(*map(mx.sym.var, DATA_NAMES)).tojson())["nodes"]
    excluded = [node["name"] for node in nodes if "interleaved" in node["op"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MXNet cannot infer the dtype of the inputs: float32
        block = amp.convert_hybrid_block(
            network, target_dtype="bfloat16", excluded_sym_names=excluded, ctx=mx.cpu()
        )
    block.collect_params().setattr("grad_req", "null")
    return block


GraphBackend = Union[OnnxBackend, OpenVinoBackend]


# ---- from files ----------------------------------------------------------------------------------


def onnx_path(parameters: str) -> str:
    """Return the path of the exported float32 ONNX file of a .params file."""
    return f"{parameters.removesuffix('.params')}.onnx"


def int8_folder(parameters: str) -> str:
    """Return the folder of the int8 models of a .params file."""
    return os.path.join(os.path.dirname(parameters), INT8_FOLDER)


class Int8Files(NamedTuple):
    """The files of the int8 models in a folder; `name` is that of the .params file, without it."""

    folder: str
    name: str

    @classmethod
    def of(cls, parameters: str, folder: str | None = None) -> Int8Files:
        """Return the files for a .params file, in its own int8 folder or in another folder."""
        name = os.path.basename(parameters).removesuffix(".params")
        return cls(folder or int8_folder(parameters), name)

    @property
    def onnx(self) -> str:
        """Return the path of the graph for ONNX Runtime."""
        return os.path.join(self.folder, f"{self.name}.onnx")

    @property
    def mxnet(self) -> str:
        """Return the prefix of MXNet's two files, -symbol.json and -0000.params."""
        return os.path.join(self.folder, self.name)

    @property
    def record(self) -> str:
        """Return the path of the record: how the models were made, and their dev scores."""
        return os.path.join(self.folder, f"{self.name}.json")

    @property
    def models(self) -> tuple[str, ...]:
        """Return the paths of the three files of the models."""
        return (self.onnx, *symbol_files(self.mxnet))


@dataclass(frozen=True)
class Int8Record:
    """What loading needs of the record of int8 models.

    parameters_sha256: of the float32 parameters that the models were made from.
    sha256: of each file of the models, by name; empty in records of earlier versions.
    """

    parameters_sha256: str
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)


def load_runtime(
    path: Union[str, os.PathLike[str]], name: str, threads: int | None = None
) -> Backend:
    """Load a saved classifier (its .params file or folder, or a file of export_onnx.py) to run it.

    Raises `UserError` for a path without a classifier, for a masked-LM network, for damaged files,
    and for an int8 model that is missing or was made from other parameters.
    """
    if name not in BACKENDS:
        raise UserError(f"runtime {quoted(name)}: expected one of {', '.join(BACKENDS)}")
    require_processor(name)
    path = os.fspath(path)
    if path.endswith(".onnx"):
        return _load_onnx_file(path, name, threads)
    found = parameter_file(path)
    model_config = read_model_config(found)
    check_classifier(found, model_config)
    if name.endswith("int8"):
        return _load_int8(found, model_config, name, threads)
    if name == "onnx":
        return _load_float32_onnx(found, model_config, partial(OnnxBackend, threads=threads))
    if name.startswith("openvino"):
        load = partial(OpenVinoBackend, precision=_precision(name), threads=threads)
        return _load_float32_onnx(found, model_config, load)
    return backend_for(load_finite_model(found), name, threads)


def load_finite_model(path: str) -> Block:
    """Load a saved network; raises `UserError` when a parameter is NaN or infinite."""
    network = load_model(path).network
    check_finite(path, network)
    return network


def check_classifier(path: str, model_config: ModelConfig) -> None:
    """Raise `UserError` when a saved model is not a classifier."""
    if not model_config.num_outputs:
        raise UserError(f"{path}: a {model_config.kind} network; fine-tune it on a task first")


def _load_onnx_file(path: str, name: str, threads: int | None) -> GraphBackend:
    if not name.startswith(("onnx", "openvino")):
        raise UserError(f"{path}: an ONNX file needs the runtime onnx, not {name}")
    if not os.path.exists(path):
        raise UserError(f"{path}: not found; scripts/export_onnx.py writes it")
    backend: GraphBackend
    if name.startswith("openvino"):
        backend = OpenVinoBackend(path, _precision(name), threads)
    else:
        backend = OnnxBackend(path, threads)
    precision = "int8" if name == "onnx-int8" else "float32"
    if backend.metadata.precision != precision:
        raise UserError(f"{path}: is {backend.metadata.precision}, not {precision}")
    return backend


def _load_float32_onnx(
    parameters: str, model_config: ModelConfig, load: Callable[[Union[bytes, str]], GraphBackend]
) -> GraphBackend:
    """Load the exported file if it was made from these parameters, else build the graph."""
    path = onnx_path(parameters)
    if os.path.exists(path):
        with ThreadPoolExecutor(1) as pool:
            expected = pool.submit(_parameters_sha256, parameters, model_config, path)
            exported = load(path)
            if exported.metadata.parameters_sha256 == expected.result():
                return exported
    if not find_spec("onnx"):
        raise UserError(
            f"{path}: not found, or made from other parameters, and without the package onnx it "
            "cannot be built; run scripts/export_onnx.py again, or: pip install onnx"
        )
    verify_parameters(parameters, model_config)
    from bort.inference.onnx_graph import build, describe_file

    check_finite_arrays(parameters, read_arrays(parameters).items())
    graph = build(describe_file(parameters, model_config))
    return load(graph.SerializeToString())


def _parameters_sha256(parameters: str, model_config: ModelConfig, made: str) -> str:
    """Return the SHA-256 of a .params file, which nothing of what was made from it reads.

    To read 300 MB takes 0.2 s. So the model config's is taken as long as the file has not changed
    since `made` was written; the time of its last change of status cannot be set back.
    """
    changed = os.stat(parameters).st_ctime_ns >= os.stat(made).st_ctime_ns
    if changed or not model_config.sha256:
        verify_parameters(parameters, model_config)
    return model_config.sha256 or sha256_of(parameters, MODEL_BYTES)


def _load_int8(
    parameters: str, model_config: ModelConfig, name: str, threads: int | None
) -> Backend:
    files = Int8Files.of(parameters)
    if not os.path.exists(files.record):
        cure = "make it with scripts/quantize.py"
        if not model_config.task:
            cure = (
                "scripts/quantize.py needs the data of a task, and it has none: try --runtime auto"
            )
        raise UserError(f"{parameters}: has no int8 model; {cure}")
    record = read_json_as(files.record, Int8Record)
    if record.parameters_sha256 != _parameters_sha256(parameters, model_config, files.record):
        raise UserError(
            f"{files.record}: was made from other parameters than {parameters}; run "
            "scripts/quantize.py again"
        )
    _verify_files(files, record, name)
    verified = bool(record.sha256)
    return int8_backend(files, name, model_config.vocab_size, threads, verified)


def _verify_files(files: Int8Files, record: Int8Record, name: str) -> None:
    paths = (files.onnx,) if name == "onnx-int8" else symbol_files(files.mxnet)
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: not found; run scripts/quantize.py again")
        if record.sha256 and sha256_of(path, MODEL_BYTES) != record.sha256.get(
            os.path.basename(path)
        ):
            raise UserError(
                f"{path}: its SHA-256 is not that in {os.path.basename(files.record)}: the file "
                "is damaged; run scripts/quantize.py again"
            )


def int8_backend(
    files: Int8Files, name: str, vocab_size: int, threads: int | None = None, verified: bool = False
) -> Backend:
    """Load onnx-int8 or mxnet-int8 from its files, which may have been verified."""
    if name == "onnx-int8":
        return OnnxBackend(files.onnx, threads, verified)
    return SymbolBackend(files.mxnet, vocab_size)


def symbol_files(prefix: str) -> tuple[str, str]:
    """Return the paths of the two files that MXNet's `export` writes."""
    return f"{prefix}-symbol.json", f"{prefix}-0000.params"


def load_symbol_block(prefix: str) -> Block:
    """Load a classifier that MXNet exported to `<prefix>-symbol.json` and `-0000.params`.

    Raises `UserError` when the files are damaged.
    """
    from mxnet.gluon import SymbolBlock

    symbol, parameters = symbol_files(prefix)
    read_json(symbol)
    read_arrays(parameters)  # MXNet's own reader can crash on a damaged file
    try:
        block = SymbolBlock.imports(symbol, list(DATA_NAMES))
        block.collect_params().setattr("grad_req", "null")
        block.collect_params().load(parameters, cast_dtype=True, dtype_source="saved")
    except Exception as error:  # MXNet raises exceptions of many classes
        raise _unusable(symbol, "load", error) from None
    return block


def _unusable(symbol: str, use: str, error: Exception) -> UserError:
    return UserError(
        f"{symbol}: MXNet cannot {use} it ({reasons(error)[-1]}); run scripts/quantize.py again"
    )


def metadata_of(path: str, model_config: ModelConfig) -> dict[str, str]:
    """Return what an ONNX file records about the saved model it was made from.

    The SHA-256 is that of the parameters that were loaded: a run may have replaced the file since.
    Not the details: the command has local paths, which are private, and the file may be published.
    """
    described = dataclasses.asdict(dataclasses.replace(model_config, details={}))
    return {
        "parameters_sha256": model_config.sha256 or sha256_of(path),
        "model config": json.dumps(described, ensure_ascii=False),
    }
