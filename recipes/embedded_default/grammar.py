"""The grammar of the reviews: count them, draw them, and tell whether a text is one.

    review     = prompt completion
    prompt     = opener aspect relation qualifier thing      "The soup at the harbour cafe"
    completion = clause link aspect clause "."               " was rather dull, and the bread ..."
               | clause link aspect clause ". " closer "."
               | clause ". " closer "."
    clause     = " " verb " " [adverb " "] adjective time
    closer     = subject " " judgement

The link fits its two clauses: "and" only between opinions of one sign, "but" only between opposite
ones, a full stop anywhere. The second aspect belongs to the prompt's domain.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from . import words
from .words import Domain, Grade


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grammar:
    """Every table that decides which reviews exist."""

    openers: tuple[str, ...]
    domains: tuple[Domain, ...]
    verbs: tuple[str, ...]
    times: tuple[str, ...]
    free_links: tuple[str, ...]
    agreeing_links: tuple[str, ...]
    contrasting_links: tuple[str, ...]
    subjects: tuple[str, ...]
    adjectives: Mapping[Grade, tuple[str, ...]]
    closers: Mapping[Grade, tuple[str, ...]]


REVIEWS = Grammar(
    openers=words.OPENERS,
    domains=(words.RESTAURANTS, words.FILMS, words.PRODUCTS),
    verbs=words.VERBS,
    times=words.TIMES,
    free_links=words.FREE_LINKS,
    agreeing_links=words.AGREEING_LINKS,
    contrasting_links=words.CONTRASTING_LINKS,
    subjects=words.SUBJECTS,
    adjectives=words.ADJECTIVES,
    closers=words.CLOSERS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A neutral opening, with what a completion has to know about it."""

    text: str
    domain: Domain


@dataclass(frozen=True, slots=True, kw_only=True)
class Stance:
    """How a reviewer feels: the share of such reviewers, and the grades their opinions have."""

    share: float
    grades: Mapping[Grade, float]


# Under a third of the reviewers are content, most complaints are mild, and praise that is given
# is often strong: the mean score lies low and the best scores lie far above it, so that a policy
# has more than a standard deviation to climb.
STANCES = (
    Stance(share=0.14, grades={Grade.DELIGHTED: 0.9, Grade.PLEASED: 0.1}),
    Stance(
        share=0.15,
        grades={Grade.DELIGHTED: 0.1, Grade.PLEASED: 0.85, Grade.DISPLEASED: 0.05},
    ),
    Stance(share=0.02, grades={Grade.PLEASED: 0.5, Grade.DISPLEASED: 0.5}),
    Stance(
        share=0.61,
        grades={Grade.PLEASED: 0.03, Grade.DISPLEASED: 0.90, Grade.APPALLED: 0.07},
    ),
    Stance(share=0.08, grades={Grade.DISPLEASED: 0.2, Grade.APPALLED: 0.8}),
)


def prompts(grammar: Grammar) -> Iterator[Prompt]:
    """Every prompt of the grammar once, in a fixed order."""
    for domain in grammar.domains:
        for opener in grammar.openers:
            for aspect in domain.aspects:
                for qualifier in domain.qualifiers:
                    for thing in domain.things:
                        text = f"{opener} {aspect} {domain.relation} {qualifier} {thing}"
                        yield Prompt(text=text, domain=domain)


def count_completions(grammar: Grammar, domain: Domain) -> int:
    """The exact number of distinct completions of one prompt of this domain."""
    positive, negative = (
        sum(
            len(grammar.verbs) * len(words.adverbs(grade)) * len(adjectives) * len(grammar.times)
            for grade, adjectives in grammar.adjectives.items()
            if grade.is_positive is wanted
        )
        for wanted in (True, False)
    )
    closers = len(grammar.subjects) * sum(map(len, grammar.closers.values()))
    agreeing = len(links(grammar, agrees=True)) * (positive**2 + negative**2)
    contrasting = len(links(grammar, agrees=False)) * 2 * positive * negative
    two_clauses = len(domain.aspects) * (agreeing + contrasting)
    return two_clauses * (1 + closers) + (positive + negative) * closers


def count_reviews(grammar: Grammar = REVIEWS) -> int:
    """The exact number of distinct reviews: every prompt with each of its completions."""
    return sum(
        len(grammar.openers)
        * len(domain.aspects)
        * len(domain.qualifiers)
        * len(domain.things)
        * count_completions(grammar, domain)
        for domain in grammar.domains
    )


def links(grammar: Grammar, *, agrees: bool) -> tuple[str, ...]:
    """What may stand between two clauses whose opinions agree in sign, or do not."""
    return grammar.free_links + (grammar.agreeing_links if agrees else grammar.contrasting_links)


def draw_stance(random: Random) -> Stance:
    """A reviewer's stance, with the shares of `STANCES`."""
    return random.choices(STANCES, weights=[stance.share for stance in STANCES])[0]


def draw_completion(grammar: Grammar, prompt: Prompt, stance: Stance, random: Random) -> str:
    """A completion of the prompt by a reviewer of this stance."""
    first, second, last = random.choices(
        list(stance.grades), weights=list(stance.grades.values()), k=3
    )
    has_second, has_closer = random.choice(((True, False), (True, True), (False, True)))
    text = _draw_clause(grammar, first, random)
    if has_second:
        agrees = first.is_positive is second.is_positive
        link = random.choice(links(grammar, agrees=agrees))
        aspect = random.choice(prompt.domain.aspects)
        text += f"{link} {aspect}{_draw_clause(grammar, second, random)}"
    if has_closer:
        text += f". {random.choice(grammar.subjects)} {random.choice(grammar.closers[last])}"
    return f"{text}."


def _draw_clause(grammar: Grammar, grade: Grade, random: Random) -> str:
    verb = random.choice(grammar.verbs)
    adverb = random.choice(list(words.adverbs(grade)))
    adjective = random.choice(grammar.adjectives[grade])
    # Half of the clauses name no time, however many times there are to name.
    time = random.choice(grammar.times) if random.random() < 0.5 else grammar.times[0]
    return f" {verb} {adverb + ' ' if adverb else ''}{adjective}{time}"


def is_review(text: str, grammar: Grammar = REVIEWS) -> bool:
    """True where the text is, letter for letter, one of the reviews `count_reviews` counts."""
    match = _pattern(grammar).fullmatch(text)
    if match is None:
        return False
    first, second, link = match["first"], match["second"], match["link"]
    if second is None:
        # One clause alone is no review: a closer follows it.
        return match["closer"] is not None
    domain = next(domain for domain in grammar.domains if match["aspect"] in domain.aspects)
    if match["other"] not in domain.aspects:
        return False
    agrees = _is_positive(grammar, first) is _is_positive(grammar, second)
    return link in links(grammar, agrees=agrees)


def _is_positive(grammar: Grammar, opinion: str) -> bool:
    adjective = opinion.split()[-1]
    return any(
        adjective in adjectives
        for grade, adjectives in grammar.adjectives.items()
        if grade.is_positive
    )


@lru_cache(maxsize=8)
def _pattern(grammar: Grammar) -> re.Pattern[str]:
    """One expression for every review, looser than the grammar in what `is_review` then checks."""
    aspects = [aspect for domain in grammar.domains for aspect in domain.aspects]
    settings = "|".join(
        f"{domain.relation} {_any(domain.qualifiers)} {_any(domain.things)}"
        for domain in grammar.domains
    )

    def clause(name: str) -> str:
        opinions = "|".join(
            _any(f"{adverb} " if adverb else "" for adverb in words.adverbs(grade))
            + _any(adjectives)
            for grade, adjectives in grammar.adjectives.items()
        )
        return f" {_any(grammar.verbs)} (?P<{name}>{opinions}){_any(grammar.times)}"

    joints = _any((*grammar.free_links, *grammar.agreeing_links, *grammar.contrasting_links))
    closers = _any(closer for group in grammar.closers.values() for closer in group)
    return re.compile(
        f"{_any(grammar.openers)} (?P<aspect>{_any(aspects)}) (?:{settings}){clause('first')}"
        f"(?:(?P<link>{joints}) (?P<other>{_any(aspects)}){clause('second')})?"
        rf"(?P<closer>\. {_any(grammar.subjects)} {closers})?\."
    )


def _any(choices: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, choices))})"
