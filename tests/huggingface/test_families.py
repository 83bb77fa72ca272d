"""Made-up folders of every family: what is read of them, what it computes, what is refused.

The other side is computed from the names and the configuration alone, in NumPy and float64. The
tests at the end ask transformers, where it and the real models are.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
from mxnet import nd

from bort.bort import decode, encode, masked_hidden, options_of
from bort.errors import UserError
from bort.huggingface.convert import from_huggingface
from bort.huggingface.folder import read, read_folder, write
from bort.huggingface.hub import locate
from bort.huggingface.tokenizer import gives_types
from bort.inference.pipelines import fill_mask
from bort.saved_model import ModelConfig, SavedModel, build_network, load_model
from bort.shapes import BodyOptions
from bort.sums import write_sums
from bort.wordpiece import Normalizer, WordPiece
from scripts.convert_from_huggingface import main as convert
from tests.conftest import ROOT
from tests.reference import redraw
from tests.wordpieces import VOCABULARY, write_vocabulary

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors")

SIZE, HIDDEN, INNER, LAYERS, HEADS = len(VOCABULARY), 32, 24, 2, 4
SEPARATOR = VOCABULARY.index("[SEP]")
NAMES = {
    "bert": {
        "layer": "encoder.layer.{}",
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "n1": "attention.output.LayerNorm",
        "f1": "intermediate.dense",
        "f2": "output.dense",
        "n2": "output.LayerNorm",
    },
    "distilbert": {
        "layer": "transformer.layer.{}",
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "n1": "sa_layer_norm",
        "f1": "ffn.lin1",
        "f2": "ffn.lin2",
        "n2": "output_layer_norm",
    },
}
NAMES["roberta"] = NAMES["electra"] = NAMES["bert"]
CLASSES = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "distilbert": "DistilBertModel",
    "electra": "ElectraForPreTraining",
}
FAMILIES = pytest.mark.parametrize("family", list(CLASSES))


def config_of(family: str, **others: Any) -> dict[str, Any]:
    """Return a config.json as transformers writes it for a tiny model."""
    config = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": SIZE,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "hidden_act": "gelu",
        "layer_norm_eps": 0.01,
        "max_position_embeddings": 512 + (family == "roberta"),
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }
    if family == "electra":
        config["embedding_size"] = HIDDEN
    if family == "distilbert":
        sizes = {"dim": HIDDEN, "hidden_dim": INNER, "n_layers": LAYERS, "n_heads": HEADS}
        shared = ("architectures", "model_type", "vocab_size", "pad_token_id")
        config = {name: config[name] for name in shared} | sizes
        config |= {"activation": "gelu", "max_position_embeddings": 512}
    return {**config, **others}


def tensors_of(family: str, types: int = 2) -> dict[str, np.ndarray]:
    """Return the tensors of a body under its names without prefix, all values drawn."""
    names = NAMES[family]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (SIZE, HIDDEN),
        "embeddings.position_embeddings.weight": (512 + (family == "roberta"), HIDDEN),
    }
    if family != "distilbert":
        shapes["embeddings.token_type_embeddings.weight"] = (types, HIDDEN)
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        start = names["layer"].format(layer)
        sizes = dict.fromkeys("qkvo", (HIDDEN, HIDDEN))
        sizes |= {"f1": (INNER, HIDDEN), "f2": (HIDDEN, INNER)}
        for role, shape in sizes.items():
            shapes[f"{start}.{names[role]}.weight"] = shape
            shapes[f"{start}.{names[role]}.bias"] = shape[:1]
        norms += [f"{start}.{names['n1']}", f"{start}.{names['n2']}"]
    generator = np.random.default_rng(5)
    drawn = {name: 0.2 * generator.standard_normal(shape) for name, shape in shapes.items()}
    for norm in norms:
        drawn[f"{norm}.weight"] = 1 + 0.2 * generator.standard_normal(HIDDEN)
        drawn[f"{norm}.bias"] = 0.2 * generator.standard_normal(HIDDEN)
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors_numpy.save_file(tensors, str(folder / "model.safetensors"))


def write_folder(
    folder: Path, family: str = "bert", prefix: bool = True, types: int = 2, **config: Any
) -> dict[str, np.ndarray]:
    """Write a made-up folder; returns the tensors of its body, without prefix."""
    folder.mkdir(exist_ok=True)
    tensors = tensors_of(family, types)
    start = f"{family}." if prefix else ""
    write_tensors(folder, {f"{start}{name}": values for name, values in tensors.items()})
    (folder / "config.json").write_text(json.dumps(config_of(family, **config)))
    write_vocabulary(folder)
    return tensors


def hidden_states(
    family: str, tensors: dict[str, np.ndarray], ids: np.ndarray, types: np.ndarray, eps: float
) -> np.ndarray:
    """Return the hidden states [length, hidden] of a text as transformers computes them."""
    names = NAMES[family]
    tensors = {name: values.astype(np.float64) for name, values in tensors.items()}

    def dense(values: np.ndarray, name: str) -> np.ndarray:
        return values @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(values: np.ndarray, name: str) -> np.ndarray:
        centred = values - values.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def heads(values: np.ndarray) -> np.ndarray:
        return values.reshape(len(ids), HEADS, -1).transpose(1, 0, 2)

    hidden = tensors["embeddings.word_embeddings.weight"][ids]
    if family != "distilbert":
        hidden = hidden + tensors["embeddings.token_type_embeddings.weight"][types]
    first = 1 if family == "roberta" else 0  # pad_token_id 0: one row that no token takes
    hidden = hidden + tensors["embeddings.position_embeddings.weight"][first : first + len(ids)]
    hidden = norm(hidden, "embeddings.LayerNorm")
    for layer in range(LAYERS):
        start = names["layer"].format(layer)
        q, k, v = (heads(dense(hidden, f"{start}.{names[role]}")) for role in "qkv")
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(len(ids), HIDDEN)
        hidden = norm(hidden + dense(mixed, f"{start}.{names['o']}"), f"{start}.{names['n1']}")
        inner = gelu(dense(hidden, f"{start}.{names['f1']}"))
        hidden = norm(hidden + dense(inner, f"{start}.{names['f2']}"), f"{start}.{names['n2']}")
    return hidden


def gelu(values: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return values * (1 + erf(values / np.sqrt(2))) / 2


def states_of(network: Any, ids: np.ndarray) -> np.ndarray:
    return encode(network, nd.array(ids[None]), nd.array([len(ids)])).asnumpy()[0]


# [CLS] A [SEP] B [SEP]
PAIR = np.array([2, 7, 9, 11, SEPARATOR, 12, 13, SEPARATOR])
TYPES = np.array([0, 0, 0, 0, 0, 1, 1, 1])


@FAMILIES
@pytest.mark.parametrize("prefix", [False, True])
def test_a_body_computes_what_it_did(tmp_path, family, prefix):
    tensors = write_folder(tmp_path, family, prefix)
    (network, model_config, tokenizer), notices = read_folder(str(tmp_path))
    has_types = family != "distilbert"
    eps = 1e-12 if family == "distilbert" else 0.01
    assert model_config.body_options == BodyOptions(eps, SEPARATOR if has_types else None)
    assert (model_config.model, model_config.kind) == ("bort_2_4_24_32", "masked_lm")
    assert tokenizer.name == "wordpiece"
    expected = hidden_states(family, tensors, PAIR, TYPES, eps)
    np.testing.assert_allclose(states_of(network, PAIR), expected, atol=1e-5)
    assert any("has no masked-LM head: it starts as the identity" in line for line in notices)


def test_the_missing_head_starts_as_the_identity(tmp_path):
    write_folder(tmp_path)
    network = read(str(tmp_path)).network
    parameters = {n: p.data().asnumpy() for n, p in network._collect_params_with_prefix().items()}
    np.testing.assert_array_equal(parameters["decoder.0.weight"], np.eye(HIDDEN))
    np.testing.assert_array_equal(parameters["decoder.2.gamma"], np.ones(HIDDEN))
    for name in ("decoder.0.bias", "decoder.2.beta", "decoder.3.bias"):
        assert not parameters[name].any()


def test_folded_types_are_exact_for_single_texts(tmp_path):
    tensors = write_folder(tmp_path)
    (network, model_config, _), notices = read_folder(str(tmp_path), token_types="fold")
    assert model_config.type_separator is None
    assert "token type 0 is added to the positions, type 1 is dropped" in notices
    single = PAIR[:5]
    expected = hidden_states("bert", tensors, single, np.zeros(5, int), 0.01)
    np.testing.assert_allclose(states_of(network, single), expected, atol=1e-5)
    typed = hidden_states("bert", tensors, PAIR, TYPES, 0.01)
    assert np.abs(states_of(network, PAIR) - typed).max() > 0.01


def masked_lm_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the head of a BertForMaskedLM, and what checkpoints have beside it."""
    generator = np.random.default_rng(8)
    head = {
        "cls.predictions.transform.dense.weight": (HIDDEN, HIDDEN),
        "cls.predictions.transform.dense.bias": (HIDDEN,),
        "cls.predictions.transform.LayerNorm.weight": (HIDDEN,),
        "cls.predictions.transform.LayerNorm.bias": (HIDDEN,),
        "cls.predictions.bias": (SIZE,),
        "cls.seq_relationship.weight": (2, HIDDEN),
        "cls.seq_relationship.bias": (2,),
        "bert.pooler.dense.weight": (HIDDEN, HIDDEN),
        "bert.pooler.dense.bias": (HIDDEN,),
    }
    drawn = {n: generator.standard_normal(s).astype(np.float32) for n, s in head.items()}
    return {f"bert.{name}": values for name, values in tensors.items()} | drawn


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining", None])
@pytest.mark.parametrize("old_names", [False, True])
def test_a_masked_lm_head_comes_too(tmp_path, name, old_names):
    tensors = write_folder(tmp_path, architectures=[name] if name else None)
    stored = whole = masked_lm_tensors(tensors)
    if old_names:
        stored = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): values
            for n, values in whole.items()
        }
        assert "bert.embeddings.LayerNorm.gamma" in stored
    write_tensors(tmp_path, stored)
    (network, _, _), notices = read_folder(str(tmp_path))
    assert notices == [
        "dropped, because the logits here do not depend on it: cls.seq_relationship",
        "dropped, because the logits here do not depend on it: bert.pooler",
    ]
    states = nd.array(states_of(network, PAIR)[None])
    found = decode(network, masked_hidden(network, states, nd.array([3]))).asnumpy()[0]
    hidden = hidden_states("bert", tensors, PAIR, TYPES, 0.01)[3]
    start = "cls.predictions.transform"
    inner = gelu(hidden @ whole[f"{start}.dense.weight"].T + whole[f"{start}.dense.bias"])
    inner = (inner - inner.mean()) / np.sqrt(inner.var() + 0.01)
    inner = inner * whole[f"{start}.LayerNorm.weight"] + whole[f"{start}.LayerNorm.bias"]
    expected = inner @ tensors["embeddings.word_embeddings.weight"].T
    np.testing.assert_allclose(found, expected + whole["cls.predictions.bias"], atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(tmp_path, dtype):
    tensors = write_folder(tmp_path)
    if dtype == "float16":
        write_tensors(tmp_path, {n: v.astype(np.float16) for n, v in tensors.items()})
        rounded = {n: v.astype(np.float16).astype(np.float32) for n, v in tensors.items()}
    else:
        upper = {n: (v.view(np.uint32) >> 16).astype(np.uint16) for n, v in tensors.items()}
        write_raw(tmp_path / "model.safetensors", upper, "BF16")
        rounded = {n: (v.astype(np.uint32) << 16).view(np.float32) for n, v in upper.items()}
    expected = hidden_states("bert", rounded, PAIR, TYPES, 0.01)
    np.testing.assert_allclose(states_of(read(str(tmp_path)).network, PAIR), expected, atol=1e-5)


def write_raw(
    path: Path, arrays: dict[str, np.ndarray], dtype: str, shift: int = 0, size: int | None = None
) -> None:
    """Write a safetensors file by hand; `shift` and `size` falsify the offsets of the last."""
    header, offset, content = {}, 0, b""
    for name, array in arrays.items():
        data = array.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        content, offset = content + data, offset + len(data)
    start, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [start - shift, (size or end) - shift]
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content)


def test_shards_with_an_index(tmp_path):
    tensors = write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2]}
    shards["model-00002-of-00002.safetensors"] = names[1::2]
    for file, some in shards.items():
        safetensors_numpy.save_file({name: tensors[name] for name in some}, str(tmp_path / file))
    index = {"weight_map": {name: file for file, some in shards.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = hidden_states("bert", tensors, PAIR, TYPES, 0.01)
    np.testing.assert_allclose(states_of(read(str(tmp_path)).network, PAIR), expected, atol=1e-5)


# ---- and back ------------------------------------------------------------------------------------


def saved(kind: str = "masked_lm", **others: Any) -> SavedModel:
    tokenizer = WordPiece(VOCABULARY, Normalizer())
    model_config = ModelConfig(
        "bort_2_4_24_32",
        SIZE,
        tokenizer.fingerprint,
        kind,
        layer_norm_eps=1e-12,
        type_separator=SEPARATOR,
        **others,
    )
    network = build_network(model_config)
    redraw(network, seed=6)
    return SavedModel(network, model_config, tokenizer)


@pytest.mark.parametrize("family", [None, "roberta"])
@pytest.mark.parametrize("kind", ["masked_lm", "classification", "multiple_choice"])
def test_import_export_and_import_again_keep_the_model(tmp_path, kind, family):
    labels = {"labels": ("no", "yes"), "num_outputs": 1 if kind == "multiple_choice" else 2}
    model = saved(kind, **({} if kind == "masked_lm" else labels))
    architecture = write(str(tmp_path), model, family)
    assert architecture.family == (family or "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["layer_norm_eps"], config["type_vocab_size"]) == (1e-12, 2)
    if kind == "classification":
        assert config["id2label"] == {"0": "no", "1": "yes"}
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert described["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]
    assert (described["cls_token"], described["pad_token"]) == ("[CLS]", "[PAD]")
    card = (tmp_path / "README.md").read_text()
    assert "it puts one `[SEP]` between two texts, as in\ntraining. Inputs" in card
    assert "</s>" not in card
    network, model_config, tokenizer = read(str(tmp_path))
    assert model_config.body_options == model.model_config.body_options
    assert model_config.labels == model.model_config.labels
    assert tokenizer.fingerprint == model.tokenizer.fingerprint
    found = network._collect_params_with_prefix()
    for name, parameter in model.network._collect_params_with_prefix().items():
        assert parameter.data().asnumpy().tobytes() == found[name].data().asnumpy().tobytes()


def test_tokenizer_json_gives_our_ids(tmp_path):
    from tokenizers import Tokenizer

    model = saved()
    write(str(tmp_path), model)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    single, pair = theirs.encode("The cafe"), theirs.encode("The cafe", "running, [MASK]")
    ids = model.tokenizer.encode("The cafe").tolist()
    assert single.ids == [2, *ids, 3]
    assert pair.ids[: len(ids) + 2] == [2, *ids, 3]
    assert pair.type_ids == [0] * (len(ids) + 2) + [1] * (len(pair.ids) - len(ids) - 2)
    assert pair.ids[-2:] == [model.tokenizer.mask_id, 3]


def test_mean_pooling_has_no_class_in_transformers(tmp_path):
    model = saved("classification", labels=("a", "b"), num_outputs=2, pooling="mean")
    with pytest.raises(UserError, match="was trained with --pooling mean"):
        write(str(tmp_path), model)


# ---- what is refused -----------------------------------------------------------------------------


def refused(folder: Path, **others: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_folder(str(folder), **others)
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new': the networks here have 'gelu' or"),
        ({"model_type": "albert"}, "all its layers share one set of parameters"),
        ({"max_position_embeddings": 128}, "max_position_embeddings is 128"),
        ({"vocab_size": SIZE + 1}, f"has {SIZE + 1} tokens and pads with 0, its tokenizer has"),
        ({"num_hidden_layers": 3}, "tensors are missing, the first is bert.encoder.layer.2."),
        ({"intermediate_size": 25}, "has shape (24, 32); by config.json it would be (25, 32)"),
        ({"type_vocab_size": 1}, "has shape (2, 32); by config.json it would be (1, 32)"),
        ({"num_hidden_layers": 1}, "has no parameter for the tensor 'bert.encoder.layer.1."),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path, config, message):
    write_folder(tmp_path, **config)
    assert message in refused(tmp_path)


def test_the_gelu_of_older_versions_is_the_same_function(tmp_path):
    write_folder(tmp_path, hidden_act="gelu_python")
    assert (
        read_folder(str(tmp_path)).saved.model_config.model
        == f"bort_{LAYERS}_{HEADS}_{INNER}_{HIDDEN}"
    )


@FAMILIES
@pytest.mark.parametrize("has_class", [True, False])
def test_a_configuration_without_a_type(tmp_path, family, has_class):
    """As those of 2019, such as BERT-tiny's: its class says it, or the names of its tensors."""
    classes = {} if has_class else {"architectures": None}
    for name, types in (("with", {}), ("without", {"model_type": None})):
        write_folder(tmp_path / name, family, **classes, **types)
    expected, found = (read(str(tmp_path / name)) for name in ("with", "without"))
    assert found.model_config == expected.model_config
    parameters, others = (
        saved.network._collect_params_with_prefix() for saved in (found, expected)
    )
    for name, parameter in parameters.items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), others[name].data().asnumpy())


def test_neither_a_type_nor_a_prefix(tmp_path):
    write_folder(tmp_path, prefix=False, model_type=None, architectures=None)
    assert "config.json has no model_type; add one of roberta, bert, distilbert" in refused(
        tmp_path
    )


def test_embeddings_of_another_size(tmp_path):
    write_folder(tmp_path, "electra", embedding_size=16)
    assert "embedding_size is 16: the networks here embed tokens in the" in refused(tmp_path)


def text(type_id):
    return {"Sequence": {"id": "A", "type_id": type_id}}


def test_types_of_a_classifier_are_not_folded(tmp_path):
    write_folder(tmp_path, architectures=["BertForSequenceClassification"])
    message = refused(tmp_path, token_types="fold")
    assert "BertForSequenceClassification may take pairs of texts" in message


@pytest.mark.parametrize(
    ("config", "of_model", "keeps"),
    [
        ({}, None, True),
        ({}, "DistilBertTokenizer", False),
        ({"tokenizer_class": "BertTokenizerFast"}, "DistilBertTokenizer", True),
        ({"tokenizer_class": "DistilBertTokenizerFast"}, None, False),
        ({"model_input_names": ["input_ids", "attention_mask"]}, None, False),
        ({"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}, None, True),
    ],
)
def test_a_classifier_has_the_types_that_its_tokenizer_gives(tmp_path, config, of_model, keeps):
    """of_model: the class that config.json names, which counts where the tokenizer names none."""
    tensors = write_folder(
        tmp_path, architectures=["BertForSequenceClassification"], tokenizer_class=of_model
    )
    shapes = {
        "pooler.dense.weight": (HIDDEN, HIDDEN),
        "pooler.dense.bias": (HIDDEN,),
        "classifier.weight": (2, HIDDEN),
        "classifier.bias": (2,),
    }
    head = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    write_tensors(tmp_path, {**tensors, **head})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (network, model_config, _), notices = read_folder(str(tmp_path))
    assert model_config.type_separator == (SEPARATOR if keeps else None)
    dropped = "token type 0 is added to the positions, type 1 is dropped"
    assert notices == ([] if keeps else [dropped])
    types = TYPES if keeps else np.zeros_like(TYPES)
    expected = hidden_states("bert", tensors, PAIR, types, 0.01)
    np.testing.assert_allclose(states_of(network.bort, PAIR), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "gives"),
    [
        (None, True),
        ({"type": "BertProcessing"}, True),
        ({"type": "RobertaProcessing"}, False),
        ({"type": "TemplateProcessing", "pair": [text(0), text(1)]}, True),
        ({"type": "TemplateProcessing", "pair": [text(0), text(0)]}, False),
    ],
)
def test_tokenizer_json_says_which_type_the_second_text_has(tmp_path, processor, gives):
    """transformers 4.57 gives these types, be token_type_ids among the inputs of a RoBERTa."""
    content = {"model": {"vocab": {}}, "post_processor": processor}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert gives_types(str(tmp_path), "roberta") is gives


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json: cannot be read"),
        ("model.safetensors", "holds neither model.safetensors nor pytorch_model.bin"),
        ("vocab.txt", "no tokenizer: neither"),
    ],
)
def test_a_file_is_missing(tmp_path, name, message):
    write_folder(tmp_path)
    (tmp_path / name).unlink()
    assert message in refused(tmp_path)


def test_a_vocabulary_is_compared_with_its_sum(tmp_path):
    write_folder(tmp_path)
    write_sums(str(tmp_path))
    path = tmp_path / "vocab.txt"
    path.write_bytes(path.read_bytes() + b"another\n")
    assert f"{path}: its SHA-256 is not that in SHA256SUMS; restore the file" in refused(tmp_path)


def test_an_error_names_the_folder_once(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[PAD]\n")
    with pytest.raises(UserError, match=r"vocab\.txt:2: ") as caught:
        read(str(tmp_path))
    assert str(caught.value).count(str(tmp_path)) == 1


def test_an_error_that_begins_like_the_name_of_the_folder_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "m"
    folder.mkdir()
    write_folder(folder, model_type="mpnet")
    with pytest.raises(UserError, match=r"^m: "):
        read("m")


def test_torch_weights_in_shards_are_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    assert "pytorch_model.bin is in shards, which are not read; load" in refused(tmp_path)


def test_tensors_of_other_shapes(tmp_path):
    tensors = write_folder(tmp_path)
    name = "embeddings.position_embeddings.weight"
    for wrong in (tensors[name][:, 0], tensors[name][:100], tensors[name].T.copy()):
        write_tensors(tmp_path, {**tensors, name: wrong})
        assert "shape" in refused(tmp_path)
    name = "embeddings.LayerNorm.weight"
    write_tensors(tmp_path, {**tensors, "bert." + name: tensors[name]})
    assert f"'{name}' appears under two names" in refused(tmp_path).replace("bert.", "")
    write_tensors(tmp_path, {**tensors, "encoder.adapter.weight": tensors[name]})
    assert "has no parameter for the tensor 'bert.encoder.adapter.weight'" in refused(tmp_path)


@pytest.mark.parametrize(("shift", "size"), [(4, None), (0, 1 << 40), (1 << 40, None)])
def test_offsets_that_overlap_or_lead_out_of_the_file(tmp_path, shift, size):
    tensors = write_folder(tmp_path)
    write_raw(tmp_path / "model.safetensors", tensors, "F32", shift, size)
    assert "model.safetensors: cannot be read" in refused(tmp_path)


def test_pickle_is_never_loaded(tmp_path, monkeypatch):
    import pickle

    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Runs:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "was run"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Runs()}))
    assert "pytorch_model.bin" in refused(tmp_path)
    assert not (tmp_path / "was run").exists()


def test_the_program_prints_what_it_did(tmp_path, capsys):
    write_folder(tmp_path / "there")
    convert([str(tmp_path / "there"), "--output", str(tmp_path / "here"), "--token_types", "fold"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/here/bort_2_4_24_32.params: masked_lm, ")
    assert lines[1:3] == [
        "token type 0 is added to the positions, type 1 is dropped",
        "BertModel has no masked-LM head: it starts as the identity, and predicts words badly "
        "until it is trained",
    ]
    loaded = load_model(str(tmp_path / "here"))
    assert options_of(loaded.network) == BodyOptions(0.01, None)


# ---- names on the hub ----------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(SimpleHTTPRequestHandler):
    """Answers as the hub does for one model, whose files are in the served folder."""

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, with_content: bool) -> None:
        path, model = self.path.partition("?")[0], "/api/models/some/bert"
        files = sorted(Path(self.directory).iterdir())
        siblings = [{"rfilename": file.name} for file in files]
        info = {"id": "some/bert", "sha": COMMIT, "siblings": siblings}
        tree = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
            for file in files
        ]
        answers: dict[str, Any] = dict.fromkeys(
            (model, f"{model}/revision/{COMMIT}", f"{model}/revision/main"), info
        )
        answers[f"{model}/tree/{COMMIT}"] = tree
        if path in answers:
            self._send(json.dumps(answers[path]).encode(), with_content)
            return
        file = Path(self.directory, path.rpartition("/")[2])
        if f"/some/bert/resolve/{COMMIT}/" in path and file.exists():
            self._send(file.read_bytes(), with_content)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes, with_content: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:x}"')
        self.end_headers()
        if with_content:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path) -> Iterator[str]:
    """Serve a made-up model as some/bert; yields the address."""
    write_folder(tmp_path / "served")
    (tmp_path / "served" / "pytorch_model.bin").write_bytes(b"not wanted")
    (tmp_path / "served" / "setup.py").write_text("not wanted")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=tmp_path / "served"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def located(address: str, home: Path, *names: str) -> list[list[str]]:
    """Locate names (or name@revision) in a new process: huggingface_hub reads HF_ENDPOINT once."""
    script = (
        "import sys, json\n"
        "from bort.errors import UserError\n"
        "from bort.huggingface.hub import locate\n"
        "for given in sys.argv[1:]:\n"
        "    name, _, revision = given.partition('@')\n"
        "    try: print(json.dumps(locate(name, revision or None)))\n"
        "    except UserError as error: print(json.dumps([str(error)]))\n"
    )
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(home), "NO_PROXY": "*", "PATH": ""}
    process = subprocess.run(
        [sys.executable, "-c", script, *names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_names_on_the_hub(hub, tmp_path):
    (folder, origin), (missing,) = located(hub, tmp_path / "home", "some/bert", "some/other")
    assert origin == f"some/bert@{COMMIT}"
    assert folder.startswith(str(tmp_path / "home"))
    wanted = ["config.json", "model.safetensors", "vocab.txt"]
    assert sorted(path.name for path in Path(folder).iterdir()) == wanted
    assert read_folder(folder, origin=origin).saved.model_config.origin == origin
    assert missing.startswith("some/other: is not a folder, and cannot be downloaded from")
    # Out of reach, the cache has it: by the branch and by the commit.
    nowhere = "http://127.0.0.1:9"
    names = ("some/bert", f"some/bert@{COMMIT}", "some/other")
    *cached, (missing,) = located(nowhere, tmp_path / "home", *names)
    assert cached == [[folder, origin]] * 2
    assert missing.startswith("some/other: is not a folder, and the hub cannot be reached (")


@pytest.mark.parametrize("source", ["/no/such/folder", "a/b/c", "./x", "", "a b"])
def test_what_is_neither_a_folder_nor_a_name(source):
    with pytest.raises(UserError, match=r"is neither a folder nor the name of a model"):
        locate(source)


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(UserError, match=r"--revision v1: .* is a folder"):
        locate(str(tmp_path), "v1")


# ---- transformers and the real models ------------------------------------------------------------


@pytest.fixture
def real() -> Path:
    folder = ROOT / "model" / "pretrained"
    if not folder.exists():
        pytest.skip("scripts/experiments/fetch_weights.sh fetches the real models")
    return folder


@FAMILIES
def test_transformers_computes_the_same(tmp_path, family, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    write_folder(tmp_path / "there", family)
    if family == "roberta":  # whose own tokenizer is another one
        WordPiece(VOCABULARY, Normalizer()).save(str(tmp_path / "there"))
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True}
        (tmp_path / "there" / "tokenizer_config.json").write_text(json.dumps(described))
    write_tensors(  # as transformers writes a body
        tmp_path / "there", tensors_of(family) if family != "electra" else electra_tensors()
    )
    difference = convert([str(tmp_path / "there"), "--output", str(tmp_path / "here")])
    assert difference < 1e-4
    assert (
        "hidden states of random inputs with padding differ by at most" in capsys.readouterr().out
    )
    loaded = load_model(str(tmp_path / "here"))
    (tmp_path / "back").mkdir()
    write(str(tmp_path / "back"), loaded)
    from bort.huggingface.check import compare

    comparison = compare(loaded, str(tmp_path / "back"))
    assert comparison.difference < 1e-4
    assert comparison.states < 1e-4


def test_a_cased_vocabulary_that_transformers_takes_for_uncased(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    source = tmp_path / "there"
    write_folder(source)
    write_vocabulary(source, ["The" if token == "the" else token for token in VOCABULARY])
    with pytest.raises(UserError, match='"do_lower_case": false; write it there'):
        from_huggingface(str(source), str(tmp_path / "here"))
    (source / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    from_huggingface(str(source), str(tmp_path / "here"))


def test_accents_that_transformers_removes(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    source = tmp_path / "there"
    write_folder(source)
    WordPiece(VOCABULARY, Normalizer(strip_accents=False)).save(str(source))
    config = source / "tokenizer_config.json"
    config.write_text('{"do_lower_case": true}')
    with pytest.raises(UserError, match="takes strip_accents and tokenize_chinese_chars from"):
        from_huggingface(str(source), str(tmp_path / "here"))
    config.write_text('{"do_lower_case": true, "strip_accents": false}')
    from_huggingface(str(source), str(tmp_path / "here"))


def test_what_transformers_cannot_load_is_reported_in_one_line():
    from bort.huggingface import check

    class Theirs:
        @staticmethod
        def from_pretrained(folder: str) -> None:
            raise ValueError("The state dictionary is corrupted.\nAre you sure?")

    reason = r"^there: transformers cannot load its model \([^\n]*corrupted[^\n]*\)$"
    with pytest.raises(UserError, match=reason):
        check._load("there", "model", Theirs)


def electra_tensors() -> dict[str, np.ndarray]:
    zeros = {
        "discriminator_predictions.dense.weight": (HIDDEN, HIDDEN),
        "discriminator_predictions.dense.bias": (HIDDEN,),
        "discriminator_predictions.dense_prediction.weight": (1, HIDDEN),
        "discriminator_predictions.dense_prediction.bias": (1,),
    }
    body = {f"electra.{name}": values for name, values in tensors_of("electra").items()}
    return body | {name: np.zeros(shape, np.float32) for name, shape in zeros.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "paraphrase-MiniLM-L3-v2", "bert-tiny"])
@pytest.mark.parametrize("token_types", ["keep", "fold"])
def test_real_models_survive_the_round_trip(real, tmp_path, name, token_types):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from bort.huggingface.check import compare

    flags = ["--output", str(tmp_path / "here"), "--token_types", token_types]
    assert convert([str(real / name), *flags]) < 1e-4
    loaded = load_model(str(tmp_path / "here"))
    (tmp_path / "back").mkdir()
    assert write(str(tmp_path / "back"), loaded).name == "BertForMaskedLM"
    comparison = compare(loaded, str(tmp_path / "back"))
    assert max(comparison.difference, comparison.states) < 1e-4


@pytest.mark.slow
def test_masks_are_filled_as_transformers_does(real, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    convert([str(real / "bert-tiny"), "--output", str(tmp_path / "here")])
    texts = ["The capital of France is [MASK].", "He [MASK] the book on the [MASK]."]
    found = list(fill_mask(str(tmp_path / "here"), texts))
    theirs = transformers.pipeline("fill-mask", str(real / "bert-tiny"), top_k=5)
    expected = [theirs(texts[0]), *theirs(texts[1])]
    assert len(found) == len(expected) == 3
    for ours, words in zip(found, expected):
        assert [word.token for word in ours] == [word["token_str"] for word in words]
        np.testing.assert_allclose(
            [word.probability for word in ours], [word["score"] for word in words], rtol=1e-3
        )
