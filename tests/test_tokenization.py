"""Encoders against GluonNLP's own, against published values, and on awkward text."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bort import tokenization
from bort.config import parse
from bort.errors import UserError
from bort.tokenization import (
    RELEASED_DATASET,
    SAMPLE_MODEL,
    SPECIAL_TOKENS,
    ByteLevelBPE,
    SentencePiece,
    TokenizerSettings,
    load_tokenizer,
    load_tokenizer_folder,
)
from scripts import train_sentencepiece
from tests.conftest import ROOT
from tests.fuzz.samples import write_bpe
from tests.wordpieces import write_vocabulary

SAMPLE_TEXT = ROOT / "test_data" / "sample_text.txt"
AWKWARD = [
    "",
    " ",
    "\n",
    " a  b\t\tc ",
    "it's we'll I'M 'twas ''",
    "\x00a\x00\x00 \x00",
    "<s></s><pad><unk><mask> <mask>",
    "α, ж, ש, 中, か, 한 — 🙂 👩‍🔬 ½ é",
    "\ufeffa\u00a0b\u2028c\u3000d\u200be",
    "x1" * 500,
]


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text("utf-8").split("\n") if line]


def train_bpe(lines: list[str], merges: int) -> list[str]:
    """Return merges ("a b") learned in the slow, direct way (Sennrich et al. 2016, algorithm 1)."""
    spelling = tokenization.BYTE_TO_CHARACTER
    counts = Counter(re.findall(r" ?\S+", "\n".join(lines)))
    words = {tuple(spelling[b] for b in word.encode()): n for word, n in counts.items()}
    learned = []
    for _ in range(merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        learned.append(f"{left} {right}")
        words = {merged(word, left, right): n for word, n in words.items()}
    return learned


def merged(word: tuple[str, ...], left: str, right: str) -> tuple[str, ...]:
    if left not in word:
        return word
    out: list[str] = []
    for token in word:
        if out and (out[-1], token) == (left, right):
            out[-1] += token
        else:
            out.append(token)
    return tuple(out)


@pytest.fixture(scope="session")
def merges() -> list[str]:
    return train_bpe(lines_of(SAMPLE_TEXT)[:150], merges=200)


@pytest.fixture(scope="session")
def spelling(merges) -> list[str]:
    """Return a vocabulary laid out as RoBERTa's: specials, tokens by no rule, the mask last."""
    tokens = [*tokenization.BYTE_TO_CHARACTER.values(), *(one.replace(" ", "") for one in merges)]
    random.Random(0).shuffle(tokens)
    return ["<s>", "<pad>", "</s>", "<unk>", *tokens, "<|endoftext|>", "<mask>"]


@pytest.fixture(scope="session")
def bpe(spelling, merges) -> ByteLevelBPE:
    return ByteLevelBPE(spelling, merges)


@pytest.fixture(scope="session")
def sample() -> SentencePiece:
    return load_tokenizer(TokenizerSettings())


@pytest.fixture(params=["bpe", "sample"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def files(tmp_path_factory, spelling, merges) -> dict[str, Path]:
    """Write the vocabulary and merges in GluonNLP's layout and in Hugging Face's."""
    nlp = pytest.importorskip("gluonnlp")
    folder = tmp_path_factory.mktemp("vocabulary")
    ids = {token: index for index, token in enumerate(spelling)}
    vocabulary = nlp.Vocab(
        dict.fromkeys(spelling, 1),
        token_to_idx=ids,
        unknown_token="<unk>",
        padding_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
    )
    paths = {
        name: folder / name for name in ("gluon.vocab", "gluon.ranks", "vocab.json", "merges.txt")
    }
    paths["gluon.vocab"].write_text(vocabulary.to_json(), "utf-8")
    paths["vocab.json"].write_text(json.dumps(ids), "utf-8")
    content = "\n".join(["#version: 0.2", *merges, ""])
    paths["gluon.ranks"].write_text(content, "utf-8")
    paths["merges.txt"].write_text(content, "utf-8")
    return paths


@pytest.fixture
def gluon(files, monkeypatch):
    """Return GluonNLP's tokenizer and vocabulary over the same files, as one function to ids."""
    nlp = pytest.importorskip("gluonnlp")
    ranks = files["gluon.ranks"]
    digest = hashlib.sha1(ranks.read_bytes()).hexdigest()
    monkeypatch.setattr(nlp.data.GPT2BPETokenizer, "bpe_ranks_file_hash", (ranks.name, digest))
    split = nlp.data.GPT2BPETokenizer(root=str(ranks.parent))
    vocabulary = nlp.Vocab.from_json(files["gluon.vocab"].read_text("utf-8"))
    return lambda text: vocabulary[split(text)]


def random_text(generator: random.Random) -> str:
    """Return up to 60 characters: of all Unicode, of one script, of blanks and contractions.

    Only characters that this Python's tables assign: of others, libraries may think differently.
    """
    kind, size = generator.randrange(4), generator.randrange(1, 60)
    block = generator.choice([0x80, 0x370, 0x400, 0x590, 0x900, 0x3040, 0x4E00, 0xAC00, 0x1F300])
    points = [
        generator.randrange(0x110000)
        if kind == 0
        else generator.randrange(0x300)
        if kind == 1
        else block + generator.randrange(256)
        if kind == 2
        else ord(generator.choice(" \t\n\r\x1c\x85\xa0\u2028\u3000\u200b'abstvlmdre1.,!"))
        for _ in range(size)
    ]
    text = "".join(chr(p) if generator.random() < 0.9 else " " for p in points)
    return "".join(c for c in text if unicodedata.category(c) not in ("Cn", "Cs"))


# ---- what both kinds promise


def test_special_ids_are_distinct_sorted_and_spelt_as_expected(tokenizer):
    roles = {role: getattr(tokenizer, f"{role}_id") for role in SPECIAL_TOKENS}
    assert tokenizer.tokens(roles.values()) == list(SPECIAL_TOKENS.values())
    assert tokenizer.special_ids.tolist() == sorted(roles.values())
    assert len(set(roles.values())) == 5
    assert [roles[role] for role in ("bos", "pad", "eos", "unk")] == [0, 1, 2, 3]


def test_word_starts_are_blanks_and_special_tokens(tokenizer):
    starts, spelling = tokenizer.word_starts, tokenizer.tokens(range(tokenizer.vocab_size))
    assert (starts.dtype, starts.shape) == (bool, (tokenizer.vocab_size,))
    expected = [t[0] in "Ġ▁" or t in SPECIAL_TOKENS.values() for t in spelling]
    assert starts.tolist() == expected
    assert 5 < starts.sum() < tokenizer.vocab_size


def test_each_word_of_running_text_has_one_start(tokenizer):
    text = "The keeper climbed the stairs at dusk and trimmed the wicks"
    ids = tokenizer.encode(f" {text}")
    assert tokenizer.word_starts[ids].sum() == len(text.split())


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_gives_plain_ids_only(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert not np.isin(ids, tokenizer.special_ids).any()
    assert np.array_equal(tokenizer.encode_batch([text, "b"])[0], ids)


def test_empty_input(tokenizer):
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_sentences([]) == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.tokens([]) == []


def test_sample_text_survives_the_round_trip(tokenizer):
    lines = lines_of(SAMPLE_TEXT)
    decoded = [tokenizer.decode(ids) for ids in tokenizer.encode_batch(lines)]
    if tokenizer.name == "sentencepiece":  # which composes characters and joins blanks
        lines = [re.sub(" +", " ", unicodedata.normalize("NFKC", line)) for line in lines]
    assert decoded == lines


def test_decode_leaves_special_tokens_out(tokenizer):
    inside = tokenizer.encode("a flame").tolist()
    ids = [tokenizer.bos_id, *inside, tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(np.array(ids)) == "a flame"


def test_only_spaces_begin_words_of_running_text(tokenizer, sample):
    """What follows a token has no mark of a beginning, as in running text."""
    for text in ("ing of the boat", ".", "", " and", " "):
        ids = tokenizer.encode_continued(text)
        if text.strip():
            assert tokenizer.word_starts[ids[0]] == text.startswith(" ")
            whole = np.concatenate([tokenizer.encode("boat"), ids])
            assert tokenizer.decode(whole) == f"boat{text}"
    assert sample.tokens(sample.encode_continued(".")) == ["."]
    assert sample.tokens(sample.encode(".")) == ["▁", "."]


def test_lone_surrogates_count_as_the_replacement_character(tokenizer):
    assert np.array_equal(tokenizer.encode("a\ud800b"), tokenizer.encode("a\ufffdb"))
    joined = tokenizer.encode_sentences(["a\ud83d", "b"])
    assert np.array_equal(joined[0], tokenizer.encode("a\ufffd"))
    assert np.array_equal(tokenizer.encode("\ud83d\ude00"), tokenizer.encode("😀"))


@pytest.mark.parametrize("unit", ["a", "中", ".", "x1", "'s", " a", "\x00"])
def test_time_of_a_long_line_is_not_quadratic(tokenizer, unit):
    tokenizer.encode(unit)
    start = time.perf_counter()
    ids = tokenizer.encode(unit * (1_000_000 // len(unit)))
    # Half a second here; the square of the length would take minutes.
    assert time.perf_counter() - start < 20
    assert len(ids) > 1000


# ---- byte-level BPE


def test_merges_by_hand():
    alphabet = list(tokenization.BYTE_TO_CHARACTER.values())
    made = ["ab", "Ġab", "abc"]
    spelling = ["<s>", "<pad>", "</s>", "<unk>", *made, *alphabet, "<mask>"]
    encoder = ByteLevelBPE(spelling, ["a b", "Ġ ab", "ab c"])
    # "Ġ ab" comes before "ab c", so a word after a blank never becomes Ġ + abc.
    texts = {"ab": ["ab"], " abc": ["Ġab", "c"], "xabc ab": ["x", "abc", "Ġab"], "é": ["Ã", "©"]}
    for text, tokens in texts.items():
        assert encoder.tokens(encoder.encode(text)) == tokens
        assert encoder.encode(text).tolist() == [spelling.index(token) for token in tokens]


def test_words_are_letters_digits_or_others_after_one_space():
    alphabet = list(tokenization.BYTE_TO_CHARACTER.values())
    within = ["Ġ a", "Ġ 1", "Ġ !"]
    across = ["a 1", "1 !", "! a", "Ġ Ġa"]  # of two words, so never merged
    merges = [*across[:3], *within, across[3]]
    made = [merge.replace(" ", "") for merge in merges]
    encoder = ByteLevelBPE([*SPECIAL_TOKENS.values(), *made, *alphabet], merges)
    assert encoder.tokens(encoder.encode("a1!a 1 ! a  a")) == [
        *["a", "1", "!", "a"],
        *["Ġ1", "Ġ!", "Ġa"],
        *["Ġ", "Ġa"],
    ]


@pytest.mark.parametrize("ending", ["s", "t", "re", "ve", "m", "ll", "d"])
def test_contractions_are_words(ending):
    alphabet = list(tokenization.BYTE_TO_CHARACTER.values())
    merges = [f"{ending[:-1]} {ending[-1]}"] if len(ending) > 1 else []
    merges.append(f"' {ending}")
    made = [merge.replace(" ", "") for merge in merges]
    encoder = ByteLevelBPE([*SPECIAL_TOKENS.values(), *made, *alphabet], merges)
    assert encoder.tokens(encoder.encode(f"x'{ending}y")) == ["x", f"'{ending}", "y"]
    assert f"'{ending}" not in encoder.tokens(encoder.encode(f" '{ending}"))
    assert f"'{ending}" not in encoder.tokens(encoder.encode(f"x'{ending.upper()}"))


def test_same_ids_as_gluonnlp(bpe, gluon):
    for text in [*AWKWARD, *lines_of(SAMPLE_TEXT)]:
        assert bpe.encode(text).tolist() == gluon(text), text


def test_same_ids_as_gluonnlp_on_random_unicode(bpe, gluon):
    generator = random.Random(1)
    for _ in range(2000):
        text = random_text(generator)
        assert bpe.encode(text).tolist() == gluon(text), ascii(text)


def test_any_text_survives_the_round_trip(bpe):
    generator = random.Random(2)
    for text in [*AWKWARD, *(random_text(generator) for _ in range(2000))]:
        assert bpe.decode(bpe.encode(text)) == text


def test_sentences_are_encoded_as_in_running_text(bpe):
    sentences = lines_of(SAMPLE_TEXT)
    encoded = bpe.encode_sentences(sentences)
    alone = [bpe.encode(f" {one}" if place else one) for place, one in enumerate(sentences)]
    assert len(encoded) == len(alone)
    assert all(np.array_equal(a, b) for a, b in zip(encoded, alone))


@pytest.mark.parametrize(
    "sentences",
    [["", ""], ["", "a"], ["a", "", "b"], ["a ", " b"], ["a  ", "  b  "], ["é\n", "\x00", "中 "]],
)
def test_sentences_with_blanks_at_their_ends_still_join(bpe, sentences):
    encoded = bpe.encode_sentences(sentences)
    assert len(encoded) == len(sentences)
    assert np.array_equal(np.concatenate(encoded), bpe.encode(" ".join(sentences)))


def test_a_token_of_several_blanks_goes_to_the_later_sentence():
    alphabet = list(tokenization.BYTE_TO_CHARACTER.values())
    encoder = ByteLevelBPE([*SPECIAL_TOKENS.values(), "ĠĠ", *alphabet], ["Ġ Ġ"])
    encoded = encoder.encode_sentences(["a ", " b"])
    assert [encoder.tokens(ids) for ids in encoded] == [["a"], ["ĠĠ", "Ġ", "b"]]


@pytest.mark.parametrize("blanks", [65_535, 65_536, 65_537, 131_072, 1_200_000])
def test_a_run_of_blanks_without_end_changes_nothing_around_it(bpe, blanks):
    text = f"ice{' ' * blanks}the  ice"
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    head, tail = bpe.encode("ice").tolist(), bpe.encode(" the  ice").tolist()
    assert ids[: len(head)].tolist() == head
    assert ids[-len(tail) :].tolist() == tail
    assert len(tail) < len(" the  ice")  # " the" is one token


def test_decoded_bytes_that_are_no_utf8(bpe):
    half = bpe.encode("é")[:1]
    assert bpe.decode(half) == "\ufffd"


# ---- fingerprints


def test_saved_in_hugging_faces_form_it_is_the_same(tmp_path, bpe):
    bpe.save(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"vocab.json", "merges.txt"}
    assert load_tokenizer_folder(str(tmp_path / "saved")).fingerprint == bpe.fingerprint
    vocabulary = json.loads((tmp_path / "saved" / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary["<mask>"] == bpe.mask_id
    assert load_tokenizer_folder(str(tmp_path)) is None


def test_fingerprint_knows_the_content_not_the_place(files, bpe, spelling, merges):
    layouts = [("gluon.vocab", "gluon.ranks"), ("vocab.json", "merges.txt")]
    for vocab_file, bpe_ranks in layouts:
        loaded = load_tokenizer(
            TokenizerSettings(vocab_file=str(files[vocab_file]), bpe_ranks=str(files[bpe_ranks]))
        )
        assert loaded.fingerprint == bpe.fingerprint
        assert loaded.encode("A flame.").tolist() == bpe.encode("A flame.").tolist()
    swapped = [*spelling[:4], spelling[5], spelling[4], *spelling[6:]]
    others = [ByteLevelBPE(swapped, merges), ByteLevelBPE(spelling, merges[:-1])]
    assert len({bpe.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert re.fullmatch("[0-9a-f]{64}", bpe.fingerprint)


def test_fingerprint_of_a_sentencepiece_model(sample, tmp_path):
    copy = tmp_path / "copy.model"
    copy.write_bytes(Path(SAMPLE_MODEL).read_bytes())
    assert load_tokenizer(TokenizerSettings(sentencepiece=str(copy))).fingerprint == (
        sample.fingerprint
    )
    other = train(tmp_path / "other.model", vocab_size=900)
    assert other.fingerprint != sample.fingerprint


# ---- the embedded sample and the training script


def train(model_file: Path, **flags) -> SentencePiece:
    values = {"input_file": SAMPLE_TEXT, "model_file": model_file, "vocab_size": 1000, **flags}
    train_sentencepiece.main([str(word) for k, v in values.items() for word in (f"--{k}", v)])
    return load_tokenizer(TokenizerSettings(sentencepiece=str(model_file)))


def test_sample_text_has_25_documents_of_300_sentences_and_a_line_of_many_scripts():
    documents = SAMPLE_TEXT.read_text("utf-8").strip().split("\n\n")
    sentences = lines_of(SAMPLE_TEXT)
    assert (len(documents), len(sentences), len(set(sentences))) == (25, 300, 300)
    foreign = [line for line in sentences if sum(ord(c) > 0x2FF for c in line) > 20]
    assert len(foreign) == 1
    scripts = {unicodedata.name(c, "").split()[0] for c in foreign[0] if c.isalpha()}
    assert scripts >= {"GREEK", "CYRILLIC", "ARABIC", "HEBREW", "DEVANAGARI", "CJK", "HIRAGANA"}


def test_sample_model_knows_its_text_without_unknown_tokens(sample):
    assert (sample.vocab_size, sample.mask_id) == (1000, 4)
    ids = np.concatenate(sample.encode_batch(lines_of(SAMPLE_TEXT)))
    characters = sum(map(len, lines_of(SAMPLE_TEXT)))
    assert sample.unk_id not in ids
    assert characters / len(ids) > 2.5


def test_sample_model_is_what_the_readme_says_makes_it(tmp_path, sample):
    readme = (ROOT / "test_data" / "README.md").read_text("utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"python scripts/train_sentencepiece.py (.*)", readme)
    flags = dict(re.findall(r"--(\w+) (\S+)", command))
    flags.update(input_file=str(SAMPLE_TEXT), model_file=str(tmp_path / "again.model"))
    again = train(**flags)
    assert again.tokens(range(1000)) == sample.tokens(range(1000))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_trained_models_have_the_special_ids_and_no_unknown_text(tmp_path, model_type):
    trained = train(tmp_path / "new.model", vocab_size=600, model_type=model_type)
    assert trained.vocab_size == 600
    assert trained.special_ids.tolist() == [0, 1, 2, 3, 4]
    assert trained.mask_id == 4
    unseen = "Жук 鰻 <mask> Qq~^"
    assert trained.decode(trained.encode(unseen)) == unseen


def test_drawn_sentences_depend_on_the_seed_alone(tmp_path):
    tokens = []
    for place, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{place}.model"
        trained = train(path, vocab_size=500, input_sentence_size=60, random_seed=seed)
        tokens.append(trained.tokens(range(500)))
    assert tokens[0] == tokens[1] != tokens[2]


def test_every_sentence_has_the_same_chance_to_be_drawn():
    counts = Counter[str]()
    for seed in range(4000):
        drawn = train_sentencepiece.sample(iter("abcdefgh"), 2, random.Random(seed))
        assert len(set(drawn)) == 2
        counts.update(drawn)
    assert all(abs(counts[one] - 1000) < 5 * 27 for one in "abcdefgh")
    assert train_sentencepiece.sample(iter("ab"), 5, random.Random(0)) == ["a", "b"]


def test_long_lines_are_used_for_training(tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("zyxwv " * 5000 + "\nthe cat\n", "utf-8")
    trained = train(tmp_path / "long.model", input_file=text, vocab_size=280)
    assert "▁zyxwv" in trained.tokens(range(280))


def test_nothing_but_the_model_goes_to_standard_output_that_takes_it(tmp_path, capfdbinary):
    flags = ["--input_file", str(SAMPLE_TEXT), "--vocab_size", "1000"]
    train_sentencepiece.main([*flags, "--model_file", "/dev/stdout"])
    path = tmp_path / "new.model"
    path.write_bytes(capfdbinary.readouterr().out)
    assert load_tokenizer(TokenizerSettings(sentencepiece=str(path))).vocab_size == 1000


@pytest.mark.parametrize("name", ["text.txt", "link"])
def test_the_text_is_not_overwritten_by_the_model(tmp_path, capsys, name):
    text = tmp_path / "text.txt"
    text.write_bytes(SAMPLE_TEXT.read_bytes())
    (tmp_path / "link").symlink_to(text)
    with pytest.raises(SystemExit):
        train(tmp_path / name, input_file=f"{SAMPLE_TEXT},{text}")
    assert capsys.readouterr().err.startswith(
        f"error: --model_file {tmp_path / name}: would overwrite what it is made from"
    )
    assert text.read_bytes() == SAMPLE_TEXT.read_bytes()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"vocab_size": 50_000}, "--vocab_size 50000: the text gives no more than "),
        ({"vocab_size": 10}, "--vocab_size 10: the text needs at least "),
        ({"vocab_size": 0}, "--vocab_size 0: must be at least 1"),
        ({"vocab_size": 2**31}, "--vocab_size 2147483648: must be at most 2147483647"),
        ({"character_coverage": 0.5}, "--character_coverage 0.5: must be at least 0.98"),
        ({"input_file": "/missing/*.txt"}, "--input_file /missing/*.txt: no such file"),
        ({"model_file": "/missing/a.model"}, "/missing/a.model: there is no folder /missing"),
        ({"model_file": "/missing/a.model", "input_file": "/missing"}, "/missing/a.model: there"),
    ],
)
def test_training_names_what_is_wrong(tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as stopped:
        train(**{"model_file": tmp_path / "a.model", **flags})
    assert stopped.value.code == 1
    (line,) = [one for one in capsys.readouterr().err.split("\n") if one.startswith("error")]
    assert line.startswith(f"error: {says}")
    assert list(tmp_path.iterdir()) == []


def test_training_text_must_be_utf8(tmp_path, capsys):
    text = tmp_path / "latin1.txt"
    text.write_bytes("one\ncafé\n".encode("latin1"))
    with pytest.raises(SystemExit):
        train(tmp_path / "a.model", input_file=text)
    assert f"error: {text}, line 2" in capsys.readouterr().err


# ---- what is refused


def refused(**settings) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(TokenizerSettings(**settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"vocab_file": "a"}, "--vocab_file a: needs --bpe_ranks"),
        ({"bpe_ranks": "b"}, "--bpe_ranks b: needs --vocab_file"),
        (
            {"sentencepiece": "s", "vocab_file": "a", "bpe_ranks": "b"},
            "--vocab_file and --sentencepiece name different vocabularies",
        ),
        (
            {"sentencepiece": "s", "dataset_name": RELEASED_DATASET},
            "--dataset_name and --sentencepiece name different vocabularies",
        ),
        (
            {"dataset_name": "wiki"},
            f"--dataset_name wiki: the only known name is {RELEASED_DATASET}",
        ),
        ({"sentencepiece": "/missing/s"}, "/missing/s: cannot be read (No such file"),
        ({"vocab_file": "/missing/v", "bpe_ranks": "b"}, "/missing/v: cannot be read (No such"),
    ],
)
def test_flags_that_do_not_fit(settings, says):
    assert refused(**settings).startswith(says)


def test_flags_are_checked_when_parsed(capsys):
    with pytest.raises(UserError, match="needs --bpe_ranks"):
        parse("", ["--vocab_file", "a"], TokenizerSettings)
    (settings,) = parse("", ["--sentencepiece", "m"], TokenizerSettings)
    assert settings == TokenizerSettings(sentencepiece="m")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "is neither a GluonNLP vocabulary nor a Hugging Face vocab.json"),
        ('{"a": 0, "b": 2}', "the ids of its tokens are not 0, 1, 2, ... without gaps"),
        ('{"a": "0"}', "is neither"),
        ('{"a": 0, "b": true}', "is neither"),
        ('{"a": 0, "b": "1"}', "is neither"),
        ('{"token_to_idx": ["a"]}', "is neither"),
        ('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}', "it lacks <mask>; give both"),
        ('{"[CLS]": 0}', "it lacks <s>, <pad>, </s>, <unk>, <mask>; give both"),
        (
            '{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "!": 5}',
            "455 of the 456 tokens that the merges make are not in it, the first is '\"'",
        ),
    ],
)
def test_invalid_vocabularies_are_refused(files, tmp_path, content, says):
    path = tmp_path / "v.json"
    path.write_text(content, "utf-8")
    message = refused(vocab_file=str(path), bpe_ranks=str(files["merges.txt"]))
    assert message.startswith(str(path))
    assert says in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"#version: 0.2\na b\nabc d\n", "merge 2, 'abc d', does not make a new token"),
        (b"a b\na b\n", "merge 2, 'a b', does not make a new token"),
        (b"a " + b"b" * 9999 + b"\n", "b... (10003 characters), does not make a new token"),
        (b"a b\na\xff\n", "is not UTF-8 (byte 5)"),
        (b"PK\x03\x04\n", "merge 1"),
    ],
)
def test_invalid_merges_are_refused(files, tmp_path, content, says):
    path = tmp_path / "m.txt"
    path.write_bytes(content)
    message = refused(vocab_file=str(files["vocab.json"]), bpe_ranks=str(path))
    assert str(path) in message
    assert says in message
    path.unlink()
    message = refused(vocab_file=str(files["vocab.json"]), bpe_ranks=str(path))
    assert message == f"{path}: cannot be read (No such file or directory)"


def test_merges_may_lack_the_first_line_and_the_last_newline(files, tmp_path, bpe, merges):
    path = tmp_path / "m.txt"
    settings = TokenizerSettings(vocab_file=str(files["vocab.json"]), bpe_ranks=str(path))
    for mark in ("", "\ufeff", "\ufeff#version: 0.2\r\n"):
        path.write_bytes((mark + "\r\n".join(merges)).encode())
        assert load_tokenizer(settings).fingerprint == bpe.fingerprint


@pytest.mark.parametrize("content", [b"", b"text", Path(SAMPLE_MODEL).read_bytes()[:5000]])
def test_invalid_sentencepiece_files_are_refused(tmp_path, content):
    path = tmp_path / "s.model"
    path.write_bytes(content)
    assert refused(sentencepiece=str(path)) == f"{path}: is not a SentencePiece model"
    assert refused(sentencepiece=str(tmp_path)) == f"{tmp_path}: cannot be read (Is a directory)"


@pytest.mark.parametrize(
    ("specials", "says"),
    [
        ({}, "it lacks <pad>, <mask>; train one with scripts/train_sentencepiece.py"),
        ({"pad_id": 3}, "it lacks <mask>; train one"),
        (
            {"pad_id": 3, "user_defined_symbols": ["<mask>"]},
            "its <mask> can be encoded from text: not control symbols; train one",
        ),
    ],
)
def test_sentencepiece_models_that_lack_a_special_token(tmp_path, specials, says):
    import sentencepiece

    with open(tmp_path / "s.model", "wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines_of(SAMPLE_TEXT)),
            model_writer=handle,
            vocab_size=400,
            minloglevel=2,
            **specials,
        )
    assert refused(sentencepiece=str(tmp_path / "s.model")).startswith(
        f"{tmp_path / 's.model'}: {says}"
    )


# ---- RoBERTa's vocabulary by name: MXNet's cache and the download


@pytest.fixture
def released(files, monkeypatch, tmp_path) -> dict[str, bytes]:
    """Let the small vocabulary stand for RoBERTa's; MXNET_HOME is an empty folder."""
    contents = {}
    for source, stem in (("gluon.vocab", RELEASED_DATASET), ("gluon.ranks", "ranks")):
        content = files[source].read_bytes()
        suffix = "vocab" if "vocab" in source else "json"
        contents[f"{stem}-{hashlib.sha1(content).hexdigest()[:8]}.{suffix}"] = content
    monkeypatch.setattr(tokenization, "_RELEASED_FILES", tuple(contents))
    monkeypatch.setenv("MXNET_HOME", str(tmp_path / "home"))
    return contents


@pytest.fixture
def gluon_fetches(monkeypatch):
    """Let GluonNLP's two functions write what they are told to, and count them."""
    import gluonnlp.data.utils

    def install(contents: dict[str, bytes]) -> list[str]:
        calls = []

        def fetch(name: str, root: str) -> None:
            print("Downloading", name)
            calls.append(name)
            if name not in contents:
                raise ConnectionError("HTTPSConnectionPool(host='x'): Max retries exceeded")
            Path(root, name).write_bytes(contents[name])

        vocab, ranks = tokenization._RELEASED_FILES
        monkeypatch.setattr(
            gluonnlp.data.utils, "_load_pretrained_vocab", lambda name, root: fetch(vocab, root)
        )
        monkeypatch.setattr(gluonnlp.data, "GPT2BPETokenizer", lambda root: fetch(ranks, root))
        return calls

    return install


BY_NAME = TokenizerSettings(dataset_name=RELEASED_DATASET)


def test_cached_files_are_used_without_mxnet(released, tmp_path, bpe, monkeypatch):
    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    for name, content in released.items():
        (models / name).write_bytes(content)
    for module in ("mxnet", "gluonnlp", "gluonnlp.data", "gluonnlp.data.utils"):
        monkeypatch.setitem(sys.modules, module, None)  # importing one fails
    assert load_tokenizer(BY_NAME).fingerprint == bpe.fingerprint


def test_missing_or_damaged_files_are_downloaded(released, tmp_path, bpe, gluon_fetches, capsys):
    calls = gluon_fetches(released)
    models = tmp_path / "home" / "models"
    assert load_tokenizer(BY_NAME).fingerprint == bpe.fingerprint
    assert sorted(os.listdir(models)) == sorted(released)
    assert calls == list(released)
    load_tokenizer(BY_NAME)
    assert len(calls) == 2
    (models / next(iter(released))).write_bytes(b"{}")
    assert load_tokenizer(BY_NAME).fingerprint == bpe.fingerprint
    assert len(calls) == 4
    assert capsys.readouterr().out == ""  # what is printed there is a program's result


@pytest.mark.parametrize("at_hand", [0, 1])
def test_a_failed_download_leaves_nothing(released, tmp_path, gluon_fetches, at_hand):
    gluon_fetches(dict(list(released.items())[:at_hand]))
    message = refused(dataset_name=RELEASED_DATASET)
    assert "could not be downloaded (ConnectionError: HTTPSConnectionPool" in message
    assert message.endswith("or give --vocab_file and --bpe_ranks")
    assert list((tmp_path / "home" / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written(released, tmp_path, gluon_fetches):
    gluon_fetches(released)
    (tmp_path / "home").write_text("a file")
    assert "could not be downloaded (" in refused(dataset_name=RELEASED_DATASET)


# ---- the real vocabulary


@pytest.fixture(scope="session")
def roberta(shared) -> ByteLevelBPE:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MXNET_HOME", str(shared / "mxnet_home"))
        return load_tokenizer(BY_NAME)


@pytest.fixture(scope="session")
def roberta_gluon(shared):
    nlp = pytest.importorskip("gluonnlp")
    models = str(shared / "mxnet_home" / "models")
    split = nlp.data.GPT2BPETokenizer(root=models)
    vocabulary = nlp.data.utils._load_pretrained_vocab(RELEASED_DATASET, models)
    return lambda text: vocabulary[split(text)]


def test_roberta_ids_as_published(roberta):
    # The example in fairseq's documentation of RoBERTa.
    assert roberta.encode("Hello world!").tolist() == [31414, 232, 328]
    assert roberta.encode(" Hello").tolist() == [20920]
    assert (roberta.vocab_size, roberta.mask_id) == (50265, 50264)
    assert roberta.special_ids.tolist() == [0, 1, 2, 3, 50264]


def test_roberta_has_no_unknown_text(roberta, shared):
    lines = lines_of(shared / "corpus" / "gluonnlp_sample_text.txt")
    for ids, line in zip(roberta.encode_batch(lines), lines):
        assert roberta.unk_id not in ids
        assert roberta.decode(ids) == line


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["enwiki_gensim_sample.txt", "wikitext2_valid_test.txt", "gluonnlp_sample_text.txt"],
)
def test_roberta_equals_gluonnlp_on_the_corpus(roberta, roberta_gluon, shared, name):
    for document in (shared / "corpus" / name).read_text("utf-8").split("\n\n"):
        sentences = [line for line in document.split("\n") if line.strip()]
        encoded = roberta.encode_sentences(sentences)
        for place, (ids, sentence) in enumerate(zip(encoded, sentences)):
            expected = roberta_gluon(f" {sentence}" if place else sentence)
            assert ids.tolist() == expected, sentence
            if place:
                assert roberta.encode(sentence).tolist() == roberta_gluon(sentence), sentence


@pytest.mark.slow
def test_roberta_equals_gluonnlp_on_random_unicode(roberta, roberta_gluon):
    generator = random.Random(3)
    for _ in range(10_000):
        text = random_text(generator)
        assert roberta.encode(text).tolist() == roberta_gluon(text), ascii(text)


@pytest.mark.parametrize("name", ["sample.model", "vocab.json", "vocab.txt", "tokenizer.json"])
def test_more_tokens_than_the_limit_are_refused(tmp_path, monkeypatch, name):
    write_bpe(tmp_path)
    wordpiece = load_tokenizer(TokenizerSettings(vocab_file=write_vocabulary(tmp_path)))
    wordpiece.save(str(tmp_path))
    path = str(tmp_path / name)
    flags = {
        "sample.model": {"sentencepiece": SAMPLE_MODEL},
        "vocab.json": {"vocab_file": path, "bpe_ranks": str(tmp_path / "merges.txt")},
    }.get(name, {"vocab_file": path})
    size = load_tokenizer(TokenizerSettings(**flags)).vocab_size
    monkeypatch.setattr(tokenization, "MAX_VOCABULARY", size - 1)
    with pytest.raises(UserError, match=f"it has {size:,} tokens, the limit is {size - 1:,}"):
        load_tokenizer(TokenizerSettings(**flags))
