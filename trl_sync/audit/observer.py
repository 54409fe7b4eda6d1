"""One rank's view of the others: publishes its state, reads theirs and judges who is missing."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from trl_sync.audit.missing import (
    Sighting,
    find_awaited_pauses,
    find_lagging,
    find_silent,
    find_verdict,
    gone,
    known_states,
    update_sightings,
)
from trl_sync.audit.rank_state import MissingRanks, RankState, has_ended, rank_list
from trl_sync.audit.state_store import StateStore

_UNREACHABLE_S = 2.0  # How long a store that refuses connections is tried again.
_LEAVE_S = 1.5  # How long the store's holder waits for the others to need it no longer.

_logger = logging.getLogger("trl_sync.audit")


class RankObserver:
    """Exchanges states through `store` and judges them; `holder` is the rank that holds the store.

    `holder` is None where the launcher holds it. Everything but `find_dead` belongs to one thread.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        poll_s: float,
        store: StateStore,
        holder: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._store = store
        self._holder = holder
        self._clock = clock
        self._heartbeat = 0
        self._watched_s = 0.0
        self._last_clock_s = clock()
        self._asked_s = self._last_clock_s
        self._failing_since_s: float | None = None
        self._sightings: dict[int, Sighting] = {}
        self._processes: dict[int, psutil.Process] = {}
        self._warned_of: set[tuple[int, str]] = set()
        self.store_released = False  # The store's holder has ended: the store may go any time.

    def publish(self, state: RankState) -> None:
        """Writes this rank's own `state`, with a new heartbeat."""
        self._heartbeat += 1
        state = replace(state, heartbeat=self._heartbeat, store_released=self.store_released)
        self._store.publish(state)

    def exchange(self, state: RankState) -> MissingRanks | None:
        """Who is missing, after publishing this rank's own `state` and reading the others'.

        Raises:
            RuntimeError: the store did not answer; see `without_store`.
        """
        now_s = self._advance_clock()
        self._asked_s = self._last_clock_s
        self.publish(state)
        states = self._store.read(self._others)
        states[self._rank] = state
        self._failing_since_s = None
        if self._holder is not None and self._holder != self._rank:
            self._release_store(state, states[self._holder])
        self._sightings = update_sightings(self._sightings, states, now_s)
        self._warn_of_pauses(now_s)
        return (
            find_verdict(self._sightings, states)
            or self.find_dead(state)
            or find_silent(self._others_sightings(), now_s=now_s, timeout_s=self._timeout_s)
            or find_lagging(self._sightings, now_s=now_s, timeout_s=self._timeout_s)
        )

    def find_dead(self, state: RankState) -> MissingRanks | None:
        """The ranks of this host whose process is gone and that had not ended their watch.

        If one of them ended because of a verdict of its own, that one. `state` is this rank's own.
        """
        # The processes come first: a launcher ends the survivors a tenth of a second after a death.
        dead = self._dead_processes()
        if not dead:
            return None
        try:
            latest = self._store.read(dead)
        except RuntimeError:
            latest = {}  # The store died as well: its holder does not leave before it is released.
        verdict = find_verdict(self._sightings, latest)
        if verdict is not None:
            return verdict
        # A rank may have ended its watch and exited after its state was read.
        dead = [rank for rank in dead if not has_ended(latest.get(rank))]
        if not dead:
            return None
        reason = "the process is gone" if len(dead) == 1 else "their processes are gone"
        sightings = self._with_states(latest | {self._rank: state})
        return gone(sightings, dead, now_s=self._watched_s, reason=reason)

    def _with_states(self, states: Mapping[int, RankState | None]) -> dict[int, Sighting]:
        """The sightings with newer `states`, for a message."""
        sightings = dict(self._sightings)
        for rank, state in states.items():
            known = sightings.get(rank)
            if state is not None:
                heard_s = self._watched_s if known is None else known.heard_s
                sightings[rank] = Sighting(state=state, heard_s=heard_s, awaited_since_s=None)
        return sightings

    def without_store(self, state: RankState) -> MissingRanks | None:
        """Who is missing when `exchange` failed; reconnects where the store still answers."""
        if self._failing_since_s is None:
            self._failing_since_s = self._asked_s
        dead = self.find_dead(state)
        if dead is not None:
            return dead
        patience_s = self._timeout_s
        try:
            self._store.reconnect()
        except ConnectionError:
            patience_s = min(_UNREACHABLE_S, self._timeout_s)
        except (OSError, RuntimeError) as error:
            _logger.info("the progress watch could not reconnect to its store: %s", error)
        failing_s = self._clock() - self._failing_since_s
        if failing_s < patience_s:
            return None
        holds = "the launcher holds it" if self._holder is None else "this rank holds it"
        return gone(
            self._sightings,
            [] if self._holder is None else [self._holder],
            now_s=self._watched_s,
            reason=f"the store at {self._store.address()} has not answered for {failing_s:.1f} s, "
            f"and {holds}",
        )

    def leave(self, state: RankState) -> None:
        """Publishes the last `state`; the store's holder waits until the others do without it.

        Ranks that `state` declares dead are not waited for.
        """
        dead: tuple[int, ...] = ()
        if state.verdict is not None and state.verdict.kind == "dead":
            dead = state.verdict.ranks
        awaited = [rank for rank in self._others if rank not in dead]
        try:
            self.publish(state)
            until_s = self._clock() + _LEAVE_S
            while self._rank == self._holder and self._clock() < until_s:
                others = self._store.read(awaited).values()
                if all(o is None or has_ended(o) or o.store_released for o in others):
                    return
                time.sleep(0.02)
        except RuntimeError as error:
            _logger.debug("the store went before this rank ended its watch: %s", error)

    def close(self) -> None:
        """Gives up the connection."""
        self._store.close()

    def _release_store(self, state: RankState, holder: RankState | None) -> None:
        if has_ended(holder):
            self.store_released = True
            self.publish(state)

    def _others_sightings(self) -> dict[int, Sighting]:
        return {rank: seen for rank, seen in self._sightings.items() if rank != self._rank}

    def _advance_clock(self) -> float:
        """The seconds that this rank has watched for.

        Of a longer absence (a suspended container, a main thread that keeps the interpreter's lock)
        only a few polls count: nobody could be heard meanwhile.
        """
        clock_s = self._clock()
        self._watched_s += min(clock_s - self._last_clock_s, 3 * self._poll_s)
        self._last_clock_s = clock_s
        return self._watched_s

    def _dead_processes(self) -> list[int]:
        return [
            state.rank
            for state in known_states(self._others_sightings())
            if state.machine == machine() and state.ended is None and not self._runs(state)
        ]

    def _runs(self, state: RankState) -> bool:
        try:
            if state.rank not in self._processes:
                self._processes[state.rank] = psutil.Process(state.pid)
            process = self._processes[state.rank]
            # is_running() compares times of birth: the process id may have been given away.
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _warn_of_pauses(self, now_s: float) -> None:
        awaited = find_awaited_pauses(self._sightings, now_s=now_s, timeout_s=self._timeout_s)
        waiting = [
            state.rank
            for state in known_states(self._sightings)
            if state.paused is None and state.ended is None
        ]
        # One rank speaks for all.
        if self._rank != min(waiting, default=None):
            return
        new = {rank: r for rank, r in awaited.items() if (rank, r) not in self._warned_of}
        self._warned_of.update(new.items())
        for reason in sorted(set(new.values())):
            _logger.warning(
                "%s paused for %s, and others have waited for longer than timeout_s=%g.",
                rank_list([rank for rank in new if new[rank] == reason]),
                reason,
                self._timeout_s,
            )


@functools.cache
def machine() -> str:
    """A name that is equal for processes that can look up each other's process ids."""
    name = socket.gethostname()
    # Containers may share a host name; where there is no /proc, there are no containers.
    with contextlib.suppress(OSError):
        name += " " + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        name += " " + os.readlink("/proc/self/ns/pid")
    return name
