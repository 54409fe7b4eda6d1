"""Trainers whose ranks were given different models; what they start from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import engine_runs
import engines
import runs
import tiny
from trl_sync import ConfigError, SharedBackbone
from trl_sync.backbone.fingerprint import fingerprint_of, state_tensors
from trl_sync.ppo.rewards import reward_modules

Spoil = Callable[[Any, Any], None]


def spoil_policy(backbone: Any, reward: Any) -> None:
    next(p for n, p in backbone.role_parameters("policy")).data.add_(1)


def spoil_value_head(backbone: Any, reward: Any) -> None:
    torch.nn.init.normal_(backbone.value_head.weight)


def spoil_base(backbone: Any, reward: Any) -> None:
    packed_weight(backbone).data.view(torch.uint8)[7] ^= 1


def spoil_quantization(backbone: Any, reward: Any) -> None:
    packed_weight(backbone).quant_state.absmax.view(-1).view(torch.uint8)[3] ^= 1


def spoil_reward_head(backbone: Any, reward: Any) -> None:
    torch.nn.init.normal_(reward.score.weight)


def packed_weight(backbone: Any) -> Any:
    packed = (p for p in backbone.parameters() if getattr(p, "quant_state", None) is not None)
    return next(packed)


SPOILED: dict[str, tuple[Spoil | None, str]] = {
    "healthy": (None, ""),
    "policy": (spoil_policy, "the policy"),
    "value": (spoil_value_head, "the value"),
    "base": (spoil_base, "the base"),
    "quantization": (spoil_quantization, "the base"),
    "reward": (spoil_reward_head, "the reward model"),
}


def start_from(engine: str, path: str) -> dict[str, Any]:
    """For each way to differ: what was logged, and the checksum this rank then starts from."""
    rank, _ = engine_runs.rank_and_ranks()
    found: dict[str, Any] = {}
    for name, (spoil, _) in SPOILED.items():
        engines.start_anew(engine)
        torch.manual_seed(0)
        backbone = SharedBackbone(engine_runs.base(Path(path), "nf4"), runs.lora())
        reward = tiny.reward_llama()
        if spoil is not None and rank == 1:
            torch.manual_seed(99)
            spoil(backbone, reward)
        with Warnings("trl_sync.ppo.initial_state") as said:
            trainer = runs.make(
                Path(path), model=backbone, reward=reward, **engines.settings(engine)
            )
        state = dict(state_tensors(trainer.backbone))
        for module in reward_modules(trainer.rewards).values():
            state |= {f"reward {key}": tensor for key, tensor in state_tensors(module)}
        found[name] = {"said": said.lines, "state": fingerprint_of(state.items())}
    engines.start_anew(engine)
    found["other_model"] = refused(engine, path, rank)
    return found


def refused(engine: str, path: str, rank: int) -> str:
    try:
        model = tiny.llama(intermediate_size=128 + 64 * rank)
        runs.make(Path(path), model=model, **engines.settings(engine))
    except ConfigError as error:
        return str(error)
    return "no error"


class Warnings(logging.Handler):
    """Collects the warnings of one logger within a block."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._logger = logging.getLogger(name)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Warnings:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *args: Any) -> None:
        self._logger.removeHandler(self)
