"""What runs the ranks, whether it really does, and what it keeps from the audit."""

from __future__ import annotations

import os
from typing import Any

from trl_sync.audit.findings import Cause, Finding, Scope

_SHARDED = "sharded state is not audited yet"


def not_distributed(state: Any, num_processes: int) -> Finding | None:
    """The finding if the launcher started several processes, or FSDP, and accelerate has neither.

    `state` is an accelerate `Accelerator` or state; `num_processes` those that exchange checksums.
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
    elif _asks_for_fsdp() and engine_name(state) != "FSDP":
        text = (
            "FSDP was asked for (ACCELERATE_USE_FSDP), but accelerate runs "
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
        plugin = getattr(state, "deepspeed_plugin", None)
        stage = int(getattr(plugin, "zero_stage", 3))
        missing = {
            Scope.GRADIENTS: "DeepSpeed updates inside backward and keeps no .grad",
            Scope.OPTIMIZER: f"partitioned by ZeRO-{stage}: {_SHARDED}",
        }
        if stage == 3:
            missing[Scope.TRAINABLE] = missing[Scope.FROZEN] = f"ZeRO-3: {_SHARDED}"
            missing[Scope.QUANTIZATION] = missing[Scope.FROZEN]
        return missing
    if engine in ("FSDP", "MEGATRON_LM"):
        scopes = (
            Scope.TRAINABLE,
            Scope.GRADIENTS,
            Scope.FROZEN,
            Scope.QUANTIZATION,
            Scope.OPTIMIZER,
        )
        return dict.fromkeys(scopes, f"{engine}: {_SHARDED}")
    return {}


def _asks_for_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
