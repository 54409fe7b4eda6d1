"""The fault matrix where state is sharded: ZeRO-2, ZeRO-3, FSDP2, HSDP.

One launch for each engine carries all faults. What is expected of each stands in
`trl_sync.audit.faults.engines`: named, or planted and seen by nobody, or refused.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest

import engine_table
import engines
import fault_matrix
import ranks
from fault_matrix import COVER_STEPS, FAULT_STEP, Case
from test_fault_matrix import AT_ONCE, FIRST_LORA, STEPS, SURVIVABLE, TENSORS, print_table
from trl_sync.audit.faults.engines import Engine, Expectation, expectation

pytestmark = [pytest.mark.engines, pytest.mark.ranks]

UNDER_TEST: tuple[Engine, ...] = ("zero2", "zero3", "fsdp2", "hsdp")
IN_COVER = range(FAULT_STEP, FAULT_STEP + COVER_STEPS)
# Where the step or the tensor is another than where every rank holds everything. A shard without
# a twin is given away by the counter beside it, when the optimizer is due.
COUNTER = f"{FIRST_LORA}.step"
OTHER_STEPS = {("fsdp2", "step_skipped"): IN_COVER}
OTHER_TENSORS = {
    ("fsdp2", "step_skipped"): COUNTER,
    ("fsdp2", "checkpoint_restored_on_one_rank"): COUNTER,
}


def cases() -> list[Case]:
    """Every fault, late and where it can be at once."""
    both: list[Case] = [(name, late) for name in SURVIVABLE for late in (True, False)]
    return [
        (name, late)
        for name, late in both
        if (name != "checkpoint_restored_on_one_rank" if late else name in AT_ONCE)
    ]


def expected(engine: Engine, case: Case) -> Expectation:
    return expectation(str(case[0]), engine, late=case[1])


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What the ranks said under one engine: rows of all ranks by fault, and each one's refusals."""

    engine: Engine
    rows: dict[Case, list[dict[str, Any]]]
    refusals: list[dict[Case, str]]

    def expected(self, name: str, late: bool) -> Expectation:
        return expected(self.engine, (name, late))


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    found = launched(request.param)
    if isinstance(found, ranks.RankError):
        raise found
    return found


@functools.cache
def launched(engine: Engine) -> Outcomes | ranks.RankError:
    """All faults under `engine`, once: pytest keeps no fixture of a module for one parameter."""
    absent = [case for case in cases() if expected(engine, case).outcome == "absent"]
    planted: list[Case] = [(None, False), *(case for case in cases() if case not in absent)]
    try:
        answers = engines.run_on_engine(
            engine, fault_matrix.run_under_engine, planted, absent, deadline_s=280
        )
    except ranks.RankError as error:
        return error
    rows = zip(planted, zip(*(rows for rows, _ in answers), strict=True), strict=True)
    by_case = {case: list(per_rank) for case, per_rank in rows}
    print(f"\n{engine}:", end="")
    print_table(by_case)
    return Outcomes(engine=engine, rows=by_case, refusals=[refused for _, refused in answers])


def params(outcome: str | None = None) -> list[Any]:
    """One test for each engine, or for each engine and each fault with this outcome there."""
    found = []
    for engine in UNDER_TEST:
        marks = [pytest.mark.deepspeed] if engine.startswith("zero") else []
        marks += [pytest.mark.slow] if engine in ("zero3", "hsdp") else []
        chosen = [case for case in cases() if expected(engine, case).outcome == outcome]
        for name, late in chosen if outcome else [("", False)]:
            case = () if outcome is None else (name, late)
            label = f"{engine}-{name}{'' if late or not name else '-at_once'}".rstrip("-")
            found.append(pytest.param(engine, *case, marks=marks, id=label))
    return found


def each(names: str, outcome: str | None = None) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(names, params(outcome), indirect=["outcomes"])


@each("outcomes")
def test_healthy_twin_is_silent(outcomes: Outcomes) -> None:
    for row in outcomes.rows[None, False]:
        assert row["cause"] is None
        # One at the beginning, one a step, one at the end: silence is not absence.
        assert row["audits"] == fault_matrix.STEPS + 2
    struck = {case for case in outcomes.rows if case[0] is not None}
    named = [case for case in struck if outcomes.rows[case][0]["cause"] is not None]
    num_ranks = engines.RANKS.get(outcomes.engine, 2)
    engine_table.note(
        outcomes.engine, num_ranks, faults_named=f"{len(named)} of {len(struck)} that strike"
    )


@each("outcomes, name, late", "named")
def test_fault_is_named(outcomes: Outcomes, name: str, late: bool) -> None:
    rows, hope = outcomes.rows[name, late], outcomes.expected(name, late)
    assert [row["cause"] for row in rows] == [rows[0]["cause"]] * len(rows)
    assert rows[0]["cause"] is not None, f"expected {hope.cause}"
    assert len({row["message"] for row in rows}) == 1, "ranks disagree on what is wrong"
    check_named(outcomes.engine, rows, name, late)


def check_named(engine: Engine, rows: list[dict[str, Any]], name: str, late: bool) -> None:
    row, hope = rows[0], expected(engine, (name, late))
    cause, steps = hope.cause, steps_of(engine, name, late)
    if name == "head_seeded_per_rank" and late:
        cause, steps = "frozen_changed", IN_COVER  # a frozen head that is drawn anew in training
    assert row["cause"] == cause
    assert row["step"] in steps
    struck = 0 if name == "checkpoint_restored_on_one_rank" else 1
    # In a mesh of 2 x 2 ranks 0 and 2 hold the same shards, and 1 and 3.
    ranks_named = {
        "struck": (struck,),
        "replicas": (struck, struck + 2),
        "all": tuple(range(len(rows))),
    }
    assert tuple(row["ranks"]) == ranks_named[hope.ranks]
    tensor = OTHER_TENSORS.get((engine, name), TENSORS.get(name, FIRST_LORA))
    if name == "optimizer_holds_copies" and not late:
        tensor = FIRST_LORA.replace("lora_A", "lora_B")  # lora_A has no gradient in update 1
    assert row["tensor"] is None if tensor is None else row["tensor"].endswith(tensor)
    for part in (f"Cause: {cause}.", f"docs/errors.md#{cause}", f"step {row['step']}"):
        assert part in row["message"]


def steps_of(engine: Engine, name: str, late: bool) -> range:
    """The steps at which the audit may name the fault."""
    if expected(engine, (name, late)).cause == "never_updated":
        name = "optimizer_holds_copies"
    if expected(engine, (name, late)).cause == "not_in_optimizer":
        name = "parameter_not_in_optimizer"
    steps = STEPS.get(name, range(FAULT_STEP, FAULT_STEP + 1))
    return OTHER_STEPS.get((engine, name), steps if late else AT_ONCE.get(name, steps))


@each("outcomes, name, late", "unseen")
def test_unseen_fault_did_its_damage(outcomes: Outcomes, name: str, late: bool) -> None:
    rows, healthy = outcomes.rows[name, late], outcomes.rows[None, False]
    assert any(row["struck"] for row in rows)
    pairs = zip(rows, healthy, strict=True)
    assert any(row["parameters"] != twin["parameters"] for row, twin in pairs)
    for row in rows:
        assert row["cause"] is None
        assert row["audits"] == fault_matrix.STEPS + 2


@each("outcomes, name, late", "absent")
def test_fault_that_cannot_be_is_refused(outcomes: Outcomes, name: str, late: bool) -> None:
    reason = outcomes.expected(name, late).why
    for refused in outcomes.refusals:
        assert refused[name, late] == f"{name} cannot be planted under {outcomes.engine}: {reason}"
