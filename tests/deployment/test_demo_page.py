"""The demo page: its files and description, and in headless Chromium what it shows."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import json
import re
import shlex
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import onnxruntime
import pytest

from bort.deployment import demo_page, npm
from bort.deployment.onnx_folder import export_folder
from bort.inference.base import softmax
from bort.inference.masked_lm import mask_ids
from bort.inference.runtime import backend_for
from bort.saved_model import load_model
from bort.sums import check_sums
from data.encoding import encode_inputs
from scripts.demo_page import main
from scripts.verify import main as verify
from tests.deployment.helpers import (
    EVERY_TOKENIZER,
    MAX_LEN,
    TEXTS,
    TOKENIZERS,
    archives,
    node,
    node_folder,
    save,
)
from tests.deployment.test_npm import packages  # noqa: F401  (a fixture)
from tests.deployment.test_onnx_folder import feed_of

PAGE = Path(demo_page.__file__).parent / "page"


def write_page(folder: Path, kind: str, tokenizer: str, *flags: str, **others: Any) -> Path:
    model = save(folder / "model", kind, tokenizer, **others)
    main([model, "--output", str(folder / "page"), *flags])
    return folder / "page"


def description(page: Path) -> dict[str, Any]:
    return json.loads((page / "page.json").read_text("utf-8"))


@EVERY_TOKENIZER
def test_a_page_holds_all_that_it_loads(tokenizer, tmp_path, packages, capsys):  # noqa: F811
    page = write_page(tmp_path, "classification", tokenizer, "--packages", str(packages))
    library = {f"library/{new}" for one in npm.PACKAGES for new in one.files.values()}
    model = {"config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model_quantized.onnx"}
    found = {path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()}
    assert found == library | {f"model/{name}" for name in model} | {
        *("index.html", "page.js", "style.css", "page.json", "SHA256SUMS")
    }
    check_sums(str(page))
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{page}: a browser downloads \d+\.\d MB", printed[0])
    # Special tokens in a text are plain text, as here.
    assert json.loads((page / "model" / "tokenizer.json").read_text("utf-8"))["added_tokens"] == []


def test_the_command_that_serves_a_page_is_quoted(tmp_path, packages, capsys):  # noqa: F811
    (tmp_path / "my pages").mkdir()
    page = write_page(
        tmp_path / "my pages", "classification", "sentencepiece", "--packages", str(packages)
    )
    *_, command = capsys.readouterr().out.splitlines()
    assert shlex.split(command.partition(": ")[2])[-2:] == ["--directory", str(page)]


def test_verify_detects_a_damaged_page(tmp_path, packages, capsys):  # noqa: F811
    page = write_page(tmp_path, "classification", "sentencepiece", "--packages", str(packages))
    capsys.readouterr()
    assert verify([str(page)]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert re.search("demo page +complete", first)
    assert re.search("ONNX export for Hugging Face +complete", second)
    (page / "library" / "transformers.js").write_text("something else")
    assert verify([str(page)]) == 1
    assert "transformers.js: its SHA-256 is not that in SHA256SUMS" in capsys.readouterr().out


def test_the_page_names_the_kind_of_model(tmp_path, packages):  # noqa: F811
    flags = ("--packages", str(packages))
    found = description(write_page(tmp_path / "a", "classification", "sentencepiece", *flags))
    assert (found["title"], found["labels"], found["fields"]) == ("SST-2", ["0", "1"], ["Sentence"])
    assert (found["mask"], found["low"], found["max_len"]) == (None, None, MAX_LEN)
    found = description(write_page(tmp_path / "b", "regression", "sentencepiece", *flags))
    assert (found["low"], found["high"], found["labels"]) == (0, 5, [])
    assert found["fields"] == ["Sentence 1", "Sentence 2"]
    # MRPC's own columns are #1 String and #2 String.
    page = write_page(tmp_path / "e", "classification", "sentencepiece", *flags, task="MRPC")
    assert description(page)["fields"] == ["Text", "Second text"]
    found = description(write_page(tmp_path / "c", "regression", "byte_level_bpe", *flags, task=""))
    assert (found["low"], found["title"], found["fields"]) == (None, "regression", ["Text"])
    # Another program's BERT may have learned pairs; its RoBERTa has pairs of another form.
    page = write_page(tmp_path / "f", "classification", "wordpiece", *flags, task="")
    assert description(page)["fields"] == ["Text", "Second text, if the model takes pairs"]
    assert description(page)["required"] == 1
    found = description(write_page(tmp_path / "d", "masked_lm", "byte_level_bpe", *flags))
    tokenizer = TOKENIZERS["byte_level_bpe"]()
    assert (found["mask"], found["mask_id"]) == ("<mask>", tokenizer.mask_id)
    assert "<mask>" in found["example"]
    assert found["special_ids"] == tokenizer.special_ids.tolist()
    blank = tokenizer.encode(" ").tolist()[0]
    assert found["tokens"][str(blank)] == "Ġ"


def test_the_page_fetches_from_no_other_server():
    text = (PAGE / "index.html").read_text("utf-8")
    (import_map,) = re.findall(r'<script type="importmap">(.*?)</script>', text)
    digest = base64.b64encode(hashlib.sha256(import_map.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy.startswith("default-src 'self';")
    assert f"'sha256-{digest}'" in policy
    for path in PAGE.iterdir():
        assert re.findall(r"https?://[^\s\"'<)]*", path.read_text("utf-8")) in (
            [],
            ["http://localhost:8000."],
        )


@pytest.mark.parametrize("kind", ["multiple_choice", "candidates"])
def test_what_no_page_can_show_is_refused(kind, tmp_path, capsys):
    model = save(tmp_path / "model", kind, "sentencepiece")
    with pytest.raises(SystemExit):
        main([model, "--output", str(tmp_path / "page"), "--packages", str(tmp_path)])
    (said,) = capsys.readouterr().err.splitlines()
    assert "which chooses between texts; a page takes a classifier of one or two texts" in said
    assert not (tmp_path / "page").exists()


def test_mistakes_leave_no_page(tmp_path, capsys, monkeypatch):
    model = save(tmp_path / "model", "classification", "sentencepiece")
    for flags, said in (
        (
            ["--packages", str(tmp_path / "absent")],
            "absent/huggingface-transformers-4.3.2.tgz: can",
        ),
        ([], "npm, which downloads transformers.js, is not installed: install Node.js, or run"),
    ):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(SystemExit) as stopped:
            main([model, "--output", str(tmp_path / "page"), *flags])
        assert stopped.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- in a browser --------------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def browse(folder: Path, url: str, inputs: list[list[str]], *flags: str) -> dict[str, Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    command = "browse.mjs", url, str(folder / "screenshot.png"), *flags
    return node(folder, inputs, *command, CHROMIUM=chromium)


def seen_on(page: Path, tmp_path_factory: Any, inputs: list[list[str]], *flags: str) -> Any:
    """Type inputs into a page; it may use no other server and log no error."""
    folder = node_folder(tmp_path_factory)
    with served(page) as url:
        seen = browse(folder, url, inputs, *flags)
    assert seen["errors"] == []
    assert len(seen["answers"]) == len(inputs), seen["loaded"]  # none where it is not ready
    assert all(address.startswith(url) for address in seen["addresses"])
    assert (folder / "screenshot.png").stat().st_size > 10_000
    return seen


def shares(answer: dict[str, Any]) -> list[float]:
    return [float(row["share"]) for row in answer["rows"]]


@pytest.mark.slow  # starts Chromium; npm downloads what is not in its cache
@EVERY_TOKENIZER
def test_a_browser_shows_the_probabilities_of_each_label(tokenizer, tmp_path, tmp_path_factory):
    page = write_page(
        tmp_path, "classification", tokenizer, "--packages", archives(tmp_path_factory)
    )
    saved = load_model(str(tmp_path / "model"))
    inputs = [[text] for text in (*TEXTS, "a <mask> </s> [MASK] [SEP]", "very long " * MAX_LEN)]
    seen = seen_on(page, tmp_path_factory, [*inputs, [" "]])
    backend = backend_for(saved.network, "onnx-int8")
    for texts, answer in zip(inputs, seen["answers"]):
        (ids,) = encode_inputs(saved.tokenizer, [[texts[0].strip()]], MAX_LEN)
        expected = softmax(backend.logits(ids[None], np.array([len(ids)])))[0]
        assert [row["name"] for row in answer["rows"]] == ["0", "1"]
        np.testing.assert_allclose(shares(answer), expected, atol=1e-4)
        assert re.match(r"Answered in \d+ ms, in this browser", answer["status"])
    assert seen["answers"][-1] == {"status": "Type a text first.", "rows": []}
    assert seen["title"] == "SST-2"


@pytest.mark.slow
@EVERY_TOKENIZER
def test_a_browser_scores_a_pair_of_texts(tokenizer, tmp_path, tmp_path_factory):
    page = write_page(tmp_path, "regression", tokenizer, "--packages", archives(tmp_path_factory))
    saved = load_model(str(tmp_path / "model"))
    long = "in the heart of it " * MAX_LEN
    inputs = [TEXTS[:2], TEXTS[2:4], [TEXTS[0], long], [long, TEXTS[1]], [long, long + "?"]]
    seen = seen_on(page, tmp_path_factory, inputs)
    backend = backend_for(saved.network, "onnx-int8")
    for texts, answer in zip(inputs, seen["answers"]):
        (ids,) = encode_inputs(saved.tokenizer, [[one.strip() for one in texts]], MAX_LEN)
        score = np.clip(backend.logits(ids[None], np.array([len(ids)]))[0, 0], 0, 5)
        np.testing.assert_allclose(shares(answer), [score / 5], atol=1e-4)
        assert abs(float(answer["rows"][0]["value"]) - score) < 6e-4


@pytest.mark.slow
def test_a_browser_takes_one_text_or_two_where_a_model_does(tmp_path, tmp_path_factory):
    flags = "--packages", archives(tmp_path_factory)
    page = write_page(tmp_path, "classification", "wordpiece", *flags, task="")
    saved = load_model(str(tmp_path / "model"))
    inputs = [[TEXTS[0], " "], TEXTS[:2], [" ", TEXTS[0]]]
    *answers, refused = seen_on(page, tmp_path_factory, inputs)["answers"]
    backend = backend_for(saved.network, "onnx-int8")
    for texts, answer in zip(inputs, answers):
        given = [one.strip() for one in texts if one.strip()]
        (ids,) = encode_inputs(saved.tokenizer, [given], MAX_LEN)
        expected = softmax(backend.logits(ids[None], np.array([len(ids)])))[0]
        np.testing.assert_allclose(shares(answer), expected, atol=1e-4)
    assert refused == {"status": "Type a text first.", "rows": []}


@pytest.mark.slow
@EVERY_TOKENIZER
def test_a_browser_fills_masks_with_the_best_words(tokenizer, tmp_path, tmp_path_factory):
    page = write_page(tmp_path, "masked_lm", tokenizer, "--packages", archives(tmp_path_factory))
    saved = load_model(str(tmp_path / "model"))
    mask = saved.tokenizer.special_tokens["mask"]
    eos = saved.tokenizer.special_tokens["eos"]
    texts = [f"the {mask} of it", mask, f"{eos} on the {mask}, {mask}!"]
    seen = seen_on(page, tmp_path_factory, [[text] for text in [*texts, "none"]])
    session = onnxruntime.InferenceSession(str(page / "model" / "onnx" / "model_quantized.onnx"))
    for text, answer in zip(texts, seen["answers"]):
        ids = mask_ids(saved.tokenizer, text)[None].astype(np.int64)
        (logits,) = session.run(None, feed_of(saved, ids, np.array([ids.size])))
        expected = softmax(logits[0][ids[0] == saved.tokenizer.mask_id].astype(np.float64))
        expected[:, saved.tokenizer.special_ids] = -1
        best = np.sort(expected, axis=1)[:, ::-1][:, :5]
        np.testing.assert_allclose(shares(answer), best.ravel(), atol=1e-4)
        names = [row["name"] for row in answer["rows"]]
        assert len(names) == 5 * text.count(mask)
        tokens = saved.tokenizer.tokens(expected.argmax(axis=1))
        decoded = [saved.tokenizer.decode([one]).strip() for one in expected.argmax(axis=1)]
        for name, token, word in zip(names[::5], tokens, decoded):
            assert name == (word if word and "\ufffd" not in word else token)
    assert seen["answers"][-1]["status"] == f"Write {mask} where a word is missing."


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "masked_lm"])
@EVERY_TOKENIZER
def test_transformers_js_gives_our_logits_in_a_browser(kind, tokenizer, tmp_path, tmp_path_factory):
    page = write_page(tmp_path, kind, tokenizer, "--packages", archives(tmp_path_factory))
    saved = load_model(str(tmp_path / "model"))
    export_folder(str(tmp_path / "model"), str(tmp_path / "exported"))
    full = tmp_path / "exported" / "onnx" / "model.onnx"
    shutil.copyfile(full, page / "model" / "onnx" / "model.onnx")
    seen = seen_on(page, tmp_path_factory, [[text] for text in TEXTS], "logits")
    assert len(seen["logits"]) == 2 * len(TEXTS)
    for found in seen["logits"]:
        name = {"fp32": "model.onnx", "q8": "model_quantized.onnx"}[found["dtype"]]
        session = onnxruntime.InferenceSession(str(page / "model" / "onnx" / name))
        ids = np.array([found["ids"]])
        (logits,) = session.run(None, feed_of(saved, ids, np.array([ids.size])))
        np.testing.assert_allclose(found["logits"], logits.ravel(), atol=1e-4)


@pytest.mark.slow
def test_a_page_that_is_opened_as_a_file_says_how_to_serve_it(tmp_path, tmp_path_factory):
    page = write_page(
        tmp_path, "classification", "sentencepiece", "--packages", archives(tmp_path_factory)
    )
    seen = browse(node_folder(tmp_path_factory), f"file://{page}/index.html", [])
    assert "python -m http.server" in seen["loaded"]
