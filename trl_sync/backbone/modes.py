"""Training and evaluation mode, where most modules of a model stay in evaluation."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def set_training(model: nn.Module, modules: Iterable[nn.Module], mode: bool) -> None:
    """Puts these `modules` of `model` in training mode if `mode`, all its others in evaluation.

    Trainers ask for that before every micro-batch: modules that are as they should be are left
    alone, because setting an attribute of a module is slow.
    """
    chosen = {id(module): module for module in modules}
    if any(module.training and id(module) not in chosen for module in model.modules()):
        nn.Module.train(model, False)
    for module in chosen.values():
        if module.training != mode:
            module.training = mode
