"""The classifier to fine-tune: built on a pretrained body, or loaded from a saved model."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import mxnet as mx

from bort import saved_model
from bort.bort import set_dtype
from bort.config import command_of
from bort.devices import resolve_dtype
from bort.errors import UserError, escaped
from bort.finetuning.config import ClassifierSettings, FinetuningSettings, TaskSettings
from bort.parameters import load_parameters, parameter_file
from bort.saved_model import ModelConfig, load_model, model_config_path, read_model_config
from bort.seeds import mxnet_seed
from bort.shapes import BORT_OPTIONS
from bort.tokenization import (
    TOKENIZER_FOLDER,
    Tokenizer,
    TokenizerSettings,
    load_tokenizer,
    load_tokenizer_folder,
)
from bort.types import Block, Context, JSONMapping
from data.race import Race
from data.task import Task
from data.tasks import check_inputs_version, get_task

DEFAULT_MODEL = "bort_4_8_768_1024"
PROGRAM = "finetune_classifier.py"
# By --init: Gluon's initializer of a new head, given --prob.
HEAD_INITIALIZERS: Mapping[str, Callable[[float], Any]] = {
    "normal": mx.init.Normal,
    "uniform": mx.init.Uniform,
    "orthogonal": mx.init.Orthogonal,
    "xavier": lambda magnitude: mx.init.Xavier(magnitude=magnitude),
}


class Classifier(NamedTuple):
    """A network with a head, its model config, and the tokenizer of its vocabulary."""

    network: Block
    model_config: ModelConfig
    tokenizer: Tokenizer


def task_of(settings: FinetuningSettings) -> Task:
    """Return the task of a run; how RACE's options are cast is what the model to load says.

    Raises `UserError` for an unknown task, and when --race_cast contradicts the model.
    """
    name, cast = settings.task.task_name, settings.task.race_cast
    path = settings.classifier.model_parameters
    if path:
        saved = read_model_config(parameter_file(path)).race_cast or cast
        if cast not in (saved, TaskSettings.race_cast):
            raise UserError(f"--race_cast {cast}: the model in {path} has the cast {saved}")
        cast = saved
    return get_task(name, race_cast=cast, flag="--task_name")


def build_classifier(
    settings: FinetuningSettings, task: Task, devices: Sequence[Context], processes: int
) -> Classifier:
    """Build the network of a run on its devices: a fine-tuned one, or a body with a new head.

    processes: of the run, for the command that is kept with the model.

    Raises `UserError` when weights, shape, vocabulary or task do not match.
    """
    given, max_len = settings.classifier, settings.task.max_len
    details = {"command": command_of(PROGRAM, *settings, processes=processes)}
    if given.model_parameters:
        trained = not settings.run.only_inference
        classifier = load_classifier(given.model_parameters, task, devices, given.dropout, trained)
        _check_flags(given, settings.tokenizer, classifier)
        if trained:
            classifier = for_task(classifier, task, max_len, details)
    else:
        classifier = new_classifier(
            given,
            settings.tokenizer,
            task,
            devices,
            seed=settings.run.seed,
            max_len=max_len,
            race_cast=settings.task.race_cast,
            details=details,
        )
    return prepared(classifier, settings.optimizer.dtype, devices)


def prepared(classifier: Classifier, dtype: str, devices: Sequence[Context]) -> Classifier:
    """Let the network compute in a dtype and hybridize its encoder; returns the classifier."""
    set_dtype(classifier.network, resolve_dtype(dtype, devices))
    classifier.network.bort.encoder.hybridize(static_alloc=True)
    return classifier


def load_classifier(
    path: str,
    task: Task,
    devices: Sequence[Context],
    dropout: float = 0.0,
    trained: bool = False,
) -> Classifier:
    """Load a fine-tuned classifier whose labels are those of a task; `trained`: with gradients."""
    network, model_config, tokenizer = load_model(path, devices, dropout, trained)
    if isinstance(task, Race) and model_config.race_cast not in ("", task.cast):
        raise UserError(
            f"{path}: a model for --race_cast {model_config.race_cast}; give this flag, or a model "
            f"for --race_cast {task.cast}"
        )
    if model_config.kind == saved_model.MASKED_LM:
        raise UserError(
            f"{path}: a pretrained model, not a classifier; fine-tune it with "
            "finetune_classifier.py --pretrained_parameters"
        )
    if (model_config.kind, model_config.labels, model_config.num_outputs) != (
        task.kind,
        task.labels,
        task.num_outputs,
    ):
        found, expected = (
            escaped(", ".join(labels)) or "none" for labels in (model_config.labels, task.labels)
        )
        differ = f" ({found} instead of {expected})" if found != expected else ""
        raise UserError(
            f"{path}: a model of {model_config.task or model_config.kind}, whose labels are not "
            f"those of {task.name}{differ}; give one of {task.model_task or task.name}"
        )
    check_inputs_version(task, model_config.inputs_version, path)
    tokenizer = saved_model.require_tokenizer(tokenizer, path)
    takes_several = len(task.text_columns) != 1
    if takes_several and not trained and not saved_model.has_our_pairs(model_config, tokenizer):
        raise UserError(
            f"{path}: another program has trained it; RoBERTa's pairs have two separators between "
            f"the texts, ours have one: train it further on {task.name} with "
            "finetune_classifier.py first"
        )
    return Classifier(network, model_config, tokenizer)


def _check_flags(
    given: ClassifierSettings, tokenizer_flags: TokenizerSettings, classifier: Classifier
) -> None:
    """Raise `UserError` when flags name another network or vocabulary than a loaded model has.

    A default does not count: it cannot be told from a flag that was left out.
    """
    path, loaded, defaults = given.model_parameters, classifier.model_config, ClassifierSettings()
    for name, own in (
        ("model_name", loaded.model),
        ("pooling", loaded.pooling),
        ("extra_layer", loaded.extra_layer),
    ):
        value = getattr(given, name)
        if value not in (getattr(defaults, name), own):
            shown = f"--{name}" if value is True else f"--{name} {value}"
            has = f"has {'none' if value is True else own}"
            raise UserError(f"{shown}: the model in {path} {has}; leave the flag out")
    fingerprint = classifier.tokenizer.fingerprint
    if _is_named(tokenizer_flags) and load_tokenizer(tokenizer_flags).fingerprint != fingerprint:
        raise UserError(
            f"--model_parameters {path}: trained with another vocabulary than the one that the "
            "flags name; leave them out: the model has its tokenizer"
        )


def for_task(classifier: Classifier, task: Task, max_len: int, details: JSONMapping) -> Classifier:
    """Return a loaded classifier as one that is trained further on a task."""
    model_config = dataclasses.replace(
        classifier.model_config,
        task=task.name,
        max_len=max_len,
        race_cast=task.cast if isinstance(task, Race) else "",
        details=dict(details),
    )
    return classifier._replace(model_config=model_config)


def new_classifier(
    settings: ClassifierSettings,
    tokenizer_flags: TokenizerSettings,
    task: Task,
    devices: Sequence[Context],
    *,
    seed: int,
    max_len: int,
    race_cast: str,
    details: JSONMapping,
) -> Classifier:
    """Build a body, from pretrained weights if they are given, with a new head."""
    path, origin = _pretrained(settings)
    if origin and settings.model_name not in (None, origin.model):
        raise UserError(f"--model_name {settings.model_name}: the weights are of {origin.model}")
    tokenizer = _tokenizer(tokenizer_flags, path, origin)
    model_config = ModelConfig(
        model=settings.model_name or (origin.model if origin else DEFAULT_MODEL),
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        kind=task.kind,
        task=task.name,
        labels=task.labels,
        num_outputs=task.num_outputs,
        max_len=max_len,
        extra_layer=settings.extra_layer,
        race_cast=race_cast if task.suite == "race" else "",
        inputs_version=task.inputs_version,
        pooling=settings.pooling,
        **(origin.body_options if origin else BORT_OPTIONS)._asdict(),
        details=dict(details),
    )
    mx.random.seed(mxnet_seed(seed))
    network = saved_model.build_network(model_config, devices, settings.dropout)
    network.classifier.initialize(
        HEAD_INITIALIZERS[settings.init](settings.prob), ctx=list(devices), force_reinit=True
    )
    if path and origin:
        saved_model.verify_parameters(path, origin)
    if path:
        load_parameters(network.bort, path, ignore_prefixes=("decoder.",))
    return Classifier(network, model_config, tokenizer)


def check_vocabulary(settings: ClassifierSettings, flags: TokenizerSettings) -> None:
    """Raise `UserError` when pretrained weights have another vocabulary than the flags name."""
    _tokenizer(flags, *_pretrained(settings))


def _pretrained(settings: ClassifierSettings) -> tuple[str | None, ModelConfig | None]:
    """Return the path of the pretrained weights and their model config, where there are any."""
    if not settings.pretrained_parameters:
        return None, None
    path = parameter_file(settings.pretrained_parameters)
    return path, read_model_config(path) if os.path.exists(model_config_path(path)) else None


def _is_named(flags: TokenizerSettings) -> bool:
    return any(dataclasses.asdict(flags).values())


def _tokenizer(flags: TokenizerSettings, path: str | None, origin: ModelConfig | None) -> Tokenizer:
    """Return the tokenizer that the flags name, else the one beside the weights.

    Raises `UserError` when it is not the one that the weights were trained with.
    """
    named = _is_named(flags)
    folder = os.path.join(os.path.dirname(path or ""), TOKENIZER_FOLDER)
    beside = load_tokenizer_folder(folder) if path and not named else None
    tokenizer = beside or load_tokenizer(flags)
    if origin and tokenizer.fingerprint != origin.tokenizer_fingerprint:
        raise UserError(
            f"{path}: trained with another vocabulary than {tokenizer.name} of "
            f"{tokenizer.vocab_size:,} tokens; name it with --dataset_name, --vocab_file and "
            "--bpe_ranks, or --sentencepiece"
        )
    return tokenizer
