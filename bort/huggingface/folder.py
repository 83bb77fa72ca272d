"""A saved model as a folder that transformers loads, and such a folder as a saved model.

    model.safetensors, config.json                           the network
    tokenizer.json, tokenizer_config.json, ...               the tokenizer
    vocab.json and merges.txt, or tokenizer.model            its files, as in saved models;
                                                             WordPiece has tokenizer.json alone
    README.md                                                the model card
    SHA256SUMS                                               of the files above, for `sha256sum -c`

Needs NumPy and safetensors; torch only for weights in pytorch_model.bin.
"""

from __future__ import annotations

import dataclasses
import os
from types import MappingProxyType
from typing import Mapping, NamedTuple, Optional

import numpy as np

from bort.errors import UserError, escaped, quoted
from bort.files import atomic_write, read_json_as, write_json
from bort.huggingface import tokenizer as huggingface_tokenizer
from bort.huggingface import weights as huggingface
from bort.huggingface.config import (
    Description,
    HuggingFaceConfig,
    OurEntries,
    configuration,
    parse_config,
    with_model_type,
)
from bort.huggingface.families import (
    CHOICE_HEAD,
    CLASSIFIER_HEAD,
    MASKED_LM_HEAD,
    WRITTEN,
    Architecture,
)
from bort.huggingface.model_card import model_card
from bort.huggingface.tensors import WEIGHTS, read_tensors
from bort.parameters import check_finite_arrays
from bort.saved_model import (
    MASKED_LM,
    MAX_OUTPUTS,
    ModelConfig,
    SavedModel,
    build_network,
    has_our_pairs,
)
from bort.shapes import BORT_OPTIONS, MAX_LENGTH, MEAN, TOKEN_TYPES, BodyOptions, body_shape
from bort.sums import check_sums, write_sums
from bort.tokenization import Tokenizer
from bort.types import Block, JSONObject, TaskKind
from bort.wordpiece import TOKENIZER_CONFIG, WordPiece

CONFIG, README = "config.json", "README.md"
# What is read of a folder, apart from the weights: compared with SHA256SUMS.
READ_FILES = (
    *(CONFIG, "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt"),
    *(huggingface_tokenizer.JSON, TOKENIZER_CONFIG),
    *(huggingface_tokenizer.SPECIAL_TOKENS_MAP, huggingface_tokenizer.ADDED_TOKENS),
)
OURS = "bort"  # the key of our own entries in config.json
KEEP, FOLD = "keep", "fold"  # what is done with a body's two token types
# {kind of a saved model: the head that computes it}; CLASSIFIER_HEAD for the others.
_HEADS: Mapping[str, str] = MappingProxyType(
    {MASKED_LM: MASKED_LM_HEAD, TaskKind.MULTIPLE_CHOICE: CHOICE_HEAD}
)
_OUR_ENTRIES = ("model", "kind", "task", "labels", "max_len", "race_cast", "inputs_version")


# ---- export --------------------------------------------------------------------------------------


def architecture_for(model_config: ModelConfig, family: str) -> Architecture:
    """Return the architecture that computes what a saved model does.

    Raises `UserError` for the extra dense layer and for mean pooling, which no architecture has,
    and for a family that is not one of those written.
    """
    if family not in WRITTEN:
        raise UserError(f"family {quoted(family)}: expected one of {', '.join(WRITTEN)}")
    if model_config.extra_layer:
        raise UserError(
            "the classifier was trained with --extra_layer: no architecture of transformers has a "
            "second dense layer before its head; fine-tune without it to convert the model"
        )
    if model_config.pooling == MEAN:
        raise UserError(
            "the classifier was trained with --pooling mean: the classifiers of transformers take "
            "the first token; fine-tune with --pooling cls to convert the model"
        )
    return Architecture(family, _HEADS.get(model_config.kind, CLASSIFIER_HEAD))


def usual_family(tokenizer: Tokenizer) -> str:
    """Return the family whose tokenizer a model has: bert for a WordPiece, else roberta."""
    return "bert" if tokenizer.name == WordPiece.name else "roberta"


def write(folder: str, saved: SavedModel, family: Optional[str] = None) -> Architecture:
    """Write all files that transformers needs for a saved model; returns its architecture.

    family: one of `bort.huggingface.families.WRITTEN`; None: that of the model's tokenizer.

    Raises `UserError` for a model without tokenizer, with parameters that are NaN or infinite, or
    that no architecture computes, and when a file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    tokenizer = require_tokenizer(saved)
    architecture = architecture_for(saved.model_config, family or usual_family(tokenizer))
    collected = saved.network._collect_params_with_prefix()
    parameters = {name: parameter.data().asnumpy() for name, parameter in collected.items()}
    check_finite_arrays("the model", parameters.items())
    arrays = huggingface.to_huggingface(
        parameters, architecture, tokenizer.pad_id, saved.model_config.body_options
    )
    path = os.path.join(folder, WEIGHTS)
    try:  # transformers refuses a file without the format
        save_file(arrays, path, metadata={"format": "pt"})
    except SafetensorError as error:  # also of a full disk
        raise UserError(f"{path}: cannot be written ({escaped(str(error))})") from None
    card = model_card(
        saved.model_config, architecture, tokenizer.special_tokens, separators=separators_of(saved)
    )
    write_description(folder, saved, architecture, card)
    write_sums(folder)
    return architecture


def write_description(
    folder: str, saved: SavedModel, architecture: Architecture, card: str
) -> None:
    """Write config.json, the files of the tokenizer, and `card` as README.md.

    Raises `UserError` for a model without tokenizer.
    """
    model_config, tokenizer = saved.model_config, require_tokenizer(saved)
    config = _config(model_config, tokenizer, architecture)
    write_json(os.path.join(folder, CONFIG), config, with_sum=False)
    tokenizer.save(folder)
    described = huggingface_tokenizer.describe(
        folder,
        model_config.max_len,
        reads_special=model_config.kind == MASKED_LM,
        has_types=model_config.type_separator is not None,
        separators=separators_of(saved),
    )
    for name, content in described.items():
        write_json(os.path.join(folder, name), content, with_sum=False)
    with atomic_write(os.path.join(folder, README)) as file:
        file.write(card)


def separators_of(saved: SavedModel) -> int:
    """Return how many separators stand between the texts of a pair that a model was trained on."""
    if saved.model_config.kind == MASKED_LM:
        return 1
    return 1 if has_our_pairs(saved.model_config, require_tokenizer(saved)) else 2


def require_tokenizer(saved: SavedModel) -> Tokenizer:
    """Return the tokenizer of a saved model; raises `UserError` when it has none."""
    if saved.tokenizer is None:
        raise UserError(
            "the model has no tokenizer/ beside it: it was trained on shards of a version that did "
            "not include one; prepare them again"
        )
    return saved.tokenizer


def _config(
    model_config: ModelConfig, tokenizer: Tokenizer, architecture: Architecture
) -> JSONObject:
    ids = {"bos": tokenizer.bos_id, "pad": tokenizer.pad_id, "eos": tokenizer.eos_id}
    config = configuration(
        body_shape(model_config.model),
        architecture,
        ids,
        model_config.vocab_size,
        model_config.body_options,
    )
    if architecture.head == CLASSIFIER_HEAD:
        labels = model_config.labels or (model_config.task or "score",)
        regression = model_config.kind == TaskKind.REGRESSION
        config |= {
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
            "problem_type": "regression" if regression else "single_label_classification",
        }
    return {**config, OURS: {entry: getattr(model_config, entry) for entry in _OUR_ENTRIES}}


# ---- import --------------------------------------------------------------------------------------


class Import(NamedTuple):
    """A model read from a folder, and what a user should know of the conversion, a line each."""

    saved: SavedModel
    notices: list[str]


def read(folder: str) -> SavedModel:
    """Build the network of a folder, its token types kept: see `read_folder`."""
    return read_folder(folder).saved


def read_folder(folder: str, token_types: str = KEEP, origin: str = "") -> Import:
    """Build the network of a Hugging Face folder, with its model config and tokenizer.

    token_types: KEEP, or FOLD: of two token types the first is added to the positions and the
        second is dropped.
    origin: where the folder is from, for the model config.

    Every file is checked before the network is built.

    Raises `UserError` naming the file and the entry that stands for another computation than ours,
    and for another value of `token_types`.
    """
    if token_types not in (KEEP, FOLD):
        raise UserError(f"token_types {quoted(token_types)}: expected {KEEP} or {FOLD}")
    check_sums(folder, READ_FILES)
    config = read_json_as(os.path.join(folder, CONFIG), HuggingFaceConfig)
    try:
        config = with_model_type(config, folder)
        description = parse_config(config)
        tokenizer = huggingface_tokenizer.read_tokenizer(folder)
        tensors = huggingface.canonical(read_tensors(folder), description.architecture.family)
        if not description.has_class:
            found = huggingface.with_head(description.architecture, tensors)
            description = description._replace(architecture=found)
        gives_types = huggingface_tokenizer.gives_types(folder, description.architecture.family)
        keep = _keeps_types(description, token_types, gives_types)
        separator = tokenizer.eos_id if keep else None
        options = BodyOptions(description.layer_norm_eps, separator)
        model_config = _model_config(config, description, options, tokenizer, origin)
        if _is_foreign_roberta(model_config, tokenizer):
            one = huggingface_tokenizer.has_one_separator(folder)
            model_config = dataclasses.replace(model_config, one_separator=one)
        converted = _checked_arrays(tensors, description, model_config, tokenizer)
    except UserError as error:
        named = str(error).startswith(os.path.join(folder, ""))  # of a file in it
        raise UserError(str(error) if named else f"{folder}: {error}") from None
    network = _network(model_config, converted.parameters)
    return Import(SavedModel(network, model_config, tokenizer), converted.notices)


def _is_foreign_roberta(model_config: ModelConfig, tokenizer: Tokenizer) -> bool:
    """Return whether only its tokenizer says in which form a classifier takes pairs."""
    return model_config.kind != MASKED_LM and not has_our_pairs(model_config, tokenizer)


def _keeps_types(description: Description, token_types: str, gives_types: bool) -> bool:
    """Return whether a network gets token types.

    gives_types: whether its tokenizer does. Without, a classifier was trained on type 0 alone.

    Raises `UserError` when those of a fine-tuned classifier would be dropped: it may take pairs.
    """
    has_two = description.token_types == TOKEN_TYPES
    if has_two and description.architecture.is_classifier and not gives_types:
        return False
    if has_two and token_types == FOLD and description.architecture.is_classifier:
        raise UserError(
            f"--token_types fold: {description.architecture.name} may take pairs of texts, whose "
            "second one would lose its type; keep the types"
        )
    return has_two and token_types == KEEP


def _checked_arrays(
    tensors: huggingface.Arrays,
    description: Description,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
) -> huggingface.Converted:
    """Return the parameters under our names; raises `UserError` for a wrong shape or value."""
    architecture, shape = description.architecture, description.shape
    keep = model_config.type_separator is not None
    converted = huggingface.from_huggingface(
        tensors, architecture, shape.layers, tokenizer.pad_id, description.token_types, keep
    )
    expected = huggingface.parameter_shapes(
        shape, architecture, model_config.vocab_size, model_config.num_outputs, keep
    )
    for name, array in converted.parameters.items():
        if array.shape != expected[name]:
            raise UserError(
                f"{name} has shape {array.shape}; by {CONFIG} it would be {expected[name]}"
            )
    check_finite_arrays(WEIGHTS, converted.parameters.items())
    return converted


def _network(model_config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> Block:
    from mxnet import nd

    network = build_network(model_config)
    for name, parameter in network._collect_params_with_prefix().items():
        if name in arrays:  # the tied matrix has a second name
            parameter.set_data(nd.array(arrays[name], dtype="float32"))
    return network


def _model_config(
    config: HuggingFaceConfig,
    description: Description,
    options: BodyOptions,
    tokenizer: Tokenizer,
    origin: str,
) -> ModelConfig:
    """Return the model config of a folder, from config.json and our own entries in it."""
    architecture, shape = description.architecture, description.shape
    size, pad_id = tokenizer.vocab_size, tokenizer.pad_id
    if (config.vocab_size, description.pad_id) != (size, pad_id):
        raise UserError(
            f"{CONFIG} has {config.vocab_size} tokens and pads with {description.pad_id}, its "
            f"tokenizer has {size} and pads with {pad_id}"
        )
    named = _labels(config) if architecture.head == CLASSIFIER_HEAD else ()
    ours = _own_entries(config.bort, architecture, len(named))
    labels, kind, outputs = named or ours.labels, MASKED_LM, 0
    if architecture.head == CHOICE_HEAD:
        kind, outputs = TaskKind.MULTIPLE_CHOICE.value, 1
    elif architecture.head == CLASSIFIER_HEAD:
        kind, outputs = _classifier_kind(config.problem_type, len(labels), ours.kind), len(labels)
    name = ours.model
    if not name or body_shape(name) != shape:
        is_roberta = architecture.family == "roberta" and options == BORT_OPTIONS
        name = huggingface.TEACHERS.get(shape, shape.name) if is_roberta else shape.name
    if not 1 <= ours.max_len <= MAX_LENGTH:
        raise UserError(f"{CONFIG}: max_len is {ours.max_len}, expected 1 to {MAX_LENGTH}")
    return ModelConfig(
        model=name,
        vocab_size=size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        kind=kind,
        task=ours.task,
        labels=() if kind == TaskKind.REGRESSION else labels,
        num_outputs=outputs,
        max_len=ours.max_len,
        race_cast=ours.race_cast,
        inputs_version=ours.inputs_version,
        origin=origin,
        **options._asdict(),
        details={"converted_from": architecture.name},
    )


def _own_entries(ours: OurEntries, architecture: Architecture, num_labels: int) -> OurEntries:
    """Return our entries; of a model whose head was replaced since, those of its body.

    transformers keeps the entries when it gives a model a head of another kind or size.
    """
    is_same = _HEADS.get(ours.kind, CLASSIFIER_HEAD) == architecture.head
    if architecture.head == CLASSIFIER_HEAD:
        is_same = is_same and num_labels == (len(ours.labels) or 1)  # a regression has none
    return ours if is_same else OurEntries(model=ours.model, max_len=ours.max_len)


def _classifier_kind(problem: Optional[str], num_labels: int, own_kind: str) -> str:
    """Return the kind of a classifier of single texts or pairs.

    problem: its problem_type; own_kind: in our entries.

    Raises `UserError` for labels that do not exclude each other and for several scores.
    """
    if problem is None:  # as transformers decides
        problem = "regression" if num_labels == 1 else "single_label_classification"
    if problem == "regression" and num_labels == 1:
        return TaskKind.REGRESSION.value
    if problem != "single_label_classification" or num_labels < 2:
        raise UserError(
            f"{CONFIG}: problem_type is {quoted(problem)} with {num_labels} labels; supported are "
            "single_label_classification, and regression with one"
        )
    is_candidates = own_kind == TaskKind.CANDIDATES
    return TaskKind.CANDIDATES.value if is_candidates else TaskKind.CLASSIFICATION.value


def _labels(config: HuggingFaceConfig) -> tuple[str, ...]:
    """Return the labels of {"0": label, "1": label, ...} in order.

    Without: transformers' names for as many as num_labels says, two by default.
    """
    named = config.id2label
    if named is None:
        count = 2 if config.num_labels is None else config.num_labels
        named = {str(number): f"LABEL_{number}" for number in range(min(count, MAX_OUTPUTS + 1))}
    numbers = [str(number) for number in range(len(named))]
    if not 1 <= len(named) <= MAX_OUTPUTS or named.keys() != set(numbers):
        raise UserError(f"{CONFIG}: id2label does not number its labels from 0")
    labels = tuple(named[number] for number in numbers)
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise UserError(f"{CONFIG}: id2label has the label {quoted(twice)} twice; rename one")
    return labels
