"""Weights of a whole model, of its adapters or of its trained part, to files and back in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from trl_sync.errors import CheckpointError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINED_WEIGHTS = "trained_parameters.safetensors"
MODULE_WEIGHTS = "module.safetensors"
# Of the weights, and of the settings beside them, which transformers reads.
_READING_ERRORS = (
    *(OSError, SafetensorError, ValueError, TypeError),
    *(LookupError, AttributeError, RuntimeError),
)


def save_weights(model: Any, folder: Path, state: dict[str, Tensor] | None = None) -> list[str]:
    """Writes `model` into `folder` and returns the names of the files that hold its weights.

    A PEFT model and a whole transformers model are written as `save_pretrained` does; of a
    quantized model without adapters only what trains; of another module its state. `state` is the
    `whole_state` of a model that is sharded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # The adapter that trains, and not the reference. "auto" would ask the model hub whether the
        # vocabulary was resized.
        adapters = [model.active_adapter]
        model.save_pretrained(
            str(folder), save_embedding_layers=False, selected_adapters=adapters, state_dict=state
        )
        return [str(_adapter_file(model, folder).relative_to(folder))]
    if getattr(model, "is_quantized", False):
        save_file(_trained(model) if state is None else state, folder / TRAINED_WEIGHTS)
        model.config.save_pretrained(str(folder))
    elif isinstance(model, PreTrainedModel):
        with loadable_padding(model):
            model.save_pretrained(str(folder), state_dict=state)
    elif state is not None:
        save_file(state, folder / MODULE_WEIGHTS)
    else:
        save_model(model, str(folder / MODULE_WEIGHTS))
    return sorted(file.name for file in folder.glob("*.safetensors*"))


def load_weights(model: Any, folder: Path) -> None:
    """Reads back what `save_weights` wrote, in place; dtypes and devices stay.

    Raises:
        CheckpointError: a file is missing, unreadable or of another model.
    """
    try:
        if isinstance(model, PeftModel):
            _load_adapter(model, _adapter_file(model, folder))
        elif getattr(model, "is_quantized", False):
            _copy(_trained(model), load_file(folder / TRAINED_WEIGHTS), folder)
        elif isinstance(model, PreTrainedModel):
            # transformers may store weights under other names than the module has; reading them
            # with it, in fp32, is exact for every dtype. Sizes are those of the model here: a file
            # may ask for any.
            with loadable_padding(model):
                saved, found = type(model).from_pretrained(
                    str(folder),
                    config=model.config,
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            # These were drawn anew.
            _refuse({*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])}, folder)
            _copy(model.state_dict(), saved.state_dict(), folder)
        elif any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            _copy(model.state_dict(), load_file(folder / MODULE_WEIGHTS), folder)
        else:
            load_model(model, str(folder / MODULE_WEIGHTS))
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except _READING_ERRORS as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """`tensor` in one piece on the CPU; empty unless `keep`. Of a sharded one a collective."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous() if keep else torch.empty(0)


@torch.no_grad()
def assign(own: Tensor, value: Tensor) -> None:
    """Copies `value` into `own`; of a sharded one each rank takes its shard, a collective."""
    if isinstance(own, DTensor):
        value = value.to(own.device_mesh.device_type)
        own.copy_(distribute_tensor(value, own.device_mesh, own.placements))
    else:
        own.copy_(value)


def whole_state(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor] | None:
    """What `save_weights` writes of a sharded model, in one piece; None of one that is whole.

    A collective. Without `keep` the tensors are empty: the state is for another process.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    everything = not isinstance(model, PeftModel) and not getattr(model, "is_quantized", False)
    return {
        name: whole(tensor, keep=keep)
        for name, tensor in model.state_dict().items()
        if everything or name in trained
    }


def _load_adapter(model: PeftModel, file: Path) -> None:
    found = load_file(file)
    name = model.active_adapter
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    _copy(own, found, file)


def _adapter_file(model: PeftModel, folder: Path) -> Path:
    """Where PEFT puts the active adapter: in a folder of its name, unless that is `default`."""
    name = model.active_adapter
    return (folder if name == "default" else folder / name) / ADAPTER_WEIGHTS


@contextlib.contextmanager
def loadable_padding(model: Any) -> Iterator[None]:
    """Within the block the config has no padding token without a row in the embeddings.

    A `[PAD]` that was added without resizing is never fed to a model, but a model that is saved
    with its id cannot be loaded.
    """
    config = model.config
    padding = getattr(config, "pad_token_id", None)
    if padding is not None and padding >= model.get_input_embeddings().weight.shape[0]:
        config.pad_token_id = None
    try:
        yield
    finally:
        config.pad_token_id = padding


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _copy(own: dict[str, Tensor], found: dict[str, Tensor], folder: Path) -> None:
    _check_shapes(own, found, folder)
    for name, tensor in own.items():
        assign(tensor, found[name])


def _check_shapes(own: dict[str, Tensor], found: dict[str, Tensor], place: Path) -> None:
    different = {
        name
        for name in own.keys() | found.keys()
        if name not in own or name not in found or own[name].shape != found[name].shape
    }
    _refuse(different, place)


def _refuse(different: set[str], place: Path) -> None:
    if different:
        raise CheckpointError(
            f"{place} does not fit this model: {len(different)} tensors differ, for example "
            f"{min(different)}. Was another model, or were other LoRA options, used?"
        )
