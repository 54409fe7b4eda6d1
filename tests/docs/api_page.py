"""docs/api.md, made from the public docstrings: `python tests/docs/api_page.py` writes it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
MODULES = ("trl_sync", "trl_sync.legacy", "trl_sync.ppo.compat")
HEAD = """# API

Every public name with its signature and docstring; `python tests/docs/api_page.py` makes this page
from them. One legend of axes for all tensors: B sequences, P prompt tokens, R response tokens,
T = P + R, H hidden size, V vocabulary, N tokens picked from a batch. How things work together: [the
loop](loop.md), [the audit](audit.md), [scaling](scaling.md).
"""


def page() -> str:
    parts = [HEAD]
    known: dict[int, str] = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        parts.append(f"\n## {module_name}\n\n{inspect.cleandoc(module.__doc__ or '')}\n")
        for name in sorted(module.__all__, key=str.lower):
            value = getattr(module, name)
            if id(value) in known and callable(value):
                parts.append(f"\n### {module_name}.{name}\n\nThe same as {known[id(value)]}.\n")
                continue
            known[id(value)] = f"{module_name}.{name}"
            parts.append(entry(f"{module_name}.{name}", value))
    return "".join(parts)


def entry(name: str, value: Any) -> str:
    """The section of one name."""
    if not callable(value):
        return f"\n### {name}\n\n`{value!r}`\n" if len(repr(value)) < 80 else f"\n### {name}\n"
    text = f"\n### {name}\n\n```text\n{signature(name.rpartition('.')[2], value)}\n```\n"
    text += f"\n{documentation(value)}\n"
    if isinstance(value, type):
        text += settings(value)
        text += "".join(member(*pair) for pair in members(value))
    return text


def signature(name: str, value: Any) -> str:
    """The call as it is written; of configs the fields stand in a table."""
    if dataclasses.is_dataclass(value):
        return f"{name}(...)"
    try:
        found = str(inspect.signature(value))
    except ValueError:
        return f"{name}(...)"
    # Objects as defaults have addresses, which are others in every process.
    return name + re.sub(r" at 0x[0-9a-f]+", "", found)


def documentation(value: Any) -> str:
    doc = inspect.getdoc(value) or ""
    assert doc, f"{value!r} has no docstring"
    # Examples in docstrings are not run here.
    doc = doc.replace("```python", "```text")
    return re.sub(r"^(Raises|Args|Returns):$", r"**\1:**\n", doc, flags=re.MULTILINE)


def settings(value: type) -> str:
    """The fields of a config that are its own, with their help."""
    if not (dataclasses.is_dataclass(value) and any(f.metadata for f in dataclasses.fields(value))):
        return ""
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    rows = [
        f"| `{field.name}` | `{default(field)}` | {help_of(field)} |"
        for field in dataclasses.fields(value)
        if field.name not in stock and field.metadata.get("help")
    ]
    return "\n| setting | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def default(field: Any) -> str:
    if field.name == "exp_name":
        return "name of the script"
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return repr(field.default)


def help_of(field: Any) -> str:
    text = field.metadata["help"].replace("%%", "%")
    return " ".join(text.replace("|", "\\|").split())


def members(value: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that this package defines and documents."""
    for name, found in inspect.getmembers(value):
        owner = next((base for base in value.__mro__ if name in vars(base)), None)
        ours = owner is not None and owner.__module__.startswith("trl_sync")
        raw = None if owner is None else vars(owner)[name]
        wanted = isinstance(raw, property) or inspect.isfunction(found) or inspect.ismethod(found)
        if ours and wanted and not name.startswith("_") and inspect.getdoc(found):
            yield name, raw if isinstance(raw, property) else found


def member(name: str, found: Any) -> str:
    shown = name if isinstance(found, property) else signature(name, found)
    lines = documentation(found).splitlines()
    return f"\n- `{shown}`\n\n" + "\n".join(f"  {line}".rstrip() for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
