"""State that lasts over steps: the KL coefficient, and the running moments of the scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_sync.ppo import reward_scaling
from trl_sync.ppo.collectives import reduce_sum

_MAX_ERROR = 0.2


class AdaptiveKLController:
    """A KL coefficient, `value`, that is steered towards a target KL.

    `target` is in nats a response, `horizon` in episodes. After n episodes whose mean KL was k:

        value *= 1 + clip(k / target - 1, -0.2, 0.2) * n / horizon

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), arXiv
    1909.08593, 2.2.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """Adapts `value` to a mean KL of `current` nats a response over `n_steps` episodes."""
        error = max(-_MAX_ERROR, min(_MAX_ERROR, float(current) / self.target - 1))
        self.value *= 1 + error * n_steps / self.horizon


class FixedKLController:
    """A KL coefficient, `value`, that stays."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Nothing."""


@dataclass
class RunningMoments:
    """Mean and standard deviation of every score so far, over all processes.

    `std` is the unbiased one, 1 until there are two scores; `var` is divided by `count`, the number
    of scores.
    """

    accelerator: Accelerator
    mean: float = 0.0
    std: float = 1.0
    var: float = 1.0
    count: float = 1e-24

    @torch.no_grad()
    def update(self, xs: Tensor) -> tuple[float, float]:
        """Adds the scores of this batch; returns their own mean and unbiased standard deviation.

        `xs` is of any shape. Both are over all processes; a collective. Source: Chan et al.,
        "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979).
        """
        moments = reward_scaling.RunningMoments()
        moments.load_state_dict(
            {"mean": self.mean, "variance": self.var, "std": self.std, "count": self.count}
        )
        of_batch = moments.update(
            xs.detach().flatten(), lambda tensor: reduce_sum(self.accelerator, tensor)
        )
        self.mean, self.var, self.std = moments.mean, moments.variance, moments.std
        self.count = moments.count
        return of_batch

    def save_to_json(self, json_path: str) -> None:
        """Writes the moments, on the main process."""
        if self.accelerator.is_main_process:
            moments = {name: getattr(self, name) for name in ("mean", "std", "var", "count")}
            with open(json_path, "w", encoding="utf-8") as file:
                json.dump(moments, file, indent=2, sort_keys=True)

    @classmethod
    def load_from_json(cls, accelerator: Accelerator, json_path: str) -> Any:
        """The moments that `save_to_json` wrote."""
        with open(json_path, encoding="utf-8") as file:
            return cls(accelerator, **json.load(file))
