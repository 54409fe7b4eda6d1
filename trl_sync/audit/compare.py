"""The audit's collectives: numbers that every rank must share, and what to show if not.

Every rank calls them in the same order. On the healthy path there is one, of constant size. Only
the sharded tensors of manifests are gathered elsewhere, on the groups that the engine uses.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trl_sync.audit.findings import Difference
from trl_sync.audit.localize import compare_with_reference
from trl_sync.audit.state_store import default_store
from trl_sync.audit.tensor_bytes import host_bytes
from trl_sync.errors import AuditError

# Every rank makes its comparisons in the same order, so equal numbers meet.
_meetings = itertools.count()


class Comparison:
    """Compares this rank with the others, on a gloo group of its own.

    With one rank everything is equal and nothing is sent. `on_failure` is asked for the error to
    raise when a collective fails because a rank is gone.

    Creating it is collective: every rank of the default group must do so at the same place.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        meeting_s: float = 600.0,
        on_failure: Callable[[RuntimeError], Exception] | None = None,
    ) -> None:
        self._on_failure = on_failure
        self._closed = False
        distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if distributed else 1
        self.rank = dist.get_rank() if distributed else 0
        self.ranks = tuple(range(self.world_size))
        self._group: Any = None
        self._timeout = timedelta(seconds=timeout_s)
        self._parts: list[Comparison] = []
        if self.world_size > 1:
            self._meet(meeting_s)
            # A group of its own: training's collectives, on another backend perhaps, never
            # interleave with the audit's.
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def _meet(self, timeout_s: float) -> None:
        """Waits until every rank is here; without a collective, which would wait half an hour.

        Raises:
            AuditError: some are not, after `timeout_s`.
        """
        store, number = default_store(), next(_meetings)
        keys = [f"trl_sync/audit/{number}/{rank}" for rank in range(self.world_size)]
        store.set(keys[self.rank], b"here")
        try:
            store.wait(keys, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            raise AuditError(
                f"Rank(s) {', '.join(missing)} have not begun an audit within {timeout_s:g} s of "
                f"rank {self.rank}. Every rank needs it: add the callback on all of them."
            ) from error

    def split(self, partition: Sequence[Sequence[int]]) -> Comparison | None:
        """A comparison of this rank with the others of its group; None if it is in none.

        Collective: every rank passes the same disjoint groups of global ranks, in the same order.
        Closing this comparison closes it as well.
        """
        own: Comparison | None = None
        for ranks in partition:
            group = dist.new_group(list(ranks), backend="gloo", timeout=self._timeout)
            if self.rank in ranks:
                own = copy.copy(self)
                own._group, own._parts = group, []
                own.ranks, own.world_size = tuple(ranks), len(ranks)
        if own is not None:
            self._parts.append(own)
        return own

    def agree(self, values: Sequence[int]) -> list[bool]:
        """True where every rank passed the same number; the list is the same on every rank.

        `values` are signed 64-bit and as many on every rank. One all-reduce MAX of [x, ~x] gives
        the largest and the smallest of each; unlike -x, ~x is exact for every int64.
        """
        if self._is_alone():
            return [True] * len(values)
        own = torch.tensor(values, dtype=torch.int64)
        both = torch.cat([own, ~own])
        self._run(lambda: dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._group))
        largest, smallest = both.chunk(2)
        return (largest == ~smallest).tolist()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by its place in the group; anything that pickles."""
        if self._is_alone():
            return [value]
        gathered: list[Any] = [None] * self.world_size
        self._run(lambda: dist.all_gather_object(gathered, value, group=self._group))
        return gathered

    def localize(self, tensor: Tensor | None, reference_rank: int) -> Difference | None:
        """Where the lowest rank that differs parts from `reference_rank`, the same on every rank.

        None if a rank lacks the tensor, its shape or type differs, or nothing differs. One copy of
        the tensor's bytes is held on the host.
        """
        if self._is_alone():
            return None
        form = None if tensor is None else (tuple(tensor.shape), str(tensor.dtype))
        forms = self.gather(form)
        if tensor is None or any(other != form for other in forms) or not tensor.numel():
            return None
        own = host_bytes(tensor)
        sent = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        self._run(lambda: dist.broadcast(sent, src=reference_rank, group=self._group))
        reference = sent.view(tensor.dtype).view(tensor.shape)
        difference = compare_with_reference(tensor, reference, self.rank, reference_rank)
        return next((found for found in self.gather(difference) if found is not None), None)

    def broadcast(self, tensor: Tensor, source_rank: int) -> None:
        """`tensor` of `source_rank` on every rank, in place, bit for bit."""
        if self._is_alone() or not tensor.numel():
            return
        sent = torch.frombuffer(bytearray(host_bytes(tensor)), dtype=torch.uint8)
        self._run(lambda: dist.broadcast(sent, src=source_rank, group=self._group))
        with torch.no_grad():
            tensor.data.copy_(sent.view(tensor.dtype).view(tensor.shape))

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self.gather(None)

    def close(self) -> None:
        """Gives the groups back; the default group must still be there."""
        for part in self._parts:
            part.close()
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group, self._closed = None, True

    def _is_alone(self) -> bool:
        """True with one rank.

        Raises:
            AuditError: the group was given back; "equal" would mean nothing now.
        """
        if self._closed:
            raise AuditError("This audit has ended: attach a new one to go on.")
        return self._group is None

    def _run(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            if self._on_failure is None:
                raise
            raise self._on_failure(error) from error
