"""Which tensors of a training a manifest holds: whole ones, sharded ones, and ZeRO's partitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trl_sync.audit.findings import Scope
from trl_sync.audit.inventory import Inventory, torch_optimizer
from trl_sync.audit.manifest_format import TensorRecord, packed_weights
from trl_sync.audit.manifest_shards import ShardedTensor
from trl_sync.audit.manifest_tensors import record_tensor
from trl_sync.audit.named_tensors import NamedTensors
from trl_sync.audit.sharding import Form, Layout, Reach, local_tensor

SCOPES = (Scope.TRAINABLE, Scope.FROZEN, Scope.QUANTIZATION, Scope.BUFFERS, Scope.OPTIMIZER)


def whole_tensors(inventory: Inventory) -> dict[str, list[tuple[str, Tensor]]]:
    """The tensors that every rank holds in full, by scope."""
    packed = packed_weights(inventory.quantization.names)
    return {
        scope.value: [
            (name, _as_bytes(tensor) if name in packed else local_tensor(tensor))
            for name, tensor, layout in _members(inventory, scope)
            if not _is_sharded(layout)
        ]
        for scope in SCOPES
    }


def sharded_tensors(inventory: Inventory) -> list[ShardedTensor]:
    """The tensors of which each rank holds a part, in the same order on every rank."""
    packed = packed_weights(inventory.quantization.names)
    return [
        ShardedTensor(
            scope=scope.value, name=name, tensor=tensor, layout=layout, as_bytes=name in packed
        )
        for scope in SCOPES
        for name, tensor, layout in _members(inventory, scope)
        if _is_sharded(layout)
    ]


def partitioned_by(inventory: Inventory) -> str | None:
    """The ZeRO optimizer that keeps its state in partitions without names; None without one."""
    optimizer: Any = inventory.optimizer
    while optimizer is not None:
        if any(cls.__name__ == "ZeROOptimizer" for cls in type(optimizer).__mro__):
            return str(getattr(optimizer, "zero_stage_string", type(optimizer).__name__))
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def own_partitions(inventory: Inventory) -> dict[str, TensorRecord]:
    """This rank's partitions of the optimizer: the values it updates, and its state of them.

    Numbered in the order in which the optimizer updates them, which a checkpoint keeps.
    """
    if partitioned_by(inventory) is None:
        return {}
    records = {}
    state = torch_optimizer(inventory.optimizer).state
    for number, (values, own) in enumerate(state.items()):
        tensors = {"values": values.detach(), **own}
        for key, value in sorted(tensors.items()):
            if isinstance(value, Tensor):
                records[f"partition_{number}.{key}"] = record_tensor(value)
    return records


def _members(inventory: Inventory, scope: Scope) -> Iterator[tuple[str, Any, Layout]]:
    if scope is Scope.OPTIMIZER and partitioned_by(inventory) is not None:
        return
    named: NamedTensors = inventory.optimizer_state()
    if scope is not Scope.OPTIMIZER:
        named = getattr(inventory, scope.value)
    yield from zip(named.names, named.tensors, named.layouts, strict=True)


def _is_sharded(layout: Layout) -> bool:
    return layout.form is Form.PARTITION or (
        layout.form is Form.DTENSOR and layout.reach is not Reach.ALL
    )


def _as_bytes(packed: Tensor) -> Tensor:
    """4-bit weights as the bytes they are, one in a row."""
    # `data` is a plain tensor: methods of the parameter itself may quantize.
    plain = local_tensor(packed).data
    return plain.contiguous().view(-1).view(torch.uint8).view(-1, 1)
