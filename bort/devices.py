"""The devices of this process, and which code path an array takes."""

from __future__ import annotations

from typing import Any, Sequence

import mxnet as mx
from mxnet import nd

from bort.communicator import Communicator
from bort.errors import UserError
from bort.types import Context


def devices_of(gpus: str | None, cpu_contexts: int, communicator: Communicator) -> list[Context]:
    """Return the devices of this process: CPU replicas, or GPUs, of which each rank has one.

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


def check_dtype(dtype: str, devices: Sequence[Context]) -> None:
    """Raise `UserError` when the devices cannot train in a dtype."""
    if dtype == "float16" and any(device.device_type != "gpu" for device in devices):
        raise UserError("--dtype float16: needs GPUs; give --gpus, or --dtype float32")


def unused_gpus(devices: Sequence[Context]) -> str:
    """Return a hint when a machine has GPUs and the devices are CPUs, else nothing."""
    there = mx.context.num_gpus()
    if not there or devices[0].device_type == "gpu":
        return ""
    numbers = ",".join(map(str, range(there)))
    return f"this machine has {there} GPU(s) and the run uses none; --gpus {numbers} uses them"


def runs_on_cpu(array: Any) -> bool:
    """Tell whether an array takes the code path for CPUs: not symbols, nor arrays on a GPU."""
    return isinstance(array, nd.NDArray) and array.context.device_type != "gpu"
