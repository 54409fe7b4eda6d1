"""Queries and responses as padded model inputs, and where the responses stand in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_sync.errors import ConfigError, RewardError

Collator = Callable[[list[dict[str, Tensor]]], Any]


class RightPadding:
    """The default collator: pads token ids on the right, so that no model needs position ids."""

    def __init__(self, pad_token_id: int | None) -> None:
        # What is masked may hold any token.
        self.pad_token_id = 0 if pad_token_id is None else pad_token_id

    def __call__(self, features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        fillers = {"input_ids": self.pad_token_id, "attention_mask": 0}
        return {
            name: nn.utils.rnn.pad_sequence(
                [feature[name] for feature in features], batch_first=True, padding_value=filler
            )
            for name, filler in fillers.items()
        }


def collate(collator: Collator, sequences: Sequence[Tensor], device: Any) -> dict[str, Tensor]:
    """The sequences as `input_ids` and `attention_mask`, the mask from their lengths."""
    batch = collator(
        [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in sequences]
    )
    return {name: value.to(device) for name, value in dict(batch).items() if name != "labels"}


def response_columns(
    attention_mask: Tensor,
    sequences: Sequence[Tensor],
    responses: Sequence[Tensor],
    response_masks: Sequence[Tensor] | None,
    *,
    encoder_decoder: bool,
) -> Tensor:
    """The mask (B, T - 1) of `trl_sync.legacy.losses`, for padding on either side.

    Of an encoder-decoder model the response begins with the start token, which nothing predicts.

    Raises:
        ConfigError: the collator has cut sequences.
    """
    mask = torch.zeros_like(attention_mask[:, 1:])
    for row, (sequence, response) in enumerate(zip(sequences, responses, strict=True)):
        tokens = attention_mask[row].nonzero().squeeze(-1)
        if len(tokens) != len(sequence):
            raise ConfigError(
                f"The training data collator returned {len(tokens)} tokens of a sequence of "
                f"{len(sequence)}: use one that neither cuts nor adds tokens."
            )
        first = len(tokens) - len(response) + int(encoder_decoder)
        weights = torch.ones_like(response) if response_masks is None else response_masks[row]
        counts = weights[int(encoder_decoder) :].to(mask.device, mask.dtype)
        mask[row, tokens[first:] - 1] = counts
    return mask


def check_episodes(
    batch_size: int | None,
    queries: Any,
    responses: Any,
    scores: Any,
    masks: Any,
    *,
    encoder_decoder: bool,
) -> None:
    """Nothing, if the arguments of `step` are lists of tensors that fit together.

    Raises:
        ConfigError: they are not.
        RewardError: a score is not a finite number.
    """
    lists = {"queries": queries, "responses": responses, "scores": scores}
    lists |= {} if masks is None else {"response_masks": masks}
    for name, tensors in lists.items():
        if not isinstance(tensors, list):
            raise ConfigError(f"{name} must be a list of tensors, got {type(tensors).__name__}.")
        other = next((t for t in tensors if not isinstance(t, Tensor)), None)
        if other is not None:
            raise ConfigError(
                f"{name} must be a list of tensors, got a list with {type(other).__name__}: "
                "torch.tensor(...) makes a tensor of it."
            )
        if batch_size is not None and len(tensors) != batch_size:
            raise ConfigError(
                f"{name} has {len(tensors)} entries, but batch_size is {batch_size}: step takes "
                "one batch."
            )
        if name != "scores" and any(t.dim() != 1 for t in tensors):
            raise ConfigError(f"{name} must hold tensors of one dimension, without padding.")
    shortest = min(len(query) for query in queries)
    if shortest == 0:
        raise ConfigError("A query is empty: there is nothing to predict the first token from.")
    if encoder_decoder and min(len(response) for response in responses) == 0:
        raise ConfigError("A response is empty: it must begin with the decoder's start token.")
    _check_masks(responses, masks)
    for score in scores:
        if score.numel() != 1:
            raise ConfigError(f"A score must be one number, got the shape {tuple(score.shape)}.")
        if not torch.isfinite(score).all():
            raise RewardError(f"A score is {score.item()}: scores must be finite.")


def _check_masks(responses: list[Tensor], masks: list[Tensor] | None) -> None:
    for response, mask in zip(responses, masks or [], strict=False):
        if len(response) != len(mask):
            raise ConfigError(
                f"A response of {len(response)} tokens has a response mask of {len(mask)}."
            )


@contextmanager
def no_dropout(model: nn.Module, *, checkpointing: bool) -> Iterator[None]:
    """Dropout is off; layers that recompute their activations still do so.

    Such layers look at their own `training`, of which their submodules' is independent.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    if checkpointing:
        for module, _ in modes:
            module.training = isinstance(module, GradientCheckpointingLayer)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
