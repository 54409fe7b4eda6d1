"""Reward models: how each kind makes one number of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor, nn

from trl_sync.backbone.scalar_head import ScalarHead, find_scalar_head, without_adapters
from trl_sync.errors import ConfigError

_WHAT_TO_USE = (
    "use an AutoModelForSequenceClassification with num_labels=1, a model with a value head, any "
    "module whose forward(input_ids, attention_mask) gives .logits of shape [B, 1], or a function"
)


def sequence_scorer(model: nn.Module, pad_id: int) -> LastTokenScorer | LogitsScorer:
    """How `model` scores sequences; it is in evaluation mode, and run once if it has no head.

    Raises:
        ConfigError: it cannot score sequences, or gives several numbers for each.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ConfigError(
            f"The reward model has a {model.active_peft_config.peft_type} adapter, which adds "
            "tokens to its input: merge it, or use an adapter that changes layers, such as LoRA."
        )
    inner = without_adapters(model)
    head = _last_token_head(inner)
    if head is not None:
        _check_one_label(inner)
        return LastTokenScorer(head=head)
    _check_logits(model, inner)
    return LogitsScorer(model=model, pad_id=pad_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastTokenScorer:
    """A decoder with a `score` head or a value head, read at the last real token."""

    head: ScalarHead

    def __call__(
        self, input_ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"]
    ) -> Float[Tensor, " N"]:
        hidden = self.head.trunk(
            # Padding ids may lie outside the embedding (a pad token added without resizing).
            input_ids=input_ids.masked_fill(~mask, 0),
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        # The classifier's own pooling looks for the padding id, which may be the stop token's.
        picked = hidden[torch.arange(len(mask), device=mask.device), last_token(mask)]
        return self.head(picked)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsScorer:
    """Any module whose forward gives `.logits` of shape [B, 1], an encoder classifier for example.

    It pools by itself, so tokens must begin in column 0, and padding holds its own padding id,
    which some models look for.
    """

    model: Any
    pad_id: int

    def __call__(
        self, input_ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"]
    ) -> Float[Tensor, " N"]:
        padded = input_ids.masked_fill(~mask, self.pad_id)
        return self.model(input_ids=padded, attention_mask=mask.long()).logits[:, 0].float()


def last_token(mask: Bool[Tensor, "N T"]) -> Int[Tensor, " N"]:
    """The column of the last real token of each row."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (columns * mask).amax(1)


def _last_token_head(inner: Any) -> ScalarHead | None:
    """The scalar head of a decoder; None for a module that only calls something `score`."""
    if hasattr(inner, "v_head"):
        config = getattr(getattr(inner, "pretrained_model", None), "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                "The reward model has a value head on an encoder-decoder model, which has no last "
                f"token of prompt and response: {_WHAT_TO_USE}."
            )
    elif not isinstance(getattr(inner, "score", None), nn.Module):
        return None
    trunk = getattr(inner, getattr(inner, "base_model_prefix", "") or "-", None)
    if not hasattr(inner, "v_head") and trunk is None:
        return None
    return find_scalar_head(inner)


def _check_one_label(inner: Any) -> None:
    labels = getattr(inner.config, "num_labels", 1) if hasattr(inner, "score") else 1
    if labels != 1:
        raise ConfigError(
            f"The reward model has {labels} labels, but PPO needs one number per episode: load "
            "it with num_labels=1, or pass a function that combines the labels."
        )


@torch.no_grad()
def _check_logits(model: Any, inner: Any) -> None:
    """Nothing, if two short sequences get `.logits` of shape [2, 1]."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = torch.zeros(2, 3, dtype=torch.long, device=device)
    try:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # whatever a module of unknown kind raises
        found = f"its forward fails with {type(error).__name__}: {error}"
    else:
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.shape == (2, 1):
            return
        found = (
            f"its forward gives {type(output).__name__} without .logits"
            if not isinstance(logits, Tensor)
            else f"its logits of two sequences have shape {tuple(logits.shape)}, not (2, 1)"
        )
    lacks = "no base_model_prefix that names its trunk" if hasattr(inner, "score") else ""
    raise ConfigError(
        f"The reward model {type(inner).__name__} has {lacks or 'no `score` head'}, and {found}: "
        f"{_WHAT_TO_USE}."
    )
