"""What accelerate runs the ranks with, what PPO refuses there, and parameters made whole.

Nothing here distributes anything: DDP, DeepSpeed's ZeRO and torch's FSDP2 do, through accelerate.
Checked on torch 2.13, accelerate 1.15 and deepspeed 0.19.8.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from trl_sync.backbone.quantization import store_packed_as
from trl_sync.errors import ConfigError


class Engine(StrEnum):
    """How the ranks hold and update the parameters."""

    SINGLE = "one process"
    DDP = "DDP"
    ZERO1 = "ZeRO-1"
    ZERO2 = "ZeRO-2"
    ZERO3 = "ZeRO-3"
    FSDP2 = "FSDP2"

    @property
    def is_deepspeed(self) -> bool:
        return self in (Engine.ZERO1, Engine.ZERO2, Engine.ZERO3)

    @property
    def optimizer_state(self) -> str:
        """Who reads the optimizer state of a checkpoint that this engine wrote."""
        return self.value if self.places_model else "torch"

    @property
    def places_model(self) -> bool:
        """Whether the model comes to its device only when the engine takes it, in `train()`."""
        return self.is_deepspeed or self is Engine.FSDP2

    @property
    def shards_parameters(self) -> bool:
        """Whether each rank holds a part of every parameter, the frozen ones included."""
        return self in (Engine.ZERO3, Engine.FSDP2)


_NO_FSDP1 = (
    "FSDP1 is not supported: it flattens frozen and trained parameters into one, and cannot shard "
    "a 4-bit base. Set fsdp_version: 2 in the accelerate config."
)
_STAGES = {0: Engine.DDP, 1: Engine.ZERO1, 2: Engine.ZERO2, 3: Engine.ZERO3}


def engine_of(accelerator: Accelerator) -> Engine:
    """The engine that `accelerator` runs; DeepSpeed's stage 0 does what DDP does."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _STAGES[int(accelerator.state.deepspeed_plugin.zero_stage)]
    if accelerator.distributed_type == DistributedType.FSDP:
        return Engine.FSDP2
    return Engine.SINGLE if accelerator.num_processes == 1 else Engine.DDP


def check_engine_settings(args: Any) -> None:
    """Nothing, if PPO works under what arguments and launcher ask for.

    Raises:
        ConfigError: names the engine, the reason and the alternative.
    """
    fsdp = _fsdp_settings(args)
    if fsdp is not None:
        _check_fsdp(fsdp)
    if _on(os.environ.get("ACCELERATE_USE_MEGATRON_LM")):
        raise ConfigError(
            "Megatron-LM is not supported: it replaces the model by its own. Use DDP, DeepSpeed's "
            "ZeRO or FSDP2."
        )
    for name, what in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        if _parallel_size(args, name) > 1:
            raise ConfigError(
                f"{what} parallelism ({name}_size={_parallel_size(args, name)}) is not supported: "
                "responses, masks and adapters are whole on each rank here. Set it to 1 and shard "
                "the parameters with FSDP2 (dp_shard_size) or ZeRO-3."
            )


def check_active_engine(args: Any, accelerator: Accelerator) -> None:
    """Nothing, if accelerate runs the engine that was asked for.

    Raises:
        ConfigError: FSDP was asked for and is not active, or an option of it does not fit.
    """
    engine = engine_of(accelerator)
    if engine is Engine.ZERO3 and not args.ds3_gather_for_generation:
        raise ConfigError(
            "ds3_gather_for_generation=False would gather every layer again for every token, in "
            "step on all ranks, which is not supported: set it to True."
        )
    if engine is Engine.FSDP2 and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError(_NO_FSDP1)
    if engine.is_deepspeed and args.value_warmup_steps:
        raise ConfigError(
            f"value_warmup_steps={args.value_warmup_steps} does not work under DeepSpeed, which "
            "updates the policy within backward: set it to 0, or use DDP or FSDP2."
        )
    if engine.places_model and args.save_on_each_node and _several_machines():
        raise ConfigError(
            f"save_on_each_node=True does not work under {engine.value}, whose checkpoints are "
            "spread over all machines: set it to False, and output_dir to shared storage."
        )
    if _fsdp_settings(args) is not None and engine is not Engine.FSDP2:
        raise ConfigError(
            f"FSDP was asked for, but accelerate runs {engine.value}: it offers FSDP on several "
            "processes with accelerators, and falls back in silence elsewhere. Ask for DDP, or run "
            "where FSDP works."
        )


def check_loaded_whole(modules: Mapping[str, nn.Module]) -> None:
    """Nothing, if no parameter was sharded while it was loaded, as tensor parallelism does.

    Raises:
        ConfigError: names the module and how to load it.
    """
    for name, module in modules.items():
        _check_loaded_whole(name, module)


def keep_exact(accelerator: Accelerator, model: nn.Module) -> None:
    """What PPO needs whole: bytes of 4-bit weights, and what the model says in fp32.

    FSDP2 shards floats and leaves bytes whole, so 4-bit weights become the type that it computes
    in: to another one it would convert them. DeepSpeed converts every float to 16 bits, so there
    they become bytes. Log-probabilities and values come out of the model in fp32, and gradients are
    added in fp32; by accelerate's policy FSDP2 would round both to the type it computes in.

    Raises:
        ConfigError: an 8-bit base under FSDP2.
    """
    engine = engine_of(accelerator)
    if engine.is_deepspeed:
        store_packed_as(model, torch.uint8)
    if engine is not Engine.FSDP2:
        return
    if any(hasattr(parameter, "SCB") for parameter in model.parameters()):
        raise ConfigError(
            "An 8-bit base does not run under FSDP2, which replaces the parameters that "
            "bitsandbytes keeps its scales on: use 4 bits, or DDP."
        )
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    computed = getattr(policy, "param_dtype", None)
    store_packed_as(model, computed or torch.float32)
    if computed is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            policy, output_dtype=None, reduce_dtype=torch.float32
        )


def is_prepared(model: nn.Module, wrapped: Any) -> bool:
    """Whether the engine has taken `model`; `wrapped` is what it made of it."""
    from torch.distributed.fsdp import FSDPModule

    return wrapped is not model or isinstance(model, FSDPModule)


def place(model: nn.Module, device: torch.device) -> None:
    """Moves `model` to `device` if a part of it is elsewhere."""
    if any(parameter.device.type != device.type for parameter in model.parameters()):
        model.to(device)


def full_size_bytes(accelerator: Accelerator, model: nn.Module) -> int:
    """The bytes of all parameters of `model` when they are gathered."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    computed = getattr(policy, "param_dtype", None)

    def size(parameter: nn.Parameter) -> int:
        converted = computed is not None and parameter.is_floating_point()
        return computed.itemsize if converted and computed else parameter.element_size()

    return sum(_numel(parameter) * size(parameter) for parameter in model.parameters())


def gathered(model: nn.Module, wrapped: Any, engine: Engine) -> AbstractContextManager[None]:
    """Within the block every parameter of `model` is whole on this rank. Collective at its start.

    `wrapped` is what the engine made of `model`. Inside there are no collectives of the engine, so
    ranks may run different numbers of passes: they generate until their own responses have ended.
    What is written to parameters inside is lost.
    """
    if engine is Engine.ZERO3 and wrapped is not model:
        return _gathered_zero3(wrapped)
    if engine is Engine.FSDP2:
        return _gathered_fsdp2(model)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _gathered_zero3(wrapped: Any) -> Iterator[None]:
    from deepspeed.runtime.zero import unwrap_model_for_generation

    error: BaseException | None = None
    with unwrap_model_for_generation(wrapped):
        try:
            yield
        except BaseException as caught:  # raised below: deepspeed must put its hooks back first
            error = caught
    if error is not None:
        raise error


@contextlib.contextmanager
def _gathered_fsdp2(model: Any) -> Iterator[None]:
    """Each unit gathers before the first forward, whose own hooks then find nothing to gather.

    Private names of torch 2.13: `_get_fsdp_state`, `_lazy_init`, `_fsdp_param_groups` and
    `post_forward_mesh_info`. tests/ppo/test_engines.py fails when one of them moves.
    """
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        yield
        return
    groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    # What each unit does after a forward can be set but not read by public names.
    after_forward = [group.post_forward_mesh_info for group in groups]
    # The first module that runs becomes the root of FSDP, and generation enters below ours.
    model._get_fsdp_state()._lazy_init()
    model.set_reshard_after_forward(False)
    try:
        for unit in units:
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.reshard()
        for group, info in zip(groups, after_forward, strict=True):
            group.post_forward_mesh_info = info


def _fsdp_settings(args: Any) -> dict[str, Any] | None:
    """The version of FSDP and what matters of its options, if arguments or launcher ask for it."""
    if getattr(args, "fsdp", None):
        config = args.fsdp_config or {}
        return {
            "version": int(config.get("version", config.get("fsdp_version", 2))),
            "activation_checkpointing": _on(str(config.get("activation_checkpointing", False))),
        }
    if not _on(os.environ.get("ACCELERATE_USE_FSDP")):
        return None
    return {
        "version": int(os.environ.get("FSDP_VERSION", "1")),
        "activation_checkpointing": _on(os.environ.get("FSDP_ACTIVATION_CHECKPOINTING")),
    }


def _check_fsdp(settings: dict[str, Any]) -> None:
    if settings["version"] != 2:
        raise ConfigError(_NO_FSDP1)
    if settings["activation_checkpointing"]:
        raise ConfigError(
            "fsdp_activation_checkpointing recomputes layers without knowing which adapter each "
            "slice of the batch went through: wrong gradients, in silence. Set it to false, and "
            "gradient_checkpointing=True in PPOConfig."
        )


def _parallel_size(args: Any, name: str) -> int:
    config = getattr(args, "parallelism_config", None)
    if config is not None:
        return int(getattr(config, f"{name}_size", 1) or 1)
    if not _on(os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG")):
        return 1
    return int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1"))


def _check_loaded_whole(name: str, module: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    split = (getattr(module, "tp_size", None) or 1) > 1
    for parameter in module.parameters():
        if split or isinstance(parameter, DTensor):
            raise ConfigError(
                f"The {name} was sharded while it was loaded (tensor or expert parallelism), which "
                "is not supported: load it whole, and shard it with FSDP2 or ZeRO-3."
            )


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _several_machines() -> bool:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return world > int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))


def _on(value: str | None) -> bool:
    return (value or "false").lower() in ("1", "true", "yes")
