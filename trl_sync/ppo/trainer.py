"""PPOTrainer: the stock Trainer with an experience loader for data and the PPO loss."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from trl_sync.backbone.roles import POLICY, VALUE, check_frozen
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError
from trl_sync.ppo.checkpoint import CheckpointMixin
from trl_sync.ppo.checks import (
    check_models,
    check_output_folder,
    check_settings,
    check_stop_tokens,
)
from trl_sync.ppo.collectives import reduce_sum, together
from trl_sync.ppo.config import BatchPlan, PPOConfig
from trl_sync.ppo.evaluation import EvaluationBatch, EvaluationLoader, evaluate_prompts
from trl_sync.ppo.experience import EVALUATION, ExperienceLoader
from trl_sync.ppo.loss import policy_loss, value_loss
from trl_sync.ppo.metrics import MetricBuffer
from trl_sync.ppo.progress import PPOProgressCallback, print_completions
from trl_sync.ppo.prompts import PromptDataset, check_tokenizer
from trl_sync.ppo.rewards import ModelReward, RewardFunction, completion_texts, reward_source
from trl_sync.ppo.rollout import Sampling, roll_out, seeded, stop_token_ids

COMPLETION_COLUMNS = ("query", "model response", "score")


class PPOTrainer(CheckpointMixin):
    """PPO with policy, value model and reference on one frozen base.

    A `transformers.Trainer`: clipping, accumulation, schedulers, logging, evaluation, checkpoints
    and callbacks behave as in every other one. `state.global_step` counts optimizer updates; an
    epoch is one pass over the prompts.

    - `model`: a causal LM, which becomes the shared base, or a `SharedBackbone`.
    - `reward_model`: a sequence classifier with one label, its path, or a function
      `(prompts, completions, **columns) -> list[float]`.
    - `train_dataset`, `eval_dataset`: with a `prompt` column (text or messages) or `input_ids`;
      further columns go to reward functions.
    - `peft_config`: LoRA options of policy and value adapter, with a causal LM only.

    `ref_model` must be None (the reference is the base) and `value_model` must be None (the value
    model is an adapter on it).

    Raises:
        ConfigError: something that cannot work; nothing has been trained or written by then.
    """

    # The loss is a sum over tokens divided by the tokens of the whole mini-batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel | SharedBackbone,
        ref_model: nn.Module | None = None,
        reward_model: nn.Module | RewardFunction | str | None = None,
        train_dataset: Dataset | None = None,
        value_model: nn.Module | None = None,
        data_collator: Any = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: LoraConfig | None = None,
    ) -> None:
        check_settings(args)
        check_models(model, ref_model, value_model, data_collator, peft_config)
        check_output_folder(Path(args.output_dir))
        base = model.causal_model if isinstance(model, SharedBackbone) else model
        check_tokenizer(processing_class, base.get_input_embeddings().weight.shape[0])
        train_prompts = _prompts(train_dataset, "train_dataset", processing_class, args, base)
        eval_prompts = _eval_prompts(eval_dataset, processing_class, args, base)
        self.plan = BatchPlan.derive(args, len(train_prompts))
        self.plan.fill_in(args)
        # Own position: the stock one would roll out everything again, see ppo/checkpoint.py.
        args.ignore_data_skip = True
        rewards = reward_source(
            reward_model,
            processing_class,
            conversational=train_prompts.conversational,
            batch_size=args.local_rollout_forward_batch_size,
            device=args.device,
        )
        set_seed(args.seed)  # adapters are drawn here, alike on every rank
        if not isinstance(model, SharedBackbone):
            model = SharedBackbone(model, peft_config)
        self.backbone = model
        self.rewards = rewards
        self.sampling = Sampling(
            response_length=args.response_length,
            temperature=args.temperature,
            stop_token_ids=stop_token_ids(args, processing_class, base),
        )
        self._check_roles()
        check_stop_tokens(args, self.sampling)
        self._train_started_s = time.perf_counter()
        self._first_step = 0
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_prompts,
            eval_dataset=eval_prompts,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.metrics = MetricBuffer(lambda tensor: reduce_sum(self.accelerator, tensor))
        self._set_up_callbacks()

    @property
    def reward_model(self) -> Any:
        """The reward model, or the reward source if it is not a model."""
        return self.rewards.model if isinstance(self.rewards, ModelReward) else self.rewards

    @property
    def stop_token_id(self) -> int | None:
        """The first of the tokens that end a response."""
        return next(iter(self.sampling.stop_token_ids), None)

    @property
    def episodes(self) -> int:
        """Episodes whose updates are done or under way."""
        iterations = -(-self.state.global_step // self.plan.updates_per_iteration)
        return iterations * self.plan.batch_size

    @property
    def episodes_before(self) -> int:
        """Episodes of the run that was resumed; 0 if there was none."""
        return self._first_step // self.plan.updates_per_iteration * self.plan.batch_size

    def get_train_dataloader(self) -> ExperienceLoader:
        """Micro-batches of experience; iterating over it rolls out."""
        return ExperienceLoader(
            config=self.args,
            plan=self.plan,
            prompts=self.train_dataset,
            model=self.backbone,
            rewards=self.rewards,
            sampling=self.sampling,
            accelerator=self.accelerator,
            first_iteration=self._iterations_done_in_epoch,
            on_metrics=self.metrics.add_rollout,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EvaluationLoader:
        """Batches of evaluation prompts of this process."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        elif eval_dataset is None:
            eval_dataset = self.eval_dataset
        if eval_dataset is None:
            raise ConfigError("There is nothing to evaluate on: pass eval_dataset.")
        if not isinstance(eval_dataset, PromptDataset):
            eval_dataset = _prompts(
                eval_dataset,
                "eval_dataset",
                self.processing_class,
                self.args,
                self.backbone.causal_model,
            )
        return EvaluationLoader(
            eval_dataset,
            batch_size=self.args.eval_batch_size,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )

    def evaluation_loop(
        self,
        dataloader: EvaluationLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Rolls out on the evaluation prompts, sampling as in training; means over all of them.

        The same prompts get the same random numbers at every evaluation.
        """
        self.backbone.eval()
        device, rank = self.accelerator.device, self.accelerator.process_index
        with seeded(device, self.args.seed, EVALUATION, rank), self.accelerator.autocast():
            metrics = evaluate_prompts(
                self.backbone,
                dataloader,
                self.rewards,
                self.sampling,
                config=self.args,
                accelerator=self.accelerator,
            )
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics=prefixed,
            num_samples=len(dataloader.dataset),
        )

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not for PPO: there are no labels to predict.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("predict() does not apply to PPO: use completions() or evaluate().")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The PPO loss of one micro-batch, as its share of the global mini-batch's loss."""
        mask = inputs["response_mask"]
        outputs = model(
            inputs["input_ids"],
            inputs["attention_mask"],
            mask,
            roles=(POLICY, VALUE),
            temperature=self.args.temperature,
        )
        denominator = inputs["loss_denominator"]
        of_policy, policy_statistics = policy_loss(
            outputs[POLICY]["logprobs"],
            inputs["old_logprobs"],
            inputs["advantages"],
            mask,
            cliprange=self.args.cliprange,
            denominator=denominator,
        )
        of_value, value_statistics = value_loss(
            outputs[VALUE]["values"],
            inputs["old_values"],
            inputs["returns"],
            mask,
            cliprange_value=self.args.cliprange_value,
            denominator=denominator,
        )
        entropy = {"entropy": outputs[POLICY]["entropies"].detach().sum()}
        self.metrics.add_micro_batch(policy_statistics | value_statistics | entropy)
        # Every engine averages gradients over the processes; the denominator counts all of them.
        loss = (of_policy + self.args.vf_coef * of_value) * self.plan.world_size
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what PPO measured since the last training log line."""
        if "loss" in logs:
            elapsed_s = max(time.perf_counter() - self._train_started_s, 1e-9)
            steps = self.state.global_step - self._first_step
            done = steps / self.plan.updates_per_iteration * self.plan.batch_size
            logs |= self.metrics.drain()
            logs |= {
                "eps": done / elapsed_s,
                "lr": logs["learning_rate"],
                "episode": self.episodes,
            }
        super().log(logs, start_time)

    def completions(
        self,
        eval_dataset: Any = None,
        *,
        role: str = POLICY,
        greedy: bool = False,
        num_batches: int | None = None,
    ) -> dict[str, list[Any]]:
        """Answers of `role` to the evaluation prompts: `query`, `model response`, `score`.

        Gathered from all processes, so every one must call it. The same prompts are sampled with
        the same random numbers at every call. `num_batches` limits what each process answers.

        Raises:
            ConfigError: there are no evaluation prompts.
        """
        sampling = dataclasses.replace(self.sampling, greedy=greedy)
        loader = self.get_eval_dataloader(eval_dataset)
        self.backbone.eval()
        device, rank = self.accelerator.device, self.accelerator.process_index
        with seeded(device, self.args.seed, EVALUATION, rank), self.accelerator.autocast():
            rows = together(
                self.accelerator,
                lambda: [
                    row
                    for batch in itertools.islice(loader, num_batches)
                    for row in self._answer(batch, sampling, role)[: batch.num_counted]
                ],
            )
        columns = zip(*gather_object(rows), strict=True)
        return dict(zip(COMPLETION_COLUMNS, map(list, columns), strict=True))

    def generate_completions(self, sampling: bool = False) -> None:
        """Prints greedy answers to the evaluation prompts with their scores.

        With `sampling` only to the first batch of each process, as during training.
        """
        several = isinstance(self.eval_dataset, dict)
        for name in self.eval_dataset if several else [None]:
            columns = self.completions(name, greedy=True, num_batches=1 if sampling else None)
            if self.is_world_process_zero():
                title = f"step {self.state.global_step}"
                print_completions(columns, title=f"{title}, {name}" if several else title)

    def _answer(
        self, batch: EvaluationBatch, sampling: Sampling, role: str
    ) -> list[tuple[str, str, float]]:
        rollout = roll_out(
            self.backbone,
            batch.prompts,
            sampling,
            batch_size=self.args.local_rollout_forward_batch_size,
            device=self.accelerator.device,
            role=role,
        )
        queries = self.processing_class.batch_decode(
            batch.prompts.token_ids, skip_special_tokens=True
        )
        responses = completion_texts(rollout, self.processing_class)
        return list(zip(queries, responses, self.rewards(rollout).tolist(), strict=True))

    def _iterations_done_in_epoch(self) -> int:
        done = self.state.global_step % self.plan.updates_per_epoch
        return done // self.plan.updates_per_iteration

    def _check_roles(self) -> None:
        """The reward model is frozen and outside the optimizer, the reference never trains."""
        self.backbone.check_roles()
        if isinstance(self.rewards, ModelReward):
            trained = [p for p in self.backbone.parameters() if p.requires_grad]
            check_frozen("reward model", self.rewards.model, trained)

    def _set_up_callbacks(self) -> None:
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(PPOProgressCallback())
        # First, so that every other callback sees the epoch as it is.
        self.callback_handler.callbacks.insert(0, _UpdateCallback(self))


class _UpdateCallback(TrainerCallback):
    """Closes each optimizer update: its metrics, the epoch, and now and then completions."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._train_started_s = time.perf_counter()
        self._trainer._first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.metrics.end_update()
        plan = self._trainer.plan
        # The stock loop counts from the beginning of the epoch, also after resuming inside it.
        state.epoch = state.global_step / plan.updates_per_epoch
        every = max(1, plan.num_iterations // max(1, args.num_sample_generations))
        wanted = args.num_sample_generations and self._trainer.eval_dataset is not None
        iterations, inside = divmod(state.global_step, plan.updates_per_iteration)
        if wanted and not inside and iterations % every == 0:
            self._trainer.generate_completions(sampling=True)


def _prompts(
    dataset: Any,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    base: PreTrainedModel,
) -> PromptDataset:
    if dataset is None:
        raise ConfigError(f"{name} is missing: PPO needs prompts.")
    context = getattr(base.config, "max_position_embeddings", None)
    return PromptDataset(
        dataset,
        tokenizer,
        max_prompt_tokens=None if context is None else context - args.response_length,
        response_length=args.response_length,
        num_proc=args.dataset_num_proc,
    )


def _eval_prompts(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, args: PPOConfig, base: PreTrainedModel
) -> Any:
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {
            name: _prompts(part, f"eval_dataset[{name!r}]", tokenizer, args, base)
            for name, part in dataset.items()
        }
    return _prompts(dataset, "eval_dataset", tokenizer, args, base)
