"""Text to shards, end to end: nothing lost, nothing invented, whatever the workers or the kills."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from itertools import chain

import numpy as np
import pytest
import zstandard
from sentencepiece import SentencePieceTrainer

import create_pretraining_data
from bort.errors import UserError
from bort.files import lock_folder, read_json, write_json
from bort.tokenization import (
    RELEASED_DATASET,
    TokenizerSettings,
    load_tokenizer,
    load_tokenizer_folder,
)
from bort.wordpiece import read_wordpiece
from data import preparation
from data.corpus import scan
from data.masking import MaskingSettings, SequenceSettings
from data.preparation import Block, InstanceMaker, InstanceSettings, read_blocks, workers
from data.shards import (
    MANIFEST_FILE,
    UNFINISHED_FILE,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    open_shards,
    read_manifest,
    shard_name,
)
from data.text_formats import TextSource
from tests.conftest import ROOT
from tests.wordpieces import write_vocabulary

SAMPLE = ROOT / "test_data" / "sample_text.txt"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TokenizerSettings())


@pytest.fixture
def small_blocks(monkeypatch):
    """Make blocks small enough for the sample text to have many, and cores enough for workers."""
    monkeypatch.setattr(preparation, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(preparation, "usable_cores", lambda: 4)


def flags(**values):
    line = []
    for name, value in values.items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def create(output, text=SAMPLE, **values):
    """Run the program; one worker unless `values` say otherwise."""
    values = {"input_file": text, "output_dir": output, "num_workers": 1, **values}
    return create_pretraining_data.main(flags(**values))


def complaint(capsys, output, text=SAMPLE, **values):
    """Return the one line that the program prints when it refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        create(output, text, **values)
    assert caught.value.code in (1, 2)
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


def content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def documents_of(text):
    """Return the sentences of each document: the definition, in plain Python."""
    documents = [[line.strip() for line in part.split("\n")] for part in re.split(r"\n\s*\n", text)]
    return [[line for line in lines if line] for lines in documents if any(lines)]


def unmasked(shards, tokenizer):
    """Return the text tokens of each sequence, unmasked, without special tokens."""
    rows = []
    for index in range(shards.num_sequences):
        ids, positions, true_ids = shards.sequence(index)
        row = np.array(ids)
        row[positions] = true_ids
        rows.append([i for i in row.tolist() if i not in (tokenizer.bos_id, tokenizer.eos_id)])
    return rows


def ids_of(text, tokenizer):
    encoded = [tokenizer.encode_sentences(one) for one in documents_of(text)]
    return [int(i) for sentences in encoded for sentence in sentences for i in sentence]


@pytest.mark.parametrize("values", [{}, {"whole_word_mask": True}, {"format": "sentence_pairs"}])
def test_unmasking_gives_back_every_token_of_the_text(tmp_path, tokenizer, values):
    manifest = create(tmp_path / "out", num_outputs=3, max_seq_length=64, **values)
    shards = open_shards(str(tmp_path / "out"))
    assert shards.manifest == manifest
    found = list(chain.from_iterable(unmasked(shards, tokenizer)))
    text = SAMPLE.read_text(encoding="utf-8")
    assert found == ids_of(text, tokenizer)
    documents = documents_of(text)
    assert manifest.totals["documents"] == len(documents)
    assert manifest.totals["sentences"] == sum(map(len, documents))
    assert manifest.totals["tokens"] == shards.lengths.sum()
    assert manifest.totals["unknown"] == found.count(tokenizer.unk_id)
    assert shards.lengths.max() <= 64


def test_plain_english_has_no_unknown_tokens(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\nIt's 7 o'clock -- isn't it?\n")
    assert create(tmp_path / "out", text).totals["unknown"] == 0


def test_files_are_as_agreed(tmp_path, tokenizer):
    create(tmp_path / "out", num_outputs=2, random_seed=7)
    shards = ["part-00000.npz", "part-00001.npz"]
    files = [MANIFEST_FILE, *shards, "tokenizer/tokenizer.model"]
    assert sorted(content(tmp_path / "out")) == files
    saved = load_tokenizer_folder(str(tmp_path / "out" / "tokenizer"))
    assert saved.fingerprint == tokenizer.fingerprint
    manifest = read_json(str(tmp_path / "out" / MANIFEST_FILE))
    assert manifest["format_version"] == 1
    assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert manifest["arguments"]["random_seed"] == 7
    assert manifest["inputs"][0]["path"] == str(SAMPLE)
    assert manifest["totals"]["sequences"] == sum(one["sequences"] for one in manifest["shards"])
    with np.load(tmp_path / "out" / "part-00001.npz", allow_pickle=False) as arrays:
        assert arrays["input_ids"].dtype == np.uint16
        assert arrays["input_ids"][0] == tokenizer.bos_id
        assert arrays["input_ids"][-1] == tokenizer.eos_id


def test_statistics_of_the_masks(tmp_path, tokenizer):
    create(tmp_path / "out", dupe_factor=10)
    shards = open_shards(str(tmp_path / "out"))
    shown, truth = [], []
    for index in range(shards.num_sequences):
        ids, positions, true_ids = shards.sequence(index)
        inside = len(ids) - 2
        assert len(positions) == min(80, max(1, round(0.15 * inside)))
        shown.append(ids[positions])
        truth.append(true_ids)
    shown, truth = np.concatenate(shown), np.concatenate(truth)
    assert not np.isin(truth, tokenizer.special_ids).any()
    for share, found in [(0.8, shown == tokenizer.mask_id), (0.1, shown == truth)]:
        # One in a thousand random tokens is the true one.
        assert abs(found.mean() - share) < 4 * np.sqrt(share * (1 - share) / len(truth)) + 2e-4


def test_whole_words_of_real_tokens(tmp_path, tokenizer):
    create(tmp_path / "out", whole_word_mask=True, masked_lm_prob=0.3)
    shards = open_shards(str(tmp_path / "out"))
    for index in range(shards.num_sequences):
        ids, positions, true_ids = shards.sequence(index)
        row, chosen = np.array(ids), np.zeros(len(ids), bool)
        row[positions], chosen[positions] = true_ids, True
        continues = ~tokenizer.word_starts[row]
        assert (chosen[1:] == chosen[:-1])[continues[1:] & (row[:-1] != tokenizer.bos_id)].all()


def test_whole_words_need_a_vocabulary_that_marks_where_they_begin(tmp_path, capsys):
    with open(tmp_path / "suffix.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(SAMPLE.read_text(encoding="utf-8").split("\n")),
            model_writer=file,
            model_type="bpe",
            vocab_size=500,
            character_coverage=0.99,
            treat_whitespace_as_suffix=True,
            byte_fallback=True,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=["<mask>"],
            minloglevel=2,
        )
    given = {"sentencepiece": tmp_path / "suffix.model"}
    said = complaint(capsys, tmp_path / "out", whole_word_mask=True, **given)
    assert "--whole_word_mask: no token of this vocabulary begins a word" in said
    create(tmp_path / "out", **given)


def test_wordpiece_masks_whole_words_and_pads_with_0(tmp_path):
    path = write_vocabulary(tmp_path)
    settings = {"vocab_file": path, "whole_word_mask": True, "masked_lm_prob": 0.3}
    create(tmp_path / "out", **settings, num_workers=2)
    shards, tokenizer = open_shards(str(tmp_path / "out")), read_wordpiece(path)
    assert shards.manifest.tokenizer.name == "wordpiece"
    assert shards.manifest.tokenizer.settings["vocab_file"] == path
    assert (shards.manifest.pad_id, shards.manifest.tokenizer.mask_id) == (0, 4)
    saved = load_tokenizer_folder(str(tmp_path / "out" / "tokenizer"))
    assert saved.fingerprint == tokenizer.fingerprint == shards.manifest.tokenizer_fingerprint
    pieces = 0
    for index in range(shards.num_sequences):
        ids, positions, true_ids = shards.sequence(index)
        row, chosen = np.array(ids), np.zeros(len(ids), bool)
        row[positions], chosen[positions] = true_ids, True
        tokens = tokenizer.tokens(row)
        assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
        for before, place in zip(range(len(ids)), range(1, len(ids))):
            if tokens[place].startswith("##") and tokens[before] != "[CLS]":
                assert chosen[place] == chosen[before]
                pieces += int(chosen[place])
    assert pieces > 100


def test_copies_differ_in_masks_and_boundaries(tmp_path, tokenizer):
    text = SAMPLE.read_text(encoding="utf-8")
    create(tmp_path / "out", dupe_factor=3, max_seq_length=64)
    shards = open_shards(str(tmp_path / "out"))
    rows, ids = unmasked(shards, tokenizer), ids_of(text, tokenizer)
    assert list(chain.from_iterable(rows)) == ids * 3
    ends = np.cumsum(list(map(len, rows)))
    copies = [ends[(ends > k * len(ids)) & (ends <= (k + 1) * len(ids))] % len(ids) for k in (0, 1)]
    assert copies[0].tolist() != copies[1].tolist()
    # The first document fits into one sequence, which every copy masks elsewhere.
    create(tmp_path / "long", dupe_factor=3, short_seq_prob=0)
    shards = open_shards(str(tmp_path / "long"))
    first = [i for i in range(shards.num_sequences) if unmasked_equal(shards, 0, i)]
    assert len(first) == 3
    assert len({tuple(shards.sequence(i)[1].tolist()) for i in first}) == 3


def unmasked_equal(shards, one, other):
    rows = []
    for index in (one, other):
        ids, positions, true_ids = shards.sequence(index)
        row = np.array(ids)
        row[positions] = true_ids
        rows.append(row.tolist())
    return rows[0] == rows[1]


def test_the_seed_decides(tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        create(tmp_path / name, random_seed=seed)
    a, b, c = (content(tmp_path / name)["part-00000.npz"] for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_change_nothing(tmp_path, small_blocks, num_workers, monkeypatch):
    # Spawned workers; the programs below that are killed have forked ones.
    monkeypatch.setitem(sys.modules, "mxnet", sys)
    values = {"num_outputs": 3, "dupe_factor": 2}
    create(tmp_path / "one", **values)
    create(tmp_path / "many", num_workers=num_workers, **values)
    assert content(tmp_path / "one") == content(tmp_path / "many")


def test_compression_changes_nothing(tmp_path):
    raw = SAMPLE.read_bytes()
    compress = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }
    create(tmp_path / "plain")
    for suffix, function in compress.items():
        path = tmp_path / f"text{suffix}"
        path.write_bytes(function(raw))
        create(tmp_path / suffix, path)
        assert (
            content(tmp_path / suffix)["part-00000.npz"]
            == content(tmp_path / "plain")["part-00000.npz"]
        )


def rows_of_sample():
    return [{"id": i, "text": text} for i, text in enumerate(SAMPLE.read_text().split("\n\n"))]


def write_json_lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("end", ["\n", "", "\n\n \n"])
@pytest.mark.parametrize("outputs", [1, 2, 7])
def test_json_lines_give_the_shards_of_the_text(tmp_path, end, outputs):
    # Documents of one size, so that a byte more or less would move the bounds of shards.
    documents = ["Equal texts.\nTwo lines." for _ in range(14)] if outputs > 1 else None
    documents = documents or [row["text"].strip() for row in rows_of_sample()]
    (tmp_path / "a.txt").write_text("\n\n".join(documents) + end)
    write_json_lines(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    create(tmp_path / "text", tmp_path / "a.txt", num_outputs=outputs)
    create(tmp_path / "json", tmp_path / "a.jsonl", num_outputs=outputs)
    text, rows = content(tmp_path / "text"), content(tmp_path / "json")
    assert {name: text[name] for name in text if name.endswith(".npz")} == {
        name: rows[name] for name in rows if name.endswith(".npz")
    }


def test_a_row_with_blank_lines_is_one_document(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write_json_lines(path, [{"text": "One.\n\nStill one.\n"}, {"text": ""}, {"text": "Two."}])
    manifest = create(tmp_path / "out", path)
    assert (manifest.totals["documents"], manifest.totals["sentences"]) == (2, 3)


def test_the_text_field_is_named_and_part_of_the_settings(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    write_json_lines(path, [{"body": "One text.", "title": "Another."}])
    line = complaint(capsys, tmp_path / "out", path)
    assert "a.jsonl, line 1: has no field 'text'; name the one that holds the text by" in line
    assert line.endswith("--text_field: body, title\n")
    create(tmp_path / "out", path, text_field="body")
    line = complaint(capsys, tmp_path / "out", path, text_field="title")
    assert "--text_field was body, now title" in line


@pytest.mark.parametrize("kind", ["stdin", "fifo"])
@pytest.mark.parametrize("form", ["text", "gzip", "json lines"])
def test_streams_are_read(tmp_path, kind, form):
    write_json_lines(tmp_path / "a.jsonl", [{"text": row["text"]} for row in rows_of_sample()])
    data = {
        "text": SAMPLE.read_bytes(),
        "gzip": gzip.compress(SAMPLE.read_bytes()),
        "json lines": (tmp_path / "a.jsonl").read_bytes(),
    }[form]
    create(tmp_path / "plain")
    if kind == "stdin":
        command = program(tmp_path / "out", "-", num_workers=1)
        subprocess.run(command, input=data, check=True, stdout=subprocess.DEVNULL)
    else:
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
        writer.start()
        create(tmp_path / "out", tmp_path / "pipe")
        writer.join()
    one, other = content(tmp_path / "out"), content(tmp_path / "plain")
    assert one["part-00000.npz"] == other["part-00000.npz"]
    path = open_shards(str(tmp_path / "out")).manifest.inputs[0].path
    assert path == ("-" if kind == "stdin" else str(tmp_path / "pipe"))


def test_text_of_blanks_is_refused_and_leaves_nothing(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("\u00a0 \u3000\n\n\u2003\n")
    assert "a.txt: holds no text" in complaint(capsys, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_a_document_of_blanks_among_others_may_fill_a_shard(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("One.\n\n" + "\u3000" * 40 + "\n\nThree.\n")
    manifest = create(tmp_path / "out", text, num_outputs=3)
    assert [entry.sequences for entry in manifest.shards] == [1, 0, 1]
    assert open_shards(str(tmp_path / "out")).num_sequences == 2


def test_text_that_the_vocabulary_drops_is_refused_and_leaves_nothing(
    tmp_path, capsys, monkeypatch, tokenizer
):
    monkeypatch.setattr(preparation, "load_tokenizer", lambda settings: tokenizer)
    monkeypatch.setattr(
        tokenizer, "encode_sentences", lambda lines: [np.zeros(0, np.int32) for _ in lines]
    )
    line = complaint(capsys, tmp_path / "out", num_outputs=2)
    assert "--input_file: the vocabulary has no token for any character of the text" in line
    assert not [name for name in content(tmp_path / "out") if "tokenizer" not in name]


def test_a_masked_share_far_from_what_was_asked_is_reported(tmp_path, capsys, monkeypatch):
    def reported(text, **values):
        capsys.readouterr()
        create(tmp_path / f"out-{len(list(tmp_path.iterdir()))}", text, **values)
        return capsys.readouterr().err

    assert reported(SAMPLE) == reported(SAMPLE, whole_word_mask=True) == ""
    limited = reported(SAMPLE, max_predictions_per_seq=5)
    assert re.fullmatch(
        r"warning: \d\.\d% of the tokens of text \(special ones left out\) are masked, "
        r"--masked_lm_prob asks for 15\.0%: --max_predictions_per_seq 5 limits it\n",
        limited,
    )
    short = tmp_path / "short.txt"
    short.write_text("Yes.\n\nNo.\n\n" * 20)
    assert "the sequences are short, and each has a whole number" in reported(short)
    # One mask of seven tokens, in a single sentence where pairs are asked for, is near enough.
    seven = tmp_path / "seven.txt"
    seven.write_text("a , a , a , a\n\n" * 20)
    words_of_latin = write_vocabulary(tmp_path)
    words = {"vocab_file": words_of_latin, "short_seq_prob": 0}
    assert reported(seven, **words) == reported(seven, format="sentence_pairs", **words) == ""
    # Words of 300 letters: two of them are above the masks of a sequence, the third is not.
    words = tmp_path / "words.txt"
    words.write_text("\n\n".join(f"{'qxz' * 100} and {'zqx' * 100} so" for _ in range(5)))
    line = reported(words, whole_word_mask=True, short_seq_prob=0)
    assert "leave --whole_word_mask out" in line
    # In a script of which the vocabulary has no letter.
    greek = tmp_path / "greek.txt"
    greek.write_text("αβγ δεζ\n\n" * 20)
    for flags in ({}, {"whole_word_mask": True}):
        line = reported(greek, vocab_file=words_of_latin, **flags)
        assert "0.0% of the tokens of text" in line
        assert "all are unknown to the vocabulary" in line


def test_chinese_text_has_masks_in_every_sequence(tmp_path, tokenizer):
    text = tmp_path / "a.txt"
    text.write_text(
        "\n\n".join("灯塔曾经由家庭看守他们在那里住了好几个月没有见到任何人" * 9 for _ in range(6))
    )
    create(tmp_path / "out", text, whole_word_mask=True)
    shards = open_shards(str(tmp_path / "out"))
    counts = [len(shards.sequence(index)[1]) for index in range(shards.num_sequences)]
    assert min(counts) >= 1
    share = sum(counts) / (shards.lengths.sum() - 2 * shards.num_sequences)
    assert share == pytest.approx(0.15, abs=0.015)


def test_shards_of_an_earlier_version_are_completed(tmp_path):
    """It counted the last line end of a file as it stands: none here."""
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(["Equal texts."] * 4))
    create(tmp_path / "out", text, num_outputs=2)
    before = content(tmp_path / "out")
    manifest = read_json(str(tmp_path / "out" / MANIFEST_FILE))
    (entry,) = manifest["inputs"]
    assert entry["bytes"] == 4 * len("Equal texts.") + 1
    # With this size the second shard begins with the third document, not with the fourth.
    assert [one["documents"] for one in manifest["shards"]] == [3, 1]
    entry["bytes"] -= 1
    write_json(str(tmp_path / "out" / MANIFEST_FILE), manifest)
    os.remove(tmp_path / "out" / "part-00001.npz")
    resumed = create(tmp_path / "out", text, num_outputs=2)
    assert resumed.shards[1].documents == 2
    assert resumed.inputs[0].bytes == entry["bytes"]
    assert content(tmp_path / "out")["part-00000.npz"] == before["part-00000.npz"]


def test_line_ends_and_blanks_change_nothing(tmp_path):
    text = SAMPLE.read_text(encoding="utf-8")
    odd = tmp_path / "odd.txt"
    spaced = re.sub(r"\n\s*\n", "\n \t\n\u00a0\n\n", text.replace("\n", " \n"))
    odd.write_bytes("\ufeff\n".encode() + spaced.replace("\n", "\r\n").encode())
    create(tmp_path / "plain")
    create(tmp_path / "odd", odd)
    one, two = (open_shards(str(tmp_path / name)).shards[0].input_ids for name in ("plain", "odd"))
    assert one.tolist() == two.tolist()


def test_one_document_works(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("A single sentence.")
    assert create(tmp_path / "out", text).totals["sequences"] == 1


def test_a_long_line_is_split_not_cut(tmp_path, tokenizer):
    text = tmp_path / "a.txt"
    text.write_text("one more word " * 1000)
    create(tmp_path / "out", text, short_seq_prob=0)
    shards = open_shards(str(tmp_path / "out"))
    rows = unmasked(shards, tokenizer)
    assert list(chain.from_iterable(rows)) == tokenizer.encode(text.read_text().strip()).tolist()
    assert set(map(len, rows[:-1])) == {510}


def test_several_files_in_order(tmp_path, tokenizer):
    for name, word in [("b.txt", "second"), ("a.txt", "first"), ("c.text", "third")]:
        (tmp_path / name).write_text(f"the {word} file\n")
    create(tmp_path / "out", f"{tmp_path}/*.txt,{tmp_path}/c.text")
    shards = open_shards(str(tmp_path / "out"))
    texts = [tokenizer.decode(row) for row in unmasked(shards, tokenizer)]
    assert texts == ["the first file", "the second file", "the third file"]


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.txt.gz"])
@pytest.mark.parametrize("after", [2, 4, 8])
def test_text_that_changes_between_the_two_readings_is_reported(
    tmp_path, capsys, monkeypatch, name, after
):
    def write(*words):
        rows = [f'{{"text": "{word}"}}\n' if "json" in name else f"{word}\n\n" for word in words]
        with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
            file.writelines(rows)

    def scan_and_change(*arguments):
        found = scan(*arguments)
        write(*["other"] * after)
        return found

    write(*["first"] * 4)
    monkeypatch.setattr(preparation, "scan", scan_and_change)
    said = complaint(capsys, tmp_path / "out", tmp_path / name, num_outputs=2)
    assert f"{name}: changed while it was read; start again with an empty --output_dir" in said
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()


def blocks_of(text, outputs):
    source = TextSource(str(text))
    return list(read_blocks([source], [scan(source)], outputs))


@pytest.mark.parametrize("outputs", [1, 2, 3, 7, 25])
def test_shards_are_balanced_and_none_is_empty(outputs):
    sizes, numbers = [0] * outputs, []
    for block in blocks_of(SAMPLE, outputs):
        sizes[block.shard] += block.bytes
        numbers += range(block.first_document, block.first_document + len(block.documents))
    assert numbers == list(range(25))
    assert min(sizes) > 0
    longest = max(block.bytes for block in blocks_of(SAMPLE, 25))
    assert max(sizes) <= scan(TextSource(str(SAMPLE))).bytes / outputs + longest


def test_blocks_are_small(small_blocks):
    sizes = [block.bytes for block in blocks_of(SAMPLE, 2)]
    longest = max(block.bytes for block in blocks_of(SAMPLE, 25))
    assert len(sizes) > 5
    assert max(sizes) < 2000 + longest


def test_a_huge_document_first_leaves_no_shard_empty(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("long " * 1000 + "\n\nb\n\nc\n\nd\n")
    blocks = blocks_of(text, 4)
    assert [(block.shard, len(block.documents)) for block in blocks] == [(i, 1) for i in range(4)]


def test_more_shards_than_documents_are_refused(tmp_path, capsys):
    line = complaint(capsys, tmp_path / "out", num_outputs=26)
    assert "--num_outputs 26: more than the 25 documents of the text; give 25 or fewer" in line
    assert not (tmp_path / "out").exists()


BAD_INPUTS = {
    "nothing matches": (None, {}, r"--input_file \S+a.txt: no such file"),
    "empty": (b"", {}, r"a.txt: holds no text"),
    "blank": (b"\n \n", {}, r"a.txt: holds no text"),
    "not UTF-8": (b"One.\nTw\xf6.\n", {}, r"a.txt, line 2: the byte 0xf6 at offset 7 is not UTF-8"),
    "no worker": (b"One.", {"num_workers": 0}, r"--num_workers 0: must be at least 1"),
    "no copy": (b"One.", {"dupe_factor": 0}, r"--dupe_factor 0: must be at least 1"),
    "no shard": (b"One.", {"num_outputs": 0}, r"--num_outputs 0: must be at least 1"),
    "binary": (
        b"%PDF-1.4 \0",
        {},
        r"a.txt: is a PDF file, not text; give UTF-8 text or JSON lines",
    ),
    "no tokenizer": (b"One.", {"sentencepiece": "x.model"}, r"x.model: cannot be read"),
    "odd format": (b"One.", {"format": "odd"}, r"argument --format: invalid choice: 'odd'"),
}


@pytest.mark.parametrize(("text", "values", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_invalid_input_is_named_and_leaves_nothing(tmp_path, capsys, text, values, message):
    if text is not None:
        (tmp_path / "a.txt").write_bytes(text)
    line = complaint(capsys, tmp_path / "out", tmp_path / "a.txt", **values)
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_too_large_is_named(tmp_path, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(preparation, "load_tokenizer", lambda settings: tokenizer)
    monkeypatch.setattr(preparation, "MaskingTable", lambda *arguments: None)
    monkeypatch.setattr(tokenizer, "vocab_size", 2**31 + 1)
    assert "a vocabulary of 2147483649 tokens: shards hold" in complaint(capsys, tmp_path / "out")


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    line = complaint(capsys, tmp_path / "file" / "out")
    assert f"--output_dir {tmp_path}/file/out: {tmp_path}/file is not a folder; name" in line


def program(output, text, **values):
    values = {"input_file": text, "output_dir": output, **values}
    return [sys.executable, str(ROOT / "create_pretraining_data.py"), *flags(**values)]


def test_no_space_left_on_the_disk(tmp_path):
    text = tmp_path / "a.txt"
    text.write_bytes(SAMPLE.read_bytes() * 20)
    values = {"num_outputs": 2, "num_workers": 1, "dupe_factor": 3}

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))

    command = program(tmp_path / "out", text, **values)
    run = subprocess.run(
        command, preexec_fn=small_disk, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "part-00000.npz: cannot be written (File too large); free some space" in run.stderr
    # No shard is finished; nothing but the plan is left, which binds nobody.
    assert list(content(tmp_path / "out")) == [UNFINISHED_FILE]
    create(tmp_path / "out", text, **{**values, "dupe_factor": 1})
    assert UNFINISHED_FILE not in content(tmp_path / "out")


def test_the_manifest_of_many_shards_takes_a_tenth_of_the_time(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(f"Sentence {number}." for number in range(40)))
    write, sizes = preparation.write_manifest, []

    def slow(folder, name, manifest):
        time.sleep(0.01)
        sizes.append(len(manifest.shards))
        write(folder, name, manifest)

    monkeypatch.setattr(preparation, "write_manifest", slow)
    manifest = create(tmp_path / "out", text, num_outputs=40, num_workers=1)
    assert len(manifest.shards) == 40
    assert len(sizes) < 20
    assert sizes[-2:] == [40, 40]  # of the unfinished folder, and the final one


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    entries = [ShardEntry(shard_name(number), "", *range(1, 7)) for number in (100_000, 7, 99_999)]
    plan = Manifest(TokenizerEntry("", 9, 0), {}, [], [])
    with preparation.unfinished_manifest(str(tmp_path), plan) as add:
        for entry in entries:
            add(entry)
    names = [entry.file for entry in read_manifest(str(tmp_path), UNFINISHED_FILE).shards]
    assert names == ["part-00007.npz", "part-99999.npz", "part-100000.npz"]


def test_a_run_over_the_manifest_of_lost_shards_is_resumed(tmp_path, monkeypatch):
    """That manifest knows none of the shards that an interrupted run has made."""
    out = tmp_path / "out"
    create(out, num_outputs=3)
    for shard in out.glob("*.npz"):
        shard.unlink()
    write = preparation.write_shard

    def interrupted(path, *arguments):
        if path.endswith("part-00002.npz"):
            raise UserError("interrupted")
        return write(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(preparation, "write_shard", interrupted)
        with pytest.raises(SystemExit):
            create(out, num_outputs=3, random_seed=7)
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    assert len(made) == 2
    with pytest.raises(UserError, match="was interrupted: run it again, it resumes"):
        open_shards(str(out))
    with pytest.raises(SystemExit):
        create(out, num_outputs=3)  # other settings than those of the two shards
    create(out, num_outputs=3, random_seed=7)
    assert {path: path.stat().st_mtime_ns for path in made} == made


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as handle:
        return [int(child) for child in handle.read().split()]


def is_running(pid):
    """Say whether a process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_is_resumed_and_ends_the_same(tmp_path, num_workers):
    text = tmp_path / "a.txt"
    text.write_bytes(SAMPLE.read_bytes() * 100)
    values = {"num_outputs": 30, "dupe_factor": 2}  # many, so that a busy machine kills in time
    command = program(tmp_path / "out", text, num_workers=num_workers, **values)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    unfinished = tmp_path / "out" / UNFINISHED_FILE
    wait_for(
        lambda: (
            process.poll() is not None
            or (unfinished.exists() and len(read_json(str(unfinished))["shards"]) >= 2)
        )
    )
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(map(is_running, workers)))
    finished = read_json(str(unfinished))["shards"]
    assert 2 <= len(finished) < 30
    before = {one["file"]: (tmp_path / "out" / one["file"]).stat().st_mtime_ns for one in finished}
    with pytest.raises(UserError, match="was interrupted: run it again, it resumes"):
        open_shards(str(tmp_path / "out"))

    create(tmp_path / "out", text, **values)
    create(tmp_path / "uninterrupted", text, **values)
    assert content(tmp_path / "out") == content(tmp_path / "uninterrupted")
    for name, changed in before.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == changed


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    create(tmp_path / "uninterrupted")
    left = [
        ".part-00000.npz.0123456789abcdef.tmp",
        "tokenizer/.tokenizer.model.00ff00ff00ff00ff.tmp",
    ]
    kept = ["notes.tmp", ".mine.tmp"]
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    for name in [*left, *kept]:
        (tmp_path / "out" / name).write_bytes(b"half")
    create(tmp_path / "out")
    assert content(tmp_path / "out") == {
        **content(tmp_path / "uninterrupted"), **dict.fromkeys(kept, b"half")
    }  # fmt: skip


def test_a_complete_folder_is_left_as_it_is(tmp_path, capsys):
    first = create(tmp_path / "out", num_outputs=2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npz")}
    capsys.readouterr()
    assert create(tmp_path / "out", num_outputs=2) == first
    assert f"{tmp_path}/out: is complete, nothing to do" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npz")}
    assert before == after


@pytest.mark.parametrize(("output", "texts"), [("shards", ""), ("shards", "**/*"), (".", "")])
def test_shards_below_the_folder_of_the_text_are_no_text(tmp_path, capsys, output, texts):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_bytes(SAMPLE.read_bytes())
    first = create(text / output, text / texts, max_seq_length=64)
    (tmp_path / "link").symlink_to(text)
    assert create(tmp_path / "link" / output, text / texts, max_seq_length=64) == first
    assert "is complete, nothing to do" in capsys.readouterr().out
    (text / output / MANIFEST_FILE).rename(text / output / UNFINISHED_FILE)
    assert create(text / output, text / texts, max_seq_length=64) == first
    (text / "a.txt").unlink()
    said = complaint(capsys, text / output, text / texts)
    assert said.endswith(": names no text, only the shards of --output_dir\n")


@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 100)])
def test_missing_and_damaged_shards_are_rebuilt(tmp_path, damage):
    create(tmp_path / "out", num_outputs=3)
    before = content(tmp_path / "out")
    damage(tmp_path / "out" / "part-00001.npz")
    create(tmp_path / "out", num_outputs=3)
    assert content(tmp_path / "out") == before


def test_the_tokenizer_of_removed_shards_is_replaced(tmp_path):
    output = tmp_path / "out"
    for kind in ({}, {"vocab_file": write_vocabulary(tmp_path)}, {}):
        for path in output.glob("*.*"):
            path.unlink()
        manifest = create(output, **kind)
        saved = load_tokenizer_folder(str(output / "tokenizer"))
        assert saved.fingerprint == manifest.tokenizer_fingerprint
    names = {"tokenizer.json.old", "tokenizer.model", "tokenizer.model.old"}
    assert {path.name for path in (output / "tokenizer").iterdir()} == names, "nothing is lost"


def test_the_tokenizer_of_a_model_is_not_replaced(tmp_path, capsys):
    output = tmp_path / "out"
    create(output)
    for path in output.glob("*.*"):
        path.unlink()
    (output / "best.params").touch()
    before = content(output / "tokenizer")
    line = complaint(capsys, output, vocab_file=write_vocabulary(tmp_path))
    assert f"--output_dir {output}: has best.params with its tokenizer/, which another voc" in line
    assert content(output / "tokenizer") == before
    assert create(output).shards, "its own tokenizer may stay"


def test_other_arguments_are_refused(tmp_path, capsys):
    create(tmp_path / "out")
    before = content(tmp_path / "out")
    line = complaint(capsys, tmp_path / "out", dupe_factor=2, max_seq_length=128)
    assert (
        "holds shards with other settings: --dupe_factor was 1, now 2; --max_seq_length was 512"
        in line
    )
    assert "Give another folder, or empty this one" in line
    assert content(tmp_path / "out") == before


def test_other_text_is_refused_but_another_name_is_not(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_bytes(SAMPLE.read_bytes())
    create(tmp_path / "out", text)
    renamed = text.rename(tmp_path / "b.txt")
    create(tmp_path / "out", renamed)
    renamed.write_bytes(SAMPLE.read_bytes() + b"More.\n")
    line = complaint(capsys, tmp_path / "out", renamed)
    assert f"other settings: with another text: {renamed}. Give" in line


def test_another_tokenizer_is_refused(tmp_path, capsys):
    create(tmp_path / "out")
    manifest = read_json(str(tmp_path / "out" / MANIFEST_FILE))
    manifest["tokenizer"]["fingerprint"] = "another"
    write_json(str(tmp_path / "out" / MANIFEST_FILE), manifest)
    assert "the tokenizer differs" in complaint(capsys, tmp_path / "out")


def test_shards_of_unknown_origin_are_refused(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-00003.npz").touch()
    line = complaint(capsys, tmp_path / "out")
    assert f"--output_dir {tmp_path}/out: holds shards without a manifest; empty it" in line


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").touch()
    with lock_folder(str(tmp_path / "out")):
        line = complaint(capsys, tmp_path / "out")
    assert f"--output_dir {tmp_path}/out: process {os.getpid()} on " in line
    assert "is writing there" in line
    create(tmp_path / "out")
    assert ".lock" not in content(tmp_path / "out")


def instance_maker(dupe_factor=1):
    return InstanceMaker(
        InstanceSettings(
            TokenizerSettings(), SequenceSettings(), MaskingSettings(), dupe_factor, random_seed=0
        )
    )


def test_unknown_tokens_are_counted_in_every_copy(monkeypatch):
    maker = instance_maker(dupe_factor=3)
    comma = int(maker.tokenizer.encode("a, b")[-2])
    monkeypatch.setattr(maker.tokenizer, "unk_id", comma)
    assert maker(Block(0, 0, [b"One, two.\nThree, four, five."])).unknown == 3 * 3


def test_a_killed_worker_ends_the_run():
    blocks = (Block(0, number, [b"Text."]) for number in range(100_000))

    def run():
        with workers(instance_maker(), 2) as make:
            instances = make(blocks)
            next(instances)
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            list(instances)

    with pytest.raises(UserError, match=r"a worker process was killed.*--num_workers below 2"):
        run()


def test_without_shared_memory_one_process_makes_the_shards(monkeypatch, capsys):
    def unusable(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", unusable)
    with workers(instance_maker(), 2) as make:
        (instances,) = make([Block(0, 0, [b"One, two."])])
    assert instances.documents == 1
    assert capsys.readouterr().err.startswith("warning: one process instead of 2 (PermissionError")


def test_the_closing_table(tmp_path, capsys):
    create(tmp_path / "out", verbose=True)
    output = capsys.readouterr().out
    totals = read_manifest(str(tmp_path / "out")).totals
    for name, count in totals.items():
        assert re.search(rf"^{name} +{count:,}\b", output, re.MULTILINE)
    share = 100 * totals["masked"] / totals["tokens"]
    assert f"{share:.2f} % of the tokens" in output
    assert re.search(r"^time +\d+\.\d   s, \d+\.\d MB/s$", output, re.MULTILINE)
    assert re.search(r"^part-00000.npz: \d+ sequences of \d+ tokens$", output, re.MULTILINE)


def test_inspection_shows_words_and_statistics(tmp_path, capsys):
    from scripts import inspect_shards

    create(tmp_path / "out", num_outputs=2, dupe_factor=20)
    capsys.readouterr()
    statistics = inspect_shards.main([str(tmp_path / "out"), "--num", "2"])
    output = capsys.readouterr().out
    shards = open_shards(str(tmp_path / "out"))
    assert statistics.masked == shards.manifest.totals["masked"]
    assert statistics.text_tokens == shards.lengths.sum() - 2 * shards.num_sequences
    assert statistics.masked_special == 0
    assert statistics.became_mask / statistics.masked == pytest.approx(0.8, abs=0.01)
    assert statistics.became_other / statistics.masked == pytest.approx(0.1, abs=0.01)
    assert re.search(r"^--dupe_factor +20$", output, re.MULTILINE)
    words = re.search(r"^sequence 0, \d+ tokens\n(.*)$", output, re.MULTILINE).group(1)
    assert re.search(r"\[\w+: <mask>\]", words)
    truth = re.sub(r"\[([^:\]]*): [^\]]*\]", r"\1", words)
    assert "Lighthouses were once kept by families who lived for months" in truth
    assert inspect_shards.main([str(tmp_path / "out"), "--num", "0"]) == statistics


def test_inspection_shows_a_sequence_once(tmp_path, capsys):
    from scripts import inspect_shards

    text = tmp_path / "a.txt"
    text.write_text("One.\n\nTwo.\n")
    create(tmp_path / "out", text)
    capsys.readouterr()
    inspect_shards.main([str(tmp_path / "out"), "--num", "5"])
    shown = [line for line in capsys.readouterr().out.split("\n") if line.startswith("sequence ")]
    assert [line.split(",")[0] for line in shown] == ["sequence 0", "sequence 1"]


def test_inspection_requires_the_vocabulary_of_the_shards(tmp_path, capsys):
    from scripts import inspect_shards

    create(tmp_path / "out")
    manifest = read_json(str(tmp_path / "out" / MANIFEST_FILE))
    manifest["tokenizer"]["fingerprint"] = "another"
    write_json(str(tmp_path / "out" / MANIFEST_FILE), manifest)
    with pytest.raises(SystemExit):
        inspect_shards.main([str(tmp_path / "out")])
    assert "its shards were made with another vocabulary" in capsys.readouterr().err


@pytest.fixture
def real_vocabulary(shared, monkeypatch):
    monkeypatch.setenv("MXNET_HOME", str(shared / "mxnet_home"))
    return {"dataset_name": RELEASED_DATASET}


def test_real_text_with_the_real_vocabulary(tmp_path, shared, real_vocabulary):
    text = shared / "corpus" / "enwiki_gensim_sample.txt"
    manifest = create(tmp_path / "out", text, whole_word_mask=True, **real_vocabulary)
    assert manifest.totals["unknown"] == 0
    tokenizer = load_tokenizer(TokenizerSettings(**real_vocabulary))
    shards = open_shards(str(tmp_path / "out"))
    found = list(chain.from_iterable(unmasked(shards, tokenizer)))
    assert found == ids_of(text.read_text(encoding="utf-8"), tokenizer)
    share = manifest.totals["masked"] / len(found)
    assert 0.148 < share < 0.152


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(shared, real_vocabulary):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "benchmark.py"),
        "memory",
        *flags(input_file=shared / "corpus" / "*.txt", megabytes="5,50,500"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    print(run.stdout)
    peaks = [float(line.split()[-2]) for line in run.stdout.splitlines()]
    assert len(peaks) == 3
    assert max(peaks) < 400
    assert peaks[2] < 1.1 * peaks[1]
