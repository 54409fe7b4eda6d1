"""`run_record.json`: the settings of a run and what it runs on, for `trl-sync report`.

Written by the main process when training begins; a run that is resumed writes it anew.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from trl_sync._version import __version__
from trl_sync.ppo.config import PPOConfig

logger = logging.get_logger(__name__)

FILE = "run_record.json"
FORMAT = 1
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "deepspeed")
_SECRET_NAME = re.compile(r"token|key|secret|password|credential", re.IGNORECASE)
_TOKEN_ID = re.compile(r"token_ids?$")
# The user and password of an address, and tokens by the form that their makers give them.
_SECRET_TEXT = re.compile(r"(?<=://)[^/\s@]+@|\b(?:hf|sk|ghp|github_pat)[_-][A-Za-z0-9_-]{16,}")


def write_run_record(trainer: Any) -> None:
    """Writes the file into `output_dir`; one that cannot be written is said in the log.

    Called on the main process alone.
    """
    path = Path(trainer.args.output_dir) / FILE
    unfinished = path.with_name(f"_{FILE}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(run_record(trainer)), indent=2, allow_nan=False, default=str)
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        # A report is not worth a run.
        logger.warning(f"{path} was not written: {error}")


def run_record(trainer: Any) -> dict[str, Any]:
    """Settings without secrets, versions, platform, devices that this process sees, and engine."""
    return {
        "format": FORMAT,
        "time_s": round(time.time(), 3),
        "first_step": trainer.state.global_step,
        "base_model": getattr(trainer.backbone.config, "_name_or_path", None) or None,
        "engine": trainer.engine.value,
        "world_size": trainer.plan.world_size,
        "device": str(trainer.accelerator.device),
        "devices": list_devices(),
        "platform": platform.platform(),
        "versions": list_versions(),
        "config": public_settings(trainer.args),
    }


def public_settings(args: PPOConfig) -> dict[str, Any]:
    """The fields of `args` without those that may hold a secret, at any depth.

    Ids of tokens stay, and `stop_token`, which PPOConfig allows to be nothing but "eos".
    """
    settings: dict[str, Any] = _without_secrets(args.to_dict())
    return settings | {"stop_token": args.stop_token}


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(name): _without_secrets(item)
            for name, item in value.items()
            if not _may_be_secret(str(name), item)
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_without_secrets(item) for item in value]
    if isinstance(value, str):
        return _SECRET_TEXT.sub("<removed>", value)
    return value


def _may_be_secret(name: str, value: Any) -> bool:
    if not _SECRET_NAME.search(name):
        return False
    ids = value if isinstance(value, list | tuple) else [value]
    is_id = all(item is None or isinstance(item, int) for item in ids)
    return not (_TOKEN_ID.search(name) and is_id)


def list_versions() -> dict[str, str]:
    """The version of each package that matters to training and is installed."""
    versions = {"trl_sync": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def list_devices() -> list[str]:
    """One line for each accelerator that this process sees, or one for the CPU."""
    if not torch.accelerator.is_available():
        return [f"cpu, {os.cpu_count()} cores"]
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    module = torch.get_device_module(accelerator)
    names = getattr(module, "get_device_name", lambda index: accelerator.type)
    return [
        f"{accelerator.type}:{index}, {names(index)}"
        for index in range(torch.accelerator.device_count())
    ]


def _plain(value: Any) -> Any:
    """`value` as JSON holds it: NaN and infinity as text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
