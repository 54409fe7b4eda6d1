"""ExperienceLoader: what PPO is besides a loss, as a data loader for the stock training loop.

Each iteration rolls out a batch of prompts, scores it, estimates advantages, and then yields the
micro-batches of `num_ppo_epochs x num_mini_batches` optimizer updates.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from trl_sync.ppo.advantage import (
    KLEstimator,
    explained_variance,
    generalized_advantages,
    kl_estimate,
    place_rewards,
    whiten,
)
from trl_sync.ppo.batch import Experience, Rollout, ScoredRollout
from trl_sync.ppo.collectives import reduce_sum, together
from trl_sync.ppo.config import BatchPlan, PPOConfig
from trl_sync.ppo.kl_control import KLControl
from trl_sync.ppo.prompts import PromptDataset
from trl_sync.ppo.reward_scaling import RunningMoments, shape_scores
from trl_sync.ppo.rewards import RewardSource
from trl_sync.ppo.rollout import Sampling, roll_out, seeded
from trl_sync.ppo.score import score

# Added to the seed so that each use draws its own random numbers.
_PROMPT_ORDER, _SAMPLING, _MINI_BATCHES, EVALUATION = range(4)

Metrics = dict[str, float]


class ExperienceLoader:
    """Micro-batches of one pass over the prompts; a rollout happens where an iteration begins.

    Everything drawn at random (prompt order, responses, mini-batches) is a function of the seed,
    the iteration and the rank, so `first_iteration`, `score_moments` and the coefficient in
    `kl_control` are all the state a resumed run needs. `first_iteration` tells, at the beginning of
    an epoch, how many of the epoch's iterations are done. `updates_done` counts the updates of the
    whole run, with those that were skipped: where it has passed the end of an iteration, the next
    one begins. Rollout and scoring run inside `gathered()`.
    """

    def __init__(
        self,
        *,
        config: PPOConfig,
        plan: BatchPlan,
        prompts: PromptDataset,
        model: Any,
        rewards: RewardSource,
        sampling: Sampling,
        accelerator: Accelerator,
        kl_control: KLControl,
        score_moments: RunningMoments,
        first_iteration: Callable[[], int],
        updates_done: Callable[[], int],
        on_metrics: Callable[[Metrics], None],
        gathered: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.dataset = prompts
        self._gathered = gathered
        self._config = config
        self._plan = plan
        self._model = model
        self._rewards = rewards
        self._sampling = sampling
        self._accelerator = accelerator
        self._kl_control = kl_control
        self._score_moments = score_moments
        self._first_iteration = first_iteration
        self._updates_done = updates_done
        self._on_metrics = on_metrics
        self._epoch = 0

    def __len__(self) -> int:
        return self._plan.iterations_per_epoch * self._plan.micro_batches_per_iteration

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each pass."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = self._generator(_PROMPT_ORDER, self._epoch).permutation(len(self.dataset))
        for position in range(self._first_iteration(), self._plan.iterations_per_epoch):
            if self._updates_done() >= self._plan.max_steps:
                return  # the run that was resumed is complete
            iteration = self._epoch * self._plan.iterations_per_epoch + position
            start = position * self._plan.prompts_per_batch
            indices = order[start : start + self._plan.prompts_per_batch]
            # All samples of a prompt in a row; over several processes they go round.
            indices = indices.repeat(self._plan.num_generations)
            yield from self._iteration(iteration, indices.tolist())

    def _iteration(self, iteration: int, indices: list[int]) -> Iterator[dict[str, Tensor]]:
        started_s = time.perf_counter()
        rank, ranks = self._accelerator.process_index, self._plan.world_size
        self._model.eval()
        with self._gathered():
            with seeded(self._accelerator.device, self._config.seed, _SAMPLING, iteration, rank):
                rollout = together(self._accelerator, lambda: self._roll_out(indices[rank::ranks]))
            rolled_out_s = time.perf_counter()
            scored = together(self._accelerator, lambda: self._score(rollout))
        if self._config.use_score_scaling:
            self._score_moments.update(scored.scores, self._reduce_sum)
        scored = shape_scores(scored, self._config, self._score_moments)
        kl_coef = self._kl_control.coefficient
        experience, metrics = make_experience(scored, self._config, self._reduce_sum, kl_coef)
        if self._kl_control.adaptive:
            metrics["objective/kl_coef"] = kl_coef
            self._kl_control.update(metrics["objective/kl"])
        metrics["time/rollout_s"] = rolled_out_s - started_s
        metrics["time/score_s"] = time.perf_counter() - rolled_out_s
        self._on_metrics(metrics)
        mini_batches = list(self._mini_batches(iteration))
        own = experience.lengths.responses
        tokens = torch.stack([own[rows].sum() for rows in mini_batches])
        # An all-empty mini-batch has no loss; 1 keeps its zero a zero.
        denominators = self._reduce_sum(tokens.to(self._accelerator.device)).clamp(min=1)
        end = (iteration + 1) * self._plan.updates_per_iteration
        for rows, denominator in zip(mini_batches, denominators, strict=True):
            if self._updates_done() >= end:
                return
            # Similar lengths share a micro-batch; the gradient of the mini-batch is the same.
            for part in experience.lengths.parts(self._plan.local_micro_batch_size, rows):
                yield experience.micro_batch(part, denominator)

    def _roll_out(self, indices: list[int]) -> Rollout:
        with self._accelerator.autocast():
            return roll_out(
                self._model,
                self.dataset.batch(indices),
                self._sampling,
                batch_size=self._config.local_rollout_forward_batch_size,
                device=self._accelerator.device,
            )

    def _score(self, rollout: Rollout) -> ScoredRollout:
        with self._accelerator.autocast():
            return score(
                self._model,
                rollout,
                self._rewards,
                temperature=self._config.temperature,
                batch_size=self._config.local_rollout_forward_batch_size,
                with_reference=self._config.kl_coef > 0 or self._kl_control.adaptive,
            )

    def _mini_batches(self, iteration: int) -> Iterator[Tensor]:
        """Rows of each mini-batch in the order of the updates; every rank draws the same order."""
        for epoch in range(self._plan.num_ppo_epochs):
            generator = self._generator(_MINI_BATCHES, iteration, epoch)
            order = torch.from_numpy(generator.permutation(self._plan.local_batch_size))
            yield from order.split(self._plan.local_mini_batch_size)

    def _generator(self, *entropy: int) -> Any:
        return np.random.default_rng([self._config.seed, *entropy])

    def _reduce_sum(self, tensor: Tensor) -> Tensor:
        return reduce_sum(self._accelerator, tensor)


def make_experience(
    scored: ScoredRollout,
    config: PPOConfig,
    reduce: Callable[[Tensor], Tensor],
    kl_coef: float | None = None,
) -> tuple[Experience, Metrics]:
    """Experience and the metrics of its rollout, averaged over the episodes of all ranks.

    `kl_coef` is the weight of the KL penalty if it is not that of the config.
    """
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    rollout, mask = scored.rollout, scored.rollout.response_mask
    kl = kl_to_reference(scored, config.kl_estimator)
    penalised = torch.zeros_like(scored.logprobs) if kl is None else kl
    rewards = place_rewards(scored.scores, penalised, mask, kl_coef, scored.token_rewards)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False, reduce_sum=reduce)
    advantages, returns = generalized_advantages(
        rewards, scored.values, mask, gamma=config.gamma, lam=config.lam
    )
    if config.value_lam is not None:
        _, returns = generalized_advantages(
            rewards, scored.values, mask, gamma=config.gamma, lam=config.value_lam
        )
    experience = Experience(
        input_ids=rollout.input_ids,
        attention_mask=rollout.attention_mask,
        response_mask=mask,
        old_logprobs=scored.logprobs,
        old_values=scored.values,
        advantages=whiten(advantages, mask, reduce_sum=reduce),
        returns=returns,
    )
    metrics = rollout_metrics(scored, kl, kl_coef, reduce)
    metrics["val/explained_variance"] = explained_variance(scored.values, returns, mask, reduce)
    return experience, metrics


def kl_to_reference(scored: ScoredRollout, estimator: KLEstimator) -> Tensor | None:
    """`kl_estimate` at every response token; None where the reference was not asked."""
    if scored.reference_logprobs is None:
        return None
    mask = scored.rollout.response_mask
    return kl_estimate(scored.logprobs, scored.reference_logprobs, mask, estimator)


def rollout_metrics(
    scored: ScoredRollout, kl: Tensor | None, kl_coef: float, reduce: Callable[[Tensor], Tensor]
) -> Metrics:
    """Means over the episodes of all ranks, under the names that TRL's trainer logs.

    Without `kl` there is no `objective/kl`.
    """
    mask = scored.rollout.response_mask
    of_sequences = {} if kl is None else {"objective/kl": kl.sum(1)}
    penalty = torch.zeros_like(scored.scores) if kl is None else -kl_coef * kl.sum(1)
    sums = of_sequences | {
        "objective/entropy": -scored.logprobs.sum(1),
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": scored.scores + penalty,
        "objective/scores": scored.scores,
        "objective/response_length": mask.sum(1),
        "objective/stopped": scored.rollout.stopped,
    }
    squared = scored.scores.double().pow(2).sum()
    episodes = torch.tensor(len(mask), dtype=torch.float64, device=mask.device)
    columns = [values.double().sum() for values in sums.values()]
    *totals, squared_total, count = reduce(torch.stack([*columns, squared, episodes])).tolist()
    metrics = {name: total / count for name, total in zip(sums, totals, strict=True)}
    spread = squared_total / count - metrics["objective/scores"] ** 2
    metrics["objective/scores_std"] = max(0.0, spread) ** 0.5
    metrics["val/num_eos_tokens"] = metrics["objective/stopped"] * count
    return metrics | score_metrics(score_columns(scored), reduce)


def score_columns(scored: ScoredRollout) -> dict[str, Tensor]:
    """Scores that are logged beside those that training sees: the reward source's, and each one's
    of several sources.
    """
    raw = {} if scored.raw_scores is None else {"objective/raw_scores": scored.raw_scores}
    return raw | {f"rewards/{name}": column for name, column in scored.source_scores.items()}


def score_metrics(columns: dict[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> Metrics:
    """Mean, of sources unbiased standard deviation too, of each column over all ranks, without NaN.

    The mean of no number is NaN; the deviation of fewer than two is 0.
    """
    metrics: Metrics = {}
    for name, column in columns.items():
        values = column.double()[~column.isnan()]
        sums = torch.stack([values.sum(), values.new_tensor(len(values))])
        total, count = reduce(sums).tolist()
        mean = total / count if count else math.nan
        squares = float(reduce((values - mean).pow(2).sum()))
        std = math.sqrt(squares / (count - 1)) if count > 1 else 0.0
        of_source = name.startswith("rewards/")
        metrics |= {f"{name}/mean": mean, f"{name}/std": std} if of_source else {name: mean}
    return metrics
