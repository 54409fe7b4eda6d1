"""Models that say one number a token: where their trunk ends and their head begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarHead:
    """A decoder's trunk, which gives hidden states, and the head that makes each one number."""

    trunk: nn.Module
    head: Callable[[Tensor], Tensor]

    def __call__(self, states: Float[Tensor, "*N H"]) -> Float[Tensor, " *N"]:
        """One number for each hidden state, in fp32 and outside autocast."""
        with torch.autocast(states.device.type, enabled=False):
            # The weight's type now: an engine may compute in another one than it was made in.
            scalars = self.head(states.to(_weight(self.head).dtype)).squeeze(-1)
        return scalars.float()


def without_adapters(model: Any) -> Any:
    """The transformers model inside a PEFT model; the adapters stay in its layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def find_scalar_head(model: Any) -> ScalarHead | None:
    """The head of a sequence classifier (`score`) or of a model with a value head (`v_head`).

    None if there is neither.
    """
    inner = without_adapters(model)
    if hasattr(inner, "v_head") and hasattr(inner, "pretrained_model"):
        language_model = without_adapters(inner.pretrained_model)
        head: Any = inner.v_head
        trunk = getattr(language_model, language_model.base_model_prefix)
        return ScalarHead(trunk=trunk, head=head)
    prefix: str = getattr(inner, "base_model_prefix", "")
    if hasattr(inner, "score") and prefix:
        trunk = getattr(inner, prefix)
        return ScalarHead(trunk=trunk, head=inner.score)
    return None


def _weight(head: Any) -> Tensor:
    """The weight of a linear head, also where PEFT trains a copy of it."""
    weight: Tensor = next(p for n, p in head.named_parameters() if n.endswith("weight"))
    return weight
