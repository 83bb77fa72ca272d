"""ONNX graphs of the networks, written operator by operator from their parameters.

The graphs use standard operators of opset 17 only, which any ONNX runtime takes; ONNX Runtime fuses
them (Gelu with bias, LayerNorm with skip) when it loads a graph. Batch and length are dynamic axes.

A classifier uses the hidden state of the first token only. Its last layer therefore computes one
query per head and no keys or values. With q the query, x the hidden states [length, hidden] and p
the attention probabilities of a head,

    q (x Wk)^T = (q Wk^T) x^T           p (x Wv) = (p x) Wv           q bk^T: the same for all keys

The cost of this layer hardly depends on the length; the result differs by rounding only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, NamedTuple, Sequence, Union

import numpy as np

from bort.errors import UserError
from bort.inference.onnx_file import FORMAT, OUTPUT
from bort.parameters import read_arrays
from bort.saved_model import ModelConfig
from bort.shapes import CLS, MEAN, BodyOptions, array_shapes, body_shape
from bort.types import Block

if TYPE_CHECKING:
    import onnx

# Opset 17 is the first with LayerNormalization. Newer runtimes read both.
OPSET, IR_VERSION = 17, 8
# Added to the attention scores of padding: its exponential is 0, and no sum with it overflows.
MASK_VALUE = np.float32(-1e9)

Value = Union[str, np.ndarray, np.generic]


class NetworkDescription(NamedTuple):
    """The parameters of a network, and what else its graph depends on.

    parameters: {name as in a parameter file of the encoder: float32 array}.
    layers, heads: of the encoder.
    options: LayerNorm's epsilon, and the separator of token types.
    head: (weight [out, in], bias [out], tanh follows) of the dense layers of a classifier; empty
        for a masked-LM network.
    pooling: what the head is applied to (bort.shapes.POOLINGS).
    """

    parameters: Mapping[str, np.ndarray]
    layers: int
    heads: int
    options: BodyOptions
    head: Sequence[tuple[np.ndarray, np.ndarray, bool]]
    pooling: str = CLS


def describe(network: Block) -> NetworkDescription:
    """Describe a BortClassifier, or a BERTModel with decoder (Bort or RoBERTa)."""
    from bort.bort import options_of

    body: Block = getattr(network, "bort", network)
    parameters = {
        name: parameter.data().asnumpy().astype(np.float32, copy=False)
        for name, parameter in body._collect_params_with_prefix().items()
    }
    cells = body.encoder.transformer_cells
    return NetworkDescription(
        parameters,
        len(cells),
        cells[0].attention_cell._num_heads,
        options_of(body),
        _head(network) if body is not network else (),
        getattr(network, "pooling", CLS),
    )


def describe_file(path: str, model_config: ModelConfig) -> NetworkDescription:
    """Describe the classifier of a parameter file, without MXNet.

    Raises `UserError` when the file cannot be read or does not fit the model config.
    """
    shape = body_shape(model_config.model)
    options = model_config.body_options
    token_types = options.type_separator is not None
    body = array_shapes(shape, model_config.vocab_size, token_types)
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
    return NetworkDescription(
        {name: values[f"bort.{name}"] for name in body},
        shape.layers,
        shape.heads,
        options,
        [
            (values[f"{name}.weight"], values[f"{name}.bias"], name == "classifier.1")
            for name in head
        ],
        model_config.pooling,
    )


def _head(classifier: Block) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    extra = getattr(classifier, "extra", None)
    layers = [*([] if extra is None else [extra]), *classifier.classifier]
    return [
        (layer.weight.data().asnumpy(), layer.bias.data().asnumpy(), layer.act is not None)
        for layer in layers
        if hasattr(layer, "weight")  # dropout has none
    ]


# ---- the graph -----------------------------------------------------------------------------------


class _Graph:
    """Builds a graph inside its model, because copying 300 MB of parameters takes long.

    A value is represented by its name.
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
        """Add a node with one output and return its name; arrays become constants."""
        return self.multi_output(1, operator, *inputs, **attributes)[0]

    def multi_output(
        self, count: int, operator: str, *inputs: Value, **attributes: Any
    ) -> list[str]:
        """Add a node with `count` outputs and return their names."""
        from onnx import helper

        name = f"{operator}_{len(self._graph.node)}"
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        outputs = [name] if count == 1 else [f"{name}_{index}" for index in range(count)]
        self._graph.node.append(helper.make_node(operator, names, outputs, name=name, **attributes))
        return outputs

    def constant(self, array: np.ndarray | np.generic) -> str:
        """Add a constant and return its name."""
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
        metadata: Mapping[str, str],
    ) -> onnx.ModelProto:
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
        helper.set_model_props(self._model, dict(metadata))
        return self._model


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


class Writer:
    """Writes one network into a graph, in float32 or int8."""

    def __init__(self, network: NetworkDescription, precision: str) -> None:
        self.graph = _Graph()
        self.network = network
        self.parameters = network.parameters
        self.int8 = precision == "int8"
        hidden = self.parameters["encoder.layer_norm.gamma"].size
        self.head_size = hidden // network.heads
        # [heads, hidden]: 1 where a hidden unit belongs to the head, else 0.
        self.head_mask = np.kron(np.eye(network.heads), np.ones(self.head_size)).astype(np.float32)
        self.ids, self.valid_length = "input_ids", "valid_length"
        self._table: list[str] = []

    # -- layers

    def dense(self, values: Value, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
        """Apply values [..., in] -> [..., out] with a weight [out, in] and a bias [out]."""
        product = self._product(values, np.asarray(weight, np.float32).T)
        return product if bias is None else self.graph("Add", product, bias)

    def _product(self, values: Value, matrix: np.ndarray) -> str:
        """Multiply by a matrix [in, out]; in int8 with one scale per column.

        The values are quantized dynamically, with one scale for the whole batch.
        """
        if not self.int8:
            return self.graph("MatMul", values, matrix)
        rounded, scales = quantize_matrix(matrix, axis=0)
        return self._integer_product(values, rounded, scales[0], matrix.shape[1])

    def _integer_product(self, values: Value, matrix: Value, scales: Value, columns: int) -> str:
        """Multiply by an int8 matrix [in, columns] with a scale for each column."""
        data, step, zero = self.graph.multi_output(3, "DynamicQuantizeLinear", values)
        sums = self.graph("MatMulInteger", data, matrix, zero, np.zeros(columns, np.int8))
        return self.graph("Mul", self._float(sums), self.graph("Mul", step, scales))

    def _float(self, values: str) -> str:
        from onnx import TensorProto

        return self.graph("Cast", values, to=TensorProto.FLOAT)

    def dense_layer(self, values: Value, name: str) -> str:
        """Apply the dense layer with a name in the parameter file."""
        return self.dense(
            values, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        )

    def layer_norm(self, values: Value, name: str) -> str:
        """Apply the LayerNorm with a name in the parameter file."""
        gamma, beta = (self.parameters[f"{name}.{part}"] for part in ("gamma", "beta"))
        epsilon = self.network.options.layer_norm_eps
        return self.graph("LayerNormalization", values, gamma, beta, axis=-1, epsilon=epsilon)

    def gelu(self, values: Value) -> str:
        """Apply x * (1 + erf(x / sqrt(2))) / 2, in the form that ONNX Runtime fuses."""
        scaled = self.graph("Div", values, np.float32(np.sqrt(2)))
        doubled = self.graph("Add", self.graph("Erf", scaled), np.float32(1))
        return self.graph("Mul", self.graph("Mul", values, doubled), np.float32(0.5))

    # -- the network

    def embedding(self) -> str:
        """Return LayerNorm(word + position embeddings): [batch, length, hidden]."""
        length = self.graph("Shape", self.ids, start=1, end=2)
        table = self.parameters["encoder.position_weight"]
        positions = self.graph("Slice", table, _ints(0), length)
        words = self.word_embedding()
        if self.network.options.type_separator is not None:
            types = self.graph(
                "Gather", self.parameters["token_type_embed.0.weight"], self.token_types()
            )
            words = self.graph("Add", words, types)
        summed = self.graph("Add", words, positions)
        return self.layer_norm(summed, "encoder.layer_norm")

    def token_types(self) -> str:
        """Return the types of the tokens: 1 after the first separator. [batch, length]."""
        from onnx import TensorProto

        separator = np.int64(self.network.options.type_separator or 0)
        found = self.graph("Cast", self.graph("Equal", self.ids, separator), to=TensorProto.INT32)
        before = self.graph("CumSum", found, np.int64(1), exclusive=1)
        return self.graph("Cast", self.graph("Greater", before, np.int32(0)), to=TensorProto.INT32)

    def _word_table(self) -> list[str]:
        """Return the word embeddings [vocabulary, hidden] and, in int8, a scale per row.

        A masked-LM network uses them twice; the file holds them once.
        """
        if not self._table:
            table = self.parameters["word_embed.0.weight"]
            parts = quantize_matrix(table, axis=1) if self.int8 else (table,)
            self._table = [self.graph.constant(part) for part in parts]
        return self._table

    def word_embedding(self) -> str:
        """Look the ids up: [batch, length, hidden]."""
        found = [self.graph("Gather", part, self.ids) for part in self._word_table()]
        return self.graph("Mul", self._float(found[0]), found[1]) if self.int8 else found[0]

    def _vocabulary_product(self, values: str) -> str:
        """Multiply values [..., hidden] by the transposed word embeddings: [..., vocabulary]."""
        parts = [self.graph("Transpose", part, perm=[1, 0]) for part in self._word_table()]
        if not self.int8:
            return self.graph("MatMul", values, parts[0])
        vocab_size = len(self.parameters["decoder.3.bias"])
        return self._integer_product(values, parts[0], parts[1], vocab_size)

    def attention_mask(self) -> str:
        """Return the additive attention mask, 0 or very negative: [batch, 1, length]."""
        return self.graph(
            "Unsqueeze", self.graph("Where", self.valid(), np.float32(0), MASK_VALUE), _ints(1)
        )

    def valid(self) -> str:
        """Return which tokens are no padding: bool [batch, length]."""
        length = self.graph("Squeeze", self.graph("Shape", self.ids, start=1, end=2))
        positions = self.graph("Range", np.int64(0), length, np.int64(1))
        return self.graph("Less", positions, self.graph("Unsqueeze", self.valid_length, _ints(1)))

    def mean(self, hidden: str) -> str:
        """Return the mean over the tokens that are no padding: [batch, hidden]."""
        from onnx import TensorProto

        valid = self.graph("Cast", self.valid(), to=TensorProto.FLOAT)
        lengths = self.graph("ReduceSum", valid, _ints(1), keepdims=1)
        total = self.graph("MatMul", self.graph("Unsqueeze", valid, _ints(1)), hidden)
        return self.graph("Div", self.graph("Squeeze", total, _ints(1)), lengths)

    def layer(self, number: int, hidden: str, mask: str) -> str:
        """Apply a layer to hidden states [batch, length, hidden]."""
        name = f"encoder.transformer_cells.{number}"
        return self._feed_forward(name, hidden, self._attention(name, hidden, mask))

    def _feed_forward(self, name: str, hidden: str, context: str) -> str:
        """Apply what follows attention; `context` is its output, of the shape of `hidden`."""
        attended = self.graph("Add", hidden, self.dense_layer(context, f"{name}.proj"))
        hidden = self.layer_norm(attended, f"{name}.layer_norm")
        inner = self.gelu(self.dense_layer(hidden, f"{name}.ffn.ffn_1"))
        outer = self.graph("Add", hidden, self.dense_layer(inner, f"{name}.ffn.ffn_2"))
        return self.layer_norm(outer, f"{name}.ffn.layer_norm")

    def _projection(self, name: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Return weight and bias; the query's include the factor 1 / sqrt(head size)."""
        scale = np.float32(self.head_size**-0.5 if kind == "query" else 1)
        weight, bias = (
            self.parameters[f"{name}.attention_cell.proj_{kind}.{part}"]
            for part in ("weight", "bias")
        )
        return weight * scale, bias * scale

    def _attention(self, name: str, hidden: str, mask: str) -> str:
        """Return the attention output of all tokens: [batch, length, hidden]."""
        graph, heads = self.graph, self.network.heads
        parts = [self._projection(name, kind) for kind in ("query", "key", "value")]
        weight, bias = (np.concatenate(arrays) for arrays in zip(*parts))
        # [batch, length, 3 * hidden] -> [batch, length, 3 * heads, head size]
        qkv = graph("Reshape", self.dense(hidden, weight, bias), _ints(0, 0, 3 * heads, -1))
        sizes = _ints(heads, heads, heads)
        query, key, value = graph.multi_output(3, "Split", qkv, sizes, axis=2)
        # [batch, length, heads, head size] -> [batch, heads, length, head size]
        query, value = (graph("Transpose", array, perm=[0, 2, 1, 3]) for array in (query, value))
        scores = graph("MatMul", query, graph("Transpose", key, perm=[0, 2, 3, 1]))
        masked = graph("Add", scores, graph("Unsqueeze", mask, _ints(1)))
        context = graph("MatMul", graph("Softmax", masked, axis=-1), value)
        # [batch, heads, length, head size] -> [batch, length, hidden]
        return graph("Reshape", graph("Transpose", context, perm=[0, 2, 1, 3]), _ints(0, 0, -1))

    def _last_name(self) -> str:
        return f"encoder.transformer_cells.{self.network.layers - 1}"

    def last_layer_cls_only(self, hidden: str, mask: str) -> str:
        """Apply the last layer for the first token only: [batch, hidden] (see the module)."""
        name = self._last_name()
        first = self.graph("Gather", hidden, np.int64(0), axis=1)
        context = self._cls_attention(name, first, hidden, mask)
        return self._feed_forward(name, first, context)

    def _cls_attention(self, name: str, first: str, hidden: str, mask: str) -> str:
        """Return the attention output of the first token: [batch, hidden]."""
        graph = self.graph
        query = graph("Unsqueeze", self.dense(first, *self._projection(name, "query")), _ints(1))
        by_head = graph("Mul", query, self.head_mask)  # [batch, heads, hidden]
        query_key = self.dense(by_head, self._projection(name, "key")[0].T)
        # [batch, heads, length]
        scores = graph("MatMul", query_key, graph("Transpose", hidden, perm=[0, 2, 1]))
        probabilities = graph("Softmax", graph("Add", scores, mask), axis=-1)
        weight, bias = self._projection(name, "value")
        values = self.dense(graph("MatMul", probabilities, hidden), weight)
        masked = graph("Mul", values, self.head_mask)  # [batch, heads, hidden]
        return graph("Add", graph("ReduceSum", masked, _ints(1), keepdims=0), bias)

    def classifier(self) -> str:
        """Return the logits [batch, outputs]; the layers of the head stay in float32."""
        hidden, mask = self.before_last_layer()
        if self.network.pooling == MEAN:
            values = self.mean(self.layer(self.network.layers - 1, hidden, mask))
        else:
            values = self.last_layer_cls_only(hidden, mask)
        for weight, bias, tanh in self.network.head:
            values = self.graph("Gemm", values, weight, bias, transB=1)
            values = self.graph("Tanh", values) if tanh else values
        return values

    def masked_lm(self) -> str:
        """Return the logits [masks, vocabulary] at `positions` of the flattened batch."""
        hidden, mask = self.before_last_layer()
        context = self._attention(self._last_name(), hidden, mask)
        # What follows attention treats each token alone: those of `positions` are enough.
        hidden, context = (self._gathered(values) for values in (hidden, context))
        return self.decoder(self._feed_forward(self._last_name(), hidden, context))

    def _gathered(self, values: str) -> str:
        """Return rows [masks, hidden] of values [batch, length, hidden] at `positions`."""
        flat = self.graph("Reshape", values, _ints(-1, self.network.heads * self.head_size))
        return self.graph("Gather", flat, "positions")

    def before_last_layer(self) -> tuple[str, str]:
        """Return the input of the last layer [batch, length, hidden] and the attention mask."""
        hidden, mask = self.embedding(), self.attention_mask()
        for number in range(self.network.layers - 1):
            hidden = self.layer(number, hidden, mask)
        return hidden, mask

    def encoder(self) -> str:
        """Return the hidden states of all tokens: [batch, length, hidden]."""
        return self.layer(self.network.layers - 1, *self.before_last_layer())

    def decoder(self, hidden: str) -> str:
        """Return the logits [..., vocabulary] of hidden states [..., hidden]."""
        inner = self.layer_norm(self.gelu(self.dense_layer(hidden, "decoder.0")), "decoder.2")
        return self.graph("Add", self._vocabulary_product(inner), self.parameters["decoder.3.bias"])


def quantize_matrix(matrix: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 values and their scales; the largest value along the axis becomes 127."""
    scales = np.maximum(np.abs(matrix).max(axis=axis, keepdims=True) / 127, 1e-30)
    return np.rint(matrix / scales).astype(np.int8), scales.astype(np.float32)


def build(
    network: Block | NetworkDescription,
    precision: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Return the onnx.ModelProto of a network: a Gluon block, as for `describe`, or a description.

    Inputs: `input_ids` int64 [batch, length], padded at the end, and `valid_length` int64 [batch];
    a masked-LM network also takes `positions` int64 [masks], indices into the flattened
    [batch * length]. Output: `scores` float32 [batch, outputs], or `logits` [masks, vocabulary].

    With `precision` int8 matrices are stored and multiplied in int8; `metadata` goes into the file.
    """
    described = network if isinstance(network, NetworkDescription) else describe(network)
    writer = Writer(described, precision)
    inputs: dict[str, Sequence[str]] = {
        "input_ids": ["batch", "length"],
        "valid_length": ["batch"],
    }
    vocab_size = len(described.parameters["word_embed.0.weight"])
    if described.head:
        outputs = {OUTPUT: (writer.classifier(), ["batch", len(described.head[-1][1])])}
    else:
        inputs["positions"] = ["masks"]
        outputs = {"logits": (writer.masked_lm(), ["masks", vocab_size])}
    known = metadata_of_graph(described, precision)
    return writer.graph.model(inputs, outputs, {**known, **(metadata or {})})


def metadata_of_graph(network: NetworkDescription, precision: str) -> dict[str, str]:
    """Return what a file records about its graph (bort.inference.onnx_file)."""
    return {
        "format": FORMAT,
        "precision": precision,
        "positions": str(len(network.parameters["encoder.position_weight"])),
        "vocab_size": str(len(network.parameters["word_embed.0.weight"])),
    }
