"""What is measured between two log lines: per rollout, and per optimizer update."""

from __future__ import annotations

import math
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
        # Sums of updates that are still on the device, each in the order of `_names`.
        self._pending: list[Tensor] = []
        self._names: list[str] = []
        self._skipped_updates: list[int] = []
        self._skipped_micro_batches: float | None = None
        self._sums: Statistics = {}

    def add_rollout(self, metrics: dict[str, float]) -> None:
        """The metrics of one rollout, already averaged."""
        self._rollouts.append(metrics)

    def add_micro_batch(self, statistics: Statistics) -> None:
        """This process's token sums of one micro-batch."""
        for name, value in statistics.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def end_update(self) -> None:
        """The sums since the last update are those of one; nothing waits for the device."""
        if self._sums:
            self._names = sorted(self._sums)
            self._pending.append(torch.stack([self._sums[n].double() for n in self._names]))
            self._sums = {}

    def last_update(self) -> dict[str, float]:
        """The means over tokens of the last update that ended; empty if there was none.

        A collective, as is `drain`; the means are the same on all processes.
        """
        self._reduce_pending()
        return self._updates[-1] if self._updates else {}

    def end_iteration(self, skipped_updates: int) -> None:
        """An iteration has ended, and so many of its updates were not made."""
        self._skipped_updates.append(skipped_updates)

    def drain(self) -> dict[str, float]:
        """The means of all that was added since the last call, under the logged names.

        Micro-batches that were left out are counted, over all processes.
        """
        self._reduce_pending()
        logged = _means(self._rollouts)
        update = _means(self._updates)
        for name, key in _UPDATE_NAMES.items():
            if key in update:
                logged[name] = update[key]
        if "ratio" in update:
            logged["val/ratio_var"] = max(0.0, update["squared_ratio"] - update["ratio"] ** 2)
        if self._skipped_updates:
            mean = sum(self._skipped_updates) / len(self._skipped_updates)
            logged["policy/skipped_updates"] = mean
        if self._skipped_micro_batches is not None:
            logged["policy/skipped_micro_batches"] = self._skipped_micro_batches
        self._rollouts, self._updates, self._skipped_updates = [], [], []
        self._skipped_micro_batches = None
        return logged

    def _reduce_pending(self) -> None:
        if not self._pending:
            return
        for row in self._reduce_sum(torch.stack(self._pending)).tolist():
            totals = dict(zip(self._names, row, strict=True))
            skipped = totals.pop("skipped_micro_batches", None)
            if skipped is not None:
                self._skipped_micro_batches = (self._skipped_micro_batches or 0.0) + skipped
            tokens = max(totals.pop("tokens"), 1.0)
            self._updates.append({name: total / tokens for name, total in totals.items()})
        self._pending = []


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
    means = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name.startswith("rewards/"):
            # A source that applied to no episode of a rollout has no mean there.
            values = [value for value in values if not math.isnan(value)]
        means[name] = sum(values) / len(values) if values else math.nan
    return means
