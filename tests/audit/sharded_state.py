"""What one of four ranks sees of DTensors and modules that FSDP2 shards; torch and gloo only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from trl_sync.audit.compare import Comparison
from trl_sync.audit.config import AuditConfig
from trl_sync.audit.findings import Scope
from trl_sync.audit.inventory import Inventory
from trl_sync.audit.judge import Judge
from trl_sync.audit.sharding import layout_of, local_tensor, sharded_parameters
from trl_sync.audit.snapshot import Kind
from trl_sync.audit.snapshotter import Snapshotter
from trl_sync.audit.update_hooks import on_backward_through


def look() -> dict[str, Any]:
    """Everything that is asked of the layouts, on this rank."""
    dist.init_process_group("gloo")
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return {
        "layouts": layouts(pairs),
        "gathered": gathered_root(pairs),
        "backward": backward(),
        "split": split(),
        "declared": declared_move(),
    }


def layouts(pairs: DeviceMesh) -> dict[str, tuple[Any, ...]]:
    """Reach, holders and reason of tensors that are placed in every way there is."""
    line = init_device_mesh("cpu", (4,))
    half = DeviceMesh("cpu", [0, 1])
    whole = torch.arange(12.0).view(6, 2)
    tensors: dict[str, Tensor] = {
        "plain": whole,
        "sharded": distribute_tensor(whole, line, [Shard(0)]),
        "replicated": distribute_tensor(whole, line, [Replicate()]),
        "hybrid": distribute_tensor(whole, pairs, [Replicate(), Shard(0)]),
        "hybrid, other axis": distribute_tensor(whole, pairs, [Shard(0), Replicate()]),
        "sharded twice": distribute_tensor(whole, pairs, [Shard(0), Shard(1)]),
        "partial sums": DTensor.from_local(whole, pairs, [Partial(), Shard(0)]),
        "half the ranks": DTensor.from_local(whole, half, [Replicate()], run_check=False),
        "half the ranks, sharded": DTensor.from_local(whole, half, [Shard(0)], run_check=False),
    }
    found = {}
    for name, tensor in tensors.items():
        layout = layout_of(tensor, dist.get_rank(), 4)
        found[name] = (layout.reach.value, layout.holders, layout.partition, layout.reason)
    return found


def gathered_root(pairs: DeviceMesh) -> dict[str, Any]:
    """The inventory before and after a forward, after which the root shows whole parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    fully_shard(model, mesh=pairs)
    optimizer = torch.optim.AdamW(model.parameters())
    inventory = Inventory(model, optimizer)
    before, version = inventory.schema(), inventory.version
    with torch.no_grad():
        model(torch.ones(2, 4))
    shown = [type(parameter).__name__ for parameter in model.parameters()]
    inventory.refresh(force=True)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    seen = inventory.trainable.tensors
    model.add_module("late", nn.Linear(3, 3))
    inventory.refresh()
    found = {
        "shown": set(shown),
        "same as held": [a is b for a, b in zip(seen, held, strict=True)],
        "still gathered": len(sharded_parameters(model)),
        "unchanged": inventory.schema()[: len(before)] == before and version == 1,
        "schema": before,
        "local rows": [len(tensor) for tensor in inventory.trainable.own()],
        "reaches": [reach.value for reach in inventory.trainable.reaches() or ()],
        "partition": inventory.partition,
        "plain": inventory.looked_at(Scope.BUFFERS).reaches(),
    }
    inventory.close()
    return found


def backward() -> list[int]:
    """How often the hook is called: in a forward without gradients, and in two with."""
    model = nn.Linear(2, 2)
    calls: list[int] = []
    undo = on_backward_through(model, lambda: calls.append(1))
    counts = []
    with torch.no_grad():
        model(torch.ones(1, 2))
    counts.append(len(calls))
    outputs = [model(torch.ones(1, 2)) for _ in range(2)]
    torch.stack(outputs).sum().backward()
    counts.append(len(calls))
    undo()
    model(torch.ones(1, 2)).sum().backward()
    counts.append(len(calls))
    return counts


def split() -> dict[str, Any]:
    """Comparisons within pairs, in which one pair differs."""
    comparison = Comparison(timeout_s=60)
    pairs = comparison.split([(0, 2), (1, 3)])
    assert pairs is not None
    rank = comparison.rank
    tensor = torch.tensor([1.0, 2.0 if rank < 3 else 4.0])
    found = {
        "own": pairs.agree([rank % 2]),
        "mixed": pairs.agree([7, rank if rank % 2 else 0]),
        "gathered": pairs.gather(rank),
        "ranks": pairs.ranks,
    }
    difference = pairs.localize(tensor, reference_rank=pairs.ranks[0])
    found["difference"] = None if difference is None else (difference.rank, difference.index)
    comparison.close()
    return found


def declared_move() -> list[tuple[Any, ...]]:
    """Three audits of a frozen model, of which one rank's shard moves before the second: equal,
    still parted, parameters were equal, findings.
    """
    model = nn.Linear(8, 8).requires_grad_(False)
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    inventory, comparison = Inventory(model), Comparison(timeout_s=60)
    snapshotter = Snapshotter(inventory, AuditConfig(), [Scope.FROZEN])
    snapshotter.declared_sync = "the reference follows"
    judge = Judge(comparison, snapshotter, 1)
    found = []
    for step, kind in enumerate((Kind.BEGIN, Kind.FULL, Kind.FULL)):
        if step == 1 and comparison.rank == 1:
            local_tensor(model.weight).data.add_(1.0)
        report, _ = judge.judge(snapshotter.full(kind, step, step + 1, 0))
        findings = [(f.cause.value, f.ranks, f.fatal) for f in report.findings]
        found.append((report.equal, report.still_parted, judge.parameters_were_equal, findings))
    snapshotter.close()
    comparison.close()
    return found
