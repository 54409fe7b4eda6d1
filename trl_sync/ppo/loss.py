"""The two clipped losses of PPO and their statistics. Pure functions.

Axes as in `ppo/batch.py`. A loss is a sum over response tokens divided by `denominator`, the number
of response tokens in the whole global mini-batch, so it does not depend on how the mini-batch is
cut into micro-batches and processes.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Every statistic is a sum over tokens; divide by "tokens" for the mean.
Statistics = dict[str, Tensor]


def policy_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    cliprange: float,
    denominator: Tensor,
) -> tuple[Float[Tensor, ""], Statistics]:
    """Sum of max(-A r, -A clip(r, 1 - c, 1 + c)) / denominator, with r = policy / old policy.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), equation 7. The
    approximate KL is half the squared log ratio.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    losses = torch.maximum(unclipped, clipped).masked_fill(~mask, 0.0)
    with torch.no_grad():
        counted = mask.to(ratio.dtype)
        statistics = {
            "approx_kl": (0.5 * log_ratio.pow(2) * counted).sum(),
            "policy_clipped": ((clipped > unclipped) & mask).sum(),
            "policy_loss": losses.sum(),
            "ratio": (ratio * counted).sum(),
            "squared_ratio": (ratio.pow(2) * counted).sum(),
            "tokens": mask.sum(),
        }
    return losses.sum() / denominator, statistics


def value_loss(
    values: Float[Tensor, "B R"],
    old_values: Float[Tensor, "B R"],
    returns: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    cliprange_value: float,
    denominator: Tensor,
) -> tuple[Float[Tensor, ""], Statistics]:
    """Sum of max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) / 2 / denominator.

    Source: the clipped value loss of OpenAI's `baselines` PPO2.
    """
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    unclipped = (values - returns).pow(2)
    clipped = (near - returns).pow(2)
    losses = 0.5 * torch.maximum(unclipped, clipped).masked_fill(~mask, 0.0)
    with torch.no_grad():
        statistics = {
            "value_clipped": ((clipped > unclipped) & mask).sum(),
            "value_loss": losses.sum(),
        }
    return losses.sum() / denominator, statistics
