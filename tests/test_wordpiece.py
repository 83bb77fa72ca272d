"""WordPiece against the library's own tokenizer, transformers', and values known by hand."""

from __future__ import annotations

import json
import random

import pytest

from bort import wordpiece
from bort.errors import UserError
from bort.tokenization import TokenizerSettings, load_tokenizer, load_tokenizer_folder
from bort.wordpiece import Normalizer, WordPiece, read_wordpiece
from tests.conftest import ROOT
from tests.wordpieces import SPECIAL, VOCABULARY, write_vocabulary


def cased() -> list[str]:
    return [*VOCABULARY, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *(f"##{one}" for one in "ABCÉİΣ")]


def random_text(generator: random.Random) -> str:
    """Return a text of any characters, half of surrogate pairs and unassigned ones included."""
    ranges = [(32, 127), (32, 0x250), (0, 0x3000), (0, 0x110000)]
    known = "aáÀé\u0301ﬁ \t\n\u2028\u00a0ßİıΣσς日本中文.,-'\x00\ufffd\u200b#[]MASKunaffable"
    low, high = generator.choice(ranges)
    return "".join(
        generator.choice(known) if generator.random() < 0.5 else chr(generator.randrange(low, high))
        for _ in range(generator.randrange(60))
    )


@pytest.fixture
def tokenizer() -> WordPiece:
    return WordPiece(VOCABULARY, Normalizer())


def test_ids_known_by_hand(tokenizer):
    ids = tokenizer.encode("UNwant\u00e9d,  running")
    # The example of BERT's own test of WordPiece.
    assert tokenizer.tokens(ids) == ["un", "##want", "##ed", ",", "runn", "##ing"]
    assert ids.dtype == "int32"
    assert tokenizer.decode(ids) == "unwanted, running"
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2)
    assert (tokenizer.eos_id, tokenizer.mask_id) == (3, 4)
    assert tokenizer.special_ids.tolist() == [0, 1, 2, 3, 4]
    starts = dict(zip(VOCABULARY, tokenizer.word_starts.tolist()))
    assert starts["the"]
    assert starts["[SEP]"]
    assert not starts["##ing"]


def test_a_vocabulary_may_begin_with_a_byte_order_mark(tmp_path, tokenizer):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\ufeff".encode() + "\r\n".join(VOCABULARY).encode())
    assert read_wordpiece(str(path)).fingerprint == tokenizer.fingerprint


def test_special_tokens_in_a_text_are_plain_text(tokenizer):
    ids = tokenizer.encode("[MASK] [CLS][SEP]the[PAD] [UNK]")
    assert not set(ids.tolist()) & {0, 2, 3, 4}
    assert tokenizer.tokens(ids)[:3] == ["[", "m", "##a"]


def test_unknown_words_and_characters(tokenizer):
    assert tokenizer.encode("日 the \u0416").tolist() == [1, VOCABULARY.index("the"), 1]
    assert tokenizer.encode("x" * 101).tolist() == [tokenizer.unk_id]
    assert len(tokenizer.encode("x" * 100)) == 100
    assert tokenizer.decode([tokenizer.bos_id, VOCABULARY.index("the"), tokenizer.unk_id]) == "the"


@pytest.mark.parametrize("text", ["", " ", "\x00", "\u200b \t"])
def test_nothing_to_encode(tokenizer, text):
    assert tokenizer.encode(text).tolist() == []


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
def test_equals_the_library_on_random_unicode(lowercase, strip_accents):
    from tokenizers.implementations import BertWordPieceTokenizer

    spelling = cased()
    theirs = BertWordPieceTokenizer(
        {token: index for index, token in enumerate(spelling)},
        lowercase=lowercase,
        strip_accents=strip_accents,
    )
    ours = WordPiece(spelling, Normalizer(strip_accents=strip_accents, lowercase=lowercase))
    generator = random.Random(7)
    for _ in range(2):  # words that were seen before are looked up
        for _ in range(500):
            text = random_text(generator).encode("utf-16", "surrogatepass")
            text = text.decode("utf-16", "replace").replace("[MASK]", "")
            expected = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text).tolist() == expected, ascii(text)


def test_a_lone_surrogate_is_a_replacement_character(tokenizer):
    ids, expected = (tokenizer.encode(f"the {one} the") for one in ("\ud800", "\ufffd"))
    assert ids.tolist() == expected.tolist()


def test_memory_of_words_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(wordpiece, "_REMEMBERED", 3)
    text = " ".join(f"a{number}" for number in range(10)) + " " + "y" * 50
    first, second = tokenizer.encode(text), tokenizer.encode(text)
    assert first.tolist() == second.tolist()
    assert len(tokenizer._ids_of_word) == 3


def test_sentences_are_encoded_as_running_text(tokenizer):
    sentences = ["The cafe,", "", " running", "\u0301the"]
    parts = tokenizer.encode_sentences(sentences)
    joined = [index for part in parts for index in part.tolist()]
    assert joined == tokenizer.encode(" ".join(sentences)).tolist()
    assert tokenizer.encode_continued("ing").tolist() == tokenizer.encode("ing").tolist()


def test_vocab_txt_without_capitals_is_uncased(tmp_path):
    uncased = read_wordpiece(write_vocabulary(tmp_path, VOCABULARY))
    assert uncased.normalizer.lowercase
    assert uncased.tokens(uncased.encode("The"))[0] == "the"
    other = read_wordpiece(write_vocabulary(tmp_path, cased(), "cased.txt"))
    assert not other.normalizer.lowercase
    assert other.tokens(other.encode("The"))[0] == "T"


def test_tokenizer_config_beside_it_decides(tmp_path):
    path = write_vocabulary(tmp_path, cased())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"do_lower_case": true, "strip_accents": false, "tokenize_chinese_chars": false}'
    )
    expected = Normalizer(strip_accents=False, handle_chinese_chars=False)
    assert read_wordpiece(path).normalizer == expected


@pytest.mark.parametrize("normalizer", [Normalizer(), Normalizer(False, False, True, False)])
def test_saved_and_loaded(tmp_path, normalizer):
    saved = WordPiece(cased(), normalizer, max_word=20)
    saved.save(str(tmp_path))
    for loaded in (
        load_tokenizer_folder(str(tmp_path)),
        load_tokenizer(TokenizerSettings(vocab_file=str(tmp_path / "tokenizer.json"))),
    ):
        assert loaded.fingerprint == saved.fingerprint
        assert (
            loaded.encode("É" * 21 + " cafe").tolist() == saved.encode("É" * 21 + " cafe").tolist()
        )


def test_fingerprint_is_over_all_that_decides_the_ids():
    tokenizers = [
        WordPiece(VOCABULARY, Normalizer()),
        WordPiece(VOCABULARY, Normalizer(lowercase=False)),
        WordPiece(VOCABULARY, Normalizer(), max_word=99),
        WordPiece([*VOCABULARY[:-2], *VOCABULARY[:-3:-1]], Normalizer()),
    ]
    assert len({each.fingerprint for each in tokenizers}) == 4


# ---- files that are refused


def refused(path: object) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(TokenizerSettings(vocab_file=str(path)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_vocab_txt_refused(tmp_path):
    assert "cannot be read" in refused(tmp_path / "absent.txt")
    path = write_vocabulary(tmp_path, [*VOCABULARY, "the"])
    line = VOCABULARY.index("the") + 1
    assert refused(path).startswith(
        f"{path}:{len(VOCABULARY) + 1}: 'the' is already on line {line}"
    )
    assert "it lacks [MASK]" in refused(write_vocabulary(tmp_path, SPECIAL[:4]))
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    assert "is not UTF-8 (byte 6)" in refused(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "BPE"}}, "is not a WordPiece"),
        ({"model": {"continuing_subword_prefix": "@@"}}, "the prefix is '@@'"),
        ({"model": {"unk_token": "<unk>"}}, "the unk_token is '<unk>'"),
        ({"model": {"vocab": {"a": 0, "b": 2}}}, "json: the ids of its tokens are not 0, 1, 2, "),
        ({"model": {"vocab": {"a": 0}}}, "it lacks [CLS]"),
        ({"model": {"max_input_chars_per_word": 0}}, "max_input_chars_per_word is 0"),
        ({"normalizer": {"type": "NFKC"}}, "the normalizer is 'NFKC', BERT's is BertNormalizer"),
        ({"normalizer": None}, "the normalizer is 'none'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre_tokenizer is 'Whitespace'"),
        ({"added_tokens": [{"id": 9999, "content": "<new>"}]}, "added token '<new>' is not in"),
    ],
)
def test_tokenizer_json_refused(tmp_path, tokenizer, changes, message):
    content = tokenizer.file_content()
    content["added_tokens"] = []
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert message in refused(path)


def test_flags_that_contradict(tmp_path):
    path = write_vocabulary(tmp_path, VOCABULARY)
    with pytest.raises(UserError, match="a WordPiece has no merges: leave --bpe_ranks out"):
        load_tokenizer(TokenizerSettings(vocab_file=path, bpe_ranks="merges.txt"))


# ---- against transformers, on the real vocabulary


def test_saved_folder_gives_the_ids_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    for number, normalizer in enumerate((Normalizer(), Normalizer(lowercase=False))):
        ours = WordPiece(cased(), normalizer)
        folder = tmp_path / str(number)
        ours.save(str(folder))
        theirs = transformers.BertTokenizerFast.from_pretrained(
            str(folder), do_lower_case=normalizer.lowercase
        )
        generator = random.Random(1)
        for _ in range(200):
            text = random_text(generator).encode("utf-8", "replace").decode()
            expected = theirs(text, add_special_tokens=False, split_special_tokens=True)
            assert ours.encode(text).tolist() == expected["input_ids"], ascii(text)


@pytest.mark.slow
@pytest.mark.parametrize("lowercase", [True, False])
def test_real_vocabulary_equals_transformers(shared, tmp_path, lowercase):
    transformers = pytest.importorskip("transformers")
    real = ROOT / "model" / "pretrained" / "all-MiniLM-L6-v2" / "vocab.txt"
    if not real.exists():
        pytest.skip("scripts/experiments/fetch_weights.sh fetches the real vocabulary")
    spelling = real.read_text("utf-8").splitlines()
    ours = WordPiece(spelling, Normalizer(lowercase=lowercase))
    theirs = transformers.BertTokenizerFast(vocab_file=str(real), do_lower_case=lowercase)
    generator = random.Random(3)
    texts = [random_text(generator).encode("utf-8", "replace").decode() for _ in range(10_000)]
    for path in sorted((shared / "corpus").glob("*.txt")):
        texts += path.read_text("utf-8").split("\n")
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        expected = theirs(batch, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text, ids in zip(batch, expected):
            assert ours.encode(text).tolist() == ids, ascii(text)
