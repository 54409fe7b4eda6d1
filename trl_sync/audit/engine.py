"""What runs the ranks, whether it really does, and what it keeps from the audit."""

from __future__ import annotations

import os
from typing import Any

from trl_sync.audit.findings import Cause, Finding, Scope
from trl_sync.audit.inventory import Inventory
from trl_sync.audit.sharding import Reach

_TENSOR_SCOPES = (
    Scope.TRAINABLE,
    Scope.GRADIENTS,
    Scope.FROZEN,
    Scope.QUANTIZATION,
    Scope.OPTIMIZER,
)


def not_distributed(state: Any, num_processes: int, wants_fsdp: bool = False) -> Finding | None:
    """The finding if the launcher started several processes, or FSDP, and accelerate has neither.

    `state` is an accelerate `Accelerator` or state; `num_processes` those that exchange checksums.
    `wants_fsdp`: the training arguments ask for FSDP.
    """
    rank = int(os.environ.get("RANK", "0"))
    # accelerate may make a process group and train on each rank alone all the same.
    num_processes = min(num_processes, int(getattr(state, "num_processes", num_processes)))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and num_processes != launched:
        text = (
            f"The launcher started {launched} processes (WORLD_SIZE={launched}), but here "
            f"accelerate runs {num_processes}: each believes it is alone. On CPUs pass "
            "use_cpu=True in the training arguments (or Accelerator(cpu=True))."
        )
    elif (wants_fsdp or _asks_for_fsdp()) and engine_name(state) != "FSDP":
        place = "the training arguments" if wants_fsdp else "ACCELERATE_USE_FSDP"
        text = (
            f"FSDP was asked for ({place}), but accelerate runs "
            f"{engine_name(state)}: it offers FSDP on accelerators only."
        )
    else:
        return None
    return Finding(cause=Cause.NOT_DISTRIBUTED, step=0, ranks=(rank,), evidence=text)


def engine_name(state: Any) -> str:
    """accelerate's name of the engine: NO, MULTI_GPU, DEEPSPEED, FSDP ..."""
    kind = getattr(state, "distributed_type", "NO")
    return str(getattr(kind, "value", kind))


def unavailable_scopes(state: Any) -> dict[Scope, str]:
    """The scopes that cannot be checked under this engine, each with the reason."""
    engine = engine_name(state)
    if engine == "DEEPSPEED":
        stage = zero_stage(state)
        form = f"ZeRO-{stage} partitions it" if stage else "DeepSpeed keeps it in its own form"
        return {
            Scope.GRADIENTS: "DeepSpeed reduces and uses gradients inside backward, and keeps no "
            ".grad",
            Scope.OPTIMIZER: f"{form}: no other rank holds the same part",
        }
    if engine == "MEGATRON_LM":
        return dict.fromkeys(_TENSOR_SCOPES, "Megatron-LM: its sharded state is not known here")
    if is_fsdp1(state):
        return dict.fromkeys(
            _TENSOR_SCOPES, "FSDP1 mixes tensors in flat shards: use FSDP2 (fsdp_version: 2)"
        )
    return {}


def needless_scopes(world_size: int) -> dict[Scope, str]:
    """The scopes that say nothing where there are so many ranks, each with the reason."""
    if world_size > 1:
        return {}
    return {Scope.GRADIENTS: "one rank: there is no other to compare with"}


def uncompared_parts(state: Any, inventory: Inventory) -> dict[Scope, str]:
    """What cannot be compared of scopes that are audited otherwise, each with the reason."""
    found = {}
    if keeps_no_gradients(state):
        found[Scope.ROLES] = (
            "never_updated: whether a parameter should have moved is read from .grad, which "
            "DeepSpeed does not keep"
        )
    trainable = inventory.trainable
    alone = sum(layout.reach is Reach.SELF for layout in trainable.layouts)
    if alone:
        text = (
            f"those of {alone} of {len(trainable)} parameters, which are sharded over all ranks: "
            "no other rank holds the same part"
        )
        found[Scope.GRADIENTS] = found[Scope.OPTIMIZER] = text
    return found


def keeps_no_gradients(state: Any) -> bool:
    """True if the engine has used and dropped the gradients before anybody can look at them."""
    return engine_name(state) == "DEEPSPEED"


def zero_stage(state: Any) -> int:
    """DeepSpeed's ZeRO stage."""
    return int(getattr(getattr(state, "deepspeed_plugin", None), "zero_stage", 3))


def is_fsdp1(state: Any) -> bool:
    """True if accelerate runs the older FSDP."""
    plugin = getattr(getattr(state, "state", state), "fsdp_plugin", None)
    return engine_name(state) == "FSDP" and int(getattr(plugin, "fsdp_version", 2)) == 1


def _asks_for_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
