from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch.distributed import HashStore

from trl_sync.audit.missing import (
    Sighting,
    find_awaited_pauses,
    find_lagging,
    find_silent,
    update_sightings,
)
from trl_sync.audit.observer import RankObserver, machine
from trl_sync.audit.rank_state import NOT_BEGUN, RankState, Verdict, rank_list
from trl_sync.audit.state_store import StateStore

DEATH_S = 6.0  # how long a killed process may take to die on a machine whose cores are busy


def state(rank: int, position: tuple[int, int, int] = (4, 1, 1), **fields: Any) -> RankState:
    defaults: dict[str, Any] = {
        "host": "node7",
        "machine": "elsewhere",
        "pid": 100 + rank,
        "heartbeat": 1,
        "paused": None,
        "ended": None,
        "store_released": False,
        "verdict": None,
    }
    return RankState(rank=rank, position=position, **{**defaults, **fields})


def sightings_of(*readings: tuple[float, list[RankState | None]]) -> dict[int, Sighting]:
    """The sightings after the readings (time, state of each rank)."""
    sightings: dict[int, Sighting] = {}
    for now_s, states in readings:
        sightings = update_sightings(sightings, dict(enumerate(states)), now_s)
    return sightings


# The verdict's rules.


def test_a_state_survives_the_store() -> None:
    verdict = Verdict(ranks=(2, 3), kind="dead", reason="gone", waited_s=1.5)
    published = state(3, paused="saving", ended="aborted", verdict=verdict)
    assert RankState.decoded(published.encoded()) == published


def test_a_rank_behind_the_others_lags_once_they_have_waited() -> None:
    ahead, behind = state(0, (4, 1, 1)), state(1, (4, 0, 0))
    # Rank 1 has stood at its place since 0 s, but nobody was ahead before 50 s.
    sightings = sightings_of(
        (0, [state(0, (4, 0, 0)), behind]), (50, [ahead, behind]), (59, [ahead, behind])
    )
    assert find_lagging(sightings, now_s=59.9, timeout_s=10) is None
    missing = find_lagging(sightings, now_s=60, timeout_s=10)
    assert missing is not None
    assert (missing.ranks, missing.kind, missing.waited_s) == ((1,), "lagging", 10)


def test_a_step_forward_restarts_the_wait() -> None:
    ahead = state(0, (5, 2, 0))
    sightings = sightings_of(
        (0, [ahead, state(1, (4, 0, 0))]),
        (9, [ahead, state(1, (4, 1, 1))]),
        (18, [ahead, state(1, (4, 1, 2))]),
    )
    assert find_lagging(sightings, now_s=27, timeout_s=10) is None
    assert find_lagging(sightings, now_s=28, timeout_s=10) is not None


def test_ranks_at_one_place_never_lag() -> None:
    both: list[RankState | None] = [state(0), state(1)]
    assert find_lagging(sightings_of((0, both), (1, both)), now_s=1e6, timeout_s=10) is None


def test_only_the_rearmost_is_named() -> None:
    states: list[RankState | None] = [state(0, (5, 4, 0)), state(1, (5, 0, 0)), state(2, (5, 3, 0))]
    missing = find_lagging(sightings_of((0, states)), now_s=10, timeout_s=10)
    assert missing is not None
    assert missing.ranks == (1,)


def test_a_rank_that_never_reported_lags_behind_those_that_moved() -> None:
    assert find_lagging(sightings_of((0, [state(0, NOT_BEGUN), None])), now_s=99, timeout_s=10) is (
        None
    )
    missing = find_lagging(sightings_of((0, [state(0), None])), now_s=10, timeout_s=10)
    assert missing is not None
    assert missing.ranks == (1,)
    assert "rank 1 never reported" in missing.describe()


@pytest.mark.parametrize(
    ("ahead", "behind"),
    [({"paused": "saving"}, {}), ({}, {"paused": "saving"}), ({"ended": "stopped"}, {})],
)
def test_a_pause_or_an_end_is_not_a_lag(ahead: dict[str, Any], behind: dict[str, Any]) -> None:
    states: list[RankState | None] = [state(0, (5, 1, 1), **ahead), state(1, (4, 0, 0), **behind)]
    assert find_lagging(sightings_of((0, states)), now_s=1e6, timeout_s=10) is None
    # Its twin without them does lag.
    plain: list[RankState | None] = [state(0, (5, 1, 1)), state(1, (4, 0, 0))]
    assert find_lagging(sightings_of((0, plain)), now_s=1e6, timeout_s=10) is not None


def test_a_rank_that_stopped_is_not_judged_and_one_that_exited_early_is() -> None:
    stopped: list[RankState | None] = [state(0, (5, 1, 1)), state(1, (4, 5, 0), ended="stopped")]
    assert find_lagging(sightings_of((0, stopped)), now_s=1e6, timeout_s=10) is None
    assert find_silent(sightings_of((0, stopped)), now_s=1e6, timeout_s=1e7) is None
    exited: list[RankState | None] = [state(0, (5, 1, 1)), state(1, (4, 5, 0), ended="exited")]
    missing = find_lagging(sightings_of((0, exited)), now_s=10, timeout_s=10)
    assert missing is not None
    assert missing.ranks == (1,)


def test_the_wait_starts_anew_after_a_pause() -> None:
    ahead, behind = state(0, (5, 1, 1)), state(1, (4, 5, 0))
    sightings = sightings_of((0, [ahead, replace(behind, paused="saving")]), (90, [ahead, behind]))
    assert find_lagging(sightings, now_s=99, timeout_s=10) is None
    assert find_lagging(sightings, now_s=100, timeout_s=10) is not None


def test_an_awaited_pause_is_found() -> None:
    states: list[RankState | None] = [state(0, (5, 1, 1)), state(1, (4, 5, 0), paused="saving")]
    sightings = sightings_of((0, states))
    assert find_awaited_pauses(sightings, now_s=9, timeout_s=10) == {}
    assert find_awaited_pauses(sightings, now_s=10, timeout_s=10) == {1: "saving"}


def test_a_heartbeat_that_stands_still_is_a_death_even_in_a_pause() -> None:
    paused = state(1, paused="saving")
    sightings = sightings_of((0, [state(0), paused]), (5, [state(0, heartbeat=2), paused]))
    assert find_silent(sightings, now_s=9, timeout_s=10) is None
    missing = find_silent(sightings, now_s=12, timeout_s=10)
    assert missing is not None
    assert (missing.ranks, missing.kind, missing.waited_s) == ((1,), "dead", 12)


def test_the_message_says_who_where_and_how_long() -> None:
    others: list[RankState | None] = [state(rank, (118, 1, 2)) for rank in (0, 1, 2)]
    late = state(3, (118, 0, 0), pid=4711)
    missing = find_lagging(sightings_of((0, [*others, late])), now_s=61.25, timeout_s=60)
    assert missing is not None
    lines = missing.describe().splitlines()
    assert lines[:3] == [
        "Rank 3 is lagging: others are further and have waited 61.2 s (timeout_s=60).",
        "  rank 3 (host node7, pid 4711): last seen at step 118, begun, before its backward pass",
        "  ranks 0-2: at step 118, in backward pass 2",
    ]


def test_rank_lists() -> None:
    assert rank_list([3]) == "rank 3"
    assert rank_list([5, 0, 1, 2, 9]) == "ranks 0-2,5,9"


# The exchange, on a store and a clock of the test's own.


def observer_of(
    rank: int, store: HashStore, clock: Callable[[], float], world_size: int = 2
) -> RankObserver:
    return RankObserver(
        rank=rank,
        world_size=world_size,
        timeout_s=10,
        poll_s=1,
        store=StateStore(name="watch", store=store, answer_s=5),
        holder=None,
        clock=clock,
    )


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_both_ranks_name_the_one_that_lags() -> None:
    clock, store = Clock(), HashStore()
    observers = [observer_of(rank, store, clock) for rank in (0, 1)]
    states = [state(0, (3, 1, 1)), state(1, (3, 0, 0))]
    named: list[tuple[int, ...] | None] = [None, None]
    waits = 0
    while None in named and waits < 30:
        for rank in (0, 1):
            missing = observers[rank].exchange(states[rank])
            named[rank] = None if missing is None else missing.ranks
        clock.now_s += 1
        waits += 1
    assert named == [(1,), (1,)]
    assert waits in (11, 12)  # the wait begins with the first reading, or with the second


def test_an_absence_of_the_watch_itself_accuses_nobody() -> None:
    clock, store = Clock(), HashStore()
    observer, other = observer_of(0, store, clock), observer_of(1, store, clock)
    for _ in range(3):
        assert other.exchange(state(1)) is None
        assert observer.exchange(state(0)) is None
        clock.now_s += 1
    clock.now_s += 3600  # both processes were suspended; this one wakes up first
    assert observer.exchange(state(0)) is None
    for _ in range(20):
        clock.now_s += 1
        missing = observer.exchange(state(0))
        if missing is not None:
            break
    assert missing is not None
    assert missing.ranks == (1,)


def test_a_verdict_is_adopted() -> None:
    clock, store = Clock(), HashStore()
    observer, other = observer_of(0, store, clock, 3), observer_of(1, store, clock, 3)
    verdict = Verdict(ranks=(2,), kind="dead", reason="the process is gone", waited_s=0.5)
    other.leave(state(1, ended="aborted", verdict=verdict))
    missing = observer.exchange(state(0))
    assert missing is not None
    assert missing.verdict() == verdict


def test_a_process_that_is_gone_and_one_that_is_a_zombie() -> None:
    clock, store = Clock(), HashStore()
    observer = observer_of(0, store, clock)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        other = observer_of(1, store, clock)
        theirs = state(1, machine=machine(), pid=process.pid)
        other.publish(theirs)
        assert observer.exchange(state(0)) is None
        process.kill()
        deadline = time.monotonic() + DEATH_S
        # Not waited for, it stays as a zombie.
        while observer.find_dead(state(0)) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        missing = observer.find_dead(state(0))
        assert missing is not None
        assert missing.ranks == (1,)
    assert observer.find_dead(state(0)) is not None
    other.publish(replace(theirs, ended="stopped"))
    assert observer.find_dead(state(0)) is None


def test_a_process_of_another_machine_is_not_looked_up() -> None:
    clock, store = Clock(), HashStore()
    observer = observer_of(0, store, clock)
    observer_of(1, store, clock).publish(state(1, pid=2**22 + 1))
    assert observer.exchange(state(0)) is None


def test_one_rank_warns_once_of_an_awaited_pause(caplog: pytest.LogCaptureFixture) -> None:
    clock, store = Clock(), HashStore()
    observers = [observer_of(rank, store, clock, 3) for rank in range(3)]
    states = [state(0, (3, 1, 1)), state(1, (3, 0, 0), paused="evaluation"), state(2, (3, 1, 1))]
    with caplog.at_level(logging.WARNING, "trl_sync.audit"):
        for _ in range(40):
            assert [o.exchange(s) for o, s in zip(observers, states, strict=True)] == [None] * 3
            clock.now_s += 1
    assert [record.getMessage() for record in caplog.records] == [
        "rank 1 paused for evaluation, and others have waited for longer than timeout_s=10."
    ]


class DumbStore:
    """A store that never answers, as one does whose process is frozen."""

    def set(self, key: str, value: Any, /) -> None:
        threading.Event().wait(60)

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        raise AssertionError

    def check(self, keys: list[str], /) -> bool:
        raise AssertionError


def test_a_store_that_does_not_answer_is_an_error_in_time() -> None:
    store = StateStore(name="watch", store=DumbStore(), answer_s=0.1)
    with pytest.raises(RuntimeError, match=r"no answer for 0\.1 s"):
        store.publish(state(0))
    with pytest.raises(RuntimeError, match="has not been reconnected"):
        store.publish(state(0))
