"""The nouns of PPO, in the order in which they come to be.

prompts -> `Rollout` -> `ScoredRollout` -> `Experience` -> micro-batches

Axes: B sequences, P prompt tokens, R response tokens, T = P + R, H hidden, V vocabulary.
Prompts are padded on the left and responses on the right; a micro-batch is padded on the left only,
so that each row ends in the last column. Masks are True where a token counts and come from lengths
and from generation, never from comparing with the padding token. Positions that are masked hold
0.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_sync.ppo.padding import Lengths, RightAligned


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

    `reference_logprobs` is None where the reference was not asked.
    `scores` are whole episodes'; `token_rewards` is the part of them that stands on tokens of its
    own, the rest stands on the last token. `raw_scores` are the scores as the reward source gave
    them, if they were changed since; `source_scores` are those of each of several sources, NaN
    where one does not apply.
    """

    rollout: Rollout
    logprobs: Float[Tensor, "B R"]
    reference_logprobs: Float[Tensor, "B R"] | None
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
    lengths: Lengths = field(init=False)

    def __post_init__(self) -> None:
        prompt_mask = self.attention_mask[:, : self.prompt_width]
        object.__setattr__(self, "lengths", Lengths.of(prompt_mask, self.response_mask))

    @property
    def prompt_width(self) -> int:
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    def micro_batch(self, rows: Int[Tensor, " N"], loss_denominator: Tensor) -> dict[str, Tensor]:
        """Those rows, moved right until each ends in the last column, as wide as the longest.

        `rows` are in the host's memory. `loss_denominator` is the number of response tokens in the
        whole global mini-batch.
        """
        aligned = RightAligned(
            rows, self.lengths, prompt_width=self.prompt_width, device=self.input_ids.device
        )
        return {
            "input_ids": aligned.sequences(self.input_ids),
            "attention_mask": aligned.sequences(self.attention_mask),
            "response_mask": aligned.responses(self.response_mask),
            "old_logprobs": aligned.responses(self.old_logprobs),
            "old_values": aligned.responses(self.old_values),
            "advantages": aligned.responses(self.advantages),
            "returns": aligned.responses(self.returns),
            "response_positions": aligned.response_positions,
            "loss_denominator": loss_denominator,
        }
