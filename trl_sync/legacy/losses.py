"""The mathematics of one step. Pure functions.

Axes: B sequences, T tokens of the longest query with its response. Column t belongs to token t + 1,
whose distribution stands at token t, so there are T - 1 columns. A mask is 1 on tokens of responses
and an integer tensor, as in TRL, because subclasses calculate with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trl_sync.legacy.config import PPOConfig
from trl_sync.legacy.core import entropy_from_logits, flatten_dict
from trl_sync.legacy.stats import mean_of_counted, variance_of_counted
from trl_sync.ppo.advantage import generalized_advantages
from trl_sync.ppo.loss import policy_loss, value_loss


def kl_penalties(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """The penalty on each token, in nats; "full" takes the log-probabilities of every token."""
    if kind == "full":
        return nn.functional.kl_div(ref_logprobs, logprobs, log_target=True, reduction="none").sum(
            -1
        )
    log_ratio = logprobs - ref_logprobs
    if kind == "abs":
        return log_ratio.abs()
    return 0.5 * log_ratio.square() if kind == "mse" else log_ratio


def add_scores(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """`rewards` with each score on the last token that counts; without a token it is dropped."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (mask.bool() * columns).amax(1) - 1
    rows = (last >= 0).nonzero().squeeze(-1)
    placed = rewards.clone()
    placed[rows, last[rows]] += scores[rows].to(placed.dtype)
    return placed


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE over the tokens that count; those between them that do not are no steps."""
    width = max(int(mask.sum(1).max()), 1)
    # Each row's counted columns first, in their order.
    columns = mask.bool().int().argsort(dim=1, descending=True, stable=True)[:, :width]
    packed_advantages, packed_returns = generalized_advantages(
        rewards.gather(1, columns),
        values.gather(1, columns),
        mask.bool().gather(1, columns),
        gamma=gamma,
        lam=lam,
    )
    advantages = torch.zeros_like(values).scatter(1, columns, packed_advantages.to(values.dtype))
    returns = torch.zeros_like(values).scatter(1, columns, packed_returns.to(values.dtype))
    return advantages, returns


def losses_and_statistics(
    config: PPOConfig,
    *,
    old_logprobs: Tensor,
    values: Tensor,
    logits: Tensor,
    vpreds: Tensor,
    logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    returns: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor], float]:
    """Policy loss, unweighted value loss, statistics, and the mean ratio of one mini-batch.

    Both losses are means over the mini-batch's response tokens.
    """
    counted = mask.bool()
    tokens = counted.sum().clamp(min=1)
    of_policy, policy_sums = policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        counted,
        cliprange=config.cliprange,
        denominator=tokens,
    )
    of_value, value_sums = value_loss(
        vpreds,
        values,
        returns,
        counted,
        cliprange_value=config.cliprange_value,
        denominator=tokens,
    )
    sums = policy_sums | value_sums
    mean_ratio = float(sums["ratio"] / tokens)
    if mean_ratio > config.ratio_threshold:
        # Not the losses times 0: an infinite ratio would give NaN. All parameters take part.
        of_policy = of_value = 0.0 * (logprobs.sum() + vpreds.sum())
    statistics = {
        "loss": {
            "policy": of_policy.detach(),
            "value": of_value.detach(),
            "total": (of_policy + config.vf_coef * of_value).detach(),
        },
        "policy": {
            **_policy_statistics(logprobs, old_logprobs, logits, mask),
            "approxkl": sums["approx_kl"] / tokens,
            "clipfrac": sums["policy_clipped"] / tokens,
            "advantages": advantages,
            "advantages_mean": mean_of_counted(advantages, mask),
        },
        **_value_statistics(values, vpreds, returns, mask),
    }
    flat: dict[str, Any] = flatten_dict(statistics)
    flat["val/clipfrac"] = sums["value_clipped"] / tokens
    return of_policy, of_value, flat, mean_ratio


@torch.no_grad()
def _policy_statistics(
    logprobs: Tensor, old_logprobs: Tensor, logits: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    difference = logprobs - old_logprobs
    return {
        "entropy": mean_of_counted(entropy_from_logits(logits), mask),
        "policykl": mean_of_counted(-difference, mask),
        "ratio": difference.exp(),
    }


@torch.no_grad()
def _value_statistics(
    values: Tensor, vpreds: Tensor, returns: Tensor, mask: Tensor
) -> dict[str, dict[str, Tensor]]:
    return {
        "returns": {
            "mean": mean_of_counted(returns, mask),
            "var": variance_of_counted(returns, mask),
        },
        "val": {
            "vpred": mean_of_counted(vpreds, mask),
            "error": mean_of_counted((vpreds - returns).square(), mask),
            "mean": mean_of_counted(values, mask),
            "var": variance_of_counted(values, mask),
        },
    }
