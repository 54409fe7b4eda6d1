"""Which tensors there are to audit, by name, scope and role."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from trl_sync.audit.findings import Scope
from trl_sync.quantization_state import quantization_tensors

MODEL = "model"
_ENGINE_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


@runtime_checkable
class SyncRole(Protocol):
    """What a model's `sync_roles()` says of one role.

    `parameters` belong to the role. `modules` are all that run for it, each listed by itself: what
    a module contains is not looked at, for it may belong to another role, as an adapter does.
    """

    trainable: bool
    parameters: Sequence[nn.Parameter]
    modules: Sequence[nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One declared role: its parameters, and the modules that run for it, by name.

    `is_separate`: a model of its own that was passed as frozen, rather than part of the model.
    """

    name: str
    trainable: bool
    parameters: tuple[nn.Parameter, ...]
    modules: tuple[tuple[str, nn.Module], ...]
    is_separate: bool


@dataclass(slots=True, kw_only=True)
class NamedTensors:
    """Tensors with their names, in the same order on every rank."""

    names: list[str] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor | None) -> None:
        self.names.append(name)
        self.tensors.append(tensor)

    def items(self) -> Iterator[tuple[str, Any]]:
        return zip(self.names, self.tensors, strict=True)

    def __len__(self) -> int:
        return len(self.names)


class Inventory:
    """The tensors of a model, its optimizer and further modules.

    `modules` are frozen models by role name that are not part of `model`, such as a reference or a
    reward model, whatever their flags say. A model that offers `sync_roles()` names its own roles.

    Walking the modules costs milliseconds, so it is done again only when something was registered
    on a module since, when `requires_grad` changed, or on `refresh(force=True)`.
    """

    trainable: NamedTensors
    frozen: NamedTensors
    quantization: NamedTensors
    buffers: NamedTensors
    roles: list[Role]
    role_of: dict[str, str]
    unavailable: dict[str, str]

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.model = unwrapped(model)
        self.optimizer = optimizer
        self.modules = {name: unwrapped(module) for name, module in (modules or {}).items()}
        self.version = 0
        self._stale = True
        self._module_ids: set[int] = set()
        self._handles = [
            register(self._on_registration)
            for register in (
                module_hooks.register_module_parameter_registration_hook,
                module_hooks.register_module_module_registration_hook,
                module_hooks.register_module_buffer_registration_hook,
            )
        ]
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops listening to registrations."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def refresh(self, force: bool = False) -> bool:
        """True if the tensors may be others than before, and were collected again."""
        if not (force or self._stale or self._flags_or_states_changed()):
            return False
        self._stale = False
        before = self._identity() if self.version else None
        self._collect()
        if self._identity() != before:
            self.version += 1
        return True

    def gradients(self) -> list[Tensor | None]:
        """The gradient of each trainable parameter, in their order."""
        return [values_of(parameter.grad) for parameter in self.trainable.tensors]

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """Every parameter the optimizer updates."""
        if self.optimizer is None:
            return []
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def optimizer_state(self) -> NamedTensors:
        """The tensors of the optimizer's state, as `<parameter>.<key>`.

        Parameters that are not the model's, such as an engine's own copies, are counted instead.
        """
        found = NamedTensors()
        if self.optimizer is None:
            return found
        names = {id(p): name for name, p in self.trainable.items()}
        names |= {id(p): name for name, p in self.frozen.items()}
        foreign = itertools.count()
        state = torch_optimizer(self.optimizer).state
        for parameter in self.optimizer_parameters():
            name = names.get(id(parameter)) or f"optimizer_parameter_{next(foreign)}"
            for key, value in sorted(state.get(parameter, {}).items(), key=lambda pair: pair[0]):
                if isinstance(value, Tensor) and unsupported_reason(value) is None:
                    found.add(f"{name}.{key}", value)
        return found

    def tensors_of(self, scope: Scope) -> NamedTensors | None:
        """The tensors of `scope`, of gradients their parameters; None if it has none of its own."""
        if scope is Scope.OPTIMIZER:
            return self.optimizer_state()
        return {
            Scope.TRAINABLE: self.trainable,
            Scope.GRADIENTS: self.trainable,
            Scope.FROZEN: self.frozen,
            Scope.QUANTIZATION: self.quantization,
            Scope.BUFFERS: self.buffers,
        }.get(scope)

    def learning_rates(self) -> dict[int, float]:
        """The learning rate of each parameter of the optimizer, by its id."""
        if self.optimizer is None:
            return {}
        return {
            id(p): float(group["lr"])
            for group in self.optimizer.param_groups
            # Optimizers that choose it themselves, such as Adafactor, have None.
            if group.get("lr") is not None
            for p in group["params"]
        }

    def schema(self) -> list[tuple[str, str, str, tuple[int, ...]]]:
        """Scope, name, type and shape of parameters and quantization state.

        Not of buffers: some are made anew for the longest sequence that a rank has seen.
        """
        return [
            (scope, name, f"{tensor.dtype} on {tensor.device.type}", tuple(tensor.shape))
            for scope, tensors in self._scopes()
            if scope != "buffers"
            for name, tensor in tensors.items()
        ]

    def _scopes(self) -> tuple[tuple[str, NamedTensors], ...]:
        return (
            ("trainable", self.trainable),
            ("frozen", self.frozen),
            ("quantization", self.quantization),
            ("buffers", self.buffers),
        )

    def _identity(self) -> list[tuple[str, str, int]]:
        return [(s, n, id(t)) for s, tensors in self._scopes() for n, t in tensors.items()]

    def _requires_grad(self) -> list[bool]:
        return [p.requires_grad for p in (*self.trainable.tensors, *self.frozen.tensors)]

    def _flags_or_states_changed(self) -> bool:
        return self._requires_grad() != self._flags or self._states() != self._known_states

    def _states(self) -> list[tuple[int, int]]:
        """The quantization states by identity: setting another one is announced by nobody."""
        states = [parameter.quant_state for parameter in self._quantized]
        return [(id(state), id(getattr(state, "absmax", None))) for state in states]

    def _on_registration(self, module: nn.Module, name: str, value: Any) -> None:
        if id(module) not in self._module_ids:
            return
        # The same object set again, as some layers do in every forward, changes nothing.
        holders = (module._parameters, module._modules, module._buffers)
        if not any(value is not None and holder.get(name) is value for holder in holders):
            self._stale = True

    def _collect(self) -> None:
        self.trainable, self.frozen = NamedTensors(), NamedTensors()
        self.quantization, self.buffers = NamedTensors(), NamedTensors()
        self.unavailable = {}
        self._module_ids = {id(m) for _, root in self._named_modules() for m in root.modules()}
        seen: set[int] = set()
        for prefix, module in self._named_modules():
            for name, parameter in module.named_parameters(prefix):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                reason = unsupported_reason(parameter)
                if reason is not None:
                    self.unavailable[name] = reason
                elif parameter.requires_grad and module is self.model:
                    self.trainable.add(name, parameter)
                else:
                    self.frozen.add(name, parameter)
            for name, tensor in quantization_tensors(module):
                self.quantization.add(_join(prefix, name), tensor)
            packed = _packed_buffers(module)
            for name, buffer in module.named_buffers(prefix):
                if unsupported_reason(buffer) is None:
                    (self.frozen if id(buffer) in packed else self.buffers).add(name, buffer)
        self.roles = list(self._declared_roles())
        self.role_of = self._roles_by_name()
        self._flags = self._requires_grad()
        frozen: Iterable[Any] = self.frozen.tensors
        self._quantized = [p for p in frozen if getattr(p, "quant_state", None) is not None]
        self._known_states = self._states()

    def _named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield "", self.model
        yield from self.modules.items()

    def _declared_roles(self) -> Iterator[Role]:
        declare = getattr(self.model, "sync_roles", None)
        declared: Mapping[str, SyncRole] = declare() if callable(declare) else {}
        names = {id(module): name for name, module in self.model.named_modules()}
        for name, role in declared.items():
            yield Role(
                name=name,
                trainable=role.trainable,
                parameters=tuple(role.parameters),
                modules=tuple((names.get(id(m), type(m).__name__), m) for m in role.modules),
                is_separate=False,
            )
        for name, module in self.modules.items():
            yield Role(
                name=name,
                trainable=False,
                parameters=tuple(module.parameters()),
                modules=tuple(module.named_modules(prefix=name)),
                is_separate=True,
            )

    def _roles_by_name(self) -> dict[str, str]:
        """The role of each tensor; of one that several share, the trainable one."""
        role_of_id: dict[int, str] = {}
        for role in sorted(self.roles, key=lambda role: role.trainable):
            role_of_id |= dict.fromkeys(map(id, role.parameters), role.name)
        named: Iterable[tuple[str, Any]] = (*self.trainable.items(), *self.frozen.items())
        roles = {name: role_of_id[id(p)] for name, p in named if id(p) in role_of_id}
        weights = {name: roles.get(name.rpartition(".")[0]) for name in self.quantization.names}
        return roles | {name: role for name, role in weights.items() if role is not None}


def unwrapped(module: nn.Module) -> nn.Module:
    """`module` without DDP and torch.compile around it."""
    inner: Any = module
    while inner is not None:
        module = inner
        wrapped = isinstance(module, _ENGINE_WRAPPERS)
        inner = module.module if wrapped else module._modules.get("_orig_mod")
    return module


def torch_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, which is an `Optimizer` by name only."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def unsupported_reason(tensor: Tensor) -> str | None:
    """Why this tensor cannot be compared across ranks, or None if it can."""
    if hasattr(tensor, "ds_id"):
        return "partitioned by ZeRO-3"
    if type(tensor).__name__ == "DTensor" or hasattr(tensor, "device_mesh"):
        return "sharded by FSDP2 or tensor parallelism"
    if type(tensor).__name__ == "FlatParameter":
        return "sharded by FSDP1"
    if tensor.is_meta:
        return "on the meta device, without bytes"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"of layout {tensor.layout}, type {tensor.dtype}"
    return None


def _packed_buffers(module: nn.Module) -> set[int]:
    """Buffers that are frozen weights: those of layers quantized by GPTQ, AWQ or HQQ."""
    return {
        id(buffer)
        for layer in module.modules()
        if {"qweight", "W_q"} & set(layer._buffers)
        for buffer in layer.buffers(recurse=False)
    }


def values_of(gradient: Tensor | None) -> Tensor | None:
    """A gradient's bytes; of a sparse one those of its values."""
    if gradient is not None and gradient.is_sparse:
        return gradient.coalesce().values()
    return gradient


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
