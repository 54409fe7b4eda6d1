"""What PPO's options change around an optimizer update: who moves, at what rate, and what is left
out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerCallback
from transformers.optimization import GreedyLR
from transformers.trainer_callback import DefaultFlowCallback
from transformers.utils import logging

from trl_sync.backbone.roles import POLICY
from trl_sync.errors import ConfigError
from trl_sync.ppo.config import BatchPlan, PPOConfig
from trl_sync.ppo.run_record import write_run_record

logger = logging.get_logger(__name__)

# An update whose approximate KL is above this many times `target_kl` ends its iteration.
KL_TOLERANCE = 1.5


def check_optimizers(args: PPOConfig, optimizers: tuple[Any, Any]) -> None:
    """Nothing, if the optimizer is made here or no rate of its own is asked for the value model.

    Raises:
        ConfigError: an optimizer was given and `value_learning_rate` is set.
    """
    if args.value_learning_rate is not None and optimizers[0] is not None:
        raise ConfigError(
            f"value_learning_rate={args.value_learning_rate:g} has no effect on an optimizer that "
            "was made already: give its parameter groups their rates and leave it unset, or pass "
            "optimizers=(None, None)."
        )


def check_warmup(args: PPOConfig, plan: BatchPlan) -> None:
    """Nothing, if the policy trains at some time.

    Raises:
        ConfigError: `value_warmup_steps` is as long as the run.
    """
    if 0 < plan.max_steps <= args.value_warmup_steps:
        raise ConfigError(
            f"value_warmup_steps={args.value_warmup_steps} is not less than the run's "
            f"{plan.max_steps} optimizer updates: the policy would never train."
        )


def split_off(optimizer: Any, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
    """Moves `parameters` into groups of their own with that rate; other options stay as they are.

    The new groups are the last ones, so the first still tells the rate of the others.

    Raises:
        ConfigError: the optimizer has no group with one of them.
    """
    wanted = {id(parameter) for parameter in parameters}
    found = 0
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if not own:
            continue
        found += len(own)
        group["params"] = [p for p in group["params"] if id(p) not in wanted]
        optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
    if found != len(wanted):
        raise ConfigError(
            f"value_learning_rate={learning_rate:g} needs an optimizer with parameter groups; "
            f"{type(optimizer).__name__} has {found} of the value model's {len(wanted)} parameters "
            "in its own: choose another optim, or leave value_learning_rate unset."
        )


def exceeds(approximate_kl: float, target_kl: float) -> bool:
    """Whether an update with that mean approximate KL is the last of its iteration."""
    return approximate_kl > KL_TOLERANCE * target_kl


def skip_rest_of_iteration(
    plan: BatchPlan, args: PPOConfig, state: Any, control: Any, lr_scheduler: Any
) -> int:
    """Moves `state.global_step` to the iteration's end; returns how many updates are left out.

    They count as steps in which nothing happened: the learning rate stays a function of
    `global_step`, and what is due at one of them (log, evaluation, save), or at the update just
    made, is due at the end.
    """
    skipped = -state.global_step % plan.updates_per_iteration
    # These two follow a metric, not the step; the stock loop does not step them either.
    by_metric = (ReduceLROnPlateau, GreedyLR)
    for _ in range(skipped):
        # The stock loop asks for the last step only.
        DefaultFlowCallback().on_step_end(args, state, control)
        state.global_step += 1
        if not isinstance(lr_scheduler, by_metric):
            lr_scheduler.step()
    return skipped


class UpdateCallback(TrainerCallback):
    """Closes each optimizer update: its metrics, the epoch, and now and then completions."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._train_started_s = time.perf_counter()
        self._trainer._first_step = state.global_step
        self._trainer._keep_padding_token()
        state.episode = self._trainer.episodes
        if state.is_world_process_zero and state.global_step >= self._trainer.plan.max_steps:
            logger.warning(
                f"All {self._trainer.plan.max_steps} updates are done: nothing is left to train. "
                "A higher total_episodes, num_train_epochs or max_steps goes on from here."
            )
        if state.is_world_process_zero:
            write_run_record(self._trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < args.value_warmup_steps:
            # Without a gradient neither weight decay nor Adam's moments move the policy.
            for _, parameter in self._trainer.backbone.role_parameters(POLICY):
                parameter.grad = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The rate of this update: the stock loop steps the scheduler next, and then logs.
        if args.value_learning_rate is not None:
            rate = self._trainer.optimizer.param_groups[-1]["lr"]
            self._trainer._value_learning_rate = float(rate)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.metrics.end_update()
        plan = self._trainer.plan
        if args.target_kl is not None:
            skipped = 0
            if exceeds(self._trainer.metrics.last_update().get("approx_kl", 0.0), args.target_kl):
                scheduler = self._trainer.lr_scheduler
                skipped = skip_rest_of_iteration(plan, args, state, control, scheduler)
            if state.global_step % plan.updates_per_iteration == 0:
                self._trainer.metrics.end_iteration(skipped)
        state.episode = self._trainer.episodes
        # The stock loop counts from the beginning of the epoch, also after resuming inside it.
        state.epoch = state.global_step / plan.updates_per_epoch
        every = self._trainer.sample_generations_freq
        wanted = args.num_sample_generations and self._trainer.eval_dataset is not None
        iterations, inside = divmod(state.global_step, plan.updates_per_iteration)
        if wanted and not inside and iterations % every == 0:
            self._trainer.generate_completions(sampling=True)
