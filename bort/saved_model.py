"""A saved model carries all that its use needs: weights, shape, task, labels and tokenizer.

    <folder>/<name>.params   parameters, MXNet's format, the tied matrix once
             <name>.json     the model_config: what the network is and what it answers
             tokenizer/      the files of its vocabulary

Fine-tuning writes `best`, a pretraining checkpoint holds `model`.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Tuple

from bort.errors import UserError
from bort.files import read_json, write_json
from bort.parameters import load_parameters, parameter_file, save_parameters
from bort.shapes import MAX_LENGTH
from bort.tokenization import TOKENIZER_FOLDER, Tokenizer, load_tokenizer_folder

FORMAT_VERSION = 1
MASKED_LM = "masked_lm"


@dataclass(frozen=True)
class ModelConfig:
    """What a saved network is.

    model: a shape's name, or roberta_12_768_12 or roberta_24_1024_16.
    vocab_size, tokenizer_fingerprint: of the vocabulary it was trained with.
    kind: masked_lm, or a kind of `data.task.Task`: classification, regression, multiple_choice,
        candidates.
    task, labels, num_outputs: of a classifier; empty and 0 for masked_lm.
    max_len: tokens that an input is cut to.
    extra_layer: a dense layer stands between the network and the classifier.
    race_cast: how RACE's options are cast; empty for other tasks.
    details: metrics, data and command, for whoever reads it.
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
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


class SavedModel(NamedTuple):
    """A network that was loaded, what it is, and its tokenizer (None if none was saved)."""

    network: Any
    model_config: ModelConfig
    tokenizer: Optional[Tokenizer]


def save_model(
    path: str, network: Any, model_config: ModelConfig, tokenizer: Optional[Tokenizer]
) -> None:
    """Write a network to `path`, which ends in .params, with its model config and its tokenizer.

    The parameters come last and in one rename: a file that is there has its model config beside it.
    """
    save_model_config(path, model_config, tokenizer)
    save_parameters(network, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def save_model_config(path: str, model_config: ModelConfig, tokenizer: Optional[Tokenizer]) -> None:
    """Write what belongs beside a .params file: its model config and its tokenizer."""
    folder = os.path.dirname(path)
    os.makedirs(folder or ".", exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(os.path.join(folder, TOKENIZER_FOLDER))
    write_json(
        model_config_path(path), {"format": FORMAT_VERSION, **dataclasses.asdict(model_config)}
    )


def load_model(
    path: str, ctx: Any = None, dropout: float = 0.0, gradients: bool = False
) -> SavedModel:
    """Load a saved model: its .params file, its folder, or a pretraining checkpoint or run.

    `dropout` and `gradients` are for whoever trains it further.
    Raises `UserError` when it is absent, damaged, or was saved without a card.
    """
    found = parameter_file(path)
    model_config = read_model_config(found)
    folder = os.path.join(os.path.dirname(found), TOKENIZER_FOLDER)
    with ThreadPoolExecutor(1) as pool:  # while the parameters are read from the disk
        tokenizer = pool.submit(load_tokenizer_folder, folder)
        network = build_network(model_config, ctx, dropout, draw=False, gradients=gradients)
        load_parameters(network, found)
        return SavedModel(network, model_config, tokenizer.result())


def read_model_config(path: str) -> ModelConfig:
    """Read the model config beside a .params file.

    Raises `UserError` when there is none, and for a model config of another format.
    """
    name = model_config_path(path)
    if not os.path.exists(name):
        raise UserError(f"{path}: no {os.path.basename(name)} beside it says what it is")
    content = read_json(name)
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT_VERSION:
        raise UserError(f"{name}: is not the model config of a model, format {FORMAT_VERSION}")
    if not {"model", "vocab_size", "tokenizer_fingerprint", "kind"} <= set(content) <= fields:
        raise UserError(f"{name}: lacks entries of a model config or has others; restore the file")
    return ModelConfig(**{**content, "labels": tuple(content.get("labels", ()))})


def build_network(
    model_config: ModelConfig,
    ctx: Any = None,
    dropout: float = 0.0,
    draw: bool = True,
    gradients: bool = True,
) -> Any:
    """Build the network of a model config, with random weights or, without `draw`, zeros.

    Without `gradients` it cannot be trained.
    """
    import mxnet as mx

    from bort import bort

    masked_lm = model_config.kind == MASKED_LM
    body = bort.build_network(
        model_config.model, model_config.vocab_size, ctx, masked_lm, dropout, draw, gradients
    )
    if masked_lm:
        return body
    classifier = bort.BortClassifier(
        body, model_config.num_outputs, dropout, model_config.extra_layer
    )
    if draw:
        bort.initialize(classifier, ctx, gradients=gradients)
    else:  # the body is initialised
        if not gradients:
            classifier.collect_params().setattr("grad_req", "null")
        for block in filter(None, (classifier.classifier, classifier.extra)):
            block.initialize(mx.init.Zero(), ctx=ctx)
    return classifier


def model_config_path(path: str) -> str:
    """Return where the model config of a .params file lies."""
    return f"{path[: -len('.params')] if path.endswith('.params') else path}.json"
