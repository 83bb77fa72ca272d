"""NumPy's .npz and .npy files: written atomically, read without pickle, whatever they hold.

NumPy's own readers evaluate a header as Python, allocate what it declares, and inflate compressed
members of any size; a file from elsewhere can crash them or exhaust memory.
"""

from __future__ import annotations

import lzma
import math
import os
import re
import struct
import zipfile
import zlib
from typing import IO, Any, Mapping

import numpy as np

from bort.errors import UserError, reasons
from bort.files import atomic_write, open_regular

# The header that NumPy and the writers here give an array of numbers.
_HEADER = re.compile(
    rb"\{'descr': '([<|][biuf][1248])', 'fortran_order': (False|True), "
    rb"'shape': \(((?:[0-9]{1,18},? ?){0,32})\),? ?\} *\n"
)
# What zipfile raises for a damaged archive: found by flipping bits and cutting files.
# NotImplementedError, for an unknown compression, is a RuntimeError.
_DAMAGED = (
    *(EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile),
)


def write_npz(path: str, arrays: Mapping[str, Any]) -> None:
    """Write arrays by name as an .npz file under `path`, atomically and without pickle.

    As NumPy's savez, which leaves its archive open when a write fails: that complains later.
    """
    with atomic_write(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def read_npz(path: str) -> dict[str, np.ndarray]:
    """Return the arrays of an uncompressed .npz file by name, read-only.

    Raises `FileNotFoundError`, and `UserError` when it cannot be read or holds other than numbers.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return {
                member.filename.removesuffix(".npy"): _read_member(archive, member)
                for member in archive.infolist()
            }
    except FileNotFoundError:
        raise
    except (OSError, *_DAMAGED) as error:
        raise UserError(f"{path}: cannot be read as arrays ({reasons(error)[0]})") from None


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename[:80]} is compressed")
    with archive.open(member) as file:
        dtype, shape, fortran = _read_header(file)
        content = file.read()
    if len(content) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{member.filename[:80]} has another size than its header says")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def map_npy(path: str) -> np.ndarray:
    """Map a .npy file into memory, read-only.

    A plain array: slices of NumPy's memmap take ten times as long.
    Raises `OSError`, and `ValueError` when it is not such a file, or has another size.
    """
    with open_regular(path) as file:
        dtype, shape, fortran = _read_header(file)
        start = file.tell()
        size = dtype.itemsize * math.prod(shape)
        if os.fstat(file.fileno()).st_size - start != size:
            raise ValueError("it has another size than its header says")
        if not size:
            return np.empty(shape, dtype)
        mapped: Any = np.memmap(file, dtype, "r", start, shape, "F" if fortran else "C")
    return np.asarray(mapped).view(np.ndarray)


def _read_header(file: IO[bytes]) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Return type, shape and whether the order is Fortran's; raises `ValueError` for others."""
    version = np.lib.format.read_magic(file)
    length = file.read(2 if version == (1, 0) else 4)
    size = int.from_bytes(length, "little")
    described = _HEADER.fullmatch(file.read(min(size, 1 << 16)))
    if version not in ((1, 0), (2, 0)) or described is None:
        raise ValueError("not an array of numbers in NumPy's format")
    shape = tuple(int(part) for part in described[3].replace(b",", b" ").split())
    return np.dtype(described[1].decode()), shape, described[2] == b"True"
