"""The audit's picture: which cell holds what, with more ranks and steps than there is room for."""

from __future__ import annotations

import pytest

from trl_sync.report.audit_events import Attempt, AuditEvent, Finding
from trl_sync.report.audit_timeline import (
    MOST_COLUMNS,
    MOST_LANES,
    MOST_ROWS,
    Grid,
    cell_states,
    draw_timeline,
)
from trl_sync.report.axes import padded, tick_text, ticks, whole_ticks
from trl_sync.report.curves import spread, thin_out
from trl_sync.report.text import escape, show, spans


def event(kind: str, step: int, *ranks: int, number: int = 1) -> AuditEvent:
    finding = Finding(
        cause="rank_missing" if kind == "rank_missing" else "stale_replica",
        step=step,
        ranks=ranks,
        tensor=None,
        role=None,
        scope=None,
        num_tensors=1,
        last_equal_step=None,
        evidence="",
        fatal=kind != "warning",
    )
    return AuditEvent(number=number, kind=kind, step=step, findings=(finding,) if ranks else ())


def test_each_cell_has_its_strongest_state() -> None:
    attempt = Attempt(
        world_size=3,
        audits=[(0, True), (1, True), (3, False), (4, True)],
        events=[event("warning", 1, 0), event("desync", 2, 1), event("rank_missing", 5, 2)],
    )
    states = cell_states(attempt, Grid.of(attempt))
    rows = [[states.get((rank, step), "-") for step in range(6)] for rank in range(3)]
    assert rows == [
        ["equal", "warned", "equal", "equal", "equal", "-"],
        ["equal", "equal", "parted", "parted", "equal", "-"],
        ["equal", "equal", "equal", "equal", "equal", "missing"],
    ]


@pytest.mark.parametrize("world_size, rows", [(1, 1), (32, 32), (33, 32), (100, 32), (4096, 32)])
def test_every_rank_lies_in_one_row(world_size: int, rows: int) -> None:
    grid = Grid.of(Attempt(world_size=world_size, audits=[(0, True), (10_000_000, True)]))
    assert (grid.rows, grid.columns) == (rows, MOST_COLUMNS)
    assert rows <= MOST_ROWS
    found = [rank for row in range(rows) for rank in grid.ranks(row)]
    assert found == list(range(world_size))
    assert all(rank in grid.ranks(grid.row(rank)) for rank in found)
    assert grid.column(0) == 0
    assert grid.column(10_000_000) == MOST_COLUMNS - 1


def test_a_picture_stays_small() -> None:
    events = [event("desync", step, step % 7, number=step) for step in range(3000)]
    attempt = Attempt(world_size=10**9, audits=[(10**14, True)], events=events)
    text = draw_timeline(attempt)
    assert len(text) < 400_000
    # One place for all: lanes above each other, then overlap.
    assert text.count('<g class="mark') == 400
    assert MOST_LANES == 5


def test_an_attempt_without_any_audit_can_be_drawn() -> None:
    assert "rank 0" in draw_timeline(Attempt())


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-0.2, 3.1) == pytest.approx([0.0, 1.0, 2.0, 3.0])
    assert ticks(0.0, 2560.0) == pytest.approx([0.0, 1000.0, 2000.0])
    assert whole_ticks(0, 160) == [0, 20, 40, 60, 80, 100, 120, 140, 160]
    assert whole_ticks(3, 3) == [3]
    assert whole_ticks(4, 7) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "number, step, text",
    [
        (0.0, 0.5, "0"),
        (0.5, 0.5, "0.5"),
        (-1.0, 0.2, "-1.0"),
        (0.0002, 0.0002, "0.0002"),
        (3e-5, 1e-5, "3e-5"),
        (2000.0, 1000.0, "2k"),
        (2.5e6, 5e5, "2.5M"),
        (800.0, 200.0, "800"),
        (3e9, 1e9, "3e9"),
    ],
)
def test_the_text_of_ticks(number: float, step: float, text: str) -> None:
    assert tick_text(number, step) == text


def test_a_range_is_never_empty() -> None:
    assert padded(0.0, 0.0) == (-1.0, 1.0)
    assert padded(2.0, 2.0) == pytest.approx((1.8, 2.2))
    low, high = padded(0.0, 1.0)
    assert low < 0.0 < 1.0 < high


def test_thinning_out_keeps_ends_and_extremes() -> None:
    points = [(float(x), float(x % 97)) for x in range(10_000)]
    points[5000] = (5000.0, 1e6)
    points[7001] = (7001.0, -1e6)
    kept = thin_out(points)
    assert len(kept) <= 402
    assert kept == sorted(kept)
    assert {points[0], points[5000], points[7001], points[-1]} <= set(kept)
    assert thin_out(points[:400]) == points[:400]


def test_updates_of_one_iteration_do_not_lie_upon_each_other() -> None:
    points = [(16.0, 1.0), (16.0, 2.0), (32.0, 3.0), (48.0, 4.0), (48.0, 5.0), (32.0, 6.0)]
    places = [x for x, _ in spread(points)]
    assert places == [8.0, 16.0, 32.0, 40.0, 48.0, 32.0]
    assert [y for _, y in spread(points)] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_text_is_escaped_and_cut() -> None:
    assert escape('<a href="x">&\'') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;"
    assert escape("a" * 12, limit=10) == "a" * 10 + " [2 more characters]"
    assert escape({"a": [1, None]}) == "{&quot;a&quot;: [1, null]}"


def test_numbers_are_shown_to_four_digits() -> None:
    numbers = [1234567.0, 0.123456, -3.0, 1e20, 2.5e-7]
    assert [show(n) for n in numbers] == ["1,234,567", "0.1235", "-3", "1e+20", "2.5e-07"]


def test_ranks_are_shown_as_spans() -> None:
    assert spans([3, 1, 2, 7]) == "1-3, 7"
    assert spans([]) == ""
    assert spans(range(0, 100, 2), limit=3) == "0, 2, 4 ..."
