"""The majority's state on every rank: parameters and optimizer state together."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from trl_sync.audit.compare import Comparison
from trl_sync.audit.findings import Cause, Finding, SyncReport
from trl_sync.audit.inventory import Inventory, torch_optimizer
from trl_sync.audit.named_tensors import NamedTensors
from trl_sync.audit.snapshotter import Snapshotter
from trl_sync.errors import DesyncError

logger = logging.getLogger("trl_sync.audit")

# What a majority of ranks can put right. The others need a person: ranks that hold other tensors,
# took other steps, or all did the same wrong thing.
REPAIRABLE = frozenset(
    {
        Cause.INIT_MISMATCH,
        Cause.GRADIENT_NOT_REDUCED,
        Cause.GRADIENT_SCALED_DIFFERENTLY,
        Cause.OPTIMIZER_DIVERGED,
        Cause.STALE_REPLICA,
        Cause.EDITED_OUTSIDE_STEP,
        Cause.FROZEN_CHANGED,
        Cause.QUANTIZATION_CHANGED,
    }
)


def repair(
    comparison: Comparison, inventory: Inventory, report: SyncReport, snapshotter: Snapshotter
) -> None:
    """Copies trainable, frozen, quantization and optimizer state from a rank of the majority.

    Collective. If the ranks parted after the gradients were reduced, the run then equals one that
    never parted, bit for bit. If the difference was there in the forward pass, this step's
    gradients were computed with it on the minority, and stay.

    Raises:
        DesyncError: on every rank, if there is no majority of at least 3 ranks or the cause cannot
            be repaired.
    """
    source = healthy_rank(report, comparison.world_size)
    if source is None:
        raise DesyncError(
            f"{report.describe()}\nNot repaired: that takes at least 3 ranks of which most agree, "
            f"and one of the causes {', '.join(sorted(REPAIRABLE))}.",
            report,
            report.fatal,
        )
    if comparison.rank == 0:
        logger.warning("%s\nRepaired: state copied from rank %d to all.", report.describe(), source)
    for tensors in (inventory.trainable, inventory.frozen, inventory.quantization):
        for _, tensor in tensors.items():
            comparison.broadcast(tensor, source)
    _copy_optimizer(comparison, inventory, source)
    snapshotter.forget()
    _check(comparison, inventory, report)


def healthy_rank(report: SyncReport, num_ranks: int) -> int | None:
    """The lowest rank that no finding names, if most ranks are like it; the same on every rank."""
    wrong = {rank for finding in report.fatal for rank in finding.ranks}
    right = sorted(set(range(num_ranks)) - wrong)
    repairable = all(_repairable(finding, num_ranks) for finding in report.fatal)
    return right[0] if repairable and num_ranks >= 3 and 2 * len(right) > num_ranks else None


def _repairable(finding: Finding, num_ranks: int) -> bool:
    return finding.cause in REPAIRABLE and len(finding.ranks) < num_ranks


def _copy_optimizer(comparison: Comparison, inventory: Inventory, source: int) -> None:
    if inventory.optimizer is None:
        return
    optimizer = torch_optimizer(inventory.optimizer)
    own = [
        {
            "options": {k: _plain(v) for k, v in group.items() if k != "params" and _travels(v)},
            "state": [_form(optimizer.state.get(p, {})) for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    wanted = comparison.gather(own)[source]
    for group, other in zip(optimizer.param_groups, wanted, strict=True):
        for name, value in other["options"].items():
            if isinstance(group.get(name), Tensor):  # a learning rate that a captured graph reads
                group[name].fill_(value)
            else:
                group[name] = value
        for parameter, form in zip(group["params"], other["state"], strict=True):
            _copy_state(comparison, optimizer, parameter, form, source)


def _copy_state(
    comparison: Comparison, optimizer: Any, parameter: Tensor, form: dict[str, Any], source: int
) -> None:
    """The state of one parameter as it is on `source`, made here if it is missing."""
    if not form:
        optimizer.state.pop(parameter, None)
        return
    state = optimizer.state[parameter]
    for key in [key for key in state if key not in form]:
        del state[key]
    for key, value in form.items():
        if not isinstance(value, _TensorForm):
            state[key] = value
            continue
        present = state.get(key)
        if not isinstance(present, Tensor) or _form({key: present})[key] != value:
            device = parameter.device if value.on_parameter_device else torch.device("cpu")
            state[key] = torch.empty(value.shape, dtype=value.dtype, device=device)
        comparison.broadcast(state[key], source)


class _TensorForm(tuple[Any, ...]):
    """Shape, type and place of a tensor that is sent on its own."""

    shape = property(lambda self: self[0])
    dtype = property(lambda self: self[1])
    on_parameter_device = property(lambda self: self[2])


def _form(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _TensorForm((tuple(value.shape), value.dtype, value.device.type != "cpu"))
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }


def _travels(value: Any) -> bool:
    number = isinstance(value, Tensor) and value.numel() == 1
    return number or isinstance(value, int | float | bool | str | tuple | type(None))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _check(comparison: Comparison, inventory: Inventory, report: SyncReport) -> None:
    from trl_sync.audit.digest import combine, digests

    everything = NamedTensors()
    for tensors in (
        inventory.trainable,
        inventory.frozen,
        inventory.quantization,
        inventory.optimizer_state(),
    ):
        for name, tensor in tensors.items():
            everything.add(name, tensor)
    root = combine(digests(everything.tensors))
    words = [int.from_bytes(root[i : i + 8], "little", signed=True) for i in (0, 8)]
    if not all(comparison.agree(words)):
        raise DesyncError(
            f"{report.describe()}\nThe repair did not make the ranks equal.", report, report.fatal
        )
