"""`trl-sync env`: what is installed, what there is to compute on, and what can run here.

Ready to be pasted into a bug report.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from rich.table import Table

from trl_sync._version import __version__
from trl_sync.cli.console import make_console, make_table
from trl_sync.cli.report import escape

PACKAGES = (
    *("torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "deepspeed"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """Whether something can run here, and if not, what is missing."""

    can_run: bool
    reason: str


def show_environment(*, as_json: bool) -> None:
    """Prints versions, devices, engines and known problems. Nothing is written."""
    versions = {
        "trl_sync": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "CUDA of torch": torch.version.cuda or "none",
    }
    versions |= {name: installed_version(name) or "not installed" for name in PACKAGES}
    devices, engines, abilities = list_devices(), list_engines(), list_abilities()
    problems = list(known_problems())
    if as_json:
        content = {
            "versions": versions,
            "devices": devices,
            "engines": {name: asdict(state) for name, state in engines.items()},
            "abilities": {name: asdict(state) for name, state in abilities.items()},
            "known_problems": problems,
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
    for title, states in (("engine", engines), ("besides", abilities)):
        table = make_table(title, "runs here", "")
        for name, state in states.items():
            table.add_row(name, "yes" if state.can_run else "no", escape(state.reason))
        console.print(table)
    for problem in problems or ["none known of these versions"]:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)


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


def list_engines() -> dict[str, Ability]:
    """Each engine of recipes/accelerate_configs, by what it needs on this machine."""
    has_accelerator = torch.accelerator.is_available()
    several = has_accelerator and torch.accelerator.device_count() > 1
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    single = has_accelerator and not several
    few = "one accelerator here; several machines still can" if single else ""
    ddp = few if has_accelerator else "gloo ranks on the CPU"
    return {
        "one process": Ability(can_run=True, reason=""),
        "DDP": Ability(can_run=True, reason=ddp),
        "ZeRO-1, ZeRO-2, ZeRO-3": _deepspeed_state(has_deepspeed, has_accelerator, few),
        "FSDP2, HSDP": _fsdp_state(has_accelerator, few),
    }


def _deepspeed_state(is_installed: bool, has_accelerator: bool, few: str) -> Ability:
    if not is_installed:
        return Ability(can_run=False, reason="DeepSpeed is not installed: trl-sync[deepspeed]")
    if not has_accelerator:
        return Ability(
            can_run=False,
            reason="DeepSpeed is installed, but there is no accelerator: on CPUs use DDP",
        )
    return Ability(can_run=True, reason=few)


def _fsdp_state(has_accelerator: bool, few: str) -> Ability:
    if not has_accelerator:
        return Ability(
            can_run=False,
            reason="accelerate offers FSDP on accelerators alone, and there is none: on CPUs use "
            "DDP",
        )
    return Ability(can_run=True, reason=few)


def list_abilities() -> dict[str, Ability]:
    """What some features need besides an engine."""
    return {
        "4-bit weights (NF4)": _four_bit(),
        "checksums on the GPU": _gpu_checksums(),
        "figures (report)": _needs("matplotlib", "trl-sync[report]"),
    }


def _four_bit() -> Ability:
    """Tried, because an installed bitsandbytes may lack the library for this device."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = torch.accelerator.current_accelerator() if has_accelerator() else "cpu"
        weight = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
        packed, state = quantize_4bit(weight, quant_type="nf4")
        error = (dequantize_4bit(packed, state) - weight).abs().max().item()
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError) as failure:
        return Ability(can_run=False, reason=f"bitsandbytes: {failure}")
    # Half the widest gap between NF4's sixteen levels is 0.152.
    return Ability(can_run=error < 0.16, reason="" if error < 0.16 else f"off by {error:.2f}")


def _gpu_checksums() -> Ability:
    if not torch.cuda.is_available():
        return Ability(can_run=False, reason="no CUDA device; on the CPU they are xxh3's")
    return _needs("triton", "triton")


def _needs(package: str, extra: str) -> Ability:
    found = importlib.util.find_spec(package) is not None
    return Ability(can_run=found, reason="" if found else f"{package} is not installed: {extra}")


def has_accelerator() -> bool:
    return bool(torch.accelerator.is_available())


def known_problems() -> Iterator[str]:
    """What is known to go wrong with these versions, and what was not tested."""
    for line in importlib.metadata.requires("trl-sync") or ():
        requirement = Requirement(line)
        version = installed_version(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if version is None:
            if wanted:
                yield f"{requirement.name} is not installed: trl_sync needs {requirement}"
        elif wanted and not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} is installed, but trl_sync needs {requirement}"
    transformers = installed_version("transformers")
    if transformers and Version(transformers) < Version("5.18") and not has_accelerator():
        yield (
            f"transformers {transformers} cannot resume a run of several CPU processes: it reads "
            "the optimizer to a device cpu:0. Use 5.18 or newer"
        )
