"""Layouts: who holds the same bytes, and where FSDP2 keeps what its modules do not show."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn

import ranks
import sharded_state
from trl_sync.audit.config import AuditConfig
from trl_sync.audit.coverage import coverage, gaps
from trl_sync.audit.engine import not_distributed, unavailable_scopes
from trl_sync.audit.findings import Cause, Scope
from trl_sync.audit.inventory import Inventory
from trl_sync.audit.sharding import PLAIN, Form, Reach, layout_of, replica_groups
from trl_sync.audit.update_hooks import around_engine_step, engine_optimizer


def test_replica_groups_of_a_cube() -> None:
    mesh = torch.arange(8).view(2, 2, 2)
    assert replica_groups(mesh, [0]) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert replica_groups(mesh, [0, 2]) == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert replica_groups(mesh, []) == tuple((rank,) for rank in range(8))
    assert replica_groups(mesh, [0, 1, 2]) == (tuple(range(8)),)
    assert replica_groups(torch.tensor([[5, 1], [4, 0]]), [0]) == ((0, 1), (4, 5))


def test_plain_tensors_are_held_by_all() -> None:
    assert layout_of(nn.Parameter(torch.ones(2)), 1, 4) is PLAIN
    assert layout_of(torch.ones(2), 1, 4) is PLAIN


def partitioned(**changes: Any) -> Any:
    """A parameter with what ZeRO-3 writes to it."""
    parameter: Any = nn.Parameter(torch.empty(0))
    attributes = {"ds_id": 3, "ds_tensor": torch.ones(4), "ds_numel": 7, "ds_shape": (7,)}
    for name, value in (attributes | changes).items():
        setattr(parameter, name, value)
    return parameter


def test_partitions_have_no_twin() -> None:
    layout = layout_of(partitioned(), 1, 2)
    assert (layout.form, layout.reach, layout.reason) == (Form.PARTITION, Reach.SELF, None)


@pytest.mark.parametrize(
    "tensor, part",
    [
        (partitioned(ds_secondary_tensor=torch.ones(4)), "hpZ"),
        (partitioned(ds_tensor=torch.empty(0)), "disk"),
        (partitioned(ds_tensor=None), "not partitioned"),
        (partitioned(ds_process_group=types.SimpleNamespace(size=lambda: 1)), "some of the ranks"),
        (type("FlatParameter", (nn.Parameter,), {})(torch.ones(2)), "FSDP1"),
    ],
)
def test_unknown_layouts_have_a_reason(tensor: torch.Tensor, part: str) -> None:
    assert part in (layout_of(tensor, 0, 2).reason or "")


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return ranks.run_on_ranks(sharded_state.look, num_ranks=4)


ALL, PAIRS, OTHER_PAIRS = (0, 1, 2, 3), ((0, 2), (1, 3)), ((0, 1), (2, 3))


@pytest.mark.ranks
def test_layouts_on_a_mesh(seen: list[dict[str, Any]]) -> None:
    for rank, answer in enumerate(seen):
        found = answer["layouts"]
        assert found["plain"] == ("all ranks", (), (), None)
        assert found["sharded"] == ("history", (rank,), (), None)
        assert found["replicated"] == ("all ranks", ALL, (), None)
        assert found["hybrid"] == ("replicas", PAIRS[rank % 2], PAIRS, None)
        assert found["hybrid, other axis"] == (
            "replicas",
            OTHER_PAIRS[rank // 2],
            OTHER_PAIRS,
            None,
        )
        assert found["sharded twice"] == ("history", (rank,), (), None)
        assert "partial sums" in found["partial sums"][3]
        for name in ("half the ranks", "half the ranks, sharded"):
            reason = "only some of 4" if rank < 2 else f"rank {rank} is not on"
            assert reason in found[name][3]


@pytest.mark.ranks
def test_the_inventory_sees_what_the_optimizer_holds(seen: list[dict[str, Any]]) -> None:
    for rank, answer in enumerate(seen):
        found = answer["gathered"]
        # Else nothing was gathered, and the test says nothing.
        assert found["shown"] == {"Parameter"}
        assert found["same as held"] == [True] * 4
        assert found["still gathered"] == 4
        assert found["unchanged"]
        # Rows 5, 5, 3, 3 over two shards; a layer added later is plain.
        shard = [3, 3, 2, 2] if rank % 2 == 0 else [2, 2, 1, 1]
        assert found["local rows"] == [*shard, 3, 3]
        assert found["reaches"] == ["replicas"] * 4 + ["all ranks"] * 2
        assert found["partition"] == PAIRS
        assert found["plain"] is None
        # Whole shapes and layouts, the same on all ranks.
        assert found["schema"] == seen[0]["gathered"]["schema"]
    schema = seen[0]["gathered"]["schema"]
    assert [shape for *_, shape in schema] == [(5, 4), (5,), (3, 5), (3,)]
    assert "mesh (2, 2)" in schema[0][2]


@pytest.mark.ranks
def test_a_declared_move_of_one_shard_is_a_warning(seen: list[dict[str, Any]]) -> None:
    nothing = (True, False, True, [])
    warning = (True, False, True, [("frozen_changed", (1,), False)])
    for answer in seen:
        assert answer["declared"] == [nothing, warning, nothing]


@pytest.mark.ranks
def test_backward_is_told_by_the_outputs(seen: list[dict[str, Any]]) -> None:
    assert [answer["backward"] for answer in seen] == [[0, 2, 2]] * 4


@pytest.mark.ranks
def test_a_comparison_within_groups(seen: list[dict[str, Any]]) -> None:
    for rank, answer in enumerate(seen):
        found, odd = answer["split"], rank % 2
        assert found["ranks"] == found_ranks(rank)
        assert found["gathered"] == list(found_ranks(rank))
        assert found["own"] == [True]
        assert found["mixed"] == [True, not odd]
        assert found["difference"] == ((3, (1,)) if odd else None)


def found_ranks(rank: int) -> tuple[int, ...]:
    return PAIRS[rank % 2]


class Engine:
    """An optimizer that, like DeepSpeed's, is none of torch's."""

    __module__ = "deepspeed.runtime.zero.stage_1_and_2"

    def __init__(self) -> None:
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        self.overflow = False
        self.calls: list[str] = []

    def step(self) -> None:
        self.calls.append("step")


def test_looks_around_the_step_of_an_engine() -> None:
    engine = Engine()
    assert engine_optimizer(types.SimpleNamespace(optimizer=engine)) is engine
    plain = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert engine_optimizer(types.SimpleNamespace(optimizer=plain)) is plain
    undo = around_engine_step(
        engine, lambda: engine.calls.append("before"), lambda: engine.calls.append("after")
    )
    engine.step()
    engine.overflow = True  # gradients overflowed: nothing was updated
    engine.step()
    assert engine.calls == ["before", "step", "after", "before", "step"]
    undo()
    assert "step" not in vars(engine)
    engine.step()
    assert engine.calls[5:] == ["step"]


def test_an_undone_look_below_another_wrapper_passes_on() -> None:
    engine = Engine()
    undo = around_engine_step(
        engine, lambda: engine.calls.append("before"), lambda: engine.calls.append("after")
    )
    ours = engine.step
    vars(engine)["step"] = lambda: ours()
    undo()
    engine.step()
    assert engine.calls == ["step"]


def state(engine: str, **fields: Any) -> Any:
    return types.SimpleNamespace(distributed_type=engine, num_processes=1, **fields)


def test_fsdp_in_the_arguments_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    assert not_distributed(state("MULTI_CPU"), 1) is None
    assert not_distributed(state("FSDP"), 1, wants_fsdp=True) is None
    found = not_distributed(state("MULTI_CPU"), 1, wants_fsdp=True)
    assert found is not None
    assert found.cause is Cause.NOT_DISTRIBUTED
    assert "the training arguments" in found.evidence


def test_what_each_engine_hides() -> None:
    zero = unavailable_scopes(
        state("DEEPSPEED", deepspeed_plugin=types.SimpleNamespace(zero_stage=1))
    )
    assert set(zero) == {Scope.GRADIENTS, Scope.OPTIMIZER}
    assert "ZeRO-1" in zero[Scope.OPTIMIZER]
    older = unavailable_scopes(state("FSDP", fsdp_plugin=types.SimpleNamespace(fsdp_version=1)))
    assert Scope.TRAINABLE in older
    assert "FSDP2" in older[Scope.TRAINABLE]
    newer = state("FSDP", fsdp_plugin=types.SimpleNamespace(fsdp_version=2))
    assert unavailable_scopes(newer) == unavailable_scopes(state("MULTI_GPU")) == {}


def test_every_gap_is_told_once() -> None:
    inventory = Inventory(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    missing = {Scope.GRADIENTS: "no .grad"}
    in_part = {Scope.ROLES: "never_updated: no .grad"}
    config = AuditConfig()
    lines = {s.value: coverage(s, inventory, config, missing, {}, in_part) for s in Scope}
    tensors, *scopes = gaps(lines, inventory, config)
    assert tensors.startswith("2 tensors are not checked, such as 1.weight: on the meta device")
    assert scopes == [
        "gradients is not checked here: no .grad",
        "roles is checked in part here, without never_updated: no .grad",
    ]
    # What nobody asked for is not missed.
    assert list(gaps(lines, inventory, AuditConfig(scopes=["frozen"]))) == [tensors]
    inventory.close()
