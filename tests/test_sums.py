"""SHA256SUMS: files in subfolders, and lists that name files elsewhere."""

from __future__ import annotations

import subprocess

import pytest

from bort.errors import UserError
from bort.files import sha256_of
from bort.sums import SUMS, check_sums, write_sums


def test_files_in_subfolders_are_listed_as_sha256sum_reads_them(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "config.json").write_text("{}")
    model = tmp_path / "onnx" / "model.onnx"
    model.write_bytes(b"graph")
    write_sums(str(tmp_path))
    check_sums(str(tmp_path))
    subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, check=True, capture_output=True)
    model.write_bytes(b"grapf")
    with pytest.raises(UserError, match=r"onnx/model.onnx: its SHA-256 is not that in SHA256SUMS"):
        check_sums(str(tmp_path))


def test_a_list_from_elsewhere_names_no_file_outside(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name in ("../secret", str(secret), "a/../../secret", ".."):
        (folder / SUMS).write_text(f"{sha256_of(str(secret))}  {name}\n")
        with pytest.raises(UserError, match="its SHA-256 is not that in SHA256SUMS"):
            check_sums(str(folder))
