"""The attributes of TRL's PPOTrainer that scripts read, answered by what this package has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftModel

from trl_sync.backbone.adapter_roles import reference_adapter
from trl_sync.backbone.separate import SeparateModels
from trl_sync.ppo.config import BatchPlan
from trl_sync.ppo.rewards import ModelReward
from trl_sync.ppo.rollout import Sampling

# Between the random numbers of two processes in TRL.
_SEED_STRIDE = 100003


class TrlAttributes:
    """Read-only names from TRL 1.12. On a shared backbone a model is a view of one role."""

    backbone: Any
    rewards: Any
    sampling: Sampling
    args: Any
    accelerator: Any
    train_dataset: Any
    eval_dataset: Any
    plan: BatchPlan
    callback_handler: Any

    @property
    def policy_model(self) -> Any:
        """The policy: a model, or the view of its role."""
        return self.backbone.policy

    @property
    def value_model(self) -> Any:
        """The value model, or the view of its role."""
        return self.backbone.value_model

    @property
    def ref_model(self) -> Any:
        """The reference; None, as in TRL, if it is the policy without or with another adapter."""
        return getattr(self.backbone, "ref_model", None)

    @property
    def reward_model(self) -> Any:
        """The reward model, or the reward source if it is not a model."""
        return self.rewards.model if isinstance(self.rewards, ModelReward) else self.rewards

    @property
    def stop_token_id(self) -> int | None:
        """The first of the tokens that end a response; None if no token does."""
        return next(iter(self.sampling.stop_token_ids), None)

    @property
    def is_peft_model(self) -> bool:
        """Whether the policy trains adapters."""
        if isinstance(self.backbone, SeparateModels):
            return isinstance(self.backbone.policy, PeftModel)
        return True

    @property
    def model_adapter_name(self) -> str | None:
        """The name of the policy's adapter; None if it has none."""
        return self.backbone.roles["policy"].adapter

    @property
    def ref_adapter_name(self) -> str | None:
        """The name of the reference's adapter; None if it has none."""
        return self.backbone.roles["reference"].adapter

    @property
    def local_seed(self) -> int:
        """A seed that differs between processes, with TRL's formula; nothing here draws from it."""
        return self.args.seed + self.accelerator.process_index * _SEED_STRIDE

    @property
    def train_dataset_len(self) -> int:
        """How many prompts the training dataset has."""
        return len(self.train_dataset)

    @property
    def local_dataloader_batch_size(self) -> int:
        """The prompts of one rollout batch, divided by the number of processes."""
        return self.plan.local_batch_size // self.plan.num_generations

    @property
    def sample_generations_freq(self) -> int:
        """Iterations (rollout batches) from one printing of completions to the next."""
        return max(1, self.plan.num_iterations // max(1, self.args.num_sample_generations))

    @property
    def callbacks(self) -> list[Any]:
        """All callbacks of the trainer."""
        callbacks: list[Any] = self.callback_handler.callbacks
        return callbacks

    @property
    def dataloader(self) -> Any:
        """Micro-batches of experience, a new `get_train_dataloader()`; iterating rolls out."""
        return self.get_train_dataloader()  # type: ignore[attr-defined]

    @property
    def eval_dataloader(self) -> Any:
        """Batches of evaluation prompts; None without an evaluation dataset.

        Raises:
            ConfigError: there are several: call `get_eval_dataloader` with the name of one.
        """
        if self.eval_dataset is None:
            return None
        return self.get_eval_dataloader()  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """Within the block the policy's model answers as the reference, if that is a view of it."""
        if isinstance(self.backbone, SeparateModels):
            if self.backbone.ref_model is None:
                with reference_adapter(self.backbone.policy, self.ref_adapter_name):
                    yield
                return
            yield
            return
        with self.backbone.router.routes(self.ref_adapter_name):
            yield
