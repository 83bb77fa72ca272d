"""The model: BortModel, BortClassifier, and reading and writing their parameters."""

from __future__ import annotations

import os
from typing import Any

import gluonnlp as nlp
import mxnet as mx
import numpy as np
from mxnet import autograd, nd
from mxnet.gluon import HybridBlock, nn

from bort.devices import runs_on_cpu
from bort.encoder import Cut, Selection, backward, encode_embedding
from bort.errors import UserError
from bort.parameters import load_parameters
from bort.shapes import LAYER_NORM_EPS, MAX_LENGTH, ROBERTA, shape_of


class BortModel(nlp.model.RoBERTaModel):
    """Bort: token and position embeddings, post-LayerNorm encoder, tied masked-LM decoder.

    Inputs: token ids [batch, length], valid_length [batch], and, with a decoder, masked_positions
    [batch, masks]. Returns the encoded sequence [batch, length, hidden] and, with a decoder, the
    logits [batch, masks, vocabulary]. Positions at and beyond valid_length are zero.
    Neither token types nor pooler (Optimal Subarchitecture Extraction for BERT, released model).
    """

    def __call__(self, inputs: Any, valid_length: Any = None, masked_positions: Any = None) -> Any:
        """Run the model; raises `ValueError` for sequences longer than its position table."""
        check_length(self, inputs)
        return super().__call__(inputs, valid_length, masked_positions)


class BortClassifier(HybridBlock):
    """Dropout - Dense(hidden, tanh) - Dropout - Dense(num_classes) over the first token's vector.

    Inputs: token ids [batch, length] and valid_length [batch]; returns scores [batch, num_classes].
    `bort` may be any BERTModel without decoder; with `extra_layer` one more Dense(hidden) comes
    before the rest, as the paper is said to have had for CoLA.
    """

    def __init__(
        self,
        bort: nlp.model.BERTModel,
        num_classes: int = 2,
        dropout: float = 0.1,
        extra_layer: bool = False,
    ) -> None:
        super().__init__()
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

    def hybrid_forward(self, F: Any, inputs: Any, valid_length: Any) -> Any:  # noqa: N803
        """Score the sequences (shapes: see the class)."""
        return self.head(self.bort(inputs, valid_length))

    def head(self, sequence: Any) -> Any:
        """Return the scores [batch, num_classes] of an encoded sequence [batch, length, hidden]."""
        first = sequence.slice_axis(axis=1, begin=0, end=1).squeeze(axis=1)
        return self.classifier(first if self.extra is None else self.extra(first))


def check_length(model: nlp.model.BERTModel, inputs: Any) -> None:
    """Raise `ValueError` when token ids [batch, length] exceed the position table of the model."""
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
    ctx: Any = None,
    use_decoder: bool = True,
    root: str = "model",
    dropout: float = 0.1,
    max_length: int = MAX_LENGTH,
    draw: bool = True,
    gradients: bool = True,
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
        draw: draw random weights; zeros are made sooner, for whoever loads others at once.
        gradients: make room for gradients, which only training needs.

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
        layer_norm_eps=LAYER_NORM_EPS,
    )
    model = BortModel(
        encoder,
        vocab_size=vocabulary_size(vocab),
        units=shape.hidden,
        embed_size=shape.hidden,
        use_decoder=use_decoder,
    )
    ctx = ctx or mx.cpu()
    initialize(model, ctx, draw and not pretrained, gradients)
    if pretrained:
        path = os.path.join(root, "bort.params")
        if not os.path.exists(path):
            raise UserError(f"{path}: not found; scripts/download_model.sh fetches it")
        load_parameters(model, path, ignore_prefixes=() if use_decoder else ("decoder.",))
    return model, vocab


def _vocabulary(dataset_name: str | None) -> Any:
    from bort.tokenization import TokenizerSettings, load_tokenizer

    if dataset_name is None:
        raise UserError("get_bort_model needs vocab or dataset_name to know the vocabulary's size")
    return load_tokenizer(TokenizerSettings(dataset_name=dataset_name))


def vocabulary_size(vocab: Any) -> int:
    """Return the number of entries of a vocabulary or of one of our tokenizers."""
    return vocab.vocab_size if hasattr(vocab, "vocab_size") else len(vocab)


def initialize(model: HybridBlock, ctx: Any, draw: bool = True, gradients: bool = True) -> None:
    """Draw weights from Normal(0, 0.02) and give every parameter its shape by one forward pass.

    GluonNLP's Dense layers learn their input size from the first forward; before it, parameters
    can be neither saved nor broadcast. The draw follows `mx.random.seed`; without `draw` all
    weights are zero. Without `gradients` there are none, which halves the memory.
    """
    if not gradients:
        model.collect_params().setattr("grad_req", "null")
    weights = mx.init.Normal(0.02) if draw else mx.init.Zero()
    model.initialize(init=weights, ctx=ctx, force_reinit=True)
    for device in ctx if isinstance(ctx, (list, tuple)) else [ctx]:
        ids = mx.nd.zeros((1, 1), ctx=device)
        lengths = mx.nd.ones((1,), ctx=device)
        if isinstance(model, nlp.model.BERTModel):
            # GluonNLP's own way: ours asks for parameters that have their shapes.
            sequence = model._encode_sequence(ids, [], lengths)[0]
            if model._use_decoder:
                positions = mx.nd.zeros((1,), ctx=device)
                decode(model, masked_hidden(model, sequence, positions))
        else:
            model(ids, lengths)


def encode(
    model: nlp.model.BERTModel,
    ids: Any,
    valid_length: Any,
    first_only: bool = False,
    only: Selection | None = None,
) -> Any:
    """Encode token ids [batch, length] to [batch, length, hidden]; Bort and RoBERTa alike.

    `valid_length` [batch] is of the model's type. With `first_only` nothing but the first token's
    vector, [:, :1], is asked for; with `only` a selection of n positions, [n, hidden].
    """
    check_length(model, ids)
    if runs_on_cpu(ids):
        embedding = model.word_embed(ids)
        return encode_embedding(model.encoder, embedding, valid_length, None, first_only, only)
    return _selected(model._encode_sequence(ids, [], valid_length)[0], only)


def _selected(sequence: Any, only: Selection | None) -> Any:
    if only is None:
        return sequence
    return sequence.reshape((-3, 0)).take(only.table.take(only.places))


class EmbeddingRows:
    """A model's encoder for one batch, differentiated by hand where autograd is slow on a CPU.

    The gradient of the word embedding with respect to a batch's tokens is all zeros but for the
    rows of these tokens. Left to autograd it is a second matrix of the vocabulary's size, filled,
    added to that of the tied decoder and thrown away at every step: with 50,265 tokens, three times
    206 MB. Here the rows are a leaf of the graph. The other places are LayerNorms: see
    bort.encoder.
    """

    def __init__(self, model: nlp.model.BERTModel, ids: Any) -> None:
        """Look up the distinct ids of a batch [batch, length], an NDArray."""
        rows, places = np.unique(ids.asnumpy(), return_inverse=True)
        self._parameter = model.word_embed[0].weight
        self._context = ids.context
        self._rows = nd.array(rows, ctx=ids.context, dtype="int32")
        self.places = nd.array(places.reshape(ids.shape), ctx=ids.context, dtype="int32")
        self.table = self._parameter.data(ids.context).take(self._rows)
        self.table.attach_grad()
        self.cuts: list[Cut] = []

    def backward(self, head: Any, gradient: Any | None = None) -> None:
        """Differentiate what was recorded from `encode_rows` on: a loss [1], or an array of which
        the loss has this `gradient`.
        """
        backward(head, self.cuts, gradient)
        whole = self._parameter.grad(self._context)
        whole[self._rows] = whole.take(self._rows) + self.table.grad


def encode_rows(
    model: nlp.model.BERTModel,
    rows: EmbeddingRows,
    valid_length: Any,
    first_only: bool = False,
    only: Selection | None = None,
) -> Any:
    """Do what `encode` does, to be differentiated by `rows.backward`."""
    embedding = rows.table.take(rows.places)
    if runs_on_cpu(embedding):
        return encode_embedding(model.encoder, embedding, valid_length, rows.cuts, first_only, only)
    embedding = embedding.transpose((1, 0, 2))
    sequence = model.encoder(embedding, valid_length=valid_length)[0].transpose((1, 0, 2))
    return _selected(sequence, only)


def masked_hidden(model: nlp.model.BERTModel, sequence: Any, positions: Any) -> Any:
    """Return the decoder's hidden states [n, hidden] before the projection onto the vocabulary.

    `positions` [n] index the flattened [batch * length] grid of `sequence`: unlike GluonNLP's
    [batch, masks] table it has no padding, so nothing is projected in vain.
    """
    return decoder_hidden(model, sequence.reshape((-3, 0)).take(positions))


def decoder_hidden(model: nlp.model.BERTModel, rows: Any) -> Any:
    """Return the decoder's hidden states [n, hidden] of encoded positions [n, hidden]."""
    dense, gelu, layer_norm, _ = model.decoder
    return layer_norm(gelu(dense(rows)))


def decode(model: nlp.model.BERTModel, hidden: Any) -> Any:
    """Project hidden states [n, hidden] onto the vocabulary: logits [n, vocabulary].

    Written the other way round, matrix times hidden states: the few hidden states are then the
    operand that oneDNN reorders, not the matrix. Where a gradient will be asked for, the bias is
    added as an outer product: MXNet's broadcast sums it slowly. A fifth less time than the layer's.
    """
    layer = model.decoder[3]
    weight, bias = (one.data(hidden.context) for one in (layer.weight, layer.bias))
    products = nd.FullyConnected(weight, hidden, no_bias=True, num_hidden=hidden.shape[0])
    products, bias = products.transpose(), bias.reshape((1, -1))
    if not autograd.is_recording():
        return nd.broadcast_add(products, bias)
    ones = nd.ones((hidden.shape[0], 1), ctx=hidden.context, dtype=hidden.dtype)
    return nd.elemwise_add(products, nd.dot(ones, bias))


def parameter_count(model: HybridBlock) -> int:
    """Return the number of distinct trainable values (the tied matrix counts once)."""
    parameters = {id(p): p for p in model.collect_params().values()}
    return sum(p.data().size for p in parameters.values() if p.grad_req != "null")


def build_network(
    model_name: str,
    vocab_size: int,
    ctx: Any,
    use_decoder: bool = True,
    dropout: float = 0.0,
    draw: bool = True,
    gradients: bool = True,
) -> nlp.model.BERTModel:
    """Build a network with random weights: one of GluonNLP's RoBERTa models or a shape of ours.

    Without `draw` the weights are zero, for whoever loads others at once; without `gradients` it
    cannot be trained.

    Raises `UserError` for any other name.
    """
    vocab = range(vocab_size)  # asked for nothing but its length
    if model_name in ROBERTA:
        network, _ = nlp.model.get_model(
            model_name, vocab=vocab, pretrained=False, use_decoder=use_decoder, dropout=dropout
        )
        initialize(network, ctx or mx.cpu(), draw, gradients)
        return network
    try:
        shape_of(model_name)
    except UserError as error:
        raise UserError(f"{error}, or one of {', '.join(ROBERTA)}") from None
    return get_bort_model(
        model_name,
        vocab=vocab,
        ctx=ctx,
        use_decoder=use_decoder,
        dropout=dropout,
        draw=draw,
        gradients=gradients,
    )[0]
