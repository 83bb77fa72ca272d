"""Parameter files: which one a path means, and its arrays without MXNet, whose format it is."""

from __future__ import annotations

import glob
import math
import os

import numpy as np

from bort import checkpoint
from bort.errors import UserError

# What MXNet calls its types by.
_TYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8"}
_FILE, _ARRAY, _DENSE = 0x112, 0xF993FAC9, 0


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
