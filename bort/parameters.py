"""Reading and writing parameter files, with MXNet and, for read-only use, without it."""

from __future__ import annotations

import errno
import glob
import math
import os
import re
from contextlib import contextmanager
from typing import Iterable, Iterator, Sequence, Union

import numpy as np

from bort import checkpoint
from bort.errors import UserError
from bort.files import MODEL_BYTES, open_regular
from bort.sums import check_sum
from bort.types import Block, Parameter

# The numbers that stand for dtypes in the format.
_DTYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8"}
_FILE, _ARRAY, _DENSE = 0x112, 0xF993FAC9, 0
_HUGGING_FACE = (
    "a model of Hugging Face; convert its folder first, with scripts/convert_from_huggingface.py"
)
# The matrix that embedding and decoder share has two names, and a file may hold it under either.
EMBEDDING, PROJECTION = "word_embed.0.weight", "decoder.3.weight"


def parameter_file(path: Union[str, os.PathLike[str]]) -> str:
    """Return the parameter file of a path: a file, a checkpoint, or the folder of a run or model.

    Raises `UserError` when there is none or several.
    """
    path = os.fspath(path)
    for candidate in (path, checkpoint.newest_path(path) or path):
        model = os.path.join(candidate, checkpoint.MODEL)
        if os.path.isfile(model) and os.path.isfile(os.path.join(candidate, checkpoint.STATE)):
            return checkpoint.load(candidate).model_path
    if os.path.isfile(path):
        if path.endswith(".onnx"):
            raise UserError(
                f"{path}: an ONNX file, not parameters; give the model that it was made from, "
                "whose runtimes read a .onnx file of the same name beside its .params file"
            )
        if path.endswith((".safetensors", ".bin")):
            raise UserError(f"{path}: {_HUGGING_FACE}")
        if path.endswith(".json"):
            raise UserError(f"{path}: describes a model; give its .params file or their folder")
        return path
    found, *others = (
        sorted(glob.glob(os.path.join(glob.escape(path), pattern)))
        for pattern in ("*.params", "*.safetensors", "pytorch_model*.bin")
    )
    if not os.path.exists(path):
        raise UserError(f"{path}: not found")
    if not found and any(others):
        raise UserError(f"{path}: {_HUGGING_FACE}")
    if not found:
        below = sorted(glob.glob(os.path.join(glob.escape(path), "*", "*.params")))
        cure = os.path.dirname(below[0]) if below else "a model, a checkpoint or a run"
        raise UserError(f"{path}: holds no parameters (*.params); name {cure}")
    if len(found) > 1:
        names = ", ".join(map(os.path.basename, found))
        raise UserError(f"{path}: holds several parameter files ({names}); name one of them")
    return found[0]


def fixed_parameter_file(path: str) -> str:
    """Return the parameter file of a path under a name that stays while a run trains.

    `checkpoint_last` and other links to its folder are followed. A link to the file itself is not:
    what describes the model is beside the link.

    Raises `UserError` as `parameter_file`.
    """
    folder, name = os.path.split(parameter_file(path))
    while os.path.islink(folder):
        folder = os.path.join(os.path.dirname(folder), os.readlink(folder))
    return os.path.join(folder, name)


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name, read-only and memory-mapped.

    Raises `UserError` when MXNet 1.5 or later did not write it.
    """
    try:
        with open_regular(path, MODEL_BYTES) as file:
            content = np.asarray(np.memmap(file, np.uint8, "r"))
        return _Reader(content).arrays()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as a parameter file ({error})") from None


class _Reader:
    """Reads the bytes of a parameter file from start to end."""

    def __init__(self, content: np.ndarray) -> None:
        self._content, self._offset = content, 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name; raises `ValueError` or `KeyError` for another format."""
        magic, _, count = self._take("<u8", 3)
        if magic != _FILE:
            raise ValueError("another format")
        arrays = [self._array() for _ in range(count)]
        names = [self._name() for _ in range(self._number("<u8"))]
        if len(names) != len(arrays):
            raise ValueError("not as many names as arrays")
        if len(set(names)) != len(names):
            raise ValueError("a name is repeated")
        if self._offset != len(self._content):
            raise ValueError("bytes follow the last name")
        return dict(zip(names, arrays))

    def _name(self) -> str:
        return self._take("u1", self._number("<u8")).tobytes().decode()

    def _array(self) -> np.ndarray:
        magic, storage = self._number("<u4"), self._number("<i4")
        if (magic, storage) != (_ARRAY, _DENSE):
            raise ValueError("an array of another format")
        dimensions = self._number("<i4")
        shape = self._take("<i8", dimensions).tolist()
        if min(shape, default=0) < 0:
            raise ValueError("an array of negative size")
        *_device, dtype = self._take("<i4", 3).tolist()
        if dtype not in _DTYPES:
            raise ValueError(f"an array of dtype {dtype}")
        return self._take(_DTYPES[dtype], math.prod(shape)).reshape(shape)

    def _number(self, dtype: str) -> int:
        return int(self._take(dtype, 1)[0])

    def _take(self, dtype: str, count: int) -> np.ndarray:
        start, size = self._offset, int(count) * np.dtype(dtype).itemsize
        self._offset += size
        if size < 0 or self._offset > len(self._content):
            raise ValueError("it is truncated")
        return self._content[start : self._offset].view(dtype)


def save_parameters(model: Block, path: str, deduplicate: bool = True) -> None:
    """Write the parameters in MXNet's format, the tied matrix once or under both its names.

    Raises `OSError` when the disk is full: MXNet may not report it.
    """
    with open(path, "wb") as file, mxnet_writes(path):
        # Not by its name: MXNet opens names of UTF-8 only, and a folder may have another one.
        model.save_parameters(f"/proc/self/fd/{file.fileno()}", deduplicate=deduplicate)
    try:
        read_arrays(path)
    except UserError:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from None


@contextmanager
def mxnet_writes(path: str) -> Iterator[None]:
    """Raise `OSError` where MXNet writes `path` and fails: its own error is a stack."""
    from mxnet import MXNetError

    try:
        yield
    except MXNetError as error:
        opened = re.search(r'Open "[^"]*": (.+)', str(error))
        if not opened and "fwrite" not in str(error):
            raise
        reason = opened[1].strip() if opened else os.strerror(errno.ENOSPC)
        codes = {os.strerror(code): code for code in errno.errorcode}
        raise OSError(codes.get(reason, errno.EIO), reason, path) from None


def load_parameters(model: Block, path: str, ignore_prefixes: Sequence[str] = ()) -> None:
    """Load a parameter file by name, ours or the released one; float16 is cast.

    The tied matrix may be stored under one of its names or under both. Parameters of the file that
    begin with one of `ignore_prefixes` are not loaded.

    The file is read by `read_arrays`, not by MXNet, which a damaged file can crash.

    Raises `UserError` for an unreadable file, for one that is not the one whose SHA-256 is in a
    SHA256SUMS beside it, and for missing, surplus or misshapen parameters.
    """
    from mxnet import nd

    from bort import bfloat16

    check_sum(path)
    stored = read_arrays(path)
    if PROJECTION in stored:
        stored.setdefault(EMBEDDING, stored[PROJECTION])
    stored = {n: v for n, v in stored.items() if not n.startswith(tuple(ignore_prefixes))}
    tied = _tied_names(model)
    missing = [names[0] for _, names in tied if not stored.keys() & set(names)]
    surplus = stored.keys() - {name for _, names in tied for name in names}
    if missing and any(name.startswith("bort.") for name in surplus):
        raise UserError(
            f"{path}: a fine-tuned classifier, not a pretrained model; finetune_classifier.py "
            "--model_parameters trains it further, on a task that has its labels"
        )
    if missing or surplus:
        listing = [f"missing {_listing(missing)}"] * bool(missing)
        listing += [f"surplus {_listing(surplus)}"] * bool(surplus)
        raise UserError(f"{path}: parameters do not fit this model: {'; '.join(listing)}")
    values = [_stored_value(path, stored, parameter, names) for parameter, names in tied]
    for (parameter, _), value in zip(tied, values):
        parameter.set_data(nd.array(value, dtype=value.dtype))
    bfloat16.refresh(parameter for parameter, _ in tied)


def check_finite(path: str, network: Block) -> None:
    """Raise `UserError` when a parameter of a network is NaN or infinite."""
    parameters = network._collect_params_with_prefix().items()
    check_finite_arrays(path, ((name, value.data().asnumpy()) for name, value in parameters))


def check_finite_arrays(path: str, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Raise `UserError` for the first of (name, array) that has a NaN or an infinity."""
    for name, array in arrays:
        if not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name} has values that are NaN or infinite: the file is damaged, or the "
                "training diverged"
            )


def _tied_names(model: Block) -> list[tuple[Parameter, list[str]]]:
    """Return each distinct parameter with all names it has in a file."""
    tied: dict[int, tuple[Parameter, list[str]]] = {}
    for name, parameter in model._collect_params_with_prefix().items():
        tied.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(tied.values())


def _stored_value(
    path: str, stored: dict[str, np.ndarray], parameter: Parameter, names: list[str]
) -> np.ndarray:
    values = [stored[name] for name in names if name in stored]
    for value in values:
        if value.shape != parameter.shape:
            raise UserError(
                f"{path}: {names[0]} has shape {value.shape}, the model {parameter.shape}; "
                "is it of another shape or vocabulary?"
            )
    first, *others = values
    if not all(np.array_equal(first, other) for other in others):
        raise UserError(f"{path}: {' and '.join(names)} are tied but differ in the file")
    return first.astype(np.dtype(parameter.dtype), copy=False)


def _listing(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
