"""What goes into a pass through a causal LM and what comes out, for every way to hold one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
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


class ResponseTokens:
    """The N positions that a mask [B, R] counts, the same for all roles of a pass.

    With `positions`, those in the flattened mask, nothing waits for the device to count them.
    """

    def __init__(
        self, mask: Bool[Tensor, "B R"], positions: Int[Tensor, " N"] | None = None
    ) -> None:
        self.mask = mask
        self._positions = mask.flatten().nonzero().squeeze(1) if positions is None else positions

    def pick(self, tensor: Shaped[Tensor, "B R ..."]) -> Shaped[Tensor, "N ..."]:
        """What `tensor` holds at those positions, row by row."""
        return tensor.flatten(0, 1).index_select(0, self._positions)

    def statistics(
        self, logprobs: Float[Tensor, " N"], entropies: Float[Tensor, " N"]
    ) -> dict[str, Tensor]:
        """What is known of the N tokens, [B, R] in fp32, 0.0 elsewhere."""
        zeros = torch.zeros(self.mask.numel(), dtype=torch.float32, device=self.mask.device)
        return {
            name: zeros.index_copy(0, self._positions, values).view(self.mask.shape)
            for name, values in (("logprobs", logprobs), ("entropies", entropies))
        }


def trunk_of(model: Any) -> nn.Module:
    """A causal LM without its head."""
    trunk: nn.Module = getattr(model, model.base_model_prefix)
    return trunk
