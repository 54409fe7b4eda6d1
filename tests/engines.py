"""Brings DeepSpeed and FSDP2 up on CPU ranks, with the environment that their launcher would make.

`PartialState` is made beforehand, because accelerate offers neither on CPUs by itself: DeepSpeed
with gloo must be asked for, and FSDP2 on a CPU silently becomes DDP, so for it the choice of
backend is replaced. Nothing else of accelerate, DeepSpeed or torch is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ranks

_CPU = {"ACCELERATE_TORCH_DEVICE": "cpu"}
_DEEPSPEED = {**_CPU, "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
_FSDP2 = {
    **_CPU,
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
_MESH = "PARALLELISM_CONFIG_"
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    **{
        f"zero{stage}": {**_DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
        for stage in (1, 2, 3)
    },
    "fsdp2": _FSDP2,
    "hsdp": {
        **_FSDP2,
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        f"{_MESH}DP_REPLICATE_SIZE": "2",
        f"{_MESH}DP_SHARD_SIZE": "2",
    },
}
RANKS = {"hsdp": 4}


def run_on_engine(
    engine: str,
    function: Callable[..., Any],
    *args: Any,
    num_ranks: int | None = None,
    deadline_s: float = 300,
    mixed_precision: str = "no",
) -> list[Any]:
    """What `function(*args)` returned on each rank of `engine`; see `ranks.run_on_ranks`."""
    return ranks.run_on_ranks(
        _on_engine,
        engine,
        function,
        args,
        num_ranks=num_ranks or RANKS.get(engine, 2),
        deadline_s=deadline_s,
        environment=ENVIRONMENTS[engine] | {"ACCELERATE_MIXED_PRECISION": mixed_precision},
    )


def settings(engine: str) -> dict[str, Any]:
    """What the arguments of a trainer need beside the environment, on CPU ranks."""
    if engine in ("ddp", "none"):
        return {"use_cpu": True}
    return {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}


def bring_up(engine: str) -> None:
    """Makes this rank's `PartialState` with gloo."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if engine.startswith("zero"):
        PartialState(backend="gloo")
    elif engine in ("fsdp2", "hsdp"):
        PartialState._prepare_backend = _gloo(DistributedType.MULTI_GPU)
        PartialState()


def start_anew(engine: str) -> None:
    """Lets a second trainer be made in this process, as a new process would."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    bring_up(engine)


def _gloo(kind: Any) -> Callable[..., tuple[str, Any]]:
    def prepare_backend(*args: Any, **kwargs: Any) -> tuple[str, Any]:
        return "gloo", kind

    return prepare_backend


def _on_engine(engine: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    bring_up(engine)
    return function(*args)
