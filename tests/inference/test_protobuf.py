"""Protocol buffers: fields are found as the protobuf library writes them."""

from __future__ import annotations

import onnx
import pytest

from bort.inference.protobuf import fields, integer, message, varint

NUMBERS = (0, 1, 127, 128, 300, 2**32, 2**63 - 1)


def test_fields_are_those_that_the_library_writes() -> None:
    tensor = onnx.TensorProto(
        dims=[3, 2**40], data_type=1, float_data=[1.5], name="blanks " * 30, raw_data=b"\x00\xff"
    )
    content = tensor.SerializeToString()
    found = list(fields(content))
    assert [field.number for field in found] == [1, 1, 2, 4, 8, 9]
    assert [field.begin for field in found] == [0, *(field.end for field in found[:-1])]
    assert found[-1].end == len(content)
    name, raw = (content[field.start : field.end] for field in found[-2:])
    assert (name.decode(), raw) == (tensor.name, tensor.raw_data)
    inside = content[1:] + b"\xff" * 9
    assert [field.number for field in fields(b"x" + content + inside, 1, 1 + len(content))] == [
        field.number for field in found
    ]


def test_what_is_written_is_what_the_library_reads() -> None:
    content = b"".join((*(integer(1, value) for value in NUMBERS), message(8, b"a ", b"name")))
    tensor = onnx.TensorProto.FromString(content)
    assert list(tensor.dims) == list(NUMBERS)
    assert tensor.name == "a name"


@pytest.mark.parametrize(
    "damaged",
    [
        b"\x4a\x05abc",  # longer than what follows
        b"\x4a",
        b"\x08",
        b"\x08" + b"\xff" * 10 + b"\x01",  # a number of more than 64 bits
        b"\x0d\x00\x00",  # four bytes
        b"\x0b",  # a group, which no file of ours has
    ],
)
def test_what_is_no_message_is_an_error(damaged: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        list(fields(damaged))


def test_the_size_of_a_number_grows_with_it() -> None:
    assert [len(varint(value)) for value in NUMBERS] == [1, 1, 1, 2, 2, 5, 9]
