"""ONNX graphs of our networks, written operator by operator from their parameters.

Standard operators of opset 17 only, so that any ONNX runtime takes them; ONNX Runtime finds its own
fused ones (Gelu with bias, LayerNorm with skip) when it loads a graph. Batch and length are free.

A classifier reads nothing but the first token's vector. Its last layer therefore computes one query
per head, and keys and values of no token at all: with q the query, x the tokens' vectors, p the
probabilities of a head,

    q (x Wk)^T = (q Wk^T) x^T           p (x Wv) = (p x) Wv           q bk^T: the same for all keys

so that a layer of n tokens costs as much as one of a few. The sums are the same in another order.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, Mapping, NamedTuple, Sequence, Union

import numpy as np

from bort.errors import UserError
from bort.parameters import read_arrays
from bort.shapes import LAYER_NORM_EPS, array_shapes, body_shape

# Opset 17 is the first with LayerNormalization. Newer runtimes read both.
OPSET, IR_VERSION = 17, 8
# Added to the attention scores of padding: exp of it is 0, and no sum of it overflows.
_PADDING = np.float32(-1e9)
TOLERANCE = 1e-4

Value = Union[str, np.ndarray, np.generic]


class Network(NamedTuple):
    """What the graph needs to know of a network beside its parameters.

    parameters: {name as in a parameter file of the encoder: float32 array}.
    head: (weight [out, in], bias [out], tanh follows) of the dense layers over the first token;
        empty for a masked-LM network.
    """

    parameters: Mapping[str, np.ndarray]
    layers: int
    heads: int
    epsilon: float
    head: Sequence[tuple[np.ndarray, np.ndarray, bool]]


def describe(network: Any) -> Network:
    """Read a BortClassifier, or a BERTModel with decoder (Bort or RoBERTa), of MXNet."""
    body = getattr(network, "bort", network)
    parameters = {
        name: parameter.data().asnumpy().astype(np.float32, copy=False)
        for name, parameter in body._collect_params_with_prefix().items()
    }
    cells = body.encoder.transformer_cells
    return Network(
        parameters,
        len(cells),
        cells[0].attention_cell._num_heads,
        body.encoder.layer_norm._epsilon,
        _head(network) if body is not network else (),
    )


def describe_file(path: str, model_config: Any) -> Network:
    """Read the classifier of a parameter file without MXNet; `model_config`: a ModelConfig.

    Raises `UserError` when the file cannot be read or does not fit the model config.
    """
    shape = body_shape(model_config.model)
    body = array_shapes(shape, model_config.vocab_size)
    square, outputs = (shape.hidden, shape.hidden), (model_config.num_outputs, shape.hidden)
    head = {"extra": square} if model_config.extra_layer else {}
    head |= {"classifier.1": square, "classifier.3": outputs}
    expected = {f"bort.{name}": size for name, size in body.items()}
    for name, size in head.items():
        expected |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    arrays = read_arrays(path)
    sizes = {name: array.shape for name, array in arrays.items()}
    wrong = sorted({name for name, _ in expected.items() ^ sizes.items()})
    if wrong:
        raise UserError(
            f"{path}: does not hold the parameters of {model_config.model}: "
            f"see {', '.join(wrong[:4])}"
        )
    values = {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}
    return Network(
        {name: values[f"bort.{name}"] for name in body},
        shape.layers,
        shape.heads,
        LAYER_NORM_EPS,
        [
            (values[f"{name}.weight"], values[f"{name}.bias"], name == "classifier.1")
            for name in head
        ],
    )


def _head(classifier: Any) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    extra = getattr(classifier, "extra", None)
    layers = [*([] if extra is None else [extra]), *classifier.classifier]
    return [
        (layer.weight.data().asnumpy(), layer.bias.data().asnumpy(), layer.act is not None)
        for layer in layers
        if hasattr(layer, "weight")  # the others are dropout
    ]


# ---- the graph -----------------------------------------------------------------------------------


class _Graph:
    """A graph that is being written, in its model at once: every copy of 300 MB takes its time.

    A value is its name.
    """

    def __init__(self) -> None:
        from onnx import helper

        self._model = helper.make_model(
            helper.make_graph([], "bort", [], []),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="bort",
        )
        self._graph = self._model.graph

    def __call__(self, operator: str, *inputs: Value, **attributes: Any) -> str:
        """Add a node with one output; inputs that are arrays become constants."""
        return self.several(1, operator, *inputs, **attributes)[0]

    def several(self, count: int, operator: str, *inputs: Value, **attributes: Any) -> list[str]:
        """Add a node with `count` outputs."""
        from onnx import helper

        name = f"{operator}_{len(self._graph.node)}"
        names = [one if isinstance(one, str) else self._constant(one) for one in inputs]
        outputs = [name] if count == 1 else [f"{name}_{place}" for place in range(count)]
        self._graph.node.append(helper.make_node(operator, names, outputs, name=name, **attributes))
        return outputs

    def _constant(self, array: np.ndarray | np.generic) -> str:
        from onnx import helper

        tensor = self._graph.initializer.add()
        tensor.name = f"constant_{len(self._graph.initializer)}"
        tensor.dims.extend(array.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor.raw_data = array.tobytes()
        return tensor.name

    def model(
        self,
        inputs: Mapping[str, Sequence[str]],
        outputs: Mapping[str, tuple[str, Sequence[Any]]],
        notes: Mapping[str, str],
    ) -> Any:
        """Return the finished graph as an onnx.ModelProto.

        inputs: {name: shape}, all int64; outputs: {name: (value, shape)}, all float32.
        """
        from onnx import TensorProto, helper

        for name, shape in inputs.items():
            info = helper.make_tensor_value_info(name, TensorProto.INT64, shape)
            self._graph.input.append(info)
        for name, (value, shape) in outputs.items():
            self._graph.node.append(helper.make_node("Identity", [value], [name], name=name))
            info = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            self._graph.output.append(info)
        helper.set_model_props(self._model, dict(notes))
        return self._model


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


class _Writer:
    """Writes one network into a graph: what a layer is, and how its matrices are stored."""

    def __init__(self, network: Network, precision: str) -> None:
        self.graph = _Graph()
        self.network = network
        self.parameters = network.parameters
        self.int8 = precision == "int8"
        hidden = self.parameters["encoder.layer_norm.gamma"].size
        self.head_size = hidden // network.heads
        # One row per head: 1 at the places of its vector, 0 elsewhere.
        self.own_places = np.kron(np.eye(network.heads), np.ones(self.head_size)).astype(np.float32)
        self.ids, self.valid_length = "input_ids", "valid_length"

    # -- parts

    def dense(self, values: Value, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
        """Apply values [..., in] -> [..., out] with a weight [out, in] and a bias [out]."""
        product = self._product(values, np.asarray(weight, np.float32).T)
        return product if bias is None else self.graph("Add", product, bias)

    def _product(self, values: Value, matrix: np.ndarray) -> str:
        """Multiply by a matrix [in, out]; in int8 each of its columns has a scale of its own.

        The values are quantised as they come, over the whole batch, with one scale.
        """
        if not self.int8:
            return self.graph("MatMul", values, matrix)
        from onnx import TensorProto

        rounded, scales = _quantize(matrix, axis=0)
        zeros = np.zeros(matrix.shape[1], np.int8)
        data, step, zero = self.graph.several(3, "DynamicQuantizeLinear", values)
        sums = self.graph("MatMulInteger", data, rounded, zero, zeros)
        floats = self.graph("Cast", sums, to=TensorProto.FLOAT)
        return self.graph("Mul", floats, self.graph("Mul", step, scales[0]))

    def dense_of(self, values: Value, name: str) -> str:
        """Apply the dense layer stored under a name."""
        return self.dense(
            values, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        )

    def layer_norm(self, values: Value, name: str) -> str:
        """Apply the LayerNorm stored under a name."""
        gain, offset = (self.parameters[f"{name}.{part}"] for part in ("gamma", "beta"))
        epsilon = self.network.epsilon
        return self.graph("LayerNormalization", values, gain, offset, axis=-1, epsilon=epsilon)

    def gelu(self, values: Value) -> str:
        """Apply x * (1 + erf(x / sqrt(2))) / 2, in the form that ONNX Runtime knows as Gelu."""
        scaled = self.graph("Div", values, np.float32(np.sqrt(2)))
        doubled = self.graph("Add", self.graph("Erf", scaled), np.float32(1))
        return self.graph("Mul", self.graph("Mul", values, doubled), np.float32(0.5))

    # -- the network

    def embedding(self) -> str:
        """Return the normalised sum of word and position embeddings: [batch, length, hidden]."""
        length = self.graph("Shape", self.ids, start=1, end=2)
        table = self.parameters["encoder.position_weight"]
        positions = self.graph("Slice", table, _ints(0), length)
        summed = self.graph("Add", self._rows(self.parameters["word_embed.0.weight"]), positions)
        return self.layer_norm(summed, "encoder.layer_norm")

    def _rows(self, table: np.ndarray) -> str:
        """Look the ids up in a table; in int8 each of its rows has a scale of its own."""
        if not self.int8:
            return self.graph("Gather", table, self.ids)
        from onnx import TensorProto

        rounded, scales = _quantize(table, axis=1)
        found = self.graph("Cast", self.graph("Gather", rounded, self.ids), to=TensorProto.FLOAT)
        return self.graph("Mul", found, self.graph("Gather", scales, self.ids))

    def padding(self) -> str:
        """Return what is added to attention scores, 0 or very negative: [batch, 1, length]."""
        length = self.graph("Squeeze", self.graph("Shape", self.ids, start=1, end=2))
        places = self.graph("Range", np.int64(0), length, np.int64(1))
        valid = self.graph("Less", places, self.graph("Unsqueeze", self.valid_length, _ints(1)))
        return self.graph(
            "Unsqueeze", self.graph("Where", valid, np.float32(0), _PADDING), _ints(1)
        )

    def layer(self, number: int, hidden: str, padding: str) -> str:
        """Apply a whole layer to hidden [batch, length, hidden]."""
        name = f"encoder.transformer_cells.{number}"
        return self._after_attention(name, hidden, self._attention(name, hidden, padding))

    def _after_attention(self, name: str, hidden: str, context: str) -> str:
        attended = self.graph("Add", hidden, self.dense_of(context, f"{name}.proj"))
        hidden = self.layer_norm(attended, f"{name}.layer_norm")
        inner = self.gelu(self.dense_of(hidden, f"{name}.ffn.ffn_1"))
        outer = self.graph("Add", hidden, self.dense_of(inner, f"{name}.ffn.ffn_2"))
        return self.layer_norm(outer, f"{name}.ffn.layer_norm")

    def _projection(self, name: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Return weight and bias; those of the query carry the scale of the scores."""
        scale = np.float32(self.head_size**-0.5 if kind == "query" else 1)
        weight, bias = (
            self.parameters[f"{name}.attention_cell.proj_{kind}.{part}"]
            for part in ("weight", "bias")
        )
        return weight * scale, bias * scale

    def _attention(self, name: str, hidden: str, padding: str) -> str:
        """Return the context of all tokens: [batch, length, hidden]."""
        graph, heads = self.graph, self.network.heads
        parts = [self._projection(name, kind) for kind in ("query", "key", "value")]
        weight, bias = (np.concatenate(one) for one in zip(*parts))
        every = graph("Reshape", self.dense(hidden, weight, bias), _ints(0, 0, 3 * heads, -1))
        sizes = _ints(heads, heads, heads)
        query, key, value = graph.several(3, "Split", every, sizes, axis=2)
        query, value = (graph("Transpose", one, perm=[0, 2, 1, 3]) for one in (query, value))
        scores = graph("MatMul", query, graph("Transpose", key, perm=[0, 2, 3, 1]))
        masked = graph("Add", scores, graph("Unsqueeze", padding, _ints(1)))
        context = graph("MatMul", graph("Softmax", masked, axis=-1), value)
        return graph("Reshape", graph("Transpose", context, perm=[0, 2, 1, 3]), _ints(0, 0, -1))

    def last_layer_of_first_token(self, hidden: str, padding: str) -> str:
        """Apply the last layer for the first token alone: [batch, hidden] (see the module)."""
        name = f"encoder.transformer_cells.{self.network.layers - 1}"
        first = self.graph("Gather", hidden, np.int64(0), axis=1)
        context = self._attention_of_first(name, first, hidden, padding)
        return self._after_attention(name, first, context)

    def _attention_of_first(self, name: str, first: str, hidden: str, padding: str) -> str:
        graph = self.graph
        query = graph("Unsqueeze", self.dense(first, *self._projection(name, "query")), _ints(1))
        by_head = graph("Mul", query, self.own_places)  # [batch, heads, hidden]
        wanted = self.dense(by_head, self._projection(name, "key")[0].T)
        scores = graph("MatMul", wanted, graph("Transpose", hidden, perm=[0, 2, 1]))
        shares = graph("Softmax", graph("Add", scores, padding), axis=-1)
        weight, bias = self._projection(name, "value")
        values = self.dense(graph("MatMul", shares, hidden), weight)
        own = graph("Mul", values, self.own_places)
        return graph("Add", graph("ReduceSum", own, _ints(1), keepdims=0), bias)

    def classifier(self) -> str:
        """Return the scores [batch, outputs]; the layers over the first token stay in float32."""
        hidden, padding = self.embedding(), self.padding()
        for number in range(self.network.layers - 1):
            hidden = self.layer(number, hidden, padding)
        values = self.last_layer_of_first_token(hidden, padding)
        for weight, bias, tanh in self.network.head:
            values = self.graph("Gemm", values, weight, bias, transB=1)
            values = self.graph("Tanh", values) if tanh else values
        return values

    def masked_lm(self) -> str:
        """Return the logits [positions, vocabulary] at `positions`, places in the flat batch."""
        hidden, padding = self.embedding(), self.padding()
        for number in range(self.network.layers):
            hidden = self.layer(number, hidden, padding)
        size = self.network.heads * self.head_size
        rows = self.graph("Gather", self.graph("Reshape", hidden, _ints(-1, size)), "positions")
        inner = self.layer_norm(self.gelu(self.dense_of(rows, "decoder.0")), "decoder.2")
        return self.dense(
            inner, self.parameters["word_embed.0.weight"], self.parameters["decoder.3.bias"]
        )


def _quantize(matrix: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 values and their scales, the largest value along an axis being 127."""
    scales = np.maximum(np.abs(matrix).max(axis=axis, keepdims=True) / 127, 1e-30)
    return np.rint(matrix / scales).astype(np.int8), scales.astype(np.float32)


def build(network: Any, precision: str = "float32", notes: Mapping[str, str] | None = None) -> Any:
    """Return the onnx.ModelProto of a network: MXNet's, as for `describe`, or a described one.

    Inputs: `input_ids` int64 [batch, length], padded at the end, and `valid_length` int64 [batch];
    a masked-LM network also takes `positions` int64 [masks], which count through the flattened
    [batch * length]. Output: `scores` float32 [batch, outputs], or `logits` [masks, vocabulary].

    `precision` int8 stores matrices in int8 and multiplies in it; `notes` go into the file.
    """
    described = network if isinstance(network, Network) else describe(network)
    writer = _Writer(described, precision)
    inputs: dict[str, Sequence[str]] = {
        "input_ids": ["batch", "length"],
        "valid_length": ["batch"],
    }
    if described.head:
        outputs = {"scores": (writer.classifier(), ["batch", len(described.head[-1][1])])}
    else:
        inputs["positions"] = ["masks"]
        vocabulary = len(described.parameters["word_embed.0.weight"])
        outputs = {"logits": (writer.masked_lm(), ["masks", vocabulary])}
    positions = len(described.parameters["encoder.position_weight"])
    known = {"precision": precision, "positions": str(positions)}
    return writer.graph.model(inputs, outputs, {**known, **(notes or {})})


# ---- the file ------------------------------------------------------------------------------------


def write(model: Any, path: str) -> None:
    """Check a graph as the onnx package does and write it, whole or not at all.

    Raises `UserError` when the file cannot be written.
    """
    import onnx

    temporary = f"{path}.tmp"
    try:
        content = model.SerializeToString()
        onnx.checker.check_model(content, full_check=True)
        with open(temporary, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.remove(temporary)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def difference(network: Any, session: Any, seed: int = 0) -> tuple[float, float]:
    """Compare a graph in ONNX Runtime with its network in MXNet, on random batches with padding.

    Returns the largest difference and the largest value of the outputs.
    """
    from mxnet import nd

    from bort.bort import decode, encode, masked_hidden

    generator = np.random.default_rng(seed)
    body = getattr(network, "bort", network)
    vocabulary, longest = body.word_embed[0].weight.shape[0], body.encoder._max_length
    differences, largest = [], 0.0
    for batch, length in ((1, longest), (5, min(40, longest)), (2, 1)):
        ids = generator.integers(0, vocabulary, (batch, length))
        lengths = generator.integers(1, length + 1, batch)
        feed = {"input_ids": ids, "valid_length": lengths}
        arrays = [nd.array(one, dtype="float32") for one in (ids, lengths)]
        if body is network:
            # The last position of each sequence that is not padding.
            feed["positions"] = np.arange(batch) * length + lengths - 1
            sequence = encode(network, *arrays)
            hidden = masked_hidden(network, sequence, nd.array(feed["positions"]))
            expected = decode(network, hidden).asnumpy()
        else:
            expected = network(*arrays).asnumpy()
        (found,) = session.run(None, feed)
        differences.append(float(np.abs(found - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    return max(differences), largest
