"""Rollouts made by hand, reward models, and what these say of each sequence alone."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny
from trl_sync.ppo.batch import PromptBatch, Rollout
from trl_sync.ppo.rollout import pad_left

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
# The last token is the padding token, the end-of-sequence token, none, and an ordinary one.
RESPONSES = [[20, 21, 0], [22, 23, 24, 1], [], [25]]


def rollout(
    prompts: list[list[int]] = PROMPTS,
    responses: list[list[int]] = RESPONSES,
    *,
    columns: dict[str, list[Any]] | None = None,
    texts: list[Any] | None = None,
    padding: int = 0,
) -> Rollout:
    prompt_ids, prompt_mask = pad_left(prompts, CPU)
    width = max(1, *(len(response) for response in responses))
    filled = [response + [padding] * (width - len(response)) for response in responses]
    lengths = torch.tensor([len(response) for response in responses])
    return Rollout(
        prompts=PromptBatch(
            prompts=texts or [f"prompt {row}" for row in range(len(prompts))],
            token_ids=prompts,
            columns=columns or {},
        ),
        prompt_ids=prompt_ids.masked_fill(~prompt_mask, padding),
        prompt_mask=prompt_mask,
        response_ids=torch.tensor(filled),
        response_mask=torch.arange(width) < lengths.unsqueeze(1),
        stopped=torch.zeros(len(prompts), dtype=torch.bool),
    )


def classifier(seed: int = 1, **changes: Any) -> PreTrainedModel:
    model = tiny.reward_llama(seed, **changes)
    with torch.no_grad():
        model.score.weight *= 50  # random scores lie within 0.2; these within 10
    return model


def with_adapter(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(3)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    adapted = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **options)
    )
    head = adapted.base_model.model.score.modules_to_save["default"]
    nn.init.normal_(head.weight)  # unlike the base's own head, which must not be used
    return adapted


def one_by_one(model: nn.Module, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """The classifier's own answer to each sequence alone, without padding."""
    # Without a padding id a single sequence is pooled at its last token.
    model.config.pad_token_id = None
    with torch.no_grad():
        rows = [
            model(input_ids=torch.tensor([prompt + response])).logits[0, 0]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    return torch.stack(rows)
