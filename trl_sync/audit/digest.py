"""The tensors of one rank -> checksums of their bytes. Pure: no collective, no random number.

A digest covers a tensor's bytes in the logical order of its elements and their number, and nothing
else: equal values digest alike in every memory layout. Names, shapes and dtypes belong in the
schema checksum that the comparison sends along. On the CPU a digest is the tensor's xxh3-128; on a
GPU it is computed there, by `digest_gpu`. The two differ, so ranks compare `algorithm` too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from trl_sync.audit.digest_gpu import GPU_ALGORITHM, DeviceDigester, DeviceDigests
from trl_sync.audit.tensor_bytes import PLAIN_TYPES, Piece, byte_array, host_bytes, pieces

__all__ = [
    "ABSENT",
    "CPU_ALGORITHM",
    "GPU_ALGORITHM",
    "Digester",
    "PendingDigests",
    "combine",
    "digests",
    "host_bytes",
    "xxh3",
]

CPU_ALGORITHM = "xxh3-128/1"
# The digest of None, such as a gradient that is not there.
ABSENT = b"trl_sync: absent"

# The address and size of a CPU tensor, a view of its bytes in range, their number.
_View = tuple[int, int, Any, int]
# A list of digests and the index in it that one of them belongs at.
_Place = tuple[list[bytes], int]


class Digester:
    """Checksums of lists of tensors; what can be kept between calls is kept.

    Kept are addresses, sizes and views by position in the list, never a tensor. Each call compares
    them with the tensors it is given, so that these may be replaced, moved or resized.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[int, int] | None] | None = None,
        *,
        kernel_devices: Collection[str] = ("cuda",),
    ) -> None:
        """Takes the byte range [start, stop) of each tensor to hash; None: the whole tensor.

        A GPU reads fastest where starts are multiples of 16. `kernel_devices` are the types of
        device whose tensors go through the GPU's algorithm.
        """
        self._ranges = None if ranges is None else list(ranges)
        self._kernel_devices = frozenset(kernel_devices)
        self._views: list[_View | None] = []
        self._on_devices: dict[torch.device, DeviceDigester] = {}

    def start(self, tensors: Sequence[Tensor | None]) -> PendingDigests:
        """Hashes CPU tensors at once; launches GPU work on the current stream without waiting.

        Work queued later on that stream may change or free the tensors.

        Raises:
            TypeError: a tensor is sparse, nested, quantized or without data in memory.
            ValueError: a range does not lie in its tensor, or there are not as many as tensors.
        """
        views = self._views_for(tensors)
        found: list[bytes] = []
        unseen: list[int] = []
        size_bytes = 0
        hash_bytes = xxhash.xxh3_128_digest
        hashes_whole_host_tensors = self._ranges is None and "cpu" not in self._kernel_devices
        for position, tensor in enumerate(tensors):
            view = views[position]
            if (
                view is not None
                and tensor is not None
                and type(tensor) in PLAIN_TYPES
                and tensor.data_ptr() == view[0]
                and tensor.nbytes == view[1]
                and tensor.is_contiguous()
                and not tensor.is_conj()
                and not tensor.is_neg()
            ):
                found.append(hash_bytes(view[2]))
                size_bytes += view[3]
            elif hashes_whole_host_tensors and tensor is not None and _is_plain_on_host(tensor):
                # Gradients are new tensors in every step: no detour for them.
                num_bytes, address = tensor.nbytes, tensor.data_ptr()
                data = byte_array(address, num_bytes)
                views[position] = (address, num_bytes, data, num_bytes)
                found.append(hash_bytes(data))
                size_bytes += num_bytes
            else:
                found.append(ABSENT)
                if tensor is not None:
                    unseen.append(position)
        pending = PendingDigests(found, size_bytes)
        if unseen:
            self._start_unseen(tensors, unseen, pending)
        return pending

    def _views_for(self, tensors: Sequence[Tensor | None]) -> list[_View | None]:
        if self._ranges is not None and len(self._ranges) != len(tensors):
            raise ValueError(
                f"Got {len(tensors)} tensors for {len(self._ranges)} byte ranges; expected one "
                "range for each tensor. Make a new Digester when the list of tensors changes."
            )
        if len(self._views) != len(tensors):
            self._views = [None] * len(tensors)
        return self._views

    def _start_unseen(
        self, tensors: Sequence[Tensor | None], positions: list[int], pending: PendingDigests
    ) -> None:
        """Hashes the tensors at `positions`, of which no valid view was kept."""
        on_devices: dict[torch.device, list[tuple[_Place, Piece]]] = {}
        for position in positions:
            tensor = tensors[position]
            assert tensor is not None
            byte_range = None if self._ranges is None else self._ranges[position]
            inner = pieces(tensor, byte_range)
            inner_digests = pending.expect(position, inner)
            for index, piece in enumerate(inner):
                if piece.tensor.device.type in self._kernel_devices:
                    place = (inner_digests, index)
                    on_devices.setdefault(piece.tensor.device, []).append((place, piece))
                    continue
                data = _host_view(piece)
                inner_digests[index] = xxhash.xxh3_128_digest(data)
                # Of a copy, or of one of several inner tensors, the address says nothing later.
                if piece.tensor is tensor and piece.tensor.device.type == "cpu":
                    num_bytes = piece.stop - piece.start
                    self._views[position] = (tensor.data_ptr(), tensor.nbytes, data, num_bytes)
        for device, work in on_devices.items():
            digester = self._on_devices.setdefault(device, DeviceDigester(device))
            launched = digester.start([piece for _, piece in work])
            pending.launched.append((launched, [place for place, _ in work]))


def _is_plain_on_host(tensor: Tensor) -> bool:
    """True if the tensor's bytes lie in memory as they are, one after another."""
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


class PendingDigests:
    """Digests of which some may still be on their way from a GPU."""

    def __init__(self, found: list[bytes], size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.launched: list[tuple[DeviceDigests, list[_Place]]] = []
        self._found = found
        self._expected: list[tuple[int, list[bytes]]] = []

    def expect(self, position: int, inner: Sequence[Piece]) -> list[bytes]:
        """The list that takes the digests of the pieces of the tensor at `position`."""
        inner_digests = [ABSENT] * len(inner)
        self._expected.append((position, inner_digests))
        self.size_bytes += sum(piece.stop - piece.start for piece in inner)
        return inner_digests

    def result(self) -> list[bytes]:
        """16 bytes for each tensor, in the order given; waits for the GPU if it was used.

        ABSENT for None; of a wrapper with several inner tensors the digests are combined.
        """
        for launched, places in self.launched:
            for (inner_digests, index), digest in zip(places, launched.result(), strict=True):
                inner_digests[index] = digest
        for position, inner_digests in self._expected:
            several = len(inner_digests) != 1
            self._found[position] = combine(inner_digests) if several else inner_digests[0]
        self.launched, self._expected = [], []
        return list(self._found)


def digests(tensors: Sequence[Tensor | None]) -> list[bytes]:
    """16 bytes for each tensor, in the order given; waits for the GPU if there are any on it."""
    return Digester().start(tensors).result()


def combine(digests: Iterable[bytes]) -> bytes:
    """16 bytes for a sequence of digests, their order included: the root of a scope."""
    return xxhash.xxh3_128_digest(b"".join(digests))


def xxh3(tensor: Tensor) -> bytes:
    """The xxh3-128 of the tensor's bytes wherever it lies: what a manifest keeps.

    The digest that `digests` gives for the same tensor on the CPU.

    Raises:
        TypeError: the tensor is sparse, nested, quantized or without data in memory.
    """
    found = [xxhash.xxh3_128_digest(host_bytes(piece.tensor)) for piece in pieces(tensor)]
    return combine(found) if len(found) != 1 else found[0]


def _host_view(piece: Piece) -> Any:
    """The bytes of the piece, valid as long as the memory of its tensor, or a copy of its own."""
    tensor, start, stop = piece
    if tensor.device.type != "cpu":
        return host_bytes(tensor)[start:stop]
    return byte_array(tensor.data_ptr() + start, stop - start)
