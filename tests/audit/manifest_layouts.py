"""What one of four ranks records of tensors in several layouts; torch and gloo only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trl_sync.audit.compare import Comparison
from trl_sync.audit.manifest_format import Manifest, TensorRecord
from trl_sync.audit.manifest_shards import (
    Records,
    ShardedTensor,
    look_at_sharded,
    record_sharded,
)
from trl_sync.audit.manifest_tensors import check_tensors
from trl_sync.audit.sharding import layout_of
from trl_sync.errors import CheckpointError

SCOPE = "trainable"
ROWS = {
    "even": 8,
    "uneven": 6,
    "fewer": 2,
}  # of 4 columns; 6 rows over 4 ranks are 2, 2, 2 and none
STRUCK = 3


def whole(rows: int) -> Tensor:
    return torch.arange(4.0 * rows).view(rows, 4) + rows


def look() -> dict[str, Any]:
    """All that is asked, on this rank."""
    dist.init_process_group("gloo")
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    line = init_device_mesh("cpu", (4,))
    layouts = {
        "line": sharded(line, [Shard(0)]),
        "pairs": sharded(pairs, [Replicate(), Shard(0)]),
        "columns": sharded(line, [Shard(1)]),
        "twice": sharded(pairs, [Shard(0), Shard(1)]),
    }
    comparison = Comparison(timeout_s=60)
    records = {name: record_sharded(comparison, made, {}) for name, made in layouts.items()}
    found: dict[str, Any] = {
        "sums": {n: {k: r.xxh3_128 for k, r in made[SCOPE].items()} for n, made in records.items()},
        "parts": {
            n: {k: dict(r.parts) for k, r in made[SCOPE].items()} for n, made in records.items()
        },
        "again": recorded_again(comparison, layouts["line"], records["line"]),
        "parted": parted(comparison, layouts["line"]),
    }
    found["equal"] = across(comparison, layouts, records)
    strike(layouts)
    found["struck"] = across(comparison, layouts, records)
    found["without manifest"] = without_manifest(comparison, layouts["columns"], records["pairs"])
    return found


def sharded(mesh: DeviceMesh, placements: list[Any]) -> list[ShardedTensor]:
    members = []
    for name, rows in ROWS.items():
        tensor = distribute_tensor(whole(rows), mesh, placements)
        layout = layout_of(tensor, dist.get_rank(), 4)
        members.append(ShardedTensor(scope=SCOPE, name=name, tensor=tensor, layout=layout))
    return members


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the tensors that are gathered in the block."""
    names: list[str] = []
    gather = ShardedTensor.gather

    def counting(member: ShardedTensor) -> Tensor:
        names.append(member.name)
        return gather(member)

    with mock.patch.object(ShardedTensor, "gather", counting):
        yield names


def recorded_again(
    comparison: Comparison, members: list[ShardedTensor], records: Records
) -> dict[str, Any]:
    """A second and a third save: one value of "even" on the last rank has changed in between."""
    first = records if comparison.rank == 0 else {}
    with counted() as unchanged:
        same = record_sharded(comparison, members, first)
    held = members[0].tensor.to_local()
    if comparison.rank == STRUCK:
        held[0, 0] += 1
    with counted() as changed:
        moved = record_sharded(comparison, members, first)
    if comparison.rank == STRUCK:
        held[0, 0] -= 1
    return {
        "unchanged": list(unchanged),
        "changed": list(changed),
        "same": comparison.rank != 0 or same == records,
        "moved": moved[SCOPE]["even"].xxh3_128,
    }


def parted(comparison: Comparison, members: list[ShardedTensor]) -> str:
    """What a save says if the last rank lacks a tensor."""
    try:
        record_sharded(comparison, members[: 2 if comparison.rank == STRUCK else 3], {})
    except CheckpointError as error:
        return str(error)
    return ""


def strike(layouts: dict[str, list[ShardedTensor]]) -> None:
    """Changes on rank 3 one value of its part of "even" in every layout."""
    if dist.get_rank() == STRUCK:
        for members in layouts.values():
            tensor: DTensor = members[0].tensor
            tensor.to_local()[-1, -1] += 1


def manifest_of(records: dict[str, dict[str, TensorRecord]]) -> Manifest:
    return Manifest(
        package_version="1",
        created="",
        step=1,
        world_size=4,
        verified=True,
        reason=None,
        tensors=records,
        files={},
    )


def across(
    comparison: Comparison,
    layouts: dict[str, list[ShardedTensor]],
    records: dict[str, dict[str, dict[str, TensorRecord]]],
) -> dict[str, tuple[list[str], list[tuple[str, str | None, str]]]]:
    """Each layout against the records of each: what was gathered, and this rank's problems."""
    # As every rank would read it from the file that rank 0 wrote.
    written = comparison.gather(records)[0]
    written["plain"] = {SCOPE: {n: plain_record(n) for n in ROWS}}
    found = {}
    for saved, read in written.items():
        for loaded, members in layouts.items():
            with counted() as names:
                seen = look_at_sharded(comparison, members, read)
            problems = check_tensors(manifest_of(read), seen)
            found[f"{saved} -> {loaded}"] = (
                list(names),
                [(p.kind, p.name, p.detail) for p in problems],
            )
    return found


def plain_record(name: str) -> TensorRecord:
    """The record that an engine which shards nothing would make."""
    import xxhash

    tensor = whole(ROWS[name])
    digest = xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes())
    return TensorRecord(xxh3_128=digest, dtype="float32", shape=tuple(tensor.shape))


def without_manifest(
    comparison: Comparison, members: list[ShardedTensor], records: Records
) -> list[str]:
    """The last rank finds no manifest: it takes part, and has nothing to say."""
    read = comparison.gather(records)[0]
    missing = comparison.rank == STRUCK
    seen = look_at_sharded(comparison, members, None if missing else read)
    return [p.name or "" for p in ([] if missing else check_tensors(manifest_of(read), seen))]
