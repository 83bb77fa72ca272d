"""config.json of a Hugging Face folder: what is read of it, what is refused, how it is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Mapping, NamedTuple, Optional, Tuple

from bort.errors import UserError, quoted
from bort.huggingface.families import BODY, FAMILIES, Architecture, architecture_of, family_of
from bort.huggingface.tensors import read_tensors
from bort.shapes import (
    MAX_LENGTH,
    TOKEN_TYPES,
    BodyOptions,
    Shape,
    check_layer_norm_eps,
    shape_of,
)
from bort.types import JSONMapping, JSONObject

# Of transformers' classes, for entries that a file does not have.
_DEFAULTS: JSONMapping = MappingProxyType(
    {
        "hidden_act": "gelu",
        "type_vocab_size": 2,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
)
_ROBERTA_PAD_ID = 1


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
    """What is read of a config.json; None where an entry is missing.

    dim to activation: DistilBERT's names for hidden_size, intermediate_size, ...
    """

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
    embedding_size: Optional[int] = None
    position_embedding_type: Optional[str] = "absolute"
    is_decoder: Optional[bool] = False
    add_cross_attention: Optional[bool] = False
    tie_word_embeddings: Optional[bool] = True
    problem_type: Optional[str] = None
    id2label: Optional[Mapping[str, str]] = None
    num_labels: Optional[int] = None  # read where there is no id2label
    dim: Optional[int] = None
    hidden_dim: Optional[int] = None
    n_layers: Optional[int] = None
    n_heads: Optional[int] = None
    activation: Optional[str] = None
    bort: OurEntries = OurEntries()


class Description(NamedTuple):
    """What a config.json says of a network.

    token_types: rows of its token type table; 0 if it has none.
    has_class: whether it names the class; without, `architecture` is the body's.
    """

    architecture: Architecture
    shape: Shape
    pad_id: int
    layer_norm_eps: float
    token_types: int
    has_class: bool = True


def with_model_type(config: HuggingFaceConfig, folder: str) -> HuggingFaceConfig:
    """Return the config of a folder with a model_type, which those of 2019 may lack.

    It is that of the class, or of the family whose prefix the tensors have, if any.
    """
    if config.model_type is not None:
        return config
    if config.architectures:
        family: Optional[str] = architecture_of(", ".join(config.architectures)).family
    else:
        prefixes = {name.partition(".")[0] for name in read_tensors(folder)}
        family = next(iter(prefixes & FAMILIES.keys()), None)
    return replace(config, model_type=family)


def parse_config(config: HuggingFaceConfig) -> Description:
    """Return the network that a config.json describes.

    Raises `UserError` naming the entry that stands for another computation than ours, and for
    sizes that no network has, before anything is built.
    """
    family = family_of(config.model_type)
    architecture = _architecture(config, family)
    given = {name: getattr(config, name) for name in _DEFAULTS}
    entries = ["num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size"]
    if family == "distilbert":
        entries = ["n_layers", "n_heads", "hidden_dim", "dim"]
        given["hidden_act"] = config.activation
        given["layer_norm_eps"] = None  # fixed in the class
    defaults = {**_DEFAULTS, **({"pad_token_id": _ROBERTA_PAD_ID} if family == "roberta" else {})}
    found = {name: defaults[name] if value is None else value for name, value in given.items()}
    pad_id, eps = found["pad_token_id"], found["layer_norm_eps"]
    if not 0 <= pad_id < (config.vocab_size or 0):
        raise UserError(f"pad_token_id is {pad_id}, expected the id of a token")
    check_layer_norm_eps(eps)
    _require_our_computation(config, found, architecture, pad_id)
    for entry in entries:
        if not (getattr(config, entry) or 0) >= 1:
            raise UserError(f"{entry} is {getattr(config, entry)}, expected a positive number")
    shape = shape_of(Shape(*(getattr(config, entry) for entry in entries)).name)
    if family == "electra" and config.embedding_size not in (None, shape.hidden):
        raise UserError(
            f"embedding_size is {config.embedding_size}: the networks here embed tokens in the "
            f"hidden size, {shape.hidden}"
        )
    types = 0 if family == "distilbert" else found["type_vocab_size"]
    return Description(architecture, shape, pad_id, eps, types, bool(config.architectures))


def _architecture(config: HuggingFaceConfig, family: str) -> Architecture:
    if not config.architectures:
        return Architecture(family, BODY)
    architecture = architecture_of(", ".join(config.architectures))
    if architecture.family != family:
        raise UserError(f"model_type is {quoted(family)}: {architecture.name} is another one")
    return architecture


def _require_our_computation(
    config: HuggingFaceConfig, found: JSONMapping, architecture: Architecture, pad_id: int
) -> None:
    """Raise `UserError` for an entry whose value our networks do not have."""
    positions = MAX_LENGTH + architecture.unused_positions * (pad_id + 1)
    expected = {
        "hidden_act": ("gelu", "gelu_python"),  # the same function in other code
        "type_vocab_size": (1, TOKEN_TYPES),
        "max_position_embeddings": (positions,),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        # Of a body or a classifier it says nothing.
        "tie_word_embeddings": (True,) if architecture.decoder else (True, False),
    }
    for entry, values in expected.items():
        value = found.get(entry, getattr(config, entry))
        if value not in values:
            raise UserError(
                f"{entry} is {quoted(value)}: the networks here have "
                f"{' or '.join(map(repr, values))}"
            )


def configuration(
    shape: Shape,
    architecture: Architecture,
    special_ids: Mapping[str, int],
    vocab_size: int,
    options: BodyOptions,
) -> JSONObject:
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
        "layer_norm_eps": options.layer_norm_eps,
        "max_position_embeddings": MAX_LENGTH + architecture.unused_positions * (pad_id + 1),
        "type_vocab_size": 1 if options.type_separator is None else TOKEN_TYPES,
        "tie_word_embeddings": True,
        "bos_token_id": special_ids["bos"],
        "pad_token_id": pad_id,
        "eos_token_id": special_ids["eos"],
        "torch_dtype": "float32",
    }
