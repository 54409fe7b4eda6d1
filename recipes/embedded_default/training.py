"""The two models of the embedded default, trained with TRL's own trainers."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from .tokenizer import MAX_LENGTH_TOKENS

BATCH_SIZE = 64


def train_language_model(
    reviews: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, into: Path, seed: int
) -> None:
    """Write a small Llama that continues a prompt the way the reviews do, and then ends."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_model_config(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            learning_rate=3e-3, max_length=MAX_LENGTH_TOKENS, **_arguments(into, seed)
        ),
        train_dataset=Dataset.from_list(reviews),
        processing_class=tokenizer,
    )
    trainer.train()
    _save(trainer.model, tokenizer, into)


def train_reward_model(
    pairs: list[dict[str, str | float]],
    tokenizer: PreTrainedTokenizerFast,
    language_model: Path,
    into: Path,
    seed: int,
) -> None:
    """Write a reward model that starts from the language model and ranks as the pairs do."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification.from_pretrained(
        language_model, num_labels=1, dtype=torch.float32
    )
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            learning_rate=1e-3,
            max_length=MAX_LENGTH_TOKENS,
            # Pairs fix differences only; this keeps the scores around zero.
            center_rewards_coefficient=0.01,
            **_arguments(into, seed),
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    _save(trainer.model, tokenizer, into)


def language_model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A model of under a million parameters whose matrices all split into NF4 blocks of 64."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _arguments(into: Path, seed: int) -> dict[str, Any]:
    """What both trainers share: one pass, fp32, no files and no reports."""
    return {
        "output_dir": str(into),
        "seed": seed,
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH_SIZE,
        "warmup_steps": 10,
        "lr_scheduler_type": "cosine",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, into: Path) -> None:
    # TRL's trainers switch the cache off for training; generation would go without it.
    model.config.use_cache = True
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
