"""The page's part on the audit: a timeline of each attempt, and what every event means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_sync.report.audit_events import MISSING_RANK, Attempt, AuditEvent, Finding
from trl_sync.report.audit_timeline import (
    KINDS,
    MISSING,
    PARTED,
    STATE_LABELS,
    WARNED,
    Grid,
    cell_states,
    css_kind,
    draw_timeline,
)
from trl_sync.report.run_folder import Run
from trl_sync.report.tables import definitions, not_shown, table
from trl_sync.report.text import count, escape, join, show_value, spans

MOST_ATTEMPTS, MOST_EVENTS, MOST_FINDINGS, MOST_SCOPES = 10, 200, 20, 40
MESSAGE_LIMIT = 4000


def audit_section(run: Run) -> str:
    """The attempts of a run, the last ones if there are many."""
    shown = run.attempts[-MOST_ATTEMPTS:]
    left_out = len(run.attempts) - len(shown)
    parts = [_attempt(attempt, n) for n, attempt in enumerate(shown, start=left_out + 1)]
    return join([not_shown(left_out, "earlier attempt"), *parts])


def _attempt(attempt: Attempt, number: int) -> str:
    return join(
        [
            f"<h3>{_heading(attempt, number)}</h3>",
            f"<p>{_verdict(attempt)}</p>",
            draw_timeline(attempt),
            _key(attempt),
            _event_list(attempt),
            _scopes(attempt.begin),
        ]
    )


def _heading(attempt: Attempt, number: int) -> str:
    if attempt.begin is None:
        return f"Attempt {number}: refused before its first audit"
    first, last = attempt.steps
    return f"Attempt {number}: steps {first:,} to {last:,} on {count(attempt.world_size, 'rank')}"


def _verdict(attempt: Attempt) -> str:
    unequal = sum(not equal for _, equal in attempt.audits)
    audits = count(attempt.num_audits, "audit")
    if attempt.desyncs:
        text = f'<b class="bad">{count(attempt.desyncs, "desync")}</b> in {audits}'
    else:
        text = f'<b class="good">No desync</b> in {audits}'
    if unequal:
        text += f", of which {unequal:,} found ranks as a desync had left them"
    end = "" if attempt.ended else " No end was written: the run was stopped, or still runs."
    return f"{text}.{end}"


def _key(attempt: Attempt) -> str:
    present = set(cell_states(attempt, Grid.of(attempt)).values())
    entries = [
        f'<li><i class="cell {state}"></i>{label}</li>'
        for state, label in STATE_LABELS.items()
        if state in present or state not in (WARNED, PARTED, MISSING)
    ]
    return f'<ul class="legend">{"".join(entries)}<li>empty: nothing audited</li></ul>'


def _event_list(attempt: Attempt) -> str:
    # What is wrong comes first where not all can be shown.
    ordered = sorted(attempt.events, key=lambda event: not event.findings)[:MOST_EVENTS]
    items = [_event(event) for event in sorted(ordered, key=lambda event: event.number)]
    note = not_shown(len(attempt.events) - len(items), "event")
    return join(['<ol class="events">', *items, "</ol>", note])


def _event(event: AuditEvent) -> str:
    findings = "".join(_finding(finding) for finding in event.findings[:MOST_FINDINGS])
    note = not_shown(len(event.findings) - MOST_FINDINGS, "finding")
    meaning = KINDS.get(event.kind, "This version does not know this kind of line.")
    severe = event.kind in ("desync", "warning", MISSING_RANK)
    message = escape(event.message, MESSAGE_LIMIT)
    shown = f"<pre>{message}</pre>" if severe else f'<div class="note">{message}</div>'
    return join(
        [
            f'<li class="k-{css_kind(event.kind)}"><span class="badge">{event.number} '
            f"{escape(event.kind, 40)}</span> <span>at step {event.step:,}. {meaning}</span>",
            findings + note,
            shown if event.message else "",
            "</li>",
        ]
    )


def _finding(finding: Finding) -> str:
    facts: dict[str, Any] = {"cause": finding.cause, "ranks": spans(finding.ranks) or "none"}
    facts["tensor"] = finding.tensor or "none: it concerns the run"
    if finding.num_tensors > 1:
        facts["tensor"] += f", and {finding.num_tensors - 1:,} more"
    for name in ("role", "scope"):
        if getattr(finding, name) is not None:
            facts[name] = getattr(finding, name)
    if finding.last_equal_step is not None:
        facts["last equal"] = f"after step {finding.last_equal_step:,}"
    return definitions(facts)


def _scopes(begin: Mapping[str, Any] | None) -> str:
    """What was audited, and what was not, with the reason."""
    scopes = None if begin is None else begin.get("scopes")
    if not isinstance(scopes, Mapping):
        return ""
    rows = []
    for name, entry in list(scopes.items())[:MOST_SCOPES]:
        known = entry if isinstance(entry, Mapping) else {}
        reason = known.get("reason")
        status = show_value(known.get("status"))
        numbers = [known.get("tensors"), known.get("size_bytes")]
        rows.append(
            [
                name,
                status if reason is None else f"{status}: {show_value(reason)}",
                *("" if number is None else show_value(number) for number in numbers),
            ]
        )
    return (
        "<details><summary>What was audited</summary>"
        f"{table(['scope', 'status', 'tensors', 'bytes'], rows)}</details>"
    )
