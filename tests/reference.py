"""What the tests compare with: model, losses and optimiser again, in NumPy and float64.

Written from the formulas, for one sequence at a time and without padding, so that it shares no
mistake with the batched and interleaved operators of the model.
"""

from __future__ import annotations

import math
from typing import Any, Mapping, Optional

import numpy as np
from numpy.random import default_rng

Parameters = Mapping[str, np.ndarray]

LAYER_NORM_EPS = 1e-5
_erf = np.vectorize(math.erf, otypes=[np.float64])


def redraw(model: Any, seed: int, deviation: float = 0.1) -> None:
    """Overwrite all parameters with normal values around 0 (gains: around 1).

    Fresh biases are 0 and fresh gains 1, which hides mistakes in where they are applied.
    """
    generator = default_rng(seed)
    for name, parameter in sorted(model._collect_params_with_prefix().items()):
        values = generator.standard_normal(parameter.shape, dtype=np.float32) * deviation
        parameter.set_data(_nd_array(values + 1 if name.endswith("gamma") else values))


def _nd_array(values: np.ndarray) -> Any:
    from mxnet import nd

    return nd.array(values, dtype="float32")


def parameters_of(model: Any) -> dict[str, np.ndarray]:
    """Return {name in a parameter file: float64 array}."""
    parameters = model._collect_params_with_prefix()
    return {name: p.data().asnumpy().astype(np.float64) for name, p in parameters.items()}


# ---- the model ---------------------------------------------------------------------------------


def encode(
    parameters: Parameters,
    heads: int,
    ids: np.ndarray,
    epsilon: float = LAYER_NORM_EPS,
    separator: Optional[int] = None,
) -> np.ndarray:
    """Encode the token ids [n] of one sequence to [n, hidden]."""
    ids = np.asarray(ids)
    tokens = parameters["word_embed.0.weight"][ids]
    if separator is not None:
        ends = [place for place, token in enumerate(ids.tolist()) if token == separator]
        first_text = ends[0] + 1 if ends else len(ids)
        types = np.array([0] * first_text + [1] * (len(ids) - first_text))
        tokens = tokens + parameters["token_type_embed.0.weight"][types]
    positions = parameters["encoder.position_weight"][: len(ids)]
    hidden = layer_norm(tokens + positions, parameters, "encoder.layer_norm", epsilon)
    layers = sum(name.endswith("proj_query.bias") for name in parameters)
    for layer in range(layers):
        name = f"encoder.transformer_cells.{layer}"
        attended = dense(attend(hidden, parameters, heads, name), parameters, f"{name}.proj")
        hidden = layer_norm(hidden + attended, parameters, f"{name}.layer_norm", epsilon)
        inner = gelu(dense(hidden, parameters, f"{name}.ffn.ffn_1"))
        outer = dense(inner, parameters, f"{name}.ffn.ffn_2")
        hidden = layer_norm(hidden + outer, parameters, f"{name}.ffn.layer_norm", epsilon)
    return hidden


def attend(hidden: np.ndarray, parameters: Parameters, heads: int, name: str) -> np.ndarray:
    """Return the context [n, hidden] of all heads, before their output projection."""
    query, key, value = (
        dense(hidden, parameters, f"{name}.attention_cell.proj_{kind}")
        for kind in ("query", "key", "value")
    )
    context = np.empty_like(hidden)
    size = hidden.shape[1] // heads
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = query[:, own] @ key[:, own].T / math.sqrt(size)
        context[:, own] = softmax(scores) @ value[:, own]
    return context


def decode(
    parameters: Parameters, hidden: np.ndarray, epsilon: float = LAYER_NORM_EPS
) -> np.ndarray:
    """Return the logits [n, vocabulary] of encoded positions [n, hidden]."""
    inner = gelu(dense(hidden, parameters, "decoder.0"))
    inner = layer_norm(inner, parameters, "decoder.2", epsilon)
    return inner @ parameters["word_embed.0.weight"].T + parameters["decoder.3.bias"]


def dense(values: np.ndarray, parameters: Parameters, name: str) -> np.ndarray:
    """Apply the dense layer that is stored under a name."""
    return values @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]


def layer_norm(
    values: np.ndarray, parameters: Parameters, name: str, epsilon: float = LAYER_NORM_EPS
) -> np.ndarray:
    """Normalise each row, then apply the gain and offset that are stored under a name."""
    centred = values - values.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt(variance + epsilon)
    return normal * parameters[f"{name}.gamma"] + parameters[f"{name}.beta"]


def gelu(values: np.ndarray) -> np.ndarray:
    """Return x * Phi(x) with the true error function."""
    return values * (1 + _erf(values / math.sqrt(2))) / 2


def softmax(values: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    return np.exp(log_softmax(values))


def log_softmax(values: np.ndarray) -> np.ndarray:
    """Return the logarithm of the softmax over the last axis."""
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# ---- the losses --------------------------------------------------------------------------------


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return -log p(label) per row [n]."""
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def distillation_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    """Return T^2 * sum over the vocabulary of p * log(p / q) per row [n]."""
    p = softmax(teacher / temperature)
    log_ratio = log_softmax(teacher / temperature) - log_softmax(student / temperature)
    return temperature**2 * (p * log_ratio).sum(axis=-1)


def distillation_gradient(
    student: np.ndarray,
    labels: np.ndarray,
    teacher: np.ndarray,
    mlm_weight: float,
    teacher_ce_weight: float,
    temperature: float,
) -> np.ndarray:
    """Return d(sum of the weighted losses) / d(student logits), derived by hand: [n, vocabulary].

    d CE / ds = q - onehot; d T^2 KL / ds = T^2 / T * (q_T - p_T).
    """
    hard = softmax(student) - np.eye(student.shape[1])[labels]
    soft = softmax(student / temperature) - softmax(teacher / temperature)
    return mlm_weight * hard + teacher_ce_weight * temperature * soft


# ---- the optimiser -----------------------------------------------------------------------------


class BERTAdam:
    """Adam without bias correction, with decoupled weight decay scaled by the rate (BERT)."""

    def __init__(self, weights: Parameters, weight_decay: Parameters, epsilon: float) -> None:
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.means = {name: np.zeros(value.shape) for name, value in weights.items()}
        self.variances = {name: np.zeros(value.shape) for name, value in weights.items()}
        self._weight_decay = weight_decay
        self._epsilon = epsilon

    def step(self, gradients: Parameters, rate: float, max_norm: float) -> float:
        """Clip the gradients to a common norm and apply them; returns the norm before."""
        norm = math.sqrt(sum((value**2).sum() for value in gradients.values()))
        clip = min(1.0, max_norm / norm)
        for name, gradient in gradients.items():
            mean, variance, weight = self.means[name], self.variances[name], self.weights[name]
            mean += 0.1 * (clip * gradient - mean)
            variance += 0.001 * ((clip * gradient) ** 2 - variance)
            decay = self._weight_decay[name] * weight
            weight -= rate * (mean / (np.sqrt(variance) + self._epsilon) + decay)
        return norm
