"""Reading and writing parameter files, with MXNet and, for read-only use, without it."""

from __future__ import annotations

import glob
import math
import os
from typing import Any, Sequence

import numpy as np

from bort import checkpoint
from bort.errors import UserError

# What MXNet calls its types by.
_TYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8"}
_FILE, _ARRAY, _DENSE = 0x112, 0xF993FAC9, 0
# The matrix that embedding and decoder share has two names, and a file may hold it under either.
EMBEDDING, PROJECTION = "word_embed.0.weight", "decoder.3.weight"


def parameter_file(path: str) -> str:
    """Find the parameter file that a path given for a teacher or a student means.

    Raises `UserError` when nothing is there or several files are.
    """
    for candidate in (path, os.path.join(path, checkpoint.LAST)):
        model = os.path.join(candidate, checkpoint.MODEL)
        if os.path.isfile(model) and os.path.isfile(os.path.join(candidate, checkpoint.STATE)):
            return checkpoint.load(candidate).model_path
    if os.path.isfile(path):
        return path
    found = sorted(glob.glob(os.path.join(glob.escape(path), "*.params")))
    if not os.path.exists(path):
        raise UserError(f"{path}: not found")
    if not found:
        raise UserError(f"{path}: holds no parameters (*.params)")
    if len(found) > 1:
        names = ", ".join(os.path.basename(one) for one in found)
        raise UserError(f"{path}: holds several parameter files ({names}); name one of them")
    return found[0]


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Return the arrays of a file by their names, read-only; they stay on the disk until used.

    Raises `UserError` when MXNet 1.5 or later did not write it.
    """
    try:
        return _Reader(np.asarray(np.memmap(path, np.uint8, "r"))).arrays()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as a parameter file ({error})") from None


class _Reader:
    """Reads the bytes of a parameter file from their beginning to their end."""

    def __init__(self, content: np.ndarray) -> None:
        self._content, self._place = content, 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name; raises `ValueError` or `KeyError` for another format."""
        kind, _, count = self._take("<u8", 3)
        if kind != _FILE:
            raise ValueError("another format")
        arrays = [self._array() for _ in range(count)]
        names = [self._take("u1", self._one("<u8")).tobytes() for _ in range(self._one("<u8"))]
        if len(names) != len(arrays):
            raise ValueError("not as many names as arrays")
        return {name.decode(): array for name, array in zip(names, arrays)}

    def _array(self) -> np.ndarray:
        kind, storage, dimensions = self._one("<u4"), self._one("<i4"), self._one("<i4")
        if (kind, storage) != (_ARRAY, _DENSE):
            raise ValueError("an array of another format")
        shape = self._take("<i8", dimensions).tolist()
        if min(shape, default=0) < 0:
            raise ValueError("an array of negative size")
        _device, _number, number = self._take("<i4", 3)
        return self._take(_TYPES[int(number)], math.prod(shape)).reshape(shape)

    def _one(self, kind: str) -> int:
        return int(self._take(kind, 1)[0])

    def _take(self, kind: str, count: int) -> np.ndarray:
        start, size = self._place, count * np.dtype(kind).itemsize
        self._place += size
        if size < 0 or self._place > len(self._content):
            raise ValueError("it ends too soon")
        return self._content[start : self._place].view(kind)


def save_parameters(model: Any, path: str) -> None:
    """Write the parameters in MXNet's format, the tied embedding matrix once."""
    model.save_parameters(path, deduplicate=True)


def load_parameters(model: Any, path: str, ignore_prefixes: Sequence[str] = ()) -> None:
    """Load a parameter file by name: ours or the released one; float16 is cast.

    The tied matrix may be stored under one of its names or under both. Parameters of the file that
    begin with one of `ignore_prefixes` are passed over.

    Raises `UserError` for an unreadable file and for missing, surplus or misshapen parameters.
    """
    import mxnet as mx

    try:
        stored = mx.nd.load(path)
    except (mx.MXNetError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: cannot be read as a parameter file ({reason})") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: holds arrays without names; expected a Gluon parameter file")
    if PROJECTION in stored:
        stored.setdefault(EMBEDDING, stored[PROJECTION])
    stored = {n: v for n, v in stored.items() if not n.startswith(tuple(ignore_prefixes))}
    tied = _tied_names(model)
    missing = [names[0] for _, names in tied if not stored.keys() & set(names)]
    surplus = stored.keys() - {name for _, names in tied for name in names}
    if missing or surplus:
        listing = [f"missing {_listing(missing)}"] * bool(missing)
        listing += [f"surplus {_listing(surplus)}"] * bool(surplus)
        raise UserError(f"{path}: parameters do not fit this model: {'; '.join(listing)}")
    values = [_stored_value(path, stored, parameter, names) for parameter, names in tied]
    for (parameter, _), value in zip(tied, values):
        parameter.set_data(value)


def _tied_names(model: Any) -> list[tuple[Any, list[str]]]:
    """Return each distinct parameter with all names it has in a file."""
    tied: dict[int, tuple[Any, list[str]]] = {}
    for name, parameter in model._collect_params_with_prefix().items():
        tied.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(tied.values())


def _stored_value(path: str, stored: dict[str, Any], parameter: Any, names: list[str]) -> Any:
    values = [stored[name] for name in names if name in stored]
    for value in values:
        if value.shape != parameter.shape:
            raise UserError(
                f"{path}: {names[0]} has shape {value.shape}, the model {parameter.shape}; "
                "is it of another shape or vocabulary?"
            )
    first, *others = values
    if any((first != other).max().asscalar() for other in others):
        raise UserError(f"{path}: {' and '.join(names)} are tied but differ in the file")
    return first.astype(parameter.dtype, copy=False)


def _listing(names: Any, most: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
