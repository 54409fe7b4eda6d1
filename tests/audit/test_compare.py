"""Numbers that ranks compare exactly, and where two copies of a tensor part."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ranks import run_on_ranks
from trl_sync.audit.compare import Comparison
from trl_sync.audit.findings import Difference
from trl_sync.audit.localize import common_factor, compare_with_reference

LARGEST, SMALLEST = 2**63 - 1, -(2**63)


def parted(tensor: Tensor, reference: Tensor) -> Difference:
    difference = compare_with_reference(tensor, reference, rank=3, reference_rank=1)
    assert difference is not None
    assert (difference.rank, difference.reference_rank) == (3, 1)
    return difference


# One tensor and its copy.

# Type, value and reference of one element, their bits, the largest difference.
ELEMENTS: list[tuple[torch.dtype, Any, Any, str, str, float]] = [
    (torch.float32, 1.5, 1.0, "3fc00000", "3f800000", 0.5),
    (torch.float64, -2.0, 0.0, "c000000000000000", "0000000000000000", 2.0),
    (torch.bfloat16, 1.0, 2.0, "3f80", "4000", 1.0),
    (torch.float16, 1.0, 1.5, "3c00", "3e00", 0.5),
    (torch.float8_e4m3fn, 1.0, 2.0, "38", "40", 1.0),
    (torch.float8_e5m2, 1.0, 2.0, "3c", "40", 1.0),
    (torch.uint8, 255, 1, "ff", "01", 254.0),
    (torch.int8, -1, 1, "ff", "01", 2.0),
    (torch.int16, -2, 0, "fffe", "0000", 2.0),
    (torch.int64, -1, 5, "ffffffffffffffff", "0000000000000005", 6.0),
    (torch.bool, True, False, "01", "00", 1.0),
    (torch.complex64, 1j, 0j, "3f80000000000000", "0000000000000000", 1.0),
    (torch.complex128, 1j, 0j, "3ff0000000000000" + 16 * "0", 32 * "0", 1.0),
    # Equal as numbers, or not comparable as numbers.
    (torch.float32, -0.0, 0.0, "80000000", "00000000", 0.0),
    (torch.bfloat16, -0.0, 0.0, "8000", "0000", 0.0),
    (torch.float32, math.nan, 1.0, "7fc00000", "3f800000", math.inf),
    (torch.float32, math.inf, 1.0, "7f800000", "3f800000", math.inf),
    # The smallest numbers there are.
    (torch.float32, 1e-45, 0.0, "00000001", "00000000", 2.0**-149),
    (torch.bfloat16, 2.0**-133, 0.0, "0001", "0000", 2.0**-133),
]


@pytest.mark.parametrize("dtype, value, reference, bits, reference_bits, size", ELEMENTS)
@pytest.mark.parametrize("shape, place", [((1,), (0,)), ((2, 3, 4), (1, 0, 2)), ((), ())])
def test_one_element_is_found_by_its_bits(
    dtype: torch.dtype,
    value: Any,
    reference: Any,
    bits: str,
    reference_bits: str,
    size: float,
    shape: tuple[int, ...],
    place: tuple[int, ...],
) -> None:
    element = {"dtype": dtype}
    theirs = torch.zeros(shape, dtype=torch.uint8).to(**element)
    theirs[place] = torch.tensor(reference, **element)
    ours = theirs.clone()
    ours[place] = torch.tensor(value, **element)
    found = parted(ours, theirs)
    assert (found.index, found.bits, found.reference_bits) == (place, bits, reference_bits)
    assert (found.num_different, found.num_elements) == (1, math.prod(shape))
    assert found.max_abs_difference == size
    assert compare_with_reference(ours, ours.clone(), 3, 1) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_nans_are_equal_and_others_are_not(dtype: torch.dtype) -> None:
    integers = torch.int32 if dtype is torch.float32 else torch.int16
    nan = torch.tensor([math.nan, 1.0], dtype=dtype)
    assert compare_with_reference(nan, nan.clone(), 3, 1) is None
    other = nan.clone()
    other.view(integers)[0] += 1
    assert parted(other, nan).num_different == 1


def test_the_first_of_several_in_logical_order() -> None:
    theirs = torch.zeros(4, 3).t()  # not contiguous: rows of it are columns in memory
    ours = theirs.clone()
    ours[2, 0], ours[1, 3] = 5.0, -7.0
    found = parted(ours, theirs)
    assert (found.index, found.num_different, found.max_abs_difference) == ((1, 3), 2, 7.0)
    assert found.describe() == (
        "2 of 12 elements differ, first at [1, 3]: 0xc0e00000 on rank 3, 0x00000000 on rank 1; "
        "largest difference 7"
    )


def test_int64_beyond_the_precision_of_floats() -> None:
    theirs = torch.tensor([2**62 + 1, 7])
    ours = torch.tensor([2**62, 7])
    found = parted(ours, theirs)
    assert (found.index, found.num_different) == ((0,), 1)


def test_complex_elements_count_once() -> None:
    theirs = torch.zeros(3, dtype=torch.complex128)
    ours = theirs + torch.tensor([0, 3 + 4j, 1])
    found = parted(ours, theirs)
    assert (found.index, found.num_different, found.max_abs_difference) == ((1,), 2, 5.0)


# One common factor.


def numbers(dtype: torch.dtype = torch.float32, num: int = 257) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(num, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.7, -3.0, 1024.0, 0.01])
def test_a_factor_is_found_to_the_precision_of_the_type(dtype: torch.dtype, factor: float) -> None:
    theirs = numbers(dtype)
    found = parted(theirs * factor, theirs).factor
    assert found is not None
    # Half a unit in the last place for the product, and the median of many.
    assert found == pytest.approx(factor, rel=torch.finfo(dtype).eps)


def test_a_factor_of_all_but_one_is_none() -> None:
    theirs = numbers()
    ours = theirs * 0.7
    ours[100] *= 1 + 1e-5
    assert parted(ours, theirs).factor is None


@pytest.mark.parametrize(
    "tensor, reference",
    [
        ([2.0, 4.0], [1.0, 0.0]),  # a zero that is none
        ([0.0, 0.0], [1.0, 2.0]),  # zeros are no multiple worth naming
        ([2.0], [1.0]),  # one element is always a multiple
        ([2.0, 0.0], [1.0, 0.0]),
        ([2.0, math.nan], [1.0, 1.0]),
        ([2.0, math.inf], [1.0, 1.0]),
        ([1.0, 2.0], [1.0, 2.0]),
    ],
)
def test_no_factor(tensor: list[float], reference: list[float]) -> None:
    assert common_factor(torch.tensor(tensor), torch.tensor(reference)) is None


def test_integers_have_no_factor() -> None:
    assert common_factor(torch.tensor([2, 4]), torch.tensor([1, 2])) is None


def test_denormal_references_do_not_hide_a_factor() -> None:
    theirs = torch.tensor([1.0, -3.0, 5.0, 1e-41])
    ours = theirs * 0.5  # the last one loses digits
    assert common_factor(ours, theirs) == 0.5


# Across ranks.


def alone_and_together(cases: list[list[list[int]]]) -> dict[str, Any]:
    """What this rank learns of each case, a list of numbers for every rank."""
    from accelerate import PartialState

    state = PartialState(cpu=True)
    comparison = Comparison(timeout_s=30)
    rank, size = comparison.rank, comparison.world_size
    agreed = [comparison.agree(case[rank]) for case in cases]
    tensor = torch.arange(12, dtype=torch.int64).view(3, 4)
    clean = comparison.localize(tensor, reference_rank=0)
    if rank == size - 1:
        tensor[2, 1] = -1
    located = comparison.localize(tensor, reference_rank=0)
    shape = comparison.localize(tensor if rank else tensor.view(4, 3), reference_rank=0)
    absent = comparison.localize(None if rank == 1 else tensor, reference_rank=0)
    values = [torch.tensor([math.nan, -0.0, float(rank)], dtype=torch.bfloat16)]
    values.append(torch.tensor(3 + rank))
    values.append(torch.arange(6.0).view(2, 3).t() + rank)
    for value in values:
        comparison.broadcast(value, source_rank=size - 1)
    empty = torch.zeros(0, 4)
    try:
        comparison.broadcast(empty, source_rank=size - 1)
        of_nothing = "done"
    except (AttributeError, ValueError) as error:
        of_nothing = repr(error)
    num_groups = len(torch.distributed.distributed_c10d._world.pg_map)
    comparison.close()
    closed = num_groups - len(torch.distributed.distributed_c10d._world.pg_map)
    return {
        "rank": state.process_index,
        "agreed": agreed,
        "clean": clean,
        "located": located,
        "shape": shape,
        "absent": absent,
        "broadcast": [v.reshape(-1).contiguous().view(torch.uint8).tolist() for v in values],
        "of_nothing": of_nothing,
        "closed": closed,
    }


AGREEMENTS: list[tuple[list[list[int]], list[bool]]] = [
    ([[5], [5], [5]], [True]),
    # -x of the smallest number is itself: with [x, -x] these would look like 5 everywhere.
    ([[5], [5], [SMALLEST]], [False]),
    ([[SMALLEST], [5], [SMALLEST]], [False]),
    ([[SMALLEST], [SMALLEST], [SMALLEST]], [True]),
    ([[LARGEST], [LARGEST], [LARGEST]], [True]),
    ([[LARGEST], [SMALLEST], [LARGEST]], [False]),
    ([[LARGEST], [LARGEST - 1], [LARGEST]], [False]),
    ([[0], [-1], [0]], [False]),  # ~0 is -1
    ([[-1], [0], [1]], [False]),
    ([[], [], []], []),
    # Each number by itself, wherever it stands and whoever departs.
    (
        [[1, 2, 3, SMALLEST, 0], [1, -2, 3, SMALLEST, 0], [1, 2, 3, SMALLEST + 1, 0]],
        [True, False, True, False, True],
    ),
    (
        [[7] * 500, [7] * 499 + [8], [7] * 500],
        [True] * 499 + [False],
    ),
]


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return run_on_ranks(alone_and_together, [case for case, _ in AGREEMENTS], num_ranks=3)


@pytest.mark.ranks
def test_numbers_agree_exactly(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["agreed"] == [expected for _, expected in AGREEMENTS]


@pytest.mark.ranks
def test_the_difference_is_located_alike_on_every_rank(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["clean"] is None
        assert answer["located"] == answers[0]["located"]
        found = answer["located"]
        assert (found.rank, found.reference_rank, found.index) == (2, 0, (2, 1))
        assert (found.bits, found.reference_bits) == ("f" * 16, "9".zfill(16))
        # What cannot be laid side by side has no place of difference, and no rank waits for it.
        assert answer["shape"] is None
        assert answer["absent"] is None


@pytest.mark.ranks
def test_a_broadcast_is_exact_for_every_form(answers: list[dict[str, Any]]) -> None:
    nan, negative_zero, two = [0xC0, 0x7F], [0x00, 0x80], [0x00, 0x40]
    last = answers[-1]["broadcast"]
    assert last[0] == nan + negative_zero + two
    assert last[1] == [5, 0, 0, 0, 0, 0, 0, 0]
    # Columns of the matrix [[2, 3, 4], [5, 6, 7]] in fp32.
    columns = torch.tensor([2.0, 5.0, 3.0, 6.0, 4.0, 7.0])
    assert last[2] == columns.view(torch.uint8).tolist()
    assert all(answer["broadcast"] == last for answer in answers)


@pytest.mark.ranks
def test_a_broadcast_of_no_elements_is_none(answers: list[dict[str, Any]]) -> None:
    assert [answer["of_nothing"] for answer in answers] == ["done"] * 3


@pytest.mark.ranks
def test_the_group_is_given_back(answers: list[dict[str, Any]]) -> None:
    assert [answer["closed"] for answer in answers] == [1, 1, 1]


def test_one_process_needs_no_group() -> None:
    comparison = Comparison(timeout_s=1)
    assert (comparison.rank, comparison.world_size) == (0, 1)
    assert comparison.agree([1, SMALLEST]) == [True, True]
    assert comparison.gather("x") == ["x"]
    assert comparison.localize(torch.ones(2), 0) is None
    comparison.close()
