"""The devices of this process, and which code path an array takes."""

from __future__ import annotations

from typing import Any

import mxnet as mx
from mxnet import nd

from bort.communicator import Communicator
from bort.errors import UserError


def devices_of(gpus: str | None, cpu_contexts: int, communicator: Communicator) -> list[Any]:
    """Return the devices of this process: CPU replicas, or the GPUs, of which a rank has one.

    Raises `UserError` when `gpus` is not a list of numbers.
    """
    if gpus is None:
        return [mx.cpu(number) for number in range(cpu_contexts)]
    try:
        numbers = [int(number) for number in gpus.split(",")]
    except ValueError:
        raise UserError(f"--gpus {gpus}: expected device numbers such as 0,1") from None
    if communicator.size > 1:
        numbers = [numbers[communicator.local_rank % len(numbers)]]
    return [mx.gpu(number) for number in numbers]


def runs_on_cpu(array: Any) -> bool:
    """Tell whether these functions are for an array: not for symbols and for those of a GPU."""
    return isinstance(array, nd.NDArray) and array.context.device_type != "gpu"
