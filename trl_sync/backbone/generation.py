"""What must hold while a role generates: evaluation mode, and no setting of the model's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn
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


def continue_prompts(
    model: Any,
    input_ids: Int[Tensor, "B P"],
    attention_mask: Bool[Tensor, "B P"],
    config: GenerationConfig,
    **kwargs: Any,
) -> Int[Tensor, "B T"]:
    """Prompts, padded on the left, with a continuation of `model` exactly as `config` says."""
    with own_generation_config(model, config):
        generated: Tensor = model.generate(
            # Padding ids may lie outside the embedding (a pad token added without resizing).
            input_ids=input_ids.masked_fill(~attention_mask.bool(), 0),
            attention_mask=attention_mask.long(),
            **kwargs,
            # Parameters are whole here: ranks that end early need not go on for the others.
            synced_gpus=False,
        )
    return generated
