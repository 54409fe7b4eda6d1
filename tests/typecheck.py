"""Checks every annotation of trl_sync, the axes of tensors included, while the tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# These answer a wrong type with a ConfigError of their own, which tests ask for.
USER_FACING = {
    "PPOConfig.__init__",
    "PPOTrainer.__init__",
    "PromptDataset.__init__",
    "SharedBackbone.__init__",
    "reward_source",
}
# An int is fine where a float is expected, as PEP 484 says.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its annotations checked at every call, unless it judges them itself."""
    return function if function.__qualname__ in USER_FACING else _check(function)
