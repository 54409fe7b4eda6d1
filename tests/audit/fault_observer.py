"""What stands in memory on each rank around every update, and where two ranks part."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

PHASES = ("before", "gradients", "after")

Row = dict[str, Any]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).numpy().tobytes()).hexdigest()[:16]


class Observer:
    """What stands in memory on this rank right before and right after every update."""

    def __init__(self, model: nn.Module, **modules: nn.Module) -> None:
        self.model, self.modules = model, modules
        self.rows: list[Row] = []
        self.dropped = False
        for module in modules.values():
            for layer in module.modules():
                if isinstance(layer, nn.Dropout):
                    layer.register_forward_hook(self.see_dropout)

    def see_dropout(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.dropped |= not torch.equal(inputs[0], output)

    def before(self, optimizer: Any) -> None:
        gradients = self.gradients()
        self.rows.append(
            {
                "before": self.state(optimizer),
                "gradients": {n: digest(g) for n, g in gradients.items()},
                "sizes": {n: float(g.double().abs().sum()) for n, g in gradients.items()},
                "rates": [group["lr"] for group in optimizer.param_groups],
                "dropped": self.dropped,
            }
        )

    def after(self, optimizer: Any) -> None:
        self.rows[-1] |= {
            "after": self.state(optimizer),
            "gradients_after": {n: digest(g) for n, g in self.gradients().items()},
            "rates_after": [group["lr"] for group in optimizer.param_groups],
        }

    def gradients(self) -> dict[str, Tensor]:
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def state(self, optimizer: Any) -> dict[str, str]:
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = digest(parameter)
            if getattr(parameter, "quant_state", None) is not None:
                found[f"{name}.absmax"] = digest(parameter.quant_state.absmax)
            if parameter in optimizer.state:
                found[f"{name}.exp_avg"] = digest(optimizer.state[parameter]["exp_avg"])
        for role, module in self.modules.items():
            found |= {f"{role}.{name}": digest(p) for name, p in module.named_parameters()}
        return found


def differing(rows: list[list[Row]], step: int, phase: str) -> set[str]:
    """Names that differ between the two ranks, or exist on one only."""
    one, other = (rank[step - 1][phase] for rank in rows)
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def first_difference(rows: list[list[Row]]) -> tuple[int, str, set[str]] | None:
    for step in range(1, min(map(len, rows)) + 1):
        for phase in PHASES:
            if names := differing(rows, step, phase):
                return step, phase, names
    return None


def rows_of(drills: list[dict[str, Any]], fault: str) -> list[list[Row]]:
    return [rank[fault]["rows"] for rank in drills]


def moments(names: list[str]) -> set[str]:
    return {f"{name}.exp_avg" for name in names}
