"""Files of arrays: cut by a full disk, and hostile ones, which cost neither memory nor a crash."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bort.arrays import map_npy, read_npz, write_npz
from bort.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("size", [0, 100, 4200, 8300, 8700])
def test_arrays_that_a_full_disk_cuts_anywhere_leave_nothing(tmp_path, size):
    arrays = {"a": np.arange(1000), "b": np.zeros((3, 5), np.float16)}
    write_npz(str(tmp_path / "whole.npz"), arrays)
    with np.load(tmp_path / "whole.npz", allow_pickle=False) as found:
        assert {name: found[name].tolist() for name in found} == {
            name: array.tolist() for name, array in arrays.items()
        }
    # Also what is printed as the program ends.
    program = f"""
import resource
import numpy as np
from bort.arrays import write_npz
from bort.errors import UserError

resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
try:
    write_npz({str(tmp_path / "cut.npz")!r}, {{"a": np.arange(1000), "b": np.zeros(30)}})
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{tmp_path / 'cut.npz'}: cannot be written (File too large)\n"
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.npz"]


ARRAYS = {
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 4), np.float16),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "bool": np.array([True, False]),
    "bytes": np.arange(5, dtype=np.uint8),
    "a/b": np.arange(3, dtype=np.int32),
}


def test_what_is_written_is_read(tmp_path):
    path = str(tmp_path / "a.npz")
    for write in (write_npz, lambda path, arrays: np.savez(path, **arrays)):
        write(path, ARRAYS)
        found = read_npz(path)
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    for name, array in ARRAYS.items():
        np.save(tmp_path / "one.npy", array)
        np.testing.assert_array_equal(map_npy(str(tmp_path / "one.npy")), array, err_msg=name)


def npy(header: str, content: bytes = b"", version: int = 1) -> bytes:
    """Return a .npy file with any header."""
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + content


def described(descr: str = "'<f4'", shape: str = "(2,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


# Each crashes NumPy's own reader, exhausts the memory, or runs or builds what is no array.
HOSTILE = {
    "terabytes": npy(described(shape="(1099511627776,)"), bytes(8)),
    "overflow": npy(described(shape="(4294967296, 4294967296, 4)"), bytes(8)),
    "negative": npy(described(shape="(-2,)"), bytes(8)),
    "a float": npy(described(shape="(2.0,)"), bytes(8)),
    "33 axes": npy(described(shape=f"({'1, ' * 33})"), bytes(4)),
    "pickle": npy(described("'|O'"), b"cos\nsystem\n(S'true'\ntR."),
    "record": npy(described("[('a', '<f4'), ('b', '|O')]"), bytes(8)),
    "gigabyte text": npy(described("'<U1000000000'", "(1,)"), bytes(8)),
    "huge type": npy(described("'<f99999999999'"), bytes(8)),
    "nested": npy("(" * 60_000, bytes(8)),
    "signs": npy("-" * 60_000 + "1", bytes(8)),
    "call": npy("__import__('os').abort()", bytes(8)),
    "length of 4 GB": b"\x93NUMPY\x02\x00" + b"\xff" * 4 + described().encode(),
    "version 9": npy(described(), bytes(8), 9),
    "too short": npy(described(), bytes(7)),
    "too long": npy(described(), bytes(9)),
    "nothing": b"",
}


def zipped(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("weight.npy", content)
    return buffer.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, name):
    (tmp_path / "a.npz").write_bytes(zipped(HOSTILE[name]))
    with pytest.raises(UserError, match=r"a\.npz: cannot be read as arrays") as refused:
        read_npz(str(tmp_path / "a.npz"))
    assert len(str(refused.value)) < 500
    (tmp_path / "a.npy").write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"array|size|magic"):
        map_npy(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_arrays_are_refused_before_they_are_inflated(tmp_path, compression):
    shape = f"({1 << 22},)"
    bomb = zipped(npy(described(shape=shape), bytes(4 << 22)), compression)
    assert len(bomb) < 1 << 17
    (tmp_path / "a.npz").write_bytes(bomb)
    with pytest.raises(UserError, match=r"weight\.npy is compressed"):
        read_npz(str(tmp_path / "a.npz"))


def test_a_size_that_the_archive_only_claims_is_refused(tmp_path):
    content = bytearray(zipped(npy(described(), bytes(8))))
    place = content.rindex(b"PK\1\2") + 20
    content[place : place + 8] = struct.pack("<II", 0xFFFF0000, 0xFFFF0000)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as arrays"):
        read_npz(str(tmp_path / "a.npz"))


def test_every_reader_of_arrays_takes_the_careful_one():
    """NumPy's own readers are used nowhere else."""
    names: list[Any] = [*(ROOT / "bort").rglob("*.py"), *(ROOT / "data").rglob("*.py")]
    names += (ROOT / "scripts").rglob("*.py")
    for path in names:
        if path.name != "arrays.py":
            content = path.read_text(encoding="utf-8")
            assert not re.search(r"np\.load\(|open_memmap", content), path
