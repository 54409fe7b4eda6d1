"""Repair by a majority: the run that went on equals the clean one, or it ends on every rank."""

from __future__ import annotations

from typing import Any

import pytest

import repair_runs
from ranks import run_on_ranks
from repair_runs import FAULT_STEP, STEPS

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

# The cause, and the step at which it is found.
AFTER_THE_REDUCTION = {
    "step_skipped": ("stale_replica", FAULT_STEP),
    "first_step_skipped": ("stale_replica", 1),
    "other_learning_rate": ("optimizer_diverged", FAULT_STEP),
    "optimizer_moment_changed": ("optimizer_diverged", FAULT_STEP),
    "gradients_clipped": ("gradient_scaled_differently", FAULT_STEP),
    "reduction_returned_zeros": ("gradient_not_reduced", FAULT_STEP),
    "base_byte_changed_in_step": ("frozen_changed", FAULT_STEP),
    "absmax_changed_in_step": ("quantization_changed", FAULT_STEP),
    "head_changed_at_start": ("init_mismatch", 0),
}
IN_A_FORWARD = {
    "bit_flipped": ("edited_outside_step", FAULT_STEP),
    "rows_swapped": ("edited_outside_step", FAULT_STEP),
    "base_byte_changed": ("frozen_changed", FAULT_STEP),
    "absmax_changed": ("quantization_changed", FAULT_STEP),
}
NOT_REPAIRED = {
    "three_learning_rates": "optimizer_diverged",
    "tensor_added": "structure_mismatch",
    "extra_optimizer_step": "step_skew",
    "adapter_merged": "frozen_changed",
    "forward_unwrapped": "gradient_not_reduced",
}
OTHERS = ("other_learning_rate_on_two", "repair_without_optimizer")
RANKS = (0, 1, 2)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, int], list[dict[str, Any]]]:
    """What each rank saw of each fault."""
    cases = [("healthy", 0)]
    cases += [(name, rank) for name in AFTER_THE_REDUCTION for rank in RANKS]
    cases += [(name, 1) for name in IN_A_FORWARD]
    cases += [(name, 1) for name in (*NOT_REPAIRED, *OTHERS)]
    answers = run_on_ranks(repair_runs.run_all, cases, num_ranks=3, deadline_s=280)
    return {case: [answer[case] for answer in answers] for case in cases}


@pytest.fixture(scope="module")
def clean(rows: Any) -> dict[str, str]:
    """The state that every rank of the healthy job has."""
    states = [row["state"] for row in rows["healthy", 0]]
    assert states == [states[0]] * 3
    assert [row["found"] for row in rows["healthy", 0]] == [[], [], []]
    return states[0]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", AFTER_THE_REDUCTION)
def test_a_repaired_run_equals_the_clean_one(rows: Any, clean: Any, name: str, rank: int) -> None:
    cause, step = AFTER_THE_REDUCTION[name]
    for row in rows[name, rank]:
        assert row["error"] is None
        assert row["updates"] == STEPS
        # Found once, and named alike on every rank.
        assert [item[:3] for item in row["found"]] == [(cause, (rank,), step)]
        assert row["desyncs"] == 1
        assert row["state"] == clean


@pytest.mark.parametrize("name", IN_A_FORWARD)
def test_after_a_forward_ranks_are_equal_again(rows: Any, clean: Any, name: str) -> None:
    cause, step = IN_A_FORWARD[name]
    states = [row["state"] for row in rows[name, 1]]
    assert states == [states[0]] * 3
    assert states[0]["frozen"] == clean["frozen"]
    # One rank's share of one gradient was computed with the wrong bytes, and was averaged in.
    assert states[0]["trainable"] != clean["trainable"]
    for row in rows[name, 1]:
        assert [item[:3] for item in row["found"]] == [(cause, (1,), step)]
        assert (row["error"], row["desyncs"], row["updates"]) == (None, 1, STEPS)


@pytest.mark.parametrize("name", NOT_REPAIRED)
def test_what_no_majority_can_decide_ends_every_rank(rows: Any, name: str) -> None:
    errors = [row["error"] for row in rows[name, 1]]
    assert errors == [errors[0]] * 3
    assert f"Cause: {NOT_REPAIRED[name]}." in errors[0]
    assert "Not repaired: that takes at least 3 ranks of which most agree" in errors[0]
    for row in rows[name, 1]:
        assert row["updates"] < STEPS


def test_the_majority_wins_whether_it_is_right_or_not(rows: Any, clean: Any) -> None:
    states = [row["state"] for row in rows["other_learning_rate_on_two", 1]]
    assert states == [states[0]] * 3
    assert states[0]["trainable"] != clean["trainable"]
    found = [row["found"] for row in rows["other_learning_rate_on_two", 1]]
    assert [item[:3] for item in found[0]] == [("optimizer_diverged", (1,), FAULT_STEP)]


def test_a_repair_that_leaves_a_difference_ends_every_rank(rows: Any) -> None:
    for row in rows["repair_without_optimizer", 1]:
        assert "Cause: optimizer_diverged." in row["error"]
        assert "The repair did not make the ranks equal." in row["error"]
        assert row["updates"] == FAULT_STEP


def test_two_ranks_have_no_majority() -> None:
    answers = run_on_ranks(repair_runs.run, "step_skipped", 1, num_ranks=2)
    errors = [answer["error"] for answer in answers]
    assert errors[0] == errors[1]
    assert "Cause: stale_replica." in errors[0]
    assert "Not repaired: that takes at least 3 ranks" in errors[0]
