"""`trl-sync env`: what is installed, what there is to compute on, and which engines can run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from dataclasses import asdict, dataclass

import torch
from rich import box
from rich.table import Table

from trl_sync._version import __version__
from trl_sync.cli.console import make_console
from trl_sync.cli.report import escape

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "deepspeed")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """Whether an engine can run here, and if not, what is missing."""

    can_run: bool
    reason: str


def show_environment(*, as_json: bool) -> None:
    """Prints versions, devices and engines. Nothing is loaded but torch, and nothing is written."""
    versions = {"trl_sync": __version__, "python": platform.python_version()}
    versions |= {name: installed_version(name) or "not installed" for name in PACKAGES}
    devices, engines = list_devices(), list_engines()
    if as_json:
        content = {
            "versions": versions,
            "devices": devices,
            "engines": {name: asdict(state) for name, state in engines.items()},
        }
        print(json.dumps(content, indent=2))
        return
    console = make_console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, version in versions.items():
        table.add_row(name, escape(version))
    for position, device in enumerate(devices):
        table.add_row("devices" if position == 0 else "", escape(device))
    console.print(table)
    table = Table("engine", "runs here", "", box=box.SIMPLE)
    for name, state in engines.items():
        table.add_row(name, "yes" if state.can_run else "no", escape(state.reason))
    console.print(table)


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def list_devices() -> list[str]:
    """One line for each accelerator, or one for the CPU."""
    if not torch.accelerator.is_available():
        return [f"cpu, {os.cpu_count()} cores, no accelerator that torch {torch.__version__} sees"]
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    found = []
    for index in range(torch.accelerator.device_count()):
        module = torch.get_device_module(accelerator)
        free, total = module.mem_get_info(index)
        name = module.get_device_name(index)
        found.append(
            f"{accelerator.type}:{index}, {name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        )
    return found


def list_engines() -> dict[str, EngineState]:
    """Each engine of recipes/accelerate_configs, by what it needs on this machine."""
    has_accelerator = torch.accelerator.is_available()
    several = has_accelerator and torch.accelerator.device_count() > 1
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    single = has_accelerator and not several
    few = "one accelerator here; several machines still can" if single else ""
    ddp = few if has_accelerator else "gloo ranks on the CPU"
    return {
        "one process": EngineState(can_run=True, reason=""),
        "DDP": EngineState(can_run=True, reason=ddp),
        "ZeRO-1, ZeRO-2, ZeRO-3": _deepspeed_state(has_deepspeed, has_accelerator, few),
        "FSDP2, HSDP": _fsdp_state(has_accelerator, few),
    }


def _deepspeed_state(is_installed: bool, has_accelerator: bool, few: str) -> EngineState:
    if not is_installed:
        return EngineState(can_run=False, reason="DeepSpeed is not installed: trl-sync[deepspeed]")
    if not has_accelerator:
        return EngineState(
            can_run=False,
            reason="DeepSpeed is installed, but there is no accelerator: on CPUs use DDP",
        )
    return EngineState(can_run=True, reason=few)


def _fsdp_state(has_accelerator: bool, few: str) -> EngineState:
    if not has_accelerator:
        return EngineState(
            can_run=False,
            reason="accelerate offers FSDP on accelerators alone, and there is none: on CPUs use "
            "DDP",
        )
    return EngineState(can_run=True, reason=few)
