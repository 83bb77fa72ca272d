"""Ways to run a fine-tuned classifier on a CPU, behind one interface.

    runtime = load_runtime("runs/finetuning/SST-2", "onnx")
    scores = runtime.scores(ids, valid_length)

The int8 ones are made by scripts/quantize.py, which lays them in a folder `int8` beside the
parameters. All take as many threads as OMP_NUM_THREADS says, or one for each usable core.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np

from bort.errors import UserError
from bort.files import read_json, sha256_of
from bort.mxnet_setup import cpu_threads
from bort.parameters import parameter_file

RUNTIMES = ("mxnet", "mxnet-bfloat16", "mxnet-int8", "onnx", "onnx-int8")
# What oneDNN needs for bfloat16 (its "avx512_core"); without it MXNet fails in the first layer.
BFLOAT16_FLAGS = frozenset(("avx512f", "avx512bw", "avx512dq", "avx512vl"))
INT8_FOLDER = "int8"
DATA_NAMES = ("data0", "data1")  # of token ids and lengths in an exported MXNet symbol


class Runtime(Protocol):
    """One way to run one classifier."""

    def scores(self, ids: np.ndarray, valid_length: np.ndarray) -> np.ndarray:
        """Score token ids [n, length], padded at the end: float32 [n, outputs].

        Raises `ValueError` for inputs longer than the model has positions.
        """


class MXNetRuntime:
    """A block of MXNet that takes token ids and lengths."""

    def __init__(self, network: Any, positions: int) -> None:
        """Take a network, which is hybridised."""
        self._network, self._positions = network, positions
        network.hybridize(static_alloc=True)

    def scores(self, ids: np.ndarray, valid_length: np.ndarray) -> np.ndarray:
        """See `Runtime`."""
        from mxnet import nd

        check_positions(ids, self._positions)
        arrays = (nd.array(one, dtype="float32") for one in (ids, valid_length))
        return self._network(*arrays).astype("float32", copy=False).asnumpy()


class OnnxRuntime:
    """A graph written by bort.inference.onnx_graph, in ONNX Runtime."""

    def __init__(self, model: bytes | str, threads: int | None = None) -> None:
        """Take the path of a file or its content."""
        self._session = onnx_session(model, threads)
        if [one.name for one in self._session.get_outputs()] != ["scores"]:
            raise UserError(f"{model!r:.200}: is no classifier; it has no output `scores` alone")
        self.notes = self._session.get_modelmeta().custom_metadata_map
        self._positions = int(self.notes["positions"])

    def scores(self, ids: np.ndarray, valid_length: np.ndarray) -> np.ndarray:
        """See `Runtime`."""
        check_positions(ids, self._positions)
        arrays = {"input_ids": ids, "valid_length": valid_length}
        feed = {name: np.asarray(array, np.int64) for name, array in arrays.items()}
        return self._session.run(["scores"], feed)[0]


def check_positions(ids: np.ndarray, positions: int) -> None:
    """Raise `ValueError` when token ids [n, length] are longer than a model's positions."""
    if ids.shape[1] > positions:
        raise ValueError(f"sequence length {ids.shape[1]}: the model has {positions} positions")


def onnx_session(model: bytes | str, threads: int | None = None) -> Any:
    """Load a file, or its content, into ONNX Runtime; raises `UserError` when it cannot be."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or cpu_threads()
    options.log_severity_level = 3  # no warnings
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no class
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{model!r:.200}: ONNX Runtime cannot load it ({reason})") from None


# ---- the processor -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def processor_flags() -> frozenset[str]:
    """Return the instruction sets of the first core, as Linux names them; empty if unknown."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "flags":
                return frozenset(value.split())
    return frozenset()


def available_runtimes() -> tuple[str, ...]:
    """Return those of `RUNTIMES` that this processor can run."""
    can = processor_flags() >= BFLOAT16_FLAGS
    return tuple(name for name in RUNTIMES if can or name != "mxnet-bfloat16")


def require_processor(name: str) -> None:
    """Raise `UserError` when this processor cannot run the named runtime."""
    if name not in available_runtimes():
        flags = ", ".join(sorted(BFLOAT16_FLAGS))
        raise UserError(
            f"runtime {name}: needs a processor with AVX-512 ({flags}); "
            f"use one of {', '.join(available_runtimes())}"
        )


# ---- from a network in memory --------------------------------------------------------------------


def runtime_of(network: Any, name: str, threads: int | None = None) -> Runtime:
    """Return a runtime of a BortClassifier; not mxnet-int8, which needs data to calibrate with.

    `threads` counts for ONNX Runtime alone: those of MXNet are fixed when it is imported.

    Raises `UserError` for a runtime that this processor cannot run.
    """
    require_processor(name)
    if name.startswith("onnx"):
        from bort.inference.onnx_graph import build

        precision = "int8" if name == "onnx-int8" else "float32"
        return OnnxRuntime(build(network, precision).SerializeToString(), threads)
    positions = network.bort.encoder._max_length
    return MXNetRuntime(_bfloat16(network) if name == "mxnet-bfloat16" else network, positions)


def _bfloat16(network: Any) -> Any:
    """Convert a network; the interleaved products of attention, which only know float32, stay."""
    import mxnet as mx
    from mxnet.contrib import amp

    network.hybridize()
    network(mx.nd.zeros((1, 2)), mx.nd.ones(1))  # its graph is made at the first call
    nodes = json.loads(network(*map(mx.sym.var, DATA_NAMES)).tojson())["nodes"]
    kept = [node["name"] for node in nodes if "interleaved" in node["op"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MXNet cannot tell the inputs' type: it is float32
        block = amp.convert_hybrid_block(
            network, target_dtype="bfloat16", excluded_sym_names=kept, ctx=mx.cpu()
        )
    block.collect_params().setattr("grad_req", "null")
    return block


# ---- from files ----------------------------------------------------------------------------------


def onnx_file(parameters: str) -> str:
    """Return where the ONNX file, in float32, of a .params file lies."""
    return f"{parameters.removesuffix('.params')}.onnx"


def int8_folder(parameters: str) -> str:
    """Return the folder of the int8 models of a .params file."""
    return os.path.join(os.path.dirname(parameters), INT8_FOLDER)


class Int8Files(NamedTuple):
    """The files of the int8 models in a folder; `name` is that of the .params file without it."""

    folder: str
    name: str

    @classmethod
    def of(cls, parameters: str, folder: str | None = None) -> Int8Files:
        """Return those of a .params file, in its own folder of int8 models or in another one."""
        name = os.path.basename(parameters).removesuffix(".params")
        return cls(folder or int8_folder(parameters), name)

    @property
    def onnx(self) -> str:
        """Return the graph for ONNX Runtime."""
        return os.path.join(self.folder, f"{self.name}.onnx")

    @property
    def mxnet(self) -> str:
        """Return what MXNet's two files, -symbol.json and -0000.params, begin with."""
        return os.path.join(self.folder, self.name)

    @property
    def record(self) -> str:
        """Return how the models were made, and what they say of the development set."""
        return os.path.join(self.folder, f"{self.name}.json")


def load_runtime(path: str, name: str, threads: int | None = None) -> Runtime:
    """Load a saved classifier (its .params file or folder, or a file of export_onnx.py) to run it.

    Raises `UserError` for a path that holds none, for a network that is no classifier, and for an
    int8 model that is absent or was made from other parameters.
    """
    if name not in RUNTIMES:
        raise UserError(f"runtime {name!r}: unknown; there are {', '.join(RUNTIMES)}")
    require_processor(name)
    if path.endswith(".onnx"):
        return _of_onnx_file(path, name, threads)
    from bort import saved_model

    found = parameter_file(path)
    model_config = saved_model.read_model_config(found)
    check_classifier(found, model_config)
    if name.endswith("int8"):
        return _int8(found, name, threads)
    if name == "onnx":
        return _float32(found, model_config, threads)
    return runtime_of(saved_model.load_model(found).network, name, threads)


def check_classifier(path: str, model_config: Any) -> None:
    """Raise `UserError` when a saved model is no classifier."""
    if not model_config.num_outputs:
        raise UserError(f"{path}: a {model_config.kind} network; fine-tune it on a task first")


def _of_onnx_file(path: str, name: str, threads: int | None) -> OnnxRuntime:
    if not name.startswith("onnx"):
        raise UserError(f"{path}: an ONNX file runs in onnx alone, not in {name}")
    if not os.path.exists(path):
        raise UserError(f"{path}: not found; scripts/export_onnx.py writes it")
    found = OnnxRuntime(path, threads)
    precision = "int8" if name == "onnx-int8" else "float32"
    if found.notes["precision"] != precision:
        raise UserError(f"{path}: is in {found.notes['precision']}, not in {precision}")
    return found


def _float32(parameters: str, model_config: Any, threads: int | None) -> OnnxRuntime:
    """Take the exported file while it is of these parameters, else make the graph anew."""
    if os.path.exists(onnx_file(parameters)):
        exported = OnnxRuntime(onnx_file(parameters), threads)
        if exported.notes.get("parameters_sha256") == sha256_of(parameters):
            return exported
    from bort.inference.onnx_graph import build, describe_file

    graph = build(describe_file(parameters, model_config))
    return OnnxRuntime(graph.SerializeToString(), threads)


def _int8(parameters: str, name: str, threads: int | None) -> Runtime:
    files = Int8Files.of(parameters)
    if not os.path.exists(files.record):
        raise UserError(f"{parameters}: has no int8 model yet; make it with scripts/quantize.py")
    noted = read_json(files.record)
    if noted["parameters_sha256"] != sha256_of(parameters):
        raise UserError(
            f"{files.record}: of other parameters than {parameters}; make the int8 model anew with "
            "scripts/quantize.py"
        )
    return int8_runtime(files, name, noted["positions"], threads)


def int8_runtime(
    files: Int8Files, name: str, positions: int, threads: int | None = None
) -> Runtime:
    """Load onnx-int8 or mxnet-int8 from its files."""
    if name == "onnx-int8":
        return OnnxRuntime(files.onnx, threads)
    return MXNetRuntime(symbol_block(files.mxnet), positions)


def symbol_block(prefix: str) -> Any:
    """Load a classifier that MXNet exported to `<prefix>-symbol.json` and `-0000.params`."""
    from mxnet.gluon import SymbolBlock

    files = f"{prefix}-symbol.json", f"{prefix}-0000.params"
    block = SymbolBlock.imports(files[0], list(DATA_NAMES))
    block.collect_params().setattr("grad_req", "null")
    block.collect_params().load(files[1], cast_dtype=True, dtype_source="saved")
    return block


def notes_of(path: str, model_config: Any) -> dict[str, str]:
    """Return what an ONNX file says of the saved model it was made from."""
    return {
        "parameters_sha256": sha256_of(path),
        "model config": json.dumps(dataclasses.asdict(model_config), ensure_ascii=False),
    }
