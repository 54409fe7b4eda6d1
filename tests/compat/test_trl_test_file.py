"""The cases of TRL's own test file for PPO, on local tiny models of five architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

import tiny
from trl_sync import PPOConfig, PPOTrainer
from trl_sync.ppo.compat import batch_generation

VOCABULARY = 64
ARCHITECTURES = ("llama", "qwen2", "gemma2", "gpt2", "mistral")


def _config(architecture: str, **changes: Any) -> PreTrainedConfig:
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if architecture == "gpt2":
        # With its dropout of 0.1, as GPT-2 comes.
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
        return GPT2Config(**tokens, **sizes, **changes)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    kinds = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "gemma2": Gemma2Config,
        "mistral": MistralConfig,
    }
    window = {"sliding_window": 16} if architecture in ("gemma2", "mistral") else {}
    head = {"head_dim": 8} if architecture == "gemma2" else {}
    return kinds[architecture](**tokens, **sizes, **window, **head, **changes)


def _policy(architecture: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(_config(architecture))


def _classifier(architecture: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config = _config(architecture, num_labels=1)
    return AutoModelForSequenceClassification.from_config(config)


def _tokenized_prompts(number: int) -> Dataset:
    """Prompts as `input_ids` and `attention_mask`, ending with the end-of-sequence token."""
    tokenizer = tiny.tokenizer()
    rows = [tokenizer(text)["input_ids"] + [1] for text in tiny.prompts(number)["prompt"]]
    columns = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    return Dataset.from_dict(columns)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _moved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    after = _weights(model)
    assert after.keys() == before.keys()
    return [name for name, weight in after.items() if not torch.equal(weight, before[name])]


def _train(folder: Path, models: dict[str, Any], **options: Any) -> PPOTrainer:
    """Two iterations with TRL's default batch, on prompts as TRL's tests make them."""
    args = PPOConfig(
        str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=2,
        num_ppo_epochs=2,
        total_episodes=8,
        response_length=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tiny.tokenizer(),
        train_dataset=_tokenized_prompts(17),
        eval_dataset=_tokenized_prompts(2),
        **models,
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [3, 5], ids=["mini_batches", "one_batch"])
def test_batch_generation(architecture: str, batch_size: int) -> None:
    tokenizer, model = tiny.tokenizer(), _policy(architecture).eval()
    texts = list(tiny.prompts(5)["prompt"])
    queries = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    sampling = GenerationConfig(
        max_new_tokens=12, temperature=0.5, do_sample=True, top_k=0, pad_token_id=0
    )
    torch.manual_seed(0)
    sequences, scores = batch_generation(model, queries, batch_size, 0, sampling)
    length = queries.shape[1] + 12
    assert sequences.shape == (5, length)
    assert scores.shape == (5, 12, VOCABULARY)
    assert torch.equal(sequences[:, : queries.shape[1]], queries)
    # Sampled tokens are those that their scores allow.
    responses = sequences[:, queries.shape[1] :].unsqueeze(-1)
    assert scores.gather(-1, responses).isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_four_models_train(architecture: str, tmp_path: Path) -> None:
    models = {
        "model": _policy(architecture),
        "ref_model": _policy(architecture, seed=1),
        "reward_model": _classifier(architecture, seed=2),
        "value_model": _classifier(architecture, seed=3),
    }
    before = {name: _weights(model) for name, model in models.items()}
    trainer = _train(tmp_path, models)
    moved = _moved(trainer.model.policy, before["model"])
    assert set(moved) == before["model"].keys()
    moved = _moved(trainer.model.value_model, before["value_model"])
    assert set(moved) == before["value_model"].keys()
    assert not _moved(trainer.ref_model, before["ref_model"])
    assert not _moved(trainer.reward_model, before["reward_model"])
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    assert unwrapped.policy is trainer.policy_model
    assert unwrapped.value_model is trainer.value_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_policy_trains_with_lora(architecture: str, tmp_path: Path) -> None:
    models = {
        "model": _policy(architecture),
        "reward_model": _classifier(architecture, seed=2),
        "value_model": _classifier(architecture, seed=3),
    }
    before = {name: _weights(model) for name, model in models.items()}
    lora = LoraConfig(
        r=32,
        lora_alpha=16,
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
        fan_in_fan_out=architecture == "gpt2",  # its layers hold transposed weights
    )
    trainer = _train(tmp_path, models, ref_model=None, peft_config=lora)
    assert _moved(trainer.model.value_model, before["value_model"])
    policy = dict(trainer.model.policy.named_parameters())
    updates = {name: weight for name, weight in policy.items() if "lora_B" in name}
    assert updates
    assert all(weight.any() for weight in updates.values())
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for name, weight in policy.items()
        if "lora_" not in name
    }
    assert base.keys() == before["model"].keys()
    assert all(torch.equal(weight, before["model"][name]) for name, weight in base.items())


def test_ratio_variance_is_zero_where_nothing_moves(tmp_path: Path) -> None:
    """Micro-batches that were never filled in made TRL's `val/ratio_var` too large."""
    args = PPOConfig(
        str(tmp_path),
        learning_rate=0.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        num_mini_batches=2,
        num_ppo_epochs=1,
        total_episodes=12,
        response_length=4,
        num_sample_generations=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tiny.tokenizer(),
        model=_policy("qwen2"),
        ref_model=_policy("qwen2"),
        reward_model=_classifier("qwen2", seed=2),
        value_model=_classifier("qwen2", seed=3),
        train_dataset=_tokenized_prompts(12),
        eval_dataset=_tokenized_prompts(12),
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "val/ratio_var" in line]
    assert len(logged) == 2
    for line in logged:
        assert line["val/ratio_var"] == pytest.approx(0.0, abs=1e-12)
        assert line["val/ratio"] == pytest.approx(1.0, abs=1e-6)
