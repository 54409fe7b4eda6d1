"""PPOConfig, what the user chose, and BatchPlan, the sizes that follow from it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from trl_sync.errors import ConfigError
from trl_sync.processes import launched_processes
from trl_sync.renames import accepts_old_config_names


@accepts_old_config_names
@dataclass
class PPOConfig(TrainingArguments):
    """The settings of PPO: the fields and defaults of TRL 1.12's `PPOConfig`.

    Every field of `transformers.TrainingArguments` is there too, and below TRL's fields the ones it
    does not have, all of them off by default. Different from TRL: `bf16`
    defaults to True only where the device computes bfloat16 natively, so `PPOConfig()` constructs
    on any machine; and `bf16`, `gradient_checkpointing`, `max_grad_norm`, evaluation and saving
    take effect.

    `per_device_train_batch_size` is the size of a micro-batch; `gradient_accumulation_steps` counts
    the micro-batches of one rollout batch, as in TRL. The stock training loop accumulates over one
    mini-batch, so after construction the field holds the number of micro-batches of one mini-batch;
    the last of them is smaller if `num_mini_batches` does not divide evenly.

    A step is one optimizer update, an episode one response to one prompt. Names of TRL's older
    trainers are accepted with a `FutureWarning` where the meaning is the same.

    Sources: `kl_estimator`: J. Schulman, "Approximating KL Divergence" (2020); `kl_target`: Ziegler
    et al., "Fine-Tuning Language Models from Human Preferences" (2019), arXiv 1909.08593, 2.2;
    `cliprange_high`: Yu et al., "DAPO" (2025), equation 10; the others: see `PPOTrainer`.

    Raises:
        ConfigError: sizes that do not divide, a setting out of its range, two that contradict each
            other, or an older name that has no equal here.
    """

    if TYPE_CHECKING:  # three fields of TrainingArguments that are set below
        gradient_accumulation_steps: int
        ddp_find_unused_parameters: bool | None
        metric_for_best_model: str | None

    # Named in TRL but read-only here: filled in below the class.
    world_size: int | None = field(
        default=None, metadata={"help": "Computed: number of processes. Do not set."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every this many optimizer updates."}
    )
    gradient_checkpointing: bool | None = field(
        default=True,
        metadata={"help": "Recompute activations in backward: less memory, about 20%% slower."},
    )
    # New in transformers 5.23; here on every version.
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "The newer name of gradient_checkpointing."}
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The newer name of gradient_checkpointing_kwargs."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16. Default: True where the device supports it natively."
        },
    )
    learning_rate: float = field(
        default=3e-6,
        metadata={"help": "Initial learning rate of AdamW. LoRA wants about 10x more."},
    )
    lr_scheduler_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Further arguments of the learning rate scheduler, as JSON."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize the dataset."}
    )
    num_mini_batches: int = field(
        default=1, metadata={"help": "Optimizer updates per PPO epoch of one rollout batch."}
    )
    total_episodes: int | None = field(
        default=None,
        metadata={
            "help": "Episodes to train for. Default: num_train_epochs x size of the dataset x "
            "num_generations."
        },
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Sequences that one process generates or scores at once."}
    )
    num_sample_generations: int = field(
        default=10,
        metadata={"help": "How often to print completions of the evaluation prompts. 0: never."},
    )
    response_length: int = field(
        default=53, metadata={"help": "Most tokens that a response may have."}
    )
    stop_token: Literal["eos"] | None = field(
        default=None,
        metadata={
            "help": "'eos': a response ends at the tokenizer's end-of-sequence token. Not set: "
            "every response has response_length tokens. Excludes stop_token_id."
        },
    )
    stop_token_id: int | None = field(
        default=None, metadata={"help": "Id of the token that ends a response."}
    )
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature."})
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Subtracted from the score of a response that has no stop token."},
    )
    sft_model_path: str = field(
        default="EleutherAI/pythia-160m",
        metadata={"help": "Read by scripts only: path of the SFT model."},
    )
    reward_model_path: str = field(
        default="EleutherAI/pythia-160m",
        metadata={"help": "Reward model of a recipe: path or hub name of a sequence classifier."},
    )
    num_total_batches: int | None = field(
        default=None, metadata={"help": "Computed: number of rollout batches. Do not set."}
    )
    micro_batch_size: int | None = field(
        default=None, metadata={"help": "Computed: micro-batch over all processes. Do not set."}
    )
    local_batch_size: int | None = field(
        default=None, metadata={"help": "Computed: rollout batch of one process. Do not set."}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Computed: rollout batch over all processes. Do not set."}
    )
    local_mini_batch_size: int | None = field(
        default=None, metadata={"help": "Computed: mini-batch of one process. Do not set."}
    )
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Computed: mini-batch over all processes. Do not set."}
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Push the trained adapters to the hub."}
    )
    model_adapter_name: str | None = field(
        default=None, metadata={"help": "TRL's name of the trained adapter; always 'policy' here."}
    )
    ref_adapter_name: str | None = field(
        default=None, metadata={"help": "TRL's name of the reference adapter; 'reference' here."}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout batch."})
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Scale the rewards to unit variance before GAE."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL penalty."})
    kl_estimator: Literal["k1", "k3"] = field(
        default="k1",
        metadata={"help": "k1: log ratio; k3: ratio - 1 - log ratio, never negative."},
    )
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy's ratio."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the values."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "Under ZeRO-3, gather the weights once for each rollout."}
    )
    use_vllm: bool = field(
        default=False, metadata={"help": "Not supported yet: rollouts use transformers' generate."}
    )

    # What TRL's PPO does not have.
    num_generations: int = field(
        default=1, metadata={"help": "Responses sampled for each prompt of a rollout batch."}
    )
    generation_config: GenerationConfig | str | None = field(
        default=None,
        metadata={
            "help": "A GenerationConfig, or the path or hub name of one, that rollouts begin from."
        },
    )
    generation_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of generate in rollouts, as JSON (top_p, min_p, ...)."
        },
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Further arguments of the chat template, as JSON."},
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each reward source, in their order. Default: 1.0 each."},
    )
    use_score_scaling: bool = field(
        default=False,
        metadata={"help": "Divide scores by their running standard deviation."},
    )
    use_score_norm: bool = field(
        default=False,
        metadata={"help": "With use_score_scaling: subtract the running mean first."},
    )
    score_clip: float | None = field(
        default=None,
        metadata={"help": "Clip scores to [-score_clip, score_clip], after scaling."},
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Adapt kl_coef so that objective/kl (nats a sequence) approaches this."},
    )
    kl_horizon: float = field(
        default=10000.0, metadata={"help": "With kl_target: episodes over which kl_coef adapts."}
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Skip the rest of an iteration once an update's policy/approxkl_avg exceeds "
            "1.5 times this."
        },
    )
    ratio_threshold: float | None = field(
        default=None,
        metadata={"help": "Leave out micro-batches whose mean ratio exceeds this."},
    )
    cliprange_high: float | None = field(
        default=None,
        metadata={"help": "Upper clip range of the policy's ratio. Default: cliprange."},
    )
    value_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the value model. Default: learning_rate."},
    )
    value_lam: float | None = field(
        default=None,
        metadata={"help": "Lambda of the returns that the value model learns. Default: lam."},
    )
    value_warmup_steps: int = field(
        default=0,
        metadata={"help": "Optimizer updates in which the value model trains and the policy not."},
    )

    def __post_init__(self) -> None:
        if launched_processes() > 1 and not torch.accelerator.is_available():
            # Without this accelerate looks for GPUs, finds none, and each rank trains alone.
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _computes_bf16_natively(bool(self.use_cpu))
        # transformers 5.23 renamed these two and warns at the old names; earlier versions read
        # only those. Both names work here, without a warning, and have the same value.
        renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
        for old, new in (
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            if getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
            setattr(self, old, None if renamed else getattr(self, new))
        best = self.load_best_model_at_end or self.save_strategy == "best"
        if best and self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = "objective/scores", True
        for name in ("generation_kwargs", "chat_template_kwargs"):
            setattr(self, name, _parsed(name, getattr(self, name)))
        _check_ranges(self)
        self._split_accumulation()
        if self.ddp_find_unused_parameters is None:
            # Every trainable parameter takes part in every pass.
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        if not renamed:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        _check_world_size(self, self._given_world_size)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; `PPOConfig(**config.to_dict())` is a copy."""
        fields: dict[str, Any] = super().to_dict()
        # transformers takes every name that ends in `_token` for a secret and hides its value.
        fields["stop_token"] = self.stop_token
        if isinstance(self.generation_config, GenerationConfig):
            fields["generation_config"] = self.generation_config.to_dict()
        return fields

    def _split_accumulation(self) -> None:
        """Turns micro-batches of a rollout batch into those of a mini-batch; a copy has them."""
        steps = int(self.gradient_accumulation_steps)
        per_device, parts = self.per_device_train_batch_size, self.num_mini_batches
        local_batch_size = self.local_batch_size
        if local_batch_size is None:
            local_batch_size = per_device * steps
        split = math.ceil(local_batch_size / parts / per_device)
        if steps != split and per_device * steps != local_batch_size:
            raise ConfigError(
                f"local_batch_size={local_batch_size} is computed from per_device_train_batch_size="
                f"{per_device} and gradient_accumulation_steps={steps}, and does not fit them: "
                "leave it unset."
            )
        if local_batch_size % parts:
            raise ConfigError(
                f"A rollout batch of {local_batch_size} episodes on each process "
                f"(per_device_train_batch_size={per_device} x gradient_accumulation_steps={steps}) "
                f"does not divide into num_mini_batches={parts} equal mini-batches: use a multiple "
                f"of {parts}."
            )
        self.local_batch_size = local_batch_size
        self.gradient_accumulation_steps = split


def _parsed(name: str, value: Any) -> dict[str, Any] | None:
    """A dictionary from itself or from JSON, which is how the command line gives it.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{name}={value!r} is not JSON: {error}.") from error
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name} must be a dictionary, got {value!r}.")
    return value


def _world_size(self: PPOConfig) -> int:
    return int(TrainingArguments.world_size.fget(self))


def _set_world_size(self: PPOConfig, value: Any) -> None:
    # TRL's field is filled in by its trainer; here it is always the launcher's number, which the
    # constructor knows only at its end.
    self._given_world_size = value
    if hasattr(self, "distributed_state"):
        _check_world_size(self, value)


def _check_world_size(config: PPOConfig, value: Any) -> None:
    if value is not None and value != config.world_size:
        raise ConfigError(
            f"world_size={value} was given, but the launcher started {config.world_size} "
            "processes: set the number with accelerate launch --num_processes."
        )


# The dataclass above made `world_size` an argument of the constructor, as in TRL; as an attribute
# it stays what transformers computes.
PPOConfig.world_size = property(_world_size, _set_world_size)  # type: ignore[assignment]


def _computes_bf16_natively(use_cpu: bool) -> bool:
    if use_cpu or not torch.cuda.is_available():
        return False
    return bool(is_torch_bf16_gpu_available())


def _check_ranges(config: PPOConfig) -> None:
    positive = (
        *("num_mini_batches", "num_ppo_epochs", "response_length", "temperature"),
        *("local_rollout_forward_batch_size", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "cliprange", "cliprange_value", "cliprange_high"),
        *("num_generations", "score_clip", "kl_target", "kl_horizon", "target_kl"),
        "ratio_threshold",
    )
    not_negative = (
        *("kl_coef", "vf_coef", "num_sample_generations"),
        *("value_learning_rate", "value_warmup_steps"),
    )
    for name, value in _set_fields(config, positive):
        if not value > 0:
            raise ConfigError(f"{name} must be positive, got {value}.")
    for name, value in _set_fields(config, not_negative):
        if not value >= 0:
            raise ConfigError(f"{name} must not be negative, got {value}.")
    for name, value in _set_fields(config, ("gamma", "lam", "value_lam")):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} must lie between 0 and 1, got {value}.")
    for name in ("num_generations", "value_warmup_steps"):
        if not isinstance(getattr(config, name), int):
            raise ConfigError(f"{name} must be a whole number, got {getattr(config, name)!r}.")
    weights = config.reward_weights
    if weights is not None and not _are_finite(weights):
        raise ConfigError(f"reward_weights must be a list of finite numbers, got {weights!r}.")
    if config.use_score_norm and not config.use_score_scaling:
        raise ConfigError("use_score_norm has no effect without use_score_scaling: set both.")
    if config.kl_target is None and config.kl_horizon != PPOConfig.kl_horizon:
        raise ConfigError(
            f"kl_horizon={config.kl_horizon:g} has no effect without kl_target: set both."
        )
    if config.total_episodes is not None and config.total_episodes <= 0:
        raise ConfigError(f"total_episodes must be positive, got {config.total_episodes}.")
    if config.stop_token not in (None, "eos"):
        raise ConfigError(f"stop_token must be 'eos' or unset, got {config.stop_token!r}.")
    if config.stop_token is not None and config.stop_token_id is not None:
        raise ConfigError("stop_token and stop_token_id exclude each other: set one of them.")
    if config.kl_estimator not in ("k1", "k3"):
        raise ConfigError(f"kl_estimator must be 'k1' or 'k3', got {config.kl_estimator!r}.")
    if config.missing_eos_penalty is not None and config.missing_eos_penalty < 0:
        raise ConfigError(
            f"missing_eos_penalty is subtracted and must be positive, got "
            f"{config.missing_eos_penalty}."
        )


def _are_finite(values: Any) -> bool:
    numbers = isinstance(values, (list, tuple)) and all(
        isinstance(value, (int, float)) for value in values
    )
    return numbers and all(math.isfinite(value) for value in values)


def _set_fields(config: PPOConfig, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Those fields with their values that are not left unset."""
    fields = [(name, getattr(config, name)) for name in names]
    return [(name, value) for name, value in fields if value is not None]


def _length(config: PPOConfig, batch_size: int, dataset_rows: int) -> tuple[int, int]:
    """Episodes and rollout batches: from max_steps, else total_episodes, else num_train_epochs."""
    updates = config.num_ppo_epochs * config.num_mini_batches
    # An earlier trainer filled in both; then total_episodes is what the user may have changed.
    filled_in = (config.num_total_batches or 0) * updates == config.max_steps
    if config.max_steps > 0 and not filled_in:
        if config.total_episodes is not None and config.num_total_batches is None:
            raise ConfigError(
                f"max_steps={config.max_steps} and total_episodes={config.total_episodes} both say "
                "how long to train: set one of them."
            )
        if config.max_steps % updates:
            raise ConfigError(
                f"max_steps={config.max_steps} counts optimizer updates and would end inside an "
                f"iteration of {updates} (num_ppo_epochs x num_mini_batches): use a multiple."
            )
        num_iterations = config.max_steps // updates
        return num_iterations * batch_size, num_iterations
    episodes = config.total_episodes
    if episodes is None:
        # As in TRL, which rounds up once at the end and not after every pass.
        episodes = int(config.num_train_epochs * dataset_rows * config.num_generations)
    return episodes, math.ceil(episodes / batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """The sizes of one run, derived once. `local_` is one process, the others are all processes.

    A rollout batch is cut into `num_mini_batches` mini-batches, one optimizer update each; a
    mini-batch is accumulated over micro-batches. The batch is passed `num_ppo_epochs` times.
    `total_episodes` is what was asked for; the last batch may take the run beyond it.
    """

    world_size: int
    local_micro_batch_size: int
    local_mini_batch_size: int
    local_batch_size: int
    num_mini_batches: int
    num_ppo_epochs: int
    iterations_per_epoch: int
    total_episodes: int
    num_iterations: int
    num_generations: int = 1

    @classmethod
    def derive(cls, config: PPOConfig, dataset_rows: int) -> BatchPlan:
        """The plan for a dataset of that many prompts.

        Raises:
            ConfigError: the dataset is empty or smaller than one rollout batch, a rollout batch
                does not hold whole groups of `num_generations`, or `max_steps` ends inside an
                iteration.
        """
        assert config.local_batch_size is not None  # set by PPOConfig
        world_size = _world_size(config)
        batch_size = config.local_batch_size * world_size
        if batch_size % config.num_generations:
            raise ConfigError(
                f"A rollout batch of {batch_size} episodes (per_device_train_batch_size "
                f"{config.per_device_train_batch_size} x gradient_accumulation_steps x processes) "
                f"does not divide into num_generations={config.num_generations} responses to each "
                "prompt: use a multiple."
            )
        prompts_per_batch = batch_size // config.num_generations
        if dataset_rows < prompts_per_batch:
            each = f", {config.num_generations} a prompt" if config.num_generations > 1 else ""
            raise ConfigError(
                f"The dataset has {dataset_rows} prompts, fewer than one rollout batch of "
                f"{batch_size} (per_device_train_batch_size {config.per_device_train_batch_size} x "
                f"gradient_accumulation_steps x processes{each}): use more prompts or smaller "
                "batches."
            )
        iterations_per_epoch = dataset_rows // prompts_per_batch
        total_episodes, num_iterations = _length(config, batch_size, dataset_rows)
        return cls(
            world_size=world_size,
            local_micro_batch_size=config.per_device_train_batch_size,
            local_mini_batch_size=config.local_batch_size // config.num_mini_batches,
            local_batch_size=config.local_batch_size,
            num_mini_batches=config.num_mini_batches,
            num_ppo_epochs=config.num_ppo_epochs,
            iterations_per_epoch=iterations_per_epoch,
            num_iterations=num_iterations,
            total_episodes=total_episodes,
            num_generations=config.num_generations,
        )

    @property
    def batch_size(self) -> int:
        return self.local_batch_size * self.world_size

    @property
    def prompts_per_batch(self) -> int:
        return self.batch_size // self.num_generations

    @property
    def updates_per_iteration(self) -> int:
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def updates_per_epoch(self) -> int:
        return self.iterations_per_epoch * self.updates_per_iteration

    @property
    def max_steps(self) -> int:
        return self.num_iterations * self.updates_per_iteration

    @property
    def micro_batches_per_iteration(self) -> int:
        micro_batches = math.ceil(self.local_mini_batch_size / self.local_micro_batch_size)
        return self.updates_per_iteration * micro_batches

    def fill_in(self, config: PPOConfig) -> None:
        """Writes the sizes that TRL scripts read into the config's computed fields.

        Raises:
            ConfigError: one of them was set, to something else.
        """
        sizes = {
            "micro_batch_size": self.local_micro_batch_size * self.world_size,
            "local_batch_size": self.local_batch_size,
            "batch_size": self.batch_size,
            "local_mini_batch_size": self.local_mini_batch_size,
            "mini_batch_size": self.local_mini_batch_size * self.world_size,
        }
        for name, size in sizes.items():
            if getattr(config, name) not in (None, size):
                raise ConfigError(
                    f"{name}={getattr(config, name)} was set, but it is computed and would be "
                    f"{size}: leave it unset, and choose per_device_train_batch_size, "
                    "gradient_accumulation_steps and num_mini_batches."
                )
            setattr(config, name, size)
        config.num_total_batches = self.num_iterations
        config.total_episodes = self.total_episodes
        config.max_steps = self.max_steps
