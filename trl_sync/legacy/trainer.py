"""The step API: generate responses, score them yourself, and learn from them with `step`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import set_seed

from trl_sync.legacy.config import PPOConfig
from trl_sync.legacy.control import AdaptiveKLController, FixedKLController, RunningMoments
from trl_sync.legacy.core import (
    PPODecorators,
    convert_to_scalar,
    free_device_cache,
    stats_to_np,
)
from trl_sync.legacy.generation import GenerationMixin
from trl_sync.legacy.inputs import RightPadding, check_episodes, no_dropout
from trl_sync.legacy.learning import LearningMixin
from trl_sync.legacy.logging import log_step
from trl_sync.legacy.newer import refuses_newer_arguments
from trl_sync.legacy.saving import SavingMixin
from trl_sync.legacy.setup import (
    check_arguments,
    make_accelerator,
    make_dataloader,
    make_reference,
    trainable,
)
from trl_sync.legacy.stats import stack_mini_batches
from trl_sync.ppo.collectives import reduce_sum, together


@refuses_newer_arguments
class PPOTrainer(LearningMixin, GenerationMixin, SavingMixin):
    """PPO one batch at a time, as TRL's `PPOTrainer` up to version 0.11.

    - `model`: a model with a value head; its adapter is trained if it is a PEFT model.
    - `ref_model`: the reference for the KL penalty. Default: a frozen copy of the model, of which
      the first `num_shared_layers` layers are shared and frozen; of a PEFT model, the base.
    - `dataset`, `data_collator`: make `dataloader`, in batches of `config.batch_size`.
    - `optimizer`: Adam by default. `lr_scheduler` moves once with each `step`.
    - `training_data_collator`: pads queries with their responses. Default: on the right.

    Below, T are the tokens of the longest query with its response (of an encoder-decoder, of the
    longest response). Of T - 1 columns, column t belongs to token t + 1, whose distribution stands
    at token t. A mask is 1 on tokens of responses.

    Sources: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), arXiv 1707.06347;
    Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), arXiv 1909.08593.

    Raises:
        ConfigError: something that cannot work.
    """

    def __init__(
        self,
        config: Any = None,
        model: Any = None,
        ref_model: Any = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: LRScheduler | None = None,
        training_data_collator: Callable[..., Any] | None = None,
    ) -> None:
        check_arguments(config, model, ref_model, tokenizer, lr_scheduler)
        set_seed(config.seed)
        self.config: PPOConfig = config
        self.accelerator = make_accelerator(config)
        self.is_distributed = self.accelerator.num_processes > 1
        self.is_peft_model = bool(model.is_peft_model)
        self.is_encoder_decoder = bool(getattr(model, "is_encoder_decoder", False))
        config.is_peft_model = self.is_peft_model
        config.is_encoder_decoder = self.is_encoder_decoder
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.model = model
        self.ref_model = make_reference(self.accelerator, model, ref_model, num_shared_layers)
        self.data_collator = training_data_collator or RightPadding(tokenizer.pad_token_id)
        dataloader = None
        if dataset is not None:
            dataloader = self.prepare_dataloader(dataset, data_collator)
        self._prepare(model, optimizer, dataloader, lr_scheduler)
        self._set_up_state()
        self._start_trackers()

    def _prepare(self, model: Any, optimizer: Any, dataloader: Any, lr_scheduler: Any) -> None:
        """Model, optimizer, data loader and scheduler as they are used on this process."""
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        self.model_params = trainable(model)
        if optimizer is None:
            optimizer = torch.optim.Adam(self.model_params, lr=self.config.learning_rate)
        self.model, self.optimizer, self.dataloader, self.lr_scheduler = self.accelerator.prepare(
            model, optimizer, dataloader, lr_scheduler
        )
        spread = model.is_sequential_parallel
        self.current_device = model.v_head.summary.weight.device if spread else self._device()
        # Around a forward pass of the reference.
        self.optional_peft_ctx = (
            model.pretrained_model.disable_adapter if self.ref_model is None else nullcontext
        )

    def _set_up_state(self) -> None:
        """What lasts over steps."""
        config = self.config
        # For functions of the user that carry these decorators.
        PPODecorators.optimize_device_cache = config.optimize_device_cache
        self.kl_ctl: AdaptiveKLController | FixedKLController = (
            AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
            if config.adap_kl_ctrl
            else FixedKLController(config.init_kl_coef)
        )
        self.running = RunningMoments(self.accelerator)
        self.current_step = 0
        self.compare_step = 0
        self.highest_reward = -math.inf

    def __getattr__(self, name: str) -> Any:
        elsewhere = ("train", "evaluate", "save_model", "generate_completions")
        if name in elsewhere and not hasattr(type(self), name):
            raise AttributeError(
                f"The step API has no {name}(): call step() in a loop of your own, or use "
                "trl_sync.PPOTrainer, which runs the loop."
            )
        # Raises, with the error from inside a property if that is why this was called.
        return object.__getattribute__(self, name)

    def _device(self) -> Any:
        return self.accelerator.device

    def _start_trackers(self) -> None:
        if self.config.log_with is None:
            return
        settings = self.config.to_dict()
        if self.config.log_with != "tensorboard":
            settings = {"trl_ppo_trainer_config": settings}
        self.accelerator.init_trackers(
            self.config.tracker_project_name,
            config=settings,
            init_kwargs=self.config.options("tracker_kwargs"),
        )

    def prepare_dataloader(self, dataset: Any, data_collator: Any = None) -> Any:
        """Shuffled batches of the dataset; `dataloader` is made with it.

        Each has `config.batch_size` rows; rows that fill no batch are left out.

        Raises:
            ConfigError: the dataset is of another type, streamed, or smaller than one batch of all
                processes.
        """
        return make_dataloader(self.config, self.model, dataset, data_collator)

    def step(
        self,
        queries: Any,
        responses: Any,
        scores: Any,
        response_masks: Any = None,
    ) -> dict[str, Any]:
        """Learns from one batch: lists of tensors, one entry for each episode.

        Tokens of the query and of the response, without padding, and one number, the score.
        A token whose `response_masks` entry is 0 is no action of the policy: it is neither
        rewarded nor trained. An empty response takes no part. A collective on several processes.
        Returns the statistics; means are over all processes, entries for each sequence or token
        are those of this one. KL and entropy are in nats, `time/ppo/*` in seconds.

        Raises:
            ConfigError: the lists do not fit together or are not one batch, or the training data
                collator cuts sequences.
            RewardError: a score is not finite, or another process failed.
        """
        started_s = time.perf_counter()
        queries, responses, scores, response_masks = together(
            self.accelerator,
            lambda: self._step_safety_checker(
                self.config.batch_size, queries, responses, scores, response_masks
            ),
        )
        score_tensor = self._scaled(torch.stack(scores))
        self._push_if_best(score_tensor)
        timing: dict[str, float] = {}
        batch = self._experience(queries, responses, score_tensor, response_masks, timing)

        with _timed(timing, "optimize_step"):
            all_stats = self._optimize(batch)
        with _timed(timing, "calc_stats"):
            stats = self._statistics(batch, score_tensor, all_stats)
        episodes = self.config.batch_size * self.accelerator.num_processes
        self.kl_ctl.update(stats["objective/kl"], episodes)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self._free_device_cache()
        timing["time/ppo/total"] = time.perf_counter() - started_s
        return stats | timing

    def _statistics(
        self, batch: dict[str, Any], scores: Tensor, all_stats: list[dict[str, Tensor]]
    ) -> dict[str, Any]:
        """The statistics of a step over all processes, a collective."""
        measured = ("masks", "kls", "logprobs", "ref_logprobs", "non_score_reward")
        stats = self.record_step_stats(
            kl_coef=self.kl_ctl.value,
            scores=scores,
            train_stats=stack_mini_batches(all_stats),
            **{name: batch[name] for name in (*measured, "queries", "responses")},
        )
        stats = convert_to_scalar(stats_to_np(self.gather_stats(stats)))
        return stats | {"ppo/learning_rate": self.optimizer.param_groups[0]["lr"]}

    def _step_safety_checker(
        self,
        batch_size: int | None,
        queries: Any,
        responses: Any,
        scores: Any,
        masks: Any = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
        check_episodes(
            batch_size, queries, responses, scores, masks, encoder_decoder=self.is_encoder_decoder
        )

        def moved(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.to(self.current_device) for tensor in tensors]

        flat = [score.detach().float().reshape(()) for score in scores]
        masks = None if masks is None else moved(masks)
        return moved(queries), moved(responses), moved(flat), masks

    def _scaled(self, scores: Tensor) -> Tensor:
        if self.config.use_score_scaling:
            self.running.update(scores)
            if self.config.use_score_norm:
                scores = scores - self.running.mean
            scores = scores / (self.running.std + torch.finfo(scores.dtype).eps)
        if self.config.score_clip is not None:
            scores = scores.clip(-self.config.score_clip, self.config.score_clip)
        return scores

    def _push_if_best(self, scores: Tensor) -> None:
        if not self.config.push_to_hub_if_best_kwargs:
            return
        if self.compare_step % self.config.compare_steps == 0:
            mean = float(reduce_sum(self.accelerator, scores.mean()))
            mean /= self.accelerator.num_processes
            if mean > self.highest_reward:
                self.highest_reward = mean
                self.push_to_hub(**self.config.options("push_to_hub_if_best_kwargs"))
        self.compare_step += 1

    @torch.no_grad()
    def _experience(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: Tensor,
        response_masks: list[Tensor] | None,
        timing: dict[str, float],
    ) -> dict[str, Any]:
        """Log-probabilities, values, advantages and returns, as they are before the updates."""
        model_inputs = self.prepare_model_inputs(queries, responses)
        full = self.config.kl_penalty == "full"
        episodes = (queries, responses, model_inputs)
        with _timed(timing, "forward_pass"):
            logprobs, logits, values, masks = self.batched_forward_pass(
                self.model, *episodes, return_logits=full, response_masks=response_masks
            )
            reference = self.model if self.ref_model is None else self.ref_model
            with self.optional_peft_ctx():
                ref_logprobs, ref_logits, _, _ = self.batched_forward_pass(
                    reference, *episodes, return_logits=full
                )
        with _timed(timing, "compute_rewards"):
            compared = (logprobs, ref_logprobs)
            if logits is not None:
                compared = (logits.log_softmax(-1), ref_logits.log_softmax(-1))
            rewards, non_score_reward, kls = self.compute_rewards(
                scores, compared[0], compared[1], masks
            )
        with _timed(timing, "compute_advantages"):
            values, advantages, returns = self.compute_advantages(values, rewards, masks)
        return {
            "queries": queries,
            "responses": responses,
            "model_inputs": model_inputs,
            "logprobs": logprobs.float(),
            "ref_logprobs": ref_logprobs.float(),
            "values": values.float(),
            "advantages": advantages,
            "returns": returns,
            "masks": masks,
            "kls": kls,
            "non_score_reward": non_score_reward,
        }

    def _optimize(self, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
        """`ppo_epochs` passes over the batch; the statistics of every mini-batch."""
        size, mini_batch_size = self.config.batch_size, self.config.mini_batch_size
        all_stats: list[dict[str, Tensor]] = []
        for _ in range(self.config.ppo_epochs):
            order = np.random.permutation(size)
            for start in range(0, size, mini_batch_size):
                rows = order[start : start + mini_batch_size]
                with self.accelerator.accumulate(self.model):
                    all_stats.append(self._learn_from(batch, rows))
            if self._early_stop(all_stats[-1]["policy/policykl"]):
                break
        return all_stats

    def _learn_from(self, batch: dict[str, Any], rows: Any) -> dict[str, Tensor]:
        inner = self.accelerator.unwrap_model(self.model)
        # Until the backward pass is over, which may compute layers anew.
        with no_dropout(inner, checkpointing=self.config.gradient_checkpointing):
            logprobs, logits, vpreds, _ = self.batched_forward_pass(
                self.model,
                [batch["queries"][row] for row in rows],
                [batch["responses"][row] for row in rows],
                {name: value[rows] for name, value in batch["model_inputs"].items()},
                return_logits=True,
            )
            return self.train_minibatch(
                batch["logprobs"][rows],
                batch["values"][rows],
                logprobs,
                logits,
                vpreds,
                batch["masks"][rows],
                batch["advantages"][rows],
                batch["returns"][rows],
            )

    def _early_stop(self, policykl: Tensor) -> bool:
        """Whether the KL since the last rollout, over all processes, has gone too far."""
        if not self.config.early_stopping:
            return False
        mean = reduce_sum(self.accelerator, policykl.detach()) / self.accelerator.num_processes
        return bool(mean > 1.5 * self.config.target_kl)

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Any,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Sends statistics and rewards of a step to the trackers; to wandb also the texts.

        `rewards` are numbers, one for each episode of this process. A collective on several
        processes.

        Raises:
            ConfigError: a column to log is not in the batch; with wandb alone.
        """
        self.current_step += 1
        log_step(
            self.accelerator,
            stats,
            batch,
            rewards,
            columns=tuple(columns_to_log),
            log_with=self.config.log_with,
            step=self.current_step,
        )

    def _free_device_cache(self) -> None:
        if self.config.optimize_device_cache:
            free_device_cache()


@contextmanager
def _timed(timing: dict[str, float], name: str) -> Iterator[None]:
    """Measures the seconds of what is inside, as TRL names them."""
    started_s = time.perf_counter()
    yield
    timing[f"time/ppo/{name}"] = time.perf_counter() - started_s
