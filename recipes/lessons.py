"""Models that recipes teach on the spot: a policy by examples, a reward model by preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

Rows = list[dict[str, str]]
ON_CPU = not torch.accelerator.is_available()
SETTINGS = {
    # On CPUs several processes know of one another only with use_cpu.
    "use_cpu": ON_CPU,
    "bf16": not ON_CPU,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "seed": 0,
}


def taught_policy(path: str, examples: Rows, folder: Path) -> Path:
    """The model at `path` after one pass over pairs of `prompt` and `completion`.

    Every rank calls it, and takes part.
    """
    config = SFTConfig(str(folder), learning_rate=2e-3, **SETTINGS)
    return _saved(SFTTrainer(path, config, train_dataset=Dataset.from_list(examples)), folder)


def taught_reward(path: str, preferences: Rows, folder: Path, peft_config: Any = None) -> Path:
    """A reward model on top of the model at `path`, whole or as an adapter, after one pass over
    `prompt`, `chosen` and `rejected`.

    Every rank calls it, and takes part.
    """
    config = RewardConfig(
        str(folder), learning_rate=1e-3, center_rewards_coefficient=0.01, **SETTINGS
    )
    data = Dataset.from_list(preferences)
    trainer = RewardTrainer(path, config, train_dataset=data, peft_config=peft_config)
    return _saved(trainer, folder)


def _saved(trainer: Any, folder: Path) -> Path:
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # the main process writes, all read
    return folder
