"""Which tensors there are to audit, by name, scope and role."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from trl_sync.audit.findings import Scope
from trl_sync.audit.named_tensors import NamedTensors
from trl_sync.audit.quantized_layers import (
    all_quantization_tensors,
    join_names,
    packed_buffers,
    states_beside_weights,
)
from trl_sync.audit.sharding import (
    Form,
    Layout,
    Partition,
    Reach,
    fsdp_places,
    global_shape,
    has_fsdp1,
    is_gathered_now,
    layout_of,
    local_tensor,
    sharded_parameters,
    stays_gathered,
    this_rank,
)

MODEL = "model"
GATHERED = Layout(form=Form.GATHERED, text="gathered by ZeRO-3")
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


class Inventory:
    """The tensors of a model, its optimizer and further modules.

    `modules` are frozen models by role name that are not part of `model`, such as a reference or a
    reward model, whatever their flags say. A model that offers `sync_roles()` names its own roles.

    Walking the modules costs milliseconds, so it is done again only when something was registered
    on a module since, when `requires_grad` changed, or on `refresh(force=True)`.

    Of what FSDP2 shards, the tensors are those that the optimizer holds, also while modules show
    gathered ones. `partition`: the groups of ranks that hold the same shards, if there are any.
    """

    trainable: NamedTensors
    frozen: NamedTensors
    quantization: NamedTensors
    buffers: NamedTensors
    roles: list[Role]
    role_of: dict[str, str]
    unavailable: dict[str, str]
    partition: Partition

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
        self.partition = ()
        self._rank, self._world_size = this_rank()
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
        """What this rank holds of the gradient of each trainable parameter, in the order of
        `looked_at(Scope.TRAINABLE)`; None where no other rank holds the same.
        """
        trainable = self.looked_at(Scope.TRAINABLE)
        if trainable.is_plain:
            return [values_of(parameter.grad) for parameter in trainable.tensors]
        return [
            None
            if layout.reach is Reach.SELF or layout.form is Form.GATHERED
            else values_of(local_tensor(parameter.grad))
            for parameter, layout in zip(trainable.tensors, trainable.layouts, strict=True)
        ]

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """Every parameter the optimizer updates."""
        if self.optimizer is None:
            return []
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def zero_parameters(self) -> list[nn.Parameter]:
        """Every parameter that ZeRO's optimizer updates through its partitions (`bit16_groups`,
        `fp16_groups`; deepspeed 0.19.8); empty under other engines.
        """
        found: list[nn.Parameter] = []
        optimizer = self.optimizer
        while optimizer is not None:
            for name in ("bit16_groups", "fp16_groups"):
                found += [p for group in getattr(optimizer, name, ()) for p in group]
            optimizer = getattr(optimizer, "optimizer", None)
        return found

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
                layout = self._supported(value) if isinstance(value, Tensor) else None
                if layout is not None:
                    found.add(f"{name}.{key}", value, layout)
        return found

    def looked_at(self, scope: Scope) -> NamedTensors:
        """The tensors of a scope of the model, and the whole trainable ones that ZeRO-3 keeps
        beside its partitions, as `<name> (gathered)`.
        """
        return self._looked_at[scope]

    def tensors_of(self, scope: Scope) -> NamedTensors | None:
        """The tensors of `scope`, of gradients their parameters; None if it has none of its own."""
        if scope is Scope.OPTIMIZER:
            return self.optimizer_state()
        return self._looked_at.get(Scope.TRAINABLE if scope is Scope.GRADIENTS else scope)

    @property
    def is_sharded(self) -> bool:
        """True if some tensor is not simply there in full on each rank."""
        return self._is_fsdp1 or not all(tensors.is_plain for tensors in self._looked_at.values())

    def managed_by_fsdp2(self) -> set[int]:
        """The ids of parameters that FSDP2 gathers for the forward: they get no hooks, for a
        post-accumulate hook fires on sharded ones, too, but makes the copy of their gradients to
        the CPU blocking under CPU offload (torch 2.13).
        """
        return {id(place.sharded_param) for place in self._fsdp_places.values()}

    def learning_rates(self) -> dict[int, float]:
        """The learning rate of each parameter of the optimizer, by its id."""
        if self.optimizer is None:
            return {}
        # Once a group: a rate that is a tensor on a GPU is waited for.
        rates = ((group, _learning_rate(group)) for group in self.optimizer.param_groups)
        return {id(p): rate for group, rate in rates if rate is not None for p in group["params"]}

    def group_learning_rates(self) -> list[float]:
        """The learning rate of each group; ZeRO-3 shows no parameters in them."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [rate for rate in map(_learning_rate, groups) if rate is not None]

    def schema(self) -> list[tuple[str, str, str, tuple[int, ...]]]:
        """Scope, name, type with layout, and whole shape of parameters and quantization state.

        Not of buffers: some are made anew for the longest sequence that a rank has seen.
        """
        return [
            (scope, name, _type_of(tensor, layout), global_shape(tensor))
            for scope in (Scope.TRAINABLE, Scope.FROZEN, Scope.QUANTIZATION)
            for name, tensor, layout in zip(
                self._looked_at[scope].names,
                self._looked_at[scope].tensors,
                self._looked_at[scope].layouts,
                strict=True,
            )
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
        states = [holder.quant_state for holder in self._quantized]
        return [(id(state), id(getattr(state, "absmax", None))) for state in states]

    def _on_registration(self, module: nn.Module, name: str, value: Any) -> None:
        if id(module) not in self._module_ids:
            return
        managed = self._fsdp_places.get((id(module), name))
        if managed is not None and is_gathered_now(managed):
            # bitsandbytes wraps gathered 4-bit weights in every forward; they are thrown away.
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
        self._fsdp_places: dict[tuple[int, str], Any] = {}
        self._sharded: dict[int, nn.Parameter] = {}
        self._is_fsdp1 = False
        self._quantized: list[Any] = []
        seen: set[int] = set()
        for prefix, module in self._named_modules():
            self._fsdp_places |= fsdp_places(module)
            self._sharded |= sharded_parameters(module)
            self._is_fsdp1 |= has_fsdp1(module)
            self._collect_parameters(prefix, module, seen)
            self._collect_the_rest(prefix, module)
        self._looked_at = self._with_gathered()
        self.roles = list(self._declared_roles())
        self.role_of = self._roles_by_name()
        self._flags = self._requires_grad()
        frozen: Iterable[Any] = self.frozen.tensors
        self._quantized += [p for p in frozen if getattr(p, "quant_state", None) is not None]
        self._known_states = self._states()

    def _collect_parameters(self, prefix: str, module: nn.Module, seen: set[int]) -> None:
        is_fsdp1 = has_fsdp1(module)
        for name, shown in module.named_parameters(prefix):
            parameter = self._sharded.get(id(shown), shown)
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            trains = parameter.requires_grad and module is self.model
            if is_fsdp1:
                self.unavailable[name] = "sharded by FSDP1: use FSDP2"
            else:
                self._add(self.trainable if trains else self.frozen, name, parameter)

    def _collect_the_rest(self, prefix: str, module: nn.Module) -> None:
        """Quantization state and buffers."""
        beside = states_beside_weights(module, self._fsdp_places)
        self._quantized += [layer for _, layer in beside]
        for name, tensor in all_quantization_tensors(module, beside):
            self._add(self.quantization, join_names(prefix, name), tensor)
        packed = packed_buffers(module)
        for name, buffer in module.named_buffers(prefix):
            if unsupported_reason(buffer) is None:
                self._add(self.frozen if id(buffer) in packed else self.buffers, name, buffer)

    def _add(self, tensors: NamedTensors, name: str, tensor: Tensor) -> None:
        """`tensor` into `tensors`, or into `unavailable`."""
        layout = layout_of(tensor, self._rank, self._world_size)
        if layout.reach is Reach.REPLICAS and not self.partition and not self.version:
            # The groups are made once, at the start.
            self.partition = layout.partition
        reason = self._reason(tensor, layout)
        if reason is not None:
            self.unavailable[name] = reason
            return
        tensors.add(name, tensor, layout)

    def _supported(self, tensor: Tensor) -> Layout | None:
        """The layout of a tensor that can be compared; None of another."""
        layout = layout_of(tensor, self._rank, self._world_size)
        return layout if self._reason(tensor, layout) is None else None

    def _reason(self, tensor: Tensor, layout: Layout) -> str | None:
        if layout.reach is Reach.REPLICAS and layout.partition != self.partition:
            return f"replicated in groups of ranks for which the audit has none ({layout.text})"
        return layout.reason or unsupported_reason(local_tensor(tensor))

    def _with_gathered(self) -> dict[Scope, NamedTensors]:
        """The scopes; the trainable one with what ZeRO-3 keeps gathered. Of frozen parameters it
        makes such copies anew in every update.
        """
        looked_at = {Scope(scope): tensors for scope, tensors in self._scopes()}
        named = self.trainable
        members = list(zip(named.names, named.tensors, named.layouts, strict=True))
        whole = [
            (name, tensor)
            for name, tensor, layout in members
            if layout.form is Form.PARTITION and stays_gathered(tensor)
        ]
        if whole:
            both = looked_at[Scope.TRAINABLE] = NamedTensors()
            for member in members:
                both.add(*member)
            for name, tensor in whole:
                both.add(f"{name} (gathered)", tensor, GATHERED)
        return looked_at

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
                parameters=tuple(self._sharded.get(id(p), p) for p in role.parameters),
                modules=tuple((names.get(id(m), type(m).__name__), m) for m in role.modules),
                is_separate=False,
            )
        for name, module in self.modules.items():
            yield Role(
                name=name,
                trainable=False,
                parameters=tuple(self._sharded.get(id(p), p) for p in module.parameters()),
                modules=tuple(module.named_modules(prefix=name)),
                is_separate=True,
            )

    def _roles_by_name(self) -> dict[str, str]:
        """The role of each tensor; of one that several share, the trainable one."""
        role_of_id: dict[int, str] = {}
        for role in sorted(self.roles, key=lambda role: role.trainable):
            role_of_id |= dict.fromkeys(map(id, role.parameters), role.name)
        named: Iterable[tuple[str, Any]] = (
            *self.looked_at(Scope.TRAINABLE).items(),
            *self.frozen.items(),
        )
        roles = {name: role_of_id[id(p)] for name, p in named if id(p) in role_of_id}
        weights = {name: roles.get(name.rpartition(".")[0]) for name in self.quantization.names}
        return roles | {name: role for name, role in weights.items() if role is not None}


def unwrapped(module: nn.Module) -> nn.Module:
    """`module` without DDP, DeepSpeed and torch.compile around it."""
    inner: Any = module
    while inner is not None:
        module = inner
        wrapped = isinstance(module, _ENGINE_WRAPPERS) or _is_deepspeed_engine(module)
        inner = module.module if wrapped else module._modules.get("_orig_mod")
    return module


def torch_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, which is an `Optimizer` by name only."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def unsupported_reason(tensor: Tensor) -> str | None:
    """Why the bytes of this tensor cannot be read, or None if they can."""
    if tensor.is_meta:
        return "on the meta device, without bytes"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"of layout {tensor.layout}, type {tensor.dtype}"
    return None


def _learning_rate(group: Mapping[str, Any]) -> float | None:
    """None of optimizers that choose it themselves, such as Adafactor."""
    rate = group.get("lr")
    return None if rate is None else float(rate)


def _is_deepspeed_engine(module: nn.Module) -> bool:
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(module).__mro__)


def _type_of(tensor: Tensor, layout: Layout) -> str:
    text = f"{tensor.dtype} on {tensor.device.type}"
    return f"{text}, {layout.text}" if layout.text else text


def values_of(gradient: Tensor | None) -> Tensor | None:
    """A gradient's bytes; of a sparse one those of its values."""
    if gradient is not None and gradient.is_sparse:
        return gradient.coalesce().values()
    return gradient
