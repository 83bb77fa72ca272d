"""Shared by the training benchmarks: steps of other processes, and the floor of a step."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence
from unittest import mock

from bort.errors import UserError
from bort.mxnet_setup import cpu_threads
from bort.shapes import body_shape

UPDATE_BYTES = 28  # a parameter, its moments: read and written; its gradient: read; all float32


@contextlib.contextmanager
def step_apart(command: Sequence[str], threads: int) -> Iterator[Callable[[], float]]:
    """Start a process on so many threads; yield a function that times a step of it.

    It rests between its steps: it takes one when it reads a line and answers with the seconds.
    The function raises `UserError` when the process has ended.
    """
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def step() -> float:
        with contextlib.suppress(BrokenPipeError):  # there will be no answer
            stdin.write("\n")
            stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise UserError(f"{command[0]}: has ended instead of making a step; it says why above")
        return float(answer)

    try:
        yield step
    finally:
        process.communicate()


def check_dtypes(dtypes: str) -> None:
    """Raise `UserError` for a precision of --dtypes, separated by commas, that there is not."""
    if unknown := set(dtypes.split(",")) - {"float32", "bfloat16"}:
        raise UserError(f"--dtypes: {', '.join(sorted(unknown))} unknown; float32, bfloat16")


def check_python(path: Optional[str]) -> None:
    """Raise `UserError` when the interpreter of --pytorch is no program."""
    if path and not shutil.which(path):
        raise UserError(f"--pytorch {path}: is no program; name the python of an environment")


def whole_batches(rows: int, batch_size: int) -> int:
    """Return the smallest multiple of a batch that is at least `rows`.

    With another number our smaller step at the end of each epoch would be compared with full ones.
    """
    return -(-rows // batch_size) * batch_size


def pytorch_command(
    kind: str, dtype: str, settings: Any, model: str, teacher: Optional[str] = None
) -> list[str]:
    """Return the command of a process that makes PyTorch's steps, in an environment of its own."""
    command = [settings.pytorch, str(Path(__file__).with_name("_pytorch.py")), kind]
    command += ["--dtype", dtype, "--threads", str(cpu_threads())]
    command += [f"--{f}={getattr(settings, f)}" for f in ("batch_size", "length", "vocab_size")]
    for flag, name in {"--model": model, "--teacher": teacher}.items():
        if name:
            command += [flag, ",".join(map(str, body_shape(name)))]
    return command


class Work(NamedTuple):
    """What a step has to do at least."""

    flops: float  # of matrix products
    parameters: int  # to update


def encoder_flops(name: str, tokens: int, length: int, last: int) -> float:
    """Return the operations of a forward pass over tokens in sequences of a length.

    Of the last layer only `last` positions are computed, and the keys and values of all.
    """
    layers, _, inner, units = body_shape(name)
    projections = 2 * units * units  # of one token: queries, keys, values, output each
    rest = 2 * projections + 4 * units * inner + 4 * length * units
    whole = (layers - 1) * tokens * (2 * projections + rest)
    return whole + tokens * 2 * projections + last * rest


def decoder_flops(units: int, vocab_size: int, positions: int) -> float:
    """Return the operations of the masked-LM decoder's forward pass at some positions."""
    return 2.0 * positions * units * (units + vocab_size)


def units_of(name: str) -> int:
    """Return the width of a model."""
    return body_shape(name).hidden


def product_rate(dtype: str) -> float:
    """Return the operations a second of a dense layer's products, forward and backward."""
    import mxnet as mx
    from mxnet import autograd, nd

    rows, units = 512, 1024
    x, weight, gradient = (
        nd.amp_cast(nd.random.normal(shape=shape), dtype=dtype)
        for shape in ((rows, units), (units, units), (rows, units))
    )
    x.attach_grad()
    weight.attach_grad()

    def run() -> None:
        with autograd.record():
            product = nd.FullyConnected(x, weight, no_bias=True, num_hidden=units)
        product.backward(gradient)
        mx.nd.waitall()

    return 6 * rows * units * units / _median_seconds(run)


def copy_speed() -> float:
    """Return the bytes a second, read and written, of a copy on all threads."""
    import mxnet as mx

    source = mx.nd.ones((1 << 26,))  # 256 MiB
    target = mx.nd.zeros_like(source)

    def run() -> None:
        mx.nd.elemwise_add(source, source, out=target)
        mx.nd.waitall()

    return 3 * 4 * source.size / _median_seconds(run)


def update_seconds(parameters: int) -> dict[str, float]:
    """Return the seconds of BERTAdam's update of so many float32 values, by what computes it."""
    import mxnet as mx

    from bort.training import bert_adam

    optimizer = bert_adam.BERTAdam(learning_rate=1e-4, wd=0.01)
    optimizer.rescale_grad = mx.nd.ones(1)
    weight, gradient = mx.nd.ones(parameters), mx.nd.ones(parameters)
    state = optimizer.create_state_multi_precision(0, weight)
    compiled = bert_adam.compiled_update()
    found = {}
    for name, update in (("NumPy", None), ("Numba", compiled)) if compiled else (("NumPy", None),):
        with mock.patch.object(bert_adam, "compiled_update", lambda update=update: update):
            found[name] = _median_seconds(
                lambda: optimizer.update_multi_precision([0], [weight], [gradient], [state])
            )
    return found


def _median_seconds(run: Callable[[], None], repeats: int = 9) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def print_floors(medians: dict[str, float], work: dict[str, tuple[str, Work]]) -> None:
    """Print the floor of each way of `work` (its dtype and its work), and the share reached."""
    rates = {dtype: product_rate(dtype) for dtype in {dtype for dtype, _ in work.values()}}
    speed = copy_speed()
    found = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
    print(f"products of 512 x 1024 x 1024: {found}; a sum of two arrays: {speed / 1e9:.0f} GB/s")
    most = max(todo.parameters for _, todo in work.values())
    updates = ", ".join(f"{1e3 * each:.0f} ms in {by}" for by, each in update_seconds(most).items())
    print(
        f"update of {most / 1e6:.0f} M parameters: {updates}; its bytes at that speed: "
        f"{1e3 * most * UPDATE_BYTES / speed:.0f} ms"
    )
    for name, (dtype, todo) in work.items():
        floor = todo.flops / rates[dtype] + todo.parameters * UPDATE_BYTES / speed
        print(
            f"{name}: floor {1e3 * floor:.0f} ms ({todo.flops / 1e9:.0f} GFLOP, update of "
            f"{todo.parameters / 1e6:.0f} M), {floor / medians[name]:.2f} of it reached"
        )
