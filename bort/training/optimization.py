"""Optimization: the learning-rate schedule, clipping, and one update of all parameters.

The update is BERTAdam, or for OSE's theory plain SGD. Gradients are sums over masked positions, so
averaging, clipping and unscaling are one factor, passed to the update as an array: nothing is read
back from a GPU.
"""

from __future__ import annotations

import math
from typing import Any, Sequence

import mxnet as mx
import numpy as np
from mxnet import nd

from bort import bfloat16
from bort.communicator import Communicator
from bort.devices import runs_on_cpu
from bort.training.bert_adam import CHUNK, BERTAdam, on_threads, view
from bort.training.config import UpdateSettings
from bort.types import Block, NDArray, Parameter

# Parameters without weight decay: biases, and gamma and beta of LayerNorm (BERT, appendix A.2).
WITHOUT_DECAY = ("bias", "beta", "gamma")
# Parameters that one call of MXNet's kernel of BERTAdam can update.
MOST_AGGREGATED = 50
ADAM_BETAS = (0.9, 0.999)  # GluonNLP's defaults


def linear_warmup_decay(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of step `step` (1-based): linear warmup, then linear decay.

    The last step has a positive rate, and the peak is reached once, at the end of the warmup; after
    `total_steps` the last rate is kept.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    remaining = max(1, total_steps - step + 1)
    return peak * remaining / (total_steps - warmup_steps + 1)


def bias_correction(step: int) -> float:
    """Return the factor on the rate of update `step` (1-based) that corrects Adam's means."""
    beta1, beta2 = ADAM_BETAS
    return math.sqrt(1 - beta2**step) / (1 - beta1**step)


def sum_of_squares(arrays: Sequence[NDArray]) -> NDArray:
    """Return the sum of the squares of all values of all arrays, [1].

    On a CPU it waits for all queued operations and sums in chunks: MXNet's multi_sum_sq and norm
    add value after value to one float32, which loses 10 percent and more over the gradient of a
    vocabulary's matrix. MXNet's dot products of chunks take twice as long as NumPy's on threads.
    """
    if not runs_on_cpu(arrays[0]):
        # One operator for all arrays; squares of float16 overflow at 256.
        wide = [array.astype("float32", copy=False) for array in arrays]
        return nd.multi_sum_sq(*wide, num_arrays=len(wide)).sum()
    wide = [array.astype("float32", copy=False) for array in arrays]
    nd.waitall()
    views = [view(array) for array in wide]
    chunks = [values[i : i + CHUNK] for values in views for i in range(0, len(values), CHUNK)]
    sums = on_threads(lambda share: sum(float(np.dot(chunk, chunk)) for chunk in share), chunks)
    return nd.array([sum(sums)], ctx=arrays[0].context)


class LossScale:
    """The factor on a float16 loss that keeps small gradients from underflowing.

    Halved whenever a gradient overflows, doubled after `window` updates without (Micikevicius et
    al., Mixed Precision Training, section 3.2). Every rank has the same summed gradient, so all
    have the same factor without communication.
    """

    def __init__(self, value: float = 2.0**15, window: int = 2000) -> None:
        self.value = value
        self.window = window
        self.good_updates = 0

    def update(self, overflowed: bool) -> None:
        """Record whether an update overflowed."""
        self.good_updates = 0 if overflowed else self.good_updates + 1
        if overflowed:
            self.value = max(1.0, self.value / 2)
        elif self.good_updates == self.window:
            self.value, self.good_updates = self.value * 2, 0


class ProjectedSGD(mx.optimizer.Optimizer):
    """SGD over a compact set: w <- clip(w - rate * (g + wd * w), -bound, bound).

    As in the kernel of BERTAdam, `rescale_grad` is an array, and 0 changes nothing. In float32
    only.
    """

    def __init__(self, bound: float, **options: Any) -> None:
        super().__init__(**options)
        self.bound = bound

    def create_state(self, index: int, weight: NDArray) -> tuple[()]:
        """Return nothing: there is no momentum."""
        return ()

    def update_multi_precision(
        self,
        index: Sequence[int],
        weight: Sequence[NDArray],
        grad: Sequence[NDArray],
        state: Sequence[NDArray],
    ) -> None:
        """Make one update of several parameters."""
        for number, values, gradient in zip(index, weight, grad):
            self._update_one(number, values, gradient)

    def _update_one(self, index: int, weight: NDArray, grad: NDArray) -> None:
        self._update_count(index)
        factor = self.rescale_grad.reshape((1,) * weight.ndim)
        direction = factor * grad + self._get_wd(index) * weight
        moved = (weight - self._get_lr(index) * direction).clip(-self.bound, self.bound)
        weight[:] = nd.where(factor.broadcast_like(weight) > 0, moved, weight)


class Trainer:
    """Averages, clips and applies the gradients of a model with BERTAdam or `ProjectedSGD`.

    The gradients are sums over positions; `update` is given their number. The sums of several
    devices and processes are added up first, so every replica makes the same update. A gradient
    that is not finite changes nothing: the update kernel skips what it is to multiply by zero. With
    `loss_scale` the gradients are those of the scaled loss, and float16 parameters have float32
    master copies. With `weight_bound` the optimizer is SGD and the weights stay within the bound.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        communicator: Communicator,
        weight_decay: float,
        epsilon: float,
        max_norm: float,
        loss_scale: LossScale | None = None,
        compression: str = "none",
        weight_bound: float | None = None,
    ) -> None:
        self._parameters = [p for p in parameters if p.grad_req != "null"]
        self._communicator = communicator
        self._max_norm = max_norm
        self.loss_scale = loss_scale
        self._compression = compression
        for parameter in self._parameters:
            parameter.wd_mult = 0.0 if parameter.name.endswith(WITHOUT_DECAY) else 1.0
        options = {"wd": weight_decay, "param_dict": dict(enumerate(self._parameters))}
        if weight_bound is None:
            self._optimizer = BERTAdam(epsilon=epsilon, multi_precision=True, **options)
            # On a GPU every call of the kernel waits for the device.
            self._optimizer.aggregate_num = MOST_AGGREGATED
        else:
            self._optimizer = ProjectedSGD(weight_bound, **options)
        # One array for all steps: the device's queue then keeps the sums of successive steps apart.
        self._positions = nd.zeros(1, ctx=self._weights()[0].context)
        # Made now, not at the first update, so that a checkpoint can be loaded into it.
        self._states = [
            self._optimizer.create_state_multi_precision(index, weight)
            for index, weight in enumerate(self._weights())
        ]
        self.rate = 0.0

    def sum_gradients(self, positions: int) -> NDArray:
        """Add up the gradients of all devices and ranks.

        Returns by what `update` divides them, [1]: the sum of `positions`; one for compressed
        gradients, which are means already.
        """
        for parameter in self._parameters:
            first, *others = parameter.list_grad()
            for other in others:
                first += other.as_in_context(first.context)
        self._positions[:] = positions
        if self._compression == "none":
            self._communicator.allreduce_([*self._gradients(), self._positions])
            return self._positions
        # Means are sent: sums over thousands of positions would overflow float16.
        self._communicator.allreduce_([self._positions], name="positions")
        # In float32, which holds a number above 65,504, too. Without any the gradients are zero.
        positions = nd.maximum(self._positions, 1)
        for gradient in self._gradients():
            gradient[:] = nd.broadcast_div(gradient.astype("float32", copy=False), positions)
        self._communicator.allreduce_(self._gradients(), compression=self._compression)
        return nd.ones_like(self._positions)

    def update(self, positions: NDArray, rate: float) -> NDArray:
        """Apply the summed gradients, which are over `positions` [1] positions.

        Returns the norm [1] of the averaged gradient before clipping.
        """
        self.rate = rate
        positions = nd.maximum(positions, 1)  # without any, the gradient is zero
        gradients = self._gradients()
        scale = self.loss_scale.value if self.loss_scale else 1.0
        norm = sum_of_squares(gradients).sqrt() / (positions * scale)
        clip = nd.minimum(self._max_norm / nd.maximum(norm, 1e-12), 1.0)
        factor = clip / (positions * scale)
        self._optimizer.rescale_grad = nd.where(
            nd.contrib.isfinite(norm), factor, nd.zeros_like(factor)
        )
        self._optimizer.set_learning_rate(rate)
        indices = list(range(len(self._states)))
        self._optimizer.update_multi_precision(indices, self._weights(), gradients, self._states)
        for parameter in self._parameters:
            first, *others = parameter.list_data()
            for other in others:
                first.copyto(other)
        bfloat16.refresh(self._parameters)
        return norm

    def zero_gradients(self) -> None:
        """Zero the gradients: needed between updates when backward passes accumulate."""
        for parameter in self._parameters:
            parameter.zero_grad()

    def _gradients(self) -> list[NDArray]:
        return [p.list_grad()[0] for p in self._parameters]

    def _weights(self) -> list[NDArray]:
        return [p.list_data()[0] for p in self._parameters]

    def state(self) -> dict[str, NDArray]:
        """Return the optimizer's state as {name: NDArray}, to be stored without pickle."""
        named = {}
        for index, state in enumerate(self._states):
            if not state:  # SGD has none
                continue
            # With float16 parameters: ((mean, variance), float32 master copy).
            moments, *master = state if isinstance(state[0], tuple) else (state,)
            named[f"mean.{index}"], named[f"variance.{index}"] = moments
            if master:
                named[f"master.{index}"] = master[0]
        return named

    def load_state(self, arrays: dict[str, NDArray]) -> None:
        """Restore what `state` returned, from {name: NumPy array}."""
        for name, own in self.state().items():
            own[:] = nd.array(arrays[name], ctx=own.context)


def make_trainer(
    network: Block,
    communicator: Communicator,
    update: UpdateSettings,
    weight_bound: float | None = None,
) -> Trainer:
    """Return the trainer of a network, with a loss scale for float16."""
    return Trainer(
        list(network.collect_params().values()),
        communicator,
        weight_decay=update.weight_decay,
        epsilon=update.epsilon,
        max_norm=update.max_norm,
        loss_scale=LossScale() if update.dtype == "float16" else None,
        compression=update.compression,
        weight_bound=weight_bound,
    )
