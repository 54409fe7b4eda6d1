"""Every rank starts from the same policy, value model, reference and reward model: shown, or made.

DDP and ZeRO send rank 0's parameters when they wrap a model; FSDP2 shards whatever each rank has,
and no engine sends quantization state, or a reward model that it does not wrap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn
from transformers.utils import logging

from trl_sync.backbone.fingerprint import fingerprint_of, state_tensors
from trl_sync.errors import ConfigError

logger = logging.get_logger(__name__)

Tensors = dict[str, Tensor]


def share_initial_state(
    accelerator: Accelerator, models: Any, rewards: Mapping[str, nn.Module]
) -> None:
    """Nothing, if all four roles have the same bytes on every rank; else rank 0's go to all.

    A collective, before an engine has sharded anything. Compared are parameters, persistent buffers
    and quantization state, by checksum: one on the healthy path, one for each tensor otherwise.

    Raises:
        ConfigError: a tensor is missing or of another shape or type on some ranks; on every rank.
    """
    if accelerator.num_processes == 1:
        return
    state = _initial_tensors(models, rewards)
    if len(set(gather_object([fingerprint_of(state.items())]))) == 1:
        return
    _check_alike(state)
    different = _different(state, state)
    for name in different:
        _receive(state[name], accelerator.device)
    if _different(state, different):
        raise ConfigError(
            f"{different[0]} still differs between ranks after rank 0 sent it: load the same "
            "models on every rank."
        )
    if accelerator.is_main_process:
        roles = ", ".join(sorted({_role(name, models, rewards) for name in different}))
        logger.warning(
            f"{len(different)} tensor(s) of {roles} differed between ranks, such as "
            f"{different[0]}: all ranks have those of rank 0 now. Was a part drawn at random on "
            "each rank, such as an adapter or a head that its checkpoint does not hold? (With "
            "fsdp_cpu_ram_efficient_loading only rank 0 loads: then this is as it should be.)"
        )


def _initial_tensors(models: nn.Module, rewards: Mapping[str, nn.Module]) -> Tensors:
    state = dict(state_tensors(models))
    for name, module in rewards.items():
        state |= {f"{name}: {key}": tensor for key, tensor in state_tensors(module)}
    return state


def _check_alike(state: Tensors) -> None:
    own = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in state.items()}
    forms: list[dict[str, str]] = gather_object([own])
    for rank, form in enumerate(forms):
        odd = sorted(set(form.items()) ^ set(forms[0].items()))
        if odd:
            name = odd[0][0]
            raise ConfigError(
                f"Ranks were given different models: {name} is {forms[0].get(name, 'missing')} on "
                f"rank 0 and {form.get(name, 'missing')} on rank {rank}. Load the same models on "
                "every rank."
            )


def _different(state: Tensors, names: Iterable[str]) -> list[str]:
    """Those of `names` that differ between ranks, in the same order on every rank."""
    own = {name: fingerprint_of([(name, state[name])]) for name in names}
    digests: list[dict[str, str]] = gather_object([own])
    return [name for name in digests[0] if any(d[name] != digests[0][name] for d in digests)]


@torch.no_grad()
def _receive(tensor: Tensor, device: torch.device) -> None:
    """Rank 0's bytes in place of this rank's; the backend may not know the tensor's device."""
    # `data` of a 4-bit parameter is a plain tensor: to() of the parameter itself would quantize.
    sent = tensor.data.contiguous().to(device)
    distributed.broadcast(sent, src=0)
    tensor.data.copy_(sent)


def _role(name: str, models: Any, rewards: Mapping[str, nn.Module]) -> str:
    """The role that a tensor belongs to, for a message."""
    for reward in rewards:
        if name.startswith(f"{reward}: "):
            return f"the {reward}"
    own = {id(parameter): key for key, parameter in _parameters(models)}
    tensor = dict(models.named_parameters()).get(name)
    return f"the {own[id(tensor)]}" if id(tensor) in own else "the base"


def _parameters(models: Any) -> Iterator[tuple[str, nn.Parameter]]:
    for role in models.roles:
        for _, parameter in models.role_parameters(role):
            yield role, parameter
