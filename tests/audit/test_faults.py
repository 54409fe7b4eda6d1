"""Every fault does what it says, where and when it says, seen by reading the raw bytes.

One launch of two ranks carries all faults on one drill job after another.
"""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from fault_observer import Observer, differing, first_difference, moments, rows_of

import ranks
from trl_sync.audit import faults

STEPS = 4
STEP = 3
FACTOR = 0.7
PREFIX = "base_model.model.layers.0.q_proj"
LORA_A = f"{PREFIX}.lora_A.policy.weight"
BASE = f"{PREFIX}.base_layer.weight"
EMBEDDING = "base_model.model.embed_tokens.weight"
PLACES = ("before_backward", "in_step", "before_audit")


def leftovers(job: Any) -> int:
    """Hooks that a fault left behind."""
    from torch.optim import optimizer as torch_optimizer

    inner = job.optimizer.optimizer
    lists = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
        inner._optimizer_step_pre_hooks,
        inner._optimizer_step_post_hooks,
        job.reference._forward_pre_hooks,
        job.reward_head._forward_pre_hooks,
    ]
    for module in job.unwrapped_model.modules():
        lists += [module._forward_pre_hooks, module._forward_hooks]
    return sum(map(len, lists))


def drilled(
    fault: str | None, max_grad_norm: float = 1.0, torch_clips: bool = False, **options: Any
) -> dict[str, Any]:
    """What this rank saw in a job with the fault; it clips with accelerate or with torch."""
    from trl_sync.audit.drill import JOB_OPTIONS, DrillJob, plant_on

    job = DrillJob(**JOB_OPTIONS.get(fault or "", {}), max_grad_norm=max_grad_norm)
    if torch_clips:
        job.accelerator.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    trainable = [n for n, p in job.unwrapped_model.named_parameters() if p.requires_grad]
    block = nullcontext() if fault is None else plant_on(job, fault, step=STEP, **options)
    observer = Observer(job.unwrapped_model, **job.modules)
    handles = (
        job.optimizer.optimizer.register_step_pre_hook(lambda o, *_: observer.before(o)),
        job.optimizer.optimizer.register_step_post_hook(lambda o, *_: observer.after(o)),
    )
    with block as planted:
        job.train(STEPS)
    for handle in handles:
        handle.remove()
    return {
        "rows": observer.rows,
        "tensor": planted and planted.tensor,
        "struck": planted and planted.struck,
        "trainable": trainable,
        "leftovers": leftovers(job),
    }


def acted(fault: str) -> list[dict[str, Any]]:
    """When this rank was killed or delayed, with the calls that do it replaced by a record."""
    from trl_sync.audit.drill import DrillJob, plant_on
    from trl_sync.audit.faults import processes

    job = DrillJob()
    observer, records = Observer(job.unwrapped_model), []
    inner = job.optimizer.optimizer
    inner.register_step_pre_hook(lambda o, *_: observer.before(o))
    inner.register_step_post_hook(lambda o, *_: observer.after(o))

    def record(*args: Any) -> None:
        records.append(
            {
                "call": [int(a) if isinstance(a, int) else a for a in args],
                "pid": os.getpid(),
                "seen_before": len(observer.rows),
                "seen_after": sum("after" in row for row in observer.rows),
                "state": observer.state(inner)[LORA_A],
                "gradients": any(p.grad is not None for p in job.model.parameters()),
            }
        )

    options = {"delay_s": 0.25} if fault.startswith("delayed") else {}
    # Recorded in place of done: a real kill and a real wait are tests/test_cli.py's.
    with (
        mock.patch.object(processes.time, "sleep", record),
        mock.patch.object(processes.os, "kill", record),
        plant_on(job, fault, step=STEP, **options),
    ):
        job.train(STEPS)
    rows = [(row["before"][LORA_A], row["after"][LORA_A]) for row in observer.rows]
    return [record | {"rows": rows} for record in records]


def alone() -> dict[str, Any]:
    """What accelerate says inside and after `launched_alone`."""
    from accelerate import Accelerator, PartialState

    with faults.launched_alone():
        inside = Accelerator(cpu=True)
        found = {"inside": inside.num_processes, "variable": os.environ["WORLD_SIZE"]}
    after = PartialState()
    return found | {"after": after.num_processes, "rank": after.process_index}


def all_drills() -> dict[str, Any]:
    """Every fault that strikes a running job, on one fresh job after another."""
    found: dict[str, Any] = {"healthy": drilled(None), "alone": alone()}
    for name, fault in faults.FAULTS.items():
        if fault.on == "checkpoint" or name == "launched_alone":
            continue
        if fault.cause == "rank_missing":
            found[name] = acted(name)
        else:
            found[name] = drilled(name)
    found["unfrozen late"] = drilled("unfrozen_after_wrapping", late=True)
    # Small enough to clip: a gradient of one rank alone would spread over the norm to all others.
    for name, by_torch in (("clipped twice", False), ("clipped by torch", True)):
        found[name] = drilled("gradients_clipped", max_grad_norm=0.01, torch_clips=by_torch)
    found["hidden step"] = drilled("extra_optimizer_step", with_hooks=False)
    found["healthy again"] = drilled(None)
    return found


@pytest.fixture(scope="module")
def drills() -> list[dict[str, Any]]:
    return ranks.run_on_ranks(all_drills, deadline_s=200)


@pytest.mark.ranks
def test_ranks_stay_equal_without_a_fault(drills: list[dict[str, Any]]) -> None:
    rows = rows_of(drills, "healthy")
    assert first_difference(rows) is None
    assert [len(rank) for rank in rows] == [STEPS, STEPS]
    trainable = drills[0]["healthy"]["trainable"]
    for row in rows[0]:
        changed = {n for n in row["after"] if row["before"].get(n) != row["after"][n]}
        assert changed == set(trainable) | moments(trainable)
        assert not row["dropped"]


@pytest.mark.ranks
def test_nothing_stays_behind(drills: list[dict[str, Any]]) -> None:
    for rank in drills:
        assert rank["healthy again"]["rows"] == rank["healthy"]["rows"]
        left = {name: r["leftovers"] for name, r in rank.items() if "leftovers" in r}
        # Hooks of the observer on the dropout layer and of peft are none of these.
        assert {name: n for name, n in left.items() if n} == {}


EXPECTED: dict[str, tuple[int, str, set[str]]] = {
    "bit_flipped": (STEP, "before", {LORA_A}),
    "rows_swapped": (STEP, "before", {LORA_A}),
    "base_byte_changed": (STEP, "before", {BASE}),
    "absmax_changed": (STEP, "before", {f"{BASE}.absmax"}),
    "optimizer_moment_changed": (STEP, "before", {f"{LORA_A}.exp_avg"}),
    "reduction_returned_zeros": (STEP, "gradients", {LORA_A}),
    "unfrozen_after_wrapping": (1, "gradients", {EMBEDDING}),
    "unfrozen late": (STEP, "gradients", {EMBEDDING}),
    # The gradient of lora_A is zero on both ranks while lora_B is.
    "replaced_after_wrapping": (2, "gradients", {LORA_A}),
    "head_seeded_per_rank": (1, "before", {"reward.0.weight", "reward.0.bias"}),
    "tensor_added": (1, "before", {"late_tensor"}),
}


@pytest.mark.ranks
@pytest.mark.parametrize("fault", EXPECTED)
def test_one_tensor_differs_from_that_step_on(drills: list[dict[str, Any]], fault: str) -> None:
    rows = rows_of(drills, fault)
    assert first_difference(rows) == EXPECTED[fault]
    named = {rank[fault]["tensor"] for rank in drills if rank[fault]["tensor"]}
    assert len(named) == 1
    # The reward head alone has two tensors, and is named from inside.
    named_in_full = {
        name if fault != "head_seeded_per_rank" else f"reward.{name}" for name in named
    }
    assert {n.removesuffix(".exp_avg") for n in EXPECTED[fault][2]} >= named_in_full


@pytest.mark.ranks
@pytest.mark.parametrize(
    "fault, phase",
    [
        ("step_skipped", "after"),
        ("other_learning_rate", "after"),
        ("hidden step", "after"),
        ("gradients_clipped", "gradients"),
        ("clipped twice", "gradients"),
        ("clipped by torch", "gradients"),
        ("forward_unwrapped", "gradients"),
        ("no_sync_on_last_micro_batch", "gradients"),
    ],
)
def test_all_trainable_tensors_differ_from_that_step_on(
    drills: list[dict[str, Any]], fault: str, phase: str
) -> None:
    trainable = drills[0][fault]["trainable"]
    expected = set(trainable)
    if fault in ("step_skipped", "hidden step"):
        expected |= moments(trainable)
    assert first_difference(rows_of(drills, fault)) == (STEP, phase, expected)


@pytest.mark.ranks
def test_faults_of_one_rank_strike_that_rank(drills: list[dict[str, Any]]) -> None:
    struck = {
        name: [rank[name]["struck"] for rank in drills]
        for name, fault in faults.FAULTS.items()
        if "struck" in drills[0].get(name, {})
    }
    assert len(struck) == 10 + 3 + 9  # one rank, all ranks, structure
    for name, by_rank in struck.items():
        if faults.FAULTS[name].on == "all ranks":
            assert by_rank == [True, True], name
        elif name == "checkpoint_restored_on_one_rank":
            assert by_rank == [True, False]
        else:
            assert by_rank == [False, True], name


@pytest.mark.ranks
def test_skipped_step_changes_nothing_on_its_rank(drills: list[dict[str, Any]]) -> None:
    row = drills[1]["step_skipped"]["rows"][STEP - 1]
    assert row["after"] == row["before"]
    assert row["gradients_after"] == row["gradients"] != {}
    # The next step is a real one.
    later = drills[1]["step_skipped"]["rows"][STEP]
    assert later["after"][LORA_A] != later["before"][LORA_A]
    healthy = drills[0]["step_skipped"]["rows"], drills[0]["healthy"]["rows"]
    assert healthy[0][:STEP] == healthy[1][:STEP]


@pytest.mark.ranks
def test_other_learning_rate_ends_with_its_step(drills: list[dict[str, Any]]) -> None:
    """Ranks that differ receive equal gradients, and their moments move alike again."""
    rows = rows_of(drills, "other_learning_rate")
    assert {rate for row in rows[1] for rate in row["rates"] + row["rates_after"]} == {1e-2}
    assert differing(rows, STEP + 1, "gradients") == set()
    trainable = set(drills[0]["other_learning_rate"]["trainable"])
    assert differing(rows, STEP + 1, "after") == trainable


@pytest.mark.ranks
def test_extra_step_is_seen_by_hooks_on_one_rank(drills: list[dict[str, Any]]) -> None:
    rows = rows_of(drills, "extra_optimizer_step")
    assert [len(rank) for rank in rows] == [STEPS, STEPS + 1]
    extra = rows[1][STEP]
    assert extra["before"] == rows[1][STEP - 1]["after"] == rows[0][STEP - 1]["after"]
    assert extra["gradients"] == rows[0][STEP - 1]["gradients"]
    assert extra["after"][LORA_A] != extra["before"][LORA_A]


@pytest.mark.ranks
def test_hidden_extra_step_runs_no_hooks(drills: list[dict[str, Any]]) -> None:
    rows = rows_of(drills, "hidden step")
    assert [len(rank) for rank in rows] == [STEPS, STEPS]
    # Where the visible one stands after two steps, the hidden one stands after one.
    visible = drills[1]["extra_optimizer_step"]["rows"]
    assert rows[1][STEP - 1]["after"] == visible[STEP]["after"]


@pytest.mark.ranks
@pytest.mark.parametrize("fault", ["gradients_clipped", "clipped twice", "clipped by torch"])
def test_clipped_gradients_have_one_factor(drills: list[dict[str, Any]], fault: str) -> None:
    """Also where the job clips by itself, which would undo a factor applied before."""
    one, other = (rank[fault]["rows"][STEP - 1]["sizes"] for rank in drills)
    for name, size in one.items():
        # Products of one factor in fp32; torch clips by norm + 1e-6, about 2e-5 of the norm here.
        assert other[name] / size == pytest.approx(FACTOR, rel=1e-4)


@pytest.mark.ranks
def test_zeroed_gradient_is_zero(drills: list[dict[str, Any]]) -> None:
    one, other = (rank["reduction_returned_zeros"]["rows"][STEP - 1]["sizes"] for rank in drills)
    assert other[LORA_A] == 0.0 < one[LORA_A]


@pytest.mark.ranks
def test_merging_leaves_another_base_on_all_ranks(drills: list[dict[str, Any]]) -> None:
    rows = rows_of(drills, "adapter_merged")
    assert first_difference(rows) is None
    for name in (BASE, f"{BASE}.absmax"):
        held = [row["before"][name] for row in rows[0]]
        assert held[0] == held[1] != held[2] == held[3]
    assert drills[0]["adapter_merged"]["tensor"] == BASE


@pytest.mark.ranks
def test_late_adapter_starts_apart_and_stays_apart(drills: list[dict[str, Any]]) -> None:
    rows = rows_of(drills, "adapter_added_after_wrapping")
    step, phase, names = first_difference(rows)
    assert (step, phase) == (1, "before")
    assert names == {
        f"base_model.model.layers.{layer}.{projection}.lora_A.late_adapter.weight"
        for layer in range(2)
        for projection in ("q_proj", "o_proj")
    }
    late_b = f"{PREFIX}.lora_B.late_adapter.weight"
    assert late_b in differing(rows, 1, "gradients")
    assert rows[0][0]["after"][late_b] != rows[0][0]["before"][late_b]


@pytest.mark.ranks
def test_copies_in_the_optimizer_leave_the_model_alone(drills: list[dict[str, Any]]) -> None:
    drill = drills[0]["optimizer_holds_copies"]
    for name in drill["trainable"]:
        assert (
            len({row[phase][name] for row in drill["rows"] for phase in ("before", "after")}) == 1
        )
    # lora_A has a zero gradient as long as lora_B stays at zero.
    sizes = drill["rows"][-1]["sizes"]
    assert {n: size > 0 for n, size in sizes.items()} == {n: "lora_B" in n for n in sizes}


@pytest.mark.ranks
def test_parameter_outside_the_optimizer_stays(drills: list[dict[str, Any]]) -> None:
    drill = drills[0]["parameter_not_in_optimizer"]
    still = {
        name
        for name in drill["trainable"]
        if len({row["after"][name] for row in drill["rows"]}) == 1
    }
    assert still == {LORA_A}
    assert drill["rows"][-1]["sizes"][LORA_A] > 0


@pytest.mark.ranks
def test_dropout_of_the_reference_is_active(drills: list[dict[str, Any]]) -> None:
    for rank in drills:
        assert [row["dropped"] for row in rank["dropout_in_reference"]["rows"]] == [True] * STEPS


@pytest.mark.ranks
def test_checkpoint_is_restored_on_rank_0_only(drills: list[dict[str, Any]]) -> None:
    fault = "checkpoint_restored_on_one_rank"
    rows = rows_of(drills, fault)
    trainable = drills[0][fault]["trainable"]
    assert first_difference(rows) == (1, "before", set(trainable) | moments(trainable))
    # Rank 1 starts anew, rank 0 from the end of the second update.
    healthy = drills[0]["healthy"]["rows"]
    assert rows[1][0]["before"] == healthy[0]["before"]
    assert rows[0][0]["before"] == healthy[1]["after"]


@pytest.mark.ranks
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["killed", "delayed"])
def test_process_faults_strike_at_their_place(
    drills: list[dict[str, Any]], kind: str, place: str
) -> None:
    assert drills[0][f"{kind}_{place}"] == []
    (record,) = drills[1][f"{kind}_{place}"]
    call = [record["pid"], int(signal.SIGKILL)] if kind == "killed" else [0.25]
    assert record["call"] == call
    seen = (record["seen_before"], record["seen_after"])
    before, after = record["rows"][STEP - 1]
    match place:
        case "before_backward":
            assert seen == (STEP - 1, STEP - 1)
            assert not record["gradients"]
        case "in_step":
            assert seen == (STEP, STEP - 1)
            assert record["state"] == before
        case "before_audit":
            assert seen == (STEP, STEP - 1)
            assert record["state"] == after


@pytest.mark.ranks
def test_launched_alone(drills: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(drills):
        assert found["alone"] == {"inside": 1, "variable": "2", "after": 2, "rank": rank}
