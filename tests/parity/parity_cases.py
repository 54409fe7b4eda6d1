"""The same models, prompts and recorded responses for both trainers. Imports neither of them."""

from __future__ import annotations

import dataclasses
import string
import zlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

NUM_EPISODES = 16
RESPONSE_LENGTH = 8
PAD, EOS = 0, 1
VOCABULARY = 32
NUM_PPO_EPOCHS = 2
TEMPERATURE = 0.7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One combination of settings. `ragged` responses stop early, the others fill the limit."""

    peft: bool
    kl_estimator: str
    whiten_rewards: bool
    missing_eos_penalty: float | None
    ragged: bool = False
    lam: float = 0.95

    @property
    def name(self) -> str:
        words = ["peft" if self.peft else "full", self.kl_estimator]
        words += ["whitened"] * self.whiten_rewards
        words += ["penalty"] * (self.missing_eos_penalty is not None)
        words += ["ragged", f"lam{self.lam}"] * self.ragged
        return "-".join(words)

    def settings(self, output_dir: Path) -> dict[str, Any]:
        """What both configurations are made of: one iteration of two updates, plain fp32."""
        return {
            "output_dir": str(output_dir),
            "per_device_train_batch_size": NUM_EPISODES,
            "gradient_accumulation_steps": 1,
            "total_episodes": NUM_EPISODES,
            "num_ppo_epochs": NUM_PPO_EPOCHS,
            "num_mini_batches": 1,
            "response_length": RESPONSE_LENGTH,
            "stop_token": "eos",
            "temperature": TEMPERATURE,
            "kl_estimator": self.kl_estimator,
            "kl_coef": 0.2,
            "whiten_rewards": self.whiten_rewards,
            "missing_eos_penalty": self.missing_eos_penalty,
            "lam": self.lam,
            "cliprange": 0.01,
            "cliprange_value": 0.01,
            "vf_coef": 0.5,
            "num_sample_generations": 0,
            "logging_steps": 1,
            "max_grad_norm": 0.0,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "report_to": "none",
        }


def all_cases() -> list[Case]:
    settings = [
        {"peft": peft, "kl_estimator": kl, "whiten_rewards": whiten, "missing_eos_penalty": penalty}
        for peft in (False, True)
        for kl in ("k1", "k3")
        for whiten in (False, True)
        for penalty in (None, 1.0)
    ]
    ragged = [
        options | {"ragged": True, "lam": lam}
        for options in settings
        if not options["whiten_rewards"]
        for lam in (1.0, 0.95)
    ]
    return [Case(**options) for options in settings + ragged]


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        num_labels=1,
    )


def causal(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return _spread(LlamaForCausalLM(config()))


def classifier(seed: int) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return _spread(LlamaForSequenceClassification(config()))


def _spread(model: Any) -> Any:
    """Larger weights than at initialisation, so that no quantity is small by chance."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def draw_adapters(model: nn.Module) -> None:
    """The same numbers for a parameter of the same name, and B not zero as at initialisation."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {"[PAD]": PAD, "[EOS]": EOS, "[UNK]": 2}
    vocabulary |= {c: i + 3 for i, c in enumerate(string.ascii_lowercase)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        padding_side="left",
    )


def prompts() -> list[list[int]]:
    """Distinct prompts of two to six tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 7, (NUM_EPISODES,), generator=generator).tolist()
    return [
        [3 + row, *torch.randint(3, 29, (length - 1,), generator=generator).tolist()]
        for row, length in enumerate(lengths)
    ]


def dataset() -> Dataset:
    return Dataset.from_dict({"input_ids": prompts()})


def response_lengths(ragged: bool) -> list[int]:
    return [2 + row % 7 for row in range(NUM_EPISODES)] if ragged else [8] * NUM_EPISODES


def responses(ragged: bool) -> Tensor:
    """[B, R]: of each two rows of full length one ends with eos; shorter ones always do."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 29, (NUM_EPISODES, RESPONSE_LENGTH), generator=generator)
    for row, length in enumerate(response_lengths(ragged)):
        tokens[row, length:] = PAD
        if length < RESPONSE_LENGTH or row % 2:
            tokens[row, length - 1] = EOS
    return tokens


def rows_of(queries: Tensor) -> list[int]:
    """Which prompt each left-padded row holds."""
    known = [tuple(prompt) for prompt in prompts()]
    return [known.index(tuple(i for i in row if i != PAD)) for row in queries.tolist()]


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that keeps the gradients of every step."""

    def __init__(self, named: dict[str, nn.Parameter], **options: Any) -> None:
        super().__init__(list(named.values()), lr=0.5, **options)
        self.named = named
        self.gradients: list[dict[str, Tensor]] = []

    def step(self, closure: Any = None) -> Any:
        self.gradients.append({n: p.grad.clone() for n, p in self.named.items()})
        return super().step(closure)


def optimizer_of(model: nn.Module) -> RecordingSGD:
    return RecordingSGD({n: p for n, p in model.named_parameters() if p.requires_grad})
