"""Tiny models and a tokenizer made on the spot, small enough for many in one process."""

from __future__ import annotations

import string
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trl_sync.ppo.config import PPOConfig

CHARACTERS = string.ascii_lowercase + " .,:<>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}: {{ m['content'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant: {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with separate padding and end-of-sequence tokens."""
    vocabulary = {"[PAD]": 0, "[EOS]": 1, "[UNK]": 2}
    vocabulary |= {character: i + 3 for i, character in enumerate(CHARACTERS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def llama_config(**changes: Any) -> LlamaConfig:
    options: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return LlamaConfig(**(options | changes))


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes))


def reward_llama(seed: int = 1, **changes: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(**({"num_labels": 1} | changes)))


def prompts(number: int = 64) -> Dataset:
    """Distinct short prompts of different lengths."""
    letters = string.ascii_lowercase
    return Dataset.from_dict(
        {"prompt": [f"{letters[i % 26] * (1 + i % 5)} {letters[i // 26]}" for i in range(number)]}
    )


def config(output_dir: Any, **changes: Any) -> PPOConfig:
    """A configuration whose run takes a second or two."""
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "total_episodes": 48,
        "response_length": 8,
        "stop_token": "eos",
        "temperature": 1.0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    return PPOConfig(**(options | changes))
