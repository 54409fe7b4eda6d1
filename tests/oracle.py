"""TRL 1.12.0, the last version with a PPOTrainer, as an independent implementation to compare with.

It lies in `.oracle` beside the newer TRL that this package runs on. Its functions are taken out of
their files one by one: importing its package would replace the installed one in this process.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

ORACLE = Path(__file__).parents[1] / ".oracle"
INSTALL = "pip install --no-deps --target .oracle trl==1.12.0"


def source(path: str) -> ast.Module:
    """The syntax tree of a file of TRL 1.12.0; the test fails where that is not installed."""
    if not (ORACLE / "trl-1.12.0.dist-info").is_dir():
        pytest.fail(f"The oracle is missing: run `{INSTALL}` in {ORACLE.parent}.")
    return ast.parse((ORACLE / "trl" / path).read_text())


def functions(path: str, *names: str, **namespace: Any) -> list[Any]:
    """Those functions of a file, compiled alone with `namespace` as their globals."""
    tree = source(path)
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    exec(compile(tree, path, "exec"), namespace)
    return [namespace[name] for name in names]


def field_defaults(path: str, class_name: str) -> dict[str, Any]:
    """The fields that a dataclass of that file declares itself, with their literal defaults."""
    (found,) = (n for n in source(path).body if getattr(n, "name", None) == class_name)
    defaults: dict[str, Any] = {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign):
            keywords = {k.arg: k.value for k in node.value.keywords}
            defaults[node.target.id] = ast.literal_eval(keywords["default"])
    return defaults
