"""What one step measured, under the names of TRL 0.11."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_sync.legacy.core import WANDB_PADDING, stack_dicts
from trl_sync.ppo.collectives import reduce_sum

_PER_TOKEN = ("policy/advantages", "policy/ratio")


def stack_mini_batches(all_stats: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The statistics of every mini-batch as rows; advantages and ratios in one row."""
    stacked = stack_dicts(all_stats)
    for name in _PER_TOKEN:
        stacked[name] = stacked[name].flatten().unsqueeze(0)
    stacked["policy/advantages"] = stacked["policy/advantages"].nan_to_num(WANDB_PADDING)
    return stacked


def step_statistics(
    *,
    kl_coef: float,
    masks: Tensor,
    kls: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    non_score_reward: Tensor,
    scores: Tensor,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    train_stats: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The statistics of a step on this process; means over sequences, mini-batches or tokens."""
    kl_of_sequences = (kls * masks).sum(-1)
    stats: dict[str, Any] = {
        "objective/kl": kl_of_sequences.mean(),
        "objective/kl_dist": kl_of_sequences,
        "objective/logprobs": logprobs,
        "objective/ref_logprobs": ref_logprobs,
        "objective/kl_coef": kl_coef,
        "objective/entropy": (-logprobs * masks).sum(-1).mean(),
        "ppo/mean_non_score_reward": mean_of_counted(non_score_reward, masks),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": _deviation(scores),
    }
    for name, sequences in (("queries", queries), ("responses", responses)):
        lengths = torch.tensor([float(len(sequence)) for sequence in sequences])
        stats[f"tokens/{name}_len_mean"] = lengths.mean()
        stats[f"tokens/{name}_len_std"] = _deviation(lengths)
        stats[f"tokens/{name}_dist"] = lengths
    for name, rows in train_stats.items():
        mean = rows.float().mean(0)
        stats[f"ppo/{name}"] = mean if name in _PER_TOKEN else mean.squeeze(0)
    variance = stats["ppo/returns/var"]
    explained = 1 - stats["ppo/val/error"] / variance
    stats["ppo/val/var_explained"] = torch.where(
        variance > 0, explained, torch.zeros_like(explained)
    )
    return stats


def mean_over_processes(accelerator: Accelerator, stats: Mapping[str, Any]) -> dict[str, Any]:
    """`stats` with its single numbers averaged over processes, a collective.

    What has an entry for each sequence or token stays that of this process.
    """
    names = [n for n, value in stats.items() if isinstance(value, Tensor) and value.dim() == 0]
    numbers = torch.stack([stats[name].double().cpu() for name in names])
    means = reduce_sum(accelerator, numbers.to(accelerator.device)) / accelerator.num_processes
    return dict(stats) | dict(zip(names, means.cpu(), strict=True))


def mean_of_counted(values: Tensor, mask: Tensor) -> Tensor:
    """The mean where the mask is not 0; of nothing it is 0, where TRL has NaN."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def variance_of_counted(values: Tensor, mask: Tensor) -> Tensor:
    """The unbiased variance where the mask is not 0; of fewer than two values it is 0."""
    squares = ((values - mean_of_counted(values, mask)).square() * mask).sum()
    return squares / (mask.sum() - 1).clamp(min=1)


def _deviation(values: Tensor) -> Tensor:
    """The standard deviation; 0 of one value."""
    return values.std() if values.numel() > 1 else torch.zeros_like(values[0])
