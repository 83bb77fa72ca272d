"""The shapes of the networks: their names, and the shapes of their parameters.

A name reads `bort_<layers>_<heads>_<intermediate>_<hidden>`: `bort_4_8_768_1024` has hidden size
(units) 1024 and intermediate size 768, the width inside the feed-forward layers, which GluonNLP
calls hidden_size. Users of the original confuse the two.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Mapping, NamedTuple, Optional

from bort.errors import UserError, quoted

MAX_LENGTH = 512
MAX_BUCKETS = 10_000  # of lengths, which are fewer
# Beyond any network that a machine can train: a damaged file, or a slip of the keyboard.
MAX_LAYERS, MAX_SIZE = 1000, 1_000_000
LAYER_NORM_EPS = 1e-5
MIN_LAYER_NORM_EPS = 2.0**-126  # the smallest normal float32: MXNet takes no less
# What a classifier's head is applied to: the first token's vector, or the mean over the tokens.
POOLINGS = CLS, MEAN = "cls", "mean"
TOKEN_TYPES = 2  # of a body that has them


class Shape(NamedTuple):
    """The architectural parameters of one member of the BERT family, in the order of its name."""

    layers: int
    heads: int
    intermediate: int
    hidden: int

    @property
    def name(self) -> str:
        """Return the name that `shape_of` reads back."""
        return f"bort_{self.layers}_{self.heads}_{self.intermediate}_{self.hidden}"


class BodyOptions(NamedTuple):
    """What a body has besides its shape; the defaults are Bort's and RoBERTa's.

    layer_norm_eps: of all its LayerNorms; 1e-12 in BERT.
    type_separator: id of the token that ends each text of an input, for a body with two token
        types, as BERT has: the tokens after the first separator are of type 1. None: no types.
    """

    layer_norm_eps: float = LAYER_NORM_EPS
    type_separator: Optional[int] = None


def check_layer_norm_eps(eps: float) -> None:
    """Raise `UserError` for an epsilon of LayerNorm that no network here can have."""
    if not MIN_LAYER_NORM_EPS <= eps < 1:
        raise UserError(
            f"layer_norm_eps is {quoted(eps)}, expected a number from {MIN_LAYER_NORM_EPS:.3g} to 1"
        )


BORT_OPTIONS = BodyOptions()
PREDEFINED_SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "bort_4_8_768_1024": Shape(layers=4, heads=8, intermediate=768, hidden=1024),
        "bort_2_16_512_1024": Shape(layers=2, heads=16, intermediate=512, hidden=1024),
    }
)


# GluonNLP's RoBERTa models, which can be teachers.
ROBERTA: Mapping[str, Shape] = MappingProxyType(
    {
        "roberta_12_768_12": Shape(layers=12, heads=12, intermediate=3072, hidden=768),
        "roberta_24_1024_16": Shape(layers=24, heads=16, intermediate=4096, hidden=1024),
    }
)


def shape_of(model_name: str) -> Shape:
    """Return the shape a model name stands for: a predefined one, or the four numbers it spells.

    Raises `UserError` for a name of another form and for heads that do not divide the hidden size.
    """
    if model_name in PREDEFINED_SHAPES:
        return PREDEFINED_SHAPES[model_name]
    # No leading zeros: a shape has one name, and no number is 0.
    spelled = re.fullmatch("bort" + 4 * "_([1-9][0-9]{0,9})", model_name)
    if not spelled:
        raise UserError(
            f"model name {quoted(model_name)}: expected "
            "bort_<layers>_<heads>_<intermediate>_<hidden>, such as bort_4_8_768_1024"
        )
    shape = Shape(*map(int, spelled.groups()))
    if shape.layers > MAX_LAYERS or max(shape) > MAX_SIZE:
        raise UserError(
            f"model name {quoted(model_name)}: at most {MAX_LAYERS} layers and sizes of "
            f"{MAX_SIZE:,} are supported"
        )
    if shape.hidden % shape.heads:
        raise UserError(
            f"model name {quoted(model_name)}: hidden size {shape.hidden} is not divisible by "
            f"{shape.heads} heads"
        )
    return shape


def body_shape(model_name: str) -> Shape:
    """Return the shape of a model's name, GluonNLP's RoBERTa models included.

    Raises `UserError` for any other name.
    """
    return ROBERTA[model_name] if model_name in ROBERTA else shape_of(model_name)


def array_shapes(
    shape: Shape, vocab_size: int, token_types: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the arrays of a body without decoder in a parameter file."""
    hidden, inner = shape.hidden, shape.intermediate
    found: dict[str, tuple[int, ...]] = {
        "word_embed.0.weight": (vocab_size, hidden),
        "encoder.position_weight": (MAX_LENGTH, hidden),
    }
    if token_types:
        found["token_type_embed.0.weight"] = (TOKEN_TYPES, hidden)
    norms = ["encoder.layer_norm"]
    for number in range(shape.layers):
        cell = f"encoder.transformer_cells.{number}"
        norms += [f"{cell}.layer_norm", f"{cell}.ffn.layer_norm"]
        projections = [f"attention_cell.proj_{name}" for name in ("query", "key", "value")]
        layers = dict.fromkeys((*projections, "proj"), (hidden, hidden))
        layers |= {"ffn.ffn_1": (inner, hidden), "ffn.ffn_2": (hidden, inner)}
        for name, matrix in layers.items():
            found |= {f"{cell}.{name}.weight": matrix, f"{cell}.{name}.bias": matrix[:1]}
    return found | {f"{norm}.{part}": (hidden,) for norm in norms for part in ("gamma", "beta")}
