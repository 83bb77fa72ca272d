"""The model card, README.md, of a converted model; it contains no local paths."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any, Iterator, Mapping, Sequence, Union

from bort.huggingface.families import Architecture
from bort.saved_model import MASKED_LM, ModelConfig
from bort.tokenization import SPECIAL_TOKENS

_PIPELINES = {"MaskedLM": "fill-mask", "MultipleChoice": "multiple-choice"}
_NOT_RECORDED = "not recorded"
# A word that is a path for certain: absolute, below the home or relative with dots, or a URL.
_PATH = re.compile(r"(?:/|~|\.{1,2}/|[A-Za-z]:[\\/]|[A-Za-z][\w+.-]*://)\S*")
_TEMPLATE = """\
---
library_name: {library}
pipeline_tag: {pipeline}
tags:
- bort
---

# {title}

- Task: {task}
- Data: {data}
- Maximum length: {max_len} tokens

## Metrics

{metrics}
## Command

    {command}

{details}## Use

{use}
"""
_PYTORCH = """\
```python
from transformers import AutoTokenizer, {architecture}

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {architecture}.from_pretrained("FOLDER")
```

Load the tokenizer with `AutoTokenizer`: it puts {number} `{eos}` between two texts, as in
training{others}. Inputs of more than two texts,
`{bos} A {eos} B {eos} C {eos}`, have to be joined from ids."""
_OTHER_CLASSES = "; RoBERTa's own tokenizer classes put two"
_OPTIMUM = """\
With optimum:

```python
from optimum.onnxruntime import ORTModelFor{head}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = ORTModelFor{head}.from_pretrained("FOLDER", file_name="model.onnx")
```

Inputs are padded at the end. `model_quantized.onnx` is the int8 model."""
_TRANSFORMERS_JS = """

With transformers.js, under Node or in a browser:

```js
import {{ AutoModelFor{head}, AutoTokenizer, env }} from "@huggingface/transformers";

env.allowLocalModels = true;
env.localModelPath = "./"; // where FOLDER is
const tokenizer = await AutoTokenizer.from_pretrained("FOLDER");
const model = await AutoModelFor{head}.from_pretrained("FOLDER", {{ dtype: "fp32" }});
```

`dtype: "q8"` is the int8 model. The `truncation` of transformers.js drops the last special token:
give it texts of at most {max_len} tokens."""


def model_card(
    model_config: ModelConfig,
    architecture: Architecture,
    special_tokens: Mapping[str, str] = SPECIAL_TOKENS,
    is_onnx: bool = False,
    separators: int = 1,
) -> str:
    """Return README.md: what the model is, its data, metrics and command, and how to load it.

    special_tokens: of its tokenizer.
    is_onnx: the folder holds ONNX files, not weights for PyTorch.
    separators: how many stand between the texts of a pair, one or two.

    Paths are cut to their last component: a card is uploaded, local folders are private.
    """
    details = dict(model_config.details)
    command = details.pop("command", _NOT_RECORDED)
    is_masked_lm = model_config.kind == MASKED_LM
    task = "masked language modelling" if is_masked_lm else model_config.kind.replace("_", " ")
    title, data = model_config.model, _NOT_RECORDED
    if model_config.task:
        task = f"{model_config.task} ({model_config.kind})"
        title = f"{model_config.model}, {model_config.task}"
        data = f"the official data of {model_config.task}, see the command"
    if model_config.labels:
        task += f", labels {', '.join(model_config.labels)}"
    return _TEMPLATE.format(
        pipeline=_PIPELINES.get(architecture.head, "text-classification"),
        title=title,
        task=task,
        data=_text(details.pop("data", data)),
        max_len=model_config.max_len,
        metrics=_table(details.pop("metrics", {})),
        command=_command(command),
        details=f"## Details\n\n{_table(details)}\n" if details else "",
        library="transformers.js" if is_onnx else "transformers",
        use=_use(model_config, architecture, special_tokens, is_onnx, separators),
    )


def _use(
    model_config: ModelConfig,
    architecture: Architecture,
    special_tokens: Mapping[str, str],
    is_onnx: bool,
    separators: int,
) -> str:
    template = _PYTORCH
    if is_onnx:  # transformers.js has no class for a multiple choice
        template = _OPTIMUM + ("" if architecture.head == "MultipleChoice" else _TRANSFORMERS_JS)
    return template.format(
        architecture=architecture.name,
        head=architecture.head,
        max_len=model_config.max_len,
        bos=special_tokens["bos"],
        eos=special_tokens["eos"],
        number="one" if separators == 1 else "two",
        others=_OTHER_CLASSES if special_tokens == SPECIAL_TOKENS and separators == 1 else "",
    )


def _command(command: Union[str, Sequence[Any]]) -> str:
    """Return a command line on one line, each path in it cut to its last component."""
    try:
        words = shlex.split(command) if isinstance(command, str) else list(map(str, command))
    except ValueError:  # unbalanced quotes
        words = str(command).split()
    return shlex.join(map(_last_component, words)) if command != _NOT_RECORDED else _NOT_RECORDED


def _last_component(word: str) -> str:
    flag, equals, value = word.rpartition("=")
    return flag + equals + (re.split(r"[\\/]", value.rstrip("\\/"))[-1] or value)


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if "/" in text and not re.search(r"\s", text):
        return _last_component(text)
    return _PATH.sub(lambda found: _last_component(found[0]), text)


def _table(values: Any) -> str:
    """Return nested values as a Markdown table."""
    rows = [f"| {name} | {_text(value)} |\n" for name, value in _flatten(values, ())]
    return "".join(["| what | value |\n| --- | --- |\n", *rows] if rows else [f"{_NOT_RECORDED}\n"])


def _flatten(values: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        yield " ".join(names), values
        return
    for name, value in values.items():
        yield from _flatten(value, (*names, str(name)))
