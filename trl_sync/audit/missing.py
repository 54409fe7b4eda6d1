"""Which ranks are missing, by what was read of their states. Pure: no clock, store or process.

Times are seconds on one process's own monotonic clock; clocks of two hosts are never compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from trl_sync.audit.rank_state import NOT_BEGUN, MissingRanks, Position, RankState


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What this process knows of one rank, and since when.

    `state` is None if it never published. `heard_s` is when its heartbeat last changed,
    `awaited_since_s` since when another rank is ahead and waits while this one has neither moved
    nor begun or ended a pause (None: nobody waits).
    """

    state: RankState | None
    heard_s: float
    awaited_since_s: float | None

    @property
    def position(self) -> Position:
        """Where the rank is; before its first step if it never published."""
        return NOT_BEGUN if self.state is None else self.state.position

    @property
    def paused(self) -> str | None:
        """The reason of its pause, if it pauses."""
        return None if self.state is None else self.state.paused


def update_sightings(
    previous: Mapping[int, Sighting], states: Mapping[int, RankState | None], now_s: float
) -> dict[int, Sighting]:
    """The sightings after reading `states`, this process's own included, at `now_s`."""
    front = max(
        (
            state.position
            for state in states.values()
            if state is not None and state.paused is None and state.ended is None
        ),
        default=NOT_BEGUN,
    )
    return {
        rank: _sighting(previous.get(rank), state, front, now_s) for rank, state in states.items()
    }


def _sighting(
    before: Sighting | None, state: RankState | None, front: Position, now_s: float
) -> Sighting:
    seen = Sighting(state=state, heard_s=now_s, awaited_since_s=None)
    if before is not None and _heartbeat(before.state) == _heartbeat(state):
        seen = Sighting(state=state, heard_s=before.heard_s, awaited_since_s=None)
    if front <= seen.position:
        return seen
    awaited_since_s = now_s
    if (
        before is not None
        and before.awaited_since_s is not None
        and (before.position, before.paused) == (seen.position, seen.paused)
    ):
        awaited_since_s = before.awaited_since_s
    return Sighting(state=state, heard_s=seen.heard_s, awaited_since_s=awaited_since_s)


def _heartbeat(state: RankState | None) -> int | None:
    return None if state is None else state.heartbeat


def find_lagging(
    sightings: Mapping[int, Sighting], *, now_s: float, timeout_s: float
) -> MissingRanks | None:
    """The rearmost ranks that others have awaited for `timeout_s`; None if there are none.

    The rearmost only: a rank further on that does not move either is waiting for them.
    """
    waits_s = {
        rank: wait_s
        for rank, wait_s in _awaited_longer(sightings, now_s, timeout_s).items()
        if sightings[rank].paused is None
    }
    if not waits_s:
        return None
    rear = min(sightings[rank].position for rank in waits_s)
    ranks = tuple(sorted(rank for rank in waits_s if sightings[rank].position == rear))
    waited_s = max(waits_s[rank] for rank in ranks)
    return MissingRanks(
        ranks=ranks,
        kind="lagging",
        reason=f"others are further and have waited {waited_s:.1f} s (timeout_s={timeout_s:g})",
        waited_s=waited_s,
        states=known_states(sightings),
    )


def find_awaited_pauses(
    sightings: Mapping[int, Sighting], *, now_s: float, timeout_s: float
) -> dict[int, str]:
    """Ranks that others have awaited for `timeout_s` while they paused, with the reasons."""
    awaited = _awaited_longer(sightings, now_s, timeout_s)
    reasons = {rank: sightings[rank].paused for rank in awaited}
    return {rank: reason for rank, reason in reasons.items() if reason is not None}


def _awaited_longer(
    sightings: Mapping[int, Sighting], now_s: float, timeout_s: float
) -> dict[int, float]:
    """How many seconds ranks have been awaited, where it is `timeout_s` or more."""
    return {
        rank: now_s - seen.awaited_since_s
        for rank, seen in sightings.items()
        if seen.awaited_since_s is not None
        and now_s - seen.awaited_since_s >= timeout_s
        # One that left before the end is awaited in vain; one that stopped its watch is not judged.
        and not (seen.state is not None and seen.state.ended == "stopped")
    }


def find_verdict(
    sightings: Mapping[int, Sighting], latest: Mapping[int, RankState | None]
) -> MissingRanks | None:
    """What a rank that already ends has found, by `latest`; so all ranks name the same ones."""
    for state in latest.values():
        if state is not None and state.verdict is not None:
            verdict = state.verdict
            return MissingRanks(
                ranks=verdict.ranks,
                kind=verdict.kind,
                reason=verdict.reason,
                waited_s=verdict.waited_s,
                states=known_states(sightings),
            )
    return None


def find_silent(
    sightings: Mapping[int, Sighting], *, now_s: float, timeout_s: float
) -> MissingRanks | None:
    """The ranks whose heartbeat has stood still for `timeout_s`; None if there are none."""
    silent = {
        rank: now_s - seen.heard_s
        for rank, seen in sightings.items()
        if seen.state is not None and seen.state.ended is None and now_s - seen.heard_s >= timeout_s
    }
    if not silent:
        return None
    waited_s = max(silent.values())
    return MissingRanks(
        ranks=tuple(sorted(silent)),
        kind="dead",
        reason=f"no sign of life for {waited_s:.1f} s (timeout_s={timeout_s:g}); killed, frozen, "
        "or its host or network is gone",
        waited_s=waited_s,
        states=known_states(sightings),
    )


def gone(
    sightings: Mapping[int, Sighting], ranks: Collection[int], *, now_s: float, reason: str
) -> MissingRanks:
    """The verdict on `ranks` that are known to be dead for `reason`."""
    heard_s = [sightings[rank].heard_s for rank in ranks if rank in sightings]
    return MissingRanks(
        ranks=tuple(sorted(ranks)),
        kind="dead",
        reason=reason,
        waited_s=max((now_s - heard for heard in heard_s), default=0.0),
        states=known_states(sightings),
    )


def known_states(sightings: Mapping[int, Sighting]) -> tuple[RankState, ...]:
    """The last states of the ranks that ever published, by rank."""
    return tuple(seen.state for _, seen in sorted(sightings.items()) if seen.state is not None)
