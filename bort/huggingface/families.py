"""The families of models that compute what our networks do, and their names for its parameters.

They differ in more than names:

- RoBERTa numbers positions from pad_token_id + 1: its table begins with that many unused rows.
- BERT, RoBERTa and ELECTRA add a token type embedding, DistilBERT has none.
- The heads of DistilBERT's and ELECTRA's classifiers apply another function than tanh.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Mapping, NamedTuple, Optional, Tuple

from bort.errors import UserError, quoted

MASKED_LM_HEAD, CLASSIFIER_HEAD, CHOICE_HEAD = HEADS = (
    "MaskedLM",
    "SequenceClassification",
    "MultipleChoice",
)
# Only read: a body alone, and what the model was pretrained with.
BODY, PRETRAINING_HEAD = "Model", "PreTraining"

_BERT_DENSE = {
    "attention_cell.proj_query": "attention.self.query",
    "attention_cell.proj_key": "attention.self.key",
    "attention_cell.proj_value": "attention.self.value",
    "proj": "attention.output.dense",
    "ffn.ffn_1": "intermediate.dense",
    "ffn.ffn_2": "output.dense",
}
_BERT_NORMS = {"layer_norm": "attention.output.LayerNorm", "ffn.layer_norm": "output.LayerNorm"}
_DISTILBERT_DENSE = {
    "attention_cell.proj_query": "attention.q_lin",
    "attention_cell.proj_key": "attention.k_lin",
    "attention_cell.proj_value": "attention.v_lin",
    "proj": "attention.out_lin",
    "ffn.ffn_1": "ffn.lin1",
    "ffn.ffn_2": "ffn.lin2",
}
_DISTILBERT_NORMS = {"layer_norm": "sa_layer_norm", "ffn.layer_norm": "output_layer_norm"}


class Decoder(NamedTuple):
    """Names in a masked-LM head; versions of transformers differ in which bias they read."""

    dense: str
    norm: str
    bias: str
    second_bias: Optional[str]
    weight: str  # a second name of the word embeddings


class Family(NamedTuple):
    """A model type of transformers.

    class_name: begins the names of its classes.
    heads: of the classes that compute what our networks do.
    layers: where its layers are, before their number.
    dense, norms: {our name: its name} in a layer.
    refused_heads: why other classes do not.
    """

    class_name: str
    heads: Tuple[str, ...]
    decoder: Optional[Decoder] = None
    layers: str = "encoder.layer"
    dense: Mapping[str, str] = MappingProxyType(_BERT_DENSE)
    norms: Mapping[str, str] = MappingProxyType(_BERT_NORMS)
    has_types: bool = True
    refused_heads: Mapping[str, str] = MappingProxyType({})


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "roberta": Family(
            "Roberta",
            (*HEADS, BODY),
            Decoder(
                "lm_head.dense",
                "lm_head.layer_norm",
                "lm_head.bias",
                "lm_head.decoder.bias",
                "lm_head.decoder.weight",
            ),
        ),
        "bert": Family(
            "Bert",
            (*HEADS, BODY, PRETRAINING_HEAD),
            Decoder(
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.bias",
                "cls.predictions.decoder.bias",
                "cls.predictions.decoder.weight",
            ),
        ),
        "distilbert": Family(
            "DistilBert",
            (MASKED_LM_HEAD, BODY),
            Decoder(
                "vocab_transform",
                "vocab_layer_norm",
                "vocab_projector.bias",
                None,
                "vocab_projector.weight",
            ),
            "transformer.layer",
            MappingProxyType(_DISTILBERT_DENSE),
            MappingProxyType(_DISTILBERT_NORMS),
            has_types=False,
            refused_heads=MappingProxyType(
                {CLASSIFIER_HEAD: "its head applies ReLU, ours tanh", CHOICE_HEAD: "the same"}
            ),
        ),
        "electra": Family(
            "Electra",
            (BODY, PRETRAINING_HEAD),
            refused_heads=MappingProxyType(
                {
                    CLASSIFIER_HEAD: "its head applies GELU, ours tanh",
                    MASKED_LM_HEAD: "its generator; take the discriminator",
                }
            ),
        ),
    }
)
# The families that models are written as.
WRITTEN = ("roberta", "bert")
# Why others are not read.
_REFUSED_TYPES = {
    "albert": "all its layers share one set of parameters",
    "deberta": "its attention has relative positions",
    "deberta-v2": "its attention has relative positions",
    "mpnet": "its attention has relative positions",
    "modernbert": "its positions are rotary, and its LayerNorm comes first",
    "xlnet": "its attention has relative positions",
}


class Architecture(NamedTuple):
    """A model class of transformers, such as RobertaForMaskedLM."""

    family: str  # one of FAMILIES
    head: str  # one of HEADS, BODY or PRETRAINING_HEAD

    @property
    def name(self) -> str:
        """Return the name of the class."""
        link = "" if self.head == BODY else "For"
        return f"{FAMILIES[self.family].class_name}{link}{self.head}"

    @property
    def unused_positions(self) -> int:
        """Return how many more rows than pad_id the position table has before its first."""
        return 1 if self.family == "roberta" else 0

    @property
    def is_classifier(self) -> bool:
        """Return whether it has one of the two kinds of classifying heads."""
        return self.head in (CLASSIFIER_HEAD, CHOICE_HEAD)

    @property
    def decoder(self) -> Optional[Decoder]:
        """Return the names in its masked-LM head; None if it has no such head."""
        with_decoder = self.head == MASKED_LM_HEAD or self == ("bert", PRETRAINING_HEAD)
        return FAMILIES[self.family].decoder if with_decoder else None

    @property
    def uses_pooler(self) -> bool:
        """Return whether its logits depend on a pooler: Dense(hidden, tanh) over token 0."""
        return self.is_classifier and self != ("roberta", CLASSIFIER_HEAD)


def family_of(model_type: Optional[str]) -> str:
    """Return a model type if it is supported; else raises `UserError` with the reason."""
    if model_type in FAMILIES:
        return str(model_type)
    if model_type is None:
        raise UserError(f"config.json has no model_type; add one of {', '.join(FAMILIES)}")
    reason = _REFUSED_TYPES.get(str(model_type))
    raise UserError(
        f"model_type is {quoted(model_type)}{f': {reason}' if reason else ''}; "
        f"expected one of {', '.join(FAMILIES)}"
    )


def architecture_of(name: str) -> Architecture:
    """Return the architecture of a class name; raises `UserError` for an unsupported one."""
    known = [Architecture(name, head) for name, family in FAMILIES.items() for head in family.heads]
    supported = {architecture.name: architecture for architecture in known}
    if name in supported:
        return supported[name]
    for family in FAMILIES.values():
        for head, reason in family.refused_heads.items():
            if name == f"{family.class_name}For{head}":
                raise UserError(f"architecture {quoted(name)}: {reason}")
    raise UserError(f"architecture {quoted(name)}: expected one of {', '.join(supported)}")
