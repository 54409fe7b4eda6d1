"""Sharded tensors in manifests: whatever the layout, the same checksums; damage names its ranks."""

from __future__ import annotations

from typing import Any

import pytest
import xxhash

import manifest_layouts
from manifest_layouts import ROWS, SCOPE, whole
from ranks import run_on_ranks
from trl_sync.audit.manifest import check_tensors
from trl_sync.audit.manifest_tensors import SeenTensor, record_scope

pytestmark = pytest.mark.ranks

LAYOUTS = ("line", "pairs", "columns", "twice")
CHANGED = "changed"
# What is gathered if ranks hold just the ranges that were recorded: nothing, and of the two rows of
# "fewer" one lies on each of two ranks in both layouts.
LOCAL: dict[str, list[str]] = {
    "line -> line": [],
    "pairs -> pairs": [],
    "line -> pairs": ["even", "uneven"],
    "pairs -> line": ["even", "uneven"],
}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_on_ranks(manifest_layouts.look, num_ranks=4)


def sum_of(rows: int) -> str:
    return str(xxhash.xxh3_128_hexdigest(whole(rows).numpy().tobytes()))


def test_checksums_of_the_whole_do_not_depend_on_the_layout(found: Any) -> None:
    expected = {name: sum_of(rows) for name, rows in ROWS.items()}
    assert found[0]["sums"] == dict.fromkeys(LAYOUTS, expected)


def test_parts_are_the_bytes_that_ranks_hold(found: Any) -> None:
    data = whole(8).numpy().tobytes()
    # Rows of 16 bytes: two on each of four ranks, or four on each of two.
    quarters, halves = ["0:32", "32:64", "64:96", "96:128"], ["0:64", "64:128"]
    for layout, spans in (("line", quarters), ("pairs", halves), ("columns", []), ("twice", [])):
        parts = found[0]["parts"][layout]["even"]
        bounds = [tuple(map(int, span.split(":"))) for span in spans]
        sums = [xxhash.xxh3_128_hexdigest(data[start:stop]) for start, stop in bounds]
        assert parts == dict(zip(spans, sums, strict=True))
    # As torch.chunk cuts: the last of four ranks has none of 6 rows, the last two none of 2.
    assert list(found[0]["parts"]["line"]["uneven"]) == ["0:32", "32:64", "64:96"]
    assert list(found[0]["parts"]["line"]["fewer"]) == ["0:16", "16:32"]


def test_what_did_not_move_is_not_gathered_again(found: Any) -> None:
    for rank in found:
        again = rank["again"]
        assert (again["unchanged"], again["changed"], again["same"]) == ([], ["even"], True)
    moved = whole(8)
    moved[6, 0] += 1  # the first row of the last rank
    expected = xxhash.xxh3_128_hexdigest(moved.numpy().tobytes())
    assert found[0]["again"]["moved"] == expected


def test_ranks_with_other_tensors_cannot_record(found: Any) -> None:
    assert {rank["parted"] for rank in found} == {
        "ranks hold different sharded tensors, so none could be gathered."
    }


def test_every_layout_resumes_from_every_other(found: Any) -> None:
    for rank in found:
        assert len(rank["equal"]) == len(LAYOUTS) * (len(LAYOUTS) + 1)
        for case, (gathered, problems) in rank["equal"].items():
            assert problems == [], case
            assert gathered == LOCAL.get(case, list(ROWS)), case


def ranks_that_speak(found: Any, case: str) -> dict[int, str]:
    """Rank -> what it says of "even", of which rank 3 holds another value."""
    said = {}
    for rank, answers in enumerate(found):
        for kind, name, detail in answers["struck"][case][1]:
            assert (kind, name) == (CHANGED, "even")
            said[rank] = detail
    return said


def test_a_part_that_differs_names_its_rank(found: Any) -> None:
    # Bytes 96 to 128 are those of rank 3 on a line; among pairs it holds the second half.
    (said,) = (ranks_that_speak(found, "line -> line"),)
    assert list(said) == [3]
    assert said[3].startswith("bytes 96:128 have checksum ")
    assert list(ranks_that_speak(found, "pairs -> pairs")) == [3]


def test_in_another_layout_those_who_hold_the_bytes_are_named(found: Any) -> None:
    # Saved in halves: ranks 2 and 3 hold the second one together, and one of them is struck.
    said = ranks_that_speak(found, "pairs -> line")
    assert list(said) == [2, 3]
    assert said[2].startswith("bytes 64:128 have checksum ")
    # Saved in quarters, held in halves by pairs that gather among themselves: rank 2 shares with 3
    # what it gathers, but holds none of the bytes that differ.
    assert list(ranks_that_speak(found, "line -> pairs")) == [3]


def test_without_parts_every_rank_that_gathered_it_speaks(found: Any) -> None:
    for saved in ("plain", "columns", "twice"):
        assert list(ranks_that_speak(found, f"{saved} -> line")) == [0, 1, 2, 3]
        # Ranks 0 and 1 gather among themselves, where nothing is wrong.
        assert list(ranks_that_speak(found, f"{saved} -> pairs")) == [2, 3]
    assert list(ranks_that_speak(found, "line -> columns")) == [0, 1, 2, 3]


def test_a_rank_without_a_manifest_takes_part_and_says_nothing(found: Any) -> None:
    assert [rank["without manifest"] for rank in found] == [["even"], ["even"], ["even"], []]


def test_what_could_not_be_seen_is_a_problem() -> None:
    unseen = SeenTensor(dtype="float32", shape=(8, 4), unseen="ranks differ")
    written = {SCOPE: {"even": manifest_layouts.plain_record("even")}}
    (problem,) = check_tensors(manifest_layouts.manifest_of(written), {SCOPE: [("even", unseen)]})
    assert (problem.kind, problem.detail) == ("not_comparable", "ranks differ")
    with pytest.raises(ValueError, match="even was not seen whole"):
        record_scope(SCOPE, [("even", unseen)])
