"""The progress watch: names ranks that are dead or lag, and ends the process, without collectives.

A rank that dies or hangs before its backward pass leaves the others in training's own collective
for as long as its timeout allows, usually half an hour. Here a thread of each rank publishes where
the rank is in the launcher's store and reads where the others are.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing.util
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Literal

from trl_sync.audit.observer import RankObserver, machine
from trl_sync.audit.rank_state import (
    NOT_BEGUN,
    MissingRanks,
    Phase,
    Position,
    RankState,
    Verdict,
)
from trl_sync.audit.state_store import KeyValueStore, StateStore, store_holder
from trl_sync.errors import ConfigError

__all__ = ["EXIT_CODE", "MissingRanks", "Phase", "ProgressWatch", "RankState"]

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the run may be started again from its checkpoint.

_JOIN_S = 2.0  # How long stop() waits for the thread, which may be inside the store.
_REPORT_S = 10.0  # How long the end of the process waits for a report that is being written.

# Every rank makes its watches in the same order, so equal numbers meet.
_watch_numbers = itertools.count()


class ProgressWatch:
    """Watches that all ranks of a training run move on together.

    A rank is dead if its heartbeat stands still for `timeout_s` or, on this host, its process is
    gone. It lags if another rank is ahead and waits while it has not moved for `timeout_s` and does
    not pause. Then `on_missing` is called, once, and the process exits with `EXIT_CODE`. The rank
    that lags comes to the same verdict and ends as well.

    Ranks at the same place are healthy however long they stay: the watch tells a wait from work
    only by somebody being ahead.

    `store` and `name` default to the store of torch's default process group and to the number of
    the watch in this process; both must be the same on all ranks.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        on_missing: Callable[[MissingRanks], None],
        store: KeyValueStore | None = None,
        name: str | None = None,
        poll_s: float | None = None,
        exit_process: Callable[[int], None] = os._exit,
    ) -> None:
        if timeout_s <= 0:
            raise ConfigError(f"timeout_s={timeout_s}: expected a positive number of seconds.")
        # The store hands world_size states to each of world_size ranks: large worlds poll less.
        default_poll_s = min(max(1.0, world_size / 256), timeout_s / 10)
        self.poll_s = default_poll_s if poll_s is None else poll_s
        if not 0 < self.poll_s <= timeout_s / 2:
            raise ConfigError(
                f"poll_s={poll_s}: expected more than 0 and at most half of timeout_s={timeout_s}, "
                "or one late poll would pass for a death."
            )
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self._on_missing = on_missing
        self._store = store
        self._name = name or f"trl_sync/progress_watch/{next(_watch_numbers)}"
        self._exit_process = exit_process
        self._position: Position = NOT_BEGUN
        self._pauses: tuple[str, ...] = ()
        self._ended: Literal["stopped", "exited", "aborted"] | None = None
        self._verdict: Verdict | None = None
        self._wake = threading.Event()
        self._report_lock = threading.RLock()
        self._observer: RankObserver | None = None
        self._thread: threading.Thread | None = None
        self._pid = -1
        self._at_stop: list[Callable[[], None]] = []

    def start(self) -> None:
        """Publishes this rank's state and begins to watch; does nothing in a world of one rank.

        Raises:
            RuntimeError: there is no process group and no store was given, or it does not answer.
        """
        if self._ended is not None:
            raise RuntimeError(
                "start() found a watch that was stopped, which the other ranks no longer judge; "
                "make a new one on every rank."
            )
        if self.world_size == 1 or self._observer is not None:
            return
        self._pid = os.getpid()
        observer = RankObserver(
            rank=self.rank,
            world_size=self.world_size,
            timeout_s=self.timeout_s,
            poll_s=self.poll_s,
            store=StateStore(
                name=self._name,
                store=self._store,
                # Longer than a starved machine takes to answer.
                answer_s=min(5.0, self.timeout_s / 2),
            ),
            holder=store_holder(),
        )
        observer.publish(self._state())
        self._observer = observer
        self._thread = threading.Thread(
            target=self._run, args=(observer,), name="trl_sync progress watch", daemon=True
        )
        self._thread.start()
        # A thread that is inside the store while the interpreter is taken down aborts the process.
        # Unlike atexit this also runs in processes of multiprocessing.
        self._finalizer = multiprocessing.util.Finalize(None, self._exit, exitpriority=0)

    def stop(self) -> None:
        """Ends the watch, within two seconds; the other ranks judge this one no longer."""
        self._end("stopped")

    @property
    def step(self) -> int:
        """The update this rank is in: the next one once the last is audited."""
        step, phase, _ = self._position
        return max(step + (phase == Phase.AUDITED), 1)

    def advance(self, step: int, phase: Phase) -> None:
        """Says where training is; costs one attribute write."""
        self._position = (step, phase, 0)

    def count_backward(self) -> None:
        """Says that one more backward pass has begun; after an update it opens the next step."""
        step, phase, num_backwards = self._position
        if phase > Phase.BACKWARD:
            step, num_backwards = step + 1, 0
        self._position = (step, Phase.BACKWARD, num_backwards + 1)

    def begin_pause(self, reason: str) -> None:
        """Says that this rank does other work, which may take any time; pauses nest."""
        self._pauses = (*self._pauses, reason)

    def end_pause(self) -> None:
        """Ends the innermost pause."""
        if not self._pauses:
            raise RuntimeError("end_pause() found no pause; expected a begin_pause() before it.")
        self._pauses = self._pauses[:-1]

    @contextlib.contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """A pause around the block."""
        self.begin_pause(reason)
        try:
            yield
        finally:
            self.end_pause()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for the other ranks: a pause that is on does not count meanwhile."""
        pauses, self._pauses = self._pauses, ()
        try:
            yield
        finally:
            self._pauses = pauses

    def find_missing(self) -> MissingRanks | None:
        """Who on this host is dead right now, e.g. after a collective said that a peer left."""
        if self._observer is None or not self._is_own_process():
            return None
        return self._observer.find_dead(self._state())

    def report(self, missing: MissingRanks) -> None:
        """Hands `missing` to `on_missing`, unless an earlier verdict was."""
        with self._report_lock:
            self._report_once(missing)

    @contextlib.contextmanager
    def hold_exit(self) -> Iterator[None]:
        """While the block runs, for ten seconds at most, the watch does not end the process."""
        with self._report_lock:
            yield

    def call_at_stop(self, function: Callable[[], None]) -> None:
        """Calls `function` when the watch ends."""
        self._at_stop.append(function)

    def _is_own_process(self) -> bool:
        # A forked child has the object, but neither its thread nor the right to its connection.
        return self._pid == os.getpid()

    def _end(self, ended: Literal["stopped", "exited"] | None) -> None:
        while self._at_stop:
            self._at_stop.pop()()
        if self._thread is None or not self._is_own_process():
            return
        self._ended = self._ended or ended
        self._wake.set()
        self._thread.join(timeout=_JOIN_S)
        self._thread = None
        self._finalizer.cancel()

    def _exit(self) -> None:
        # Nobody stopped the watch. After an error, which the interpreter or multiprocessing still
        # holds, the others must find this rank dead.
        failed = sys.exc_info()[0] is not None or getattr(sys, "last_value", None) is not None
        self._end(None if failed else "exited")

    def _state(self) -> RankState:
        pauses = self._pauses
        return RankState(
            rank=self.rank,
            host=socket.gethostname(),
            machine=machine(),
            pid=self._pid,
            heartbeat=0,
            position=self._position,
            paused=pauses[-1] if pauses else None,
            ended=self._ended,
            store_released=False,
            verdict=self._verdict,
        )

    def _run(self, observer: RankObserver) -> None:
        try:
            missing = self._watch(observer)
            if missing is not None:
                self._end_process(missing)
            elif self._ended is not None and not observer.store_released:
                observer.leave(self._state())
        finally:
            observer.close()

    def _watch(self, observer: RankObserver) -> MissingRanks | None:
        """The first verdict; None if the watch was ended before."""
        pause_s = 0.0
        while not self._wake.wait(pause_s) and not observer.store_released:
            pause_s = self.poll_s
            try:
                missing = observer.exchange(self._state())
            except RuntimeError:
                if self._wake.is_set():
                    return None
                missing = observer.without_store(self._state())
                pause_s = min(0.25, self.poll_s)
            if missing is not None:
                return missing
        return None

    def _end_process(self, missing: MissingRanks) -> None:
        locked = self._report_lock.acquire(timeout=_REPORT_S)
        try:
            self._report_once(missing)
            for stream in (sys.stdout, sys.stderr):
                # A closed pipe, a full disk: nothing may keep the process from its end.
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            self._exit_process(EXIT_CODE)
        finally:
            if locked:
                self._report_lock.release()

    def _report_once(self, missing: MissingRanks) -> None:
        if self._verdict is not None:
            return
        self._verdict, self._ended = missing.verdict(), "aborted"
        try:
            self._on_missing(missing)
        except BaseException:
            # The process must end all the same, and not without the verdict.
            traceback.print_exc()
            print(missing.describe(), file=sys.stderr)
        if self._observer is not None:
            # The others would find this rank dead, and name it.
            self._observer.leave(self._state())
