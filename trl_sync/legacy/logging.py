"""One step's statistics and texts on their way to the trackers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from trl_sync.errors import ConfigError


def log_step(
    accelerator: Accelerator,
    stats: Mapping[str, Any],
    batch: Mapping[str, Any],
    rewards: Tensor | Sequence[Any],
    *,
    columns: tuple[str, ...],
    log_with: Any,
    step: int,
) -> None:
    """Logs on the main process, with the rewards of all; wandb also gets a table of texts.

    Raises:
        ConfigError: a column to log is not in the batch.
    """
    own = torch.tensor([float(reward) for reward in rewards], device=accelerator.device)
    everywhere: Tensor = accelerator.gather(own).cpu()
    logs = dict(stats) | {
        "env/reward_mean": everywhere.mean().item(),
        "env/reward_std": everywhere.std().item() if len(everywhere) > 1 else 0.0,
        "env/reward_dist": everywhere.numpy(),
    }
    if log_with == "wandb":
        texts = _gathered_columns(accelerator, batch, columns)
        if accelerator.is_main_process:
            wandb = importlib.import_module("wandb")
            rows = [list(row) for row in zip(*texts, everywhere.tolist(), strict=True)]
            logs["game_log"] = wandb.Table(columns=[*columns, "reward"], data=rows)
    # wandb counts its own steps, which the user's own calls also move.
    accelerator.log(logs, step=None if log_with == "wandb" else step)


def _gathered_columns(
    accelerator: Accelerator, batch: Mapping[str, Any], columns: tuple[str, ...]
) -> list[list[Any]]:
    missing = [column for column in columns if column not in batch]
    if missing:
        raise ConfigError(
            f"columns_to_log names {', '.join(missing)}, but the batch has only "
            f"{', '.join(batch)}: add it to the batch, or choose other columns."
        )
    return [gather_object(list(batch[column])) for column in columns]
