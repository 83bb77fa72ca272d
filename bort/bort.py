"""The model: BortModel, BortClassifier, and reading and writing their parameters."""

from __future__ import annotations

import os
from typing import Any, Optional, Sequence

import gluonnlp as nlp
import mxnet as mx
import numpy as np
from mxnet import autograd, nd
from mxnet.gluon import HybridBlock, nn

from bort import bfloat16
from bort.devices import runs_on_cpu
from bort.encoder import (
    GatherIndices,
    GraphBreak,
    backward,
    dense,
    encode_embedding,
    layer_norm,
    make_leaf,
)
from bort.errors import UserError
from bort.parameters import load_parameters
from bort.shapes import (
    BORT_OPTIONS,
    CLS,
    MAX_LENGTH,
    MEAN,
    POOLINGS,
    ROBERTA,
    TOKEN_TYPES,
    BodyOptions,
    body_shape,
    shape_of,
)
from bort.types import Block, Context, NDArray, Operators


class BortModel(nlp.model.RoBERTaModel):
    """Bort: token and position embeddings, post-LayerNorm encoder, tied masked-LM decoder.

    Inputs: token ids [batch, length], valid_length [batch], and, with a decoder, masked_positions
    [batch, masks]. Returns the encoded sequence [batch, length, hidden] and, with a decoder, the
    logits [batch, masks, vocabulary]. Positions at and beyond valid_length are zero.
    Neither token types nor pooler (Optimal Subarchitecture Extraction for BERT, released model).
    Other models may have two token types: `type_separator` ends the texts of an input, and the
    tokens after the first one are of type 1 (Devlin et al. 2019, section 3).
    """

    def __init__(self, *arguments: Any, type_separator: int | None = None, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.type_separator = type_separator
        if type_separator is not None:
            self._use_token_type_embed = True
            self.token_type_embed = self._get_embed(
                None, TOKEN_TYPES, self._units, None, "token_type_embed_"
            )

    def _encode_sequence(
        self, inputs: NDArray, token_types: NDArray, valid_length: Optional[NDArray] = None
    ) -> NDArray:
        """Encode ids with GluonNLP's layers; the token types follow from the ids."""
        if self.type_separator is not None:
            token_types = types_of(inputs, self.type_separator)
        return super()._encode_sequence(inputs, token_types, valid_length)

    def __call__(
        self,
        inputs: NDArray,
        valid_length: NDArray | None = None,
        masked_positions: NDArray | None = None,
    ) -> Any:
        """Run the model; raises `ValueError` for sequences longer than its position table."""
        check_length(self, inputs)
        return super().__call__(inputs, valid_length, masked_positions)


def options_of(model: nlp.model.BERTModel) -> BodyOptions:
    """Return what a body has besides its shape."""
    return BodyOptions(model.encoder._layer_norm_eps, getattr(model, "type_separator", None))


def types_of(ids: NDArray, separator: int) -> NDArray:
    """Return the token types, 0 and 1, of ids [batch, length]: an array or a symbol."""
    is_separator = ids == separator
    return _functions(ids).cumsum(is_separator, axis=1) - is_separator > 0


def _functions(value: NDArray) -> Operators:
    if isinstance(value, np.ndarray):
        return np
    return nd if isinstance(value, nd.NDArray) else mx.sym


class BortClassifier(HybridBlock):
    """Dropout - Dense(hidden, tanh) - Dropout - Dense(num_classes) over the first token's vector.

    Inputs: token ids [batch, length] and valid_length [batch]; returns logits [batch, num_classes].
    `bort` may be any BERTModel without decoder; `extra_layer` adds a Dense(hidden) in front, which
    the paper is said to have used for CoLA. With `pooling` mean the head takes the mean over the
    tokens, as sentence models do, instead of the first token's vector.

    Raises `ValueError` for a model with decoder, another pooling, and, when it is called, sequences
    longer than the model's position table.
    """

    def __init__(
        self,
        bort: nlp.model.BERTModel,
        num_classes: int = 2,
        dropout: float = 0.1,
        extra_layer: bool = False,
        pooling: str = CLS,
    ) -> None:
        super().__init__()
        if bort._use_decoder:
            raise ValueError("the model has a decoder; build it with use_decoder=False")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: expected one of {', '.join(POOLINGS)}")
        self.pooling = pooling
        with self.name_scope():
            self.bort = bort
            self.extra = nn.Dense(bort._units, in_units=bort._units) if extra_layer else None
            self.classifier = nn.HybridSequential(prefix="classifier_")
            with self.classifier.name_scope():
                self.classifier.add(
                    nn.Dropout(dropout),
                    nn.Dense(bort._units, in_units=bort._units, activation="tanh"),
                    nn.Dropout(dropout),
                    nn.Dense(num_classes, in_units=bort._units),
                )

    def __call__(self, inputs: NDArray, valid_length: NDArray) -> NDArray:
        """Return the logits of the sequences (shapes: see the class)."""
        check_length(self.bort, inputs)  # once hybridized, it does not call the model
        return super().__call__(inputs, valid_length)

    def hybrid_forward(self, F: Operators, inputs: NDArray, valid_length: NDArray) -> NDArray:  # noqa: N803
        """Return the logits of the sequences (shapes: see the class)."""
        return self.head(self.bort(inputs, valid_length), valid_length)

    def head(self, sequence: NDArray, valid_length: NDArray) -> NDArray:
        """Return the logits [batch, num_classes] of an encoded sequence [batch, length, hidden].

        Beyond `valid_length` [batch] it is zero; without mean pooling one token of it is enough.
        """
        if self.pooling == MEAN:
            lengths = valid_length.expand_dims(axis=1)
            pooled = _functions(sequence).broadcast_div(sequence.sum(axis=1), lengths)
        else:
            pooled = sequence.slice_axis(axis=1, begin=0, end=1).squeeze(axis=1)
        return self.classifier(pooled if self.extra is None else self.extra(pooled))


def check_length(model: nlp.model.BERTModel, inputs: NDArray) -> None:
    """Raise `ValueError` when inputs [batch, length, ...] exceed the model's position table."""
    limit = model.encoder._max_length
    if isinstance(inputs, mx.nd.NDArray) and inputs.shape[1] > limit:
        raise ValueError(
            f"sequence length {inputs.shape[1]}: the model has {limit} positions; "
            "shorten or split the sequences"
        )


def get_bort_model(
    model_name: str = "bort_4_8_768_1024",
    dataset_name: str | None = None,
    vocab: Any = None,
    pretrained: bool = False,
    ctx: Context | Sequence[Context] | None = None,
    use_decoder: bool = True,
    root: str = "model",
    dropout: float = 0.1,
    max_length: int = MAX_LENGTH,
    random_init: bool = True,
    trainable: bool = True,
    options: BodyOptions = BORT_OPTIONS,
) -> tuple[BortModel, Any]:
    """Build a Bort of any shape; returns it with its vocabulary, as GluonNLP's get_model does.

    Args:
        model_name: a predefined shape or `bort_<layers>_<heads>_<intermediate>_<hidden>`.
        dataset_name: GluonNLP's name of the vocabulary, used when `vocab` is None.
        vocab: anything with a length or a `vocab_size`: a vocabulary or one of our tokenizers.
        pretrained: load `<root>/bort.params`, the released checkpoint; else random weights.
        ctx: one device or a list of them; default the CPU.
        use_decoder: with the masked-LM decoder.
        root: the folder of the released checkpoint.
        dropout: rate in embedding, attention and layers while training.
        max_length: number of positions.
        random_init: False: zeros, which is faster before weights are loaded.
        trainable: allocate gradient buffers.
        options: what differs from Bort besides the shape.

    Raises:
        UserError: unknown name, no vocabulary, or a checkpoint that is absent or does not fit.
    """
    shape = shape_of(model_name)
    if vocab is None:
        vocab = _vocabulary(dataset_name)
    encoder = nlp.model.BERTEncoder(
        num_layers=shape.layers,
        units=shape.hidden,
        hidden_size=shape.intermediate,
        max_length=max_length,
        num_heads=shape.heads,
        dropout=dropout,
        layer_norm_eps=options.layer_norm_eps,
    )
    model = BortModel(
        encoder,
        vocab_size=vocabulary_size(vocab),
        units=shape.hidden,
        embed_size=shape.hidden,
        use_decoder=use_decoder,
        type_separator=options.type_separator,
    )
    ctx = ctx or mx.cpu()
    initialize(model, ctx, random_init and not pretrained, trainable)
    if pretrained:
        _load_released(model, root, use_decoder)
    return model, vocab


def _load_released(model: BortModel, root: str, use_decoder: bool) -> None:
    path = os.path.join(root, "bort.params")
    if not os.path.exists(path):
        raise UserError(f"{path}: not found; scripts/download_model.sh fetches it")
    load_parameters(model, path, ignore_prefixes=() if use_decoder else ("decoder.",))


def _vocabulary(dataset_name: str | None) -> Any:
    from bort.tokenization import TokenizerSettings, load_tokenizer

    if dataset_name is None:
        raise UserError("get_bort_model needs vocab or dataset_name to know the vocabulary's size")
    return load_tokenizer(TokenizerSettings(dataset_name=dataset_name))


def vocabulary_size(vocab: Any) -> int:
    """Return the number of entries of a vocabulary or of one of our tokenizers."""
    return vocab.vocab_size if hasattr(vocab, "vocab_size") else len(vocab)


class KeyedDropout(nn.Dropout):
    """Dropout that `mx.random.seed` also seeds on a GPU; cuDNN's is seeded once per process."""

    def hybrid_forward(self, F: Operators, x: NDArray) -> NDArray:  # noqa: N803
        """Drop values of x in training mode."""
        return F.Dropout(x, p=self._rate, axes=self._axes, cudnn_off=True) if self._rate else x


def _key_dropout(block: Block) -> None:
    if type(block) is nn.Dropout:
        block.__class__ = KeyedDropout


def initialize(
    model: HybridBlock,
    ctx: Context | Sequence[Context],
    random_init: bool = True,
    trainable: bool = True,
) -> None:
    """Initialize weights from Normal(0, 0.02) and give every parameter its shape.

    GluonNLP's Dense layers learn their input size from the first forward pass; before it,
    parameters can be neither saved nor broadcast. The weights follow `mx.random.seed`; without
    `random_init` all are zero. Without `trainable` no gradients are allocated, which halves the
    memory.
    """
    model.apply(_key_dropout)
    if not trainable:
        model.collect_params().setattr("grad_req", "null")
    weights = mx.init.Normal(0.02) if random_init else mx.init.Zero()
    model.initialize(init=weights, ctx=ctx, force_reinit=True)
    for device in ctx if isinstance(ctx, (list, tuple)) else [ctx]:
        ids = mx.nd.zeros((1, 1), ctx=device)
        lengths = mx.nd.ones((1,), ctx=device)
        if isinstance(model, nlp.model.BERTModel):
            # GluonNLP's own forward pass: ours needs parameters that have their shapes.
            sequence = model._encode_sequence(ids, [], lengths)[0]
            if model._use_decoder:
                model.decoder(sequence)
        else:
            model(ids, lengths)


def encode(
    model: nlp.model.BERTModel,
    ids: NDArray,
    valid_length: NDArray,
    cls_only: bool = False,
    positions: GatherIndices | None = None,
) -> NDArray:
    """Encode token ids [batch, length] to [batch, length, hidden], with Bort or RoBERTa.

    `valid_length` [batch] is of the model's dtype. With `cls_only` the caller uses token 0 alone,
    [:, :1]; with `positions` the encodings of n positions are returned, [n, hidden].
    """
    check_length(model, ids)
    if runs_on_cpu(ids):
        embedding = _with_types(model, model.word_embed(ids), ids)  # [batch, length, hidden]
        return encode_embedding(model.encoder, embedding, valid_length, None, cls_only, positions)
    return _gathered(model._encode_sequence(ids, [], valid_length)[0], positions)


def _with_types(model: nlp.model.BERTModel, embedding: NDArray, ids: NDArray) -> NDArray:
    """Add the token type embedding to word embeddings [batch, length, hidden], if there is one."""
    separator = options_of(model).type_separator
    if separator is None:
        return embedding
    second = types_of(ids, separator).reshape((-1, 1))
    table = model.token_type_embed[0].weight.data(ids.context)
    # A product: the gradient of a lookup in so small a table is slow.
    types = nd.concat(1 - second, second, dim=1).astype(table.dtype, copy=False)
    return nd.elemwise_add(embedding, nd.dot(types, table).reshape(embedding.shape))


def _gathered(sequence: NDArray, positions: GatherIndices | None) -> NDArray:
    """Return some positions [n, hidden] of a sequence [batch, length, hidden] on a GPU."""
    if positions is None:
        return sequence
    return _rows(sequence.reshape((-3, 0)), positions.padded.take(positions.flat))


def _rows(table: NDArray, indices: NDArray) -> NDArray:
    """Return rows of a table [n, hidden]; on a GPU the gradient of `take` is a serial kernel."""
    if runs_on_cpu(table):
        return table.take(indices)
    return nd.Embedding(indices, table, input_dim=table.shape[0], output_dim=table.shape[1])


class SparseEmbeddingGrad:
    """The word embeddings of one batch, for a backward pass without their dense gradient.

    The gradient of the embedding matrix with respect to a batch is zero but for the rows of its
    tokens. autograd makes it a second matrix of the vocabulary's size, filled, added to that of the
    tied decoder and freed at every step: with 50,265 tokens, three times 206 MB. Here the rows are
    a leaf of the graph. On a CPU the graph is also broken at every LayerNorm: see bort.encoder.
    """

    def __init__(self, model: nlp.model.BERTModel, ids: np.ndarray, device: Context) -> None:
        """Look up the distinct ids of a batch [batch, length]."""
        rows, inverse = np.unique(ids, return_inverse=True)  # [distinct], [batch * length]
        self._model_parameters = model.collect_params().values()
        self._model, self._ids = model, ids
        self._parameter = model.word_embed[0].weight
        self._device = device
        self.rows = nd.array(rows, ctx=device, dtype="int32")
        self._inverse = nd.array(inverse.reshape(ids.shape), ctx=device, dtype="int32")
        self._table = self._parameter.data(device).take(self.rows)  # [distinct, hidden]
        make_leaf(self._table)
        self.breaks: list[GraphBreak] = []

    def embedding(self) -> NDArray:
        """Return the word embeddings [batch, length, hidden] of the batch."""
        embedding = _rows(self._table, self._inverse)
        if options_of(self._model).type_separator is None:
            return embedding
        ids = nd.array(self._ids, ctx=self._device, dtype="float32")
        return _with_types(self._model, embedding, ids)

    def backward(self, head: NDArray, gradient: NDArray | None = None) -> None:
        """Differentiate what was recorded by `encode_for_backward`.

        `head` is a loss [1], or an array with its `gradient`.
        """
        backward(head, self.breaks, gradient)
        bfloat16.add_gradients(self._model_parameters, self._device)
        whole = self._parameter.grad(self._device)
        whole[self.rows] = whole.take(self.rows) + self._table.grad


def encode_for_backward(
    model: nlp.model.BERTModel,
    embeddings: SparseEmbeddingGrad,
    valid_length: NDArray,
    cls_only: bool = False,
    positions: GatherIndices | None = None,
) -> NDArray:
    """Do what `encode` does, to be differentiated by `embeddings.backward`."""
    embedding = embeddings.embedding()
    check_length(model, embedding)
    if runs_on_cpu(embedding):
        return encode_embedding(
            model.encoder, embedding, valid_length, embeddings.breaks, cls_only, positions
        )
    by_position = embedding.transpose((1, 0, 2))  # [length, batch, hidden]
    sequence = model.encoder(by_position, valid_length=valid_length)[0].transpose((1, 0, 2))
    return _gathered(sequence, positions)


def masked_hidden(model: nlp.model.BERTModel, sequence: NDArray, positions: NDArray) -> NDArray:
    """Return the decoder's hidden states [n, hidden] before the projection onto the vocabulary.

    `positions` [n] index the flattened [batch * length] grid of `sequence`: unlike GluonNLP's
    [batch, masks] table it has no padding, which would be projected for nothing.
    """
    return decoder_hidden(model, sequence.reshape((-3, 0)).take(positions))


def decoder_hidden(model: nlp.model.BERTModel, hidden_states: NDArray) -> NDArray:
    """Return the decoder's hidden states [n, hidden] of encoded positions [n, hidden]."""
    transform, gelu, norm, _ = model.decoder
    if runs_on_cpu(hidden_states):
        return layer_norm(norm, nd.LeakyReLU(dense(transform, hidden_states), act_type="gelu"))
    return norm(gelu(transform(hidden_states)))


def decode(model: nlp.model.BERTModel, hidden_states: NDArray) -> NDArray:
    """Project hidden states [n, hidden] onto the vocabulary: logits [n, vocabulary].

    Computed as matrix times hidden states: the few hidden states are then the operand that oneDNN
    reorders, not the matrix. While a gradient is recorded, the bias is added as an outer product:
    MXNet's broadcast sums its gradient slowly. Takes a fifth less time than the layer itself.
    """
    layer = model.decoder[3]
    weight = bfloat16.operand(layer.weight, hidden_states.context)
    bias = layer.bias.data(hidden_states.context)
    count = hidden_states.shape[0]
    if weight.dtype == bfloat16.DTYPE:
        products = bfloat16.product(weight, bfloat16.padded(hidden_states))
        products = products.transpose().slice_axis(axis=0, begin=0, end=count)
    else:
        products = nd.FullyConnected(weight, hidden_states, no_bias=True, num_hidden=count)
        products = products.transpose()
    bias = bias.reshape((1, -1))  # as products, [n, vocabulary]
    if not autograd.is_recording():
        return nd.broadcast_add(products, bias)
    ones = nd.ones((count, 1), ctx=hidden_states.context, dtype=bias.dtype)
    return nd.elemwise_add(products, nd.dot(ones, bias))


def set_dtype(network: Block, dtype: str) -> None:
    """Let a model or classifier compute in float32, float16 or bfloat16.

    In float16 the parameters are cast; in bfloat16 products alone are, see bort.bfloat16.
    """
    if dtype == "bfloat16":
        bfloat16.use_bfloat16(getattr(network, "bort", network))
    else:
        network.cast(dtype)


def parameter_count(model: HybridBlock) -> int:
    """Return the number of distinct trainable values (the tied matrix counts once)."""
    parameters = {id(p): p for p in model.collect_params().values()}
    return sum(p.data().size for p in parameters.values() if p.grad_req != "null")


def build_network(
    model_name: str,
    vocab_size: int,
    ctx: Context | Sequence[Context],
    use_decoder: bool = True,
    dropout: float = 0.0,
    random_init: bool = True,
    trainable: bool = True,
    options: BodyOptions = BORT_OPTIONS,
) -> nlp.model.BERTModel:
    """Build a network with random weights: one of GluonNLP's RoBERTa models or a shape of ours.

    Without `random_init` the weights are zero, which is faster before others are loaded; without
    `trainable` it has no gradients.

    Raises `UserError` for any other name.
    """
    vocab = range(vocab_size)  # only its length is used
    if model_name in ROBERTA and options == BORT_OPTIONS:
        network, _ = nlp.model.get_model(
            model_name, vocab=vocab, pretrained=False, use_decoder=use_decoder, dropout=dropout
        )
        initialize(network, ctx or mx.cpu(), random_init, trainable)
        return network
    try:
        shape = body_shape(model_name)
    except UserError as error:
        raise UserError(f"{error}, or one of {', '.join(ROBERTA)}") from None
    return get_bort_model(
        shape.name,
        vocab=vocab,
        ctx=ctx,
        use_decoder=use_decoder,
        dropout=dropout,
        random_init=random_init,
        trainable=trainable,
        options=options,
    )[0]
