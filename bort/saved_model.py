"""A saved model carries all that its use needs: weights, shape, task, labels and tokenizer.

    <folder>/<name>.params   parameters, MXNet's format, the tied matrix once
             <name>.json     the model config: shape, task, labels, SHA-256 of the parameters
             tokenizer/      the files of its vocabulary

Fine-tuning writes `best`, a pretraining checkpoint holds `model`.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Optional, Tuple, Union

from bort.errors import UserError, quoted
from bort.files import MODEL_BYTES, atomic_path, read_json_as, sha256_of, write_json
from bort.parameters import load_parameters, parameter_file, save_parameters
from bort.shapes import (
    BORT_OPTIONS,
    CLS,
    LAYER_NORM_EPS,
    MAX_LENGTH,
    POOLINGS,
    BodyOptions,
    body_shape,
    check_layer_norm_eps,
)
from bort.tokenization import (
    MAX_VOCABULARY,
    TOKENIZER_FOLDER,
    ByteLevelBPE,
    Tokenizer,
    load_tokenizer_folder,
    save_tokenizer,
)
from bort.types import Block, Context, JSONObject, TaskKind

FORMAT_VERSION = 1
MASKED_LM = "masked_lm"
KINDS = (MASKED_LM, *TaskKind)
MAX_OUTPUTS = 100_000


@dataclass(frozen=True)
class ModelConfig:
    """What a saved network is; the content of <name>.json.

    model: a shape's name, or roberta_12_768_12 or roberta_24_1024_16.
    vocab_size, tokenizer_fingerprint: of the vocabulary that the network was trained with.
    kind: masked_lm, or the kind of the task (bort.types.TaskKind).
    task, labels, num_outputs: of a classifier; empty and 0 for masked_lm.
    max_len: tokens that an input is truncated to.
    extra_layer: a dense layer stands between the body and the classifier.
    race_cast: how RACE's options are cast; empty for other tasks.
    inputs_version: version of the texts made from the task's rows (data.task.Task).
    layer_norm_eps, type_separator: of the body (bort.shapes.BodyOptions).
    pooling: what the head is applied to (bort.shapes.POOLINGS).
    one_separator: another program has trained a classifier of pairs in our form, as the tokenizer
        says that came with it.
    origin: for a model from the Hugging Face hub its name and revision, for people.
    details: metrics, data and command, for people.
    sha256: of the parameter file; empty where an earlier version has not recorded it.
    """

    model: str
    vocab_size: int
    tokenizer_fingerprint: str
    kind: str
    task: str = ""
    labels: Tuple[str, ...] = ()
    num_outputs: int = 0
    max_len: int = MAX_LENGTH
    extra_layer: bool = False
    race_cast: str = ""
    inputs_version: int = 1
    layer_norm_eps: float = LAYER_NORM_EPS
    type_separator: Optional[int] = None
    pooling: str = CLS
    one_separator: bool = False
    origin: str = ""
    details: JSONObject = dataclasses.field(default_factory=dict)
    sha256: str = dataclasses.field(default="", compare=False)

    @property
    def body_options(self) -> BodyOptions:
        """Return what the body has besides its shape."""
        return BodyOptions(self.layer_norm_eps, self.type_separator)


@dataclass(frozen=True)
class _StoredConfig(ModelConfig):
    """A model config as it is in the file."""

    format: int = 0


class SavedModel(NamedTuple):
    """A loaded network, its model config, and its tokenizer (None if none was saved)."""

    network: Block
    model_config: ModelConfig
    tokenizer: Optional[Tokenizer]


def save_model(
    path: Union[str, os.PathLike[str]],
    network: Block,
    model_config: ModelConfig,
    tokenizer: Optional[Tokenizer],
) -> None:
    """Write a network to `path`, which ends in .params, with its model config and its tokenizer.

    The parameters come last and in one rename: a file that is there has its config beside it.
    """
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with atomic_path(path) as temporary:
        save_parameters(network, temporary)
        _save_config(path, model_config, tokenizer, sha256_of(temporary))


def save_model_config(path: str, model_config: ModelConfig, tokenizer: Optional[Tokenizer]) -> None:
    """Write what belongs beside the parameter file `path`: its model config and its tokenizer."""
    sha256 = sha256_of(path) if os.path.exists(path) else ""
    _save_config(path, model_config, tokenizer, sha256)


def _save_config(
    path: str, model_config: ModelConfig, tokenizer: Optional[Tokenizer], sha256: str
) -> None:
    if tokenizer is not None:
        save_tokenizer(tokenizer, os.path.join(os.path.dirname(path), TOKENIZER_FOLDER))
    content = dataclasses.asdict(dataclasses.replace(model_config, sha256=sha256))
    write_json(model_config_path(path), {"format": FORMAT_VERSION, **content})


def load_model(
    path: Union[str, os.PathLike[str]],
    ctx: Optional[Context] = None,
    dropout: float = 0.0,
    trainable: bool = False,
) -> SavedModel:
    """Load a saved model: its .params file, its folder, or a pretraining checkpoint or run.

    `dropout` and `trainable` are for training it further.

    Raises `UserError` when it is absent or damaged, was saved without a model config, or has
    another tokenizer beside it than the one it was trained with.
    """
    found = parameter_file(path)
    model_config = read_model_config(found)
    with ThreadPoolExecutor(2) as pool:  # while the parameters are read from the disk
        tokenizer = pool.submit(load_model_tokenizer, found, model_config)
        verified = pool.submit(verify_parameters, found, model_config)
        network = build_network(model_config, ctx, dropout, random_init=False, trainable=trainable)
        load_parameters(network, found)
        verified.result()
        return SavedModel(network, model_config, tokenizer.result())


def load_model_tokenizer(path: str, model_config: ModelConfig) -> Optional[Tokenizer]:
    """Return the tokenizer beside a .params file; None when there is none.

    Raises `UserError` when it is not the one that the network was trained with: every id would
    stand for another token.
    """
    folder = os.path.join(os.path.dirname(path), TOKENIZER_FOLDER)
    tokenizer = load_tokenizer_folder(folder)
    if tokenizer and tokenizer.fingerprint != model_config.tokenizer_fingerprint:
        raise UserError(
            f"{folder}: is another tokenizer than the one that {os.path.basename(path)} was "
            "trained with; restore the folder"
        )
    return tokenizer


def require_tokenizer(tokenizer: Optional[Tokenizer], path: str) -> Tokenizer:
    """Return the tokenizer of a saved model; raises `UserError` when it has none."""
    if tokenizer is None:
        raise UserError(f"{path}: has no {TOKENIZER_FOLDER}/ beside it; restore it")
    return tokenizer


def has_our_pairs(model_config: ModelConfig, tokenizer: Tokenizer) -> bool:
    """Return whether a classifier takes pairs of texts in our form, `<s> A </s> B </s>`.

    One without a task was trained by another program. BERT's pairs have that form; those of
    RoBERTa, which has a byte-level BPE, have two separators between the texts, unless it was
    trained with a tokenizer that was written here.
    """
    is_ours = bool(model_config.task) or model_config.one_separator
    return is_ours or tokenizer.name != ByteLevelBPE.name


def verify_parameters(path: str, model_config: ModelConfig) -> None:
    """Raise `UserError` when a .params file is not the one that its model config was written for.

    Costs one reading of the file: about 0.2 s for Bort. A config without a SHA-256 verifies
    nothing.
    """
    if model_config.sha256 and sha256_of(path, MODEL_BYTES) != model_config.sha256:
        raise UserError(
            f"{path}: its SHA-256 is not that in {os.path.basename(model_config_path(path))}; the "
            "file is damaged or of another model: restore it"
        )


def read_model_config(path: str) -> ModelConfig:
    """Read the model config beside a .params file.

    Raises `UserError` when there is none, and for one of another format or with impossible values.
    """
    name = model_config_path(path)
    if not os.path.exists(name):
        raise UserError(
            f"{path}: has no {os.path.basename(name)} beside it, which says what it is; restore "
            "it, or give the model that it was exported from"
        )
    stored = read_json_as(name, _StoredConfig)
    if stored.format != FORMAT_VERSION:
        raise UserError(f"{name}: is not a model config of format {FORMAT_VERSION}")
    values = {field.name: getattr(stored, field.name) for field in dataclasses.fields(ModelConfig)}
    try:
        _check(ModelConfig(**values))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return ModelConfig(**values)


def body_options_of(path: str) -> BodyOptions:
    """Return those that the model config beside a .params file states; without one, Bort's."""
    if os.path.exists(model_config_path(path)):
        return read_model_config(path).body_options
    return BORT_OPTIONS


def _check(model_config: ModelConfig) -> None:
    """Raise `UserError` for a value that no saved model has, before anything is built of it."""
    body_shape(model_config.model)
    limits = {
        "vocab_size": (1, MAX_VOCABULARY),
        "num_outputs": (0, MAX_OUTPUTS),
        "max_len": (1, MAX_LENGTH),
    }
    for name, (low, high) in limits.items():
        value = getattr(model_config, name)
        if not low <= value <= high:
            raise UserError(f"{name} is {quoted(value)}, expected {low} to {high}")
    eps, separator = model_config.body_options
    check_layer_norm_eps(eps)
    if separator is not None and not 0 <= separator < model_config.vocab_size:
        raise UserError(f"type_separator is {quoted(separator)}, expected the id of a token")
    if model_config.pooling not in POOLINGS:
        raise UserError(f"pooling is {quoted(model_config.pooling)}, expected cls or mean")
    if model_config.kind not in KINDS:
        raise UserError(f"kind is {quoted(model_config.kind)}, expected one of {', '.join(KINDS)}")
    labels, outputs = len(model_config.labels), model_config.num_outputs
    if model_config.kind == TaskKind.CLASSIFICATION and labels != outputs:
        raise UserError(f"num_outputs is {outputs}, but there are {labels} labels")


def build_network(
    model_config: ModelConfig,
    ctx: Optional[Context] = None,
    dropout: float = 0.0,
    random_init: bool = True,
    trainable: bool = True,
) -> Block:
    """Build the network of a model config, with random weights or, without `random_init`, zeros.

    Without `trainable` it has no gradients.
    """
    import mxnet as mx

    from bort import bort

    masked_lm = model_config.kind == MASKED_LM
    body = bort.build_network(
        model_config.model,
        model_config.vocab_size,
        ctx,
        masked_lm,
        dropout,
        random_init,
        trainable,
        model_config.body_options,
    )
    if masked_lm:
        return body
    classifier = bort.BortClassifier(
        body,
        model_config.num_outputs,
        dropout,
        model_config.extra_layer,
        model_config.pooling,
    )
    if random_init:
        bort.initialize(classifier, ctx, trainable=trainable)
    else:  # the body is initialized
        if not trainable:
            classifier.collect_params().setattr("grad_req", "null")
        for block in filter(None, (classifier.classifier, classifier.extra)):
            block.initialize(mx.init.Zero(), ctx=ctx)
    return classifier


def model_config_path(path: str) -> str:
    """Return the path of the model config of a .params file."""
    return f"{path[: -len('.params')] if path.endswith('.params') else path}.json"
