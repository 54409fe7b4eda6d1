"""PPOTrainer: the stock Trainer with an experience loader for data and the PPO loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
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
    check_output_folder,
    check_settings,
    check_stop_tokens,
)
from trl_sync.ppo.collectives import reduce_sum
from trl_sync.ppo.completions import answer_prompts, log_completions
from trl_sync.ppo.config import BatchPlan, PPOConfig
from trl_sync.ppo.engine_state import expect_trained_only
from trl_sync.ppo.engines import (
    Engine,
    check_active_engine,
    check_loaded_whole,
    engine_of,
    is_prepared,
    keep_exact,
    place,
)
from trl_sync.ppo.evaluation import EvaluationLoader, evaluate_prompts
from trl_sync.ppo.experience import EVALUATION, ExperienceLoader
from trl_sync.ppo.initial_state import share_initial_state
from trl_sync.ppo.kl_control import KLControl
from trl_sync.ppo.loss import ppo_loss
from trl_sync.ppo.metrics import MetricBuffer
from trl_sync.ppo.model_card import ModelCardMixin, PushValueModel
from trl_sync.ppo.models import (
    build_models,
    causal_model_of,
    check_models,
    check_tokens,
    make_all_whole,
)
from trl_sync.ppo.progress import print_completions, progress_callback
from trl_sync.ppo.prompts import DataCollator, PromptDataset
from trl_sync.ppo.reward_scaling import RunningMoments
from trl_sync.ppo.rewards import (
    AnyReward,
    attach_adapter,
    reward_modules,
    reward_source,
)
from trl_sync.ppo.rollout import Sampling, seeded
from trl_sync.ppo.trl_attributes import TrlAttributes
from trl_sync.ppo.updates import UpdateCallback, check_optimizers, check_warmup, split_off
from trl_sync.renames import accepts_old_arguments


@accepts_old_arguments
class PPOTrainer(TrlAttributes, ModelCardMixin, CheckpointMixin):
    """PPO on one frozen base that policy, value model and reference share, or on four models.

    A `transformers.Trainer`: clipping, accumulation, schedulers, logging, evaluation, checkpoints
    and callbacks behave as in every other one. `state.global_step` counts optimizer updates; an
    epoch is one pass over the prompts. The arguments up to `peft_config` are those of TRL 1.12's
    `PPOTrainer`, in its order.

    - `processing_class`: the tokenizer of the policy.
    - `model`: the policy, a causal LM or a PEFT model of one. Without `value_model` it becomes the
      shared base; a `SharedBackbone` is one already.
    - `ref_model`: the reference, with `value_model` only. Without it the reference is the policy as
      it is at the beginning.
    - `value_model`: a model with a scalar head. With it every model is separate, as in TRL;
      `peft_config` then describes the policy's adapter, which may be of any PEFT type that changes
      layers. Without it, policy and value model are LoRA adapters on the shared base.
    - `reward_model`: a model that makes one number of a sequence, its path or hub name, a function
      `(prompts, completions, **columns) -> list[float]`, or a list of these, which
      `args.reward_weights` weighs. The path of an adapter on the shared base is put on that base;
      a `SharedBackbone` with a reward adapter needs none.
    - `reward_processing_classes`: a tokenizer for each reward model that is to read text tokenized
      anew, None for the others. Not needed for a model whose tokenizer lies beside it.
    - `train_dataset`, `eval_dataset`: with a `prompt` column (text or messages) or `input_ids`;
      further columns go to reward functions.
    - `data_collator`: gets the prompts' `input_ids` and `attention_mask` alone, and may shorten
      them; padding is taken off again.
    - `optimizers`: an optimizer and a scheduler in place of those that `args` describes; no
      optimizer together with `args.value_learning_rate`.
    - `peft_config`: LoRA options of policy and value adapter (see `value_model`).

    Sources: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), arXiv 1707.06347;
    advantages: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation" (2016), arXiv 1506.02438; the KL penalty on tokens: Ziegler et al., "Fine-Tuning
    Language Models from Human Preferences" (2019), arXiv 1909.08593.

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
        reward_model: AnyReward = None,
        train_dataset: Dataset | None = None,
        value_model: nn.Module | None = None,
        data_collator: Any = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: LoraConfig | None = None,
        reward_processing_classes: Any = None,
    ) -> None:
        check_settings(args)
        check_optimizers(args, optimizers)
        make_all_whole(model, ref_model, value_model, reward_model)
        check_models(args, model, ref_model, value_model, peft_config, reward_model)
        check_output_folder(Path(args.output_dir))
        base = causal_model_of(model)
        context = check_tokens(processing_class, model, ref_model, value_model)
        self._make_prompts = functools.partial(
            _prompts,
            tokenizer=processing_class,
            args=args,
            context=context,
            data_collator=data_collator,
        )
        train_prompts = self._make_prompts(train_dataset, "train_dataset")
        eval_prompts = _eval_prompts(eval_dataset, self._make_prompts)
        self.plan = BatchPlan.derive(args, len(train_prompts))
        check_warmup(args, self.plan)
        self.kl_control = KLControl(args, self.plan.batch_size)
        # Before anything is built: it may refuse settings.
        self.sampling = Sampling.of(args, processing_class, base)
        check_stop_tokens(args, self.sampling)
        self.plan.fill_in(args)
        # Own position: the stock one would roll out everything again, see ppo/checkpoint.py.
        args.ignore_data_skip = True
        rewards = reward_source(
            reward_model,
            processing_class,
            conversational=train_prompts.conversational,
            batch_size=args.local_rollout_forward_batch_size,
            device=args.device,
            processing_classes=reward_processing_classes,
            weights=args.reward_weights,
            trainer_state=lambda: getattr(self, "state", None),
            chat_template_kwargs=args.chat_template_kwargs,
            base=model if value_model is None else None,
        )
        set_seed(args.seed)  # adapters are drawn here, alike on every rank
        models = build_models(args, model, ref_model, value_model, peft_config)
        attach_adapter(rewards, models)
        self.backbone = models
        self.rewards = rewards
        self.score_moments = RunningMoments()
        self._check_roles()
        self._train_started_s = time.perf_counter()
        self._first_step = 0
        self._value_learning_rate = args.value_learning_rate
        self._padding_token = base.config.pad_token_id
        super().__init__(
            model=models,
            args=args,
            data_collator=data_collator,
            train_dataset=train_prompts,
            eval_dataset=eval_prompts,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            # transformers before 5.19: the loop divides the loss unless there is such a function
            # (which is never called: `compute_loss` is), and accelerate divides it once more.
            self.compute_loss_func = self.compute_loss
            self.accelerator.gradient_accumulation_steps = 1
        check_active_engine(args, self.accelerator)
        self.engine = engine_of(self.accelerator)
        check_loaded_whole({"model": models, **reward_modules(rewards)})
        keep_exact(self.accelerator, models)
        if self.engine.is_deepspeed:
            expect_trained_only(models)
        share_initial_state(self.accelerator, models, reward_modules(rewards))
        if self.engine.shards_parameters:
            self._frozen_identity()  # later each rank holds a part
        self.metrics = MetricBuffer(lambda tensor: reduce_sum(self.accelerator, tensor))
        self._set_up_callbacks()

    @property
    def episodes(self) -> int:
        """Episodes of all processes whose updates are done or under way."""
        iterations = -(-self.state.global_step // self.plan.updates_per_iteration)
        return iterations * self.plan.batch_size

    @property
    def episodes_before(self) -> int:
        """Episodes of all processes in the run that was resumed; 0 if there was none."""
        return self._first_step // self.plan.updates_per_iteration * self.plan.batch_size

    def get_train_dataloader(self) -> ExperienceLoader:
        """Micro-batches of experience; iterating over it rolls out. Every process must do so.

        A micro-batch, padded on the left: `input_ids` and `attention_mask` [B, T];
        `response_mask`, `old_logprobs` (nats), `old_values`, `advantages` (whitened) and `returns`
        [B, R]; `response_positions` [N], those that the flattened `response_mask` counts;
        `loss_denominator`, the number of response tokens in the global mini-batch.

        Raises:
            RewardError: while iterating: a score is missing or not finite, or another process
                failed.
        """
        return ExperienceLoader(
            config=self.args,
            plan=self.plan,
            prompts=self.train_dataset,
            model=self.backbone,
            rewards=self.rewards,
            sampling=self.sampling,
            accelerator=self.accelerator,
            kl_control=self.kl_control,
            score_moments=self.score_moments,
            first_iteration=self._iterations_done_in_epoch,
            updates_done=lambda: self.state.global_step,
            on_metrics=self.metrics.add_rollout,
            gathered=self.gathered,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EvaluationLoader:
        """Batches of evaluation prompts of this process, `eval_batch_size` prompts each.

        `eval_dataset` is a dataset or the name of one of several; default: the trainer's own.

        Raises:
            ConfigError: there are no evaluation prompts, or they cannot be used.
        """
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        elif eval_dataset is None:
            eval_dataset = self.eval_dataset
        if eval_dataset is None:
            raise ConfigError("There is nothing to evaluate on: pass eval_dataset.")
        if not isinstance(eval_dataset, PromptDataset):
            eval_dataset = self._make_prompts(eval_dataset, "eval_dataset")
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

        The same prompts get the same random numbers at every evaluation. The metrics are
        `objective/scores` (as training sees them), `objective/kl` (nats a sequence),
        `objective/response_length` (tokens), `objective/stopped` (0 to 1) and the raw scores or
        those of several sources, if there are any; `metric_key_prefix` and `_` stand in front. A
        collective.

        Raises:
            RewardError: a score is missing or not finite, or another process failed.
        """
        with self._answering():
            metrics = evaluate_prompts(
                self.backbone,
                dataloader,
                self.rewards,
                self.sampling,
                config=self.args,
                accelerator=self.accelerator,
                score_moments=self.score_moments,
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
        """The PPO loss of one micro-batch, as its share of the global mini-batch's loss; a scalar.

        Times the number of processes, because every engine averages gradients over them. `inputs`
        is a micro-batch of `get_train_dataloader`. With `return_outputs` a pair: the loss, and what
        policy and value model say, as in `SharedBackbone.forward`.

        Sources: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), arXiv
        1707.06347, equation 7; the clipped value loss of OpenAI's `baselines` PPO2.
        """
        mask = inputs["response_mask"]
        # Of the engines only FSDP2 leaves it to the caller; rollouts enter it everywhere.
        with self.accelerator.autocast() if self.engine is Engine.FSDP2 else nullcontext():
            outputs = model(
                inputs["input_ids"],
                inputs["attention_mask"],
                mask,
                roles=(POLICY, VALUE),
                temperature=self.args.temperature,
                response_positions=inputs.get("response_positions"),
            )
        loss, statistics = ppo_loss(
            outputs[POLICY]["logprobs"],
            outputs[VALUE]["values"],
            inputs,
            self.args,
            policy_learns=self.state.global_step >= self.args.value_warmup_steps,
        )
        entropy = {"entropy": outputs[POLICY]["entropies"].detach().sum()}
        self.metrics.add_micro_batch(statistics | entropy)
        # Every engine averages gradients over the processes; the denominator counts all of them.
        loss = loss * self.plan.world_size
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """The stock optimizer; with `value_learning_rate` the value model has groups of its own.

        Raises:
            ConfigError: the optimizer chosen by `optim` has no groups that could be split.
        """
        made_before = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.args.value_learning_rate is not None and not made_before:
            values = [parameter for _, parameter in self.backbone.role_parameters(VALUE)]
            split_off(optimizer, values, self.args.value_learning_rate)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with what PPO measured since the last training log line.

        `eps` are episodes a second, `lr` the learning rate, `episode` is `episodes`; the other
        names are in docs/metrics.md. In a training log line a collective.
        """
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
            if self._gathered_bytes is not None:
                logs["gathered_bytes"] = self._gathered_bytes
            if self._value_learning_rate is not None:
                logs["value_lr"] = self._value_learning_rate
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
        `eval_dataset` as in `get_eval_dataloader`. `role` is "policy" or "reference". Scores are
        those of the reward source, neither scaled nor clipped.

        Raises:
            ConfigError: there are no evaluation prompts, they cannot be used, or `role` has no
                language model.
            RewardError: a score is missing or not finite, or another process failed.
        """
        sampling = dataclasses.replace(self.sampling, greedy=greedy)
        loader = self.get_eval_dataloader(eval_dataset)
        with self._answering():
            return answer_prompts(
                self.backbone,
                loader,
                self.rewards,
                sampling,
                tokenizer=self.processing_class,
                accelerator=self.accelerator,
                batch_size=self.args.local_rollout_forward_batch_size,
                role=role,
                num_batches=num_batches,
            )

    def generate_completions(self, sampling: bool = False) -> None:
        """Prints greedy answers to the evaluation prompts with their scores; to trackers as well.

        With `sampling` only to the first batch of each process, as during training. Without
        evaluation prompts nothing happens. A collective; the main process prints.

        Raises:
            RewardError: a score is missing or not finite, or another process failed.
        """
        several = isinstance(self.eval_dataset, dict)
        names = [] if self.eval_dataset is None else self.eval_dataset if several else [None]
        for name in names:
            columns = self.completions(name, greedy=True, num_batches=1 if sampling else None)
            if self.is_world_process_zero():
                title = f"step {self.state.global_step}"
                print_completions(columns, title=f"{title}, {name}" if several else title)
                log_completions(
                    columns,
                    step=self.state.global_step,
                    name=f"completions_{name}" if several else "completions",
                    report_to=self.args.report_to,
                    callbacks=self.callback_handler.callbacks,
                )

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """As a rollout runs, with the random numbers of evaluations."""
        self.backbone.eval()
        device, rank = self.accelerator.device, self.accelerator.process_index
        if self.engine.places_model and not is_prepared(self.backbone, self.model_wrapped):
            place(self.backbone, device)
        with (
            self.gathered(),
            seeded(device, self.args.seed, EVALUATION, rank),
            self.accelerator.autocast(),
        ):
            yield

    def _stateful(self) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        if self.kl_control.adaptive:
            parts["kl_control"] = self.kl_control
        if self.args.use_score_scaling:
            parts["score_moments"] = self.score_moments
        return parts

    def _iterations_done_in_epoch(self) -> int:
        done = self.state.global_step % self.plan.updates_per_epoch
        return done // self.plan.updates_per_iteration

    def _keep_padding_token(self) -> None:
        """Undoes that the stock loop gives the model the tokenizer's padding token without a row.

        A `[PAD]` that was added without resizing has no embedding, and a model that is saved with
        its id cannot be loaded again.
        """
        model = self.backbone.causal_model
        padding, rows = model.config.pad_token_id, model.get_input_embeddings().weight.shape[0]
        if padding is not None and padding >= rows:
            model.config.pad_token_id = self._padding_token

    def _check_roles(self) -> None:
        """The reward model is frozen and outside the optimizer, the reference never trains."""
        self.backbone.check_roles()
        trained = [p for p in self.backbone.parameters() if p.requires_grad]
        for name, model in reward_modules(self.rewards).items():
            check_frozen(name, model, trained)

    def _set_up_callbacks(self) -> None:
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(progress_callback())
        self.add_callback(PushValueModel())
        # First, so that every other callback sees the epoch as it is.
        self.callback_handler.callbacks.insert(0, UpdateCallback(self))


def _prompts(
    dataset: Any,
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    context: int | None,
    data_collator: DataCollator | None,
) -> PromptDataset:
    if dataset is None:
        raise ConfigError(f"{name} is missing: PPO needs prompts.")
    template_kwargs = args.chat_template_kwargs
    assert not isinstance(template_kwargs, str)  # read by PPOConfig
    return PromptDataset(
        dataset,
        tokenizer,
        max_prompt_tokens=None if context is None else context - args.response_length,
        response_length=args.response_length,
        num_proc=args.dataset_num_proc,
        chat_template_kwargs=template_kwargs,
        data_collator=data_collator,
    )


def _eval_prompts(dataset: Any, make: Callable[[Any, str], PromptDataset]) -> Any:
    if isinstance(dataset, dict):
        return {name: make(part, f"eval_dataset[{name!r}]") for name, part in dataset.items()}
    return None if dataset is None else make(dataset, "eval_dataset")
