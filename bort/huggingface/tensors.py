"""The weights of a Hugging Face folder as NumPy arrays: safetensors, sharded or not, or torch's.

Needs safetensors, and torch for pytorch_model.bin. No code of a file is run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Mapping

import numpy as np

from bort.errors import UserError, escaped, quoted, reasons
from bort.files import MODEL_BYTES, is_lfs_pointer, open_regular, read_json_as
from bort.sums import check_sum
from bort.types import JSONMapping

WEIGHTS, INDEX, TORCH_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
# Types of safetensors; bfloat16, which NumPy lacks, is read as the upper half of float32.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
_SAFE_TORCH = (2, 6)  # older versions run code hidden in files that are loaded with weights_only


@dataclass(frozen=True)
class _Index:
    """The index of sharded weights. weight_map: {tensor: file in the same folder}."""

    weight_map: Mapping[str, str]


def read_tensors(folder: str) -> dict[str, np.ndarray]:
    """Return the tensors of a folder by name.

    Raises `UserError` when there are none, when a file is damaged or has another sum than in
    SHA256SUMS, and for a type that is neither a float of 16 to 64 bits nor an integer.
    """
    if os.path.exists(os.path.join(folder, WEIGHTS)):
        return _read_safetensors(os.path.join(folder, WEIGHTS))
    if os.path.exists(os.path.join(folder, INDEX)):
        return _read_shards(folder)
    if os.path.exists(os.path.join(folder, TORCH_WEIGHTS)):
        return _read_torch(os.path.join(folder, TORCH_WEIGHTS))
    if os.path.exists(os.path.join(folder, f"{TORCH_WEIGHTS}.index.json")):
        raise UserError(
            f"{TORCH_WEIGHTS} is in shards, which are not read; load the model in transformers and "
            f"save it again, by save_pretrained, as {WEIGHTS}"
        )
    raise UserError(f"holds neither {WEIGHTS} nor {TORCH_WEIGHTS}")


def refuse_lfs_pointer(path: str) -> None:
    """Raise `UserError` when Git LFS left a pointer in place of a file."""
    if is_lfs_pointer(path):
        raise UserError(
            f"{os.path.basename(path)}: is a Git LFS pointer, not the file; run `git lfs pull`"
        )


def _read_shards(folder: str) -> dict[str, np.ndarray]:
    check_sum(os.path.join(folder, INDEX))
    index = read_json_as(os.path.join(folder, INDEX), _Index)
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(set(index.weight_map.values())):
        if name != os.path.basename(name):
            raise UserError(f"{INDEX}: {quoted(name)} is not a file of the folder")
        arrays |= _read_safetensors(os.path.join(folder, name))
    if missing := index.weight_map.keys() - arrays.keys():
        raise UserError(f"{INDEX}: no file has the tensor {quoted(min(missing))}")
    return arrays


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    refuse_lfs_pointer(path)
    check_sum(path)
    name = os.path.basename(path)
    try:
        with open_regular(path, MODEL_BYTES) as file:
            tensors = deserialize(file.read())
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise UserError(f"{name}: cannot be read ({escaped(str(error))})") from None
    return {key: _array(f"{name}: {quoted(key)}", tensor) for key, tensor in tensors}


def _array(where: str, tensor: JSONMapping) -> np.ndarray:
    dtype, shape, data = tensor["dtype"], tensor["shape"], tensor["data"]
    if dtype == "BF16":
        upper = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return upper.view(np.float32).reshape(shape)
    if dtype not in _DTYPES:
        raise UserError(f"{where} has dtype {dtype}; save it as float32")
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


def _read_torch(path: str) -> dict[str, np.ndarray]:
    """Read pytorch_model.bin by torch's loader that runs no code of the file."""
    name = os.path.basename(path)
    refuse_lfs_pointer(path)
    check_sum(path)
    try:
        import torch
    except ImportError:
        raise UserError(
            f"has no {WEIGHTS}: {name} needs torch: pip install -e '.[huggingface]'"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < _SAFE_TORCH:
        raise UserError(f"{name}: torch {torch.__version__} is not safe for it; install 2.6")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises exceptions of many classes for damaged files
        raise UserError(f"{name}: cannot be read as weights alone ({reasons(error)[0]})") from None
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{name}: holds no weights: expected a dictionary of tensors")
    for key, value in loaded.items():
        if not (isinstance(key, str) and isinstance(value, torch.Tensor)):
            raise UserError(
                f"{name}: {quoted(key)} is a {type(value).__name__}, expected a tensor; save the "
                "model's state_dict() alone"
            )
    return {key: value.float().numpy() for key, value in loaded.items()}
