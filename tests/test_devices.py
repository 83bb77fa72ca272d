"""Errors of MXNet for lack of memory."""

from __future__ import annotations

import mxnet as mx
import pytest

from bort.devices import memory_errors
from bort.errors import UserError


@pytest.mark.parametrize(
    "error",
    [
        mx.MXNetError('File "cpu_device_storage.h", line 74\nFailed to allocate CPU Memory'),
        mx.MXNetError("Check failed: e == cudaSuccess: cudaMalloc retry failed: out of memory"),
        mx.MXNetError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_lack_of_memory_is_explained(error: Exception) -> None:
    with pytest.raises(UserError, match=r"^out of memory: use less$"), memory_errors("use less"):
        raise error


def test_other_errors_of_mxnet_keep_their_traceback() -> None:
    with pytest.raises(mx.MXNetError, match="shape"), memory_errors("use less"):
        raise mx.MXNetError("Check failed: shape is not known")
