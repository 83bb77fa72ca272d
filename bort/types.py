"""Names for types of MXNet, which has no annotations, and for plain types that recur."""

from __future__ import annotations

from typing import Any, Mapping

NDArray = Any  # mxnet.nd.NDArray
Block = Any  # mxnet.gluon.HybridBlock
Context = Any  # mxnet.Context, a device

Hyperparameters = Mapping[str, Any]  # one point of a search space: name to value
