"""One audit of one rank: the checksums it took, and the numbers that all ranks must share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import xxhash
from torch import Tensor

from trl_sync.audit.baseline import SliceChecksums
from trl_sync.audit.digest import PendingDigests, combine
from trl_sync.audit.findings import Scope
from trl_sync.audit.liveness import Motion
from trl_sync.audit.roles import LocalFinding
from trl_sync.audit.sharding import Reach


class Kind(IntEnum):
    """What made the audit; ranks that audit for different reasons are out of step."""

    BEGIN = 1
    UPDATE = 2
    FULL = 3
    SELF_TEST = 4


class Slot(StrEnum):
    """Checksums that all ranks compare, in the order in which they come about in an update."""

    BEFORE = "before"
    FROZEN = "frozen"
    QUANTIZATION = "quantization"
    GRADIENTS = "gradients"
    AFTER = "after"
    OPTIMIZER = "optimizer"
    BUFFERS = "buffers"
    RNG = "rng"

    @property
    def scope(self) -> Scope:
        trainable = self in (Slot.BEFORE, Slot.AFTER)
        return Scope.TRAINABLE if trainable else Scope(self.value)


COUNTERS = (
    "kind",
    "algorithm",
    "schema",
    "num_tensors",
    "step",
    "updates",
    "audit",
    "local",
    "replicas",
    "edited",
    "rates",
)


@dataclass(slots=True, kw_only=True)
class Taken:
    """Checksums under way for one slot, with the name of each tensor and whom it is compared with
    (None: all of them with all ranks).
    """

    names: Sequence[str]
    pending: PendingDigests
    reaches: Sequence[Reach] | None = None


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """What one audit of this rank has gathered, before it is compared.

    `updates` counts real optimizer steps since the last audit. `expected` is what liveness expects
    of the update. `gradient_norms` are kept only where the verdict comes late.
    """

    kind: Kind
    step: int
    audit: int
    updates: int
    taken: dict[Slot, Taken] = field(default_factory=dict)
    frozen: SliceChecksums | None = None
    expected: Mapping[str, Motion] = field(default_factory=dict)
    gradient_norms: Sequence[Tensor | None] | None = None
    local: list[LocalFinding] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        size = sum(taken.pending.size_bytes for taken in self.taken.values())
        return size + (self.frozen.pending.size_bytes if self.frozen is not None else 0)


@dataclass(slots=True, kw_only=True)
class Checksums:
    """The checksums of a snapshot, final: `names`, `digests` and `reaches` by slot, in the same
    order; a slot that is not in `reaches` is compared with all ranks.
    """

    names: dict[Slot, Sequence[str]]
    digests: dict[Slot, list[bytes]]
    reaches: dict[Slot, Sequence[Reach]] = field(default_factory=dict)

    def by_name(self, slot: Slot, reach: Reach = Reach.ALL) -> dict[str, bytes]:
        """The checksums of `slot` that are compared with `reach`."""
        pairs = zip(self.names.get(slot, ()), self.digests.get(slot, ()), strict=True)
        reaches = self.reaches.get(slot)
        if reaches is None:
            return dict(pairs) if reach is Reach.ALL else {}
        return {
            name: digest for (name, digest), own in zip(pairs, reaches, strict=True) if own is reach
        }

    def roots(self) -> dict[Slot, bytes]:
        """One checksum a slot, of what all ranks hold alike."""
        return {slot: self._root(slot, Reach.ALL) for slot in self.digests}

    def replica_roots(self) -> dict[Slot, bytes]:
        """One checksum a slot, of the shards that the replicas of this rank hold as well."""
        return {slot: self._root(slot, Reach.REPLICAS) for slot in self.digests}

    def _root(self, slot: Slot, reach: Reach) -> bytes:
        digests, reaches = self.digests[slot], self.reaches.get(slot)
        if reaches is None:
            return combine(digests if reach is Reach.ALL else ())
        return combine(d for d, own in zip(digests, reaches, strict=True) if own is reach)


def header(
    snapshot: Snapshot,
    roots: Mapping[Slot, bytes],
    *,
    algorithm: int,
    schema: int,
    num_tensors: int,
    replicas: int = 0,
    edited: int = 0,
    rates: int = 0,
) -> list[int]:
    """The numbers that every rank must share, as many in every audit: `COUNTERS`, then roots.

    `replicas` has a bit for each slot in which the replicas of this rank differ, `edited` is a
    checksum of the names of its own shards that were edited, `rates` one of its learning rates.
    """
    values = [
        int(snapshot.kind),
        algorithm,
        schema,
        num_tensors,
        snapshot.step,
        snapshot.updates,
        snapshot.audit,
        local_checksum(snapshot.local),
        replicas,
        edited,
        rates,
    ]
    return values + root_words(roots)


def root_words(roots: Mapping[Slot, bytes]) -> list[int]:
    """Two numbers for each slot, in the order of `Slot`."""
    return [word for slot in Slot for word in _words(roots.get(slot, bytes(16)))]


def differing_slots(agreed: Sequence[bool]) -> set[Slot]:
    """The slots whose `root_words` are not the same everywhere."""
    return {slot for i, slot in enumerate(Slot) if not all(agreed[2 * i : 2 * i + 2])}


def as_mask(slots: Collection[Slot]) -> int:
    """A bit for each slot."""
    return sum(1 << i for i, slot in enumerate(Slot) if slot in slots)


def read_header(agreed: Sequence[bool]) -> tuple[set[str], set[Slot]]:
    """The counters and the slots on which ranks differ."""
    counters = {name for name, same in zip(COUNTERS, agreed, strict=False) if not same}
    return counters, differing_slots(agreed[len(COUNTERS) :])


def checksum_of(value: object) -> int:
    """A signed 64-bit checksum of what `repr` shows."""
    return int.from_bytes(xxhash.xxh3_64_digest(repr(value).encode()), "little", signed=True)


def local_checksum(local: Sequence[LocalFinding]) -> int:
    """0 if this rank found nothing by itself; else a checksum of what it found."""
    return checksum_of(local) if local else 0


def _words(digest: bytes) -> tuple[int, int]:
    low = int.from_bytes(digest[:8], "little", signed=True)
    return low, int.from_bytes(digest[8:], "little", signed=True)
