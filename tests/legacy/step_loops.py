"""Trainers of the step API on tiny models, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import tiny
from trl_sync.legacy import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
)

Batch = tuple[list[Tensor], list[Tensor], list[Tensor]]


def config(**changes: Any) -> PPOConfig:
    return PPOConfig(**({"batch_size": 8, "mini_batch_size": 4} | changes))


def lora(**changes: Any) -> LoraConfig:
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(**(options | {"task_type": "CAUSAL_LM"} | changes))


def model(peft: bool = False, **lora_options: Any) -> Any:
    """The same weights at every call."""
    torch.manual_seed(3)
    inner: Any = tiny.llama()
    if peft:
        inner = get_peft_model(inner, lora(**({"init_lora_weights": False} | lora_options)))
    torch.manual_seed(4)
    return AutoModelForCausalLMWithValueHead(inner)


def t5() -> Any:
    torch.manual_seed(5)
    inner = T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )
    return AutoModelForSeq2SeqLMWithValueHead(inner)


def trainer(
    settings: PPOConfig | None = None,
    policy: Any = None,
    *,
    learning_rate: float | None = None,
    kind: type[PPOTrainer] = PPOTrainer,
    **options: Any,
) -> PPOTrainer:
    """With `learning_rate`, plain SGD."""
    policy = model() if policy is None else policy
    if learning_rate is not None:
        trained = [p for p in policy.parameters() if p.requires_grad]
        options["optimizer"] = torch.optim.SGD(trained, lr=learning_rate)
    return kind(config=settings or config(), model=policy, tokenizer=tiny.tokenizer(), **options)


def episodes(seed: int, number: int = 8) -> Batch:
    """Queries of 1 to 5 tokens, responses of 2 to 8, and a normal score each."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(shortest: int, longest: int) -> Tensor:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        return torch.randint(3, 40, (length,), generator=generator)

    queries = [tokens(1, 5) for _ in range(number)]
    responses = [tokens(2, 8) for _ in range(number)]
    scores = [torch.randn((), generator=generator) for _ in range(number)]
    return queries, responses, scores


def parameters(trained: Any) -> dict[str, Tensor]:
    inner = trained.accelerator.unwrap_model(trained.model)
    return {name: p.detach().clone() for name, p in inner.named_parameters()}


def largest_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(float((after[name] - before[name]).abs().max()) for name in before)
