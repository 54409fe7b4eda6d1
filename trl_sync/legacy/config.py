"""PPOConfig of the step API: the fields and defaults of TRL 0.11."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trl_sync.errors import ConfigError
from trl_sync.legacy.core import flatten_dict
from trl_sync.legacy.newer import refuses_newer_settings

_JSON = ("tracker_kwargs", "accelerator_kwargs", "project_kwargs", "push_to_hub_if_best_kwargs")
_POSITIVE = (
    *("steps", "batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs"),
    *("compare_steps", "target", "horizon", "cliprange", "cliprange_value", "target_kl"),
    *("ratio_threshold", "score_clip", "max_grad_norm", "dataset_num_proc"),
)


@refuses_newer_settings
@dataclass
class PPOConfig:
    """The settings of `trl_sync.legacy.PPOTrainer`: the fields and defaults of TRL 0.11.

    Sizes are those of one process. `batch_size` is what one `step` gets; it is cut into
    `batch_size / (mini_batch_size x gradient_accumulation_steps)` optimizer updates, and passed
    `ppo_epochs` times. Different from TRL: `max_grad_norm` and `gradient_checkpointing` take
    effect, and `use_score_norm` without `use_score_scaling` is an error.

    Raises:
        ConfigError: sizes that do not divide, a setting out of its range, or one that belongs to
            `trl_sync.PPOConfig`.
    """

    exp_name: str = field(
        default_factory=lambda: os.path.basename(sys.argv[0]).removesuffix(".py"),
        metadata={"help": "Name of the experiment, for tracking."},
    )
    seed: int = field(default=0, metadata={"help": "Random seed."})
    log_with: str | None = field(
        default=None,
        metadata={"help": "Tracker of accelerate: wandb, tensorboard, trackio, ..."},
    )
    task_name: str | None = field(default=None, metadata={"help": "For tracking only."})
    model_name: str = field(default="gpt2", metadata={"help": "Read by scripts only."})
    query_dataset: str = field(
        default="stanfordnlp/imdb", metadata={"help": "Read by scripts only."}
    )
    reward_model: str = field(
        default="sentiment-analysis:lvwerra/distilbert-imdb",
        metadata={"help": "Read by scripts only."},
    )
    remove_unused_columns: bool = field(
        default=True,
        metadata={"help": "Keep only the dataset's columns that the model takes, and the texts."},
    )
    tracker_kwargs: dict | str | None = field(
        default_factory=dict, metadata={"help": "Arguments of the trackers, as JSON."}
    )
    accelerator_kwargs: dict | str | None = field(
        default_factory=dict, metadata={"help": "Arguments of Accelerator, as JSON."}
    )
    project_kwargs: dict | str | None = field(
        default_factory=dict, metadata={"help": "Arguments of ProjectConfiguration, as JSON."}
    )
    tracker_project_name: str = field(
        default="trl", metadata={"help": "Project name of the trackers."}
    )
    push_to_hub_if_best_kwargs: dict | str | None = field(
        default_factory=dict,
        metadata={"help": "If set, push_to_hub arguments for a model with the best mean score."},
    )
    steps: int = field(default=20000, metadata={"help": "Episodes to train for; read by scripts."})
    learning_rate: float = field(default=1.41e-5, metadata={"help": "Learning rate of Adam."})
    adap_kl_ctrl: bool = field(
        default=True, metadata={"help": "Steer the KL coefficient towards the target KL."}
    )
    init_kl_coef: float = field(default=0.2, metadata={"help": "First KL coefficient."})
    kl_penalty: Literal["kl", "abs", "mse", "full"] = field(
        default="kl",
        metadata={
            "help": "Penalty on a token: the log-ratio, its absolute value, half its square, or "
            "the KL of the whole distribution."
        },
    )
    target: float = field(
        default=6.0, metadata={"help": "Target KL of a response, in nats, for adap_kl_ctrl."}
    )
    horizon: float = field(default=10000.0, metadata={"help": "Horizon of adap_kl_ctrl."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy's ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the values."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    batch_size: int = field(default=128, metadata={"help": "Episodes of one step, per process."})
    forward_batch_size: int | None = field(
        default=None, metadata={"help": "Older name of mini_batch_size."}
    )
    mini_batch_size: int = field(
        default=128, metadata={"help": "Episodes in one forward and backward pass."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Mini-batches of one optimizer update."}
    )
    world_size: int | None = field(default=None, metadata={"help": "Filled in by the trainer."})
    ppo_epochs: int = field(default=4, metadata={"help": "Passes over each batch."})
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip the norm of the gradient to this."}
    )
    optimize_cuda_cache: bool | None = field(
        default=None, metadata={"help": "Older name of optimize_device_cache."}
    )
    optimize_device_cache: bool = field(
        default=False, metadata={"help": "Free the device's cached memory after each step."}
    )
    early_stopping: bool = field(
        default=False, metadata={"help": "End the passes over a batch once target_kl is passed."}
    )
    target_kl: float = field(
        default=1.0, metadata={"help": "With early_stopping: stop beyond 1.5 times this."}
    )
    compare_steps: int = field(
        default=1, metadata={"help": "With push_to_hub_if_best_kwargs: look every so many steps."}
    )
    ratio_threshold: float = field(
        default=10.0, metadata={"help": "Leave out mini-batches whose mean ratio exceeds this."}
    )
    use_score_scaling: bool = field(
        default=False, metadata={"help": "Divide scores by their running standard deviation."}
    )
    use_score_norm: bool = field(
        default=False, metadata={"help": "With use_score_scaling: subtract the running mean."}
    )
    score_clip: float | None = field(
        default=None, metadata={"help": "Clip scores to [-score_clip, score_clip]."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale rewards to variance 1."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass."}
    )
    is_encoder_decoder: bool | None = field(
        default=None, metadata={"help": "Filled in by the trainer."}
    )
    is_peft_model: bool | None = field(default=None, metadata={"help": "Filled in by the trainer."})
    backward_batch_size: int | None = field(
        default=None, metadata={"help": "Computed: mini_batch_size x gradient_accumulation_steps."}
    )
    global_backward_batch_size: int | None = field(
        default=None, metadata={"help": "Filled in by the trainer."}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Filled in by the trainer."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes for mapping a dataset; read by scripts."}
    )

    def __post_init__(self) -> None:
        self._take_older_names()
        for name in _JSON:
            setattr(self, name, _parsed(name, getattr(self, name)))
        _check_ranges(self)
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise ConfigError(
                f"batch_size={self.batch_size} must be a multiple of mini_batch_size x "
                f"gradient_accumulation_steps = {self.mini_batch_size} x "
                f"{self.gradient_accumulation_steps} = {self.backward_batch_size}."
            )
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; nested ones as `outer/inner`.

        Raises:
            ValueError: the name of a nested one contains `/`.
        """
        return flatten_dict(asdict(self) | {"total_ppo_epochs": self.total_ppo_epochs})

    def options(self, name: str) -> dict[str, Any]:
        """A field that holds further arguments, such as `tracker_kwargs`; empty if it is None.

        Raises:
            ConfigError: it is neither a dictionary nor one in JSON.
        """
        return _parsed(name, getattr(self, name))

    def _take_older_names(self) -> None:
        if self.forward_batch_size is not None:
            warnings.warn("forward_batch_size is now mini_batch_size.", FutureWarning, stacklevel=5)
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            warnings.warn(
                "optimize_cuda_cache is now optimize_device_cache.", FutureWarning, stacklevel=5
            )
            if self.optimize_device_cache and not self.optimize_cuda_cache:
                raise ConfigError(
                    "optimize_cuda_cache=False contradicts optimize_device_cache=True: leave it "
                    "out."
                )
            self.optimize_device_cache = self.optimize_cuda_cache


def _check_ranges(config: PPOConfig) -> None:
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be positive, got {value}.")
    for name in ("init_kl_coef", "vf_coef", "learning_rate"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} must not be negative, got {getattr(config, name)}.")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(config, name)}.")
    if config.kl_penalty not in ("kl", "abs", "mse", "full"):
        raise ConfigError(
            f"kl_penalty must be 'kl', 'abs', 'mse' or 'full', got {config.kl_penalty!r}."
        )
    if config.use_score_norm and not config.use_score_scaling:
        raise ConfigError("use_score_norm has no effect without use_score_scaling: set both.")
    best = config.options("push_to_hub_if_best_kwargs")
    if best and "repo_id" not in best:
        raise ConfigError("push_to_hub_if_best_kwargs needs repo_id, where to push the model.")
    if {"gradient_accumulation_steps", "gradient_accumulation_plugin", "log_with"} & set(
        config.options("accelerator_kwargs")
    ):
        raise ConfigError(
            "accelerator_kwargs cannot set gradient accumulation or trackers: use "
            "gradient_accumulation_steps and log_with."
        )


def _parsed(name: str, value: Any) -> dict[str, Any]:
    """A dictionary from itself, from JSON, which is how the command line gives it, or None."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{name}={value!r} is not JSON: {error}.") from error
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name} must be a dictionary, got {value!r}.")
    return value or {}
