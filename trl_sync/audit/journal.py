"""`sync_audit.jsonl`: one JSON line per audit, by rank 0; docs/audit.md lists the fields."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from trl_sync.errors import ConfigError

logger = logging.getLogger("trl_sync.audit")

JOURNAL_NAME = "sync_audit.jsonl"
FORMAT = 1

Listener = Callable[[str, dict[str, Any]], None]


class Journal:
    """Appends events to a file if there is one, and hands them to `listeners`.

    Every line is on disk (in the kernel, that is) before the call returns, so that what was known
    before a process was killed can be read.
    """

    def __init__(self, path: Path | None, listeners: Sequence[Listener] = ()) -> None:
        self._path = path
        self._listeners = listeners
        self._file: TextIOWrapper | None = None

    def write(self, event: str, **fields: Any) -> None:
        """Adds one line; the file is made at the first one."""
        plain = _plain(fields)
        self._append({"event": event, "time_s": round(time.time(), 3), **plain})
        for listener in self._listeners:
            listener(event, plain)

    def _append(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            # A full disk on one rank must not end a run that is healthy.
            logger.warning("sync audit: the journal %s ends here: %s", self._path, error)
            self._path = None

    def close(self) -> None:
        if self._file is not None:
            # What could not be written was said when it was tried.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a journal, in order; a last line that was cut short by a kill is left out.

    Raises:
        ConfigError: there is no such file, or a line before the last is not a journal's.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"Cannot read the journal {path}: {error.strerror or error}.") from error
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            if "\\ud" in line:  # perhaps half a character, which no terminal shows
                whole = json.dumps(event, ensure_ascii=False).encode(errors="replace")
                event = json.loads(whole)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise ConfigError(f"{path}, line {number}: not JSON ({error.msg}).") from error
        except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
            raise ConfigError(f"{path}, line {number}: cannot be read ({error}).") from error
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise ConfigError(f"{path}, line {number}: not an event of a synchronization audit.")
        yield event


def _plain(value: Any) -> Any:
    """`value` as JSON holds it: no NaN or infinity, tuples as lists, enums by value."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
