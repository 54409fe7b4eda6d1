"""What the trainer of the step API is made of: checks, reference model, data loader."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    LoggerType,
    ProjectConfiguration,
    broadcast,
)
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_sync.errors import ConfigError
from trl_sync.legacy.config import PPOConfig
from trl_sync.legacy.reference import create_reference_model
from trl_sync.processes import launched_processes, on_cpu

_DATA_PARALLEL = (
    *(DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU),
    *(DistributedType.MULTI_NPU, DistributedType.MULTI_XPU),
)
# What a data loader keeps for the log beside the arguments of the model.
_TEXT_COLUMNS = ("label", "query", "response")


def check_arguments(
    config: Any, model: Any, ref_model: Any, tokenizer: Any, lr_scheduler: Any
) -> None:
    """Nothing, if these are what the step API takes.

    Raises:
        ConfigError: they are not; the message names the alternative.
    """
    if not isinstance(config, PPOConfig):
        raise ConfigError(
            f"config must be a trl_sync.legacy.PPOConfig, got {type(config).__name__}. A "
            "trl_sync.PPOConfig belongs to trl_sync.PPOTrainer, which has train() and no step()."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}."
        )
    for name, given in (("model", model), ("ref_model", ref_model)):
        if name == "ref_model" and given is None:
            continue
        if isinstance(given, (PreTrainedModel, PeftModel)):
            raise ConfigError(
                f"{name} has no value head: pass trl_sync.AutoModelForCausalLMWithValueHead"
                f".from_pretrained({name}), or ...Seq2SeqLMWithValueHead."
            )
        if not (hasattr(given, "v_head") and hasattr(given, "pretrained_model")):
            raise ConfigError(
                f"{name} must be a trl_sync.AutoModelForCausalLMWithValueHead or "
                f"AutoModelForSeq2SeqLMWithValueHead, got {type(given).__name__}."
            )
    if ref_model is model:
        raise ConfigError(
            "model and ref_model are the same object: the reference would train too. Leave out "
            "ref_model, and a copy is made."
        )
    if lr_scheduler is not None and not isinstance(lr_scheduler, LRScheduler):
        raise ConfigError(
            "lr_scheduler must be a torch.optim.lr_scheduler.LRScheduler, got "
            f"{type(lr_scheduler).__name__}."
        )
    _check_trainable(model)


def _check_trainable(model: Any) -> None:
    inner = model.pretrained_model
    if not any(parameter.requires_grad for parameter in inner.parameters()):
        raise ConfigError(
            "Nothing of the model but its value head can be trained: load a trained adapter with "
            "is_trainable=True, or pass peft_config."
        )
    if getattr(inner, "is_quantized", False) and not isinstance(inner, PeftModel):
        raise ConfigError(
            "A quantized model cannot be trained: pass peft_config to add an adapter."
        )


def make_accelerator(config: PPOConfig) -> Accelerator:
    """The accelerator; fills in the config's sizes over all processes.

    Raises:
        ConfigError: a tracker is not there, or the launcher asks for DeepSpeed, FSDP or another
            engine that shards models.
    """
    project = ProjectConfiguration(**config.options("project_kwargs"))
    _check_trackers(config.log_with, project.logging_dir)
    accelerator = Accelerator(
        log_with=config.log_with,
        # The user's loop reads the data loader, so its end says nothing about mini-batches.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        project_config=project,
        **(
            {"step_scheduler_with_optimizer": False, "cpu": on_cpu()}
            | config.options("accelerator_kwargs")
        ),
    )
    _check_not_alone(accelerator)
    if accelerator.distributed_type not in _DATA_PARALLEL:
        raise ConfigError(
            f"The step API runs on one process or with data parallelism, not with "
            f"{accelerator.distributed_type}: choose MULTI_GPU in accelerate config, and a "
            "quantized model with an adapter if memory is short."
        )
    config.world_size = accelerator.num_processes
    config.global_backward_batch_size = (config.backward_batch_size or 0) * config.world_size
    config.global_batch_size = config.batch_size * config.world_size
    return accelerator


def _check_not_alone(accelerator: Accelerator) -> None:
    """Nothing, if accelerate knows of every process that was launched.

    Raises:
        ConfigError: each would train a model of its own.
    """
    launched, known = launched_processes(), accelerator.num_processes
    if launched != known:
        raise ConfigError(
            f"{launched} processes were launched, but accelerate runs {known}: each would train "
            "alone. An accelerate state that was made before the trainer did not know of the "
            "others: make it with PartialState(cpu=True) on CPUs, or after the trainer."
        )


def _check_trackers(log_with: Any, logging_dir: Any) -> None:
    """Nothing, if accelerate can start these trackers, of which it leaves out some in silence.

    Raises:
        ConfigError: it cannot.
    """
    requested = log_with if isinstance(log_with, (list, tuple)) else [log_with]
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in requested:
        name = str(tracker)
        if tracker is None or isinstance(tracker, GeneralTracker) or name == str(LoggerType.ALL):
            continue
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"log_with={name!r} is no tracker of accelerate: choose from "
                f"{', '.join(map(str, LOGGER_TYPE_TO_CLASS))}, or leave it out."
            )
        if name in map(str, LoggerType) and name not in installed:
            raise ConfigError(
                f"log_with={name!r}, but that tracker is not installed, so nothing would be "
                "logged: install its package, choose another, or leave out log_with."
            )
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and logging_dir is None:
            raise ConfigError(
                f"log_with={name!r} needs a folder to write to: pass "
                "project_kwargs={'logging_dir': ...}."
            )


def make_reference(
    accelerator: Accelerator, model: Any, ref_model: Any, num_shared_layers: int | None
) -> Any:
    """The frozen reference, the same on every process; None: the model without its adapter.

    Raises:
        ConfigError: `num_shared_layers` would have no effect.
    """
    made_here = ref_model is None and not model.is_peft_model
    if num_shared_layers is not None and not made_here:
        raise ConfigError(
            "num_shared_layers has no effect with a ref_model or a PEFT model: leave it out."
        )
    if made_here:
        ref_model = create_reference_model(model, num_shared_layers=num_shared_layers)
    if ref_model is None:
        return None
    trained = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in trained for parameter in ref_model.parameters()):
        raise ConfigError(
            "model and ref_model share parameters: use create_reference_model, which copies them."
        )
    ref_model.requires_grad_(False).eval().to(accelerator.device)
    if accelerator.num_processes > 1:
        for parameter in ref_model.parameters():
            parameter.data.copy_(broadcast(parameter.data))
    return ref_model


def make_dataloader(
    config: PPOConfig, model: Any, dataset: Any, data_collator: Callable[..., Any] | None
) -> DataLoader:
    """Shuffled batches of `batch_size` of one process.

    Raises:
        ConfigError: the dataset is of another type, streamed, or smaller than one batch of all
            processes.
    """
    if not isinstance(dataset, (Dataset, torch.utils.data.Dataset)):
        raise ConfigError(
            "dataset must be a torch.utils.data.Dataset or a datasets.Dataset, got "
            f"{type(dataset).__name__}."
        )
    if not hasattr(dataset, "__len__"):
        raise ConfigError(
            "A dataset that is streamed cannot be shuffled and has no length: load it without "
            "streaming=True, or leave out dataset and read batches in a loop of your own."
        )
    if isinstance(dataset, Dataset) and config.remove_unused_columns:
        taken = [*inspect.signature(model.forward).parameters, *_TEXT_COLUMNS]
        dataset = dataset.select_columns([c for c in dataset.column_names if c in taken])
    rows = len(dataset)
    if rows < config.batch_size * (config.world_size or 1):
        raise ConfigError(
            f"The dataset has {rows} rows, fewer than one batch: batch_size={config.batch_size} on "
            f"each of {config.world_size} process(es)."
        )
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        collate_fn=data_collator,
        shuffle=True,
        drop_last=True,
    )


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
