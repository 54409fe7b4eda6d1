"""Where the names of TRL's PPO are found in this package, for each module that had them."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

# A name -> "module:name" of what stands for it.
Names = dict[str, str]


def _from(module: str, *names: str) -> Names:
    return {name: f"{module}:{name}" for name in names}


_TRAINER = _from("trl_sync", "PPOConfig", "PPOTrainer")
_VALUE_HEAD = _from(
    "trl_sync",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
)
# TRL 0.10 and 0.11 had the trainer under this name, beside the step API.
_SECOND_VERSION = {
    "PPOv2Config": "trl_sync:PPOConfig",
    "PPOv2Trainer": "trl_sync:PPOTrainer",
}
_HELPERS = _from(
    "trl_sync.ppo.compat",
    *("OnlineTrainerState", "batch_generation", "exact_div", "first_true_indices", "forward"),
    *("generate", "get_reward", "print_rich_table", "selective_log_softmax", "truncate_response"),
)
_LOOP = _from(
    "trl_sync.ppo.compat",
    *("INVALID_LOGPROB", "PolicyAndValueWrapper"),
    *("masked_mean", "masked_var", "masked_whiten"),
)
_KBIT = _from("trl_sync.ppo.compat", "get_kbit_device_map")
_CORE = _from(
    "trl_sync.legacy.core",
    *("LengthSampler", "PPODecorators", "clip_by_value", "entropy_from_logits", "flatten_dict"),
    *("logprobs_from_logits", "respond_to_batch", "stack_dicts", "stats_to_np"),
    *("convert_to_scalar", "top_k_top_p_filtering", "whiten"),
    *("WANDB_PADDING", "masked_mean", "masked_var", "masked_whiten"),
)
_SEED = _from("transformers", "set_seed")

_PPO_TRAINER = _TRAINER | _HELPERS | _LOOP
_PPO_CONFIG = _from("trl_sync", "PPOConfig")
_MODELS = _VALUE_HEAD | _from("trl_sync.value_head", "ValueHead")
_MODEL_BASE = _from("trl_sync", "PreTrainedModelWrapper") | _from("trl", "create_reference_model")

# Modules, with all their names; used where TRL has no module of that name.
MODULES: dict[str, Names] = {
    "trl.core": _CORE | _SEED,
    "trl.experimental.ppo": _TRAINER | _VALUE_HEAD,
    "trl.experimental.ppo.modeling_value_head": _MODELS,
    "trl.experimental.ppo.ppo_config": _PPO_CONFIG,
    "trl.experimental.ppo.ppo_trainer": _PPO_TRAINER,
    "trl.models.modeling_base": _MODEL_BASE,
    "trl.models.modeling_value_head": _MODELS,
    "trl.trainer.ppo_config": _PPO_CONFIG,
    "trl.trainer.ppo_trainer": _PPO_TRAINER,
    "trl.trainer.ppov2_config": _from("trl_sync", "PPOConfig") | _SECOND_VERSION,
    "trl.trainer.ppov2_trainer": _PPO_TRAINER | _SECOND_VERSION,
}

# Names that a module of TRL gets if it has none of its own.
NAMES: dict[str, Names] = {
    "trl": _TRAINER | _SECOND_VERSION | _VALUE_HEAD | _KBIT | _SEED,
    "trl.experimental.utils": _from("trl_sync.ppo.compat", "first_true_indices", "get_reward"),
    "trl.models": _VALUE_HEAD,
    "trl.trainer": _TRAINER | _SECOND_VERSION | _KBIT,
    "trl.trainer.utils": _HELPERS
    | _KBIT
    | _from("trl_sync.ppo.compat", "SIMPLE_CHAT_TEMPLATE")
    | _from("trl_sync.legacy", "AdaptiveKLController", "FixedKLController", "RunningMoments"),
}

# Settings that a class of TRL had and PPO scripts read: module and class -> name -> its value now.
SETTINGS: dict[tuple[str, str], dict[str, Callable[[Any], Any]]] = {
    ("trl.trainer.model_config", "ModelConfig"): {
        "torch_dtype": attrgetter("dtype"),  # renamed
        "trust_remote_code": lambda config: False,  # gone, with its command line option
    },
}
