"""The devices of this process, and which code path an array takes."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Iterator, Sequence

import mxnet as mx
import numpy as np
from mxnet import nd

from bort.communicator import Communicator
from bort.errors import UserError, lacks_memory
from bort.processor import multiplies_bfloat16, require_bfloat16
from bort.types import Context, NDArray

GPU_WIDTH = 8  # tokens


def devices_of(gpus: str | None, cpu_contexts: int, communicator: Communicator) -> list[Context]:
    """Return the devices of this process: CPU replicas, or GPUs: all, or with many ranks its own.

    Raises `UserError` when `gpus` is not a list of GPUs of this machine, one for each local rank.
    """
    if gpus is None:
        return [mx.cpu(number) for number in range(cpu_contexts)]
    try:
        numbers = [int(number) for number in gpus.split(",")]
    except ValueError:
        raise UserError(f"--gpus {gpus}: expected device numbers such as 0,1") from None
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--gpus {gpus}: names a device twice")
    there = mx.context.num_gpus()
    if not all(0 <= number < there for number in numbers):
        cure = (
            "leave --gpus out for the CPU" if there == 0 else f"give numbers from 0 to {there - 1}"
        )
        raise UserError(f"--gpus {gpus}: MXNet sees {there} GPU(s) here; {cure}")
    if communicator.size == 1:
        return [mx.gpu(number) for number in numbers]
    if len(numbers) < communicator.local_size:
        raise UserError(
            f"--gpus {gpus}: {communicator.local_size} ranks on this machine need a GPU each; name "
            "more, or start fewer ranks"
        )
    return [mx.gpu(numbers[communicator.local_rank])]


def resolve_dtype(dtype: str, devices: Sequence[Context], flag: str = "--dtype") -> str:
    """Return the precision of a network on devices, with `auto` resolved; prepare it for float16.

    `auto` is bfloat16 on CPUs that multiply it faster than float32, else float32. Raises
    `UserError` when the devices cannot compute in the dtype; `flag` is what gave it.
    """
    on_gpus = [uses_gpu_code(device) for device in devices]
    if dtype == "auto":
        return "bfloat16" if multiplies_bfloat16() and not any(on_gpus) else "float32"
    if dtype == "bfloat16" and any(on_gpus):
        raise UserError(f"{flag} bfloat16: is for CPUs; give {flag} float16 or float32 on GPUs")
    if dtype == "bfloat16":
        require_bfloat16(flag)
    if dtype == "float16":
        if not all(on_gpus):
            raise UserError(f"{flag} float16: needs GPUs; give --gpus, or {flag} float32")
        # Softmax and LayerNorm then sum in float32; MXNet reads it at every call.
        os.environ.setdefault("MXNET_SAFE_ACCUMULATION", "1")
    return dtype


def stored_dtype(dtype: str) -> str:
    """Return the type of the parameters on disk of a run in a dtype."""
    return "float16" if dtype == "float16" else "float32"


def unused_gpus(devices: Sequence[Context]) -> str:
    """Return a hint when a machine has GPUs and the devices are CPUs, else nothing."""
    there = mx.context.num_gpus()
    if not there or devices[0].device_type == "gpu":
        return ""
    numbers = ",".join(map(str, range(there)))
    return f"this machine has {there} GPU(s) and the run uses none; --gpus {numbers} uses them"


def uses_gpu_code(device: Context) -> bool:
    """Return whether a device takes the code path for GPUs."""
    return bool(device.device_type == "gpu")


def runs_on_cpu(array: NDArray) -> bool:
    """Return whether an array takes the code path for CPUs; a symbol does not."""
    return isinstance(array, nd.NDArray) and not uses_gpu_code(array.context)


def widened(ids: np.ndarray, device: Context) -> np.ndarray:
    """Pad token ids [batch, length] on a GPU to a multiple of GPU_WIDTH columns.

    CachedOp plans memory for every shape it has not seen. The new columns repeat the first
    one: they are padding beyond the valid length, and bring no further ids.
    """
    missing = -ids.shape[1] % GPU_WIDTH
    if not missing or not uses_gpu_code(device):
        return ids
    return np.concatenate([ids, np.repeat(ids[:, :1], missing, axis=1)], axis=1)


@contextmanager
def memory_errors(cure: str) -> Iterator[None]:
    """Turn an error of MXNet or Python for lack of memory into one that names what helps."""
    try:
        yield
    except (mx.MXNetError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise UserError(f"out of memory: {cure}") from None
