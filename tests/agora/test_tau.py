"""Tau-functions for text: bounds, forms, and infilling against a table of probabilities."""

from __future__ import annotations

import collections
import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from bort.agora import tau
from bort.errors import UserError
from bort.tokenization import TokenizerSettings, load_tokenizer
from data.tasks import get_task
from tests.wordpieces import SPECIAL, write_vocabulary

TEXT = "the small boat came back to the harbour before the storm had reached it"
WORDS = TEXT.split()
SIMPLE = {
    "dropout": tau.drop_words,
    "swap": tau.swap_neighbours,
    "crop": tau.crop_span,
    "noise": tau.misspell,
}


def generator(seed=0):
    return np.random.default_rng(seed)


def slow_distance(before, after):
    """Optimal string alignment, directly from its recursion."""

    @functools.lru_cache(None)
    def d(i, j):
        if not i or not j:
            return i + j
        options = [
            d(i - 1, j) + 1,
            d(i, j - 1) + 1,
            d(i - 1, j - 1) + (before[i - 1] != after[j - 1]),
        ]
        if i > 1 and j > 1 and before[i - 1] == after[j - 2] and before[i - 2] == after[j - 1]:
            options.append(d(i - 2, j - 2) + 1)
        return min(options)

    return d(len(before), len(after))


def test_distance_against_its_recursion():
    draw = generator()
    for _ in range(300):
        before, after = (tuple(draw.integers(0, 3, draw.integers(0, 7))) for _ in range(2))
        assert tau.distance(before, after) == slow_distance(before, after)
    assert tau.distance(list("abcd"), list("bac")) == 2
    assert tau.distance(list("abc"), list("cba")) == 2


def test_simple_changes_do_what_they_say():
    for seed, count in itertools.product(range(30), (1, 2, 3)):
        dropped = tau.drop_words(WORDS, count, generator(seed))
        rest = iter(WORDS)
        assert len(dropped) == len(WORDS) - count
        assert all(word in rest for word in dropped)  # in their order

        cropped = tau.crop_span(WORDS, count, generator(seed))
        spans = [WORDS[at : at + len(WORDS) - count] for at in range(count + 1)]
        assert cropped in spans

        swapped = tau.swap_neighbours(WORDS, count, generator(seed))
        assert sorted(swapped) == sorted(WORDS)
        moved = [at for at, pair in enumerate(zip(swapped, WORDS)) if pair[0] != pair[1]]
        assert len(moved) == 2 * count
        assert tau.distance(WORDS, swapped) == count

        noisy = tau.misspell(WORDS, count, generator(seed))
        pairs = [(old, new) for old, new in zip(WORDS, noisy) if old != new]
        assert len(noisy) == len(WORDS)
        assert len(pairs) == count
        for old, new in pairs:
            assert slow_distance(old, new) == 1  # one slip of the keyboard
            assert set(new) <= set("".join(WORDS))


def test_every_place_and_every_slip_occurs():
    crops = {tuple(tau.crop_span(WORDS, 2, generator(seed))) for seed in range(60)}
    assert len(crops) == 3
    for change in SIMPLE.values():
        results = {tuple(change(WORDS, 1, generator(seed))) for seed in range(200)}
        assert len(results) >= {"crop_span": 2}.get(change.__name__, len(WORDS) - 1)
    slips = {tau.misspell(["ab"], 1, generator(seed))[0] for seed in range(200)}
    assert slips == {"ba", "a", "b", "aab", "abb", "bb", "aa"}


@pytest.mark.parametrize("change", SIMPLE.values(), ids=SIMPLE)
def test_what_cannot_be_changed_stays_and_no_text_becomes_empty(change):
    for words in (["one"], ["same", "same"], ["a", "b"]):
        for count in (1, 2, 5):
            given = list(words)
            result = change(words, count, generator())
            assert result
            assert all(result)
            assert words == given  # not changed in place
    assert tau.drop_words(["one"], 1, generator()) == ["one"]
    assert tau.swap_neighbours(["one"], 1, generator()) == ["one"]
    assert tau.swap_neighbours(["same", "same"], 1, generator()) == ["same", "same"]


def test_word_bounds():
    bounds = {n: tau.word_bounds(n, 0.1, 0.2) for n in (1, 4, 5, 10, 15, 30)}
    assert bounds == {1: (1, 1), 4: (1, 1), 5: (1, 1), 10: (1, 2), 15: (2, 3), 30: (3, 6)}
    assert tau.word_bounds(10, 0.15, 0.16) == (2, 2)
    assert tau.word_bounds(10, 0.0, 0.0) == (1, 1)


def text_tau(names="dropout,swap,crop,noise", infill=None, task="SST-2", **settings):
    return tau.make_tau(tau.TauSettings(tau=names, **settings), lambda: infill, get_task(task))


def test_distances_stay_within_the_bounds_and_reach_them():
    text = " ".join(f"word{number}" for number in range(30))
    for name in SIMPLE:
        change = text_tau(name)
        distances = set()
        for seed in range(80):
            image = change(((text,),), generator(seed))
            assert image == change(((text,),), generator(seed))
            distances.add(slow_distance(tuple(text.split()), tuple(image[0][0].split())))
        assert distances == {3, 4, 5, 6}


def test_one_side_or_all_of_a_pair():
    pair = (("a b c d e f", "g h i j k l"),)
    changed = collections.Counter()
    for seed in range(60):
        image = text_tau()(pair, generator(seed))
        changed[tuple(old != new for old, new in zip(pair[0], image[0]))] += 1
    assert set(changed) == {(True, False), (False, True)}
    assert min(changed.values()) > 15
    image = text_tau(sides="all")(pair, generator())
    assert all(old != new for old, new in zip(pair[0], image[0]))


def test_the_shared_text_of_a_multiple_choice_changes_once_for_all_options():
    passage = "the boat came back to the harbour"
    choice = ((passage, "it was early"), (passage, "it was late"), (passage, "it sank"))
    seen = set()
    for seed in range(20):
        image = text_tau()(choice, generator(seed))
        assert len({texts[0] for texts in image}) == 1
        seen.add((image[0][0] != passage, image[2][1] != "it sank"))
    assert seen == {(True, False), (False, True)}


def test_inputs_of_unequal_numbers_of_texts():
    example = (("one two three",), ("four five six", "seven eight nine"))
    for seed in range(20):
        image = text_tau(sides="all")(example, generator(seed))
        assert [len(texts) for texts in image] == [1, 2]
        assert image != example


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("WSC", ("# Amy 's parents # are unhappy about it , because * they * are snobs .",
                 "they means Amy 's parents")),
        ("WSC", ("Only # a man who sold * his * car # came back to us", "his means a man")),
        ("WiC", ("She said : \"* place *, place\" and went away", "We come to a * place *.")),
    ],
)  # fmt: skip
def test_the_words_that_a_question_is_about_keep_their_marks(task, parts):
    marked = {"WSC": ("# Amy 's parents #", "* they *", "# a man who sold * his * car #"),
              "WiC": ('"* place *,', "* place *.")}[task]  # fmt: skip
    kept = [[part for part in marked if part in text] for text in parts]
    images = set()
    for seed in range(200):
        ((*image,),) = text_tau(task=task, upper=0.5)((parts,), generator(seed))
        assert [[part for part in marked if part in text] for text in image] == kept
        assert task != "WSC" or image[1] == parts[1]
        images.add(tuple(image))
    assert len(images) > 10


def test_copas_options_keep_the_word_before_them():
    choice = (("I cast a shadow .", "because it rose"), ("I cast a shadow .", "because it fell"))
    seen = set()
    for seed in range(100):
        image = text_tau(task="COPA", sides="all")(choice, generator(seed))
        assert {option.split()[0] for _, option in image} == {"because"}
        seen.update(option for _, option in image)
    assert len(seen) > 10


def test_an_example_without_image_is_returned_unchanged():
    assert text_tau("dropout,crop,swap")((("word",),), generator()) == (("word",),)
    assert text_tau()((("",),), generator()) == (("",),)
    assert text_tau("swap")((("same same  same",),), generator()) == (("same same  same",),)


def test_ways_are_drawn_by_their_weights():
    drop = text_tau("dropout:3,noise")
    lengths = [len(drop(((" ".join(WORDS),),), generator(s))[0][0].split()) for s in range(400)]
    assert 0.7 < np.mean(np.array(lengths) < len(WORDS)) < 0.8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tau": "infil"}, "--tau infil: 'infil' is unknown; known are infill, dropout"),
        ({"tau": "swap:x"}, "--tau swap:x: 'x' is not a number"),
        ({"tau": "swap:0"}, "weight of swap must be above 0"),
        ({"tau": "swap:nan"}, "weight of swap must be above 0"),
        ({"tau": "swap:3,noise,swap"}, "--tau swap:3,noise,swap: names swap twice; give it one"),
        ({"tau": ""}, "'' is unknown"),
        ({"lower": 0.3}, "--lower 0.3: must not be above --upper 0.2"),
    ],
)
def test_mistakes_in_flags_are_named(flags, message):
    with pytest.raises(UserError) as raised:
        tau.TauSettings(**flags).check()
    assert message in str(raised.value)


# Infilling


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TokenizerSettings())


class Table:
    """A masked model whose answer at a place is a table's row, chosen by the token before it."""

    def __init__(self, vocab_size):
        self.rows = np.random.default_rng(3).normal(0, 3, (vocab_size, vocab_size))
        self.asked = []

    def __call__(self, ids, valid_length, places):
        assert (valid_length == ids.shape[1]).all()
        self.asked.append(ids)
        return self.rows[ids.reshape(-1)[places - 1]]


def test_infilling_replaces_words_by_words(tokenizer):
    infill = tau.Infill(Table(tokenizer.vocab_size), tokenizer, 64)
    for seed, count in itertools.product(range(10), (1, 2, 3)):
        changed = infill(WORDS, count, generator(seed))
        pairs = [(old, new) for old, new in zip(WORDS, changed) if old != new]
        assert len(changed) == len(WORDS)
        assert len(pairs) == count
        ids = tokenizer.encode(" ".join(changed))
        assert not set(ids.tolist()) & set(tokenizer.special_ids.tolist())
        assert tokenizer.decode(ids) == " ".join(changed)
        for _, new in pairs:
            assert len(tokenizer.encode(new)) == 1
    assert infill(WORDS, 2, generator(1)) == infill(WORDS, 2, generator(1))


def test_infilling_draws_from_the_models_distribution(tokenizer):
    """One sample: a masked word is drawn by the table's row, over whole words, the old one out."""
    table = Table(tokenizer.vocab_size)
    infill = tau.Infill(table, tokenizer, 64, samples=1)
    old = infill.word(np.flatnonzero(infill.words)[5])
    draw, counts = generator(), collections.Counter()
    for _ in range(3000):
        counts[infill([old], 1, draw)[0]] += 1
    odds = np.exp(table.rows[tokenizer.bos_id]) * infill.words
    for token in np.flatnonzero(infill.words):
        if infill.word(token) == old:
            odds[token] = 0
    odds /= odds.sum()
    likely = np.argsort(odds)[-5:]
    assert old not in counts
    for token in likely:
        assert counts[infill.word(token)] / 3000 == pytest.approx(odds[token], abs=0.03)


def test_infilling_returns_the_most_likely_sample(tokenizer):
    table = Table(tokenizer.vocab_size)
    infill = tau.Infill(table, tokenizer, 64, samples=6)
    words = WORDS[:6]
    pieces = tokenizer.encode_sentences(words)
    drawn = []
    draw = infill._draw
    infill.__dict__["_draw"] = lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1]
    changed = infill(words, 2, generator(4))
    chosen = [at for at in range(6) if words[at] != changed[at]]

    def pseudo_log_likelihood(tokens):
        filled = [[token] if at in chosen else pieces[at].tolist() for at, token in tokens]
        total = 0.0
        for at in chosen:
            before = [tokenizer.bos_id, *itertools.chain(*filled[:at])][-1]
            row = table.rows[before]
            total += row[filled[at][0]] - np.log(np.sum(np.exp(row)))
        return total

    scores = [
        pseudo_log_likelihood([(at, dict(zip(chosen, row)).get(at)) for at in range(6)])
        for row in drawn[0].tolist()
    ]
    best = drawn[0][int(np.argmax(scores))]
    assert [changed[at] for at in chosen] == [infill.word(token) for token in best]
    assert len(set(np.round(scores, 6))) > 3


def test_a_vocabulary_without_whole_words_cannot_infill(tmp_path):
    path = write_vocabulary(tmp_path, [*SPECIAL, "##a", "##b"])
    network = SimpleNamespace(encoder=SimpleNamespace(_max_length=8))
    with pytest.raises(UserError, match="--tau infill: the vocabulary of the model has no whole"):
        tau.masked_model(network, load_tokenizer(TokenizerSettings(vocab_file=path)))


def test_a_text_too_long_is_changed_where_the_model_reads(tokenizer):
    table = Table(tokenizer.vocab_size)
    infill = tau.Infill(table, tokenizer, 12)
    for seed in range(20):
        changed = infill(WORDS * 5, 3, generator(seed))
        assert changed[10:] == (WORDS * 5)[10:]
    assert max(ids.shape[1] for ids in table.asked) <= 12
    unread = tau.Infill(table, tokenizer, 3)
    long_word = "unaccountable" * 3
    assert unread([long_word], 1, generator()) == [long_word]


def test_a_pretrained_bort_infills(tokenizer):
    import mxnet as mx

    from bort.bort import get_bort_model
    from tests.reference import redraw

    network, _ = get_bort_model("bort_2_2_16_16", vocab=tokenizer, max_length=32)
    redraw(network, seed=3)
    infill = tau.masked_model(network, tokenizer, samples=3)
    assert (infill.max_len, infill.samples) == (32, 3)
    ids = np.array([[0, 7, tokenizer.mask_id, 9, 2]])
    sequence_logits = network(mx.nd.array(ids), mx.nd.array([5]), mx.nd.array([[2]]))[1].asnumpy()
    ours = infill.logits(ids, np.array([5]), np.array([2]))
    assert np.allclose(ours, sequence_logits[0], atol=1e-5)
    changed = text_tau("infill", infill)(((" ".join(WORDS),),), generator())[0][0].split()
    assert 1 <= sum(old != new for old, new in zip(WORDS, changed)) <= 2


def test_the_vocabulary_of_roberta(shared, monkeypatch):
    monkeypatch.setenv("MXNET_HOME", str(shared / "mxnet_home"))
    roberta = load_tokenizer(TokenizerSettings("openwebtext_ccnews_stories_books_cased"))
    infill = tau.Infill(lambda ids, _, places: np.zeros((len(places), 50265)), roberta, 64)
    assert 30000 < infill.words.sum() < 50265
    changed = text_tau("infill", infill)((("a quite remarkable film , really",),), generator())
    ids = roberta.encode(changed[0][0])
    assert roberta.decode(ids) == changed[0][0]
    assert not set(ids.tolist()) & set(roberta.special_ids.tolist())
