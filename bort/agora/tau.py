"""Tau-functions for text: they move an example a little, within bounds, and leave it readable.

An example is `data.task.Example.inputs`: the texts of each encoder input. Its image is of the same
form and again texts, so that a labeller with another vocabulary can read it. Words are what blanks
separate, and the distance is the share of words changed: the optimal string alignment distance
over words (a word put in, left out, replaced, or exchanged with its neighbour costs one), divided
by the number of words. At least one word may change whatever the bounds, or a text of four words
would have no image at 20 %.

No published source says which tau-function was used for text; these are ours, within the bounds
from below and above that the author of Agora asks for (see bort/agora.py). The masked model sees
one text at a time, not the pair it belongs to.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional, Protocol, Sequence, Tuple

import numpy as np

from bort.config import option
from bort.errors import UserError
from bort.tokenization import Tokenizer

Inputs = Tuple[Tuple[str, ...], ...]
ROUNDING = 1e-9  # 0.1 * 30 is a little more than 3


class Change(Protocol):
    """Changes words of a text."""

    def __call__(
        self, words: Sequence[str], count: int, generator: np.random.Generator
    ) -> list[str]:
        """Return the words with `count` of them changed, fewer or none where that cannot be."""


def drop_words(words: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Leave out `count` words, at random; none when no word would remain."""
    if count >= len(words):
        return list(words)
    gone = set(generator.choice(len(words), count, replace=False).tolist())
    return [word for place, word in enumerate(words) if place not in gone]


def swap_neighbours(words: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Exchange `count` pairs of neighbours that differ; no word moves twice."""
    swapped = list(words)
    moved: set[int] = set()
    for left in generator.permutation(max(0, len(words) - 1)).tolist():
        pair = {left, left + 1}
        if len(moved) < 2 * count and words[left] != words[left + 1] and not moved & pair:
            swapped[left], swapped[left + 1] = words[left + 1], words[left]
            moved |= pair
    return swapped


def crop_span(words: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Keep a span: `count` words go, at the beginning, the end or both; never all words."""
    if count >= len(words):
        return list(words)
    start = int(generator.integers(0, count, endpoint=True))
    return list(words[start : len(words) - count + start])


def misspell(words: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Make one slip of the keyboard in each of `count` words.

    A character is exchanged with its neighbour, left out, doubled, or replaced by one that occurs
    in the text, so that the script stays the text's own.
    """
    noisy = list(words)
    alphabet = sorted(set("".join(words)))
    for place in generator.choice(len(words), min(count, len(words)), replace=False).tolist():
        noisy[place] = _slip(words[place], alphabet, generator)
    return noisy


def _slip(word: str, alphabet: Sequence[str], generator: np.random.Generator) -> str:
    at = int(generator.integers(len(word)))
    head, letter, tail = word[:at], word[at], word[at + 1 :]
    slips = (
        head + tail[:1] + letter + tail[1:],
        head + tail,
        head + letter + letter + tail,
        head + alphabet[generator.integers(len(alphabet))] + tail,
    )
    possible = [slip for slip in slips if slip not in ("", word)]  # a letter can be doubled
    return possible[generator.integers(len(possible))]


@dataclass(frozen=True)
class Infill:
    """Masks words and has a masked language model write others in their place.

    Each masked word becomes one `<mask>`, filled by a token that is a whole word: drawn from the
    model's distribution over these, without the word that stood there. Of several such texts the
    one is taken that the model finds likeliest: the sum of the log-probabilities of the new tokens,
    each of them masked in turn (a pseudo-log-likelihood). A text too long for the model is changed
    in its first words only, as many as the model can read.

    Args:
        logits: ids [n, length], valid lengths [n] and places in the flattened ids [m] to logits
            [m, vocabulary].
        tokenizer: the model's.
        max_len: tokens that the model can read.
        samples: texts to choose from.
    """

    logits: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    tokenizer: Tokenizer
    max_len: int
    samples: int = 4

    def __call__(
        self, words: Sequence[str], count: int, generator: np.random.Generator
    ) -> list[str]:
        """Return the words with `count` of them written anew."""
        pieces = self.tokenizer.encode_sentences(words)
        readable = int(np.sum(np.cumsum([len(each) for each in pieces]) <= self.max_len - 2))
        count = min(count, readable)
        if not count:
            return list(words)
        chosen = np.sort(generator.choice(readable, count, replace=False))
        masked, places = self._masked(pieces[:readable], chosen)
        # A text of no blank in its first word: the same word may be spelt by two tokens.
        banned = [self._spelt.get(words[place], []) for place in chosen]
        filled = self._draw(masked, places, banned, generator)
        ids = filled[np.argmax(self._likelihood(masked, places, filled))]
        changed = list(words)
        for place, token in zip(chosen, ids.tolist()):
            changed[place] = self._word(token)
        return changed

    def _masked(
        self, pieces: Sequence[np.ndarray], chosen: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids with special tokens and masks, and where the masks are."""
        mask, hidden = np.array([self.tokenizer.mask_id], np.int32), set(chosen.tolist())
        parts = [mask if place in hidden else part for place, part in enumerate(pieces)]
        starts = np.cumsum([1, *(len(part) for part in parts)])
        ids = np.concatenate([[self.tokenizer.bos_id], *parts, [self.tokenizer.eos_id]])
        return ids, starts[chosen]

    def _draw(
        self,
        masked: np.ndarray,
        places: np.ndarray,
        banned: Sequence[Sequence[int]],
        generator: np.random.Generator,
    ) -> np.ndarray:
        """Draw tokens [samples, masks] from the model's distribution over whole words."""
        logits = self._logits(masked[None], places[None])[0]
        drawn = []
        for row, unwanted in zip(logits, banned):
            allowed = self._words.copy()
            allowed[unwanted] = False
            scores = np.where(allowed, row, -np.inf)
            odds = np.exp(scores - scores.max())
            drawn.append(generator.choice(len(odds), self.samples, p=odds / odds.sum()))
        return np.stack(drawn, axis=1)

    def _likelihood(self, masked: np.ndarray, places: np.ndarray, filled: np.ndarray) -> np.ndarray:
        """Return the pseudo-log-likelihood [samples] of the filled tokens [samples, masks]."""
        samples, masks = filled.shape
        rows = np.tile(masked, (samples, masks, 1))
        for turn in range(masks):
            rows[:, turn, places] = filled
            rows[:, turn, places[turn]] = self.tokenizer.mask_id
        positions = np.tile(places, samples)[:, None]
        logits = self._logits(rows.reshape(samples * masks, -1), positions)[:, 0]
        top = logits.max(axis=1)
        totals = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        scores = logits[np.arange(len(logits)), filled.reshape(-1)] - totals
        return scores.reshape(samples, masks).sum(axis=1)

    def _logits(self, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the logits [n, m, vocabulary] at places [n, m] of ids [n, length]."""
        rows, length = ids.shape
        flat = (np.arange(rows)[:, None] * length + places).reshape(-1)
        found = self.logits(ids, np.full(rows, length), flat)
        return np.asarray(found, np.float64).reshape(*places.shape, -1)

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token]).strip()

    @functools.cached_property
    def _words(self) -> np.ndarray:
        """Tell of each token whether it is a readable word: [vocabulary] bool."""
        readable = np.array(self.tokenizer.word_starts, bool)
        readable[self.tokenizer.special_ids] = False
        for token in np.flatnonzero(readable).tolist():
            word = self._word(token)
            readable[token] = word.isprintable() and word.split() == [word] and "\ufffd" not in word
        return readable

    @functools.cached_property
    def _spelt(self) -> Mapping[str, list[int]]:
        """Return the tokens that are written as a word."""
        spelt: dict[str, list[int]] = {}
        for token in np.flatnonzero(self._words).tolist():
            spelt.setdefault(self._word(token), []).append(token)
        return spelt


def masked_model(saved: Any, samples: int = 4) -> Infill:
    """Return the tau-function of a pretrained model (`bort.saved_model.SavedModel`)."""
    from mxnet import nd

    from bort.bort import decode, encode, masked_hidden

    network = saved.network

    def logits(ids: np.ndarray, valid_length: np.ndarray, places: np.ndarray) -> np.ndarray:
        arrays = (nd.array(each, dtype="float32") for each in (ids, valid_length, places))
        device_ids, lengths, positions = arrays
        sequence = encode(network, device_ids, lengths)
        return decode(network, masked_hidden(network, sequence, positions)).asnumpy()

    return Infill(logits, saved.tokenizer, network.encoder._max_length, samples)


CHANGES: Mapping[str, Change] = {
    "dropout": drop_words,
    "swap": swap_neighbours,
    "crop": crop_span,
    "noise": misspell,
}
INFILL = "infill"
NAMES = (INFILL, *CHANGES)


def distance(before: Sequence[str], after: Sequence[str]) -> int:
    """Return the optimal string alignment distance of two sequences of words.

    Words put in, left out, replaced, or exchanged with their neighbour cost one each.
    """
    older: list[int] = []
    previous = list(range(len(after) + 1))
    for i, word in enumerate(before, start=1):
        row = [i]
        for j, other in enumerate(after, start=1):
            cost = min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (word != other))
            if i > 1 and j > 1 and (word, before[i - 2]) == (after[j - 2], other):
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
        older, previous = previous, row
    return previous[-1]


@dataclass(frozen=True)
class TauSettings:
    """How examples are moved."""

    tau: str = option(
        "infill,dropout,swap,crop,noise",
        f"ways to change a text, commas between, each with a weight if wanted (infill:3,swap), "
        f"of {', '.join(NAMES)}; one of them is drawn for each text",
    )
    tau_model: Optional[str] = option(
        None,
        "pretrained model that infills: a checkpoint or its run; without: --pretrained_parameters",
    )
    tau_samples: int = option(4, "texts that infilling chooses the likeliest from", minimum=1)
    lower: float = option(0.1, "least share of words that changes", minimum=0, maximum=1)
    upper: float = option(
        0.2, "greatest share of words that changes, but for one word", minimum=0, maximum=1
    )
    sides: str = option(
        "one",
        "of inputs of several texts: change one, drawn at random, or all",
        choices=("one", "all"),
    )

    def check(self) -> None:
        """Raise `UserError` for bounds in the wrong order and for an unknown way."""
        if self.lower > self.upper:
            raise UserError(f"--lower {self.lower}: must not be above --upper {self.upper}")
        parse_weights(self.tau)

    @property
    def weights(self) -> dict[str, float]:
        """Return the weight of each way to change a text."""
        return parse_weights(self.tau)


def parse_weights(text: str) -> dict[str, float]:
    """Read "infill:3,swap" as {"infill": 3.0, "swap": 1.0}; raises `UserError`."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            raise UserError(f"--tau {text}: {weight!r} is no number") from None
        if name not in NAMES:
            raise UserError(f"--tau {text}: {name!r} is unknown; there are {', '.join(NAMES)}")
        if not 0 < weights[name] < math.inf:
            raise UserError(f"--tau {text}: the weight of {name} has to be above 0")
    return weights


@dataclass(frozen=True)
class TextTau:
    """The tau-function for examples of text (`bort.agora.algorithm.Tau`).

    A text that several inputs share (the passage of a multiple choice) is changed once, for all of
    them. An example that has no image within the bounds, such as a single word that may only be
    left out, is returned as it is, and Agora makes no image of it.
    """

    changes: Sequence[Tuple[Change, float]]
    lower: float = 0.1
    upper: float = 0.2
    all_sides: bool = False
    attempts: int = 10

    def __call__(self, example: Inputs, generator: np.random.Generator) -> Inputs:
        """Return an image of the example: the same form, other texts."""
        count = max(map(len, example))
        sides = set(range(count) if self.all_sides else [int(generator.integers(count))])
        images: dict[str, str] = {}
        for texts in example:
            for side, text in enumerate(texts):
                if side in sides and text not in images:
                    images[text] = self.image(text, generator)
        return tuple(
            tuple(images[text] if side in sides else text for side, text in enumerate(texts))
            for texts in example
        )

    def image(self, text: str, generator: np.random.Generator) -> str:
        """Return another text within the bounds, or the same one when `attempts` draws fail."""
        words = text.split()
        least, most = word_bounds(len(words), self.lower, self.upper)
        weights = np.array([weight for _, weight in self.changes])
        for _ in range(self.attempts if words else 0):
            change = self.changes[generator.choice(len(weights), p=weights / weights.sum())][0]
            count = int(generator.integers(least, most, endpoint=True))
            changed = change(words, count, generator)
            if changed and least <= distance(words, changed) <= most:
                return " ".join(changed)
        return text


def word_bounds(words: int, lower: float, upper: float) -> tuple[int, int]:
    """Return the least and greatest number of words to change; the least is at least one."""
    least = max(1, math.ceil(lower * words - ROUNDING))
    return least, max(least, math.floor(upper * words + ROUNDING))


def make_tau(settings: TauSettings, infill: Callable[[], Change]) -> TextTau:
    """Return the tau-function that the settings name; `infill` is called if it is among them."""
    changes = [
        (infill() if name == INFILL else CHANGES[name], weight)
        for name, weight in settings.weights.items()
    ]
    return TextTau(changes, settings.lower, settings.upper, settings.sides == "all")
