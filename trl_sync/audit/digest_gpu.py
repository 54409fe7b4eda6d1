"""Checksums of tensors where they lie on a GPU: one launch for all, no wait for the device.

The bytes of a tensor are read as 32-bit little-endian words x_i, zeros behind the last byte. Each
of two lanes sums a_i x_i mod 2^64 with odd coefficients a_i = splitmix64(lane seed + i) | 1. A lane
of the digest is splitmix64(sum ^ splitmix64(lane seed ^ number of bytes)), a bijection of the sum.

A change confined to one 32-bit word is always detected: a_i is odd, so a_i times a difference that
is nonzero and smaller than 2^32 is nonzero mod 2^64. Any other change escapes one lane only if its
weighted differences sum to zero mod 2^64; were the coefficients uniform and independent, both lanes
would miss it with probability at most 2^-64. Integer sums are the same in any order, so that a
digest does not depend on the grid, the atomics or the device. It detects faults, not forgery.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from trl_sync.audit.tensor_bytes import Piece, pieces

GPU_ALGORITHM = "splitmix64-words-2x64/1"
# Digits of pi. Both lanes read the splitmix64 sequence, from starts so far apart that they never
# meet.
LANE_SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)
TILE_BYTES = 65536
REFERENCE_CHUNK_WORDS = 1 << 20


def reference_digests(
    tensors: Sequence[Tensor], ranges: Sequence[tuple[int, int] | None] | None = None
) -> list[bytes]:
    """The digests of the Triton kernel, bit for bit, computed with plain torch operations.

    Runs on any device. A wrapper subclass stands for its only inner tensor here.

    Raises:
        ValueError: a range does not lie in its tensor, or a wrapper has several inner tensors.
    """
    found = []
    for tensor, byte_range in zip(tensors, ranges or [None] * len(tensors), strict=True):
        inner = pieces(tensor, byte_range)
        if len(inner) != 1:
            raise ValueError(
                f"A {type(tensor).__name__} holds {len(inner)} inner tensors; expected one. "
                "Use Digester, which combines their digests."
            )
        found += inner
    if not found:
        return []
    lane_sums = torch.stack([_reference_lane_sums(piece).cpu() for piece in found])
    return _finish(lane_sums, [piece.stop - piece.start for piece in found])


class DeviceDigester:
    """Checksums of pieces of memory on one device; the table of tiles is kept between calls.

    With Triton one kernel launch serves all pieces. Without it the same digests come from torch
    operations, a few dozen launches for each piece; `backend` says which: "triton" or "torch".
    """

    def __init__(self, device: torch.device) -> None:
        self.backend = "torch" if _kernel() is None else "triton"
        self._device = device
        self._spans: list[tuple[int, int]] = []
        self._table: Tensor | None = None

    def start(self, found: Sequence[Piece]) -> DeviceDigests:
        """Launches the checksums on the current stream of the device and returns at once.

        Work queued later on that stream may change or free the tensors.
        """
        sizes = [piece.stop - piece.start for piece in found]
        if self._device.type != "cuda":
            return DeviceDigests(self._lane_sums(found, sizes), sizes, None)
        with torch.cuda.device(self._device):
            lane_sums = self._lane_sums(found, sizes)
            on_host = torch.empty(lane_sums.shape, dtype=torch.int64, pin_memory=True)
            on_host.copy_(lane_sums, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return DeviceDigests(on_host, sizes, copied)

    def _lane_sums(self, found: Sequence[Piece], sizes: list[int]) -> Tensor:
        kernel = _kernel()
        if kernel is None:
            return torch.stack([_reference_lane_sums(piece) for piece in found])
        spans = [
            (piece.tensor.data_ptr() + piece.start, size_bytes)
            for piece, size_bytes in zip(found, sizes, strict=True)
        ]
        if self._table is None or spans != self._spans:
            self._table = _to_device(tile_table(spans), self._device)
            self._spans = spans
        lane_sums = torch.zeros(len(found), 2, dtype=torch.int64, device=self._device)
        kernel.launch(self._table, lane_sums, LANE_SEEDS)
        return lane_sums


class DeviceDigests:
    """Checksums on their way from a device to the host."""

    def __init__(
        self, lane_sums: Tensor, sizes: list[int], copied: torch.cuda.Event | None
    ) -> None:
        self._lane_sums = lane_sums
        self._sizes = sizes
        self._copied = copied

    def result(self) -> list[bytes]:
        """16 bytes for each piece; waits until the device has computed and copied them."""
        if self._copied is not None:
            self._copied.synchronize()
        return _finish(self._lane_sums, self._sizes)


def tile_table(spans: Sequence[tuple[int, int]]) -> Tensor:
    """Rows (address, index of the first word, number of bytes, span) that cut up the spans.

    A span is (address, number of bytes); an empty one gets no row. int64, on the CPU.
    """
    addresses, sizes = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2).unbind(1)
    num_tiles = (sizes + TILE_BYTES - 1) // TILE_BYTES
    span = torch.arange(len(sizes)).repeat_interleave(num_tiles)
    first_tiles = num_tiles.cumsum(0) - num_tiles
    offset = (torch.arange(len(span)) - first_tiles[span]) * TILE_BYTES
    size = (sizes[span] - offset).clamp(max=TILE_BYTES)
    return torch.stack([addresses[span] + offset, offset // 4, size, span], dim=1)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    # From pageable memory the copy would wait for the device.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@functools.cache
def _kernel() -> ModuleType | None:
    """The module with the Triton kernel, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from trl_sync.audit import digest_kernel

    return digest_kernel


def _reference_lane_sums(piece: Piece) -> Tensor:
    """The two lane sums, int64 [2], on the device of the piece."""
    tensor, start, stop = piece
    words = _words(tensor, start, stop)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for lane, seed in enumerate(LANE_SEEDS):
        for first in range(0, len(words), REFERENCE_CHUNK_WORDS):
            chunk = words[first : first + REFERENCE_CHUNK_WORDS].long() & 0xFFFFFFFF
            index = torch.arange(first, first + len(chunk), device=tensor.device)
            sums[lane] += ((_splitmix64(index + _signed(seed)) | 1) * chunk).sum()
    return sums


def _words(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The bytes [start, stop) as int32 words with zeros behind the last byte; a copy."""
    storage = tensor.untyped_storage()
    first = tensor.storage_offset() * tensor.element_size() + start
    everything = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
    padded = torch.zeros(-(-(stop - start) // 4) * 4, dtype=torch.uint8, device=tensor.device)
    padded[: stop - start] = everything[first : first + stop - start]
    return padded.view(torch.int32)


def _finish(lane_sums: Tensor, sizes: Sequence[int]) -> list[bytes]:
    """The digests from their lane sums, int64 [N, 2] on the CPU, and numbers of bytes."""
    seeds = torch.tensor([_signed(seed) for seed in LANE_SEEDS])
    lengths = _splitmix64(seeds ^ torch.tensor(sizes)[:, None])
    lanes = _splitmix64(lane_sums ^ lengths).contiguous()
    everything = ctypes.string_at(lanes.data_ptr(), lanes.nbytes)
    return [everything[first : first + 16] for first in range(0, len(everything), 16)]


def _splitmix64(state: Tensor) -> Tensor:
    """The output of the splitmix64 generator at each state: int64 that wraps around.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014).
    """
    z = state + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, num_bits: int) -> Tensor:
    """The logical shift: int64's own copies the sign bit in from the left."""
    return (z >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _signed(constant: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant."""
    return constant - (1 << 64) if constant >> 63 else constant
