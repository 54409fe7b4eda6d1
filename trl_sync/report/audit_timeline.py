"""The audit as a picture: ranks down, optimizer steps across, a numbered mark for each event."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trl_sync.report.audit_events import MISSING_RANK, Attempt, AuditEvent
from trl_sync.report.axes import whole_ticks
from trl_sync.report.text import count, escape, join, spans

WIDTH, LEFT, RIGHT = 560, 64, 550
MOST_COLUMNS, MOST_ROWS = 171, 32
# Marks that would overlap lie in lanes above each other.
MOST_LANES, LANE, MARK = 5, 22, 9
MOST_MARKS = 400

# From the weakest to the strongest: where several lie in one place, the strongest is drawn.
EQUAL, WARNED, PARTED, MISSING = "equal", "warned", "parted", "missing"
_STRENGTH = {EQUAL: 1, WARNED: 2, PARTED: 3, MISSING: 4}
STATE_LABELS = {
    EQUAL: "audited, equal",
    WARNED: "warning",
    PARTED: "parted from the rest, or all that differ",
    MISSING: "missing",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Steps `first` to `last` in `columns`, ranks in `rows`; a cell may hold several of each."""

    first: int
    last: int
    world_size: int
    columns: int
    rows: int

    @classmethod
    def of(cls, attempt: Attempt) -> Grid:
        first, last = attempt.steps
        return cls(
            first=first,
            last=last,
            world_size=attempt.world_size,
            columns=min(last - first + 1, MOST_COLUMNS),
            rows=min(attempt.world_size, MOST_ROWS),
        )

    def column(self, step: int) -> int:
        return (step - self.first) * self.columns // (self.last - self.first + 1)

    def row(self, rank: int) -> int:
        return rank * self.rows // self.world_size

    def ranks(self, row: int) -> range:
        """The ranks in a row."""
        first = -(-row * self.world_size // self.rows)
        return range(first, -(-(row + 1) * self.world_size // self.rows))

    def x(self, column: float) -> float:
        return LEFT + column * (RIGHT - LEFT) / self.columns


def draw_timeline(attempt: Attempt) -> str:
    """The picture of an attempt, legible from a phone's width up."""
    grid = Grid.of(attempt)
    marks = list(_lay_out(attempt.events[:MOST_MARKS], grid))
    lanes = max((lane for _, _, lane in marks), default=-1) + 1
    top = lanes * LANE + 6
    height = 18 if grid.rows <= 12 else 11
    bottom = top + grid.rows * height
    label = escape(
        f"Audit of {count(attempt.world_size, 'rank')}, steps {grid.first} to {grid.last}: "
        f"{count(len(attempt.audits), 'audit')}, {count(len(attempt.events), 'event')}"
    )
    return join(
        [
            f'<svg class="timeline" viewBox="0 0 {WIDTH} {bottom + 36}" role="img" '
            f'aria-label="{label}">',
            _rows(attempt, grid, top, height),
            *(_mark(event, x, lane, lanes, bottom) for event, x, lane in marks),
            _steps(grid, bottom),
            "</svg>",
        ]
    )


def cell_states(attempt: Attempt, grid: Grid) -> dict[tuple[int, int], str]:
    """The strongest state of each cell (row, column); cells of which nothing is known have none."""
    states: dict[tuple[int, int], str] = {}

    def put(rows: Iterable[int], column: int, state: str) -> None:
        for row in rows:
            place = row, column
            if _STRENGTH[state] > _STRENGTH.get(states.get(place, ""), 0):
                states[place] = state

    every_row = range(grid.rows)
    # Sets: there may be many more steps and ranks than cells.
    for column in {grid.column(step) for step, _ in attempt.audits}:
        put(every_row, column, EQUAL)
    for event in attempt.events:
        column = grid.column(event.step)
        for finding in event.findings:
            state = MISSING if finding.cause == MISSING_RANK else PARTED
            state = state if finding.fatal else WARNED
            put({grid.row(rank) for rank in finding.ranks}, column, state)
            # The ranks that were compared with those; of a missing one nothing was.
            if state == PARTED:
                put(every_row, column, EQUAL)
    for column, ranks in {(grid.column(step), ranks) for step, ranks in still_parted(attempt)}:
        put(every_row if ranks is None else {grid.row(rank) for rank in ranks}, column, PARTED)
    return states


def still_parted(attempt: Attempt) -> Iterator[tuple[int, tuple[int, ...] | None]]:
    """Step and ranks of each audit that found ranks as an earlier desync left them.

    None for ranks of which no desync tells.
    """
    desyncs = [event for event in attempt.events if event.kind == "desync"]
    position = 0
    ranks: tuple[int, ...] | None = None
    for step, equal in attempt.audits:
        while position < len(desyncs) and desyncs[position].step <= step:
            ranks = desyncs[position].ranks
            position += 1
        if not equal:
            yield step, ranks


def _rows(attempt: Attempt, grid: Grid, top: int, height: int) -> str:
    states = cell_states(attempt, grid)
    parts = []
    for row in range(grid.rows):
        y = top + row * height
        ranks = grid.ranks(row)
        name = f"rank {ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + height - 4}">{name}</text>')
        parts.append(
            f'<rect class="unknown" x="{LEFT}" y="{y + 1}" width="{RIGHT - LEFT}" '
            f'height="{height - 2}"/>'
        )
        for first, end, state in _stretches(states, row, grid.columns):
            x, width = grid.x(first), grid.x(end) - grid.x(first)
            parts.append(
                f'<rect class="{state}" x="{x:.1f}" y="{y + 1}" width="{max(width, 2):.1f}" '
                f'height="{height - 2}"><title>{name}: {STATE_LABELS[state]}</title></rect>'
            )
    return join(parts)


def _stretches(
    states: Mapping[tuple[int, int], str], row: int, columns: int
) -> Iterator[tuple[int, int, str]]:
    """First column, end and state of the stretches of a row that share a state."""
    first = 0
    for column in range(1, columns + 1):
        state = states.get((row, first))
        if column < columns and states.get((row, column)) == state:
            continue
        if state is not None:
            yield first, column, state
        first = column


def _lay_out(events: Sequence[AuditEvent], grid: Grid) -> Iterator[tuple[AuditEvent, float, int]]:
    """Place across and lane of each mark."""
    ends = [float("-inf")] * MOST_LANES
    for event in sorted(events, key=lambda event: (event.step, event.number)):
        x = grid.x(grid.column(event.step) + 0.5)
        free = (lane for lane, end in enumerate(ends) if end <= x - 2 * MARK - 2)
        # Where all are taken the marks of the last lane overlap; the list below has them all.
        lane = next(free, MOST_LANES - 1)
        ends[lane] = x
        yield event, x, lane


def _mark(event: AuditEvent, x: float, lane: int, lanes: int, bottom: int) -> str:
    y = (lanes - 1 - lane) * LANE + MARK + 3
    on_ranks = f", ranks {spans(event.ranks)}" if event.findings else ""
    title = escape(f"{event.number}: {event.kind} at step {event.step}{on_ranks}")
    kind = f"k-{css_kind(event.kind)}"
    small = " small" if event.number > 99 else ""
    return (
        f'<g class="mark {kind}"><title>{title}</title>'
        f'<path d="M{x:.1f} {y + MARK}V{bottom}"/><circle cx="{x:.1f}" cy="{y}" r="{MARK}"/>'
        f'<text class="number{small}" x="{x:.1f}" y="{y + 4}">{event.number}</text></g>'
    )


def css_kind(kind: str) -> str:
    """The class of a kind of event; one that is not known has that of the plain ones."""
    return kind if kind in KINDS else "other"


# Every kind of line that a journal has beside plain audits: what it means.
KINDS: Mapping[str, str] = {
    "begin": "The audit began.",
    "desync": "Ranks parted, or something that must not move did.",
    MISSING_RANK: "A rank died, hung, or left the others waiting.",
    "warning": "Training goes on; the audit saw something that is no desync.",
    "save": "A checkpoint was saved, with a manifest.",
    "save_without_manifest": "A checkpoint was saved, but no manifest could be written.",
    "resume": "Training went on from a checkpoint that was compared with its manifest.",
    "not_compared": "Some of a checkpoint's state cannot be compared here.",
    "repair": "State of the majority was copied to the ranks that had parted.",
    "end": "Training ended, and the audit with it.",
}


def _steps(grid: Grid, bottom: int) -> str:
    parts = []
    for step in whole_ticks(grid.first, grid.last, about=6):
        x = grid.x(grid.column(step) + 0.5)
        parts.append(f'<text class="x" x="{x:.1f}" y="{bottom + 15}">{step:,}</text>')
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text class="x" x="{middle:.0f}" y="{bottom + 31}">optimizer step</text>')
    return join(parts)
