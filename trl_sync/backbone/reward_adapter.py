"""A reward adapter from its folder: LoRA on the shared base, and a frozen score head."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from trl_sync.backbone.adapter_files import (
    adapter_folder,
    applying,
    read_tensors,
    reward_lora_config,
    score_tensors,
)
from trl_sync.backbone.model_files import ADAPTER_WEIGHTS
from trl_sync.backbone.roles import REWARD, freeze
from trl_sync.backbone.routing import AdapterRouter, check_lora_config
from trl_sync.errors import ConfigError


def add_reward_lora(peft_model: PeftModel, router: AdapterRouter, path: str) -> nn.Module:
    """Adds the reward adapter at `path` to `peft_model` and returns its score head, frozen.

    Which parameters of `peft_model` train may be another afterwards: that is PEFT's choice.

    Raises:
        ConfigError: there is no reward adapter at `path`, or it does not fit this base.
    """
    folder = adapter_folder(path)
    if folder is None:
        raise ConfigError(
            f"{path} is no adapter: it has no adapter_config.json. A reward adapter is what PEFT "
            "saves of a sequence classifier; a whole reward model is passed as reward_model."
        )
    head = _score_head(folder, peft_model)
    config = reward_lora_config(folder)
    check_lora_config(config)
    tensors = {n: t for n, t in read_tensors(folder / ADAPTER_WEIGHTS).items() if "lora_" in n}
    try:
        with applying(folder, config, peft_model):
            peft_model.add_adapter(REWARD, config)
        router.watch_layers(peft_model)
        _check_tensors(path, tensors, _own_tensors(peft_model))
    except ConfigError:
        if REWARD in peft_model.peft_config:
            peft_model.delete_adapter(REWARD)
        router.watch_layers(peft_model)
        raise
    set_peft_model_state_dict(peft_model, tensors, adapter_name=REWARD)
    return head


def can_share_a_base(path: str) -> bool:
    """Whether the adapter at `path` has options that the routing supports, and a score head.

    Raises:
        ConfigError: its files cannot be read.
    """
    folder = adapter_folder(path)
    if folder is None:
        return False
    config = reward_lora_config(folder)
    try:
        check_lora_config(config)
    except ConfigError:
        return False
    weights = [t for name, t in score_tensors(folder).items() if name.endswith("weight")]
    return len(weights) == 1 and tuple(weights[0].shape[:1]) == (1,)


def _score_head(folder: Path, peft_model: PeftModel) -> nn.Module:
    """The trained head in fp32: one row costs nothing, and rewards should not be rounded."""
    tensors = score_tensors(folder)
    weight = next((t for name, t in tensors.items() if name.endswith("weight")), None)
    embeddings = peft_model.get_input_embeddings().weight
    expected = (1, embeddings.shape[-1])
    if weight is None or tuple(weight.shape) != expected:
        found = "none" if weight is None else f"one of shape {tuple(weight.shape)}"
        raise ConfigError(
            f"The adapter in {folder} must have a score head of shape {expected}, but has {found}: "
            "use a reward adapter with one label on the same base. TRL's RewardTrainer saves one."
        )
    bias = next((t for name, t in tensors.items() if name.endswith("bias")), None)
    if bias is not None and tuple(bias.shape) != (1,):
        raise ConfigError(
            f"The score head in {folder} has a bias of shape {tuple(bias.shape)}, expected (1,): "
            "use a reward adapter with one label."
        )
    head = nn.Linear(expected[1], 1, bias=bias is not None, device=embeddings.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    return freeze(head)


def _own_tensors(peft_model: PeftModel) -> dict[str, Tensor]:
    state: dict[str, Tensor] = get_peft_model_state_dict(
        peft_model, adapter_name=REWARD, save_embedding_layers=False
    )
    return state


def _check_tensors(path: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    shapes = [{name: tensor.shape for name, tensor in part.items()} for part in (found, expected)]
    different = sorted(n for n in shapes[0] | shapes[1] if shapes[0].get(n) != shapes[1].get(n))
    if different:
        raise ConfigError(
            f"The reward adapter {path} does not fit this base: {len(different)} tensors differ, "
            f"for example {different[0]}. Was it trained on another base?"
        )
