"""Whatever a run's files hold, there is a whole page, or one error that names the file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from report_pages import Page, needs_nothing_else
from run_folders import FILES, RECORD, finding, journal_lines, log_row, write_run
from trl_sync.errors import ConfigError
from trl_sync.report.curves import make_charts
from trl_sync.report.page import build_page
from trl_sync.report.run_folder import read_runs

SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.integers(0, 9), st.floats(), st.text(max_size=9)),
    st.sampled_from(["<script>", "</title>", "&lt;", "audited", "rank_missing"]),
)


def objects(names: list[str], values: Any = SCALARS) -> Any:
    """Objects with some of these names, and others."""
    keys = st.sampled_from(names) | st.text(max_size=5)
    nested = st.recursive(
        values,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=8,
    )
    return st.dictionaries(keys, nested, max_size=8)


def changed(whole: dict[str, Any]) -> Any:
    """An object that is right but for some fields."""
    return objects([*whole]).map(lambda changes: whole | changes)


ROWS = st.lists(changed(log_row(1, 0.5)), max_size=6).map(lambda rows: {"log_history": rows})
EVENTS = sorted({line["event"] for line in journal_lines()})
FINDINGS = st.lists(changed(finding()), max_size=2)
LINES = st.sampled_from(journal_lines()).flatmap(changed)
DESYNCS = FINDINGS.map(lambda found: {"event": "desync", "step": 3, "findings": found})
ANSWERS = objects(["model response", "score"])
ROW_OF_ANSWERS = st.fixed_dictionaries({"query": SCALARS, "before": ANSWERS, "after": ANSWERS})


@settings(max_examples=120, deadline=None)
@given(
    log=st.none() | ROWS,
    journal=st.none() | st.lists(LINES | DESYNCS, min_size=1, max_size=8),
    summary=st.none() | objects(["reward_first", "episodes", "kl_last", "wall_s"]),
    record=st.none() | changed(RECORD),
    completions=st.lists(ROW_OF_ANSWERS, max_size=3),
)
def test_a_page_or_an_error(**files: Any) -> None:
    said = None
    with tempfile.TemporaryDirectory() as parent:
        folders = [write_run(Path(parent, "one"), **files), write_run(Path(parent, "two"))]
        for some in (folders[:1], folders):
            try:
                runs = read_runs(some)
            except ConfigError as error:
                said = str(error)
                break
            charts = make_charts([run.log for run in runs], [run.name for run in runs])
            text = build_page(runs, charts).encode().decode()
            needs_nothing_else(Page(text))
    assert said is None or any(name in said for name in FILES.values())
