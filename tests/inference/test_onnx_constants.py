"""Large constants: aligned in the file, the same for every reader, and mapped into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from bort.errors import UserError
from bort.inference.onnx_constants import ALIGNMENT, LARGE_BYTES, align_constants, separate
from bort.inference.onnx_file import onnx_session, read_separated
from bort.inference.protobuf import fields, integer, message

# Sizes in bytes: around the limit, and where the length of a constant takes one byte more.
SIZES = (
    4,
    LARGE_BYTES,
    60,
    LARGE_BYTES - 4,
    84,
    16200,
    16300,
    64,
    LARGE_BYTES + 4,
    3 * LARGE_BYTES,
)


def model_of(sizes: Any, name: str = "constants") -> Any:
    """Return a model that adds up constants of so many bytes each."""
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(size // 4).astype(np.float32) for size in sizes]
    constants = [numpy_helper.from_array(array, f"c{i}") for i, array in enumerate(arrays)]
    nodes = [helper.make_node("ReduceSum", [c.name], [f"s{c.name}"]) for c in constants]
    nodes.append(helper.make_node("Sum", [f"s{c.name}" for c in constants], ["sum"]))
    output = helper.make_tensor_value_info("sum", 1, [1])
    graph = helper.make_graph(nodes, name, [], [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def places_of(content: bytes) -> list[tuple[int, int]]:
    """Return the place and size of the data of each constant."""
    (graph,) = (field for field in fields(content) if field.number == 7)
    constants = (field for field in fields(content, graph.start, graph.end) if field.number == 5)
    return [
        (data.start, data.end - data.start)
        for constant in constants
        for data in fields(content, constant.start, constant.end)
        if data.number == 9
    ]


@pytest.mark.parametrize("shift", range(0, 70, 7))
def test_large_constants_are_aligned_and_no_value_changes(shift):
    model = model_of(SIZES, "n" * (shift + 1))
    before = [numpy_helper.to_array(constant) for constant in model.graph.initializer]
    align_constants(model)
    content = model.SerializeToString()
    places = places_of(content)
    assert [size for _, size in places] == list(SIZES)
    assert all(place % ALIGNMENT == 0 for place, size in places if size >= LARGE_BYTES)
    onnx.checker.check_model(content, full_check=True)
    after = [numpy_helper.to_array(c) for c in onnx.load_from_string(content).graph.initializer]
    for one, other in zip(before, after):
        np.testing.assert_array_equal(one, other)


def test_other_readers_find_the_constants_in_the_file(tmp_path):
    model = model_of(SIZES)
    align_constants(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    separated = read_separated(str(path))
    assert separated
    content = separated.with_external_data(path.name)
    large = sum(size for size in SIZES if size >= LARGE_BYTES)
    assert len(content) < path.stat().st_size - large + 200 * len(SIZES)
    found = onnx.load_from_string(content)
    outside = [constant.name for constant in found.graph.initializer if constant.data_location]
    assert outside == [f"c{i}" for i, size in enumerate(SIZES) if size >= LARGE_BYTES]
    load_external_data_for_model(found, str(tmp_path))
    values = {one.name: numpy_helper.to_array(one) for one in found.graph.initializer}
    assert len(values) == len(SIZES)
    for one in model.graph.initializer:
        np.testing.assert_array_equal(values[one.name], numpy_helper.to_array(one))
    expected = sum(numpy_helper.to_array(one).sum() for one in model.graph.initializer)
    assert onnx_session(str(path), 1).run(None, {})[0] == pytest.approx(expected, abs=1e-3)
    link = tmp_path / "links" / "best.onnx"  # as git-annex and caches have files
    link.parent.mkdir()
    link.symlink_to(path)
    assert onnx_session(str(link), 1).run(None, {})[0] == pytest.approx(expected, abs=1e-3)


def test_constants_that_are_not_aligned_stay_in_the_graph(tmp_path):
    model = model_of((LARGE_BYTES, LARGE_BYTES))
    path = tmp_path / "earlier.onnx"
    path.write_bytes(model.SerializeToString())
    assert read_separated(str(path)) is None
    expected = sum(numpy_helper.to_array(one).sum() for one in model.graph.initializer)
    assert onnx_session(str(path), 1).run(None, {})[0] == pytest.approx(expected, abs=1e-3)
    assert all(place % ALIGNMENT for place, _ in places_of(model.SerializeToString()))
    separated = separate(model.SerializeToString())
    assert not separated.constants
    for found in (separated.with_external_data("model.onnx"), separated.with_inputs()):
        assert onnx.load_from_string(found) == model


def test_a_constant_cannot_name_another_file():
    model = model_of((LARGE_BYTES,))
    other = message(13, message(1, b"location"), message(2, b"/etc/passwd"))
    model.graph.initializer[0].MergeFromString(other + integer(14, 1))
    align_constants(model)
    content = separate(model.SerializeToString()).with_external_data("model.onnx")
    assert b"passwd" not in content
    (constant,) = onnx.load_from_string(content).graph.initializer
    assert constant.external_data[0].value == "model.onnx"


@pytest.mark.parametrize("name", ["a b", "ü", "100%"])
def test_a_file_may_have_any_name(tmp_path, name):
    model = model_of((LARGE_BYTES,))
    align_constants(model)
    path = Path(tmp_path, name, f"{name}.onnx")
    path.parent.mkdir()
    path.write_bytes(model.SerializeToString())
    expected = numpy_helper.to_array(model.graph.initializer[0]).sum()
    assert onnx_session(str(path), 1).run(None, {})[0] == pytest.approx(expected, abs=1e-3)


def test_a_path_that_is_not_utf8_is_one_line(tmp_path):
    path = tmp_path / "\udcff.onnx"
    path.write_bytes(model_of((4,)).SerializeToString())
    with pytest.raises(UserError, match="its path is not UTF-8, which ONNX Runtime needs"):
        onnx_session(str(path), 1)


def test_inputs_take_the_place_of_the_constants(tmp_path):
    model = model_of(SIZES)
    align_constants(model)
    content = np.frombuffer(model.SerializeToString(), np.uint8)
    separated = separate(content.tobytes())
    session = onnx_session(separated.with_inputs(), 1)
    feed = {constant.name: constant.values(content) for constant in separated.constants}
    assert {one.name: tuple(one.shape) for one in session.get_inputs()} == {
        one.name: one.shape for one in separated.constants
    }
    expected = sum(numpy_helper.to_array(one).sum() for one in model.graph.initializer)
    assert session.run(None, feed)[0] == pytest.approx(expected, abs=1e-3)


def test_a_constant_of_another_size_than_its_shape_says_is_an_error():
    model = model_of((LARGE_BYTES,))
    model.graph.initializer[0].dims[0] += 1
    align_constants(model)
    with pytest.raises(ValueError, match="the size of a constant is not that of its shape"):
        separate(model.SerializeToString())
