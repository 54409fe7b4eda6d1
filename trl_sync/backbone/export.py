"""Save and reload what PPO trains: the policy, and the value model beside it in `value/`.

On a shared backbone these are the policy adapter, and the value adapter with its head, in PEFT's
own layout: `PeftModel.from_pretrained(base, folder)` loads the policy without this package. The
base is never written. Separate models are written as their `save_pretrained` does.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from trl_sync.backbone.model_files import ADAPTER_WEIGHTS as ADAPTER_WEIGHTS
from trl_sync.backbone.model_files import (
    assign,
    load_weights,
    save_weights,
    whole,
    whole_state,
)
from trl_sync.backbone.roles import POLICY, VALUE
from trl_sync.backbone.separate import SeparateModels
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import CheckpointError

VALUE_FOLDER = "value"
VALUE_HEAD = "value_head.safetensors"


def save_models(models: SharedBackbone | SeparateModels, folder: Path) -> list[str]:
    """Writes policy and value model; returns the files with weights, relative to `folder`."""
    return collect_models(models)(folder)


def collect_models(
    models: SharedBackbone | SeparateModels, *, keep: bool = True
) -> Callable[[Path], list[str]]:
    """The function that writes policy and value model into a folder, and returns the files.

    What it writes is collected here: of models that FSDP2 shards a collective, which writing is
    not. `keep` is True on the process that writes.
    """
    if isinstance(models, SeparateModels):
        parts = ((models.policy, ""), (models.value_model, VALUE_FOLDER))
        collected = [(part, place, whole_state(part, keep=keep)) for part, place in parts]

        def write_both(folder: Path) -> list[str]:
            files = []
            for part, place, state in collected:
                names = save_weights(part, folder / place, state)
                files += [f"{place}/{name}" if place else name for name in names]
            return files

        return write_both
    adapters = {role: _collected(adapter_state(models, role), keep) for role in (POLICY, VALUE)}
    head = _collected(models.value_head.state_dict(), keep)
    return functools.partial(_write_roles, models, adapters, head)


def _write_roles(
    backbone: SharedBackbone,
    adapters: dict[str, dict[str, Tensor]],
    head: dict[str, Tensor],
    folder: Path,
) -> list[str]:
    _write_adapter(backbone, POLICY, adapters[POLICY], folder)
    _write_adapter(backbone, VALUE, adapters[VALUE], folder / VALUE_FOLDER)
    save_file(head, folder / VALUE_FOLDER / VALUE_HEAD)
    return [ADAPTER_WEIGHTS, f"{VALUE_FOLDER}/{ADAPTER_WEIGHTS}", f"{VALUE_FOLDER}/{VALUE_HEAD}"]


def load_models(models: SharedBackbone | SeparateModels, folder: Path) -> None:
    """Reads back what `save_models` wrote, in place.

    Raises:
        CheckpointError: a file is missing, unreadable or of another model.
    """
    if isinstance(models, SeparateModels):
        load_weights(models.policy, folder)
        load_weights(models.value_model, folder / VALUE_FOLDER)
    else:
        load_adapters(models, folder)


def save_adapters(backbone: SharedBackbone, folder: Path) -> None:
    """Writes the policy adapter into `folder`, value adapter and head into `folder/value`."""
    save_policy(backbone, folder)
    save_value(backbone, folder / VALUE_FOLDER)


def load_adapters(backbone: SharedBackbone, folder: Path) -> None:
    """Reads back what `save_adapters` wrote, in place.

    Raises:
        CheckpointError: a file is missing, or a tensor is missing, unexpected or of another shape.
            Nothing is changed in that case.
    """
    policy = _read(folder / ADAPTER_WEIGHTS)
    value = _read(folder / VALUE_FOLDER / ADAPTER_WEIGHTS)
    head = _read(folder / VALUE_FOLDER / VALUE_HEAD)
    _check(policy, adapter_state(backbone, POLICY), folder / ADAPTER_WEIGHTS)
    _check(value, adapter_state(backbone, VALUE), folder / VALUE_FOLDER / ADAPTER_WEIGHTS)
    _check(head, backbone.value_head.state_dict(), folder / VALUE_FOLDER / VALUE_HEAD)
    for own, found in (
        (adapter_state(backbone, POLICY), policy),
        (adapter_state(backbone, VALUE), value),
        (backbone.value_head.state_dict(), head),
    ):
        for name, tensor in own.items():
            assign(tensor, found[name])


def save_policy(backbone: SharedBackbone, folder: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` of the policy."""
    _write_adapter(backbone, POLICY, _collected(adapter_state(backbone, POLICY)), folder)


def save_value(backbone: SharedBackbone, folder: Path) -> None:
    """Writes the value adapter in PEFT's layout, and `value_head.safetensors` beside it."""
    _write_adapter(backbone, VALUE, _collected(adapter_state(backbone, VALUE)), folder)
    save_file(_collected(backbone.value_head.state_dict()), folder / VALUE_HEAD)


def adapter_state(backbone: SharedBackbone, adapter: str) -> dict[str, Tensor]:
    """The LoRA tensors of `adapter` under the names that PEFT gives them in a file."""
    # "auto" would ask the model hub whether the vocabulary was resized.
    state: dict[str, Tensor] = get_peft_model_state_dict(
        backbone.peft_model, adapter_name=adapter, save_embedding_layers=False
    )
    return state


def _collected(state: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    return {name: whole(tensor, keep=keep) for name, tensor in state.items()}


def _write_adapter(
    backbone: SharedBackbone, adapter: str, tensors: dict[str, Tensor], folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config: PeftConfig = copy.deepcopy(backbone.peft_model.peft_config[adapter])
    config.base_model_name_or_path = backbone.causal_model.config._name_or_path
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the checkpoint is incomplete.")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return tensors


def _check(found: dict[str, Tensor], expected: dict[str, Tensor], file: Path) -> None:
    def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in tensors.items()}

    if shapes(found) != shapes(expected):
        different = sorted(set(shapes(found).items()) ^ set(shapes(expected).items()))
        name, shape = different[0]
        raise CheckpointError(
            f"{file} does not fit this model: {len(different)} tensors differ, for example {name} "
            f"{tuple(shape)}. Were the LoRA options (r, target_modules) changed?"
        )
