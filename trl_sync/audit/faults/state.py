"""Where each engine keeps what a fault writes to: the one place that tells the engines apart.

Everything here is this rank's own memory: the whole tensor where an engine replicates it, the local
shard of a DTensor (FSDP2), the partition of ZeRO-3. No collectives. Names of DeepSpeed and torch
that are not public were checked on DeepSpeed 0.19.8 and torch 2.13;
tests/audit/test_engine_fault_matrix.py sees when they move.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DeepSpeed's engine and accelerate's wrappers."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """torch's optimizer inside accelerate's and DeepSpeed's."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, the sharded ones also while FSDP2 shows gathered ones in their place.

    The first name counts where modules share a parameter.
    """
    model = unwrap(model)
    sharded = {(id(owner), name): parameter for owner, name, parameter in _sharded_of(model)}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name, shown in module.named_parameters(recurse=False):
            parameter = sharded.get((id(module), name), shown)
            found.setdefault(id(parameter), (f"{prefix}.{name}".lstrip("."), parameter))
    return dict(found.values())


def _sharded_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Module, name and parameter of everything that FSDP2 shards."""
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for sharded in group.fsdp_params:
                info = sharded._module_info
                yield info.module, info.param_name, sharded.sharded_param


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter or gradient, without its autograd history."""
    partition = getattr(tensor, "ds_tensor", None)  # ZeRO-3
    if isinstance(partition, Tensor):
        return partition.data
    tensor = tensor.data
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a matrix as rows; of a ZeRO-3 partition, cut into whole rows."""
    local = local_tensor(parameter)
    shape = getattr(parameter, "ds_shape", None)
    if shape is None:
        return local
    width = math.prod(shape[1:])
    return local[: local.numel() // width * width].view(-1, width)


def quantization_states(model: nn.Module) -> dict[str, Any]:
    """bitsandbytes' state of each 4-bit weight, by the weight's name.

    A weight that FSDP2 sharded has lost it; its layer keeps it for the gathered one.
    """
    layers = dict(unwrap(model).named_modules())
    found = {}
    for name, parameter in named_parameters(model).items():
        layer, _, kind = name.rpartition(".")
        state = getattr(parameter, "quant_state", None)
        if state is None and kind == "weight":
            state = getattr(layers[layer], "quant_state", None)
        if state is not None:
            found[name] = state
    return found


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """What this rank holds of a reduced gradient; under ZeRO only until the engine's step."""
    if parameter.grad is not None:
        return local_tensor(parameter.grad)
    zero = getattr(parameter, "_z3_optimizer", None)
    if zero is not None:
        return _zero3_gradient(zero, parameter)
    fragment = getattr(parameter, "_hp_mapping", None)  # ZeRO-1 and 2, on the rank that updates it
    if fragment is None or fragment.gradient_dict.get(fragment.param_group_index) is None:
        return None
    gradient: Tensor = fragment.get_lp_grad_fragment(vars(parameter)["_index_in_param_group"])
    return gradient


def _zero3_gradient(zero: Any, parameter: nn.Parameter) -> Tensor | None:
    for group, partitions in zero.averaged_gradients.items():
        for owner, partition in zip(zero.fp16_groups[group], partitions or (), strict=False):
            if owner is parameter:
                return partition
    return None


def moment_of(optimizer: Optimizer, parameter: nn.Parameter, name: str) -> Tensor | None:
    """What this rank holds of one moment of a parameter; None without one."""
    zero = getattr(parameter, "_z3_optimizer", None)
    if zero is not None:
        if not any(name in state for state in optimizer.state.values()):
            return None
        partition: Tensor | None = zero.get_local_fp32_param(parameter, name)
        return partition
    fragment = getattr(parameter, "_hp_mapping", None)
    if fragment is not None:
        return (fragment.optim_fragment or {}).get(name)
    found = optimizer.state[parameter].get(name) if parameter in optimizer.state else None
    return local_tensor(found) if isinstance(found, Tensor) else None


def deepspeed_engine() -> Any:
    """The class of DeepSpeed's engine if DeepSpeed is loaded; else None.

    Its `_take_model_step` is one update, whatever calls of torch's optimizers that takes.
    """
    return getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)


def capture(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """A copy of what updates change on this rank: trainable parameters as "model", "optimizer"."""
    trainable = {n: p for n, p in named_parameters(model).items() if p.requires_grad}
    partitions = _zero_partitions(optimizer)
    inner = unwrap_optimizer(optimizer)
    if partitions:
        held: Any = [(p.data, dict(inner.state.get(p, {}))) for p in partitions]
    else:
        held = inner.state_dict()
    state = {"model": {n: local_tensor(p) for n, p in trainable.items()}, "optimizer": held}
    return copy.deepcopy(state)


def restore(model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Puts back what `capture` copied, or two state dicts, into this rank's memory."""
    with torch.no_grad():
        for name, parameter in named_parameters(model).items():
            if name in state["model"]:
                local_tensor(parameter).copy_(local_tensor(state["model"][name]))
    partitions = _zero_partitions(optimizer)
    inner = unwrap_optimizer(optimizer)
    if not partitions:
        inner.load_state_dict(state["optimizer"])
        return
    for partition, (values, moments) in zip(partitions, state["optimizer"], strict=True):
        partition.data.copy_(values)
        for key, held in inner.state.get(partition, {}).items():
            # In place, for the engine holds views. A state of zeros is that of a first update.
            held.copy_(moments.get(key, 0))


def _zero_partitions(optimizer: Any) -> list[Tensor]:
    """The full-precision partitions that ZeRO's optimizer updates on this rank; else none."""
    while optimizer is not None:
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
            if hasattr(optimizer, name):
                return list(getattr(optimizer, name))
        optimizer = getattr(optimizer, "optimizer", None)
    return []
