"""ONNX graphs with the inputs and outputs of Hugging Face's: for optimum and transformers.js.

    input_ids, attention_mask   int64 [batch, length], padded at the end
    token_type_ids              the same, of a body with token types
    logits                      float32: classifiers [batch, outputs], masked LM [batch, length,
                                vocabulary]

A multiple choice takes [batch, choices, length] and returns [batch, choices].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping, Sequence

import numpy as np

from bort.inference.onnx_graph import MASK_VALUE, NetworkDescription, Writer, metadata_of_graph
from bort.saved_model import MASKED_LM
from bort.types import TaskKind

if TYPE_CHECKING:
    import onnx

_INPUTS = ("input_ids", "attention_mask")
_TEXT_AXES = ["batch_size", "sequence_length"]
_CHOICE_AXES = ["batch_size", "num_choices", "sequence_length"]


class _HuggingFaceWriter(Writer):
    """Writes a network that takes a mask instead of lengths.

    has_choices: the inputs are [batch, choices, length].
    """

    def __init__(self, network: NetworkDescription, precision: str, has_choices: bool) -> None:
        super().__init__(network, precision)
        has_types = network.options.type_separator is not None
        names = (*_INPUTS, "token_type_ids") if has_types else _INPUTS
        self.inputs = {name: name for name in names}
        if has_choices:  # -> [batch * choices, length]
            length = self.graph("Shape", "input_ids", start=2)
            shape = self.graph("Concat", np.array([-1], np.int64), length, axis=0)
            self.inputs = {name: self.graph("Reshape", name, shape) for name in names}
        self.ids = self.inputs["input_ids"]

    def attention_mask(self) -> str:
        """Return the additive attention mask, 0 or very negative: [batch, 1, length]."""
        from onnx import TensorProto

        mask = self.graph("Cast", self.inputs["attention_mask"], to=TensorProto.FLOAT)
        additive = self.graph("Mul", self.graph("Sub", np.float32(1), mask), MASK_VALUE)
        return self.graph("Unsqueeze", additive, np.array([1], np.int64))

    def valid(self) -> str:
        """Return which tokens are no padding: bool [batch, length]."""
        from onnx import TensorProto

        return self.graph("Cast", self.inputs["attention_mask"], to=TensorProto.BOOL)

    def token_types(self) -> str:
        """Return the types that the tokenizer has given the tokens: int64 [batch, length]."""
        return self.inputs["token_type_ids"]


def build_huggingface(
    network: NetworkDescription, kind: str, precision: str, metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """Return the onnx.ModelProto of a network, with Hugging Face's inputs and outputs.

    kind: of the saved model (bort.saved_model.KINDS). `precision` is float32 or int8, as for
    `bort.inference.onnx_graph.build`; `metadata` goes into the file.
    """
    has_choices = kind == TaskKind.MULTIPLE_CHOICE
    writer = _HuggingFaceWriter(network, precision, has_choices)
    axes: Sequence[str] = _CHOICE_AXES if has_choices else _TEXT_AXES
    if kind == MASKED_LM:
        logits = writer.decoder(writer.encoder())
        shape = [*axes, len(network.parameters["word_embed.0.weight"])]
    else:
        logits = writer.classifier()
        shape = [axes[0], len(network.head[-1][1])]
    if has_choices:  # [batch * choices, 1] -> [batch, choices]
        logits = writer.graph("Reshape", logits, writer.graph("Shape", "input_ids", end=2))
        shape = list(axes[:2])
    return writer.graph.model(
        dict.fromkeys(writer.inputs, axes),
        {"logits": (logits, shape)},
        {**metadata_of_graph(network, precision), **metadata},
    )
