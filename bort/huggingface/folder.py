"""A saved model as a folder that transformers loads, and such a folder as a saved model.

    model.safetensors, config.json                           the network
    tokenizer.json, tokenizer_config.json, ...               the tokenizer
    vocab.json and merges.txt, or tokenizer.model            the same as saved models have it
    README.md                                                the model card

Needs NumPy and safetensors; torch only to read weights that are not in safetensors.
"""

from __future__ import annotations

import json
import os
import pickle
import shlex
from typing import Any, Iterator, Mapping

import numpy as np

from bort.errors import UserError
from bort.files import read_json, write_json
from bort.huggingface import tokenizer as huggingface_tokenizer
from bort.huggingface import weights as huggingface
from bort.huggingface.weights import Architecture
from bort.saved_model import MASKED_LM, ModelConfig, SavedModel, build_network
from bort.shapes import MAX_LENGTH, Shape, body_shape
from bort.tokenization import Tokenizer

WEIGHTS, OLD_WEIGHTS, CONFIG, README = (
    "model.safetensors",
    "pytorch_model.bin",
    "config.json",
    "README.md",
)
OURS = "bort"  # the entry of config.json that is ours
_SAFE_TORCH = (2, 6)  # older ones run code hidden in files that are loaded with weights_only
_MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: {use}
tags:
- bort
---

# {title}

- Task: {task}
- Data: {data}
- Longest input: {max_len} tokens

## Metrics

{metrics}
## Command

    {command}

{details}## Use

```python
from transformers import AutoTokenizer, {architecture}

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {architecture}.from_pretrained("FOLDER")
```

Take `AutoTokenizer`: it puts one `</s>` between two texts, as in training, where the tokenizers of
RoBERTa put two. An input of more than two texts, `<s> A </s> B </s> C </s>`, is joined from ids.
"""
_CONSTANT_ENTRIES = ("model", "kind", "task", "labels", "max_len", "race_cast", "inputs_version")


# ---- there -------------------------------------------------------------------------------------


def architecture_for(model_config: ModelConfig, family: str) -> Architecture:
    """Return the architecture that computes what a saved model does.

    Raises `UserError` for the extra dense layer, which none of them has.
    """
    if model_config.extra_layer:
        raise UserError(
            "the classifier was trained with --extra_layer: no architecture of transformers has a "
            "second dense layer before its head; fine-tune without it to convert the model"
        )
    heads = {MASKED_LM: "MaskedLM", "multiple_choice": "MultipleChoice"}
    return Architecture(family, heads.get(model_config.kind, "SequenceClassification"))


def write(folder: str, saved: SavedModel, family: str) -> Architecture:
    """Fill a folder with all that transformers needs of a saved model; returns its architecture.

    Raises `UserError` for a model without tokenizer and for one that does not fit.
    """
    from safetensors.numpy import save_file

    model_config, tokenizer = saved.model_config, saved.tokenizer
    architecture = architecture_for(model_config, family)
    if tokenizer is None:
        raise UserError(
            "the model has no tokenizer/ beside it; it was trained on shards made before they "
            "carried one: make them again"
        )
    collected = saved.network._collect_params_with_prefix()
    parameters = {name: parameter.data().asnumpy() for name, parameter in collected.items()}
    arrays = huggingface.to_huggingface(parameters, architecture, tokenizer.pad_id)
    # transformers asks for the format, and loads no file without it.
    save_file(arrays, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})
    write_json(os.path.join(folder, CONFIG), _config(model_config, tokenizer, architecture))
    tokenizer.save(folder)
    described = huggingface_tokenizer.describe(
        folder, model_config.max_len, reads_special=model_config.kind == MASKED_LM
    )
    for name, content in described.items():
        write_json(os.path.join(folder, name), content)
    with open(os.path.join(folder, README), "w", encoding="utf-8") as handle:
        handle.write(model_card(model_config, architecture))
    return architecture


def _config(
    model_config: ModelConfig, tokenizer: Tokenizer, architecture: Architecture
) -> dict[str, Any]:
    ids = {"bos": tokenizer.bos_id, "pad": tokenizer.pad_id, "eos": tokenizer.eos_id}
    config = huggingface.configuration(
        body_shape(model_config.model), architecture, ids, model_config.vocab_size
    )
    if architecture.head == "SequenceClassification":
        labels = model_config.labels or (model_config.task or "score",)
        problem = (
            "regression" if model_config.kind == "regression" else "single_label_classification"
        )
        config |= {
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
            "problem_type": problem,
        }
    return {**config, OURS: {entry: getattr(model_config, entry) for entry in _CONSTANT_ENTRIES}}


def model_card(model_config: ModelConfig, architecture: Architecture) -> str:
    """Return README.md: what the model is, and its data, metrics and command."""
    uses = {"MaskedLM": "fill-mask", "MultipleChoice": "multiple-choice"}
    details, unknown = dict(model_config.details), "not recorded"
    command = details.pop("command", unknown)
    official = (
        f"the official data of {model_config.task}, as the command says"
        if model_config.task
        else unknown
    )
    task = (
        f"{model_config.task} ({model_config.kind})"
        if model_config.task
        else "masked language modelling"
    )
    return _MODEL_CARD.format(
        use=uses.get(architecture.head, "text-classification"),
        title=f"{model_config.model}, {model_config.task}"
        if model_config.task
        else model_config.model,
        task=f"{task}, labels {', '.join(model_config.labels)}" if model_config.labels else task,
        data=_told(details.pop("data", official)),
        max_len=model_config.max_len,
        metrics=_table(details.pop("metrics", {})),
        command=command if isinstance(command, str) else shlex.join(map(str, command)),
        details=f"## Details\n\n{_table(details)}\n" if details else "",
        architecture=architecture.name,
    )


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(values: Any) -> str:
    """Return nested figures as a Markdown table."""
    rows = [f"| {name} | {_told(value)} |\n" for name, value in _flat(values, ())]
    return "".join(["| what | value |\n| --- | --- |\n", *rows] if rows else ["not recorded\n"])


def _flat(values: Any, above: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        yield " ".join(above), values
        return
    for name, value in values.items():
        yield from _flat(value, (*above, str(name)))


# ---- and back ----------------------------------------------------------------------------------


def read(folder: str) -> SavedModel:
    """Build the network of a folder of Hugging Face's, with its model config and tokenizer.

    Raises `UserError` naming the file and what in it stands for another computation than ours.
    """
    path = os.path.join(folder, CONFIG)
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not the configuration of a model")
    try:
        architecture, shape = huggingface.shape_in(config)
        tokenizer = huggingface_tokenizer.tokenizer_of(folder)
        model_config = _model_config(config, architecture, shape, tokenizer)
        arrays = huggingface.from_huggingface(
            _tensors(folder), architecture, shape.layers, tokenizer.pad_id
        )
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    network = build_network(model_config)
    for name, parameter in network._collect_params_with_prefix().items():
        if name not in arrays:  # the second name of the tied matrix
            continue
        if arrays[name].shape != parameter.shape:
            raise UserError(
                f"{folder}: {name} has shape {arrays[name].shape}; by {CONFIG} it were "
                f"{parameter.shape}"
            )
        parameter.set_data(_nd_array(arrays[name]))
    return SavedModel(network, model_config, tokenizer)


def _nd_array(values: np.ndarray) -> Any:
    from mxnet import nd

    return nd.array(values, dtype="float32")


def _model_config(
    config: Mapping[str, Any], architecture: Architecture, shape: Shape, tokenizer: Tokenizer
) -> ModelConfig:
    """Return the model config of a folder, from what it says of itself and what was ours in it."""
    ours = config[OURS] if isinstance(config.get(OURS), dict) else {}
    size, pad_id = tokenizer.vocab_size, tokenizer.pad_id
    if (config.get("vocab_size"), config["pad_token_id"]) != (size, pad_id):
        raise UserError(
            f"{CONFIG} has {config.get('vocab_size')} tokens and pads with "
            f"{config['pad_token_id']}, its tokenizer has {size} and pads with {pad_id}"
        )
    by_head = {"MaskedLM": (MASKED_LM, 0), "MultipleChoice": ("multiple_choice", 1)}
    labels = tuple(ours.get("labels", ()))
    if architecture.head == "SequenceClassification":
        labels = _labels(config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"}))
    kind, outputs = by_head.get(architecture.head, ("classification", len(labels)))
    if kind == "classification" and (len(labels) == 1 or ours.get("kind") == "candidates"):
        kind = "regression" if len(labels) == 1 else "candidates"
    name = ours.get("model")
    if name is None or body_shape(name) != shape:
        name = huggingface.TEACHERS.get(shape, shape.name)
    return ModelConfig(
        model=name,
        vocab_size=size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        kind=kind,
        task=ours.get("task", ""),
        labels=() if kind == "regression" else labels,
        num_outputs=outputs,
        max_len=ours.get("max_len", MAX_LENGTH),
        race_cast=ours.get("race_cast", ""),
        inputs_version=ours.get("inputs_version", 1),
        details={"converted_from": architecture.name},
    )


def _labels(named: Any) -> tuple[str, ...]:
    """Return the labels of {"0": label, "1": label, ...}, config.json's id2label, in order."""
    wanted = [str(number) for number in range(len(named) if isinstance(named, dict) else 0)]
    if not wanted or named.keys() != set(wanted):
        raise UserError(f"{CONFIG}: id2label does not number its labels from 0 on")
    return tuple(str(named[number]) for number in wanted)


def _tensors(folder: str) -> dict[str, np.ndarray]:
    """Read the weights of a folder; raises `UserError` for what cannot be read without pickle."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = os.path.join(folder, WEIGHTS)
    if not os.path.exists(path):
        return _torch_tensors(folder)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{WEIGHTS} cannot be read ({error})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{WEIGHTS}: NumPy cannot read it ({error}); save it as float32") from None


def _torch_tensors(folder: str) -> dict[str, np.ndarray]:
    """Read pytorch_model.bin by torch's reader that runs no code of the file."""
    path = os.path.join(folder, OLD_WEIGHTS)
    if not os.path.exists(path):
        raise UserError(f"holds neither {WEIGHTS} nor {OLD_WEIGHTS}")
    try:
        import torch
    except ImportError:
        raise UserError(
            f"has no {WEIGHTS}: {OLD_WEIGHTS} needs torch (pip install -e '.[huggingface]')"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < _SAFE_TORCH:
        raise UserError(f"{OLD_WEIGHTS}: torch {torch.__version__} is no safe reader; 2.6 is")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{OLD_WEIGHTS} cannot be read as weights alone ({reason})") from None
    return {name: tensor.float().numpy() for name, tensor in loaded.items()}
