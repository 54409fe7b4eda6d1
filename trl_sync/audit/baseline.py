"""Frozen tensors against what they were at the start, a slice of their bytes per audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trl_sync.audit.digest import Digester, PendingDigests
from trl_sync.audit.findings import Scope
from trl_sync.audit.inventory import Inventory

# Larger tensors are cut, so that no audit pays for a whole embedding matrix. Fixed, so that a piece
# keeps its checksum when other tensors come and go. A multiple of every word the checksums read.
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes [start, stop) of a frozen tensor or of its quantization state."""

    scope: Scope
    name: str
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start

    @property
    def label(self) -> str:
        """The key of this piece wherever checksums are listed by name."""
        return f"{self.name}[{self.start}:{self.stop}]"


@dataclass(slots=True)
class _Slice:
    pieces: list[Piece]
    tensors: list[Tensor]
    digester: Digester
    last_step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceChecksums:
    """Checksums under way of one slice, or of everything (`last_step` is then the oldest)."""

    pieces: tuple[Piece, ...]
    pending: PendingDigests
    last_step: int | None


class FrozenBaseline:
    """Remembers the checksum of every piece of the frozen state, and checks a slice at a time.

    Within `cover_steps` calls of `start_next` every byte has been looked at.
    """

    def __init__(self, cover_steps: int, scopes: Sequence[Scope]) -> None:
        self._cover_steps = cover_steps
        self._scopes = tuple(scopes)
        self._slices: list[_Slice] = []
        self._next = 0
        self._baseline: dict[Piece, bytes] = {}
        # Tensors that now have other bytes in number, and weights with other quantization state.
        self.reshaped: list[Piece] = []

    def cut(self, inventory: Inventory) -> bool:
        """Divides the frozen state of `inventory`; call it when the inventory's version moved.

        True if a tensor that was there before has been replaced by another.
        """
        pieces = [
            (piece, tensor)
            for scope, tensors in (
                (Scope.FROZEN, inventory.frozen),
                (Scope.QUANTIZATION, inventory.quantization),
            )
            if scope in self._scopes
            for name, tensor in tensors.items()
            for piece in _pieces(scope, name, tensor.numel() * tensor.element_size())
        ]
        total = sum(piece.size_bytes for piece, _ in pieces)
        target = max(1, -(-total // self._cover_steps))
        slices: dict[int, list[tuple[Piece, Tensor]]] = {}
        done = 0
        for piece, tensor in pieces:
            slices.setdefault(min(done // target, self._cover_steps - 1), []).append(
                (piece, tensor)
            )
            done += piece.size_bytes
        before = [piece for part in self._slices for piece in part.pieces]
        self.reshaped += _reshaped(before, [piece for piece, _ in pieces])
        known = {
            p: id(t)
            for part in self._slices
            for p, t in zip(part.pieces, part.tensors, strict=True)
        }
        replaced = any(known.get(piece, id(tensor)) != id(tensor) for piece, tensor in pieces)
        self._slices = [_slice(members) for members in slices.values()]
        present = {piece: None for piece, _ in pieces}
        if list(present) != before:
            # Other pieces on every rank alike, or the schema tells. If only their tensors are new,
            # the turn stays: one rank may notice that before the others.
            self._next = 0
        self._baseline = {p: d for p, d in self._baseline.items() if p in present}
        return replaced or bool(self.reshaped)

    def start_next(self, step: int) -> SliceChecksums | None:
        """Begins the next slice; None if nothing is frozen."""
        if not self._slices:
            return None
        part = self._slices[self._next]
        self._next = (self._next + 1) % len(self._slices)
        checksums = SliceChecksums(
            pieces=tuple(part.pieces),
            pending=part.digester.start(part.tensors),
            last_step=part.last_step,
        )
        part.last_step = step
        return checksums

    def start_all(self, step: int) -> SliceChecksums | None:
        """Begins all slices at once."""
        if not self._slices:
            return None
        pieces = tuple(piece for part in self._slices for piece in part.pieces)
        tensors = [tensor for part in self._slices for tensor in part.tensors]
        last = [part.last_step for part in self._slices]
        for part in self._slices:
            part.last_step = step
        return SliceChecksums(
            pieces=pieces,
            pending=Digester([(p.start, p.stop) for p in pieces]).start(tensors),
            last_step=None if None in last else min(s for s in last if s is not None),
        )

    def compare(self, pieces: Sequence[Piece], digests: Sequence[bytes]) -> list[Piece]:
        """The pieces that moved since they were first seen; new ones are remembered."""
        changed = []
        for piece, digest in zip(pieces, digests, strict=True):
            if self._baseline.setdefault(piece, digest) != digest:
                changed.append(piece)
        return changed

    def forget(self) -> None:
        """Every piece counts as new."""
        self._baseline.clear()

    def accept(self, pieces: Sequence[Piece], digests: Sequence[bytes]) -> None:
        """Takes these checksums as the baseline from now on."""
        self._baseline.update(zip(pieces, digests, strict=True))

    def size_bytes(self, name: str | None = None) -> int:
        """Bytes of the tensor `name`, or of everything that is frozen."""
        return sum(
            piece.size_bytes
            for part in self._slices
            for piece in part.pieces
            if name is None or piece.name == name
        )


def _reshaped(before: Sequence[Piece], after: Sequence[Piece]) -> list[Piece]:
    """The first new piece of each tensor, or quantized weight, that is there before and after but
    made of other pieces. Tensors that only come or go, such as a frozen adapter, are none.
    """
    old, new = _by_owner(before), _by_owner(after)
    return [new[owner][0] for owner in new if owner in old and old[owner] != new[owner]]


def _by_owner(pieces: Sequence[Piece]) -> dict[tuple[Scope, str], list[Piece]]:
    owners: dict[tuple[Scope, str], list[Piece]] = {}
    for piece in pieces:
        quantized = piece.scope is Scope.QUANTIZATION
        owner = piece.name.rpartition(".")[0] if quantized else piece.name
        owners.setdefault((piece.scope, owner), []).append(piece)
    return owners


def _pieces(scope: Scope, name: str, size_bytes: int) -> list[Piece]:
    starts = range(0, max(size_bytes, 1), PIECE_BYTES)
    return [
        Piece(scope=scope, name=name, start=start, stop=min(start + PIECE_BYTES, size_bytes))
        for start in starts
    ]


def _slice(members: list[tuple[Piece, Tensor]]) -> _Slice:
    pieces = [piece for piece, _ in members]
    return _Slice(
        pieces=pieces,
        tensors=[tensor for _, tensor in members],
        digester=Digester([(piece.start, piece.stop) for piece in pieces]),
    )
