"""Hugging Face's layout of the networks: parameter names both ways, config.json.

Pure NumPy. Six architectures compute exactly what a Bort does: Bert and Roberta, each ForMaskedLM,
ForSequenceClassification and ForMultipleChoice. They differ in more than names:

- RoBERTa numbers positions from pad_token_id + 1: its table begins with that many unused rows.
- Both add a token type embedding; Bort has none. Exported, it is a row of zeros; imported, its only
  row is added to the positions.
- The matrix that embedding and decoder share is stored once, the decoder's bias under both its
  names: versions of transformers differ in which they read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from bort.errors import UserError, quoted
from bort.shapes import LAYER_NORM_EPS, MAX_LENGTH, ROBERTA, Shape, array_shapes, shape_of

Arrays = Mapping[str, np.ndarray]

FAMILIES = {"roberta": "Roberta", "bert": "Bert"}
HEADS = ("MaskedLM", "SequenceClassification", "MultipleChoice")
TEACHERS = {shape: name for name, shape in ROBERTA.items()}

# {our name: Hugging Face's}
_EMBEDDINGS = {
    "word_embed.0.weight": "embeddings.word_embeddings.weight",
    "encoder.position_weight": "embeddings.position_embeddings.weight",
    "encoder.layer_norm.gamma": "embeddings.LayerNorm.weight",
    "encoder.layer_norm.beta": "embeddings.LayerNorm.bias",
}
_DENSE = {
    "attention_cell.proj_query": "attention.self.query",
    "attention_cell.proj_key": "attention.self.key",
    "attention_cell.proj_value": "attention.self.value",
    "proj": "attention.output.dense",
    "ffn.ffn_1": "intermediate.dense",
    "ffn.ffn_2": "output.dense",
}
_NORMS = {"layer_norm": "attention.output.LayerNorm", "ffn.layer_norm": "output.LayerNorm"}
# Names in a masked-LM head: dense, LayerNorm, bias, and the second name of that bias.
_DECODERS = {
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.bias"),
    "bert": (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
        "cls.predictions.decoder.bias",
    ),
}
_TIED = "decoder.3.weight"
_HUGGINGFACE_TIED = ("lm_head.decoder.weight", "cls.predictions.decoder.weight")


class Architecture(NamedTuple):
    """A model class of transformers, such as RobertaForMaskedLM."""

    family: str  # "roberta" or "bert"
    head: str  # one of HEADS

    @property
    def name(self) -> str:
        """Return the name of the class."""
        return f"{FAMILIES[self.family]}For{self.head}"

    @property
    def unused_positions(self) -> int:
        """Return how many more rows than pad_id the position table has before its first."""
        return 1 if self.family == "roberta" else 0


def architecture_of(name: str) -> Architecture:
    """Return the architecture of a class name; raises `UserError` for an unsupported one."""
    known = [Architecture(family, head) for family in FAMILIES for head in HEADS]
    supported = {architecture.name: architecture for architecture in known}
    if name not in supported:
        raise UserError(f"architecture {quoted(name)}: expected one of {', '.join(supported)}")
    return supported[name]


def names(architecture: Architecture, layers: int) -> dict[str, str]:
    """Return {our name: Hugging Face's} of every distinct parameter of a network."""
    body = dict(_EMBEDDINGS)
    for layer in range(layers):
        ours, theirs = f"encoder.transformer_cells.{layer}.", f"encoder.layer.{layer}."
        for our_name, their_name in _DENSE.items():
            body |= _pair(ours + our_name, theirs + their_name, "weight", "bias")
        for our_name, their_name in _NORMS.items():
            body |= _pair(ours + our_name, theirs + their_name, "gamma", "beta")
    family, head = architecture
    body = {ours: f"{family}.{theirs}" for ours, theirs in body.items()}
    if head == "MaskedLM":
        return body | _decoder(family)
    return {f"bort.{ours}": theirs for ours, theirs in body.items()} | _classifier(architecture)


def _pair(ours: str, theirs: str, weight: str, bias: str) -> dict[str, str]:
    return {f"{ours}.{weight}": f"{theirs}.weight", f"{ours}.{bias}": f"{theirs}.bias"}


def _decoder(family: str) -> dict[str, str]:
    dense, norm, bias, _ = _DECODERS[family]
    layers = _pair("decoder.0", dense, "weight", "bias") | _pair("decoder.2", norm, "gamma", "beta")
    return {**layers, "decoder.3.bias": bias}


def _classifier(architecture: Architecture) -> dict[str, str]:
    """Return the names of the head: Dense(hidden, tanh) and Dense(classes)."""
    inner, outer = f"{architecture.family}.pooler.dense", "classifier"
    if architecture.name == "RobertaForSequenceClassification":
        inner, outer = "classifier.dense", "classifier.out_proj"
    return _pair("classifier.1", inner, "weight", "bias") | _pair(
        "classifier.3", outer, "weight", "bias"
    )


def parameter_shapes(
    shape: Shape, architecture: Architecture, vocab_size: int, num_outputs: int
) -> dict[str, tuple[int, ...]]:
    """Return {our name: shape} of every distinct parameter of a network."""
    hidden = shape.hidden
    body = array_shapes(shape, vocab_size)
    if architecture.head == "MaskedLM":
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
    parameters: Arrays, architecture: Architecture, pad_id: int
) -> dict[str, np.ndarray]:
    """Return the arrays of a network under Hugging Face's names, float32.

    Raises `UserError` when its parameters are not those of the architecture.
    """
    layers = sum(name.endswith("proj_query.bias") for name in parameters)
    renamed = names(architecture, layers)
    different = parameters.keys() - {_TIED} ^ renamed.keys()
    if different:
        raise UserError(f"{architecture.name} does not fit the network: {min(different)} differs")
    arrays = {theirs: parameters[ours].astype(np.float32) for ours, theirs in renamed.items()}
    table = f"{architecture.family}.{_EMBEDDINGS['encoder.position_weight']}"
    unused = architecture.unused_positions * (pad_id + 1)
    arrays[table] = np.pad(arrays[table], ((unused, 0), (0, 0)))
    arrays[_token_types(architecture)] = np.zeros((1, arrays[table].shape[1]), np.float32)
    if architecture.head == "MaskedLM":
        *_, bias, second = _DECODERS[architecture.family]
        arrays[second] = arrays[bias]
    return arrays


def _token_types(architecture: Architecture) -> str:
    return f"{architecture.family}.embeddings.token_type_embeddings.weight"


def from_huggingface(
    arrays: Arrays, architecture: Architecture, layers: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Return Hugging Face's arrays under our names, float32, the tied matrix once.

    Raises `UserError` for missing and surplus arrays, for a decoder that is not tied to its
    embedding, and for arrays that are not of floats.
    """
    renamed = names(architecture, layers)
    expected = {*renamed.values(), _token_types(architecture)}
    if missing := expected - arrays.keys():
        raise UserError(f"{len(missing)} tensors are missing, the first is {min(missing)}")
    _check_surplus(arrays, expected, architecture)
    for name in expected:
        if arrays[name].dtype.kind != "f":
            raise UserError(f"{name} has dtype {arrays[name].dtype}, expected floats")
    converted = {ours: arrays[theirs].astype(np.float32) for ours, theirs in renamed.items()}
    table = next(name for name in converted if name.endswith("encoder.position_weight"))
    token_types = arrays[_token_types(architecture)].astype(np.float32)  # [1, hidden]
    if converted[table].ndim != 2 or token_types.shape != (1, converted[table].shape[1]):
        raise UserError(
            f"{_token_types(architecture)} has shape {token_types.shape}, the position embeddings "
            f"have {converted[table].shape}"
        )
    converted[table] = converted[table][architecture.unused_positions * (pad_id + 1) :]
    if token_types.any():  # adding zeros would turn -0.0 into 0.0: round trips are exact
        converted[table] = converted[table] + token_types[0]
    return converted


def _check_surplus(arrays: Arrays, expected: set[str], architecture: Architecture) -> None:
    """Raise `UserError` for arrays that are neither expected, nor copies, nor without effect."""
    copies = dict.fromkeys(
        _HUGGINGFACE_TIED, f"{architecture.family}.{_EMBEDDINGS['word_embed.0.weight']}"
    )
    copies |= {second: bias for *_, bias, second in _DECODERS.values()}
    for name in sorted(arrays.keys() - expected):
        if name in copies and copies[name] in arrays:
            if not np.array_equal(arrays[name], arrays[copies[name]]):
                raise UserError(f"{name} differs from {copies[name]}; the networks here tie them")
        elif not _has_no_effect(name, architecture):
            raise UserError(f"{architecture.name}: has no parameter for the tensor {quoted(name)}")


def _has_no_effect(name: str, architecture: Architecture) -> bool:
    """Return whether the architecture computes its logits without this array."""
    buffers = {
        f"{architecture.family}.embeddings.{kind}" for kind in ("position_ids", "token_type_ids")
    }
    unpooled = architecture.head == "MaskedLM" or architecture == ("roberta", HEADS[1])
    return name in buffers or (unpooled and name.startswith(f"{architecture.family}.pooler."))


def configuration(
    shape: Shape, architecture: Architecture, special_ids: Mapping[str, int], vocab_size: int
) -> dict[str, Any]:
    """Return the config.json of a body; `special_ids` maps bos, pad and eos to their ids."""
    pad_id = special_ids["pad"]
    return {
        "architectures": [architecture.name],
        "model_type": architecture.family,
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": LAYER_NORM_EPS,
        "max_position_embeddings": MAX_LENGTH + architecture.unused_positions * (pad_id + 1),
        "type_vocab_size": 1,
        "tie_word_embeddings": True,
        "bos_token_id": special_ids["bos"],
        "pad_token_id": pad_id,
        "eos_token_id": special_ids["eos"],
        "torch_dtype": "float32",
    }


@dataclass(frozen=True)
class OurEntries:
    """Our own entries in config.json: parts of the model config."""

    model: str = ""
    kind: str = ""
    task: str = ""
    labels: Tuple[str, ...] = ()
    max_len: int = MAX_LENGTH
    race_cast: str = ""
    inputs_version: int = 1


@dataclass(frozen=True)
class HuggingFaceConfig:
    """What is read of a config.json; None where an entry is missing."""

    architectures: Optional[Tuple[str, ...]] = None
    model_type: Optional[str] = None
    vocab_size: Optional[int] = None
    pad_token_id: Optional[int] = None
    hidden_act: Optional[str] = None
    type_vocab_size: Optional[int] = None
    max_position_embeddings: Optional[int] = None
    layer_norm_eps: Optional[float] = None
    num_hidden_layers: Optional[int] = None
    num_attention_heads: Optional[int] = None
    intermediate_size: Optional[int] = None
    hidden_size: Optional[int] = None
    position_embedding_type: Optional[str] = "absolute"
    is_decoder: Optional[bool] = False
    add_cross_attention: Optional[bool] = False
    tie_word_embeddings: Optional[bool] = True
    problem_type: Optional[str] = None
    id2label: Optional[Mapping[str, str]] = None
    bort: OurEntries = OurEntries()


def parse_config(config: HuggingFaceConfig) -> tuple[Architecture, Shape]:
    """Return architecture and shape of a config.json.

    Raises `UserError` naming the entry that stands for another computation than ours, and for
    sizes that no network has, before anything is built.
    """
    names = config.architectures or ("none",)
    architecture = architecture_of(names[0] if len(names) == 1 else ", ".join(names))
    pad_id = config.pad_token_id
    if pad_id is None or not 0 <= pad_id < (config.vocab_size or 0):
        raise UserError(f"pad_token_id is {pad_id}, expected the id of a token")
    expected = {
        "model_type": architecture.family,
        "hidden_act": "gelu",
        "type_vocab_size": 1,
        "max_position_embeddings": MAX_LENGTH + architecture.unused_positions * (pad_id + 1),
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    for entry, value in expected.items():
        if getattr(config, entry) != value:
            raise UserError(
                f"{entry} is {quoted(getattr(config, entry))}: Bort and RoBERTa have {value!r}"
            )
    if not math.isclose(config.layer_norm_eps or 0.0, LAYER_NORM_EPS):
        raise UserError(
            f"layer_norm_eps is {config.layer_norm_eps}: the networks here have {LAYER_NORM_EPS}"
        )
    entries = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size")
    for entry in entries:
        if not (getattr(config, entry) or 0) >= 1:
            raise UserError(f"{entry} is {getattr(config, entry)}, expected a positive number")
    shape = Shape(*(getattr(config, entry) for entry in entries))
    return architecture, shape_of(shape.name)
