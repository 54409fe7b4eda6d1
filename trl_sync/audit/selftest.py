"""Proof at the start of a run that the audit sees a flipped bit here."""

from __future__ import annotations

import time
from collections.abc import Collection

import torch

from trl_sync.audit.compare import Comparison
from trl_sync.audit.digest import Digester
from trl_sync.errors import AuditError

FLIPPED_WORD, FLIPPED_BIT = 137, 5


def self_test(comparison: Comparison, devices: Collection[str]) -> float:
    """Seconds it took to see one flipped bit of a scratch tensor on the last rank. Collective.

    Each type of device has checksums of its own, so `devices` are tested one after another.

    Checkers of this kind have reported "all equal" for months because they compared nothing, so
    first a healthy tensor must pass, then a flipped one must not, and the flip must be located.

    Raises:
        AuditError: on every rank, if the audit does not see it, or sees what is not there.
    """
    started_s = time.perf_counter()
    for device in devices:
        _test_on(comparison, device)
    return time.perf_counter() - started_s


def _test_on(comparison: Comparison, device: str) -> None:
    scratch, digester = torch.arange(256, dtype=torch.int32, device=device), Digester()
    clean = digester.start([scratch]).result()[0]
    silent = all(comparison.agree(_words(clean)))
    flipping = comparison.rank == comparison.world_size - 1
    if flipping:
        scratch[FLIPPED_WORD] ^= 1 << FLIPPED_BIT
    changed = digester.start([scratch]).result()[0]
    if comparison.world_size == 1:
        seen, located = changed != clean, True
    else:
        seen = not all(comparison.agree(_words(changed)))
        difference = comparison.localize(scratch, reference_rank=0)
        located = difference is not None and (difference.index, difference.num_different) == (
            (FLIPPED_WORD,),
            1,
        )
    if not (silent and seen and located):
        raise AuditError(
            f"The audit's self-test on {device} failed: "
            f"equal tensors compared {'equal' if silent else 'different'}, one flipped bit was "
            f"{'seen' if seen else 'not seen'} and {'located' if located else 'not located'}. Its "
            "silence would mean nothing, so training does not start. Please report this with your "
            "versions; self_test=False starts without."
        )


def _words(digest: bytes) -> list[int]:
    return [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8)]
