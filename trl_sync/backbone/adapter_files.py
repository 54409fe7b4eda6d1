"""What lies in the folder of an adapter: its options, its tensors, its score head."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from trl_sync.backbone.adapter_patterns import check_patterns
from trl_sync.backbone.model_files import ADAPTER_WEIGHTS
from trl_sync.errors import ConfigError

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(path: str) -> bool:
    """Whether a hub name or directory holds an adapter rather than a whole model."""
    return adapter_folder(path) is not None


def adapter_folder(path: str) -> Path | None:
    """The local folder of an adapter checkpoint, or None if `path` is a whole model."""
    if Path(path).is_dir():
        return Path(path) if (Path(path) / ADAPTER_CONFIG).is_file() else None
    try:
        PeftConfig.from_pretrained(path)
    except (ValueError, OSError):
        return None
    return local_folder(path)


def local_folder(path: str) -> Path:
    """The folder itself, or the one that a hub name was downloaded to."""
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))


def adapter_config(folder: Path) -> PeftConfig:
    """The options of the adapter in `folder`.

    Raises:
        ConfigError: they cannot be read, or an option of LoRA is of a wrong type or size.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT passes on what json, the file and its own classes raise
        raise ConfigError(
            f"{file} holds no options of an adapter ({_short(error)}). Copy the file again from "
            "where the adapter was saved."
        ) from error
    if isinstance(config, LoraConfig):
        _check_options(config, file)
        _check_ranks(config, folder)
    return config


def lora_config(folder: Path) -> LoraConfig:
    """The options of the adapter in `folder`, for one that may train.

    Raises:
        ConfigError: they cannot be read or used.
    """
    config = adapter_config(folder)
    config.inference_mode = False
    return config


def reward_lora_config(folder: Path) -> LoraConfig:
    """The LoRA options of a reward adapter, for an adapter on a causal LM.

    Its score head was trained whole, and is kept apart from the LoRA layers here.

    Raises:
        ConfigError: they cannot be read or used.
    """
    config = lora_config(folder)
    config.modules_to_save = None
    config.task_type = "CAUSAL_LM"
    return config


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ConfigError: it cannot be read.
    """
    with reading(file):
        tensors: dict[str, Tensor] = load_file(file)
    return tensors


def score_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the score head in a checkpoint folder, read without loading the rest.

    Raises:
        ConfigError: a file cannot be read.
    """
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with reading(file), safe_open(file, framework="pt") as tensors:
            names = [n for n in tensors.keys() if ".score." in f".{n}"]  # noqa: SIM118 - no dict
            found |= {name: tensors.get_tensor(name) for name in names}
    return found


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Names `file` where the block cannot read it.

    Raises:
        ConfigError: it cannot.
    """
    try:
        yield
    except Exception as error:  # of the file system, of safetensors, of torch for odd dtypes
        raise ConfigError(
            f"{file} cannot be read as safetensors ({_short(error)}). Was it cut short? Copy it "
            "again from where it was saved."
        ) from error


@contextlib.contextmanager
def applying(folder: Path, config: PeftConfig, model: nn.Module) -> Iterator[None]:
    """Names the adapter in `folder` where PEFT or torch cannot put it on `model` in the block.

    Raises:
        ConfigError: they cannot, or would compare names of modules without end.
    """
    check_patterns(config, model, folder / ADAPTER_CONFIG)
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, re.error) as error:
        raise ConfigError(
            f"The adapter in {folder} cannot be put on this base ({_short(error)}). Are the "
            f"options in {ADAPTER_CONFIG} those it was saved with?"
        ) from error


def _check_options(config: LoraConfig, file: Path) -> None:
    """Nothing, if the options that decide on layers, sizes and scales are of the right types."""
    checks: dict[str, tuple[bool, str]] = {
        "r": (_is_rank(config.r), "a whole number of at least 1"),
        "lora_alpha": (_is_number(config.lora_alpha), "a finite number"),
        "lora_dropout": (
            _is_number(config.lora_dropout) and 0 <= config.lora_dropout <= 1,
            "a number from 0 to 1",
        ),
        "rank_pattern": (_is_pattern(config.rank_pattern, _is_rank), "layers and their ranks"),
        "alpha_pattern": (_is_pattern(config.alpha_pattern, _is_number), "layers and numbers"),
        "target_modules": (_are_names(config.target_modules), "names of modules"),
        "exclude_modules": (_are_names(config.exclude_modules), "names of modules"),
        "modules_to_save": (_are_names(config.modules_to_save), "names of modules"),
    }
    for name, (is_right, expected) in checks.items():
        if not is_right:
            found = str(getattr(config, name))[:80]
            raise ConfigError(
                f"{file} has {name}={found}, expected {expected}: restore the file as it was saved."
            )


def _check_ranks(config: LoraConfig, folder: Path) -> None:
    """Nothing, if no rank is larger than those of the tensors: memory is taken before they load."""
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        return
    with reading(file), safe_open(file, framework="pt") as tensors:
        names = [n for n in tensors.keys() if re.search(r"lora_(embedding_)?A", n)]  # noqa: SIM118
        own = [(tensors.get_slice(name).get_shape() or [0])[0] for name in names]
    largest = max((config.r, *(config.rank_pattern or {}).values()))
    if own and largest > max(own):
        raise ConfigError(
            f"{folder / ADAPTER_CONFIG} has rank {largest}, but the tensors in {ADAPTER_WEIGHTS} "
            f"have at most {max(own)}: these files do not belong together."
        )


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    # An integer may be too large for isfinite.
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _is_pattern(value: Any, is_right: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(is_right, value.values())))


def _are_names(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return True
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
