"""What the tests of the engines measured, one row for each engine and number of ranks."""

from __future__ import annotations

from typing import Any

COLUMNS = {
    "updates": "updates",
    "difference_sgd": "SGD, fp32: difference",
    "difference_adam": "AdamW, NF4: difference",
    "audits": "audits",
    "faults_named": "faults named",
    "resumed_equal": "resumed equal",
}
_ROWS: dict[tuple[str, int], dict[str, Any]] = {}


def note(engine: str, ranks: int, **measured: Any) -> None:
    """Adds to the row of `engine` on `ranks`; the names are those of `COLUMNS`."""
    unknown = measured.keys() - COLUMNS.keys()
    assert not unknown, unknown
    _ROWS.setdefault((engine, ranks), {}).update(measured)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table at the end of a run that filled it; this module is a pytest plugin."""
    if _ROWS:
        terminalreporter.section("engines")
        for line in lines():
            terminalreporter.line(line)


def lines() -> list[str]:
    """The table in Markdown."""
    header = ["engine", "ranks", *COLUMNS.values()]
    rows = [
        [engine, str(ranks), *(_shown(row.get(name)) for name in COLUMNS)]
        for (engine, ranks), row in sorted(_ROWS.items())
    ]
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.1e}" if isinstance(value, float) else str(value)
