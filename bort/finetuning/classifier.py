"""The classifier to fine-tune: built on a pretrained body, or loaded from a saved model."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Callable, Mapping, NamedTuple

import mxnet as mx

from bort import saved_model
from bort.communicator import Communicator
from bort.config import command_of
from bort.devices import devices_of
from bort.errors import UserError
from bort.finetuning.config import FinetuningSettings
from bort.parameters import load_parameters, parameter_file
from bort.saved_model import ModelConfig, load_model, model_config_path, read_model_config
from bort.tokenization import (
    TOKENIZER_FOLDER,
    Tokenizer,
    TokenizerSettings,
    load_tokenizer,
    load_tokenizer_folder,
)
from data.task import Task

DEFAULT_MODEL = "bort_4_8_768_1024"
PROGRAM = "finetune_classifier.py"
# By --init: Gluon's initializer of a new head, given its width.
HEAD_INITIALIZERS: Mapping[str, Callable[[float], Any]] = {
    "normal": mx.init.Normal,
    "uniform": mx.init.Uniform,
    "orthogonal": mx.init.Orthogonal,
    "xavier": lambda magnitude: mx.init.Xavier(magnitude=magnitude),
}


class Classifier(NamedTuple):
    """A network with a head, what it is, and the tokenizer of its vocabulary."""

    network: Any
    model_config: ModelConfig
    tokenizer: Tokenizer


def build_classifier(
    settings: FinetuningSettings, task: Task, communicator: Communicator
) -> Classifier:
    """Build the network on its devices: a fine-tuned one, or a body with a new head.

    Raises `UserError` when weights, shape, vocabulary or task do not go together.
    """
    devices = devices_of(settings.run.gpus, settings.run.cpu_contexts, communicator)
    if settings.classifier.model_parameters:
        classifier = load_classifier(settings, task, devices)
    else:
        classifier = new_classifier(settings, task, devices)
    classifier.network.cast(settings.optimizer.dtype)
    classifier.network.bort.encoder.hybridize(static_alloc=True)
    return classifier


def load_classifier(settings: FinetuningSettings, task: Task, devices: Any) -> Classifier:
    """Load a fine-tuned classifier whose answers are those of a task."""
    path = str(settings.classifier.model_parameters)
    trained = not settings.run.only_inference
    network, model_config, tokenizer = load_model(
        path, devices, settings.classifier.dropout, trained
    )
    if (model_config.kind, model_config.labels, model_config.num_outputs) != (
        task.kind,
        task.labels,
        task.num_outputs,
    ):
        raise UserError(
            f"--model_parameters {path}: a model of "
            f"{model_config.task or model_config.kind}, whose answers are not "
            f"those of {task.name}; give one of {task.model_task or task.name}"
        )
    if tokenizer is None:
        raise UserError(f"{path}: has no {TOKENIZER_FOLDER}/ beside it; restore it")
    if trained:
        details = {"command": command_of(PROGRAM, *settings)}
        model_config = dataclasses.replace(
            model_config, task=task.name, max_len=settings.task.max_len, details=details
        )
    return Classifier(network, model_config, tokenizer)


def new_classifier(settings: FinetuningSettings, task: Task, devices: Any) -> Classifier:
    """Build a body, from pretrained weights if they are given, with a new head."""
    given = settings.classifier
    path = parameter_file(given.pretrained_parameters) if given.pretrained_parameters else None
    origin = read_model_config(path) if path and os.path.exists(model_config_path(path)) else None
    if origin and given.model_name not in (None, origin.model):
        raise UserError(f"--model_name {given.model_name}: the weights are of {origin.model}")
    tokenizer = _tokenizer(settings.tokenizer, path, origin)
    model_config = ModelConfig(
        model=given.model_name or (origin.model if origin else DEFAULT_MODEL),
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        kind=task.kind,
        task=task.name,
        labels=task.labels,
        num_outputs=task.num_outputs,
        max_len=settings.task.max_len,
        extra_layer=given.extra_layer,
        race_cast=settings.task.race_cast if task.suite == "race" else "",
        details={"command": command_of(PROGRAM, *settings)},
    )
    mx.random.seed(settings.run.seed)
    network = saved_model.build_network(model_config, devices, given.dropout)
    network.classifier.initialize(
        HEAD_INITIALIZERS[given.init](given.prob), ctx=devices, force_reinit=True
    )
    if path and origin:
        saved_model.verify_parameters(path, origin)
    if path:
        load_parameters(network.bort, path, ignore_prefixes=("decoder.",))
    return Classifier(network, model_config, tokenizer)


def _tokenizer(flags: TokenizerSettings, path: str | None, origin: ModelConfig | None) -> Tokenizer:
    """Return the tokenizer that the flags name, else the one beside the weights."""
    named = any(dataclasses.asdict(flags).values())
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
