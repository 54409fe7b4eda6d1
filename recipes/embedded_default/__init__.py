"""A small task made on the spot: reviews from a grammar, and the models PPO starts from.

`embedded_default()` returns the paths of a language model and a reward model together with
prompts, and builds them first where no finished build is cached. Nothing is downloaded.
`judge` gives a verdict on any review that depends on no model.

Importing this package imports neither torch nor transformers.
"""

from .build import BuildError, EmbeddedDefault, embedded_default
from .grammar import REVIEWS, count_reviews
from .verdict import Verdict, judge

__all__ = [
    "REVIEWS",
    "BuildError",
    "EmbeddedDefault",
    "Verdict",
    "count_reviews",
    "embedded_default",
    "judge",
]
