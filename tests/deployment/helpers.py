"""Saved models of drawn values, and the packages of npm that tests run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from bort.deployment import npm
from bort.errors import UserError
from bort.saved_model import ModelConfig, build_network, save_model
from bort.tokenization import ByteLevelBPE, TokenizerSettings, load_tokenizer
from bort.wordpiece import Normalizer, WordPiece
from tests.conftest import ROOT
from tests.reference import redraw
from tests.wordpieces import VOCABULARY

SHAPE, MAX_LEN = "bort_2_4_24_32", 160
KINDS: dict[str, dict[str, Any]] = {
    "masked_lm": {},
    "classification": {"task": "SST-2", "labels": ("0", "1"), "num_outputs": 2},
    "regression": {"task": "STS-B", "num_outputs": 1},
    "multiple_choice": {"task": "COPA", "labels": ("0", "1"), "num_outputs": 1},
    "candidates": {"task": "ReCoRD", "labels": ("0", "1"), "num_outputs": 2},
}
TEXTS = [
    "a fine film",
    "It's the year's best; don't miss it!",
    "naïve café, 50 % off: “quoted” — élan",
    "in the heart  of the on re at er",
]


def byte_level_bpe() -> ByteLevelBPE:
    """Return a small byte-level BPE laid out as RoBERTa's, `<mask>` last."""
    from bort.tokenization import BYTE_TO_CHARACTER

    merges = ["h e", "Ġ t", "i n", "Ġt he", "e r", "Ġ a", "o n", "Ġ s", "r e", "a t", "Ġs he"]
    tokens = [*BYTE_TO_CHARACTER.values(), *(one.replace(" ", "") for one in merges)]
    np.random.default_rng(0).shuffle(tokens)
    return ByteLevelBPE(["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"], merges)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "sentencepiece": lambda: load_tokenizer(TokenizerSettings()),
    "byte_level_bpe": byte_level_bpe,
    "wordpiece": lambda: WordPiece(VOCABULARY, Normalizer()),
}
EVERY_TOKENIZER = pytest.mark.parametrize("tokenizer", TOKENIZERS)


def save(folder: Path, kind: str, name: str, **others: Any) -> str:
    """Save a network of drawn values as `best` in a folder; returns the folder.

    name: of the tokenizer; with a WordPiece it is a network as BERT's, with token types.
    """
    tokenizer = TOKENIZERS[name]()
    values = {"model": SHAPE, "kind": kind, "max_len": MAX_LEN, **KINDS[kind], **others}
    if name == "wordpiece":
        values |= {"type_separator": tokenizer.eos_id, "layer_norm_eps": 1e-12}
    model_config = ModelConfig(
        vocab_size=tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint, **values
    )
    network = build_network(model_config)
    redraw(network, seed=3, deviation=0.3)
    save_model(str(folder / "best.params"), network, model_config, tokenizer)
    return str(folder)


def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the packages of npm that the tests run, and the tests' scripts.

    They are installed once for all tests; BORT_NODE_MODULES names a folder where they are already.
    """
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.getbasetemp() / "node"
    if not folder.exists():
        folder.mkdir()
        if installed := os.environ.get("BORT_NODE_MODULES"):
            (folder / "node_modules").symlink_to(installed)
        else:
            _install(folder, npm.TRANSFORMERS.spec, "playwright-core@1.65.1")
        for script in (ROOT / "tests" / "deployment").glob("*.mjs"):
            shutil.copy(script, folder)
    return folder


def node(place: Path, content: Any, *command: str, **environment: str) -> Any:
    """Run a script under Node that reads and prints JSON."""
    ended = subprocess.run(
        ["node", *command],
        cwd=place,
        env={**os.environ, **environment},
        input=json.dumps(content),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def archives(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with the real archives of the packages, which npm downloads once."""
    folder = tmp_path_factory.getbasetemp() / "archives"
    if not folder.exists():
        folder.mkdir()
        try:
            npm.download(str(folder))
        except UserError as error:
            shutil.rmtree(folder)
            pytest.skip(str(error))
    return str(folder)


def _install(folder: Path, *packages: str) -> None:
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages]
    ended = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    if ended.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"npm cannot install {' '.join(packages)}")
