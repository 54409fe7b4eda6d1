"""The words of the reviews: what the grammar may say, and how strongly each word speaks."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Grade(Enum):
    """How strongly an opinion speaks; the value is its weight in a verdict, -1 to 1."""

    DELIGHTED = 0.8
    PLEASED = 0.4
    DISPLEASED = -0.4
    APPALLED = -0.8

    @property
    def is_positive(self) -> bool:
        return self.value > 0

    @property
    def is_strong(self) -> bool:
        return abs(self.value) > 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One kind of thing that is reviewed: "soup" "at the" "harbour" "cafe"."""

    aspects: tuple[str, ...]
    relation: str
    qualifiers: tuple[str, ...]
    things: tuple[str, ...]


RESTAURANTS = Domain(
    aspects=(
        "soup", "bread", "service", "coffee", "menu", "dessert",
        "fish", "salad", "music", "seating", "staff", "wine",
    ),
    relation="at the",
    qualifiers=(
        "harbour", "corner", "old", "new", "garden", "station", "river", "market", "hill", "little",
    ),
    things=("cafe", "restaurant", "bakery", "diner", "bistro", "inn"),
)  # fmt: skip
FILMS = Domain(
    aspects=(
        "plot", "acting", "script", "ending", "pacing", "dialogue",
        "cast", "humour", "opening", "lighting", "editing", "score",
    ),
    relation="in the",
    qualifiers=(
        "second", "recent", "long", "short", "silent", "Swedish", "early", "black and white",
        "low-budget", "animated",
    ),
    things=("film", "drama", "comedy", "thriller", "documentary", "western"),
)  # fmt: skip
PRODUCTS = Domain(
    aspects=(
        "screen", "battery", "handle", "sound", "keyboard", "strap",
        "lid", "motor", "design", "finish", "manual", "packaging",
    ),
    relation="of the",
    qualifiers=(
        "red", "small", "large", "folding", "electric", "spare", "second-hand", "portable",
        "grey", "wireless",
    ),
    things=("kettle", "telephone", "radio", "lamp", "backpack", "camera"),
)  # fmt: skip

OPENERS = ("The", "This time the", "To me the")
VERBS = ("was", "seemed", "felt", "proved", "remained")
TIMES = (
    "", " from the start", " to the end", " this time", " overall",
    " in my view", " on both occasions", " throughout",
)  # fmt: skip
FREE_LINKS = (". The", "; the")
AGREEING_LINKS = (", and the", ", and also the")
CONTRASTING_LINKS = (", but the", ", although the")
SUBJECTS = (
    "I", "We", "My sister", "My neighbour", "Our friends", "Everyone", "My colleagues",
    "Our guests",
)  # fmt: skip

ADJECTIVES: Mapping[Grade, tuple[str, ...]] = {
    Grade.DELIGHTED: (
        "wonderful", "superb", "brilliant", "magnificent", "flawless", "outstanding", "splendid",
        "stunning", "marvellous",
    ),
    Grade.PLEASED: (
        "good", "pleasant", "decent", "solid", "likeable", "nice", "agreeable", "enjoyable",
        "satisfying",
    ),
    Grade.DISPLEASED: (
        "weak", "dull", "poor", "bland", "clumsy", "uneven", "careless", "mediocre", "forgettable",
    ),
    Grade.APPALLED: (
        "terrible", "dreadful", "awful", "horrible", "atrocious", "dismal", "abysmal", "wretched",
        "hopeless",
    ),
}  # fmt: skip

STRONG_ADVERBS: Mapping[str, float] = {
    "": 1.0, "absolutely": 1.25, "truly": 1.25, "utterly": 1.25, "simply": 1.25, "almost": 0.75,
}  # fmt: skip
MILD_ADVERBS: Mapping[str, float] = {
    "": 1.0, "very": 1.25, "really": 1.25, "rather": 0.75, "fairly": 0.75, "somewhat": 0.75,
}  # fmt: skip

CLOSERS: Mapping[Grade, tuple[str, ...]] = {
    Grade.DELIGHTED: (
        "loved every minute", "left overjoyed", "adored it", "would choose it over all others",
        "praised it for days",
    ),
    Grade.PLEASED: (
        "liked it", "left content", "enjoyed it", "would gladly try it again",
        "found it worth the money",
    ),
    Grade.DISPLEASED: (
        "expected more", "left unimpressed", "would not try it again", "lost interest",
        "found it overpriced",
    ),
    Grade.APPALLED: (
        "hated every minute", "left furious", "demanded a refund", "despised it",
        "would warn others about it",
    ),
}  # fmt: skip


def adverbs(grade: Grade) -> Mapping[str, float]:
    """The adverbs an adjective of this grade takes, each with what it multiplies the weight by."""
    return STRONG_ADVERBS if grade.is_strong else MILD_ADVERBS
