"""Regular expressions in an adapter's options, which must not keep a process busy for ever."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from peft import PeftConfig
from torch import nn

from trl_sync.errors import ConfigError

MATCH_TIMEOUT_S = 10.0

# One repetition takes linear time; it takes one within or beside another to take exponential time.
_REPETITION = re.compile(r"[*+{]")

# Python's `re` cannot be stopped from within its process. This asks as PEFT does; a pattern that is
# no expression at all is left to PEFT, which says so.
_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        compiled = re.compile(rf"(.*\\.)?({pattern})($|\\..*)")
    except re.error:
        continue
    for name in names:
        compiled.match(name)
"""


def check_patterns(config: PeftConfig, model: nn.Module, file: Path) -> None:
    """Nothing, if the expressions of `config`, read from `file`, find modules in finite time.

    Expressions with at most one repetition always do; others are tried in a process of their own.

    Raises:
        ConfigError: `MATCH_TIMEOUT_S` were not enough.
    """
    names = [name for name, _ in model.named_modules()]
    patterns = [p for p in _expressions(config) if len(_REPETITION.findall(p)) > 1]
    if not patterns:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH_ALL],
            input=json.dumps([patterns, names]),
            text=True,
            timeout=MATCH_TIMEOUT_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        shown = ", ".join(repr(pattern[:80]) for pattern in patterns)
        raise ConfigError(
            f"{file} names modules by {shown}, which after {MATCH_TIMEOUT_S:g} s was not compared "
            "with the modules of this base: its repetitions multiply. List the names instead."
        ) from None


def _expressions(config: PeftConfig) -> list[str]:
    """What PEFT takes for regular expressions: some options as text only, some in any form."""
    texts = [getattr(config, name, None) for name in ("target_modules", "exclude_modules")]
    found = [text for text in texts if isinstance(text, str)]
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern"):
        value = getattr(config, name, None) or ()
        found += [value] if isinstance(value, str) else [str(each) for each in value]
    return found
