"""The nouns of PPO, in the order in which they come to be.

prompts -> `Rollout` -> `ScoredRollout` -> `Experience` -> micro-batches

Axes: B sequences, P prompt tokens, R response tokens, T = P + R, H hidden, V vocabulary.
Prompts are padded on the left and responses on the right. Masks are True where a token counts and
come from lengths and from generation, never from comparing with the padding token. Positions that
are masked hold 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Prompts as the dataset holds them (text or messages), their tokens, and the other columns."""

    prompts: list[Any]
    token_ids: list[list[int]]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Prompts with the responses that the policy sampled.

    `stopped` tells which responses ended with a stop token; the stop token is part of the response.
    """

    prompts: PromptBatch
    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    response_ids: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]
    stopped: Bool[Tensor, " B"]

    @property
    def input_ids(self) -> Int[Tensor, "B T"]:
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Bool[Tensor, "B T"]:
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with what each role says about it. Log-probabilities in nats.

    `scores` are whole episodes'; `token_rewards` is the part of them that stands on tokens of its
    own, the rest stands on the last token. `raw_scores` are the scores as the reward source gave
    them, if they were changed since; `source_scores` are those of each of several sources, NaN
    where one does not apply.
    """

    rollout: Rollout
    logprobs: Float[Tensor, "B R"]
    reference_logprobs: Float[Tensor, "B R"]
    entropies: Float[Tensor, "B R"]
    values: Float[Tensor, "B R"]
    scores: Float[Tensor, " B"]
    token_rewards: Float[Tensor, "B R"] | None = None
    raw_scores: Float[Tensor, " B"] | None = None
    source_scores: dict[str, Float[Tensor, " B"]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """All that the loss needs of a rollout batch; `old_` is from before the first update."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    response_mask: Bool[Tensor, "B R"]
    old_logprobs: Float[Tensor, "B R"]
    old_values: Float[Tensor, "B R"]
    advantages: Float[Tensor, "B R"]
    returns: Float[Tensor, "B R"]

    def micro_batch(self, rows: Int[Tensor, " N"], loss_denominator: Tensor) -> dict[str, Tensor]:
        """Those rows without the columns in which all of them are padding.

        `loss_denominator` is the number of response tokens in the whole global mini-batch.
        """
        num_response = self.response_mask.shape[1]
        attention, response = self.attention_mask[rows], self.response_mask[rows]
        prompt = attention[:, :-num_response]
        start = int(prompt.any(0).long().argmax()) if prompt.any() else 0
        # One column stays even if every response is empty, so that the pass has an output.
        length = max(1, int(response.sum(1).max()))
        stop = prompt.shape[1] + length
        return {
            "input_ids": self.input_ids[rows, start:stop],
            "attention_mask": attention[:, start:stop],
            "response_mask": response[:, :length],
            "old_logprobs": self.old_logprobs[rows, :length],
            "old_values": self.old_values[rows, :length],
            "advantages": self.advantages[rows, :length],
            "returns": self.returns[rows, :length],
            "loss_denominator": loss_denominator,
        }
