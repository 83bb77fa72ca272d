"""Matrix products in bfloat16, on a CPU, for networks whose parameters stay float32.

As under PyTorch's autocast, weights and activations are rounded to bfloat16 where they enter a
product, and all else is float32: parameters, optimizer, LayerNorm, softmax, attention's products,
losses and sums of gradients. bfloat16 has float32's range, so the loss needs no scale.

Each parameter of a product has a rounded copy on every device, made when the parameter changes and
not when it is used. While a gradient is recorded a copy is a leaf of the graph; its own gradient,
in bfloat16 like autocast's, is added to the parameter's in float32 after every backward pass.

MXNet 1.9.1 multiplies bfloat16 in FullyConnected alone: not in batches of products, which attention
consists of, and its transpose of bfloat16 arrays corrupts memory. RESULTS.md has the times.
"""

from __future__ import annotations

from typing import Iterable, Iterator

import numpy as np
from mxnet import autograd, nd

from bort.types import Block, Context, NDArray, Parameter

DTYPE = np.dtype([("bfloat16", np.uint16)])  # what MXNet calls bfloat16

# Rows that oneDNN multiplies at once.
ROWS = 16


def rounded(array: NDArray) -> NDArray:
    """Return an array in bfloat16."""
    return nd.amp_cast(array, dtype="bfloat16")


class Bfloat16Copy:
    """A parameter rounded to bfloat16 on one device."""

    def __init__(self, parameter: Parameter, device: Context) -> None:
        self._source = parameter.data(device)
        self.array = rounded(self._source)
        if parameter.grad_req != "null":
            self.array.attach_grad()
        # Whether it is part of a graph whose gradient was not added to the parameter's yet.
        self.recorded = False

    def refresh(self) -> None:
        """Round the parameter again."""
        nd.amp_cast(self._source, dtype="bfloat16", out=self.array)


def use_bfloat16(network: Block) -> None:
    """Let the products of a BERTModel on CPUs be made in bfloat16 from now on."""
    add_copies(_product_parameters(network))


def add_copies(parameters: Iterable[Parameter]) -> None:
    """Give parameters a rounded copy on each of their devices."""
    for parameter in parameters:
        parameter.bfloat16 = {
            device: Bfloat16Copy(parameter, device) for device in parameter.list_ctx()
        }


def _product_parameters(network: Block) -> Iterator[Parameter]:
    """Yield the weights and biases of the products; the vocabulary's bias stays float32."""
    for layer in network.encoder.transformer_cells:
        cell = layer.attention_cell
        for name in ("query", "key", "value"):
            yield from (getattr(cell, f"{name}_weight"), getattr(cell, f"{name}_bias"))
        for dense in (layer.proj, layer.ffn.ffn_1, layer.ffn.ffn_2):
            yield from (dense.weight, dense.bias)
    if network._use_decoder:
        transform, *_, projection = network.decoder
        yield from (transform.weight, transform.bias, projection.weight)


def has_copies(parameter: Parameter) -> bool:
    """Return whether products take a rounded copy of a parameter."""
    return hasattr(parameter, "bfloat16")


def operand(parameter: Parameter, device: Context) -> NDArray:
    """Return what a product takes of a parameter: its copy, or without one its own values."""
    if not has_copies(parameter):
        return parameter.data(device)
    copy = parameter.bfloat16[device]
    copy.recorded |= autograd.is_recording()
    return copy.array


def product(inputs: NDArray, weight: NDArray, bias: NDArray | None = None) -> NDArray:
    """Multiply inputs [n, in] by weight [out, in], one of them or both in bfloat16; add bias [out].

    Returns float32 [n, out].
    """
    low = [array if array.dtype == DTYPE else rounded(array) for array in (inputs, weight)]
    low += [] if bias is None else [bias]
    result = nd.FullyConnected(*low, no_bias=bias is None, num_hidden=weight.shape[0])
    return nd.amp_cast(result, dtype="float32")


def padded(rows: NDArray) -> NDArray:
    """Fill up rows [n, units] with zeros to a multiple of ROWS, which oneDNN multiplies faster."""
    missing = -len(rows) % ROWS
    if not missing:
        return rows
    zeros = nd.zeros((missing, rows.shape[1]), ctx=rows.context, dtype=rows.dtype)
    return nd.concat(rows, zeros, dim=0)


def refresh(parameters: Iterable[Parameter]) -> None:
    """Round those parameters that have copies again: their values have changed."""
    for parameter in parameters:
        for copy in getattr(parameter, "bfloat16", {}).values():
            copy.refresh()


def add_gradients(parameters: Iterable[Parameter], device: Context) -> None:
    """Bring the gradients of a backward pass from the copies to the parameters."""
    for parameter in parameters:
        copy = getattr(parameter, "bfloat16", {}).get(device)
        if copy is None or not copy.recorded:
            continue
        copy.recorded = False
        if parameter.grad_req == "add":
            parameter.grad(device)[:] += nd.amp_cast(copy.array.grad, dtype="float32")
        else:
            nd.amp_cast(copy.array.grad, dtype="float32", out=parameter.grad(device))
