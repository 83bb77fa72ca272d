"""The ONNX layout of Hugging Face: its files, its logits, and what loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from mxnet import nd

from bort.bort import decode, encode, masked_hidden
from bort.deployment import onnx_folder
from bort.inference.runtime import backend_for
from bort.saved_model import SavedModel, load_model
from bort.sums import check_sums
from data.batches import pad
from data.encoding import encode_inputs
from scripts.export_onnx import main
from tests.deployment.helpers import (
    EVERY_TOKENIZER,
    KINDS,
    MAX_LEN,
    TEXTS,
    TOKENIZERS,
    node,
    node_folder,
    save,
)

COMMON = {
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("README.md", "SHA256SUMS", "onnx/model.onnx", "onnx/model_quantized.onnx"),
}
# An even number, for choices of two: single texts have their own test under Node.
PAIRS = list(zip(TEXTS, reversed(TEXTS)))


def export(folder: Path, kind: str, tokenizer: str = "sentencepiece", **others: Any) -> Path:
    save(folder / "model", kind, tokenizer, **others)
    main([str(folder / "model"), "--layout", "huggingface", "--output", str(folder / "exported")])
    return folder / "exported"


def logits_of(saved: SavedModel, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return our logits; of a masked LM those of all tokens, [tokens, vocabulary]."""
    arrays = nd.array(ids), nd.array(lengths)
    if saved.model_config.num_outputs:
        return saved.network(*arrays).asnumpy()
    flat = np.flatnonzero(np.arange(ids.shape[1]) < lengths[:, None])
    hidden = masked_hidden(saved.network, encode(saved.network, *arrays), nd.array(flat))
    return decode(saved.network, hidden).asnumpy()


def inputs_of(saved: SavedModel) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and lengths of `PAIRS`."""
    return pad(encode_inputs(saved.tokenizer, PAIRS, MAX_LEN), saved.tokenizer.pad_id)


def feed_of(saved: SavedModel, ids: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Return the inputs of the graph of a saved model, with token types where it has them."""
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    feed = {"input_ids": ids.astype(np.int64), "attention_mask": mask}
    separator = saved.model_config.type_separator
    if separator is not None:
        ends = ids == separator
        feed["token_type_ids"] = mask * ((np.cumsum(ends, axis=1) - ends) > 0)
    return feed


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [*((kind, "sentencepiece") for kind in KINDS), *((kind, "wordpiece") for kind in KINDS)],
)
def test_the_folder_has_the_names_and_values_of_hugging_face(kind, tokenizer, tmp_path, capsys):
    folder = export(tmp_path, kind, tokenizer)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == COMMON | ({"tokenizer.model"} if tokenizer == "sentencepiece" else set())
    check_sums(str(folder))
    saved = load_model(str(tmp_path / "model"))
    ids, lengths = inputs_of(saved)
    feed = feed_of(saved, ids, lengths)
    assert ("token_type_ids" in feed) == (tokenizer == "wordpiece")
    valid = feed["attention_mask"].astype(bool)
    if kind == "multiple_choice":
        feed = {name: array.reshape(2, 2, -1) for name, array in feed.items()}
    (logits,) = session(folder / "onnx" / "model.onnx").run(["logits"], feed)
    expected = logits_of(saved, ids, lengths)
    found = logits[valid] if kind == "masked_lm" else logits.reshape(expected.shape)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if kind == "multiple_choice":
        assert logits.shape == (2, 2)
    family = "Bert" if tokenizer == "wordpiece" else "Roberta"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{folder}: {family}For")
    assert printed[1].startswith("largest difference from MXNet ")
    assert printed[2].startswith("int8: the cosine similarity of the same logits is 0.99")


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "wordpiece"])
def test_the_int8_file_gives_the_scores_of_the_runtime_onnx_int8(tokenizer, tmp_path):
    folder = export(tmp_path, "classification", tokenizer)
    saved = load_model(str(tmp_path / "model"))
    backend = backend_for(saved.network, "onnx-int8")
    small = session(folder / "onnx" / "model_quantized.onnx")
    # One by one: values are quantized by batch, and padding has other token types.
    for row, length in zip(*inputs_of(saved)):
        ids, lengths = row[None, :length], np.array([length])
        (found,) = small.run(["logits"], feed_of(saved, ids, lengths))
        np.testing.assert_allclose(found, backend.logits(ids, lengths), atol=1e-5)


def test_the_config_names_labels_and_the_files_their_model(tmp_path):
    folder = export(tmp_path, "classification", extra_layer=True)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["RobertaForSequenceClassification"]
    assert config["id2label"] == {"0": "0", "1": "1"}
    for name, precision in (("model.onnx", "float32"), ("model_quantized.onnx", "int8")):
        model = onnx.load(str(folder / "onnx" / name))
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["precision"] == precision
        assert json.loads(metadata["model config"])["task"] == "SST-2"
    card = (folder / "README.md").read_text("utf-8")
    assert "library_name: transformers.js" in card
    assert "ORTModelForSequenceClassification" in card
    assert 'AutoModelForSequenceClassification.from_pretrained("FOLDER", { dtype: "fp32" })' in card


def test_no_file_has_local_paths(tmp_path):
    details = {"command": "python finetune_classifier.py --data_dir /home/me/private"}
    folder = export(tmp_path, "classification", details=details)
    assert "--data_dir private" in (folder / "README.md").read_text("utf-8")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path.name for path in files if b"/home/me" in path.read_bytes()] == []


def test_the_card_of_a_multiple_choice_names_no_class_that_transformers_js_lacks(tmp_path):
    card = (export(tmp_path, "multiple_choice") / "README.md").read_text("utf-8")
    assert "ORTModelForMultipleChoice" in card
    assert "AutoModelFor" not in card


# ---- mistakes ------------------------------------------------------------------------------------


def complaint(capsys: Any, *line: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in line])
    assert stopped.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    return said


def test_mistakes_are_reported_in_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch):
    model = save(tmp_path / "model", "classification", "sentencepiece")
    layout = ("--layout", "huggingface")
    assert "needs --output" in complaint(capsys, model, *layout)
    output = tmp_path / "there"
    output.mkdir()
    (output / "mine").write_text("mine")
    assert "already exists" in complaint(capsys, model, *layout, "--output", output)
    assert [path.name for path in output.iterdir()] == ["mine"]
    new = tmp_path / "new"
    absent = complaint(capsys, tmp_path / "absent", *layout, "--output", new)
    assert "absent: not found" in absent
    with monkeypatch.context() as context:
        context.setattr(onnx_folder, "TOLERANCE", -1.0)
        differs = complaint(capsys, model, *layout, "--output", new)
    assert "ONNX Runtime differs from MXNet by" in differs
    (tmp_path / "model" / "tokenizer" / "tokenizer.model").unlink()
    assert "has no tokenizer" in complaint(capsys, model, *layout, "--output", new)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "there"}


# ---- what loads it -------------------------------------------------------------------------------


@pytest.mark.slow  # loads torch and transformers
@pytest.mark.parametrize("kind", ["classification", "regression", "masked_lm", "multiple_choice"])
@EVERY_TOKENIZER
def test_optimum_loads_it(kind, tokenizer, tmp_path):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs optimum-onnx")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder = export(tmp_path, kind, tokenizer)
    (name,) = json.loads((folder / "config.json").read_text("utf-8"))["architectures"]
    saved = load_model(str(tmp_path / "model"))
    ids, lengths = inputs_of(saved)
    firsts, seconds = map(list, zip(*PAIRS))
    inputs = transformers.AutoTokenizer.from_pretrained(str(folder))(
        firsts, seconds, padding=True, return_tensors="pt"
    )
    for given, expected in feed_of(saved, ids, lengths).items():
        np.testing.assert_array_equal(inputs[given].numpy(), expected)
    if kind == "multiple_choice":
        inputs = {given: values.reshape(2, 2, -1) for given, values in inputs.items()}
    model_class = getattr(optimum, f"ORTModelFor{name.partition('For')[2]}")
    expected = logits_of(saved, ids, lengths)
    logits = model_class.from_pretrained(str(folder))(**inputs).logits.numpy()
    valid = np.arange(ids.shape[1]) < lengths[:, None]
    found = logits[valid] if kind == "masked_lm" else logits.reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    small = model_class.from_pretrained(str(folder), file_name="model_quantized.onnx")
    logits = small(**inputs).logits.numpy()
    rounded = (logits[valid] if kind == "masked_lm" else logits).ravel()
    exact = expected.ravel()
    assert exact @ rounded > 0.99 * np.sqrt(exact @ exact * (rounded @ rounded))


@pytest.mark.slow  # 3 s each, and npm installs its packages once: 500 MB
@pytest.mark.parametrize("kind", ["classification", "regression", "masked_lm", "candidates"])
@EVERY_TOKENIZER
def test_transformers_js_loads_it_under_node(kind, tokenizer, tmp_path, tmp_path_factory):
    folder = export(tmp_path, kind, tokenizer)
    saved = load_model(str(tmp_path / "model"))
    pairs = [[text, None] for text in TEXTS]
    pairs += [[first, second] for first, second in zip(TEXTS, TEXTS[1:])]
    answers = run_under_node(node_folder(tmp_path_factory), folder, "fp32", pairs)
    small = run_under_node(node_folder(tmp_path_factory), folder, "q8", pairs)
    assert len(answers) == len(small) == len(pairs)
    for texts, answer, rounded in zip(pairs, answers, small):
        (ids,) = encode_inputs(saved.tokenizer, [[one for one in texts if one]], MAX_LEN)
        assert answer["ids"] == rounded["ids"] == ids.tolist()
        expected = logits_of(saved, ids[None], np.array([len(ids)])).ravel()
        np.testing.assert_allclose(answer["logits"], expected, atol=1e-4)
        if kind in ("classification", "regression", "candidates"):
            same = backend_for(saved.network, "onnx-int8").logits(ids[None], np.array([len(ids)]))
            np.testing.assert_allclose(rounded["logits"], same.ravel(), atol=1e-4)


@pytest.mark.slow
@EVERY_TOKENIZER
def test_transformers_js_tokenizes_english_as_we_do(tokenizer, shared, tmp_path, tmp_path_factory):
    folder = export(tmp_path, "classification", tokenizer)
    lines = (shared / "corpus" / "enwiki_gensim_sample.txt").read_text("utf-8").splitlines()
    texts = [line.strip() for line in lines if line.strip()][::8]
    assert len(texts) > 1000
    found = node(node_folder(tmp_path_factory), texts, "tokenize.mjs", str(folder))
    expected = TOKENIZERS[tokenizer]().encode_batch(texts)
    assert found == [ids.tolist() for ids in expected]


def run_under_node(place: Path, folder: Path, dtype: str, pairs: list[list[Any]]) -> list[Any]:
    requests = [{"text": text, "pair": pair} for text, pair in pairs]
    return node(place, requests, "run_model.mjs", str(folder), dtype)
