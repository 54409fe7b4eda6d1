"""The two clipped losses of PPO and their statistics. Pure functions.

Axes as in `ppo/batch.py`. A loss is a sum over response tokens divided by `denominator`, the number
of response tokens in the whole global mini-batch, so it does not depend on how the mini-batch is
cut into micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trl_sync.ppo.config import PPOConfig

# Every statistic is a sum over tokens; divide by "tokens" for the mean.
Statistics = dict[str, Tensor]


def ppo_loss(
    logprobs: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    micro_batch: Mapping[str, Any],
    config: PPOConfig,
    *,
    policy_learns: bool = True,
) -> tuple[Float[Tensor, ""], Statistics]:
    """Policy loss + `vf_coef` x value loss of one micro-batch (`Experience.micro_batch`).

    Without `policy_learns` the policy's gradient is zero, not absent: under DDP every process waits
    for it. With `ratio_threshold` a micro-batch whose mean ratio is above it has loss 0 and
    gradient zero, and its other statistics still tell what was found.
    """
    mask, old_logprobs = micro_batch["response_mask"], micro_batch["old_logprobs"]
    keep = torch.ones((), dtype=torch.bool, device=mask.device)
    if config.ratio_threshold is not None:
        keep = ~(mean_ratio(logprobs, old_logprobs, mask) > config.ratio_threshold)
    of_policy, policy_statistics = policy_loss(
        _with_gradient_if(keep & policy_learns, logprobs),
        old_logprobs,
        micro_batch["advantages"],
        mask,
        cliprange=config.cliprange,
        cliprange_high=config.cliprange_high,
        denominator=micro_batch["loss_denominator"],
    )
    of_value, value_statistics = value_loss(
        _with_gradient_if(keep, values),
        micro_batch["old_values"],
        micro_batch["returns"],
        mask,
        cliprange_value=config.cliprange_value,
        denominator=micro_batch["loss_denominator"],
    )
    loss = of_policy + config.vf_coef * of_value
    statistics = policy_statistics | value_statistics
    if config.ratio_threshold is not None:
        loss = torch.where(keep, loss, 0.0)
        for name in ("policy_loss", "value_loss"):
            statistics[name] = torch.where(keep, statistics[name], 0.0)
        statistics["skipped_micro_batches"] = (~keep).sum()
    return loss, statistics


@torch.no_grad()
def mean_ratio(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
) -> Float[Tensor, ""]:
    """The mean of policy / old policy over the response tokens; 0 if there are none."""
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()
    return (ratio * mask).sum() / mask.sum().clamp(min=1)


def _with_gradient_if(keep: Bool[Tensor, ""], values: Float[Tensor, "B R"]) -> Tensor:
    """`values`; if not `keep` their gradient is zero, whatever it would have been, also inf."""
    return torch.where(keep, values, values.detach())


def policy_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    cliprange: float,
    denominator: Tensor,
    cliprange_high: float | None = None,
) -> tuple[Float[Tensor, ""], Statistics]:
    """Sum of max(-A r, -A clip(r, 1 - c, 1 + c)) / denominator, with r = policy / old policy.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), equation 7. The
    approximate KL is half the squared log ratio. `cliprange_high` is the upper c if it is not the
    lower one (Yu et al., "DAPO" (2025), equation 10).
    """
    high = cliprange if cliprange_high is None else cliprange_high
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + high)
    losses = torch.maximum(unclipped, clipped).masked_fill(~mask, 0.0)
    with torch.no_grad():
        counted = mask.to(ratio.dtype)
        # The variance is a difference of nearly equal sums: in fp32 it would be rounding.
        exact_ratio = ratio.double()
        statistics = {
            "approx_kl": (0.5 * log_ratio.pow(2) * counted).sum(),
            "policy_clipped": ((clipped > unclipped) & mask).sum(),
            "policy_loss": losses.sum(),
            "ratio": (exact_ratio * mask).sum(),
            "squared_ratio": (exact_ratio.pow(2) * mask).sum(),
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
