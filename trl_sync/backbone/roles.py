"""The roles of PPO and the contract each must keep while the others train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from trl_sync.errors import ConfigError

POLICY = "policy"
VALUE = "value"
REFERENCE = "reference"
REWARD = "reward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One model of PPO as a view of the shared base.

    `adapter` names the LoRA adapter that is added to the base, or is None for the base alone.
    """

    name: str
    adapter: str | None
    trainable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleState:
    """What belongs to a role in memory: its parameters, and each module that runs for it alone or
    with others; what such a module contains may belong to another role.
    """

    trainable: bool
    parameters: tuple[nn.Parameter, ...]
    modules: tuple[nn.Module, ...]


def freeze(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode with every parameter's `requires_grad` off."""
    return module.eval().requires_grad_(False)


def check_frozen(role: str, module: nn.Module, optimized: Iterable[nn.Parameter] = ()) -> None:
    """Nothing, if `module` is frozen: evaluation mode, no gradient, outside the optimizer.

    `optimized` are the parameters the optimizer will update.

    Raises:
        ConfigError: names the first parameter or submodule that breaks the contract.
    """
    optimized_ids = {id(parameter) for parameter in optimized}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            raise ConfigError(
                f"The {role} must not train, but its parameter {name} has requires_grad=True. "
                "Call .requires_grad_(False) on the model, or pass it as the policy."
            )
        if id(parameter) in optimized_ids:
            raise ConfigError(
                f"The {role} must not train, but its parameter {name} is in the optimizer: the "
                f"{role} shares it with a trained model. Pass a model of its own."
            )
    for name, submodule in module.named_modules():
        if submodule.training:
            raise ConfigError(
                f"The {role} must run in evaluation mode, but {name or 'it'} is in training mode. "
                "Call .eval() on the model."
            )
