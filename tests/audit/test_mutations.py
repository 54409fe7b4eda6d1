"""Each part of the audit is needed: switched off, the test of a fault that needs it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest

import fault_matrix
import mutations
import test_fault_matrix
from ranks import RankError, run_on_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """`patch` switches the part off, `options` are the audit's; `fault` is what it then misses.

    `late` plants the fault in the middle of training.
    """

    fault: str
    late: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    patch: Callable[[], AbstractContextManager[Any]] = nullcontext


def run_mutations(
    mutations: list[str], faults: list[tuple[str, bool]]
) -> tuple[dict[str, Any], dict[tuple[str, bool], Any]]:
    """What this rank says under each mutation, and what it says of the faults without any."""
    intact = {(fault, late): row_of(fault, late, {}) for fault, late in faults}
    return {name: run_mutation(MUTATIONS[name]) for name in mutations}, intact


def run_mutation(mutation: Mutation) -> dict[str, Any]:
    with mutation.patch():
        return row_of(mutation.fault, mutation.late, mutation.options)


def row_of(fault: str, late: bool, options: dict[str, Any]) -> dict[str, Any]:
    """What the audit said of the fault on this rank."""
    if fault in mutations.FAULTS:
        return mutations.FAULTS[fault](options)
    return fault_matrix.run_one(fault, late, options)


def all_scopes_but(scope: str) -> dict[str, Any]:
    from trl_sync.audit.findings import Scope

    return {"scopes": [s.value for s in Scope if s != scope]}


def replaced(target: str, value: Callable[..., Any]) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch(target, value)


def header_without(*names: str) -> Callable[[], AbstractContextManager[Any]]:
    """The numbers that ranks compare, with the counters called `names` always 0."""

    @contextlib.contextmanager
    def patched() -> Any:
        from trl_sync.audit.snapshot import COUNTERS, header

        def blind(*args: Any, **kwargs: Any) -> list[int]:
            values = header(*args, **kwargs)
            for name in names:
                values[COUNTERS.index(name)] = 0
            return values

        with mock.patch("trl_sync.audit.judge.header", blind):
            yield

    return patched


def all_equal(comparison: Any, values: Any) -> list[bool]:
    return [True] * len(values)


def nothing(*args: Any, **kwargs: Any) -> list[Any]:
    return []


def none(*args: Any, **kwargs: Any) -> None:
    return None


def nobody_stuck(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
    return [], []


def no_history(*args: Any, **kwargs: Any) -> Any:
    from trl_sync.audit.snapshotter import History

    return History()


def no_norms(*args: Any, **kwargs: Any) -> dict[str, float]:
    return {}


@contextlib.contextmanager
def first_slice_only() -> Any:
    """Every audit of an update looks at the same slice of the frozen state."""
    from trl_sync.audit.baseline import FrozenBaseline

    start_next = FrozenBaseline.start_next

    def start_first(baseline: Any, step: int) -> Any:
        for ring in baseline._rings.values():
            ring.at = 0
        return start_next(baseline, step)

    with mock.patch.object(FrozenBaseline, "start_next", start_first):
        yield


def no_self_test(*_: Any) -> float:
    return 0.0


AGREE = "trl_sync.audit.compare.Comparison.agree"
MUTATIONS: dict[str, Mutation] = {
    "scope trainable off": Mutation(fault="bit_flipped", options=all_scopes_but("trainable")),
    "scope gradients off": Mutation(fault="gradients_clipped", options=all_scopes_but("gradients")),
    "scope frozen off": Mutation(fault="base_byte_changed", options=all_scopes_but("frozen")),
    "scope quantization off": Mutation(
        fault="absmax_changed", options=all_scopes_but("quantization")
    ),
    "scope buffers off": Mutation(fault="buffers_differ", options=all_scopes_but("buffers")),
    "scope optimizer off": Mutation(
        fault="moment_changed_at_rate_0", options=all_scopes_but("optimizer")
    ),
    "scope roles off": Mutation(fault="dropout_in_reference", options=all_scopes_but("roles")),
    "scope roles off, optimizer": Mutation(
        fault="parameter_not_in_optimizer", options=all_scopes_but("roles")
    ),
    "comparison off": Mutation(
        fault="bit_flipped", options={"self_test": False}, patch=replaced(AGREE, all_equal)
    ),
    "comparison off, self-test on": Mutation(
        fault="broken_comparison", patch=replaced("trl_sync.audit.auditor.self_test", no_self_test)
    ),
    "self-test off": Mutation(
        fault="broken_checksum", patch=replaced("trl_sync.audit.auditor.self_test", no_self_test)
    ),
    "header without schema and count": Mutation(
        fault="tensor_added", patch=header_without("schema", "num_tensors")
    ),
    "header without schema": Mutation(
        fault="same_bytes_in_another_shape", patch=header_without("schema")
    ),
    "header without updates": Mutation(
        fault="extra_optimizer_step", patch=header_without("updates")
    ),
    "header without step": Mutation(fault="steps_differ", patch=header_without("step")),
    "header without kind": Mutation(fault="kinds_differ", patch=header_without("kind")),
    "header without audit": Mutation(fault="audits_differ", patch=header_without("audit")),
    "header without algorithm": Mutation(
        fault="another_version", patch=header_without("algorithm")
    ),
    "baseline off": Mutation(
        fault="adapter_merged",
        patch=replaced("trl_sync.audit.baseline.FrozenBaseline.compare", nothing),
    ),
    "liveness off": Mutation(
        fault="optimizer_holds_copies",
        patch=replaced("trl_sync.audit.liveness.Liveness.observe", nobody_stuck),
    ),
    "diagnosis off": Mutation(
        fault="bit_flipped", patch=replaced("trl_sync.audit.judge.diagnose", nothing)
    ),
    "localisation off": Mutation(
        fault="bit_flipped",
        options={"self_test": False},
        patch=replaced("trl_sync.audit.compare.Comparison.localize", none),
    ),
    "history off": Mutation(
        fault="bit_flipped",
        patch=replaced("trl_sync.audit.snapshotter.Snapshotter._history", no_history),
    ),
    "history off, an update is lost": Mutation(
        fault="step_skipped",
        patch=replaced("trl_sync.audit.snapshotter.Snapshotter._history", no_history),
    ),
    "gradient norms off": Mutation(
        fault="reduction_returned_zeros",
        patch=replaced("trl_sync.audit.snapshotter.Snapshotter.gradient_norms", no_norms),
    ),
    "slices do not rotate": Mutation(fault="absmax_changed", patch=first_slice_only),
    "manifest check off": Mutation(
        fault="restored_with_another_weight",
        patch=replaced("trl_sync.audit.checkpoints.check_tensors", nothing),
    ),
    # The last one: the ranks part, and their group is of no use afterwards.
    "header without local": Mutation(
        fault="reward_in_training_mode_on_rank_1", patch=header_without("local")
    ),
}


# The named tests.

# Cause, scope, tensor, ranks, step and a part of the message.
EXPECTED: dict[str, tuple[Any, ...]] = {
    "buffers_differ": ("buffers_differ", "buffers", "reward.scale", (0, 1), 0, "0x40000000"),
    # Seen in the second audit of an update, the fourth.
    "moment_changed_at_rate_0": (
        "optimizer_diverged", "optimizer", "weight.exp_avg", (0, 1), 4, "first at [2, 1]",
    ),
    "same_bytes_in_another_shape": (
        "structure_mismatch", "frozen", "reward.weight", (0, 1), 0, "(4, 2)",
    ),
    "steps_differ": ("step_skew", None, None, (0, 1), 10, "step 11, 0 optimizer step(s)"),
    "kinds_differ": ("step_skew", None, None, (0,), 1, "(update audit 2) on rank 1"),
    "audits_differ": ("step_skew", None, None, (0, 1), 1, "(full audit 3) on rank 1"),
    "another_version": ("structure_mismatch", None, None, (0, 1), 0, "xxh3-64 on rank 1"),
    "reward_in_training_mode_on_rank_1": (
        "role_violation", "roles", "reward.1", (1,), 1, "role reward ran in training mode",
    ),
    "restored_with_another_weight": (
        "manifest_mismatch", None, "weight", (0, 1), 1, "weight",
    ),
}  # fmt: skip
# What the self-test says of an audit that sees nothing.
BLIND = {
    "broken_checksum": "one flipped bit was not seen",
    "broken_comparison": "one flipped bit was not seen",
}


def check_lone_fault(rows: list[dict[str, Any]], fault: str) -> None:
    """The test of one fault of `mutations`."""
    for row in rows:
        if fault in BLIND:
            assert row["error"] == "AuditError"
            assert BLIND[fault] in row["message"]
            continue
        cause, scope, tensor, ranks, step, text = EXPECTED[fault]
        assert row["cause"] == cause
        assert (row["scope"], row["tensor"], row["ranks"]) == (scope, tensor, ranks)
        assert text in row["message"]
        assert row["step"] in (step, step + 1) if fault == "steps_differ" else row["step"] == step


def check_matrix_fault(rows: list[dict[str, Any]], fault: str, late: bool) -> None:
    """The test of one fault of the matrix."""
    first, second = rows
    assert first.get("message") == second.get("message")
    test_fault_matrix.check_named(first, fault, late)


def check(rows: list[dict[str, Any]], fault: str, late: bool) -> str:
    """Runs the named test of the fault on what the ranks said; the name."""
    if fault in mutations.FAULTS:
        check_lone_fault(rows, fault)
        return f"test_lone_fault_is_named[{fault}]"
    check_matrix_fault(rows, fault, late)
    return f"test_each_fault_is_named[{fault}-{'in_training' if late else 'at_once'}]"


@pytest.fixture(scope="module")
def outcomes() -> tuple[dict[str, list[Any]], dict[tuple[str, bool], list[Any]]]:
    """What each rank said under each mutation, and of each fault without one."""
    faults = [(m.fault, m.late) for m in MUTATIONS.values()]
    faults += [(fault, True) for fault in mutations.FAULTS]
    answers = run_on_ranks(
        run_mutations, list(MUTATIONS), list(dict.fromkeys(faults)), deadline_s=280
    )
    mutated = {name: [answer[0][name] for answer in answers] for name in MUTATIONS}
    intact = {key: [answer[1][key] for answer in answers] for key in answers[0][1]}
    return mutated, intact


@pytest.mark.parametrize("fault", mutations.FAULTS)
def test_lone_fault_is_named(outcomes: Any, fault: str) -> None:
    check_lone_fault(outcomes[1][fault, True], fault)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_makes_a_named_test_fail(outcomes: Any, name: str) -> None:
    mutated, intact = outcomes
    mutation = MUTATIONS[name]
    test = check(intact[mutation.fault, mutation.late], mutation.fault, mutation.late)
    with pytest.raises(AssertionError):
        check(mutated[name], mutation.fault, mutation.late)
    print(f"\n{name:34} {mutation.fault:34} {test}")


def outcome_of_delay(watched: bool) -> str:
    """How the ranks ended of which one was late."""
    try:
        return str(run_on_ranks(mutations.delayed_rank, watched))
    except RankError as error:
        return str(error)


def check_delayed_rank(watched: bool) -> None:
    """The test of a rank that lags: the processes end with the exit code of the watch."""
    assert "exit code 75" in outcome_of_delay(watched)


def test_delayed_rank_is_noticed() -> None:
    check_delayed_rank(watched=True)


def test_watch_switched_off_makes_a_named_test_fail() -> None:
    with pytest.raises(AssertionError, match="ended well"):
        check_delayed_rank(watched=False)
    print(f"\n{'progress watch off':34} {'delayed_rank':34} test_delayed_rank_is_noticed")
