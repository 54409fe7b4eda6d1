"""The outcome of a run as a dictionary of numbers, for `summary.json`."""

from __future__ import annotations

import math
import resource
import sys
from typing import Any

from torch import Tensor, nn

from trl_sync.backbone.fingerprint import base_tensors
from trl_sync.backbone.roles import REWARD
from trl_sync.ppo.rewards import reward_modules
from trl_sync.ppo.trainer import PPOTrainer


def summarize(trainer: PPOTrainer, wall_s: float) -> dict[str, Any]:
    """Rewards, KL, speed, memory and sizes of a finished run.

    `wall_s` is the time of training. `reward_first` and `reward_last` are the means of the first
    and last tenth of the rollouts in the log, `reward_first_std` is the standard deviation of the
    scores in the first tenth; they are None if the log holds no rollout, and `kl_last` is with
    `kl_coef=0`, where no KL is measured. Memory is this process's peak; sizes are in bytes.
    """
    rows = [row for row in trainer.state.log_history if "objective/scores" in row]
    tenth = max(1, len(rows) // 10)
    episodes = trainer.episodes
    episodes_here = episodes - trainer.episodes_before
    return {
        "reward_first": _mean(rows[:tenth], "objective/scores"),
        "reward_first_std": _spread(rows[:tenth]),
        "reward_last": _mean(rows[-tenth:], "objective/scores"),
        "kl_last": _mean(rows[-tenth:], "objective/kl"),
        "episodes": episodes,
        "wall_s": wall_s,
        "episodes_per_s": episodes_here / wall_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "quantization": quantization(trainer.backbone.causal_model),
        "world_size": trainer.plan.world_size,
        "seed": trainer.args.seed,
        "trainable_parameters": sum(
            p.numel() for p in trainer.backbone.parameters() if p.requires_grad
        ),
        "base_parameters": trainer.backbone.causal_model.num_parameters()
        - sum(p.numel() for _, p in _adapter_parameters(trainer)),
        "model_state_bytes": model_state_bytes(trainer),
    }


def model_state_bytes(trainer: PPOTrainer) -> dict[str, int]:
    """Bytes that each role keeps: weights, gradients and optimizer state; quantization included.

    The reference is the base, so on its own it keeps nothing, unless it has an adapter.
    """
    sizes = {"base": sum(_bytes(t) for _, t in base_tensors(trainer.backbone.causal_model))}
    for role in trainer.backbone.roles.values():
        parameters = [parameter for _, parameter in trainer.backbone.role_parameters(role.name)]
        size = sum(_bytes(parameter) for parameter in parameters)
        if role.trainable:
            # A gradient of the same size, and whatever the optimizer keeps.
            size += sum(
                _bytes(parameter) + _optimizer_bytes(trainer, parameter) for parameter in parameters
            )
        sizes[role.name] = size
    for model in reward_modules(trainer.rewards).values():
        size = sum(_bytes(t) for _, t in base_tensors(model))
        sizes[REWARD] = sizes.get(REWARD, 0) + size
    return sizes


def quantization(model: Any) -> str:
    """`nf4`, `fp4`, `int8`, another method's name, or `none`."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return "none"
    if getattr(config, "load_in_4bit", False):
        return str(config.bnb_4bit_quant_type)
    if getattr(config, "load_in_8bit", False):
        return "int8"
    return str(config.quant_method)


def peak_rss_bytes() -> int:
    """The largest resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def _adapter_parameters(trainer: PPOTrainer) -> list[tuple[str, nn.Parameter]]:
    names = [*trainer.backbone.roles]
    return [
        item
        for role in names
        for item in trainer.backbone.role_parameters(role)
        if not item[0].startswith(("value_head", "score_head"))
    ]


def _optimizer_bytes(trainer: PPOTrainer, parameter: nn.Parameter) -> int:
    state = trainer.optimizer.state.get(parameter, {})
    return sum(_bytes(value) for value in state.values() if isinstance(value, Tensor))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mean(rows: list[dict[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None


def _spread(rows: list[dict[str, float]]) -> float | None:
    """The standard deviation of all scores behind rows that hold their own mean and deviation."""
    mean = _mean(rows, "objective/scores")
    if mean is None:
        return None
    squares = [r["objective/scores_std"] ** 2 + r["objective/scores"] ** 2 for r in rows]
    return math.sqrt(max(0.0, sum(squares) / len(rows) - mean**2))
