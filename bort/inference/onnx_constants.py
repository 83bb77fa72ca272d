"""Large constants of ONNX files, for the runtimes to map into memory.

The runtimes copy the parameters in a file once or twice, which takes half a second for Bort. So
they are given the graph without its large constants, and these as they lie in the file: there they
begin at multiples of 64 bytes, as the runtimes align their own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bort.inference.protobuf import Buffer, Field, fields, integer, message, number_at, varint

if TYPE_CHECKING:
    import onnx

# Fields of ModelProto, of GraphProto, and of TensorProto.
_GRAPH, _INITIALIZER, _INPUT = 7, 5, 11
_DIMS, _TYPE, _NAME, _RAW_DATA, _DESCRIPTION, _EXTERNAL_DATA, _LOCATION = 1, 2, 8, 9, 12, 13, 14
_DTYPES = {1: "<f4", 3: "i1"}  # by TensorProto.DataType
# Constants of at least so many bytes stay in the file, where they begin at such multiples.
LARGE_BYTES, ALIGNMENT = 4096, 64


class Constant(NamedTuple):
    """A large constant: its name, type and shape, and where its values begin and end in the file.

    kind: a TensorProto.DataType.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    end: int

    def values(self, content: np.ndarray) -> np.ndarray:
        """Return the values; `content` is the file, uint8."""
        return content[self.start : self.end].view(_DTYPES[self.kind]).reshape(self.shape)


class Separated(NamedTuple):
    """An onnx.ModelProto without its large constants, and these.

    head, graph: the other fields of the model and of its graph, encoded.
    """

    head: bytes
    graph: bytes
    constants: list[Constant]

    def with_external_data(self, location: str) -> bytes:
        """Return the model with its constants' data in the file at a location.

        https://onnx.ai/onnx/repo-docs/ExternalData.html
        """
        constants = (_external(constant, location) for constant in self.constants)
        return self.head + message(_GRAPH, self.graph, *constants)

    def with_inputs(self) -> bytes:
        """Return the model with an input for each constant."""
        inputs = (_input(constant) for constant in self.constants)
        return self.head + message(_GRAPH, self.graph, *inputs)


def separate(content: Buffer) -> Separated:
    """Take the large constants out of an onnx.ModelProto; those that are not aligned stay.

    Raises `ValueError` or `IndexError` where it is none.
    """
    head, graph, constants = [], [], []
    for field in fields(content):
        if field.number != _GRAPH:
            head.append(content[field.begin : field.end])
            continue
        for inner in fields(content, field.start, field.end):
            constant = _large_constant(content, inner)
            if constant is None:
                graph.append(content[inner.begin : inner.end])
            else:
                constants.append(constant)
    return Separated(b"".join(head), b"".join(graph), constants)


def _large_constant(content: Buffer, field: Field) -> Constant | None:
    """Return the large constant that a field of a graph is, if it is aligned in the file."""
    if field.number != _INITIALIZER or field.end - field.start < LARGE_BYTES:
        return None
    name, kind, shape, start, end = "", 0, [], 0, 0
    for inner in fields(content, field.start, field.end):
        if inner.number == _DIMS:
            shape.append(number_at(content, inner.start))
        elif inner.number == _TYPE:
            kind = number_at(content, inner.start)
        elif inner.number == _NAME:
            name = content[inner.start : inner.end].decode()
        elif inner.number == _RAW_DATA:
            start, end = inner.start, inner.end
    if end - start < LARGE_BYTES or start % ALIGNMENT or kind not in _DTYPES:
        return None
    if math.prod(shape) * np.dtype(_DTYPES[kind]).itemsize != end - start:
        raise ValueError("the size of a constant is not that of its shape")
    return Constant(name, kind, tuple(shape), start, end)


def _external(constant: Constant, location: str) -> bytes:
    """Return a TensorProto whose data lie in a file."""
    size = constant.end - constant.start
    place = {"location": location, "offset": str(constant.start), "length": str(size)}
    return message(
        _INITIALIZER,
        *(integer(_DIMS, size) for size in constant.shape),
        integer(_TYPE, constant.kind),
        message(_NAME, constant.name.encode()),
        *(
            message(_EXTERNAL_DATA, message(1, key.encode()), message(2, value.encode()))
            for key, value in place.items()
        ),
        integer(_LOCATION, 1),
    )


def _input(constant: Constant) -> bytes:
    """Return a ValueInfoProto: a name, and the type of a tensor with its element type and shape."""
    shape = message(2, *(message(1, integer(1, size)) for size in constant.shape))
    tensor = message(1, integer(1, constant.kind), shape)
    return message(_INPUT, message(1, constant.name.encode()), message(2, tensor))


# ---- writing -------------------------------------------------------------------------------------


def align_constants(model: onnx.ModelProto) -> None:
    """Let the data of large constants begin at multiples of `ALIGNMENT` bytes in the file.

    What stands before one, another constant or the head of the model, gets blanks as description.
    """
    content = model.SerializeToString()
    (graph,) = (field for field in fields(content) if field.number == _GRAPH)
    constants = [f for f in fields(content, graph.start, graph.end) if f.number == _INITIALIZER]
    added, before, size = 0, model, None
    for constant, tensor in zip(constants, model.graph.initializer):
        for field in fields(content, constant.start, constant.end):
            if field.number == _RAW_DATA and field.end - field.start >= LARGE_BYTES:
                missing = -(field.start + added) % ALIGNMENT
                added += _describe_with_blanks(before, size, missing)
        before, size = tensor, constant.end - constant.start


def _describe_with_blanks(
    part: onnx.ModelProto | onnx.TensorProto, size: int | None, missing: int
) -> int:
    """Give a part of a model a description, so that it grows by `missing` and whole alignments.

    size: of the part, if it is a message in another. Returns by how much it grows.
    """
    for blanks in range(1, ALIGNMENT + 1 if missing else 0):
        added = len(message(_DESCRIPTION, bytes(blanks)))
        if size is not None:  # its own length may take one byte more
            added += len(varint(size + added)) - len(varint(size))
        if added % ALIGNMENT == missing:
            part.doc_string = " " * blanks
            return added
    return 0
