"""Names added to modules and classes of TRL, where they have none of that name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def add_names(module: ModuleType, names: Mapping[str, str]) -> None:
    """Gives `module` each of those names (-> "module:name") that it does not have.

    They are imported when they are first used. What the module finds by itself comes first, its
    own lazily imported names included.
    """
    own = _own_lookup(module)

    def missing(name: str) -> Any:
        if own is not None:
            try:
                return own(name)
            except AttributeError:
                if name not in names:
                    raise
        if name not in names:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        value = _imported(names[name])
        setattr(module, name, value)
        return value

    # Called for what ordinary lookup does not find (PEP 562), before a `__getattr__` of the class.
    module.__dict__["__getattr__"] = missing


def add_settings(owner: type, settings: Mapping[str, Callable[[Any], Any]]) -> None:
    """Gives a class those read-only properties that it has no attribute for."""
    for name, read in settings.items():
        if not hasattr(owner, name):
            setattr(owner, name, property(read))


def _own_lookup(module: ModuleType) -> Callable[[str], Any] | None:
    if "__getattr__" in module.__dict__:
        return module.__dict__["__getattr__"]
    of_class = getattr(type(module), "__getattr__", None)  # TRL's lazy modules
    return None if of_class is None else of_class.__get__(module)


def _imported(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
