"""`import trl_sync.shim`: scripts written for TRL's PPO find it in TRL again.

Modules and names of PPO that the installed TRL does not have resolve to this package; what TRL has
is left alone. Nothing is imported before a script asks for it. Importing `trl_sync` without this
module changes nothing. `python -m trl_sync.shim script.py ...` runs a script that cannot be edited.

A process that a script spawns anew (not forks) has to import this module by itself.
"""

from __future__ import annotations

import logging
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from trl_sync.shim.lazy import add_names, add_settings
from trl_sync.shim.names import MODULES, NAMES, SETTINGS

__all__ = ["install"]

logger = logging.getLogger(__name__)

_TOUCHED = {*NAMES, *(module for module, _ in SETTINGS)}


def install() -> None:
    """Makes PPO importable from TRL where TRL has none. A second call changes nothing."""
    # By name, because a module that is loaded again has another class.
    if any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _TOUCHED & sys.modules.keys():
        _complete(sys.modules[name])


class _Finder(MetaPathFinder):
    """Finds the modules that TRL lacks, and adds to those it has the names that they lack."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in MODULES and fullname not in _TOUCHED:
            return None
        spec = self._spec_of_others(fullname, path, target)
        if spec is None and fullname in MODULES:
            package = any(name.startswith(f"{fullname}.") for name in MODULES)
            return ModuleSpec(fullname, _Loader(), origin="trl_sync.shim", is_package=package)
        if fullname == "trl.experimental.ppo":
            logger.warning(
                "The installed TRL has a PPOTrainer of its own in trl.experimental.ppo, which is "
                "used. For the one of trl_sync write `from trl_sync import PPOTrainer`."
            )
        if spec is not None and spec.loader is not None and fullname in _TOUCHED:
            _after_loading(spec.loader, fullname)
        return spec

    def _spec_of_others(self, fullname: str, path: Any, target: Any) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


class _Loader(Loader):
    """Makes a module whose names are imported from this package when they are first used."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        names = MODULES[module.__name__]
        module.__doc__ = "Names of TRL's PPO, provided by trl_sync.shim."
        module.__dict__["__all__"] = sorted(names)
        add_names(module, names)


def _after_loading(loader: Any, fullname: str) -> None:
    """Completes a module of TRL as soon as its own loader has run."""
    load = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        load(module)
        # TRL's packages replace themselves in sys.modules.
        _complete(sys.modules[fullname])

    loader.exec_module = exec_module


def _complete(module: ModuleType) -> None:
    """Gives a module of TRL what it lacks."""
    if module.__name__ in NAMES:
        add_names(module, NAMES[module.__name__])
    for (name, class_name), settings in SETTINGS.items():
        if name == module.__name__:
            add_settings(getattr(module, class_name), settings)


install()
