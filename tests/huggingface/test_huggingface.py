"""Hugging Face's layouts: the arithmetic of both sides, names both ways, and the two programs.

Without torch and transformers their side is computed here, in NumPy and float64, from the names
and the configuration alone; the tests at the end ask transformers itself, where it is installed.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mxnet import nd
from tokenizers import Tokenizer

from bort.bort import decode, encode, masked_hidden
from bort.errors import UserError
from bort.files import decode_json, write_json
from bort.huggingface import check as huggingface_check
from bort.huggingface import folder as huggingface_folder
from bort.huggingface import weights as huggingface
from bort.huggingface.config import Description, HuggingFaceConfig, configuration, parse_config
from bort.huggingface.convert import to_huggingface as to_folder
from bort.huggingface.families import Architecture, architecture_of
from bort.huggingface.model_card import model_card
from bort.huggingface.tensors import read_tensors
from bort.huggingface.tokenizer import describe, read_tokenizer
from bort.huggingface.weights import from_huggingface, to_huggingface
from bort.pretraining.teacher import load_teacher
from bort.saved_model import ModelConfig, build_network, load_model, save_model
from bort.shapes import BORT_OPTIONS, LAYER_NORM_EPS, Shape
from bort.sums import write_sums
from bort.tokenization import ByteLevelBPE, TokenizerSettings, load_tokenizer
from data.encoding import encode_inputs
from scripts.convert_from_huggingface import main as bring_back
from scripts.convert_to_huggingface import main as convert
from scripts.train_sentencepiece import SentencePieceSettings, train
from tests.reference import redraw
from tests.test_readme import SAMPLE_TEXT

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors")

MODEL, SHAPE = "bort_2_4_24_32", Shape(layers=2, heads=4, intermediate=24, hidden=32)
FAMILIES = ("roberta", "bert")
KINDS: dict[str, dict[str, Any]] = {
    "masked_lm": {},
    "classification": {"task": "MNLI", "labels": ("a", "b", "c"), "num_outputs": 3},
    "regression": {"task": "STS-B", "num_outputs": 1},
    "multiple_choice": {"task": "COPA", "labels": ("0", "1"), "num_outputs": 1},
    "candidates": {"task": "ReCoRD", "labels": ("0", "1"), "num_outputs": 2},
}
EVERY = pytest.mark.parametrize(
    ("kind", "family"), [(kind, family) for kind in KINDS for family in FAMILIES]
)
LINES = [line for line in SAMPLE_TEXT.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def sample() -> Any:
    return load_tokenizer(TokenizerSettings())


@pytest.fixture(scope="module")
def bpe() -> ByteLevelBPE:
    """Return a small byte-level BPE laid out as RoBERTa's, `<mask>` last."""
    from bort.tokenization import BYTE_TO_CHARACTER

    merges = ["h e", "Ġ t", "i n", "Ġt he", "e r", "Ġ a", "o n", "Ġ s", "r e", "a t", "Ġs he"]
    tokens = [*BYTE_TO_CHARACTER.values(), *(one.replace(" ", "") for one in merges)]
    np.random.default_rng(0).shuffle(tokens)
    return ByteLevelBPE(["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"], merges)


def config_for(kind: str, tokenizer: Any, **others: Any) -> ModelConfig:
    values = {"model": MODEL, "kind": kind, "max_len": 40, **KINDS[kind], **others}
    return ModelConfig(
        vocab_size=tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint, **values
    )


def saved(folder: Path, kind: str, tokenizer: Any, **others: Any) -> Any:
    """Save a network of drawn values as `best` in a folder; returns it."""
    model_config = config_for(kind, tokenizer, **others)
    network = build_network(model_config)
    redraw(network, seed=3)
    save_model(str(folder / "best.params"), network, model_config, tokenizer)
    return network


def arrays_of(network: Any) -> dict[str, np.ndarray]:
    named = network._collect_params_with_prefix()
    return {name: parameter.data().asnumpy() for name, parameter in named.items()}


def assert_same_bits(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.dtype == second[name].dtype
        assert values.tobytes() == second[name].tobytes(), name


# ---- transformers' arithmetic in NumPy ---------------------------------------------------------


def linear(values: np.ndarray, tensors: dict, name: str) -> np.ndarray:
    return values @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def normal(values: np.ndarray, tensors: dict, name: str, eps: float) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def gelu(values: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return values * (1 + erf(values / np.sqrt(2))) / 2


def body(tensors: dict, config: dict, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the last hidden states [batch, length, hidden] of BertModel or RobertaModel."""
    family, eps = config["model_type"], config["layer_norm_eps"]
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    if family == "roberta":  # create_position_ids_from_input_ids
        real = ids != config["pad_token_id"]
        places = np.cumsum(real, axis=1) * real + config["pad_token_id"]
    table = f"{family}.embeddings"
    hidden = tensors[f"{table}.word_embeddings.weight"][ids]
    hidden = hidden + tensors[f"{table}.position_embeddings.weight"][places]
    hidden = hidden + tensors[f"{table}.token_type_embeddings.weight"][0]
    hidden = normal(hidden, tensors, f"{table}.LayerNorm", eps)
    for layer in range(config["num_hidden_layers"]):
        name = f"{family}.encoder.layer.{layer}"
        context = attention(hidden, tensors, f"{name}.attention.self", config, mask)
        context = linear(context, tensors, f"{name}.attention.output.dense")
        hidden = normal(hidden + context, tensors, f"{name}.attention.output.LayerNorm", eps)
        inner = gelu(linear(hidden, tensors, f"{name}.intermediate.dense"))
        outer = linear(inner, tensors, f"{name}.output.dense")
        hidden = normal(hidden + outer, tensors, f"{name}.output.LayerNorm", eps)
    return hidden


def attention(
    hidden: np.ndarray, tensors: dict, name: str, config: dict, mask: np.ndarray
) -> np.ndarray:
    heads = config["num_attention_heads"]
    query, key, value = (
        linear(hidden, tensors, f"{name}.{one}")
        .reshape(*hidden.shape[:2], heads, -1)
        .transpose(0, 2, 1, 3)
        for one in ("query", "key", "value")
    )
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1])
    weights = np.exp(scores + np.where(mask, 0, -np.inf)[:, None, None])
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ value).transpose(0, 2, 1, 3).reshape(hidden.shape)


def their_logits(tensors: dict, config: dict, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return logits as the class that config.json names does: of every token, or of every input."""
    (name,) = config["architectures"]
    hidden, family = body(tensors, config, ids, mask), config["model_type"]
    embedding = tensors[f"{family}.embeddings.word_embeddings.weight"].T
    if name.endswith("MaskedLM"):
        head = {"bert": "cls.predictions.transform.", "roberta": "lm_head."}[family]
        norm = {"bert": "LayerNorm", "roberta": "layer_norm"}[family]
        bias = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias"}[family]
        inner = gelu(linear(hidden, tensors, f"{head}dense"))
        inner = normal(inner, tensors, f"{head}{norm}", config["layer_norm_eps"])
        return inner @ embedding + tensors[bias]
    if name == "RobertaForSequenceClassification":
        inner, outer = "classifier.dense", "classifier.out_proj"
    else:
        inner, outer = f"{family}.pooler.dense", "classifier"
    return linear(np.tanh(linear(hidden[:, 0], tensors, inner)), tensors, outer)


@EVERY
def test_the_folder_computes_what_the_network_does(tmp_path, sample, kind, family):
    network = saved(tmp_path / "model", kind, sample)
    folder = tmp_path / "there"
    folder.mkdir()
    huggingface_folder.write(str(folder), load_model(str(tmp_path / "model")), family)
    stored = safetensors_numpy.load_file(str(folder / "model.safetensors"))
    tensors = {name: values.astype(np.float64) for name, values in stored.items()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lengths = np.array([512, 9, 2])
    mask = np.arange(512) < lengths[:, None]
    ids = np.random.default_rng(1).integers(2, sample.vocab_size, mask.shape)
    ids[~mask] = sample.pad_id
    found = their_logits(tensors, config, ids, mask)
    inputs = nd.array(ids), nd.array(lengths)
    if kind != "masked_lm":
        np.testing.assert_allclose(found, network(*inputs).asnumpy(), atol=1e-5)
        return
    flat = np.flatnonzero(mask)
    hidden = masked_hidden(network, encode(network, *inputs), nd.array(flat))
    expected = decode(network, hidden).asnumpy()
    np.testing.assert_allclose(found.reshape(-1, sample.vocab_size)[flat], expected, atol=2e-5)


# ---- names ---------------------------------------------------------------------------------------


@pytest.fixture
def there(sample) -> dict[str, np.ndarray]:
    """Return the arrays of a RobertaForMaskedLM."""
    network = build_network(config_for("masked_lm", sample))
    redraw(network, seed=4)
    return to_huggingface(arrays_of(network), Architecture("roberta", "MaskedLM"), pad_id=1)


def back(arrays: Any, name: str = "RobertaForMaskedLM") -> dict[str, np.ndarray]:
    return from_huggingface(arrays, architecture_of(name), layers=2, pad_id=1).parameters


def test_roberta_has_two_positions_that_no_token_takes(there):
    table = there["roberta.embeddings.position_embeddings.weight"]
    assert table.shape == (514, 32)
    assert not table[:2].any()
    assert table[2:].all()


def test_the_decoders_bias_stands_under_both_its_names(there):
    """transformers 4.47 reads the second, and without it an untrained bias."""
    np.testing.assert_array_equal(there["lm_head.decoder.bias"], there["lm_head.bias"])
    assert there["lm_head.bias"].all()


def test_a_token_type_is_added_to_every_position(there):
    plain = back(there)["encoder.position_weight"]
    row = np.arange(32, dtype=np.float32)
    name = "roberta.embeddings.token_type_embeddings.weight"
    found = back({**there, name: row[None]})["encoder.position_weight"]
    np.testing.assert_array_equal(found, plain + row)


def test_negative_zeros_survive(there):
    table = there["roberta.embeddings.position_embeddings.weight"]
    table[5] = -0.0
    assert np.signbit(back(there)["encoder.position_weight"][3]).all()


def test_half_precision_is_widened(there):
    found = back({name: values.astype(np.float16) for name, values in there.items()})
    assert {values.dtype.name for values in found.values()} == {"float32"}


def test_copies_and_what_has_no_effect_are_skipped(there):
    more = {
        "lm_head.decoder.weight": there["roberta.embeddings.word_embeddings.weight"],
        "roberta.embeddings.position_ids": np.arange(514)[None],
        "roberta.pooler.dense.weight": np.ones((32, 32), np.float32),
    }
    assert_same_bits(back({**there, **more}), back(there))


@pytest.mark.parametrize("name", ["lm_head.decoder.weight", "lm_head.decoder.bias"])
def test_a_decoder_that_is_not_tied_is_refused(there, name):
    original = {
        "lm_head.decoder.weight": there["roberta.embeddings.word_embeddings.weight"],
        "lm_head.decoder.bias": there["lm_head.bias"],
    }[name]
    with pytest.raises(UserError, match=f"{name} differs from "):
        back({**there, name: original + 1})


def test_missing_and_surplus_tensors_are_named(there):
    with pytest.raises(UserError, match=r"has no parameter for the tensor 'adapter\.weight'"):
        back({**there, "adapter.weight": np.ones(1)})
    del there["lm_head.dense.bias"]
    with pytest.raises(
        UserError, match=r"1 tensors are missing, the first is lm_head\.dense\.bias"
    ):
        back(there)


def test_a_pooler_counts_where_it_is_used(sample):
    network = build_network(config_for("classification", sample))
    architecture = Architecture("bert", "SequenceClassification")
    arrays = to_huggingface(arrays_of(network), architecture, pad_id=1)
    del arrays["bert.pooler.dense.weight"]
    with pytest.raises(UserError, match=r"missing, the first is bert\.pooler\.dense\.weight"):
        back(arrays, architecture.name)


def test_a_network_with_another_parameter_has_no_place(sample):
    network = build_network(config_for("classification", sample, extra_layer=True))
    with pytest.raises(UserError, match=r"does not fit the network: extra\.bias differs"):
        to_huggingface(arrays_of(network), Architecture("bert", "SequenceClassification"), 1)


def parsed(without: str = "", **others: Any) -> Description:
    """Parse the config.json of a RobertaForMaskedLM with other entries."""
    ids = {"bos": 0, "pad": 1, "eos": 2}
    architecture = Architecture("roberta", "MaskedLM")
    config = {**configuration(SHAPE, architecture, ids, 60, BORT_OPTIONS), **others}
    config.pop(without, None)
    content = json.dumps(config).encode()
    return parse_config(decode_json(content, HuggingFaceConfig, "config.json"))


def test_a_configuration_tells_its_shape():
    assert parsed() == (("roberta", "MaskedLM"), SHAPE, 1, 1e-5, 1, True)
    # transformers leaves out what is its default
    assert parsed(without="tie_word_embeddings") == parsed()
    assert parsed(without="layer_norm_eps").layer_norm_eps == 1e-12
    assert parsed(without="pad_token_id").pad_id == 1
    assert parsed(type_vocab_size=2).token_types == 2
    assert parsed(layer_norm_eps=1e-12).layer_norm_eps == 1e-12
    bare = parsed(without="architectures")
    assert (bare.architecture, bare.has_class) == (("roberta", "Model"), False)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("architectures", ["XLMRobertaForMaskedLM"], "architecture 'XLMRobertaForMaskedLM'"),
        ("architectures", ["RobertaForCausalLM"], "expected one of RobertaForMaskedLM, "),
        ("architectures", ["BertModel", "BertForMaskedLM"], "'BertModel, BertForMaskedLM'"),
        ("architectures", ["ElectraForSequenceClassification"], "its head applies GELU, ours tanh"),
        ("architectures", ["DistilBertForSequenceClassification"], "its head applies ReLU"),
        ("model_type", "bert", "model_type is 'bert': RobertaForMaskedLM is another one"),
        ("model_type", "albert", "is 'albert': all its layers share one set of parameters"),
        ("model_type", "deberta-v2", "its attention has relative positions"),
        ("model_type", "gpt2", "model_type is 'gpt2'; expected one of roberta, bert, distilbert"),
        ("model_type", None, "config.json has no model_type; add one of roberta, bert, distilb"),
        ("hidden_act", "gelu_new", "hidden_act is 'gelu_new'"),
        ("layer_norm_eps", 0.0, "layer_norm_eps is 0.0"),
        ("layer_norm_eps", 1e-320, "layer_norm_eps is 1e-320"),
        ("type_vocab_size", 3, "type_vocab_size is 3: the networks here have 1 or 2"),
        ("max_position_embeddings", 512, "max_position_embeddings is 512"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False"),
        ("is_decoder", True, "is_decoder is True"),
        ("hidden_size", "32", "Expected `int | null`, got `str` - at `$.hidden_size`"),
        ("architectures", {"a": 1}, "at `$.architectures`"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("num_hidden_layers", 2**31, "at most 1000 layers"),
        ("hidden_size", 10**9, "at most 1000 layers and sizes of 1,000,000"),
        ("pad_token_id", 60, "pad_token_id is 60, expected the id of a token"),
    ],
)
def test_another_computation_is_refused_by_name(entry, value, message):
    with pytest.raises(UserError) as caught:
        parsed(**{entry: value})
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["RobertaModel", "RobertaForSequenceClassification"])
def test_a_decoder_that_is_not_there_need_not_be_tied(name):
    assert parsed(architectures=[name], tie_word_embeddings=False).architecture.name == name


def test_the_shapes_of_roberta_are_those_of_gluonnlp():
    from gluonnlp.model import bert

    for shape, name in huggingface.TEACHERS.items():
        given = getattr(bert, f"{name}_hparams")
        entries = ("num_layers", "num_heads", "hidden_size", "units")
        assert shape == tuple(given[entry] for entry in entries)
        assert given["layer_norm_eps"] == LAYER_NORM_EPS


# ---- tokenizers ----------------------------------------------------------------------------------


def saved_tokenizer(tokenizer: Any, folder: Path) -> dict[str, Any]:
    tokenizer.save(str(folder))
    described = describe(str(folder), max_len=40, reads_special=False)
    for name, content in described.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return described


@pytest.mark.parametrize("merges", ["as one word", "as pairs"])
def test_a_byte_level_tokenizer_is_restored_from_its_json_alone(tmp_path, bpe, merges):
    content = saved_tokenizer(bpe, tmp_path)["tokenizer.json"]
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "merges.txt").unlink()
    if merges == "as pairs":  # how newer versions write them
        content["model"]["merges"] = [one.split(" ") for one in content["model"]["merges"]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_tokenizer(str(tmp_path)).fingerprint == bpe.fingerprint


@pytest.mark.parametrize("special", [False, True])
def test_tokens_that_transformers_finds_in_texts_are_refused(tmp_path, bpe, special):
    """Such as markers of entities: here they would be split, and get other ids in silence."""
    content = saved_tokenizer(bpe, tmp_path)["tokenizer.json"]
    token = {"content": "Ann", "id": len(content["model"]["vocab"]), "special": special}
    added = [*content["added_tokens"], {**content["added_tokens"][0], **token}]
    edit(tmp_path / "tokenizer.json", added_tokens=added)
    with pytest.raises(UserError, match=r"tokenizer\.json: transformers finds the added token"):
        read_tokenizer(str(tmp_path))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"added token 'Ann' .*; convert a model without it"):
        read_tokenizer(str(tmp_path))
    known = next(token for token in content["model"]["vocab"] if token.isalpha())
    added[-1] = {**added[-1], "content": known, "id": content["model"]["vocab"][known]}
    edit(tmp_path / "tokenizer.json", added_tokens=added)
    with pytest.raises(UserError, match=rf"'{known}' .*; if no text has it, delete it"):
        read_tokenizer(str(tmp_path))
    edit(tmp_path / "tokenizer.json", added_tokens=added[:-1])
    assert read_tokenizer(str(tmp_path)).fingerprint == bpe.fingerprint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "Ann"}}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["Ann"], "pad_token": "<pad>"}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "Ann"}}),
        ("tokenizer_config.json", {"mask_token": {"content": "Ann"}}),
        ("special_tokens_map.json", {"additional_special_tokens": [{"content": "Ann"}]}),
        ("added_tokens.json", {"Ann": 9999}),
    ],
)
def test_tokens_are_refused_that_files_beside_the_vocabulary_add(tmp_path, bpe, name, content):
    saved_tokenizer(bpe, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{name}: .* added token 'Ann' .*; convert a model with"):
        read_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_that_finds_words_otherwise_is_refused(tmp_path, bpe, name):
    """BertJapaneseTokenizer has a WordPiece's vocab.txt, but divides a text by a dictionary."""
    saved_tokenizer(bpe, tmp_path)
    config = {"tokenizer_class": "RobertaTokenizerFast"}
    (tmp_path / name).write_text(json.dumps(config), encoding="utf-8")
    assert read_tokenizer(str(tmp_path)).fingerprint == bpe.fingerprint
    edit(tmp_path / name, tokenizer_class="DPRQuestionEncoderTokenizer")  # BERT's
    assert read_tokenizer(str(tmp_path)).fingerprint == bpe.fingerprint
    edit(tmp_path / name, tokenizer_class="BertJapaneseTokenizer")
    with pytest.raises(UserError, match=rf"^{name}: tokenizer_class is 'BertJapaneseTokenizer'"):
        read_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("tokenizer_config.json", {"add_prefix_space": True}, "puts a space before each text"),
        (
            "tokenizer.json",
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            "puts a space before each text",
        ),
        (
            "tokenizer.json",
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "use_regex": False,
                }
            },
            "use_regex is False",
        ),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "normalizes texts"),
    ],
)
def test_a_byte_level_tokenizer_that_changes_texts_is_refused(tmp_path, bpe, name, changes, reason):
    """vocab.json and merges.txt do not say it, and its ids would be others in silence."""
    saved_tokenizer(bpe, tmp_path)
    assert read_tokenizer(str(tmp_path)).fingerprint == bpe.fingerprint
    edit(tmp_path / name, **changes)
    with pytest.raises(UserError, match=reason):
        read_tokenizer(str(tmp_path))
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).unlink()
    with pytest.raises(UserError, match=reason):
        read_tokenizer(str(tmp_path))


def test_two_byte_level_tokenizers_in_a_folder_must_be_the_same(tmp_path, bpe):
    """transformers reads tokenizer.json, and the files beside it may be those of a first model."""
    content = saved_tokenizer(bpe, tmp_path)["tokenizer.json"]
    merges = content["model"]["merges"]
    for changed in (merges[:-1], [merges[1], merges[0], *merges[2:]]):
        edit(tmp_path / "tokenizer.json", model={**content["model"], "merges": changed})
        with pytest.raises(UserError, match=r"or other merges, than vocab\.json and merges\.txt"):
            read_tokenizer(str(tmp_path))
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).unlink()
    assert read_tokenizer(str(tmp_path)).fingerprint != bpe.fingerprint


def test_a_sentencepiece_vocabulary_is_restored_from_its_own_file(tmp_path, sample):
    saved_tokenizer(sample, tmp_path)
    assert read_tokenizer(str(tmp_path)).fingerprint == sample.fingerprint
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"needs its tokenizer\.model beside it"):
        read_tokenizer(str(tmp_path))
    for content in ([], {}, {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(
            UserError, match=r"tokenizer\.json: .* at `\$|tokenizer\.json: (Exp|Obj)"
        ):
            read_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer: neither"):
        read_tokenizer(str(tmp_path))


def merged(word: str, model: dict[str, Any]) -> list[str]:
    """Return the tokens of a word by the merges of a tokenizer.json, lowest rank first."""
    ranks = {merge: rank for rank, merge in enumerate(model["merges"])}
    tokens = list(word)
    while True:
        pairs = [ranks.get(f"{a} {b}", len(ranks)) for a, b in zip(tokens, tokens[1:])]
        if not pairs or min(pairs) == len(ranks):
            break
        place = pairs.index(min(pairs))
        tokens[place : place + 2] = ["".join(tokens[place : place + 2])]
    spelt = model["vocab"]
    by_bytes = ([one] if one in spelt else [f"<0x{b:02X}>" for b in one.encode()] for one in tokens)
    return [token for parts in by_bytes for token in parts]


def test_the_merges_are_those_sentencepiece_makes(tmp_path, sample):
    model = saved_tokenizer(sample, tmp_path)["tokenizer.json"]["model"]
    for line in [*LINES, "naïve Größe 中文 (x*y) #1"]:
        plain = " ".join(unicodedata.normalize("NFKC", line).split())
        words = plain.replace(" ", " ▁").split(" ")
        tokens = [token for word in ("▁" + words[0], *words[1:]) for token in merged(word, model)]
        assert [model["vocab"][token] for token in tokens] == sample.encode(line).tolist()


def test_decomposed_characters_get_the_ids_of_sentencepiece(tmp_path, sample):
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    content = saved_tokenizer(sample, tmp_path)["tokenizer.json"]
    theirs = HuggingFaceTokenizer.from_str(json.dumps(content))
    for text in ("naïve café", "tiếng Việt", "がぎぐ パピプ", "한국어 각", "ἀρχή ᾧ"):
        for form in ("NFC", "NFD"):
            written = unicodedata.normalize(form, f"The {text} of the king")
            ids = theirs.encode(written, add_special_tokens=False).ids
            assert ids == sample.encode(written).tolist(), (text, form)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"add_dummy_prefix": False}, "it does not normalize spaces as usual"),
        ({"treat_whitespace_as_suffix": True}, "it marks spaces at the end of words"),
        ({"user_defined_symbols": ["@x"]}, "['@x'] is user-defined"),
        ({"split_by_whitespace": False}, "spans several words"),
        ({"model_type": "char"}, "its pieces are words or characters"),
    ],
)
def test_a_vocabulary_without_a_form_there_is_refused(tmp_path, changes, reason):
    from sentencepiece import SentencePieceTrainer

    usual = {"vocab_size": 120, "model_type": "bpe", "hard_vocab_limit": False, "minloglevel": 2}
    SentencePieceTrainer.train(
        sentence_iterator=iter(30 * ["of the of the of the"] + LINES[:30]),
        model_prefix=str(tmp_path / "tokenizer"),
        **{**usual, **changes},
    )
    with pytest.raises(UserError) as caught:
        describe(str(tmp_path), 40, reads_special=True)
    assert reason in str(caught.value)


# ---- the programs --------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch) -> None:
    """Let the programs find neither torch nor transformers."""
    monkeypatch.setattr(huggingface_check.importlib.util, "find_spec", lambda _: None)


def test_another_family_or_treatment_of_token_types_is_refused(tmp_path, sample):
    saved(tmp_path / "model", "classification", sample)
    with pytest.raises(UserError, match="family 'electra': expected one of roberta, bert"):
        to_folder(str(tmp_path / "model"), str(tmp_path / "there"), "electra")
    with pytest.raises(UserError, match="token_types 'drop': expected keep or fold"):
        huggingface_folder.read_folder(str(tmp_path / "absent"), token_types="drop")


@EVERY
@pytest.mark.usefixtures("alone")
def test_the_round_trip_keeps_every_bit_and_the_card(tmp_path, sample, kind, family, capsys):
    network = saved(tmp_path / "model", kind, sample)
    there, again = tmp_path / "there", tmp_path / "again"
    assert convert([str(tmp_path / "model"), "--output", str(there), "--family", family]) is None
    assert bring_back([str(there), "--output", str(again)]) is None
    said = capsys.readouterr().out
    assert said.count("not compared: needs torch and transformers") == 2
    loaded = load_model(str(again / f"{MODEL}.params"))
    assert_same_bits(arrays_of(loaded.network), arrays_of(network))
    origin = huggingface_folder.architecture_for(loaded.model_config, family).name
    assert f"there: {origin} of {MODEL}" in said
    expected = config_for(kind, sample, details={"converted_from": origin})
    assert loaded.model_config == expected
    assert loaded.tokenizer.fingerprint == sample.fingerprint
    assert sorted(one.name for one in tmp_path.iterdir()) == ["again", "model", "there"]


@pytest.mark.usefixtures("alone")
def test_the_byte_level_folder_has_the_usual_files(tmp_path, bpe):
    details = {
        "metrics": {"dev": {"accuracy": 0.875}, "step": 30},
        "command": "python finetune_classifier.py --task_name MNLI",
        "data": "half of MNLI",
    }
    saved(tmp_path / "model", "classification", bpe, details=details)
    convert([str(tmp_path / "model"), "--output", str(tmp_path / "there")])
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    model_config = (tmp_path / "there" / "README.md").read_text(encoding="utf-8")
    for part in (
        f"# {MODEL}, MNLI\n",
        "- Task: MNLI (classification), labels a, b, c\n",
        "- Data: half of MNLI\n",
        "| dev accuracy | 0.875 |\n| step | 30 |\n",
        "\n    python finetune_classifier.py --task_name MNLI\n",
        "RobertaForSequenceClassification.from_pretrained",
    ):
        assert part in model_config
    config = json.loads((tmp_path / "there" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert config["problem_type"] == "single_label_classification"


@pytest.mark.parametrize(("task", "separators"), [("MNLI", 1), ("", 2)])
def test_a_roberta_of_another_program_keeps_the_form_of_its_pairs(tmp_path, bpe, task, separators):
    saved(tmp_path / "model", "classification", bpe, task=task)
    convert([str(tmp_path / "model"), "--output", str(tmp_path / "there")])
    theirs = Tokenizer.from_file(str(tmp_path / "there" / "tokenizer.json"))
    first, second = (bpe.encode(text).tolist() for text in ("he sat", "on it"))
    ends = separators * [bpe.eos_id]
    assert theirs.encode("he sat").ids == [bpe.bos_id, *first, bpe.eos_id]
    assert theirs.encode("he sat", "on it").ids == [bpe.bos_id, *first, *ends, *second, bpe.eos_id]
    card = (tmp_path / "there" / "README.md").read_text(encoding="utf-8")
    assert f"it puts {['one', 'two'][separators - 1]} `</s>` between two texts" in card


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("masked_lm", "masked language modelling"),
        ("classification", "classification, labels a, b"),
        ("multiple_choice", "multiple choice"),
    ],
)
def test_the_model_card_of_a_model_without_a_task_names_its_kind(kind, task):
    labels = ("a", "b") if kind == "classification" else ()
    model_config = ModelConfig(MODEL, 9, "f", kind, labels=labels)
    assert f"- Task: {task}\n" in model_card(model_config, Architecture("bert", "MaskedLM"))


def test_a_full_disk_is_reported_in_one_line(tmp_path, bpe, capsys):
    saved(tmp_path / "model", "classification", bpe, task="MNLI")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # bytes of a file
    try:
        with pytest.raises(SystemExit):
            convert([str(tmp_path / "model"), "--output", str(tmp_path / "there")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert "model.safetensors: cannot be written (" in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_fine_tuned_there_with_our_tokenizer_keeps_the_form_of_its_pairs(tmp_path, bpe):
    """transformers saves the tokenizer that it has loaded, and nothing of the task it trains."""
    saved(tmp_path / "model", "classification", bpe, task="MNLI")
    convert([str(tmp_path / "model"), "--output", str(tmp_path / "there")])
    (tmp_path / "there" / "SHA256SUMS").unlink()
    edit(tmp_path / "there" / "config.json", bort={})
    bring_back([str(tmp_path / "there"), "--output", str(tmp_path / "here")])
    model_config = load_model(str(tmp_path / "here")).model_config
    assert (model_config.task, model_config.one_separator) == ("", True)
    convert([str(tmp_path / "here"), "--output", str(tmp_path / "again")])
    theirs, again = (
        Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in ("there", "again")
    )
    assert again.encode("he sat", "on it").ids == theirs.encode("he sat", "on it").ids


def test_the_model_card_has_no_local_paths():
    details = {
        "command": "python /home/me/bort/finetune_classifier.py --data_dir /scratch/me/glue "
        "--output_dir=~/runs/x --pretrained_parameters runs/a b.params",
        "data": "/home/me/corpus/shards",
        "teacher": {"weights": "~/models/roberta.params", "note": "at ./a/b and https://u:p@h/c"},
        "metrics": {"dev": 0.5, "precision/recall": "0.1 / 0.2"},
    }
    model_config = ModelConfig(MODEL, 9, "f", "classification", "MNLI", ("a",), details=details)
    text = model_card(model_config, Architecture("bert", "SequenceClassification"))
    for private in ("/home", "/scratch", "~", "runs/", "u:p", "models/"):
        assert private not in text
    command = "python finetune_classifier.py --data_dir glue --output_dir=x --pretrained_parameters"
    assert f"    {command} a b.params\n" in text
    assert "- Data: shards\n" in text
    assert "| teacher weights | roberta.params |\n| teacher note | at b and c |\n" in text
    assert "| precision/recall | 0.1 / 0.2 |" in text


def test_the_model_card_names_what_is_not_known():
    model_config = ModelConfig(
        model=MODEL, vocab_size=9, tokenizer_fingerprint="f", kind="masked_lm"
    )
    text = model_card(model_config, Architecture("bert", "MaskedLM"))
    assert "- Task: masked language modelling\n- Data: not recorded\n" in text
    assert "## Metrics\n\nnot recorded\n\n## Command\n\n    not recorded\n\n## Use\n" in text
    model_config = dataclasses.replace(
        model_config, kind="regression", task="STS-B", details={"step": 7}
    )
    text = model_card(model_config, Architecture("bert", "SequenceClassification"))
    assert "- Data: the official data of STS-B, see the command\n" in text
    assert "## Details\n\n| what | value |\n| --- | --- |\n| step | 7 |\n\n## Use\n" in text


def complaint(capsys, main: Any, *line: object) -> str:
    """Return the one line that a program leaves on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in line])
    assert stopped.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    return said


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_exported_is_a_one_line_error(tmp_path, sample, capsys):
    output = tmp_path / "there"
    saved(tmp_path / "extra", "classification", sample, extra_layer=True)
    said = complaint(capsys, convert, tmp_path / "extra", "--output", output)
    assert "trained with --extra_layer: no architecture of transformers has" in said
    saved(tmp_path / "bare", "masked_lm", sample)
    shutil.rmtree(tmp_path / "bare" / "tokenizer")
    said = complaint(capsys, convert, tmp_path / "bare", "--output", output)
    assert "the model has no tokenizer/ beside it" in said
    said = complaint(capsys, convert, tmp_path / "absent", "--output", output)
    assert "absent: not found" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "extra"]
    said = complaint(capsys, convert, tmp_path / "bare", "--output", tmp_path / "bare")
    assert "already exists; name a new folder" in said
    said = complaint(capsys, convert, tmp_path / "bare", "--output", "/dev/null/there")
    assert "--output /dev/null/there: cannot be written (" in said


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
     "tokenizer_config.json"],
)  # fmt: skip
def test_a_flipped_bit_is_refused(tmp_path, folder, capsys, name):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    said = complaint(capsys, bring_back, folder, "--output", tmp_path / "back")
    assert f"{path}: its SHA-256 is not that in SHA256SUMS; restore the file, or delete" in said
    assert not (tmp_path / "back").exists()


def test_an_edited_model_card_and_an_edit_without_sums_are_read(tmp_path, folder):
    (folder / "README.md").write_text("edited\n", encoding="utf-8")
    bring_back([str(folder), "--output", str(tmp_path / "back")])
    (folder / "SHA256SUMS").unlink()  # as the message says
    edit(folder / "config.json", id2label={"0": "x", "1": "y", "2": "z"})
    bring_back([str(folder), "--output", str(tmp_path / "again")])
    assert load_model(str(tmp_path / "again")).model_config.labels == ("x", "y", "z")


def test_without_names_there_are_as_many_labels_as_num_labels_says(tmp_path, folder):
    (folder / "SHA256SUMS").unlink()
    edit(folder / "config.json", id2label=None, num_labels=3)
    bring_back([str(folder), "--output", str(tmp_path / "back")])
    found = load_model(str(tmp_path / "back")).model_config
    assert found.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.fixture
def folder(tmp_path, sample, alone) -> Path:
    """Return a converted classifier."""
    saved(tmp_path / "model", "classification", sample)
    convert([str(tmp_path / "model"), "--output", str(tmp_path / "there")])
    return tmp_path / "there"


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def test_what_cannot_be_imported_is_a_one_line_error(tmp_path, folder, capsys):
    def said(**changes: Any) -> str:
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder, damaged)
        (damaged / "SHA256SUMS").unlink()  # as in a folder of another program
        edit(damaged / "config.json", **changes)
        return complaint(capsys, bring_back, damaged, "--output", tmp_path / "back")

    assert "damaged: hidden_act is 'relu'" in said(hidden_act="relu")
    assert "config.json has 7 tokens and pads with 1, its tokenizer has 1000" in said(vocab_size=7)
    assert "classifier.3.weight has shape (3, 32)" in said(id2label={"0": "a", "1": "b"})
    assert "hidden size 32 is not divisible by 5 heads" in said(num_attention_heads=5)
    assert "id2label does not number its labels" in said(id2label={"1": "a", "x": "b"})
    assert "id2label does not number its labels" in said(id2label={})
    twice = said(id2label={"0": "a", "1": "b", "2": "a"})
    assert "id2label has the label 'a' twice; rename one" in twice
    multi = said(problem_type="multi_label_classification")
    assert "problem_type is 'multi_label_classification' with 3 labels; supported are" in multi
    assert "problem_type is 'regression' with 3 labels" in said(problem_type="regression")
    assert "Expected `object`, got `array` - at `$.bort`" in said(bort=[])
    assert "max_len is 513, expected 1 to 512" in said(bort={"max_len": 513})
    assert "hidden size 32 is not divisible by 5 heads" in said(num_attention_heads=5)
    assert "at most 1000 layers" in said(num_hidden_layers=2**31)
    weights = folder / "model.safetensors"
    tensors = safetensors_numpy.load_file(str(weights))
    bias = "roberta.embeddings.LayerNorm.bias"
    for array, message in (
        (np.full(32, np.nan, np.float32), "encoder.layer_norm.beta has values that are NaN"),
        (np.zeros(32, np.int32), f"{bias} has dtype int32, expected floats"),
        (
            np.zeros(10**5, np.float32),
            "encoder.layer_norm.beta has shape (100000,); by config.json",
        ),
    ):
        safetensors_numpy.save_file({**tensors, bias: array}, str(weights))
        assert message in said()
    for content, message in (
        (b"nonsense", "model.safetensors: cannot be read ("),
        (b"", "model.safetensors: cannot be read ("),
        (safetensors_of((0, 8), (4, 12)), "invalid offset for tensor"),
        (safetensors_of((0, 8), (8, 2**62)), "model.safetensors: cannot be read ("),
        (POINTER, "model.safetensors: is a Git LFS pointer, not the file; run `git lfs pull`"),
    ):
        weights.write_bytes(content)
        assert message in said()
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor pytorch_model.bin" in said()
    (folder / "config.json").unlink()
    refused = complaint(capsys, bring_back, folder, "--output", tmp_path / "back")
    assert "config.json: cannot be read" in refused
    assert not (tmp_path / "back").exists()


def test_a_model_with_another_head_is_not_of_its_former_task(tmp_path, sample, folder):
    """transformers keeps our entries in config.json when it replaces a head."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    saved(tmp_path / "other", "masked_lm", sample)
    convert([str(tmp_path / "other"), "--output", str(tmp_path / "new")])
    former = config["bort"]
    assert (former["kind"], len(former["labels"])) == ("classification", 3)
    (tmp_path / "new" / "SHA256SUMS").unlink()
    edit(tmp_path / "new" / "config.json", bort={**former, "task": "MNLI"})
    found = huggingface_folder.read_folder(str(tmp_path / "new")).saved.model_config
    assert (found.kind, found.task, found.labels) == ("masked_lm", "", ())
    assert (found.model, found.max_len) == (former["model"], former["max_len"])
    (folder / "SHA256SUMS").unlink()
    for labels, task in ((("x", "y", "z"), "MNLI"), (("x", "y"), "")):  # renamed; replaced
        edit(folder / "config.json", bort={**former, "task": "MNLI", "labels": labels})
        found = huggingface_folder.read_folder(str(folder)).saved.model_config
        assert (found.task, found.labels) == (task, tuple(config["id2label"].values()))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"


def safetensors_of(*offsets: tuple[int, int], dtype: str = "F32", data: bytes = bytes(12)) -> bytes:
    """Return a safetensors file of vectors with given offsets, right or wrong."""
    size = {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]
    header = {
        f"t{number}": {
            "dtype": dtype,
            "shape": [(end - start) // size],
            "data_offsets": [start, end],
        }
        for number, (start, end) in enumerate(offsets)
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_bfloat16_is_widened_and_other_types_refused(tmp_path):
    values = np.array([1.5, -2.0, 3e38, 0.0], np.float32)
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    (tmp_path / "model.safetensors").write_bytes(safetensors_of((0, 8), dtype="BF16", data=data))
    found = read_tensors(str(tmp_path))["t0"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values, rtol=2**-7)
    content = safetensors_of((0, 12), dtype="F8_E4M3")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"'t0' has dtype F8_E4M3; save it as float32"):
        read_tensors(str(tmp_path))


def test_sharded_weights_are_read_by_their_index(tmp_path, folder, capsys):
    tensors = safetensors_numpy.load_file(str(folder / "model.safetensors"))
    bring_back([str(folder), "--output", str(tmp_path / "whole")])
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        name = f"model-{number}.safetensors"
        safetensors_numpy.save_file({key: tensors[key] for key in part}, str(folder / name))
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    bring_back([str(folder), "--output", str(tmp_path / "parts")])
    first, second = (load_model(str(tmp_path / name)).network for name in ("whole", "parts"))
    assert_same_bits(arrays_of(first), arrays_of(second))
    for wrong, message in (
        ({"x": "../there/model-0.safetensors"}, "is not a file of the folder"),
        ({"x": "model-0.safetensors"}, "no file has the tensor 'x'"),
        ({"x": "absent"}, "absent: cannot be read (No such file"),
        ([], "Expected `object`, got `array` - at `$.weight_map`"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}), encoding="utf-8")
        said = complaint(capsys, bring_back, folder, "--output", tmp_path / "back")
        assert message in said


@pytest.mark.parametrize(
    "name", ["model-0.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
)
def test_weights_of_every_form_are_compared_with_their_sums(tmp_path, folder, capsys, name):
    whole = folder / "model.safetensors"
    part = whole.rename(folder / "model-0.safetensors")
    index = dict.fromkeys(safetensors_numpy.load_file(str(part)), part.name)
    if name.endswith(".bin"):
        part.rename(folder / name)
    else:
        write_json(str(folder / f"{whole.name}.index.json"), {"weight_map": index}, False)
    write_sums(str(folder))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    said = complaint(capsys, bring_back, folder, "--output", tmp_path / "back")
    assert f"{folder / name}: its SHA-256 is not that in SHA256SUMS; restore the file" in said


class FakeTensor:
    """A tensor of torch, as far as it is used."""

    def __init__(self, values: Any) -> None:
        self._values = np.asarray(values, np.float32)

    def float(self) -> FakeTensor:
        return self

    def numpy(self) -> np.ndarray:
        return self._values


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (EOFError("Ran out of input"), "cannot be read as weights alone (Ran out of input)"),
        (EOFError(), "cannot be read as weights alone (EOFError)"),
        ([], "holds no weights: expected a dictionary of tensors"),
        ({}, "holds no weights"),
        ({"state_dict": {"a": FakeTensor(1)}}, "'state_dict' is a dict, expected a tensor; save"),
        ({3: FakeTensor(1)}, "3 is a FakeTensor, expected a tensor"),
    ],
)
def test_torch_files_without_weights_are_a_one_line_error(tmp_path, monkeypatch, loaded, message):
    def load(path: str, map_location: str, weights_only: bool) -> Any:
        assert weights_only
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    fake = SimpleNamespace(__version__="2.6.0", load=load, Tensor=FakeTensor)
    monkeypatch.setitem(sys.modules, "torch", fake)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_tensors(str(tmp_path))
    assert message in str(caught.value)
    path.write_bytes(POINTER)
    with pytest.raises(UserError, match="Git LFS pointer"):
        read_tensors(str(tmp_path))
    fake.__version__ = "2.5.1+cpu"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"torch 2\.5\.1\+cpu is not safe"):
        read_tensors(str(tmp_path))


def test_a_pointer_in_place_of_the_tokenizer_is_named(tmp_path, folder, capsys):
    (folder / "tokenizer.model").write_bytes(POINTER)
    said = complaint(capsys, bring_back, folder, "--output", tmp_path / "back")
    assert "tokenizer.model: is a Git LFS pointer" in said


def test_a_folder_of_another_program_is_named_by_its_shape(tmp_path, folder):
    """Without our entry in config.json: labels and lengths are what transformers calls them."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del content["bort"]
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "SHA256SUMS").unlink()
    bring_back([str(folder), "--output", str(tmp_path / "back")])
    model_config = load_model(str(tmp_path / "back")).model_config
    assert (model_config.model, model_config.kind, model_config.task) == (
        MODEL,
        "classification",
        "",
    )
    assert (model_config.labels, model_config.num_outputs, model_config.max_len) == (
        ("a", "b", "c"),
        3,
        512,
    )


# ---- transformers itself -------------------------------------------------------------------------


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("torch", reason="needs the extra huggingface")
    return pytest.importorskip("transformers", reason="needs the extra huggingface")


@EVERY
def test_transformers_computes_the_same(tmp_path, sample, kind, family, transformers, capsys):
    saved(tmp_path / "model", kind, sample)
    there = tmp_path / "there"
    difference = convert([str(tmp_path / "model"), "--output", str(there), "--family", family])
    assert difference is not None
    assert 0 < difference < 1e-5
    assert f"(limit 0.0001; transformers {transformers.__version__}, " in capsys.readouterr().out
    again = bring_back([str(there), "--output", str(tmp_path / "back")])
    assert again == difference


def test_a_difference_is_an_error_and_leaves_nothing(
    tmp_path, sample, transformers, monkeypatch, capsys
):
    saved(tmp_path / "model", "masked_lm", sample)
    original = huggingface.to_huggingface

    def shifted(*arguments: Any) -> dict[str, np.ndarray]:
        arrays = original(*arguments)
        table = next(name for name in arrays if "position_embeddings" in name)
        arrays[table] = np.roll(arrays[table], 1, axis=0)
        return arrays

    monkeypatch.setattr(huggingface, "to_huggingface", shifted)
    output = tmp_path / "there"
    said = complaint(capsys, convert, tmp_path / "model", "--output", output)
    assert "and ours differ by " in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["bpe", "sample", "unigram"])
def test_transformers_reads_the_same_tokens(tmp_path, kind, request, transformers):
    if kind == "unigram":
        model = tmp_path / "unigram.model"
        settings = SentencePieceSettings("", "", vocab_size=600, model_type="unigram")
        model.write_bytes(train(settings, LINES))
        tokenizer = load_tokenizer(TokenizerSettings(sentencepiece=str(model)))
    else:
        tokenizer = request.getfixturevalue(kind)
    # Space for an even number of tokens: of an odd one, the last goes to another text there.
    saved(tmp_path / "model", "classification", tokenizer, max_len=41)
    convert([str(tmp_path / "model"), "--output", str(tmp_path / "there")])
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "there"))
    odd = ["", " ", "a  b ", "\tThe <mask> </s> <0x41>", "naïve Größe 中文 🙂", "(x*y) #1\n2"]
    texts = [*LINES, *odd]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist(), text
    for pair in ((LINES[0],), (LINES[1], LINES[2]), (LINES[3] * 9, LINES[4] * 9)):
        (expected,) = encode_inputs(tokenizer, [pair], max_len=41)
        assert theirs(*pair, truncation=True)["input_ids"] == expected.tolist()
    assert theirs.decode(theirs("The cat.")["input_ids"], skip_special_tokens=True) == "The cat."


@pytest.mark.parametrize("kind", ["bpe", "sample"])
def test_a_masked_lm_reads_its_mask(tmp_path, kind, request, transformers):
    tokenizer = request.getfixturevalue(kind)
    saved(tmp_path / "model", "masked_lm", tokenizer)
    convert([str(tmp_path / "model"), "--output", str(tmp_path / "there")])
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "there"))
    ids = theirs("The <mask> sat on it.")["input_ids"]
    before, after = tokenizer.encode("The").tolist(), tokenizer.encode("The sat on it.").tolist()
    after = after[len(before) :]
    assert ids == [tokenizer.bos_id, *before, tokenizer.mask_id, *after, tokenizer.eos_id]


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_roberta_of_transformers_survives_the_round_trip(tmp_path, bpe, transformers, weights):
    """Made by transformers, with all that it draws: its token type is not zero."""
    import torch

    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=bpe.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    model = transformers.RobertaForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(str(tmp_path / "theirs"))
    bpe.save(str(tmp_path / "theirs"))
    saved_tokenizer(bpe, tmp_path / "theirs")
    if weights == "pytorch_model.bin":
        (tmp_path / "theirs" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "theirs" / weights)
    difference = bring_back([str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")])
    assert difference is not None
    assert difference < 1e-5
    found = arrays_of(load_model(str(tmp_path / "ours")).network)["word_embed.0.weight"]
    expected = model.roberta.embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(found, expected)


def test_pickle_that_runs_code_is_refused(tmp_path, folder, transformers, capsys):
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({"x": Path("/")}, folder / "pytorch_model.bin")
    said = complaint(capsys, bring_back, folder, "--output", tmp_path / "back")
    assert "pytorch_model.bin: cannot be read as weights alone (" in said


@EVERY
def test_what_transformers_saves_again_is_imported_bit_identically(
    tmp_path, bpe, kind, family, transformers
):
    """Its own save_pretrained leaves out defaults and writes its own tokenizer files."""
    network = saved(tmp_path / "model", kind, bpe)
    convert([str(tmp_path / "model"), "--output", str(tmp_path / "there"), "--family", family])
    name = huggingface_folder.architecture_for(config_for(kind, bpe), family).name
    model = getattr(transformers, name).from_pretrained(str(tmp_path / "there"))
    model.save_pretrained(str(tmp_path / "second"))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "there"))
    theirs.save_pretrained(str(tmp_path / "second"))
    assert not (tmp_path / "second" / "vocab.json").exists()
    bring_back([str(tmp_path / "second"), "--output", str(tmp_path / "back")])
    loaded = load_model(str(tmp_path / "back"))
    assert_same_bits(arrays_of(loaded.network), arrays_of(network))
    details = {"converted_from": name}
    assert loaded.model_config == dataclasses.replace(config_for(kind, bpe), details=details)


@pytest.mark.slow
def test_roberta_base_comes_as_a_teacher(tmp_path, bpe, transformers):
    import torch

    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=bpe.vocab_size,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(str(tmp_path / "theirs"))
    saved_tokenizer(bpe, tmp_path / "theirs")
    difference = bring_back([str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")])
    assert difference is not None
    assert difference < 1e-4
    path = str(tmp_path / "ours" / "roberta_12_768_12.params")
    load_teacher("roberta_12_768_12", path, bpe.vocab_size, bpe.fingerprint, ctx=None)
