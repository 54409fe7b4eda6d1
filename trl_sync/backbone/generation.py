"""What must hold while a role generates: evaluation mode, and no setting of the model's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import GenerationConfig


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Within the block `module` is in evaluation mode."""
    training = module.training
    module.train(False)
    try:
        yield
    finally:
        module.train(training)


@contextlib.contextmanager
def own_generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Within the block `config` is the model's generation config, so that none of its own leaks."""
    previous = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = previous
