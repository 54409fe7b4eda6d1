"""What ranks publish about themselves, and the verdict on those that are missing, in words."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Literal


class Phase(IntEnum):
    """The places of one update, in the order in which every rank passes them."""

    STEP_BEGUN = 0
    BACKWARD = 1
    BEFORE_UPDATE = 2
    AFTER_UPDATE = 3
    COMPARING = 4
    AUDITED = 5


# (step, phase, backward passes of the step): positions compare in the order of training.
Position = tuple[int, int, int]
NOT_BEGUN: Position = (-1, 0, 0)

_PHASE_TEXT = {
    Phase.STEP_BEGUN: "begun, before its backward pass",
    Phase.BACKWARD: "in backward pass",
    Phase.BEFORE_UPDATE: "about to update",
    Phase.AFTER_UPDATE: "updated, not yet audited",
    Phase.COMPARING: "comparing with the others",
    Phase.AUDITED: "audited",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Which ranks are missing and why; empty `ranks` mean the launcher, which held the store."""

    ranks: tuple[int, ...]
    kind: Literal["dead", "lagging"]
    reason: str
    waited_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """What one rank last published about itself.

    `machine` is equal where process ids can be looked up, `heartbeat` counts publications. `ended`
    is "stopped" after a clean stop, "exited" where the process ended without one, and "aborted"
    where it ends because of `verdict`. `store_released`: this rank no longer needs the store.
    """

    rank: int
    host: str
    machine: str
    pid: int
    heartbeat: int
    position: Position
    paused: str | None
    ended: Literal["stopped", "exited", "aborted"] | None
    store_released: bool
    verdict: Verdict | None

    @property
    def phase(self) -> Phase:
        """The place inside the update."""
        return Phase(self.position[1])

    def encoded(self) -> bytes:
        """The state as it stands in the store."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decoded(cls, value: bytes) -> RankState:
        """The state that `encoded` made `value` of."""
        fields = json.loads(value)
        fields["position"] = tuple(fields["position"])
        if fields["verdict"] is not None:
            ranks = tuple(fields["verdict"].pop("ranks"))
            fields["verdict"] = Verdict(ranks=ranks, **fields["verdict"])
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingRanks(Verdict):
    """A verdict, and where every rank that ever published was last seen, by rank."""

    states: tuple[RankState, ...]

    def verdict(self) -> Verdict:
        """The verdict alone."""
        return Verdict(ranks=self.ranks, kind=self.kind, reason=self.reason, waited_s=self.waited_s)

    def describe(self) -> str:
        """One message: who is missing and why, where it was last seen, and where the others are."""
        subject = rank_list(self.ranks) if self.ranks else "the launcher's store"
        verb = "is" if len(self.ranks) <= 1 else "are"
        what = "dead" if self.kind == "dead" else "lagging"
        lines = [f"{subject[0].upper()}{subject[1:]} {verb} {what}: {self.reason}."]
        by_rank = {state.rank: state for state in self.states}
        for rank in self.ranks:
            lines.append(f"  {_last_seen(rank, by_rank.get(rank))}")
        others = [state for state in self.states if state.rank not in self.ranks]
        places: dict[str, list[int]] = {}
        for state in others:
            places.setdefault(place(state), []).append(state.rank)
        lines += [f"  {rank_list(ranks)}: {where}" for where, ranks in places.items()]
        return "\n".join([*lines, _ADVICE[self.kind]])


_ADVICE = {
    "dead": "Every rank ends now. Look for its traceback above this or in its own log, or for an "
    "out-of-memory kill in the kernel's log.",
    "lagging": "Every rank ends now. If it did other work that may take long, announce that with "
    "pause(), or raise timeout_s.",
}


def has_ended(state: RankState | None) -> bool:
    """Whether the rank is known to have ended its watch."""
    return state is not None and state.ended is not None


def place(state: RankState) -> str:
    """Where a rank is, in words."""
    step, phase, num_backwards = state.position
    if state.position == NOT_BEGUN:
        where = "before its first step"
    else:
        where = f"at step {step}, {_PHASE_TEXT[Phase(phase)]}"
        where += f" {num_backwards}" if phase == Phase.BACKWARD else ""
    if state.paused is not None:
        where += f", paused for {state.paused}"
    return where if state.ended is None else f"{where}, {state.ended}"


def rank_list(ranks: Collection[int]) -> str:
    """`rank 3` or `ranks 0-6,9`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _last_seen(rank: int, state: RankState | None) -> str:
    if state is None:
        return f"rank {rank} never reported: its watch did not start"
    return f"rank {rank} (host {state.host}, pid {state.pid}): last seen {place(state)}"
