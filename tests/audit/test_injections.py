"""One million random faults in tensors and no checksum that misses one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

import injections
from injections import Digest
from trl_sync.audit.digest import Digester, host_bytes
from trl_sync.audit.digest_gpu import reference_digests

NUM_INJECTIONS = 1_000_000
NUM_REFERENCE_INJECTIONS = 12_800


def cpu_digest() -> Digest:
    digester = Digester()
    return lambda tensor: digester.start([tensor]).result()[0]


def reference_digest() -> Digest:
    return lambda tensor: reference_digests([tensor])[0]


def byte_sum_digest() -> Digest:
    return lambda tensor: sum(host_bytes(tensor)).to_bytes(8, "little")


def xor_digest() -> Digest:
    return lambda tensor: bytes(host_bytes(torch.hash_tensor(tensor)))


def inject_everywhere(make_digest: Callable[[], Digest], num_injections: int) -> tuple[int, int]:
    """How many faults were injected over all classes and dtypes, and how many were missed."""
    # In a process that does not check annotations at every call: this takes a seventh of the time.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        found = process.submit(count_by_cell, make_digest, num_injections).result()
    print(injections.table(found))
    return sum(count for count, _ in found.values()), sum(missed for _, missed in found.values())


def count_by_cell(
    make_digest: Callable[[], Digest], num_injections: int
) -> dict[tuple[str, str], tuple[int, int]]:
    cells = injections.cells()
    each = -(-num_injections // len(cells))
    return {cell: injections.inject(make_digest, *cell, each) for cell in cells}


@pytest.mark.slow
def test_one_million_faults_and_no_miss() -> None:
    count, missed = inject_everywhere(cpu_digest, NUM_INJECTIONS)
    assert count >= NUM_INJECTIONS
    assert missed == 0


@pytest.mark.slow
def test_the_gpu_checksum_misses_none_either() -> None:
    count, missed = inject_everywhere(reference_digest, NUM_REFERENCE_INJECTIONS)
    assert count >= NUM_REFERENCE_INJECTIONS
    assert missed == 0


@pytest.mark.parametrize(
    "make_digest, fault",
    [
        # Order counts for neither, and XOR cancels what occurs twice.
        (byte_sum_digest, "row permutation"),
        (byte_sum_digest, "swapped rows"),
        (byte_sum_digest, "transpose"),
        (xor_digest, "row permutation"),
        (xor_digest, "same bit in 2 words"),
        (xor_digest, "zeros for a constant"),
    ],
)
def test_a_weak_checksum_is_caught_by_the_same_injections(
    make_digest: Callable[[], Digest], fault: str
) -> None:
    count, missed = injections.inject(make_digest, fault, "float32", 200)
    assert count == 200
    assert missed > 40
