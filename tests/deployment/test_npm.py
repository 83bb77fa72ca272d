"""JavaScript packages: only the pinned ones, with or without npm."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from bort.deployment import npm
from bort.errors import UserError


def archive(path: Path, files: dict[str, bytes]) -> str:
    """Write a .tgz file as npm packs them; returns its SHA-512 in base64."""
    with tarfile.open(path, "w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """Pin two made-up packages instead of the real ones; returns the folder of their archives."""
    folder = tmp_path / "packages"
    folder.mkdir()
    pinned = []
    for package in npm.PACKAGES:
        content = {name: f"content of {name}".encode() for name in (*package.files, "other.js")}
        digest = archive(folder / package.archive, content)
        pinned.append(package._replace(sha512=digest))
    monkeypatch.setattr(npm, "PACKAGES", tuple(pinned))
    return folder


def fake_npm(folder: Path, monkeypatch: Any, *lines: str) -> None:
    """Put a program `npm` alone on the PATH."""
    folder.mkdir()
    program = folder / "npm"
    program.write_text("\n".join(["#!/bin/sh", "PATH=/usr/bin:/bin", *lines]))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def written(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_archives_are_named_as_npm_names_them():
    assert [package.archive for package in npm.PACKAGES] == [
        "huggingface-transformers-4.3.2.tgz",
        "onnxruntime-web-1.31.0-dev.20260914-8d85527a0.tgz",
    ]


def test_the_wanted_files_are_taken_from_a_folder(packages, tmp_path):
    npm.write_library(str(tmp_path / "library"), str(packages))
    files = {new: old for package in npm.PACKAGES for old, new in package.files.items()}
    assert written(tmp_path / "library") == {new: f"content of {old}" for new, old in files.items()}


def test_npm_downloads_the_pinned_versions(packages, tmp_path, monkeypatch):
    copied, asked = f"cp {packages}/*.tgz .", f'echo "$@" > {tmp_path}/asked'
    fake_npm(tmp_path / "bin", monkeypatch, asked, copied)
    npm.write_library(str(tmp_path / "library"), None)
    assert len(written(tmp_path / "library")) == 5
    words = (tmp_path / "asked").read_text().split()
    assert words[0] == "pack"
    assert "--ignore-scripts" in words
    assert words[-2:] == [
        "@huggingface/transformers@4.3.2",
        "onnxruntime-web@1.31.0-dev.20260914-8d85527a0",
    ]


def test_a_changed_archive_is_refused(packages, tmp_path):
    path = packages / npm.PACKAGES[1].archive
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"its SHA-512 is not that of onnxruntime-web@.*npm pack"):
        npm.write_library(str(tmp_path / "library"), str(packages))


def test_a_missing_archive_is_named(packages, tmp_path):
    (packages / npm.PACKAGES[0].archive).unlink()
    with pytest.raises(UserError, match=r"4.3.2.tgz: cannot be read .*npm pack @huggingface"):
        npm.write_library(str(tmp_path / "library"), str(packages))


def test_without_npm_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"is not installed: install Node.js, or run `npm pack @hu"):
        npm.write_library(str(tmp_path / "library"), None)
    assert not list(tmp_path.iterdir())


def test_a_failure_of_npm_is_a_one_line_error(tmp_path, monkeypatch):
    failing = ['echo "npm error code ENOTFOUND" >&2', 'echo "npm error more" >&2', "exit 1"]
    fake_npm(tmp_path / "bin", monkeypatch, *failing)
    with pytest.raises(UserError, match=r"\(npm error code ENOTFOUND\): run `npm pack ") as error:
        npm.write_library(str(tmp_path / "library"), None)
    assert "--packages" in str(error.value)
    assert "\n" not in str(error.value)
