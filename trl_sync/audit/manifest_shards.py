"""Tensors that ranks hold in parts, for manifests: recorded whole, and compared by parts.

Whole checksums do not depend on the engine or on the number of ranks, so any of them may resume,
and `trl-sync verify --base` compares them with files. They cost a collective for each tensor, which
brings one whole tensor at a time to every rank. Each rank therefore hashes the part it holds as
well, without a collective: where all parts are what they were at the last save, the whole is too.
So the frozen base is gathered at the first save of a run only, after a resume on the same layout
not at all; and a part that differs tells which rank holds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from trl_sync.audit.compare import Comparison
from trl_sync.audit.digest import host_bytes, xxh3
from trl_sync.audit.manifest_format import TensorRecord
from trl_sync.audit.manifest_tensors import SeenTensor, dtype_name
from trl_sync.audit.sharding import Form, Layout, global_shape, own_bytes
from trl_sync.errors import CheckpointError

# Of all that is recorded: scope -> name -> record.
Records = Mapping[str, Mapping[str, TensorRecord]]
_OTHER_TENSORS = "ranks hold different sharded tensors, so none could be gathered"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedTensor:
    """A tensor of which each rank holds a part; `as_bytes` for packed 4-bit weights."""

    scope: str
    name: str
    tensor: Any
    layout: Layout
    as_bytes: bool = False

    @property
    def dtype(self) -> str:
        return "uint8" if self.as_bytes else dtype_name(self.tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return (self.size_bytes, 1) if self.as_bytes else global_shape(self.tensor)

    @property
    def size_bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(global_shape(self.tensor)) * int(self.tensor.dtype.itemsize)

    def own_span(self) -> tuple[int, int] | None:
        """[start, stop) of this rank's bytes in the whole, perhaps empty; None: not one range."""
        own = own_bytes(self.tensor, self.layout.form)
        start = _first_byte(self.tensor, self.layout)
        return None if own is None or start is None else (start, start + own.nbytes)

    def own_part(self) -> dict[str, str]:
        """This rank's bytes as "start:stop", with their checksum; nothing if it holds no range."""
        start, stop = self.own_span() or (0, 0)
        own = own_bytes(self.tensor, self.layout.form)
        return {f"{start}:{stop}": xxh3(own).hex()} if own is not None and start < stop else {}

    @torch.no_grad()
    def gather(self) -> Tensor:
        """The whole tensor, on every rank. A collective on the group that the engine uses."""
        if self.layout.form is Form.DTENSOR:
            whole: Tensor = self.tensor.detach().full_tensor()
            return whole
        return _gather_zero3(self.tensor)


def _first_byte(tensor: Any, layout: Layout) -> int | None:
    """Where this rank's part begins in the whole; None if it is not one range of bytes."""
    size_bytes = int(tensor.dtype.itemsize)
    if layout.form is Form.PARTITION:
        return int(tensor.ds_tensor.numel()) * dist.get_rank(tensor.ds_process_group) * size_bytes
    sharded = [axis for axis, place in enumerate(tensor.placements) if not place.is_replicate()]
    if len(sharded) != 1 or not tensor.placements[sharded[0]].is_shard(0):
        return None
    (axis,) = sharded
    rows, *rest = tensor.shape
    # As `torch.chunk` divides: the last parts are smaller, or empty.
    chunk = -(-rows // tensor.device_mesh.size(axis))
    first_row = min(rows, chunk * tensor.device_mesh.get_local_rank(axis))
    return first_row * math.prod(rest) * size_bytes


def _gather_zero3(tensor: Any) -> Tensor:
    """By torch alone: `deepspeed.zero.GatheredParameters` would partition the parameter again."""
    group = tensor.ds_process_group
    # Bytes, for backends that do not know every type; on the device whose backend the group has.
    own = tensor.ds_tensor.data.to(tensor.device).contiguous().view(-1).view(torch.uint8)
    whole = own.new_empty(own.numel() * dist.get_world_size(group))
    dist.all_gather_single(whole, own, group=group)
    return whole.view(tensor.dtype)[: tensor.ds_numel].view(tensor.ds_shape)


def record_sharded(
    comparison: Comparison, members: Sequence[ShardedTensor], known: Records
) -> dict[str, dict[str, TensorRecord]]:
    """The record of every member, by scope; complete on rank 0. A collective.

    Every rank passes the same members in the same order. `known` are records that rank 0 has of
    them: where all parts are the same, the checksum of the whole is taken from there.

    Raises:
        CheckpointError: ranks hold different members; on every rank.
    """
    everyone = comparison.gather((_names(members), [member.own_part() for member in members]))
    if len({names for names, _ in everyone}) != 1:
        raise CheckpointError(f"{_OTHER_TENSORS}.")
    records: dict[str, dict[str, TensorRecord]] = {}
    by_member = zip(*(own for _, own in everyone), strict=True)
    parts = [_join(own) if comparison.rank == 0 else {} for own in by_member]
    found = [_known_sum(m, p, known) for m, p in zip(members, parts, strict=True)]
    wanted = comparison.gather([i for i, checksum in enumerate(found) if checksum is None])[0]
    for i in wanted:
        found[i] = _gathered_sum(members[i], hashes=comparison.rank == 0)
    for member, own, checksum in zip(members, parts, found, strict=True):
        records.setdefault(member.scope, {})[member.name] = TensorRecord(
            xxh3_128=checksum or "", dtype=member.dtype, shape=member.shape, parts=own
        )
    return records


def _gathered_sum(member: ShardedTensor, *, hashes: bool) -> str:
    """The checksum of the whole, which is freed before the next one is gathered. A collective."""
    whole = member.gather()
    return xxh3(whole).hex() if hashes else ""


def _names(members: Sequence[ShardedTensor]) -> str:
    text = "\n".join(f"{m.scope} {m.name} {m.dtype} {m.shape}" for m in members)
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def _join(own: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The parts of all ranks by position; of replicas that of the lowest rank."""
    # Of equal keys the last one stays.
    joined = {span: checksum for part in reversed(own) for span, checksum in part.items()}
    return dict(sorted(joined.items(), key=lambda item: _bounds(item[0])))


def _bounds(span: str) -> tuple[int, int]:
    start, _, stop = span.partition(":")
    return int(start), int(stop)


def _known_sum(member: ShardedTensor, parts: Mapping[str, str], known: Records) -> str | None:
    """The checksum of the whole, if all its parts are those of the known record."""
    record = known.get(member.scope, {}).get(member.name)
    covered_bytes = sum(stop - start for start, stop in map(_bounds, parts))
    if record is None or record.parts != parts or covered_bytes != member.size_bytes:
        return None
    return record.xxh3_128 if record.shape == member.shape else None


def look_at_sharded(
    comparison: Comparison, members: Sequence[ShardedTensor], written: Records | None
) -> dict[str, list[tuple[str, SeenTensor]]]:
    """What this rank can compare with the records `written`, by scope. A collective.

    Where the manifest has a checksum of just the bytes that a rank holds, that is compared and each
    rank speaks for itself. Otherwise the tensor is gathered, as all ranks must if one has to.
    `written` is None on a rank that has no manifest, which looks at nothing.
    """
    seen = [_part_seen(member, written) for member in members]
    wanted = [i for i, part in enumerate(seen) if part is None and written is not None]
    answers = comparison.gather((_names(members), wanted))
    alike = len({names for names, _ in answers}) == 1
    for i in sorted(set().union(*(theirs for _, theirs in answers))) if alike else ():
        gathered = _gathered_seen(members[i], written)
        seen[i] = seen[i] or gathered
    found: dict[str, list[tuple[str, SeenTensor]]] = {}
    for member, part in zip(members, seen, strict=True):
        looked_at = part or _form(member, unseen=_OTHER_TENSORS)
        found.setdefault(member.scope, []).append((member.name, looked_at))
    return found


def _form(member: ShardedTensor, **seen: Any) -> SeenTensor:
    return SeenTensor(dtype=member.dtype, shape=member.shape, **seen)


def _part_seen(member: ShardedTensor, written: Records | None) -> SeenTensor | None:
    """What is compared without the other ranks; None if the whole tensor is needed."""
    record = (written or {}).get(member.scope, {}).get(member.name)
    if record is None or (record.dtype, record.shape) != (member.dtype, member.shape):
        return _form(member)
    own = member.own_part()
    is_recorded = bool(record.parts) and own.keys() <= record.parts.keys()
    return _form(member, parts=own) if is_recorded and member.own_span() is not None else None


def _gathered_seen(member: ShardedTensor, written: Records | None) -> SeenTensor:
    """Of the whole tensor the recorded parts that this rank's bytes lie in, or all of it.

    A collective; what was gathered is freed before the next one.
    """
    whole, own = member.gather(), member.own_span()
    record = (written or {}).get(member.scope, {}).get(member.name)
    parts = {} if record is None else record.parts
    if not parts or own is None:
        return _form(member, xxh3_128=xxh3(whole).hex())
    data = host_bytes(whole)
    spans = [(a, b) for a, b in map(_bounds, parts) if max(a, own[0]) < min(b, own[1])]
    sums = {f"{a}:{b}": xxhash.xxh3_128_hexdigest(data[a:b]) for a, b in spans}
    return _form(member, parts=sums)
