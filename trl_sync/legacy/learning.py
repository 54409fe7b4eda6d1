"""The methods of the step API that subclasses override: forward passes, rewards, losses."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from trl_sync.legacy.config import PPOConfig
from trl_sync.legacy.core import logprobs_from_logits
from trl_sync.legacy.inputs import collate, response_columns
from trl_sync.legacy.losses import (
    add_scores,
    advantages_and_returns,
    kl_penalties,
    losses_and_statistics,
)
from trl_sync.legacy.stats import mean_over_processes, step_statistics
from trl_sync.ppo.advantage import whiten
from trl_sync.ppo.collectives import reduce_sum


class LearningMixin:
    """What `step` is made of. Axes as in `trl_sync.legacy.losses`."""

    accelerator: Any
    config: PPOConfig
    current_device: Any
    data_collator: Any
    is_encoder_decoder: bool
    kl_ctl: Any
    model_params: list[torch.nn.Parameter]
    optimizer: Any

    def prepare_model_inputs(
        self, queries: list[Tensor], responses: list[Tensor]
    ) -> dict[str, Tensor]:
        """Queries and responses as padded inputs of the model.

        `input_ids` and `attention_mask`, (B, T). Of an encoder-decoder they are the queries,
        (B, P), and the responses stand beside them, (B, T), with `decoder_` in front.
        """
        device = self.current_device
        if not self.is_encoder_decoder:
            pairs = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
            return collate(self.data_collator, pairs, device)
        inputs = collate(self.data_collator, queries, device)
        decoder_inputs = collate(self.data_collator, responses, device)
        return inputs | {f"decoder_{name}": value for name, value in decoder_inputs.items()}

    def batched_forward_pass(
        self,
        model: Any,
        queries: list[Tensor],
        responses: list[Tensor],
        model_inputs: dict[str, Tensor],
        return_logits: bool = False,
        response_masks: list[Tensor] | None = None,
    ) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Log-probabilities, logits (or None), values and masks, `mini_batch_size` rows at a time.

        Log-probabilities (nats), values and masks are (B, T - 1), logits (B, T - 1, V) in fp32.
        Without gradients the model is put into evaluation mode; with them its mode stays, and
        `step` switches dropout off before it calls this.

        Raises:
            ConfigError: the training data collator has cut sequences.
        """
        size = self.config.mini_batch_size
        decoder = "decoder_" if self.is_encoder_decoder else ""
        if not torch.is_grad_enabled():
            model.eval()
        parts = []
        for start in range(0, len(queries), size):
            rows = slice(start, start + size)
            inputs = {name: value[rows] for name, value in model_inputs.items()}
            with self.accelerator.autocast():  # also for the reference, which is not prepared
                logits, _, values = model(**inputs)
            logits = logits.float()
            tokens = inputs[f"{decoder}input_ids"]
            own = responses[rows]
            sequences = (
                own
                if decoder
                else [torch.cat(pair) for pair in zip(queries[rows], own, strict=True)]
            )
            masks = response_columns(
                inputs[f"{decoder}attention_mask"],
                sequences,
                own,
                None if response_masks is None else response_masks[rows],
                encoder_decoder=self.is_encoder_decoder,
            )
            logprobs = logprobs_from_logits(logits[:, :-1], tokens[:, 1:])
            kept = logits[:, :-1] if return_logits else None
            parts.append((logprobs, kept, values[:, :-1], masks))
        columns = list(zip(*parts, strict=True))
        all_logprobs, all_values, all_masks = (torch.cat(columns[i]) for i in (0, 2, 3))
        all_logits = torch.cat(columns[1]) if return_logits else None
        return all_logprobs, all_logits, all_values, all_masks

    def train_minibatch(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logprobs: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> dict[str, Tensor]:
        """One backward pass; the optimizer moves at the end of an accumulation.

        The arguments are those of `loss`; returns its statistics.
        """
        loss_policy, loss_value, stats = self.loss(
            old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
        )
        self.accelerator.backward(loss_policy + loss_value)
        if self.config.max_grad_norm is not None and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model_params, self.config.max_grad_norm)
        # Both do nothing inside an accumulation.
        self.optimizer.step()
        self.optimizer.zero_grad()
        return stats

    def compute_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, their part without scores, and the KL penalty (nats), each (B, T - 1).

        `scores` are (B,), log-probabilities and masks (B, T - 1). Log-probabilities are those of
        every token of the vocabulary, (B, T - 1, V), if `kl_penalty` is "full". A score stands on
        the last token that counts; the KL penalty is in every column, masked or not.

        Sources: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), arXiv
        1909.08593, 2.2; "kl" and "mse" are the estimators k1 and k2 of J. Schulman, "Approximating
        KL Divergence" (2020).
        """
        rows = zip(logprobs, ref_logprobs, strict=True)
        kls = torch.stack([self._kl_penalty(own, reference) for own, reference in rows])
        non_score_rewards = -self.kl_ctl.value * kls
        return add_scores(non_score_rewards, scores, masks), non_score_rewards, kls

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        """The KL penalty on the tokens of one sequence, (T - 1,), which subclasses override."""
        return kl_penalties(logprob, ref_logprob, self.config.kl_penalty)

    def compute_advantages(
        self, values: Tensor, rewards: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values where they count, advantages whitened over all processes, and returns.

        All (B, T - 1). By GAE over the tokens that count: those between them that do not are no
        steps. A collective.

        Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
        Estimation" (2016), arXiv 1506.02438, equation 16.
        """
        counted = mask.bool()

        def add(tensor: Tensor) -> Tensor:
            return reduce_sum(self.accelerator, tensor)

        values, rewards = (values * mask).float(), (rewards * mask).float()
        if self.config.whiten_rewards:
            rewards = whiten(rewards, counted, shift_mean=False, reduce_sum=add)
        advantages, returns = advantages_and_returns(
            rewards, values, mask, gamma=self.config.gamma, lam=self.config.lam
        )
        return values, whiten(advantages, counted, reduce_sum=add), returns

    def loss(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Policy loss, `vf_coef` x value loss, and the statistics of a mini-batch.

        Arguments are (B, T - 1), `logits` (B, T - 1, V); `values` are those before the first
        update, `vpreds` those now. Both losses are means over the tokens that count, and 0 where
        the mean ratio exceeds `ratio_threshold`, of which a warning tells.

        Sources: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), arXiv
        1707.06347, equation 7; the clipped value loss of OpenAI's `baselines` PPO2.
        """
        of_policy, of_value, stats, mean_ratio = losses_and_statistics(
            self.config,
            old_logprobs=old_logprobs,
            values=values,
            logits=logits,
            vpreds=vpreds,
            logprobs=logprobs,
            mask=mask,
            advantages=advantages,
            returns=returns,
        )
        if mean_ratio > self.config.ratio_threshold:
            warnings.warn(
                f"A mini-batch was left out: its mean ratio of {mean_ratio:.2f} exceeds "
                f"ratio_threshold={self.config.ratio_threshold:g}.",
                stacklevel=2,
            )
        return of_policy, self.config.vf_coef * of_value, stats

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        """The statistics of a step on this process, under TRL's names; see `trl_sync.legacy.stats`.

        Warns where the mean KL of the responses is below -1 nat.
        """
        stats = step_statistics(kl_coef=kl_coef, **data)
        if stats["objective/kl"] < -1.0:
            warnings.warn(
                f"The KL to the reference is negative, {float(stats['objective/kl']):.2f}: the "
                "responses are not samples of the policy. Look at the generation arguments: top_k, "
                "top_p, temperature and penalties change the distribution.",
                stacklevel=3,
            )
        return stats

    def gather_stats(self, stats: dict[str, Any]) -> dict[str, Any]:
        """The statistics with single numbers averaged over processes, a collective."""
        return mean_over_processes(self.accelerator, stats)
