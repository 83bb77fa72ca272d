"""Hugging Face's layouts of our networks: parameter names both ways, configuration.

Pure NumPy. Six architectures hold a Bort exactly: Bert and Roberta, each ForMaskedLM,
ForSequenceClassification and ForMultipleChoice. What differs beside the names:

- RoBERTa numbers positions from pad_token_id + 1 on: its table has that many unused rows in front.
- Both add a token type to every position; Bort has none. Going there it is a row of zeros, coming
  back the one row is added to the positions.
- The matrix that embedding and decoder share is stored once; the decoder's bias under both its
  names, because some versions of transformers read the one and some the other.
"""

from __future__ import annotations

import math
from typing import Any, Mapping, NamedTuple

import numpy as np

from bort.errors import UserError
from bort.shapes import LAYER_NORM_EPS, MAX_LENGTH, ROBERTA, Shape

Arrays = Mapping[str, np.ndarray]

FAMILIES = {"roberta": "Roberta", "bert": "Bert"}
HEADS = ("MaskedLM", "SequenceClassification", "MultipleChoice")
TEACHERS = {shape: name for name, shape in ROBERTA.items()}

# Ours on the left, theirs on the right; {} is the number of the layer.
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
# Of a masked-LM head: dense, LayerNorm, bias, and the second name of that bias.
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
_TIED_THERE = ("lm_head.decoder.weight", "cls.predictions.decoder.weight")


class Architecture(NamedTuple):
    """One of the classes of transformers, such as RobertaForMaskedLM."""

    family: str  # "roberta" or "bert"
    head: str  # one of HEADS

    @property
    def name(self) -> str:
        """Return the name of the class."""
        return f"{FAMILIES[self.family]}For{self.head}"

    @property
    def unused_positions(self) -> int:
        """Return how many rows of the position table stand before the first, beside pad_id."""
        return 1 if self.family == "roberta" else 0


def architecture_of(name: str) -> Architecture:
    """Return the architecture of a class's name; raises `UserError` for one of another form."""
    known = {one.name: one for one in (Architecture(f, h) for f in FAMILIES for h in HEADS)}
    if name not in known:
        raise UserError(f"architecture {name!r}: expected one of {', '.join(known)}")
    return known[name]


def names(architecture: Architecture, layers: int) -> dict[str, str]:
    """Return {our name: Hugging Face's} of every distinct parameter of a network."""
    body = dict(_EMBEDDINGS)
    for layer in range(layers):
        ours, theirs = f"encoder.transformer_cells.{layer}.", f"encoder.layer.{layer}."
        for mine, other in _DENSE.items():
            body |= _pair(ours + mine, theirs + other, "weight", "bias")
        for mine, other in _NORMS.items():
            body |= _pair(ours + mine, theirs + other, "gamma", "beta")
    family, head = architecture
    if head == "MaskedLM":
        return {mine: f"{family}.{other}" for mine, other in body.items()} | _decoder(family)
    return {f"bort.{mine}": f"{family}.{other}" for mine, other in body.items()} | _classifier(
        architecture
    )


def _pair(ours: str, theirs: str, *kinds: str) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{other}" for kind, other in zip(kinds, ("weight", "bias"))}


def _decoder(family: str) -> dict[str, str]:
    dense, norm, bias, _ = _DECODERS[family]
    layers = _pair("decoder.0", dense, "weight", "bias") | _pair("decoder.2", norm, "gamma", "beta")
    return {**layers, "decoder.3.bias": bias}


def _classifier(architecture: Architecture) -> dict[str, str]:
    """Return the names of Dense(hidden, tanh) and Dense(classes)."""
    inner, outer = f"{architecture.family}.pooler.dense", "classifier"
    if architecture.name == "RobertaForSequenceClassification":
        inner, outer = "classifier.dense", "classifier.out_proj"
    return _pair("classifier.1", inner, "weight", "bias") | _pair(
        "classifier.3", outer, "weight", "bias"
    )


def to_huggingface(
    parameters: Arrays, architecture: Architecture, pad_id: int
) -> dict[str, np.ndarray]:
    """Return the arrays of a network under Hugging Face's names, float32.

    Raises `UserError` when the network has not the parameters of the architecture.
    """
    layers = sum(name.endswith("proj_query.bias") for name in parameters)
    renamed = names(architecture, layers)
    odd = parameters.keys() - {_TIED} ^ renamed.keys()
    if odd:
        raise UserError(f"{architecture.name} has no place for the network: {min(odd)} differs")
    arrays = {theirs: parameters[ours].astype(np.float32) for ours, theirs in renamed.items()}
    table = f"{architecture.family}.{_EMBEDDINGS['encoder.position_weight']}"
    unused = architecture.unused_positions * (pad_id + 1)
    arrays[table] = np.pad(arrays[table], ((unused, 0), (0, 0)))
    arrays[_token_types(architecture)] = np.zeros((1, arrays[table].shape[1]), np.float32)
    if architecture.head == "MaskedLM":
        *_, bias, again = _DECODERS[architecture.family]
        arrays[again] = arrays[bias]
    return arrays


def _token_types(architecture: Architecture) -> str:
    return f"{architecture.family}.embeddings.token_type_embeddings.weight"


def from_huggingface(
    arrays: Arrays, architecture: Architecture, layers: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Return the arrays of Hugging Face under our names, float32, the tied matrix once.

    Raises `UserError` when one is missing, when one has no place here, and when a decoder is not
    tied to its embedding.
    """
    renamed = names(architecture, layers)
    expected = {*renamed.values(), _token_types(architecture)}
    if missing := expected - arrays.keys():
        raise UserError(f"{len(missing)} tensors are missing, the first is {min(missing)}")
    _check_surplus(arrays, expected, architecture)
    found = {ours: arrays[theirs].astype(np.float32) for ours, theirs in renamed.items()}
    table = next(name for name in found if name.endswith("encoder.position_weight"))
    first = architecture.unused_positions * (pad_id + 1)
    (token_type,) = arrays[_token_types(architecture)].astype(np.float32)
    found[table] = found[table][first:]
    if token_type.any():  # adding zeros would turn -0.0 into 0.0: round trips are exact
        found[table] = found[table] + token_type
    return found


def _check_surplus(arrays: Arrays, expected: set[str], architecture: Architecture) -> None:
    """Raise `UserError` for arrays that are neither expected, nor copies, nor without effect."""
    copies = dict.fromkeys(
        _TIED_THERE, f"{architecture.family}.{_EMBEDDINGS['word_embed.0.weight']}"
    )
    copies |= {again: bias for *_, bias, again in _DECODERS.values()}
    for name in sorted(arrays.keys() - expected):
        if name in copies and copies[name] in arrays:
            if not np.array_equal(arrays[name], arrays[copies[name]]):
                raise UserError(f"{name} differs from {copies[name]}; here the two are one")
        elif not _has_no_effect(name, architecture):
            raise UserError(f"{architecture.name}: there is no place for its tensor {name}")


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


def shape_in(config: Mapping[str, Any]) -> tuple[Architecture, Shape]:
    """Return architecture and shape of a config.json.

    Raises `UserError` naming the entry that stands for another computation than ours.
    """
    (name,) = config.get("architectures") or ("none",)
    architecture = architecture_of(name)
    pad_id = config.get("pad_token_id")
    if not isinstance(pad_id, int):
        raise UserError(f"pad_token_id is {pad_id!r}: expected a number")
    fixed = {
        "model_type": architecture.family,
        "hidden_act": "gelu",
        "type_vocab_size": 1,
        "max_position_embeddings": MAX_LENGTH + architecture.unused_positions * (pad_id + 1),
    }
    absent = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    wanted = {**fixed, **{entry: value for entry, value in absent.items() if entry in config}}
    for entry, value in wanted.items():
        if config.get(entry) != value:
            raise UserError(f"{entry} is {config.get(entry)!r}: Bort and RoBERTa have {value!r}")
    if not math.isclose(config.get("layer_norm_eps") or 0.0, LAYER_NORM_EPS):
        raise UserError(
            f"layer_norm_eps is {config.get('layer_norm_eps')}: the networks here have "
            f"{LAYER_NORM_EPS}"
        )
    entries = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size")
    sizes: list[Any] = [config.get(entry) for entry in entries]
    for entry, size in zip(entries, sizes):
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{entry} is {size!r}: expected a positive number")
    return architecture, Shape(*sizes)
