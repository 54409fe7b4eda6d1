"""The launcher's store as a board on which every rank writes its state and reads the others'."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, runtime_checkable

from trl_sync.audit.rank_state import RankState

_T = TypeVar("_T")


@runtime_checkable
class KeyValueStore(Protocol):
    """The part of a `torch.distributed` store that is used; it raises RuntimeError if it fails."""

    def set(self, key: str, value: Any, /) -> None:
        """Writes `value` under `key`."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """The values of `keys`, all of which exist."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all `keys` exist."""


class StateStore:
    """Reads and writes the ranks' states under one name, over a connection of its own.

    Without `store`, the one of torch's default process group. A call that gets no answer for
    `answer_s` raises RuntimeError, and so do all further ones until `reconnect` succeeds.
    """

    def __init__(self, *, name: str, store: KeyValueStore | None, answer_s: float) -> None:
        self._name = name
        self._answer_s = answer_s
        # A clone has no server: this reference keeps it up where the process group is destroyed
        # while other ranks still read.
        origin: Any = default_store() if store is None else store
        self._origin = origin
        # A client answers one call at a time, and the main thread's may wait for minutes.
        self._connection: Any = origin.clone() if store is None else store
        self._is_clone = store is None
        self._in_step = True
        self._caller = _Caller()
        self._connecting: Future[Any] | None = None
        self._known: set[int] = set()

    def publish(self, state: RankState) -> None:
        """Writes one rank's own state."""
        self._ask(lambda: self._connection.set(self._key(state.rank), state.encoded()))

    def read(self, ranks: Collection[int]) -> dict[int, RankState | None]:
        """The states of `ranks`; None for those that have not published yet."""
        return self._ask(lambda: self._read(ranks))

    def _read(self, ranks: Collection[int]) -> dict[int, RankState | None]:
        # A read of a missing key blocks: ask first, until the key is there.
        unknown = set(ranks) - self._known
        if unknown and self._connection.check([self._key(rank) for rank in unknown]):
            self._known |= unknown  # One question where all are there, as they are after a start.
        for rank in unknown - self._known:
            if self._connection.check([self._key(rank)]):
                self._known.add(rank)
        known = [rank for rank in ranks if rank in self._known]
        values = self._connection.multi_get([self._key(rank) for rank in known]) if known else []
        found = {rank: RankState.decoded(v) for rank, v in zip(known, values, strict=True)}
        return {rank: found.get(rank) for rank in ranks}

    def reconnect(self) -> None:
        """Replaces a connection that failed.

        Raises:
            ConnectionError: nothing listens at the store's address.
            OSError: its host does not answer.
            RuntimeError: something listens and does not answer.
        """
        address = self.address()
        if address is not None:
            # torch itself retries for its whole timeout and prints pages while it does.
            socket.create_connection(address, timeout=1).close()
        if self._is_clone:
            if self._connecting is None or self._connecting.done():
                self._caller.end()
                self._caller = _Caller()
                self._connecting = self._caller.call(self._origin.clone)
            self._connection = self._answer(self._connecting)
        self._in_step = True

    def close(self) -> None:
        """Ends the thread that calls the store."""
        self._caller.end()

    def address(self) -> tuple[str, int] | None:
        """Host and port of the store, if it has an address."""
        store = self._origin
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        return (store.host, store.port) if hasattr(store, "port") else None

    def _ask(self, question: Callable[[], _T]) -> _T:
        if not self._in_step:
            raise RuntimeError("the store did not answer and has not been reconnected since")
        try:
            return self._answer(self._caller.call(question))
        except RuntimeError:
            # An answer that comes late would be taken for that of the next question.
            self._in_step = False
            raise

    def _answer(self, future: Future[_T]) -> _T:
        try:
            return future.result(timeout=self._answer_s)
        except TimeoutError:
            raise RuntimeError(
                f"no answer for {self._answer_s:g} s from {self.address()}"
            ) from None

    def _key(self, rank: int) -> str:
        return f"{self._name}/{rank}"


class _Caller:
    """A daemon thread for calls that may never return.

    torch waits for a store's answer without a limit where the process that holds it is frozen, its
    own timeout notwithstanding.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._run, name="trl_sync store", daemon=True).start()

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """What `function` will return."""
        future: Future[_T] = Future()
        self._calls.put((function, future))
        return future

    def end(self) -> None:
        """Lets the thread end after the calls made so far."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, future = call
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


def default_store() -> Any:
    """The store of torch's default process group.

    The one use of a private name of torch: `_get_default_store`, as of 2.13.

    Raises:
        RuntimeError: there is no default process group.
    """
    from torch.distributed import distributed_c10d

    if not distributed_c10d.is_initialized():
        raise RuntimeError(
            "The progress watch found no default process group, whose store it shares states in: "
            "start it after init_process_group() (or accelerate's PartialState), or pass store=."
        )
    return distributed_c10d._get_default_store()


def store_holder() -> int | None:
    """The rank whose process holds the store; None where the launcher holds it."""
    # torch/distributed/rendezvous.py reads the same variable.
    return None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
