"""Settings and arguments of `trl_sync.PPOTrainer`, which the step API refuses by name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, TypeVar

from trl_sync.errors import ConfigError
from trl_sync.renames import CONFIG_RENAMES, GENERATION_ALTERNATIVES, TRAINER_RENAMES

Class = TypeVar("Class", bound=type)


def refuses_newer_settings(config_class: Class) -> Class:
    """The class, whose constructor says where settings of `trl_sync.PPOConfig` belong."""

    def check(given: set[str]) -> None:
        arguments = sorted(given & GENERATION_ALTERNATIVES.keys())
        if arguments:
            raise ConfigError(
                f"trl_sync.legacy.PPOConfig has no {', '.join(arguments)}: pass it to generate()."
            )
        # Not at the top, because most scripts of the step API need nothing of that trainer.
        from trl_sync.ppo.config import PPOConfig

        newer = given & {field.name for field in dataclasses.fields(PPOConfig)}
        _refuse(newer, CONFIG_RENAMES, "PPOConfig")

    return _with_check(config_class, check)


def refuses_newer_arguments(trainer_class: Class) -> Class:
    """The class, whose constructor says where arguments of `trl_sync.PPOTrainer` belong."""

    def check(given: set[str]) -> None:
        from trl_sync.ppo.trainer import PPOTrainer

        newer = given & inspect.signature(PPOTrainer).parameters.keys()
        _refuse(newer, TRAINER_RENAMES, "PPOTrainer")

    return _with_check(trainer_class, check)


def _with_check(kind: Class, check: Any) -> Class:
    construct = kind.__init__  # type: ignore[misc]
    own = inspect.signature(construct).parameters

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        unknown = kwargs.keys() - own.keys()
        if unknown:
            check(unknown)
        construct(self, *args, **kwargs)

    kind.__init__ = __init__  # type: ignore[misc]
    return kind


def _refuse(newer: set[str], renames: dict[str, str], owner: str) -> None:
    if not newer:
        return
    names = sorted(newer)
    here = {new: old for old, new in renames.items()}
    called = [f"{name} is {here[name]} here" for name in names if name in here]
    said = f"; {', '.join(called)}" if called else ""
    raise ConfigError(
        f"trl_sync.legacy.{owner} has no {', '.join(names)}{said}. trl_sync.{owner} has: "
        "trl_sync.PPOTrainer runs the whole loop with train(), without step()."
    )
