"""What is measured between two log lines: per rollout, and per optimizer update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trl_sync.ppo.loss import Statistics


class MetricBuffer:
    """Collects metrics until they are logged; every value is a mean over all processes."""

    def __init__(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        self._reduce_sum = reduce_sum
        self._rollouts: list[dict[str, float]] = []
        self._updates: list[dict[str, float]] = []
        self._sums: Statistics = {}

    def add_rollout(self, metrics: dict[str, float]) -> None:
        """The metrics of one rollout, already averaged."""
        self._rollouts.append(metrics)

    def add_micro_batch(self, statistics: Statistics) -> None:
        """This process's token sums of one micro-batch."""
        for name, value in statistics.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def end_update(self) -> None:
        """Turns the sums since the last update into means. A collective."""
        names = sorted(self._sums)
        if not names:
            return
        stacked = torch.stack([self._sums[name].double() for name in names])
        totals = dict(zip(names, self._reduce_sum(stacked).tolist(), strict=True))
        tokens = max(totals.pop("tokens"), 1.0)
        self._updates.append({name: total / tokens for name, total in totals.items()})
        self._sums = {}

    def drain(self) -> dict[str, float]:
        """The means of all that was added since the last call, under the logged names."""
        logged = _means(self._rollouts)
        update = _means(self._updates)
        for name, key in _UPDATE_NAMES.items():
            if key in update:
                logged[name] = update[key]
        if "ratio" in update:
            logged["val/ratio_var"] = max(0.0, update["squared_ratio"] - update["ratio"] ** 2)
        self._rollouts, self._updates = [], []
        return logged


_UPDATE_NAMES = {
    "policy/approxkl_avg": "approx_kl",
    "policy/clipfrac_avg": "policy_clipped",
    "policy/entropy_avg": "entropy",
    "loss/policy_avg": "policy_loss",
    "loss/value_avg": "value_loss",
    "val/clipfrac_avg": "value_clipped",
    "val/ratio": "ratio",
}


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    if not rows:
        return {}
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
