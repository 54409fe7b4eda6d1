"""Which ranks hold the same bytes of a tensor: read from its placements and mesh, never assumed."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Groups of ranks that hold the same shards; every rank is in one of them.
Partition = tuple[tuple[int, ...], ...]


class Form(StrEnum):
    """Where the bytes of a tensor lie that this rank holds."""

    PLAIN = "plain"
    DTENSOR = "dtensor"  # the local shard
    PARTITION = "partition"  # ZeRO-3's partition, `ds_tensor`
    GATHERED = "gathered"  # what ZeRO-3 keeps gathered between steps, beside the partition


class Reach(StrEnum):
    """Whom the bytes are compared with."""

    ALL = "all ranks"
    REPLICAS = "replicas"  # the ranks that hold the same shard, but not all
    SELF = "history"  # nobody else holds them: only what they were before


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one tensor is spread over the ranks; equal on every rank but for `holders`.

    `holders` are the global ranks with the same bytes as this one, `partition` all such groups
    (for `Reach.REPLICAS`). `text` says it in the schema. `reason`: why it cannot be looked at.
    """

    form: Form = Form.PLAIN
    reach: Reach = Reach.ALL
    holders: tuple[int, ...] = ()
    partition: Partition = ()
    text: str = ""
    reason: str | None = None


PLAIN = Layout()


def layout_of(tensor: Tensor, rank: int, world_size: int) -> Layout:
    """The layout of a parameter, buffer or tensor of the optimizer's state on global `rank`."""
    if type(tensor) in (Tensor, nn.Parameter) and not hasattr(tensor, "ds_id"):
        return PLAIN
    if hasattr(tensor, "ds_id"):
        return _zero_layout(tensor, world_size)
    if is_dtensor(tensor):
        dtensor: Any = tensor
        return _dtensor_layout(dtensor.device_mesh, tuple(dtensor.placements), rank, world_size)
    if hasattr(tensor, "device_mesh"):
        return Layout(reason=f"sharded in a way that is not known here ({type(tensor).__name__})")
    if type(tensor).__name__ == "FlatParameter":
        return Layout(reason="sharded by FSDP1, whose flat parameters mix tensors: use FSDP2")
    return PLAIN


def is_dtensor(tensor: object) -> bool:
    """True for torch's DTensor, without importing it where nobody has."""
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def _zero_layout(tensor: Any, world_size: int) -> Layout:
    partition = getattr(tensor, "ds_tensor", None)
    if partition is None:
        return Layout(reason="ZeRO-3 has not partitioned it")
    if getattr(tensor, "ds_secondary_tensor", None) is not None:
        return Layout(reason="ZeRO-3 keeps a second partition of it (hpZ), which may differ")
    group = getattr(tensor, "ds_process_group", None)
    if group is not None and (size := dist.get_world_size(group)) != world_size:
        return Layout(reason=f"partitioned over some of the ranks ({size} of {world_size})")
    # A partition that was moved to a disk has left an empty tensor behind.
    if partition.numel() == 0 and tensor.ds_numel:
        return Layout(reason="ZeRO-3 has moved its partition to a disk")
    return Layout(form=Form.PARTITION, reach=Reach.SELF, text=f"ZeRO-3 over {world_size} ranks")


@functools.lru_cache(maxsize=64)
def _dtensor_layout(mesh: Any, placements: tuple[Any, ...], rank: int, world_size: int) -> Layout:
    """The same for most tensors of a model, and long to find on a large mesh: it is kept."""
    text = f"{', '.join(map(str, placements))} on mesh {tuple(mesh.shape)}"
    if any(placement.is_partial() for placement in placements):
        return Layout(reason=f"its ranks hold partial sums ({text})")
    replicated = [axis for axis, place in enumerate(placements) if place.is_replicate()]
    partition = replica_groups(mesh.mesh, replicated)
    holders = next((group for group in partition if rank in group), ())
    if not holders:
        return Layout(reason=f"rank {rank} is not on its mesh ({text})")
    if sum(map(len, partition)) != world_size:
        return Layout(reason=f"its mesh holds only some of {world_size} ranks ({text})")
    if len(holders) == world_size:
        return Layout(form=Form.DTENSOR, holders=holders, text=text)
    if len(holders) == 1:
        return Layout(form=Form.DTENSOR, reach=Reach.SELF, holders=holders, text=text)
    return Layout(
        form=Form.DTENSOR,
        reach=Reach.REPLICAS,
        holders=holders,
        partition=partition,
        # The groups themselves would fill pages; ranks that see other ones must not be silent.
        text=f"{text}, replicas {zlib.crc32(repr(partition).encode()):08x}",
    )


def replica_groups(mesh: Tensor, replicated: Sequence[int]) -> Partition:
    """The global ranks of `mesh` that hold the same shard: those apart on `replicated` axes only.

    `mesh` has one axis for each dimension of the device mesh, with global ranks as elements.
    """
    kept = [axis for axis in range(mesh.ndim) if axis not in replicated]
    sizes = [mesh.shape[axis] for axis in replicated]
    rows = mesh.permute(*kept, *replicated).reshape(-1, max(1, int(torch.tensor(sizes).prod())))
    return tuple(sorted(tuple(sorted(row)) for row in rows.tolist()))


def own_bytes(tensor: Any, form: Form) -> Tensor | None:
    """What this rank holds of `tensor`; None if it is not there now."""
    if form is Form.PLAIN:
        return tensor
    if form is Form.DTENSOR:
        return local_tensor(tensor)
    if form is Form.PARTITION:
        return _without_padding(tensor)
    available = getattr(tensor.ds_status, "name", "") == "AVAILABLE"
    return tensor.data if available else None


def _without_padding(tensor: Any) -> Tensor:
    """This rank's partition; what fills it up where the elements do not divide is never set."""
    partition: Tensor = tensor.ds_tensor.data
    size = partition.numel()
    start = size * dist.get_rank(tensor.ds_process_group)
    return partition.view(-1)[: max(0, min(size, int(tensor.ds_numel) - start))]


def local_tensor(tensor: Any) -> Any:
    """The shard of a DTensor, every other tensor as it is; unlike `to_local` without autograd.

    The attribute is what `DTensor.__tensor_flatten__` names (torch 2.13).
    """
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def global_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of the whole tensor, whatever part of it this rank holds."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def stays_gathered(tensor: Any) -> bool:
    """True if ZeRO-3 keeps the whole tensor on every rank between steps, as it does small ones."""
    return bool(getattr(tensor, "ds_persist", False))


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that `fully_shard` was applied to."""
    return [m for m in model.modules() if any(c.__name__ == "FSDPModule" for c in type(m).__mro__)]


def has_fsdp1(model: nn.Module) -> bool:
    """True if a module is wrapped by FSDP1."""
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())


def sharded_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """The DTensor behind each parameter that FSDP2 has gathered at the moment, by the id of what
    the module holds now. Only looks: no collective, nothing is sharded again.

    After a forward without backward the root keeps whole parameters, and its modules hold these
    instead of what the optimizer updates.
    """
    return {
        id(module._parameters.get(name)): parameter.sharded_param
        for module, name, parameter in _fsdp_parameters(model)
        if is_gathered_now(parameter)
    }


def fsdp_places(model: nn.Module) -> dict[tuple[int, str], Any]:
    """What FSDP2 knows of each parameter it shards, by the id of its module and its name there."""
    return {(id(module), name): known for module, name, known in _fsdp_parameters(model)}


def is_gathered_now(known: Any) -> bool:
    """True if the module shows something else than the sharded parameter."""
    return known.sharded_state.name != "SHARDED"


def _fsdp_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Module, name and FSDP2's own object for each parameter.

    FSDP2 shows them under private names only (`FSDPModule._get_fsdp_state`, `_fsdp_param_groups`,
    `fsdp_params`, `sharded_param`, `sharded_state`, `_module_info`; torch 2.13);
    tests/audit/test_sharding.py fails when one of them moves.
    """
    root: Any
    for root in fsdp_modules(model):
        for group in root._get_fsdp_state()._fsdp_param_groups:
            for known in group.fsdp_params:
                place = known._module_info
                yield place.module, place.param_name, known
                for module, name in zip(
                    place.shared_modules, place.shared_param_names, strict=True
                ):
                    yield module, name, known


def this_rank() -> tuple[int, int]:
    """Global rank and number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
