"""Tau-functions for text: they perturb an example within bounds and leave it readable.

An example is `data.task.Example.inputs`: the texts of each encoder input. The augmented example has
the same form and consists of texts, so that a labeller with another vocabulary can read it. Words
are separated by white space. The distance of two texts is the share of words changed: the optimal
string alignment distance over words (a word inserted, deleted, replaced, or swapped with its
neighbour costs one), divided by the number of words. At least one word may change whatever the
bounds; otherwise a text of four words could not change at 20 %.

No published source says which tau-function was used for text. These are ours, with the lower and
upper bound that the author of Agora requires (see bort/agora/algorithm.py). The masked language
model reads one text at a time, not the pair to which it belongs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Callable, Mapping, Optional, Protocol, Sequence, Tuple

import numpy as np

from bort.config import option
from bort.errors import UserError
from bort.tokenization import Tokenizer
from bort.types import Block
from data.task import Task

Inputs = Tuple[Tuple[str, ...], ...]
ROUNDING = 1e-9  # 0.1 * 30 is a little more than 3


class Change(Protocol):
    """Changes words of a text."""

    def __call__(
        self, words: Sequence[str], count: int, generator: np.random.Generator
    ) -> list[str]:
        """Return the words with `count` of them changed, or fewer where that is impossible."""


def drop_words(words: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Drop `count` random words; none when no word would remain."""
    if count >= len(words):
        return list(words)
    dropped = set(generator.choice(len(words), count, replace=False).tolist())
    return [word for index, word in enumerate(words) if index not in dropped]


def swap_neighbours(words: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Swap `count` pairs of neighbours that differ; no word is swapped twice."""
    swapped = list(words)
    moved: set[int] = set()
    for left in generator.permutation(max(0, len(words) - 1)).tolist():
        pair = {left, left + 1}
        if len(moved) < 2 * count and words[left] != words[left + 1] and not moved & pair:
            swapped[left], swapped[left + 1] = words[left + 1], words[left]
            moved |= pair
    return swapped


def crop_span(words: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Crop `count` words at the beginning, the end or both; never all words."""
    if count >= len(words):
        return list(words)
    start = int(generator.integers(0, count, endpoint=True))
    return list(words[start : len(words) - count + start])


def misspell(words: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Make one typing error in each of `count` words.

    A character is swapped with its neighbour, deleted, doubled, or replaced by one that occurs in
    the text, so that no other script appears.
    """
    noisy = list(words)
    alphabet = sorted(set("".join(words)))
    for index in generator.choice(len(words), min(count, len(words)), replace=False).tolist():
        noisy[index] = _with_typo(words[index], alphabet, generator)
    return noisy


def _with_typo(word: str, alphabet: Sequence[str], generator: np.random.Generator) -> str:
    at = int(generator.integers(len(word)))
    head, letter, tail = word[:at], word[at], word[at + 1 :]
    typos = (
        head + tail[:1] + letter + tail[1:],
        head + tail,
        head + letter + letter + tail,
        head + alphabet[generator.integers(len(alphabet))] + tail,
    )
    possible = [typo for typo in typos if typo not in ("", word)]  # never empty: doubled letters
    return possible[generator.integers(len(possible))]


@dataclass(frozen=True)
class Infill:
    """Masks words and replaces them by words from a masked language model.

    Each chosen word becomes one `<mask>`, which is filled with a token that is a whole word: drawn
    from the model's distribution over these, without the original word. Of several such texts the
    one with the greatest pseudo-log-likelihood is returned: the sum of the log-probabilities of the
    new tokens, each of them masked in turn. In a text too long for the model only the words that
    it can read are changed.

    Args:
        logits: maps ids [n, length], valid lengths [n] and positions in the flattened ids [m] to
            logits [m, vocabulary].
        tokenizer: of the model.
        max_len: the model's maximum sequence length.
        samples: number of texts to choose from.
    """

    logits: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    tokenizer: Tokenizer
    max_len: int
    samples: int = 4

    def __call__(
        self, words: Sequence[str], count: int, generator: np.random.Generator
    ) -> list[str]:
        """Return the words with `count` of them replaced."""
        pieces = self.tokenizer.encode_sentences(words)
        readable = int(np.sum(np.cumsum([len(ids) for ids in pieces]) <= self.max_len - 2))
        count = min(count, readable)
        if not count:
            return list(words)
        chosen = np.sort(generator.choice(readable, count, replace=False))
        masked, positions = self._masked(pieces[:readable], chosen)
        # One word may be spelled by two tokens: with and without a space before it. The token of
        # a word may read otherwise: in lower case.
        banned = [
            [*self._tokens_by_word.get(words[index], []), *pieces[index][: len(pieces[index]) == 1]]
            for index in chosen
        ]
        filled = self._draw(masked, positions, banned, generator)
        ids = filled[np.argmax(self._likelihood(masked, positions, filled))]
        changed = list(words)
        for index, token in zip(chosen, ids.tolist()):
            changed[index] = self.word(token)
        return changed

    def _masked(
        self, pieces: Sequence[np.ndarray], chosen: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids with special tokens and masks, and the positions of the masks."""
        mask, replaced = np.array([self.tokenizer.mask_id], np.int32), set(chosen.tolist())
        parts = [mask if index in replaced else part for index, part in enumerate(pieces)]
        starts = np.cumsum([1, *(len(part) for part in parts)])
        ids = np.concatenate([[self.tokenizer.bos_id], *parts, [self.tokenizer.eos_id]])
        return ids, starts[chosen]

    def _draw(
        self,
        masked: np.ndarray,
        positions: np.ndarray,
        banned: Sequence[Sequence[int]],
        generator: np.random.Generator,
    ) -> np.ndarray:
        """Draw tokens [samples, masks] from the model's distribution over whole words."""
        logits = self._logits(masked[None], positions[None])[0]
        drawn = []
        for row, unwanted in zip(logits, banned):
            allowed = self.words.copy()
            allowed[unwanted] = False
            scores = np.where(allowed, row, -np.inf)
            odds = np.exp(scores - scores.max())
            drawn.append(generator.choice(len(odds), self.samples, p=odds / odds.sum()))
        return np.stack(drawn, axis=1)

    def _likelihood(
        self, masked: np.ndarray, positions: np.ndarray, filled: np.ndarray
    ) -> np.ndarray:
        """Return the pseudo-log-likelihood [samples] of the filled tokens [samples, masks]."""
        samples, masks = filled.shape
        rows = np.tile(masked, (samples, masks, 1))
        for turn in range(masks):
            rows[:, turn, positions] = filled
            rows[:, turn, positions[turn]] = self.tokenizer.mask_id
        repeated = np.tile(positions, samples)[:, None]
        logits = self._logits(rows.reshape(samples * masks, -1), repeated)[:, 0]
        top = logits.max(axis=1)
        totals = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        scores = logits[np.arange(len(logits)), filled.reshape(-1)] - totals
        return scores.reshape(samples, masks).sum(axis=1)

    def _logits(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the logits [n, m, vocabulary] at positions [n, m] of ids [n, length]."""
        rows, length = ids.shape
        flat = (np.arange(rows)[:, None] * length + positions).reshape(-1)
        found = self.logits(ids, np.full(rows, length), flat)
        return np.asarray(found, np.float64).reshape(*positions.shape, -1)

    def word(self, token: int) -> str:
        """Return the text of a token without the space before it."""
        return self.tokenizer.decode([token]).strip()

    @functools.cached_property
    def words(self) -> np.ndarray:
        """Return which tokens are readable words: bool [vocabulary]."""
        readable = np.array(self.tokenizer.word_starts, bool)
        readable[self.tokenizer.special_ids] = False
        for token in np.flatnonzero(readable).tolist():
            word = self.word(token)
            readable[token] = word.isprintable() and word.split() == [word] and "\ufffd" not in word
        return readable

    @functools.cached_property
    def _tokens_by_word(self) -> Mapping[str, list[int]]:
        """Return the tokens whose text is a word."""
        tokens: dict[str, list[int]] = {}
        for token in np.flatnonzero(self.words).tolist():
            tokens.setdefault(self.word(token), []).append(token)
        return tokens


def masked_model(network: Block, tokenizer: Tokenizer, samples: int = 4) -> Infill:
    """Return the tau-function of a pretrained model.

    Raises `UserError` when its vocabulary has no whole words, as one of single characters.
    """
    from mxnet import nd

    from bort.bort import decode, encode, masked_hidden

    def logits(ids: np.ndarray, valid_length: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return [n, vocabulary] for ids [batch, length] at the flat positions [n]."""
        arrays = (nd.array(each, dtype="float32") for each in (ids, valid_length, positions))
        device_ids, lengths, device_positions = arrays
        sequence = encode(network, device_ids, lengths)
        return decode(network, masked_hidden(network, sequence, device_positions)).asnumpy()

    infill = Infill(logits, tokenizer, network.encoder._max_length, samples)
    if not infill.words.any():
        raise UserError(
            "--tau infill: the vocabulary of the model has no whole words to put in; leave infill "
            "out of --tau"
        )
    return infill


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

    Words inserted, deleted, replaced, or swapped with their neighbour cost one each.
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
    """The tau-function: how examples are perturbed."""

    tau: str = option(
        "infill,dropout,swap,crop,noise",
        "comma-separated ways to change a text, optionally with weights (infill:3,swap), of "
        f"{', '.join(NAMES)}; one is drawn for each text",
    )
    tau_model: Optional[str] = option(
        None,
        "pretrained model for infilling: a checkpoint or a run (default: --pretrained_parameters)",
    )
    tau_samples: int = option(
        4, "texts of which infilling takes the most likely", minimum=1, maximum=1000
    )
    lower: float = option(0.1, "minimum share of words that are changed", minimum=0, maximum=1)
    upper: float = option(
        0.2, "maximum share of words that are changed (at least one word)", minimum=0, maximum=1
    )
    sides: str = option(
        "one",
        "in inputs of several texts: change one, chosen at random, or all",
        choices=("one", "all"),
    )

    def check(self) -> None:
        """Raise `UserError` for bounds in the wrong order and for a wrong --tau."""
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
        if name in weights:
            raise UserError(f"--tau {text}: names {name} twice; give it one weight")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            raise UserError(f"--tau {text}: {weight!r} is not a number") from None
        if name not in NAMES:
            raise UserError(f"--tau {text}: {name!r} is unknown; known are {', '.join(NAMES)}")
        if not 0 < weights[name] < math.inf:
            raise UserError(f"--tau {text}: the weight of {name} must be above 0")
    return weights


@dataclass(frozen=True)
class TextTau:
    """The tau-function for examples of text (`bort.agora.algorithm.Tau`).

    A text that several inputs share (the passage of a multiple choice) is changed once, for all of
    them. An example that cannot be changed within the bounds, such as a single word that may only
    be dropped, is returned unchanged, and Agora skips it. So is one whose `fixed` part, given place
    and text, would be another: the marked words of WiC and WSC, COPA's "because" and "so".
    """

    changes: Sequence[Tuple[Change, float]]
    fixed: Callable[[int, str], str]
    lower: float = 0.1
    upper: float = 0.2
    all_sides: bool = False
    attempts: int = 10

    def __call__(self, example: Inputs, generator: np.random.Generator) -> Inputs:
        """Return an example of the same form with other texts."""
        count = max(map(len, example))
        sides = set(range(count) if self.all_sides else [int(generator.integers(count))])
        changed: dict[str, str] = {}
        for texts in example:
            for side, text in enumerate(texts):
                if side in sides and text not in changed:
                    changed[text] = self.change(side, text, generator)
        return tuple(
            tuple(changed[text] if side in sides else text for side, text in enumerate(texts))
            for texts in example
        )

    def change(self, place: int, text: str, generator: np.random.Generator) -> str:
        """Return another text within the bounds, or the same text after `attempts` failures."""
        fixed = self.fixed(place, text)
        words = text.split()
        least, most = word_bounds(len(words), self.lower, self.upper)
        weights = np.array([weight for _, weight in self.changes])
        for _ in range(self.attempts if words else 0):
            change = self.changes[generator.choice(len(weights), p=weights / weights.sum())][0]
            count = int(generator.integers(least, most, endpoint=True))
            changed = change(words, count, generator)
            joined = " ".join(changed)
            near = bool(changed) and least <= distance(words, changed) <= most
            if near and self.fixed(place, joined) == fixed:
                return joined
        return text


def word_bounds(words: int, lower: float, upper: float) -> tuple[int, int]:
    """Return the minimum and maximum number of words to change; the minimum is at least 1."""
    least = max(1, math.ceil(lower * words - ROUNDING))
    return least, max(least, math.floor(upper * words + ROUNDING))


def make_tau(settings: TauSettings, infill: Callable[[], Change], task: Task) -> TextTau:
    """Return the tau-function of the settings; `infill` is called only if they name it."""
    changes = [
        (infill() if name == INFILL else CHANGES[name], weight)
        for name, weight in settings.weights.items()
    ]
    all_sides = settings.sides == "all"
    return TextTau(changes, task.fixed_part, settings.lower, settings.upper, all_sides)
