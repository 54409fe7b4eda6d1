"""What the audit costs where ranks and tensors are many: what it sends, and how long it thinks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import scale_runs
from bench import audit_scaling, watch_scaling
from ranks import run_on_ranks

SIZES, TENSORS = [8, 4, 2], [10, 1000]
# 11 counters and 8 checksums of two 64-bit words, sent as [x, ~x].
HEADER_BYTES = 2 * (11 + 8 * 2) * 8
GATHER_OBJECT = ["allgather", "allgather"]  # the sizes, then the bytes


@pytest.fixture(scope="module")
def counted() -> list[dict[str, Any]]:
    """What each of eight ranks counted."""
    results: list[dict[str, Any]] = run_on_ranks(
        scale_runs.worlds, SIZES, TENSORS, num_ranks=max(SIZES)
    )
    return results


def runs(counted: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Both runs of every rank in the world of `size` ranks."""
    return [counted[rank][f"{size}/{number}"] for rank in range(size) for number in TENSORS]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_healthy_update_costs_one_message_of_constant_size(
    counted: list[dict[str, Any]], size: int
) -> None:
    for run in runs(counted, size):
        assert run["steps"] == [[("allreduce", HEADER_BYTES)]] * scale_runs.NUM_STEPS
        # Second count, by torch: one on the audit's group; the mean of the gradients on the other.
        assert run["torch_counted"] == [[1, 1]] * scale_runs.NUM_STEPS
        assert run["full"] == [("allreduce", HEADER_BYTES)]
        assert run["equal"] == scale_runs.NUM_STEPS


@pytest.mark.ranks
@pytest.mark.slow
def test_beginning_and_explaining_take_as_many_collectives_for_any_ranks_and_tensors(
    counted: list[dict[str, Any]],
) -> None:
    everywhere = [run for size in SIZES for run in runs(counted, size)]
    locate = [*GATHER_OBJECT, "broadcast", *GATHER_OBJECT]  # forms, the bytes, the difference
    for run in everywhere:
        assert run["begin"] == everywhere[0]["begin"]
        assert run["parted"] == ["allreduce", *GATHER_OBJECT, *locate]
        assert run["desyncs"] == 1
    # At the start also two looks of the self-test, which finds its bit, and the first audit.
    begin = everywhere[0]["begin"]
    assert begin.count("broadcast") == 1
    assert begin.count("allreduce") >= 3


@pytest.mark.ranks
@pytest.mark.slow
def test_one_collective_more_would_be_counted(counted: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        more = counted[rank]["more"]
        assert more["gathers"] == ([*GATHER_OBJECT, "allreduce"], 3)
        assert more["gathers_in_a_thread"] == (["allreduce"], 3)


@pytest.mark.ranks
@pytest.mark.slow
def test_the_counter_sees_every_kind_of_collective(counted: list[dict[str, Any]]) -> None:
    # One number of 8 bytes; a gathering operator is given the results' tensors as well.
    expected = {
        "all_reduce": [("allreduce", 8)],
        "broadcast": [("broadcast", 8)],
        "reduce": [("reduce", 8)],
        "all_gather": [("allgather", 24)],
        "all_gather_single": [("_allgather_base", 24)],
        "all_to_all": [("alltoall_base", 32)],
        "method": [("allreduce", 8)],
    }
    for rank, kinds in enumerate(result["kinds"] for result in counted[:2]):
        assert {name: kinds[name] for name in expected} == expected
        names = {name: [kind for kind, _ in sent] for name, sent in kinds.items()}
        assert names["all_gather_object"] == GATHER_OBJECT
        assert names["broadcast_object"] == ["broadcast", "broadcast"]
        assert names["barrier"] == ["barrier"]
        assert names["send"] == ["send" if rank == 0 else "recv"]


def test_the_bench_finds_the_same_message_and_names_every_cause(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    audit_scaling.main(
        ["--ranks", "2", "64", "--layers", "1", "--rounds", "1", "--json", str(path)]
    )
    rows = json.loads(path.read_text())["verdicts"]
    assert [row["ranks"] for row in rows] == [2, 64]
    for row in rows:
        assert (row["header_bytes"], row["collectives"], row["tensors"]) == (HEADER_BYTES, 1, 14)
        # As on real ranks: one look, and two for each gather: the evidence; to find the first
        # element also forms and differences, with a broadcast between them.
        numbers = [case["collectives"] for case in row["differing"].values()]
        assert numbers == [8, 8, 3]


def test_network_times_follow_from_the_assumptions() -> None:
    # 30 us a message, 1.25 GB/s. Eight ranks: a ring of 14 messages takes 14/8 of 384 bytes past
    # each rank, which is 0.5376 us; three levels of a tree carry 1,000 bytes, 0.8 us each.
    assert audit_scaling.all_reduce_s(8, 384) == pytest.approx(14 * 30e-6 + 0.5376e-6)
    assert audit_scaling.broadcast_s(8, 1000) == pytest.approx(3 * 30.8e-6)
    # Sizes, 0.0064 us each, and objects of 1,000 bytes from seven others.
    assert audit_scaling.gather_object_s(8, 1000) == pytest.approx(7 * (30.0064e-6 + 30.8e-6))


def test_the_bench_of_the_watch_reads_every_state(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    watch_scaling.main(["--ranks", "8", "512", "--rounds", "1", "--json", str(path)])
    small, large = json.loads(path.read_text())["watch"]
    # Eight ranks each read seven states a second; 512 ranks 511 every two seconds.
    assert (small["poll_s"], small["states_per_s"], small["requests_per_s"]) == (1.0, 56.0, 16.0)
    assert (large["poll_s"], large["states_per_s"]) == (2.0, 512 * 511 / 2)
    assert large["bytes_per_s"] == large["states_per_s"] * large["state_bytes"]
