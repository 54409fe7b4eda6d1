"""`trl-sync env --plan`: whether PPO on a model fits into a GPU's memory under an engine."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.table import Table

from trl_sync.cli.console import make_console, make_table
from trl_sync.errors import ConfigError
from trl_sync.planning.architecture import Architecture, read_architecture
from trl_sync.planning.options import PlanOptions
from trl_sync.planning.plan import RESERVE_SHARE, MemoryPlan, make_plan

NOTE = (
    f"Computed from the model's config, not measured. Beside it a GPU needs the driver's context, "
    f"NCCL's buffers and the allocator's fragments: leave {RESERVE_SHARE:.0%}."
)


def show_plan(
    model: str | None, reward: str, gpu_memory_gb: float | None, *, as_json: bool, **sizes: Any
) -> bool:
    """Prints the plan; False if the GPU is too small for it. `sizes` go to `PlanOptions`.

    Raises:
        ConfigError: no config can be read, or the settings do not go together.
    """
    if model is None:
        raise ConfigError("--plan needs --model: a folder with a config.json, or a hub name.")
    if gpu_memory_gb is not None and gpu_memory_gb <= 0:
        raise ConfigError(f"--gpu-memory {gpu_memory_gb}: expected a positive number of GB.")
    options = PlanOptions(model=read_architecture(model), reward=_reward(reward), **sizes)
    plan = make_plan(options)
    fits = None if gpu_memory_gb is None else plan.fits(gpu_memory_gb * 1e9)
    if as_json:
        print(json.dumps(as_content(plan, gpu_memory_gb, fits), indent=2))
    else:
        print_plan(plan, gpu_memory_gb, fits)
    return fits is not False


def _reward(name: str) -> str | Architecture:
    return name if name in ("function", "adapter") else read_architecture(name)


def as_content(
    plan: MemoryPlan, gpu_memory_gb: float | None, fits: bool | None
) -> dict[str, object]:
    options = plan.options
    settings = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in ("model", "reward")
    }
    settings |= {
        "num_gpus": options.gpus,
        "num_shards": options.shards,
        "quantization": options.base_quantization,
        "lora_rank": None if options.separate else options.rank,
    }
    reward = options.reward
    return {
        "model": options.model.name,
        "parameters": options.model.parameters,
        "reward": reward.name if isinstance(reward, Architecture) else reward,
        "settings": settings,
        "static": dict(plan.static),
        "loading": dict(plan.loading),
        "generation": dict(plan.generation),
        "scoring": dict(plan.scoring),
        "update": dict(plan.update),
        "totals": totals(plan),
        "gpu_memory_gb": gpu_memory_gb,
        "fits": fits,
    }


def totals(plan: MemoryPlan) -> dict[str, int]:
    return {
        "static": plan.static_bytes,
        "peak in loading": plan.loading_bytes,
        "peak in rollout": plan.rollout_peak_bytes,
        "peak in update": plan.update_peak_bytes,
        "peak": plan.peak_bytes,
    }


def print_plan(plan: MemoryPlan, gpu_memory_gb: float | None, fits: bool | None) -> None:
    console = make_console()
    console.print(title(plan.options), markup=False, soft_wrap=True)
    console.print(plan_table(plan))
    if gpu_memory_gb is not None:
        verdict = "fits" if fits else "does not fit"
        console.print(
            f"A GPU of {gpu_memory_gb:g} GB: {verdict} ({_gb(plan.peak_bytes)} GB at the peak, "
            f"{RESERVE_SHARE:.0%} reserved).",
            markup=False,
            soft_wrap=True,
        )
    console.print(NOTE, markup=False, soft_wrap=True)


def title(options: PlanOptions) -> str:
    """What is planned for, with every size that the figures depend on."""
    gpus = "1 GPU" if options.gpus == 1 else f"{options.gpus} GPUs"
    if options.engine == "hsdp":
        gpus += f" ({options.gpus // options.shards} copies of {options.shards} shards)"
    if options.separate:
        what = "policy, value model and reference as whole models"
    else:
        what = f"shared base ({options.base_quantization}), adapters of rank {options.rank}"
    reward = options.reward
    named = f"model {reward.name}" if isinstance(reward, Architecture) else reward
    checkpointing = "with" if options.gradient_checkpointing else "without"
    return (
        f"{options.model.name}, {options.model.parameters / 1e9:.2f} B parameters: {what}, in "
        f"{options.dtype}; reward: {named}\n"
        f"Engine {options.engine}, {gpus}. Micro-batch {options.batch}, rollout batch "
        f"{options.rollout_batch}, {options.prompt_tokens} + {options.response_tokens} tokens, "
        f"{checkpointing} gradient checkpointing"
    )


def plan_table(plan: MemoryPlan) -> Table:
    table = make_table("phase", "what")
    table.add_column("GB per GPU (1e9 bytes)", justify="right")
    phases = ("static", "generation", "scoring", "update")
    for phase in phases:
        for position, (what, size) in enumerate(getattr(plan, phase).items()):
            table.add_row(phase if position == 0 else "", what, _gb(size))
    table.add_section()
    for what, size in totals(plan).items():
        table.add_row("total", what, _gb(size))
    return table


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
