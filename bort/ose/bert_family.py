"""The BERT family for `bort.ose.search`: closed forms of size and cost, and the spaces to search.

Notation: V vocabulary, P positions, S tokens of an input, and of a shape D layers, A heads,
H hidden size, I intermediate size. The closed forms are derived from the layers that GluonNLP
builds; what they leave out is our choice:

- Size counts what all tasks share, the embeddings and the encoder; the masked-LM decoder and a
  classifier are reported separately. `effective` leaves out the embeddings too.
- Cost counts the encoder's multiply-accumulates, as is usual; `all_operations` counts every
  addition, multiplication, division, comparison, exponential, root and erf as one, embedding
  sum and LayerNorm included. Reading a row of a table is free.
- Shapes that both leave equal, those that differ in heads alone, are ordered by heads.
- The space of 300 is reported of the paper, not taken from it; its maximum point is its largest
  member.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from bort.errors import UserError, quoted
from bort.files import read_yaml
from bort.grids import check_size, combinations
from bort.ose.abnc import LayerCost, Layers
from bort.shapes import MAX_LAYERS, MAX_LENGTH, MAX_SIZE, Shape, shape_of
from bort.types import Hyperparameters, JSONObject

Space = Callable[[], "list[Shape]"]
MAX_SHAPES = 2_000  # of a space: all pairs of shapes are compared


@dataclass(frozen=True)
class BertFamily:
    """Closed forms of the family's members over one vocabulary and input length."""

    vocab_size: int = 50265
    max_length: int = MAX_LENGTH
    sequence_length: int = 512
    effective: bool = False
    all_operations: bool = False

    def embedding_size(self, shape: Shape) -> int:
        """Return (V + P) H + 2 H: token and position embeddings and a LayerNorm."""
        return (self.vocab_size + self.max_length) * shape.hidden + 2 * shape.hidden

    def layer_size(self, shape: Shape) -> int:
        """Return 4 H^2 + 2 H I + 9 H + I: attention, feed-forward, two LayerNorms."""
        hidden, inner = shape.hidden, shape.intermediate
        return 4 * hidden**2 + 2 * hidden * inner + 9 * hidden + inner

    def decoder_size(self, shape: Shape) -> int:
        """Return H^2 + 3 H + V: Dense, LayerNorm, and the bias of the tied projection."""
        return shape.hidden**2 + 3 * shape.hidden + self.vocab_size

    def parameter_size(self, shape: Shape) -> int:
        """Return p: embeddings and encoder, or with `effective` the encoder alone."""
        embeddings = 0 if self.effective else self.embedding_size(shape)
        return embeddings + shape.layers * self.layer_size(shape)

    def inference_cost(self, shape: Shape) -> int:
        """Return i, the operations that encode one input of S tokens."""
        layers = shape.layers * self._layer_operations(shape)
        return self._embedding_operations(shape) + layers

    def layers(self, shape: Shape) -> Layers:
        """Return A, one B and C of the AB^nC property: embeddings, a layer, the masked-LM decoder.

        All are counted, whatever `effective` says; the decoder predicts one position (ours). Its
        Dense is quadratic in H, so that it grows faster than a layer of constant I; a linear
        classifier would not.
        """
        return Layers(
            first=LayerCost(self.embedding_size(shape), self._embedding_operations(shape)),
            middle=LayerCost(self.layer_size(shape), self._layer_operations(shape)),
            last=LayerCost(self.decoder_size(shape), self._decoder_operations(shape)),
        )

    def _layer_operations(self, shape: Shape) -> int:
        """S (4 H^2 + 2 H I) + 2 S^2 H products; heads enter only with the softmax."""
        length, hidden, inner = self.sequence_length, shape.hidden, shape.intermediate
        if not self.all_operations:
            return length * (4 * hidden**2 + 2 * hidden * inner) + 2 * length**2 * hidden
        dense = length * (8 * hidden**2 + 4 * hidden * inner)  # the bias is the missing addition
        scores = length**2 * 2 * hidden  # the scaling is the missing addition
        softmax = shape.heads * length * (5 * length - 2)
        context = length * hidden * (2 * length - 1)
        gelu_and_residuals = length * (5 * inner + 2 * hidden)
        layer_norms = 2 * length * _layer_norm_operations(hidden)
        return dense + scores + softmax + context + gelu_and_residuals + layer_norms

    def _embedding_operations(self, shape: Shape) -> int:
        if not self.all_operations:
            return 0
        return self.sequence_length * (shape.hidden + _layer_norm_operations(shape.hidden))

    def _decoder_operations(self, shape: Shape) -> int:
        products = shape.hidden * (shape.hidden + self.vocab_size)
        if not self.all_operations:
            return products
        return 2 * products + 5 * shape.hidden + _layer_norm_operations(shape.hidden)


def _layer_norm_operations(width: int) -> int:
    """Mean n, centring n, variance 2 n, division, scale and shift 3 n, epsilon and root 2."""
    return 7 * width + 2


def heads_first(shape: Shape) -> tuple[int, Shape]:
    """Order shapes of equal size and cost: by heads, then as tuples."""
    return shape.heads, shape


def grid(
    layers: Sequence[int], heads: Sequence[int], hidden: Sequence[int], intermediate: Sequence[int]
) -> list[Shape]:
    """Return all combinations in which the heads divide the hidden size."""
    values = {"layers": layers, "heads": heads, "intermediate": intermediate, "hidden": hidden}
    shapes = (Shape(**chosen) for chosen in combinations(values))
    return [shape for shape in shapes if shape.hidden % shape.heads == 0]


def bert_space() -> list[Shape]:
    """Return the 300 architectures that are reported of the paper's search on BERT."""
    return grid(
        layers=(2, 4, 6, 8, 10, 12),
        heads=(4, 8, 12, 16),
        hidden=(512, 768, 1024),
        intermediate=(256, 512, 768, 1024, 3072),
    )


def bert_small_space() -> list[Shape]:
    """Return 36 small architectures (ours): about an hour on a laptop, 90 s each.

    Measured with some hundred thousand tokens of a small vocabulary; RoBERTa's takes longer.
    """
    return grid(layers=(1, 2, 4), heads=(2, 4), hidden=(64, 128, 256), intermediate=(128, 512))


SPACES: Mapping[str, Space] = {"bert": bert_space, "bert-small": bert_small_space}


def load_space(name: str) -> list[Shape]:
    """Return a space by name, or from a YAML file.

    The file holds four lists, `layers`, `heads`, `hidden` and `intermediate`, whose combinations
    are the space, or one list `architectures` of model names.

    Raises `UserError` for an unknown name and for a file of another form.
    """
    if name in SPACES:
        return SPACES[name]()
    if not name.endswith((".yaml", ".yml")):
        raise UserError(f"--space {name}: must be {', '.join(SPACES)}, or a .yaml file")
    content = read_yaml(name)
    if isinstance(content, dict) and set(content) == {"architectures"}:
        space = [_shape(name, each) for each in _listed(name, content, "architectures", str)]
    elif isinstance(content, dict) and set(content) == set(Shape._fields):
        values = {key: _listed(name, content, key, int) for key in Shape._fields}
        check_size(name, values, MAX_SHAPES)
        space = grid(**values)
    else:
        raise UserError(
            f"{name}: must hold the lists {', '.join(Shape._fields)}, or the list architectures"
        )
    if not space:
        raise UserError(f"{name}: no combination has heads that divide the hidden size")
    return space


def _shape(path: str, model_name: str) -> Shape:
    try:
        return shape_of(model_name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _listed(path: str, content: JSONObject, key: str, expected: type) -> list[Any]:
    values, largest = content[key], MAX_LAYERS if key == "layers" else MAX_SIZE
    fits = isinstance(values, list) and values and all(type(each) is expected for each in values)
    if not fits or (expected is int and not 1 <= min(values) <= max(values) <= largest):
        names = f"integers from 1 to {largest:,}" if expected is int else "model names"
        raise UserError(f"{path}: {key} must be a list of {names}, not {quoted(values)}")
    check_size(path, {key: values}, MAX_SHAPES)
    return values


def synthetic_error(
    shape: Shape, steps: int, hparams: Hyperparameters, generator: np.random.Generator
) -> float:
    """Return 1.7 + 4 (1e6 / encoder parameters)^0.4 with 2 % of noise.

    It has the form of a scaling law but was not fitted to anything: it replaces trained errors
    where the search itself is examined.
    """
    encoder = BertFamily(effective=True).parameter_size(shape)
    return (1.7 + 4 * (1e6 / encoder) ** 0.4) * generator.normal(1, 0.02)


def measure_latency(shape: Shape, sequence_length: int, runs: int = 5) -> float:
    """Return the seconds in which this machine's CPU encodes one input, batch size 1.

    The shortest of at least `runs` runs and 0.2 s in all: the one that other programs slowed least.
    The weights are random and the vocabulary is tiny; neither changes the time.
    """
    import mxnet as mx

    from bort.bort import encode, get_bort_model

    model, _ = get_bort_model(
        shape.name, vocab=range(8), use_decoder=False, max_length=sequence_length
    )
    model.hybridize(static_alloc=True)
    ids = mx.nd.zeros((1, sequence_length))
    lengths = mx.nd.array([sequence_length])
    encode(model, ids, lengths).wait_to_read()
    shortest, total, count = math.inf, 0.0, 0
    while count < runs or total < 0.2:
        start = time.perf_counter()
        encode(model, ids, lengths).wait_to_read()
        seconds = time.perf_counter() - start
        shortest, total, count = min(shortest, seconds), total + seconds, count + 1
    return shortest
