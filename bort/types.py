"""Names for types of MXNet, which has no annotations, and plain types that many modules share."""

from __future__ import annotations

import enum
from typing import Any, Dict, Mapping

NDArray = Any  # mxnet.nd.NDArray
Parameter = Any  # mxnet.gluon.Parameter
Block = Any  # mxnet.gluon.HybridBlock
Context = Any  # mxnet.Context, a device
Operators = Any  # mxnet.nd or mxnet.sym, which a hybrid block is given as F

JSONObject = Dict[str, Any]  # an object of a JSON file: names to values
JSONMapping = Mapping[str, Any]  # one that is only read
Hyperparameters = Mapping[str, Any]  # one point of a search space: name to value


class TaskKind(str, enum.Enum):
    """What a task's model predicts. The values are those of `kind` in model configs on disk.

    CLASSIFICATION: one of several classes per input.
    REGRESSION: one number per input.
    MULTIPLE_CHOICE: one logit per option; the highest wins.
    CANDIDATES: two classes per candidate; the candidate with the highest margin answers the query.
    """

    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    MULTIPLE_CHOICE = "multiple_choice"
    CANDIDATES = "candidates"

    # The value in str() and format(), too: what these return depends on the Python version.
    __str__ = str.__str__
    __format__ = str.__format__  # type: ignore[assignment]
