"""What TRL's older PPO trainers called things, and what they are called here.

Two older generations: the step API up to 0.11, which `trl_sync.legacy` keeps, and the trainer of
0.12 (`PPOv2` in 0.11), whose loop is the one of today. A name whose meaning is unchanged is
accepted with a warning that says the new one; every other old name is an error that says what to do
instead.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from trl_sync.errors import ConfigError

Class = TypeVar("Class", bound=type)

# Fields of PPOConfig with the same meaning under another name.
CONFIG_RENAMES: dict[str, str] = {
    "base_model": "sft_model_path",
    "evaluation_strategy": "eval_strategy",
    "exp_name": "run_name",
    "horizon": "kl_horizon",
    "init_kl_coef": "kl_coef",
    "log_with": "report_to",
    "no_cuda": "use_cpu",
    "ppo_epochs": "num_ppo_epochs",
    "steps": "total_episodes",
    "target": "kl_target",
    "tracker_project_name": "project",
    "truncate_token": "stop_token",
    "truncate_token_id": "stop_token_id",
}

_COMPUTED = (
    "it is computed: choose per_device_train_batch_size, gradient_accumulation_steps and "
    "num_mini_batches"
)
_LABEL = "it was only a label for trackers: leave it out, or put it into run_name"

# Fields of PPOConfig that have no equal here, and what to do instead.
CONFIG_ALTERNATIVES: dict[str, str] = {
    "accelerator_kwargs": "use accelerator_config",
    "adap_kl_ctrl": "set kl_target (and kl_horizon) to adapt kl_coef; for adap_kl_ctrl=False leave "
    "out target and horizon too, and kl_coef stays",
    "backward_batch_size": _COMPUTED,
    "compare_steps": "use save_strategy='best' with metric_for_best_model and push_to_hub",
    "early_stopping": "set target_kl alone; without it no iteration is cut short",
    "forward_batch_size": "use per_device_train_batch_size for training and "
    "local_rollout_forward_batch_size for rollouts",
    "global_backward_batch_size": _COMPUTED,
    "global_batch_size": _COMPUTED,
    "is_encoder_decoder": "encoder-decoder models are trained by trl_sync.legacy.PPOTrainer",
    "is_peft_model": "it follows from the model: leave it out",
    "model_name": _LABEL,
    "non_eos_penalty": "use missing_eos_penalty, which is subtracted from the score",
    "optimize_cuda_cache": "use torch_empty_cache_steps",
    "optimize_device_cache": "use torch_empty_cache_steps",
    "penalty_reward_value": "use missing_eos_penalty, which is subtracted from the score",
    "project_kwargs": "use project; where a tracker writes is set by its environment variables",
    "push_to_hub_if_best_kwargs": "use push_to_hub with save_strategy='best' and hub_model_id",
    "query_dataset": _LABEL,
    "reward_model": "pass reward_model to PPOTrainer",
    "sanity_check": "pass a smaller train_dataset",
    "task_name": _LABEL,
    "tracker_kwargs": "initialise the tracker before training, or set its environment variables",
}

# Arguments of generate(), which PPOConfig has under other names.
GENERATION_ALTERNATIVES: dict[str, str] = {
    "do_sample": "rollouts are always sampled: leave it out",
    "eos_token_id": "use stop_token_id, or generation_kwargs={'eos_token_id': [...]} for several",
    "max_length": "use response_length, which counts tokens of the response alone",
    "max_new_tokens": "use response_length",
    "min_length": "use generation_kwargs={'min_length': ...}; 0 and -1 have no effect",
    "pad_token_id": "it is not needed: masks come from lengths",
    "top_k": "use generation_kwargs={'top_k': ...}; 0 is the default here",
    "top_p": "use generation_kwargs={'top_p': ...}; 1.0 is the default here",
}

# Arguments of PPOTrainer with the same meaning under another name.
TRAINER_RENAMES: dict[str, str] = {
    "config": "args",
    "policy": "model",
    "ref_policy": "ref_model",
    "tokenizer": "processing_class",
}

# Arguments that only the step API had.
STEP_API_ARGUMENTS: dict[str, str] = {
    "dataset": "train_dataset",
    "lr_scheduler": "optimizers=(optimizer, lr_scheduler)",
    "num_shared_layers": "a shared base: leave out value_model and pass peft_config",
    "optimizer": "optimizers=(optimizer, lr_scheduler)",
    "training_data_collator": "the trainer's own padding",
}

# Methods that PPOTrainer does not have, and what to call instead.
REMOVED_METHODS: dict[str, str] = {
    "batched_forward_pass": "override compute_loss",
    "compute_advantages": "see trl_sync.ppo.advantage",
    "compute_rewards": "pass a reward function as reward_model",
    "generate": "call completions(), or generate of the policy",
    "log_stats": "the trainer logs by itself: see report_to and logging_steps",
    "loss": "override compute_loss",
    "prepare_dataloader": "call get_train_dataloader()",
    "record_step_stats": "the trainer logs by itself: see report_to and logging_steps",
    "save_pretrained": "call save_model()",
    "step": "call train(), and pass your scoring as reward_model",
    "train_minibatch": "override compute_loss",
}

_STEP_API = (
    "The step API (generate, step) is trl_sync.legacy.PPOTrainer, with a model with a value head"
)


def accepts_old_config_names(config_class: Class) -> Class:
    """The class, whose constructor takes older names of its fields too."""
    construct = config_class.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        construct(self, *args, **_renamed_fields(kwargs))

    config_class.__init__ = __init__  # type: ignore[misc]
    return config_class


def accepts_old_arguments(trainer_class: Class) -> Class:
    """The class, whose constructor takes older names, and which tells where methods went."""
    construct = trainer_class.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        _check_not_step_api(args, kwargs)
        construct(self, *args, **_renamed(kwargs, TRAINER_RENAMES, "PPOTrainer"))

    def __getattr__(self: Any, name: str) -> Any:  # noqa: N807
        if name in REMOVED_METHODS and not hasattr(type(self), name):
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}: "
                f"{REMOVED_METHODS[name]}. {_STEP_API}."
            )
        # Raises, with the error from inside a property if that is why this was called.
        return object.__getattribute__(self, name)

    trainer_class.__init__ = __init__  # type: ignore[misc]
    trainer_class.__getattr__ = __getattr__  # type: ignore[attr-defined]
    return trainer_class


def _renamed_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields under their new names.

    Raises:
        ConfigError: one has no equal here, or is given under both names.
    """
    for name in fields:
        if name in GENERATION_ALTERNATIVES:
            raise ConfigError(
                f"PPOConfig has no {name}: {GENERATION_ALTERNATIVES[name]}. With "
                "trl_sync.legacy.PPOTrainer it is an argument of generate()."
            )
        if name in CONFIG_ALTERNATIVES:
            raise ConfigError(
                f"PPOConfig has no {name}: {CONFIG_ALTERNATIVES[name]}. Scripts with generate() "
                "and step() keep their settings with trl_sync.legacy.PPOConfig."
            )
    fields = dict(fields)
    if "kl_penalty" in fields:
        _take_kl_penalty(fields)
    if fields.get("log_with", "") is None:
        fields["log_with"] = "none"
    return _renamed(fields, CONFIG_RENAMES, "PPOConfig")


def _take_kl_penalty(fields: dict[str, Any]) -> None:
    """Turns `kl_penalty`, whose default is the estimator k1, into `kl_estimator`."""
    penalty = fields.pop("kl_penalty")
    if penalty != "kl":
        raise ConfigError(
            f"PPOConfig has no kl_penalty={penalty!r}: kl_estimator is 'k1' (kl_penalty='kl') or "
            "'k3'. 'abs', 'mse' and 'full' are settings of trl_sync.legacy.PPOConfig."
        )
    if fields.setdefault("kl_estimator", "k1") != "k1":
        raise ConfigError("kl_penalty='kl' contradicts kl_estimator: leave out kl_penalty.")
    _warn("PPOConfig(kl_penalty='kl')", "kl_estimator='k1'")


def _renamed(
    arguments: Mapping[str, Any], renames: Mapping[str, str], owner: str
) -> dict[str, Any]:
    renamed = {name: value for name, value in arguments.items() if name not in renames}
    for old in arguments:
        if old not in renames:
            continue
        new = renames[old]
        if new in renamed:
            raise ConfigError(f"{owner} got {new} twice, also as {old}: leave out {old}.")
        _warn(f"{owner}({old}=...)", new)
        renamed[new] = arguments[old]
    return renamed


def _warn(old: str, new: str) -> None:
    # The user's line stands above the constructor and the functions of this file.
    frames = 5 if old.startswith("PPOConfig") else 4
    warnings.warn(f"{old} is now {new}.", FutureWarning, stacklevel=frames)


def _check_not_step_api(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Nothing, if these are not arguments of the step API.

    Raises:
        ConfigError: they are.
    """
    found = [name for name in STEP_API_ARGUMENTS if name in kwargs]
    if found:
        instead = "; ".join(f"{name}: {STEP_API_ARGUMENTS[name]}" for name in found)
        raise ConfigError(
            f"PPOTrainer has no {', '.join(found)}. {_STEP_API}. In trl_sync.PPOTrainer, which "
            f"runs the loop itself, use instead: {instead}."
        )
    config = args[0] if args else kwargs.get("args", kwargs.get("config"))
    if type(config).__module__.startswith("trl_sync.legacy"):
        raise ConfigError(
            f"PPOTrainer got a trl_sync.legacy.PPOConfig. {_STEP_API}; trl_sync.PPOTrainer, which "
            "runs the loop itself, takes a trl_sync.PPOConfig."
        )
    # The step API had the model second.
    if len(args) > 1 and hasattr(args[1], "forward"):
        raise ConfigError(
            f"The second argument of PPOTrainer is the tokenizer, got a "
            f"{type(args[1]).__name__}. {_STEP_API}."
        )
    trained = {"reward_model", "train_dataset"} & kwargs.keys()
    if "tokenizer" in kwargs and not trained and len(args) < 5:
        raise ConfigError(f"PPOTrainer needs reward_model and train_dataset. {_STEP_API}.")
