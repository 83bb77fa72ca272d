"""Parameters under our names and under Hugging Face's, both ways; pure NumPy.

- Without token types here, they are a row of zeros there; what is read of a body whose types are
  not kept has type 0 added to the positions, which is exact for texts of type 0.
- The matrix that embedding and decoder share is stored once, the decoder's bias under both its
  names: versions of transformers differ in which they read.
- A body without masked-LM head gets one that starts as the identity: dense = I, LayerNorm = 1,
  biases 0.
"""

from __future__ import annotations

import re
from typing import Mapping, NamedTuple

import numpy as np

from bort.errors import UserError, quoted
from bort.huggingface.families import (
    CLASSIFIER_HEAD,
    FAMILIES,
    MASKED_LM_HEAD,
    Architecture,
    Decoder,
)
from bort.shapes import BORT_OPTIONS, ROBERTA, BodyOptions, Shape, array_shapes

Arrays = Mapping[str, np.ndarray]

TEACHERS = {shape: name for name, shape in ROBERTA.items()}

_TIED = "decoder.3.weight"
_TYPES, _POSITIONS = "token_type_embed.0.weight", "encoder.position_weight"
# {our name: Hugging Face's}
_EMBEDDINGS = {
    "word_embed.0.weight": "embeddings.word_embeddings.weight",
    _POSITIONS: "embeddings.position_embeddings.weight",
    "encoder.layer_norm.gamma": "embeddings.LayerNorm.weight",
    "encoder.layer_norm.beta": "embeddings.LayerNorm.bias",
}
_THEIR_TYPES = "embeddings.token_type_embeddings.weight"
# What begins the names in a body that was saved without the prefix of its family.
_BODY_PARTS = ("embeddings.", "encoder.", "transformer.", "pooler.")
# The names of LayerNorm's parameters in files of before 2019.
_OLD_NORM = {"gamma": "weight", "beta": "bias"}
# Buffers without effect on the results, and heads of pretraining that nothing here uses.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_UNUSED_HEADS = ("cls.seq_relationship.", "discriminator_predictions.")


class Converted(NamedTuple):
    """Parameters under our names, and what a user should know of the conversion, a line each."""

    parameters: dict[str, np.ndarray]
    notices: list[str]


def names(architecture: Architecture, layers: int, token_types: bool = False) -> dict[str, str]:
    """Return {our name: Hugging Face's} of every distinct parameter of a network."""
    family = FAMILIES[architecture.family]
    body = {**_EMBEDDINGS, **({_TYPES: _THEIR_TYPES} if token_types else {})}
    for layer in range(layers):
        ours, theirs = f"encoder.transformer_cells.{layer}.", f"{family.layers}.{layer}."
        for our_name, their_name in family.dense.items():
            body |= _pair(ours + our_name, theirs + their_name, "weight", "bias")
        for our_name, their_name in family.norms.items():
            body |= _pair(ours + our_name, theirs + their_name, "gamma", "beta")
    body = {ours: f"{architecture.family}.{theirs}" for ours, theirs in body.items()}
    if architecture.is_classifier:
        head = _classifier(architecture)
        return {f"bort.{ours}": theirs for ours, theirs in body.items()} | head
    return body | (_decoder(architecture.decoder) if architecture.decoder else {})


def _pair(ours: str, theirs: str, weight: str, bias: str) -> dict[str, str]:
    return {f"{ours}.{weight}": f"{theirs}.weight", f"{ours}.{bias}": f"{theirs}.bias"}


def _decoder(decoder: Decoder) -> dict[str, str]:
    layers = _pair("decoder.0", decoder.dense, "weight", "bias")
    layers |= _pair("decoder.2", decoder.norm, "gamma", "beta")
    return {**layers, "decoder.3.bias": decoder.bias}


def _classifier(architecture: Architecture) -> dict[str, str]:
    """Return the names of the head: Dense(hidden, tanh) and Dense(classes)."""
    inner, outer = f"{architecture.family}.pooler.dense", "classifier"
    if architecture == ("roberta", CLASSIFIER_HEAD):
        inner, outer = "classifier.dense", "classifier.out_proj"
    return _pair("classifier.1", inner, "weight", "bias") | _pair(
        "classifier.3", outer, "weight", "bias"
    )


def parameter_shapes(
    shape: Shape,
    architecture: Architecture,
    vocab_size: int,
    num_outputs: int,
    token_types: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Return {our name: shape} of every distinct parameter of a network."""
    hidden = shape.hidden
    body = array_shapes(shape, vocab_size, token_types)
    if not architecture.is_classifier:
        head: dict[str, tuple[int, ...]] = {
            "decoder.0.weight": (hidden, hidden),
            "decoder.3.bias": (vocab_size,),
        }
        vectors = ("decoder.0.bias", "decoder.2.gamma", "decoder.2.beta")
        return body | head | dict.fromkeys(vectors, (hidden,))
    return {f"bort.{name}": size for name, size in body.items()} | {
        "classifier.1.weight": (hidden, hidden),
        "classifier.1.bias": (hidden,),
        "classifier.3.weight": (num_outputs, hidden),
        "classifier.3.bias": (num_outputs,),
    }


def to_huggingface(
    parameters: Arrays,
    architecture: Architecture,
    pad_id: int,
    options: BodyOptions = BORT_OPTIONS,
) -> dict[str, np.ndarray]:
    """Return the arrays of a network under Hugging Face's names, float32.

    Raises `UserError` when its parameters are not those of the architecture.
    """
    layers = sum(name.endswith("proj_query.bias") for name in parameters)
    has_types = options.type_separator is not None
    renamed = names(architecture, layers, has_types)
    different = parameters.keys() - {_TIED} ^ renamed.keys()
    if different:
        raise UserError(f"{architecture.name} does not fit the network: {min(different)} differs")
    arrays = {theirs: parameters[ours].astype(np.float32) for ours, theirs in renamed.items()}
    table = f"{architecture.family}.{_EMBEDDINGS[_POSITIONS]}"
    unused = architecture.unused_positions * (pad_id + 1)
    arrays[table] = np.pad(arrays[table], ((unused, 0), (0, 0)))
    if not has_types:
        types = f"{architecture.family}.{_THEIR_TYPES}"
        arrays[types] = np.zeros((1, arrays[table].shape[1]), np.float32)
    if architecture.decoder and architecture.decoder.second_bias:
        arrays[architecture.decoder.second_bias] = arrays[architecture.decoder.bias]
    return arrays


# ---- reading -------------------------------------------------------------------------------------


def canonical(arrays: Arrays, family: str) -> dict[str, np.ndarray]:
    """Return arrays under today's names: with the family's prefix, LayerNorms with weight and bias.

    Raises `UserError` when two arrays have the same name then.
    """
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        renamed = re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda part: _OLD_NORM[part[1]], name)
        if renamed.startswith(_BODY_PARTS):
            renamed = f"{family}.{renamed}"
        if renamed in found:
            raise UserError(f"the tensor {quoted(name)} appears under two names")
        found[renamed] = array
    return found


def with_head(architecture: Architecture, arrays: Arrays) -> Architecture:
    """Return the architecture of a body whose config.json names no class, by what it holds."""
    candidate = Architecture(architecture.family, MASKED_LM_HEAD)
    has_head = candidate.decoder is not None and candidate.decoder.bias in arrays
    return candidate if has_head else architecture


def from_huggingface(
    arrays: Arrays,
    architecture: Architecture,
    layers: int,
    pad_id: int,
    token_types: int = 1,
    keep_types: bool = False,
) -> Converted:
    """Return Hugging Face's arrays under our names, float32, the tied matrix once.

    arrays: under the names of `canonical`.
    token_types: rows of the token type table; 0 if there is none.
    keep_types: of two rows; else the first one is added to the positions.

    Raises `UserError` for missing and surplus arrays, for a decoder that is not tied to its
    embedding, and for arrays that are not of floats.
    """
    renamed = names(architecture, layers, keep_types)
    types = f"{architecture.family}.{_THEIR_TYPES}"
    expected = {*renamed.values(), *([types] if token_types else [])}
    if missing := expected - arrays.keys():
        raise UserError(f"{len(missing)} tensors are missing, the first is {min(missing)}")
    notices = _check_surplus(arrays, expected, architecture)
    for name in expected:
        if arrays[name].dtype.kind != "f":
            raise UserError(f"{name} has dtype {arrays[name].dtype}, expected floats")
    converted = {ours: arrays[theirs].astype(np.float32) for ours, theirs in renamed.items()}
    table, words = (
        next(name for name in converted if name.endswith(end))
        for end in (_POSITIONS, "word_embed.0.weight")
    )
    positions = converted[table]
    for name in (renamed[table], renamed[words]):
        if arrays[name].ndim != 2:
            raise UserError(f"{name} has shape {arrays[name].shape}, expected a matrix")
    if token_types:
        _require_shape(types, arrays[types], (token_types, positions.shape[1]))
    positions = positions[architecture.unused_positions * (pad_id + 1) :]
    if token_types and not keep_types:
        first = arrays[types][0].astype(np.float32)
        if first.any():  # adding zeros would turn -0.0 into 0.0: round trips are exact
            positions = positions + first
        if token_types > 1:
            notices.append("token type 0 is added to the positions, type 1 is dropped")
    converted[table] = positions
    if not architecture.is_classifier and not architecture.decoder:
        converted |= _identity_decoder(converted[words])
        notices.append(
            f"{architecture.name} has no masked-LM head: it starts as the identity, and predicts "
            "words badly until it is trained"
        )
    return Converted(converted, notices)


def _require_shape(name: str, array: np.ndarray, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise UserError(f"{name} has shape {array.shape}; by config.json it would be {expected}")


def _identity_decoder(embeddings: np.ndarray) -> dict[str, np.ndarray]:
    """Return a decoder for word embeddings [vocabulary, hidden]."""
    vocab_size, hidden = embeddings.shape
    return {
        "decoder.0.weight": np.eye(hidden, dtype=np.float32),
        "decoder.0.bias": np.zeros(hidden, np.float32),
        "decoder.2.gamma": np.ones(hidden, np.float32),
        "decoder.2.beta": np.zeros(hidden, np.float32),
        "decoder.3.bias": np.zeros(vocab_size, np.float32),
    }


def _check_surplus(arrays: Arrays, expected: set[str], architecture: Architecture) -> list[str]:
    """Return notices of what is dropped; copies and buffers are dropped without.

    Raises `UserError` for other arrays that are not expected.
    """
    family, decoder = architecture.family, FAMILIES[architecture.family].decoder
    copies = {}
    if decoder and architecture.decoder:
        copies[decoder.weight] = f"{family}.{_EMBEDDINGS['word_embed.0.weight']}"
        copies[str(decoder.second_bias)] = decoder.bias
    unused = list(_UNUSED_HEADS) if not architecture.is_classifier else []
    unused += [f"{family}.pooler."] if not architecture.uses_pooler else []
    dropped = dict.fromkeys(unused, 0)
    for name in sorted(arrays.keys() - expected):
        start = next((each for each in unused if name.startswith(each)), None)
        if name in copies:
            if not np.array_equal(arrays[name], arrays[copies[name]]):
                raise UserError(f"{name} differs from {copies[name]}; the networks here tie them")
        elif start is not None:
            dropped[start] += 1
        elif name not in {f"{family}.{buffer}" for buffer in _BUFFERS}:
            raise UserError(f"{architecture.name}: has no parameter for the tensor {quoted(name)}")
    return [
        f"dropped, because the logits here do not depend on it: {start.rstrip('.')}"
        for start, count in dropped.items()
        if count
    ]
