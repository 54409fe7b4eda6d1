"""This process among those that a launcher started."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def launched_processes() -> int:
    """How many processes the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """Whether processes run on CPUs here: `accelerate launch --cpu`, or no other device.

    accelerate asks for the former alone, which not every way to launch sets.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def this_process() -> PartialState:
    """accelerate's state of this process.

    A `PartialState()` that is not told of the CPU takes itself for the only process, and an
    `Accelerator` that is made later believes it: every rank would train alone.
    """
    return PartialState(cpu=on_cpu())
