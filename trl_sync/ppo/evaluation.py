"""Evaluation prompts, spread over the processes, and the metrics of rolling out on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_sync.ppo.batch import PromptBatch
from trl_sync.ppo.collectives import reduce_sum, together
from trl_sync.ppo.config import PPOConfig
from trl_sync.ppo.experience import Metrics, kl_to_reference, score_columns, score_metrics
from trl_sync.ppo.prompts import PromptDataset
from trl_sync.ppo.reward_scaling import RunningMoments, shape_scores
from trl_sync.ppo.rewards import RewardSource
from trl_sync.ppo.rollout import Sampling, roll_out
from trl_sync.ppo.score import score


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationBatch:
    """Prompts of which the first `num_counted` count; the others only keep the ranks in step."""

    prompts: PromptBatch
    num_counted: int


class EvaluationLoader:
    """This process's share of a dataset, in as many batches as every other process has."""

    def __init__(self, dataset: PromptDataset, *, batch_size: int, rank: int, ranks: int) -> None:
        self.dataset = dataset
        self._batch_size = batch_size
        self._own = list(range(rank, len(dataset), ranks))
        largest_share = -(-len(dataset) // ranks)
        self._num_batches = -(-largest_share // batch_size)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for number in range(self._num_batches):
            start = number * self._batch_size
            rows = self._own[start : start + self._batch_size]
            # A rank without rows left repeats a prompt: a rollout has at least one.
            yield EvaluationBatch(prompts=self.dataset.batch(rows or [0]), num_counted=len(rows))


def evaluate_prompts(
    model: Any,
    loader: EvaluationLoader,
    rewards: RewardSource,
    sampling: Sampling,
    *,
    config: PPOConfig,
    accelerator: Accelerator,
    score_moments: RunningMoments,
) -> Metrics:
    """Mean score, KL to the reference (nats a sequence) and response length over all prompts.

    Scores are scaled by `score_moments` as in training, which stay as they are.

    Raises:
        RewardError: on every process, if scoring failed on one.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    scores_of: dict[str, list[Tensor]] = {}

    def answer_all() -> None:
        for batch in loader:
            rollout = roll_out(
                model,
                batch.prompts,
                sampling,
                batch_size=config.local_rollout_forward_batch_size,
                device=accelerator.device,
            )
            scored = score(
                model,
                rollout,
                rewards,
                temperature=config.temperature,
                batch_size=config.local_rollout_forward_batch_size,
            )
            scored = shape_scores(scored, config, score_moments)
            mask = rollout.response_mask
            kl = kl_to_reference(scored, config.kl_estimator)
            assert kl is not None  # the reference takes part in evaluations, whatever kl_coef is
            columns = (scored.scores, kl.sum(1), mask.sum(1), rollout.stopped)
            counted = [column[: batch.num_counted].double().sum() for column in columns]
            sums.add_(torch.stack([*counted, sums.new_tensor(batch.num_counted)]))
            for name, column in score_columns(scored).items():
                scores_of.setdefault(name, []).append(column[: batch.num_counted])

    together(accelerator, answer_all)
    scores, kl_sum, length, stopped, count = reduce_sum(accelerator, sums).tolist()
    metrics = {
        "objective/scores": scores / count,
        "objective/kl": kl_sum / count,
        "objective/response_length": length / count,
        "objective/stopped": stopped / count,
    }
    columns = {name: torch.cat(parts) for name, parts in scores_of.items()}
    return metrics | score_metrics(columns, lambda tensor: reduce_sum(accelerator, tensor))
