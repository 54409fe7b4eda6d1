"""Every fault of the matrix is named: cause, tensor, ranks and step; the healthy job is silent."""

from __future__ import annotations

from typing import Any

import pytest

import fault_matrix
from fault_matrix import COVER_STEPS, FAULT_STEP
from ranks import run_on_ranks
from trl_sync.audit.faults import FAULTS

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

BOTH, PLANTED = (0, 1), (1,)
# Who departs. Two ranks that hold different bytes are the pair, unless history tells who moved.
RANKS = {
    "bit_flipped": PLANTED,
    "rows_swapped": PLANTED,
    "base_byte_changed": PLANTED,
    "absmax_changed": PLANTED,
    "step_skipped": PLANTED,
    "extra_optimizer_step": PLANTED,
    "reduction_returned_zeros": PLANTED,
    "tensor_added": PLANTED,
}
# Tensors by name or end of name; None: the fault has no tensor.
FIRST_LORA = "base_model.model.layers.0.q_proj.lora_A.policy.weight"
TENSORS = {
    "base_byte_changed": "layers.0.q_proj.base_layer.weight",
    "absmax_changed": "layers.0.q_proj.base_layer.weight.absmax",
    "adapter_merged": "layers.0.q_proj.base_layer.weight",
    "unfrozen_after_wrapping": "embed_tokens.weight",
    "adapter_added_after_wrapping": "layers.0.q_proj.lora_A.late_adapter.weight",
    "head_seeded_per_rank": "reward.0.weight",
    "tensor_added": "late_tensor",
    "extra_optimizer_step": None,
    "dropout_in_reference": "reference.1",
}
# Steps at which the audit may name it: where it was planted, unless it cannot show there.
STEPS = {
    # Within the cover: a slice of the frozen state is looked at in every audit.
    "base_byte_changed": range(FAULT_STEP, FAULT_STEP + COVER_STEPS),
    "absmax_changed": range(FAULT_STEP, FAULT_STEP + COVER_STEPS),
    # A step without a backward has nobody to compare with before the next one.
    "extra_optimizer_step": range(FAULT_STEP + 1, FAULT_STEP + 2),
    # Three updates in a row that should have moved it, after one that made it a suspect.
    "optimizer_holds_copies": range(FAULT_STEP, FAULT_STEP + 4),
    "checkpoint_restored_on_one_rank": range(1),
}
# Planted before training these show at its beginning, or in the first update with a gradient.
AT_ONCE = {
    "unfrozen_after_wrapping": range(1, 2),
    "replaced_after_wrapping": range(1, 3),  # lora_A has no gradient while lora_B is zero
    "adapter_added_after_wrapping": range(1),
    "head_seeded_per_rank": range(1),
    "optimizer_holds_copies": range(4, 5),
    "parameter_not_in_optimizer": range(1),
    "dropout_in_reference": range(1, 2),
    "tensor_added": range(1),
    "checkpoint_restored_on_one_rank": range(1),
}
SURVIVABLE = [
    name
    for name, fault in FAULTS.items()
    if fault.on != "checkpoint" and fault.cause not in ("rank_missing", "not_distributed")
]


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str | None, bool], list[dict[str, Any]]]:
    """What each rank said, by fault and by whether it was planted in the middle of training."""
    names = [None, *SURVIVABLE]
    both: dict[tuple[str | None, bool], list[dict[str, Any]]] = {}
    answers = run_on_ranks(fault_matrix.run_both, names, {}, deadline_s=280)
    for late, position in ((False, 0), (True, 1)):
        for per_rank in zip(*(answer[position] for answer in answers), strict=True):
            both[per_rank[0]["fault"], late] = list(per_rank)
    print_table(both)
    return both


def print_table(rows: dict[tuple[str | None, bool], list[dict[str, Any]]]) -> None:
    print(f"\n{'fault':32}{'planted':8}{'step':>4}  {'named as':30}{'ranks':8}{'ms':>6}  tensor")
    for (name, late), (row, *_) in rows.items():
        planted = "late" if late else "at once" if name in AT_ONCE else ""
        print(
            f"{name or 'healthy'!s:32}{planted:8}{row.get('step', '-')!s:>4}  "
            f"{row['cause'] or '-':30}{','.join(map(str, row.get('ranks', ()))):8}"
            f"{row.get('milliseconds', 0.0):6.1f}  {row.get('tensor') or '-'}"
        )


@pytest.mark.parametrize("late", [False, True], ids=["at_once", "in_training"])
@pytest.mark.parametrize("name", SURVIVABLE)
def test_each_fault_is_named(rows: Any, name: str, late: bool) -> None:
    first, second = rows[name, late]
    assert first["message"] == second["message"], "ranks disagree on what is wrong"
    check_named(first, name, late)


def check_named(row: dict[str, Any], name: str, late: bool) -> None:
    cause = FAULTS[name].cause
    if name == "head_seeded_per_rank" and late:
        cause = "frozen_changed"  # a frozen head that is drawn anew in training
    assert row["cause"] == cause
    assert tuple(row["ranks"]) == RANKS.get(name, BOTH)
    steps = STEPS.get(name, range(FAULT_STEP, FAULT_STEP + 1))
    if not late:
        steps = AT_ONCE.get(name, steps)
    if name == "head_seeded_per_rank" and late:
        steps = range(FAULT_STEP, FAULT_STEP + COVER_STEPS)
    assert row["step"] in steps
    tensor = TENSORS.get(name, FIRST_LORA)
    if name == "optimizer_holds_copies" and not late:
        tensor = FIRST_LORA.replace("lora_A", "lora_B")  # lora_A has no gradient in update 1
    assert row["tensor"] is None if tensor is None else row["tensor"].endswith(tensor)
    if name == "bit_flipped":  # located: rank 4 times 128 inputs, the lowest bit of the first
        assert "1 of 512 elements differ, first at [0, 0]" in row["message"]
    if name in ("dropout_in_reference", "head_seeded_per_rank"):
        assert row["role"] == ("reference" if name == "dropout_in_reference" else "reward")
    for part in (f"Cause: {cause}.", f"docs/errors.md#{cause}", f"step {row['step']}"):
        assert part in row["message"]


@pytest.fixture(scope="module")
def late_rows() -> dict[str | None, list[dict[str, Any]]]:
    """The same where the verdict comes one step late, as on a GPU."""
    names = [None, *SURVIVABLE]
    answers = run_on_ranks(
        fault_matrix.run_matrix, names, True, {"blocking": False}, deadline_s=280
    )
    return {rows[0]["fault"]: list(rows) for rows in zip(*answers, strict=True)}


@pytest.mark.parametrize("name", SURVIVABLE)
def test_each_fault_is_named_when_the_verdict_is_late(late_rows: Any, name: str) -> None:
    first, second = late_rows[name]
    assert first["message"] == second["message"]
    check_named(first, name, late=True)
    at_begin = name == "checkpoint_restored_on_one_rank"
    assert first["updates"] <= first["step"] + (not at_begin)


def test_healthy_twin_is_silent_when_the_verdict_is_late(late_rows: Any) -> None:
    for row in late_rows[None]:
        assert row["cause"] is None
        assert row["audits"] == fault_matrix.STEPS + 2


@pytest.mark.parametrize("late", [False, True])
def test_healthy_twin_is_silent(rows: Any, late: bool) -> None:
    for row in rows[None, late]:
        assert row["cause"] is None
        # One at the beginning, one a step, one at the end: silence is not absence.
        assert row["audits"] == fault_matrix.STEPS + 2
