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
            learning_rate=5e-3,
            # Many small steps: at the same cost, 64 a step leaves one review in seven broken.
            per_device_train_batch_size=32,
            max_length=MAX_LENGTH_TOKENS,
            **_arguments(into, seed),
        ),
        train_dataset=Dataset.from_list(reviews),
        processing_class=tokenizer,
    )
    trainer.train()
    _save(model, tokenizer, into)


def train_reward_model(
    pairs: list[dict[str, str | float]],
    tokenizer: PreTrainedTokenizerFast,
    reviews: list[dict[str, str]],
    language_model: Path,
    into: Path,
    seed: int,
) -> None:
    """Write a reward model that starts from the language model and ranks as the pairs do.

    Its scores have a standard deviation of one over the reviews.
    """
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification.from_pretrained(
        language_model, num_labels=1, dtype=torch.float32
    )
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            learning_rate=1e-3,
            per_device_train_batch_size=64,
            max_length=MAX_LENGTH_TOKENS,
            # Pairs fix differences only; this keeps the scores around zero.
            center_rewards_coefficient=0.01,
            **_arguments(into, seed),
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    with torch.no_grad():
        model.score.weight /= _scores(model, tokenizer, reviews).std()
    _save(model, tokenizer, into)


@torch.no_grad()
def _scores(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    reviews: list[dict[str, str]],
) -> torch.Tensor:
    """The score of each review, which ends as a generated one does."""
    model.eval()
    texts = [f"{row['prompt']}{row['completion']}{tokenizer.eos_token}" for row in reviews]
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    scores: torch.Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits[:, 0]
    return scores


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
        "warmup_steps": 40,
        "adam_beta2": 0.98,
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
