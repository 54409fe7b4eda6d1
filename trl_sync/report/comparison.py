"""Several runs side by side: their summaries, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_sync.report.run_folder import Run
from trl_sync.report.tables import not_shown, table
from trl_sync.report.text import plain

MOST_ROWS = 300
# These differ between any two runs and say nothing about training.
PLACES = frozenset({"output_dir", "logging_dir", "run_name"})
NOT_THERE = "-"


def summary_table(runs: Sequence[Run]) -> str:
    """A column of figures for each run: of summary.json, and of the audit."""
    columns = [flatten(run.summary) | audit_figures(run) for run in runs]
    return _side_by_side("figure", runs, columns, _names(columns))


def audit_figures(run: Run) -> dict[str, Any]:
    """What the journal itself counts, over all attempts."""
    if not run.attempts:
        return {}
    return {
        "audit: attempts": len(run.attempts),
        "audit: desyncs": sum(attempt.desyncs for attempt in run.attempts),
        "audit: last step": max(attempt.steps[1] for attempt in run.attempts),
    }


def differing_settings(runs: Sequence[Run]) -> str:
    """The settings, versions and other facts of run_record.json in which runs differ."""
    recorded = [run for run in runs if run.record]
    if len(recorded) < 2:
        return "<p>Not known: fewer than two of the runs have a run_record.json.</p>"
    columns = [flatten(record_facts(run)) for run in recorded]
    names = [n for n in _names(columns) if len({plain(column.get(n)) for column in columns}) > 1]
    if not names:
        return "<p>None.</p>"
    return _side_by_side("setting", recorded, columns, names)


def record_facts(run: Run) -> dict[str, Any]:
    """run_record.json without times and places; settings by their own names."""
    facts = {
        name: run.record.get(name)
        for name in ("base_model", "engine", "world_size", "device", "platform", "versions")
    }
    config = run.record.get("config")
    settings = config if isinstance(config, Mapping) else {}
    return facts | {name: value for name, value in settings.items() if name not in PLACES}


def flatten(values: Mapping[str, Any], prefix: str = "", depth: int = 4) -> dict[str, Any]:
    """Nested objects as one, with names such as `model_state_bytes.base`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value and depth:
            flat |= flatten(value, f"{prefix}{name}.", depth - 1)
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _names(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for column in columns for name in column))


def _side_by_side(
    what: str, runs: Sequence[Run], columns: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> str:
    rows = [
        [name, *(column.get(name, NOT_THERE) for column in columns)] for name in names[:MOST_ROWS]
    ]
    header = [what, *(run.name for run in runs)]
    return table(header, rows) + not_shown(len(names) - MOST_ROWS, what)
