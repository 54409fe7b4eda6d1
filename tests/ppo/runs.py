"""Parts for the tests of the trainer: tiny runs with a reward that counts letters."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

import tiny
from trl_sync import PPOTrainer, SharedBackbone
from trl_sync.backbone.loading import load_base
from trl_sync.backbone.quantization import nf4_config

UPDATES = 4  # of one iteration: tiny.config has 2 PPO epochs of 2 mini-batches


def count_e(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that a tiny model can earn: the number of letters e."""
    return [float(text.count("e")) for text in completions]


def lora(**changes: Any) -> LoraConfig:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    return LoraConfig(**(options | {"task_type": "CAUSAL_LM"} | changes))


def base(folder: Path, precision: str) -> Any:
    """The tiny Llama in fp32, or with NF4 weights that compute in fp32."""
    if precision == "fp32":
        return tiny.llama()
    tiny.llama().save_pretrained(folder / "base")
    return load_base(str(folder / "base"), quantization_config=nf4_config())


def make(
    folder: Path,
    *,
    model: Any = None,
    reward: Any = count_e,
    prompts: Dataset | None = None,
    kind: type[PPOTrainer] = PPOTrainer,
    tokenizer: Any = None,
    eval_prompts: Any = None,
    callbacks: list[TrainerCallback] | None = None,
    peft_config: LoraConfig | None = None,
    **changes: Any,
) -> Any:
    """A trainer whose run of 12 updates in 3 iterations takes a second."""
    plain = not isinstance(model, SharedBackbone)
    return kind(
        tiny.config(folder / "out", **changes),
        tokenizer or tiny.tokenizer(),
        model if model is not None else tiny.llama(),
        reward_model=reward,
        train_dataset=prompts if prompts is not None else tiny.prompts(),
        eval_dataset=eval_prompts,
        callbacks=callbacks,
        peft_config=(peft_config or lora()) if plain else None,
    )


def train(folder: Path, **options: Any) -> Any:
    """A trainer after its run."""
    trainer = make(folder, **options)
    trainer.train()
    return trainer


def trained(trainer: Any) -> dict[str, Tensor]:
    """Copies of all parameters that train."""
    named = trainer.backbone.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


def gradients(trainer: Any) -> dict[str, Tensor]:
    """Copies of the gradients of all parameters that train."""
    named = trainer.backbone.named_parameters()
    return {name: p.grad.detach().clone() for name, p in named if p.requires_grad}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equality to the last bit."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all of them together."""
    return float(sum(t.double().pow(2).sum() for t in tensors)) ** 0.5


def randomise(backbone: SharedBackbone, std: float = 0.1) -> None:
    """Draws every parameter that trains anew: as made, adapters and value head do nothing."""
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def rows(trainer: Any, name: str = "loss") -> list[dict[str, float]]:
    """The lines of the log that hold `name`."""
    return [row for row in trainer.state.log_history if name in row]


class At(TrainerCallback):
    """Calls `action(trainer_step)` at one event."""

    def __init__(self, event: str, action: Any) -> None:
        setattr(self, event, self._call)
        self._action = action

    def _call(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._action(state, control)


class WatchedTrainer(PPOTrainer):
    """Keeps every micro-batch and what the model said about it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.micro_batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        log_ratio = outputs["policy"]["logprobs"].detach() - inputs["old_logprobs"]
        kept = copy.deepcopy(dict(inputs))
        self.micro_batches.append(
            kept
            | {
                "step": self.state.global_step,
                "ratio": log_ratio.exp()[inputs["response_mask"]],
                "values": outputs["value"]["values"].detach(),
            }
        )
        return (loss, outputs) if return_outputs else loss
