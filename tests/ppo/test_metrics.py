from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trl_sync.ppo.metrics import MetricBuffer


def one_process(tensor: Tensor) -> Tensor:
    return tensor


def statistics(**sums: float) -> dict[str, Tensor]:
    names = ("approx_kl", "policy_clipped", "policy_loss", "ratio", "squared_ratio", "tokens")
    names += ("value_clipped", "value_loss", "entropy")
    return {name: torch.tensor(sums.get(name, 0.0)) for name in names}


def test_nothing_added_nothing_logged() -> None:
    buffer = MetricBuffer(one_process)
    buffer.end_update()
    assert buffer.drain() == {}


def test_rollout_metrics_are_means_over_rollouts() -> None:
    buffer = MetricBuffer(one_process)
    buffer.add_rollout({"objective/kl": 1.0, "objective/scores": -2.0})
    buffer.add_rollout({"objective/kl": 4.0, "objective/scores": 2.0})
    assert buffer.drain() == {"objective/kl": 2.5, "objective/scores": 0.0}


def test_update_metrics_are_means_over_tokens_then_over_updates() -> None:
    buffer = MetricBuffer(one_process)
    # First update: micro-batches of 3 and 1 tokens. Sums 4 tokens.
    first = {"approx_kl": 0.25, "policy_clipped": 1, "policy_loss": -6.0, "entropy": 9.0}
    first |= {"ratio": 3.5, "squared_ratio": 4.5, "value_loss": 1.0, "value_clipped": 0}
    buffer.add_micro_batch(statistics(tokens=3, **first))
    second = {"approx_kl": 0.75, "policy_clipped": 0, "policy_loss": 2.0, "entropy": 3.0}
    second |= {"ratio": 0.5, "squared_ratio": 0.25, "value_loss": 3.0, "value_clipped": 1}
    buffer.add_micro_batch(statistics(tokens=1, **second))
    buffer.end_update()
    # Second update: 2 tokens.
    third = {"approx_kl": 0.5, "policy_clipped": 1, "policy_loss": 1.0, "entropy": 4.0}
    third |= {"ratio": 3.0, "squared_ratio": 5.0, "value_loss": 4.0, "value_clipped": 2}
    buffer.add_micro_batch(statistics(tokens=2, **third))
    buffer.end_update()
    assert buffer.drain() == pytest.approx(
        {
            "policy/approxkl_avg": 0.25,  # (1 / 4 + 0.5 / 2) / 2
            "policy/clipfrac_avg": 0.375,  # (1 / 4 + 1 / 2) / 2
            "loss/policy_avg": -0.25,  # (-4 / 4 + 1 / 2) / 2
            "policy/entropy_avg": 2.5,  # (12 / 4 + 4 / 2) / 2
            "loss/value_avg": 1.5,  # (4 / 4 + 4 / 2) / 2
            "val/clipfrac_avg": 0.625,  # (1 / 4 + 2 / 2) / 2
            "val/ratio": 1.25,  # (4 / 4 + 3 / 2) / 2
            "val/ratio_var": 0.28125,  # (4.75 / 4 + 5 / 2) / 2 - 1.25^2
        },
        abs=1e-12,
    )


def test_every_value_is_summed_over_the_processes_before_it_is_divided() -> None:
    # The other process had 3 tokens and a policy loss of 10: (2 + 10) / (1 + 3) = 3.
    own = statistics(tokens=1, policy_loss=2.0)
    other = statistics(tokens=3, policy_loss=10.0)
    stacked = torch.stack([other[name].double() for name in sorted(other)])
    calls = []

    def reduce_sum(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return tensor + stacked

    buffer = MetricBuffer(reduce_sum)
    buffer.add_micro_batch(own)
    buffer.end_update()
    assert buffer.drain()["loss/policy_avg"] == 3.0
    assert len(calls) == 1


def test_updates_wait_for_one_collective_until_they_are_asked_for() -> None:
    calls = []

    def reduce_sum(tensor: Tensor) -> Tensor:
        calls.append(tensor.shape)
        return tensor

    buffer = MetricBuffer(reduce_sum)
    assert buffer.last_update() == {}
    for loss in (2.0, 4.0, 6.0):
        buffer.add_micro_batch(statistics(tokens=2, policy_loss=loss))
        buffer.end_update()
    assert calls == []
    assert buffer.last_update()["policy_loss"] == 3.0
    assert buffer.drain()["loss/policy_avg"] == 2.0  # (1 + 2 + 3) / 3
    assert [shape[0] for shape in calls] == [3]


def test_an_update_without_any_token_is_all_zeros() -> None:
    buffer = MetricBuffer(one_process)
    buffer.add_micro_batch(statistics(tokens=0))
    buffer.end_update()
    drained = buffer.drain()
    assert set(drained.values()) == {0.0}


def test_a_source_without_episodes_in_one_rollout_keeps_its_mean_of_the_others() -> None:
    metrics = MetricBuffer(one_process)
    metrics.add_rollout({"rewards/one/mean": math.nan, "val/ratio": math.nan})
    metrics.add_rollout({"rewards/one/mean": 3.0, "val/ratio": 1.0})
    found = metrics.drain()
    assert found["rewards/one/mean"] == 3.0
    assert math.isnan(found["val/ratio"]), "a number that went wrong stays visible"


def test_draining_starts_anew() -> None:
    buffer = MetricBuffer(one_process)
    buffer.add_rollout({"objective/kl": 1.0})
    buffer.add_micro_batch(statistics(tokens=1, policy_loss=5.0))
    buffer.end_update()
    buffer.drain()
    assert buffer.drain() == {}
    buffer.add_micro_batch(statistics(tokens=2, policy_loss=5.0))
    buffer.end_update()
    assert buffer.drain()["loss/policy_avg"] == 2.5


def test_micro_batches_of_an_unfinished_update_wait_for_it() -> None:
    buffer = MetricBuffer(one_process)
    buffer.add_micro_batch(statistics(tokens=1, policy_loss=1.0))
    assert buffer.drain() == {}
    buffer.add_micro_batch(statistics(tokens=1, policy_loss=3.0))
    buffer.end_update()
    assert buffer.drain()["loss/policy_avg"] == 2.0


def test_token_counts_are_not_rounded_in_fp32() -> None:
    # 2^24 + 1 is the first whole number that fp32 cannot hold; sums go over in fp64.
    buffer = MetricBuffer(one_process)
    counts = {name: torch.tensor(0) for name in statistics()}
    buffer.add_micro_batch(counts | {"tokens": torch.tensor(2**24 + 1)})
    buffer.add_micro_batch(counts | {"policy_clipped": torch.tensor(2**24 + 1)})
    buffer.end_update()
    assert buffer.drain()["policy/clipfrac_avg"] == 1.0


def test_the_means_of_the_last_update() -> None:
    buffer = MetricBuffer(one_process)
    assert buffer.last_update() == {}
    for tokens, approx_kl, mean in ((4, 1.0, 0.25), (2, 3.0, 1.5)):
        buffer.add_micro_batch(statistics(tokens=tokens, approx_kl=approx_kl))
        buffer.end_update()
        assert buffer.last_update()["approx_kl"] == mean
        assert buffer.last_update()["approx_kl"] == mean


def test_skipped_updates_are_a_mean_over_iterations() -> None:
    buffer = MetricBuffer(one_process)
    buffer.end_iteration(3)
    buffer.end_iteration(0)
    assert buffer.drain() == {"policy/skipped_updates": 1.5}
    assert buffer.drain() == {}


def test_micro_batches_that_were_left_out_are_counted_over_updates_and_processes() -> None:
    # Two processes that do the same: every sum is doubled.
    buffer = MetricBuffer(lambda tensor: 2 * tensor)
    for skipped in (1, 0):
        counts = {"skipped_micro_batches": torch.tensor(skipped)}
        buffer.add_micro_batch(statistics(tokens=10, ratio=20.0) | counts)
        buffer.add_micro_batch(
            statistics(tokens=10, ratio=20.0) | {"skipped_micro_batches": torch.tensor(1)}
        )
        buffer.end_update()
    drained = buffer.drain()
    assert drained["policy/skipped_micro_batches"] == 6  # (2 + 1) on each of two processes
    assert drained["val/ratio"] == 2.0
    assert buffer.drain() == {}
