"""What each role must keep: frozen models stay frozen, the optimizer holds what trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from trl_sync.audit.findings import Cause, Scope
from trl_sync.audit.inventory import Inventory


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFinding:
    """What one rank sees by itself; `tensors` may be empty.

    `in_parts`: of some of what it looks at, other ranks hold other parts, and may see nothing.
    """

    cause: Cause
    scope: Scope
    tensors: tuple[str, ...] = ()
    role: str | None = None
    evidence: str = ""
    fatal: bool = True
    last_equal_step: int | None = None
    in_parts: bool = False


class RoleWatch:
    """Checks roles when the inventory changed, and notes when a frozen one runs with dropout.

    `Trainer.training_step` puts everything into training mode, so the mode alone says nothing: what
    counts is the mode at the moment the module runs. Hooks on the modules that behave differently
    in training look at it there.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._active: dict[tuple[str, str, str], None] = {}

    def listen(self, inventory: Inventory) -> None:
        """Listens to the frozen roles of `inventory`, and to nothing else."""
        self.close()
        for role in inventory.roles:
            if role.trainable:
                continue
            for name, module in role.modules:
                if _depends_on_mode(module):
                    handle = module.register_forward_pre_hook(self._note(role.name, name))
                    self._handles.append(handle)

    def close(self) -> None:
        """Stops listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def drain(self) -> list[LocalFinding]:
        """Frozen roles that ran with active dropout or batch statistics since the last call."""
        if not self._active:
            return []
        active, self._active = self._active, {}
        by_role: dict[str, list[tuple[str, str]]] = {}
        for role, name, what in sorted(active):
            by_role.setdefault(role, []).append((name, what))
        return [
            LocalFinding(
                cause=Cause.ROLE_VIOLATION,
                scope=Scope.ROLES,
                tensors=tuple(name for name, _ in found),
                role=role,
                evidence=f"The frozen role {role} ran in training mode: {found[0][1]}.",
            )
            for role, found in by_role.items()
        ]

    def _note(self, role: str, name: str) -> Any:
        def before_forward(module: nn.Module, args: Any) -> None:
            what = active_randomness(module)
            if what is not None:
                self._active[role, name, what] = None

        return before_forward


def check_roles(inventory: Inventory) -> list[LocalFinding]:
    """What breaks the contract of a role, from the flags of its parameters and the optimizer."""
    return [*_frozen_roles_that_train(inventory), *_missing_in_optimizer(inventory)]


def active_randomness(module: nn.Module) -> str | None:
    """What makes the module's output or state depend on training, if it is in training mode."""
    if not module.training:
        return None
    if isinstance(module, _BatchNorm):
        return (
            f"{type(module).__name__} updating its statistics"
            if module.track_running_stats
            else None
        )
    for name, value in _dropout_rates(module):
        if value > 0.0:
            return f"{type(module).__name__} ({name}={value:g})"
    return None


def _depends_on_mode(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or any(True for _ in _dropout_rates(module))


def _dropout_rates(module: nn.Module) -> Iterator[tuple[str, float]]:
    """Dropout probabilities of the module itself; attention layers keep theirs as a number."""
    if isinstance(module, _DropoutNd):
        yield "p", float(module.p)
        return
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float):
            yield name, value


def _frozen_roles_that_train(inventory: Inventory) -> Iterator[LocalFinding]:
    partitioned = inventory.zero_parameters()
    optimized = {id(p) for p in (*inventory.optimizer_parameters(), *partitioned)}
    names = {id(p): name for name, p in inventory.trainable.items()}
    names |= {id(p): name for name, p in inventory.frozen.items()}
    for role in inventory.roles:
        known = [] if role.trainable else [p for p in role.parameters if id(p) in names]
        flagged = [p for p in known if p.requires_grad]
        for reason, broken, fatal in (
            ("a place in the optimizer", [p for p in known if id(p) in optimized], True),
            ("a gradient", [p for p in known if p.grad is not None], True),
            # Some trainers leave the flag of their reference on, and run it without gradients.
            ("requires_grad=True", flagged, not role.is_separate),
        ):
            if broken:
                yield LocalFinding(
                    cause=Cause.ROLE_VIOLATION,
                    scope=Scope.ROLES,
                    tensors=tuple(names[id(p)] for p in broken),
                    role=role.name,
                    evidence=f"The frozen role {role.name} has parameters with {reason}.",
                    fatal=fatal,
                )
                break


def _missing_in_optimizer(inventory: Inventory) -> Iterator[LocalFinding]:
    partitioned = inventory.zero_parameters()
    optimized = {id(p) for p in (*inventory.optimizer_parameters(), *partitioned)}
    if not optimized:
        return
    own = [id(p) for _, p in inventory.trainable.items()]
    own += [id(p) for _, p in inventory.frozen.items()]
    missing = [name for name, p in inventory.trainable.items() if id(p) not in optimized]
    # Engines optimize copies of their own, and some optimizers hold nothing but a placeholder: then
    # only liveness can tell.
    # ZeRO's optimizer knows which parameters its partitions stand for.
    copies = 0 if partitioned else len(optimized - set(own))
    held = len(inventory.trainable) - len(missing)
    if missing and held and copies < len(missing):
        yield LocalFinding(
            cause=Cause.NOT_IN_OPTIMIZER,
            scope=Scope.ROLES,
            tensors=tuple(missing),
            evidence=f"The optimizer holds {len(optimized)} parameters, but not this one.",
        )
