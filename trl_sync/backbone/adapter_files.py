"""What lies in the folder of an adapter: its options, its tensors, its score head."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from torch import Tensor

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


def lora_config(folder: Path) -> LoraConfig:
    """The options of the adapter in `folder`, for one that may train."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return config


def reward_lora_config(folder: Path) -> LoraConfig:
    """The LoRA options of a reward adapter, for an adapter on a causal LM.

    Its score head was trained whole, and is kept apart from the LoRA layers here.
    """
    config = lora_config(folder)
    config.modules_to_save = None
    config.task_type = "CAUSAL_LM"
    return config


def score_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the score head in a checkpoint folder, read without loading the rest."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [n for n in tensors.keys() if ".score." in f".{n}"]  # noqa: SIM118 - no dict
            found |= {name: tensors.get_tensor(name) for name in names}
    return found
