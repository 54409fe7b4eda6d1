"""Scores and log-probabilities -> rewards, advantages and returns. Pure functions.

Axes as in `ppo/batch.py`. Sums over tokens that must span all processes go through `reduce_sum`, a
function that adds a tensor over the processes; the default is one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ReduceSum = Callable[[Tensor], Tensor]
KLEstimator = Literal["k1", "k3"]


def _one_process(tensor: Tensor) -> Tensor:
    return tensor


def kl_estimate(
    logprobs: Float[Tensor, "B R"],
    reference_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    estimator: KLEstimator,
) -> Float[Tensor, "B R"]:
    """Each token's estimate of KL(policy || reference) in nats, from the sampled token alone.

    With r = reference / policy: k1 = -log r; k3 = (r - 1) - log r. Source: J. Schulman,
    "Approximating KL Divergence" (2020).
    """
    log_ratio = reference_logprobs - logprobs
    estimate = -log_ratio if estimator == "k1" else log_ratio.expm1() - log_ratio
    return estimate.masked_fill(~mask, 0.0)


def place_rewards(
    scores: Float[Tensor, " B"],
    kl: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    kl_coef: float,
    token_rewards: Float[Tensor, "B R"] | None = None,
) -> Float[Tensor, "B R"]:
    """The KL penalty on every response token, and the score on the last one.

    Of the score, `token_rewards` stand on their own tokens and the rest on the last one. The score
    of an empty response has no token to stand on and is dropped.
    """
    rewards = -kl_coef * kl
    if token_rewards is not None:
        rewards = rewards + token_rewards
        scores = scores - token_rewards.sum(1)
    lengths = mask.sum(1)
    rows = lengths.nonzero().squeeze(-1)
    rewards[rows, lengths[rows] - 1] += scores[rows].to(rewards.dtype)
    return rewards.masked_fill(~mask, 0.0)


def generalized_advantages(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Advantages and returns by GAE(gamma, lambda); the value after the last token is 0.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}, return_t = A_t + V_t.
    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation" (2016), equation 16.
    """
    values = values.masked_fill(~mask, 0.0)
    advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(advantage)
    reversed_advantages = []
    for step in reversed(range(rewards.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        # Masked columns lie behind the last token: they pass on zeros.
        advantage = (delta + gamma * lam * advantage).masked_fill(~mask[:, step], 0.0)
        next_value = values[:, step]
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def masked_mean_and_variance(
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    reduce_sum: ReduceSum = _one_process,
) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the counted tokens of all processes, as fp64 scalars.

    Of no token the mean is 0 and the variance 0; of one token the variance is 0.
    """
    counted = values.double().masked_fill(~mask, 0.0)
    total, count = reduce_sum(torch.stack([counted.sum(), mask.sum().double()]))
    mean = total / count.clamp(min=1)
    squares = reduce_sum(((counted - mean) * mask).pow(2).sum())
    return mean, squares / (count - 1).clamp(min=1)


def whiten(
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    shift_mean: bool = True,
    reduce_sum: ReduceSum = _one_process,
) -> Float[Tensor, "B R"]:
    """`values` with variance 1 over the counted tokens of all processes; mean 0 if `shift_mean`.

    (x - mean) / sqrt(var + 1e-8); without `shift_mean` the mean is added back.
    """
    mean, variance = masked_mean_and_variance(values, mask, reduce_sum)
    whitened = (values.double() - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.to(values.dtype).masked_fill(~mask, 0.0)


def explained_variance(
    values: Float[Tensor, "B R"],
    returns: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    reduce_sum: ReduceSum = _one_process,
) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect value model, 0 a constant one.

    0.0 if the returns do not vary.
    """
    _, of_returns = masked_mean_and_variance(returns, mask, reduce_sum)
    _, of_errors = masked_mean_and_variance(returns - values, mask, reduce_sum)
    return float(1 - of_errors / of_returns) if of_returns > 0 else 0.0
