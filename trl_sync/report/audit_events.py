"""The journal of an audit -> attempts: what was audited when, and what happened.

A journal holds several attempts if its run was resumed. docs/audit.md lists the fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_sync.audit.journal import read_journal
from trl_sync.errors import ConfigError
from trl_sync.report.files import check_size
from trl_sync.report.text import count, plain

MISSING_RANK = "rank_missing"
_LARGEST_NUMBER = 10**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was wrong. `ranks` depart from the rest, or are all that differ."""

    cause: str
    step: int
    ranks: tuple[int, ...]
    tensor: str | None
    role: str | None
    scope: str | None
    num_tensors: int
    last_equal_step: int | None
    evidence: str
    fatal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """A line of the journal other than a plain audit. `number` counts them within the journal.

    `kind` is the line's own, but for a desync that is a missing rank. `step` of the end is that of
    the last line before it.
    """

    number: int
    kind: str
    step: int
    findings: tuple[Finding, ...] = ()
    message: str = ""

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({rank for finding in self.findings for rank in finding.ranks}))


@dataclass(slots=True, kw_only=True)
class Attempt:
    """The lines from one "begin" to the next. `audits`: the step of each and whether ranks were
    equal.
    """

    begin: Mapping[str, Any] | None = None
    world_size: int = 1
    audits: list[tuple[int, bool]] = field(default_factory=list)
    events: list[AuditEvent] = field(default_factory=list)
    ended: bool = False

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last step of which the journal tells."""
        found = [step for step, _ in self.audits] + [event.step for event in self.events]
        return min(found, default=0), max(found, default=0)

    @property
    def num_audits(self) -> int:
        """Audits of which a line tells; one that found a desync has no line beside it."""
        return len(self.audits) + sum(event.kind == "desync" for event in self.events)

    @property
    def desyncs(self) -> int:
        return sum(event.kind in ("desync", MISSING_RANK) for event in self.events)


def read_attempts(journal: Path) -> tuple[Attempt, ...]:
    """The attempts in a journal, in order.

    Raises:
        ConfigError: it cannot be read, or is not as this version writes it.
    """
    check_size(journal)
    try:
        return _attempts(read_journal(journal))
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{journal} is not as this version writes it ({type(error).__name__}: {error}). Read "
            "it with the version of trl_sync that wrote it; its first line names that."
        ) from error


def _attempts(lines: Iterable[Mapping[str, Any]]) -> tuple[Attempt, ...]:
    attempts: list[Attempt] = []
    number = 0
    for line in lines:
        # A run that is refused at once, such as one that is not distributed, has no "begin".
        if line["event"] == "begin" or not attempts or attempts[-1].ended:
            attempts.append(Attempt())
        if line["event"] == "audit":
            attempts[-1].audits.append((_whole(line["step"], "step"), line["equal"] is True))
            continue
        number += 1
        _add(attempts[-1], line, number)
    for attempt in attempts:
        named = [rank for event in attempt.events for rank in event.ranks]
        attempt.world_size = max([attempt.world_size, *(rank + 1 for rank in named)])
    return tuple(attempts)


def _add(attempt: Attempt, line: Mapping[str, Any], number: int) -> None:
    kind = plain(line["event"])
    findings: tuple[Finding, ...] = ()
    if kind == "begin":
        attempt.begin = line
        attempt.world_size = max(1, _whole(line["world_size"], "world_size"))
    elif kind == "desync":
        findings = tuple(_finding(finding) for finding in _list(line["findings"], "findings"))
        if any(finding.cause == MISSING_RANK for finding in findings):
            kind = MISSING_RANK
    elif kind == "warning":
        findings = (_finding(line),)
    elif kind == "end":
        attempt.ended = True
    step = line.get("step")
    attempt.events.append(
        AuditEvent(
            number=number,
            kind=kind,
            step=attempt.steps[1] if step is None else _whole(step, "step"),
            findings=findings,
            message=_message(kind, line, findings),
        )
    )


def _finding(fields: Any) -> Finding:
    if not isinstance(fields, Mapping):
        raise TypeError("a finding is not an object")
    last_equal = fields.get("last_equal_step")
    return Finding(
        cause=plain(fields["cause"]),
        step=_whole(fields["step"], "step"),
        ranks=tuple(_whole(rank, "rank") for rank in _list(fields["ranks"], "ranks")),
        tensor=_text(fields.get("tensor")),
        role=_text(fields.get("role")),
        scope=_text(fields.get("scope")),
        num_tensors=_whole(fields.get("num_tensors", 1), "num_tensors"),
        last_equal_step=None if last_equal is None else _whole(last_equal, "last_equal_step"),
        evidence=plain(fields.get("evidence", "")),
        fatal=fields.get("fatal") is not False,
    )


def _message(kind: str, line: Mapping[str, Any], findings: Sequence[Finding]) -> str:
    """What the journal itself says of an event, in full."""
    if kind == "warning":
        return findings[0].evidence
    if kind == "begin":
        every = line.get("every_steps")
        return (
            f"{_counted(line['world_size'], 'rank')}, engine {plain(line.get('engine', '?'))}, "
            f"audited every {'step' if every == 1 else _counted(every, 'step')}, "
            f"on_desync={plain(line.get('on_desync', '?'))}"
        )
    if kind == "end":
        audits, desyncs = line.get("audits"), line.get("desyncs")
        return f"{_counted(audits, 'audit')}, {_counted(desyncs, 'desync')}"
    if kind in ("save", "resume"):
        verified = "verified" if line.get("verified") is True else "not verified"
        return f"{plain(line.get('folder', '?'))}: {verified}"
    known = {name: line[name] for name in ("message", "folder", "reason", "audit") if name in line}
    if "message" in known:
        return plain(known["message"])
    return ", ".join(f"{name}: {plain(value)}" for name, value in known.items())


def _counted(value: Any, noun: str) -> str:
    is_number = isinstance(value, int) and abs(value) < _LARGEST_NUMBER
    return count(value, noun) if is_number else f"{plain(value)} {noun}s"


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {type(value).__name__}, not a whole number")
    if not 0 <= value < _LARGEST_NUMBER:
        raise ValueError(f"{name} is out of range")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is {type(value).__name__}, not a list")
    return value


def _text(value: Any) -> str | None:
    return None if value is None else plain(value)
