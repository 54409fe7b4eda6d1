"""What goes into a pass through a causal LM and what comes out, for every way to hold one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def model_inputs(
    input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]
) -> dict[str, Tensor]:
    """Token ids, mask and positions; what is masked has id 0 and does not count as a position."""
    mask = attention_mask.bool()
    return {
        # Padding ids may lie outside the embedding (a pad token added without resizing).
        "input_ids": input_ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0),
    }


def on_response(
    mask: Bool[Tensor, "B R"], logprobs: Float[Tensor, " N"], entropies: Float[Tensor, " N"]
) -> dict[str, Tensor]:
    """The statistics of the N tokens that `mask` counts, [B, R] in fp32, 0.0 elsewhere."""
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return {
        "logprobs": zeros.masked_scatter(mask, logprobs),
        "entropies": zeros.masked_scatter(mask, entropies),
    }


def trunk_of(model: Any) -> nn.Module:
    """A causal LM without its head."""
    trunk: nn.Module = getattr(model, model.base_model_prefix)
    return trunk
