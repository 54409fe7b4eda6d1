"""A verdict on a review by its words alone: no model has a say in it."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from . import words

Label = Literal["positive", "negative", "neutral"]

# From this score on a verdict is strong: two opinions of three then have an outer grade.
STRONG_SCORE = 0.65
# Opinions that nearly cancel out are a neutral review.
NEUTRAL_SCORE = 0.05

# Words the grammar does not use and a policy may reach for.
OTHER_OPINIONS = {
    "great": 0.8, "excellent": 0.8, "perfect": 0.8, "amazing": 0.8, "fantastic": 0.8,
    "best": 0.8, "love": 0.8, "loves": 0.8, "loved": 0.8, "adored": 0.8,
    "lovely": 0.4, "like": 0.4, "liked": 0.4, "enjoy": 0.4, "enjoyed": 0.4, "approved": 0.4,
    "bad": -0.4, "boring": -0.4, "regret": -0.4, "regretted": -0.4, "overpriced": -0.4,
    "unimpressed": -0.4, "disappointed": -0.4,
    "worst": -0.8, "hate": -0.8, "hates": -0.8, "hated": -0.8, "despised": -0.8,
    "furious": -0.8, "disgusting": -0.8, "overjoyed": 0.8,
}  # fmt: skip
NEGATIONS = frozenset({"not", "never", "hardly", "nothing", "neither", "nor"})
# A negated opinion turns round and loses half its force: "not awful" is faint praise.
NEGATED = -0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a text says: `label` is None where it states no opinion, `score` lies in -1 to 1."""

    label: Label | None
    score: float
    opinions: tuple[float, ...]

    @property
    def is_strong(self) -> bool:
        return abs(self.score) >= STRONG_SCORE

    @property
    def positive_share(self) -> float:
        """The share of the opinions that are positive; 0.0 where there is none."""
        return sum(opinion > 0 for opinion in self.opinions) / max(len(self.opinions), 1)


def judge(text: str) -> Verdict:
    """The verdict on a prompt with its completion: the mean weight of the opinions it states.

    The text may be truncated or outside the grammar: what is not understood counts for nothing.
    """
    spoken = tuple(re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower()))
    opinions = []
    position = 0
    while position < len(spoken):
        length, weight = _opinion_at(spoken, position)
        if length:
            opinions.append(weight)
        position += max(length, 1)
    if not opinions:
        return Verdict(label=None, score=0.0, opinions=())
    score = sum(opinions) / len(opinions)
    label: Label = "positive" if score > 0 else "negative"
    if abs(score) < NEUTRAL_SCORE:
        label = "neutral"
    return Verdict(label=label, score=score, opinions=tuple(opinions))


def _opinion_at(spoken: tuple[str, ...], position: int) -> tuple[int, float]:
    """The number of words and the weight of the opinion that starts here; (0, 0.0) where none."""
    opinions = _opinions()
    for length in range(_longest_opinion(), 0, -1):
        weight = opinions.get(spoken[position : position + length])
        if weight is not None and position + length <= len(spoken):
            return length, _modified(weight, spoken[max(position - 3, 0) : position])
    return 0, 0.0


def _modified(weight: float, before: tuple[str, ...]) -> float:
    """The weight after the adverbs and negations that stand directly before the opinion."""
    factors = {**words.STRONG_ADVERBS, **words.MILD_ADVERBS}
    for word in reversed(before):
        if word in NEGATIONS or word.endswith("n't"):
            return weight * NEGATED
        if word not in factors:
            return weight
        weight *= factors[word]
    return weight


@cache
def _opinions() -> dict[tuple[str, ...], float]:
    """Every opinion the judge knows, as a tuple of words, with its weight."""
    known: dict[tuple[str, ...], float] = {
        (word,): weight for word, weight in OTHER_OPINIONS.items()
    }
    for table in (words.ADJECTIVES, words.CLOSERS):
        for grade, phrases in table.items():
            known.update({tuple(phrase.split()): grade.value for phrase in phrases})
    return known


@cache
def _longest_opinion() -> int:
    return max(map(len, _opinions()))
