"""What a PPOTrainer refuses before it trains or writes anything."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from trl_sync.errors import ConfigError
from trl_sync.ppo.config import PPOConfig
from trl_sync.ppo.engines import check_engine_settings
from trl_sync.ppo.rollout import Sampling
from trl_sync.processes import launched_processes

# Fields of TrainingArguments about batches that PPO makes by itself.
_WITHOUT_EFFECT = (
    *("dataloader_num_workers", "dataloader_drop_last", "dataloader_prefetch_factor"),
    *("dataloader_persistent_workers", "data_seed", "eval_accumulation_steps"),
    *("prediction_loss_only", "train_sampling_strategy"),
)


def _default(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(PPOConfig) if field.name == name)


def check_settings(args: Any) -> None:
    """Nothing, if every setting has an effect here and works.

    Raises:
        ConfigError: names the setting, the reason and what to do.
    """
    if not isinstance(args, PPOConfig):
        raise ConfigError(
            f"args must be a trl_sync.PPOConfig, got {type(args).__module__}.{type(args).__name__}."
        )
    if launched_processes() != args.world_size:
        raise ConfigError(
            f"The launcher started {launched_processes()} processes, but accelerate sees "
            f"{args.world_size}: each would train alone. Make PPOConfig before anything else uses "
            "accelerate, and on a CPU set use_cpu=True."
        )
    check_engine_settings(args)
    refused = {
        "use_vllm": "rollouts use transformers' generate. Set use_vllm=False",
        "torch_compile": "it would trace the adapter routing once and keep it. Set it to False",
        "auto_find_batch_size": "the rollout batch follows from it. Set the batch sizes by hand",
        "use_liger_kernel": "it replaces the loss of the causal LM, which PPO does not use",
        "neftune_noise_alpha": "noise in the embeddings would make old and new ratios differ",
        "label_smoothing_factor": "PPO has no labels",
        "enable_jit_checkpoint": "it saves inside an iteration, from where no run can continue",
        "bf16_full_eval": "evaluation rolls out as training does. Use bf16",
        "fp16_full_eval": "evaluation rolls out as training does. Use fp16",
    }
    for name, reason in refused.items():
        if getattr(args, name, None):
            raise ConfigError(
                f"{name}={getattr(args, name)} does not work with PPO here: {reason}."
            )
    for name in _WITHOUT_EFFECT:
        if getattr(args, name) != _default(name):
            raise ConfigError(
                f"{name}={getattr(args, name)!r} has no effect on PPO, which makes its batches "
                "from rollouts: leave it unset."
            )
    if args.device.type == "mps":
        raise ConfigError("Apple GPUs have no 64-bit floats, which PPO sums in: set use_cpu=True.")
    if args.n_gpu > 1:
        raise ConfigError(
            f"This process sees {args.n_gpu} GPUs and would use nn.DataParallel, which splits a "
            "stacked batch in the wrong places. Start it with `accelerate launch`, or hide the "
            "others with CUDA_VISIBLE_DEVICES=0."
        )


def check_stop_tokens(args: PPOConfig, sampling: Sampling) -> None:
    """Nothing, if what was said about stopping can happen.

    Raises:
        ConfigError: no token can end a response, but a setting relies on one.
    """
    if sampling.stop_token_ids:
        return
    if args.stop_token == "eos":
        raise ConfigError(
            "stop_token='eos', but neither tokenizer nor model has an end-of-sequence token: set "
            "stop_token_id."
        )
    if args.missing_eos_penalty is not None:
        raise ConfigError(
            f"missing_eos_penalty={args.missing_eos_penalty} would fall on every response, because "
            "none can stop: set stop_token='eos' or stop_token_id."
        )


def check_output_folder(folder: Path) -> None:
    """Nothing, if files can be created in `folder`; leaves nothing behind.

    Raises:
        ConfigError: the folder is not writable.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"output_dir {folder} is not writable: {error}.") from error
