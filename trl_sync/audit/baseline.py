"""Frozen tensors against what they were at the start, a slice of their bytes per audit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from trl_sync.audit.digest import Digester, PendingDigests
from trl_sync.audit.findings import Scope
from trl_sync.audit.inventory import Inventory
from trl_sync.audit.sharding import Form, Reach, own_bytes

# Larger tensors are cut, so that no audit pays for a whole embedding matrix. Fixed, so that a piece
# keeps its checksum when other tensors come and go. A multiple of every word the checksums read.
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes [start, stop) of what this rank holds of a frozen tensor or its quantization state."""

    scope: Scope
    name: str
    start: int
    stop: int
    reach: Reach = Reach.ALL

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start

    @property
    def label(self) -> str:
        """The key of this piece wherever checksums are listed by name."""
        return f"{self.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A frozen tensor, and where the bytes lie that this rank holds of it."""

    tensor: Tensor
    form: Form


@dataclass(slots=True)
class _Slice:
    pieces: list[Piece]
    held: list[_Held]
    digester: Digester
    last_step: int | None = None


class _Ring:
    """Slices that are looked at one after the other, and then again from the first."""

    def __init__(self, slices: list[_Slice], at: int) -> None:
        self.slices = slices
        self.at = at

    def turn(self) -> _Slice:
        part = self.slices[self.at]
        self.at = (self.at + 1) % len(self.slices)
        return part


@dataclass(frozen=True, slots=True)
class JoinedDigests:
    """Checksums under way of several slices, one after the other."""

    parts: tuple[PendingDigests, ...]

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    def result(self) -> list[bytes]:
        """One checksum for each piece; waits for the GPU if it was used."""
        return [digest for part in self.parts for digest in part.result()]


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceChecksums:
    """Checksums under way of some slices (`last_step` is that of the one not seen for longest)."""

    pieces: tuple[Piece, ...]
    pending: JoinedDigests
    last_step: int | None


class FrozenBaseline:
    """Remembers the checksum of every piece of the frozen state, and checks a slice at a time.

    Within `cover_steps` calls of `start_next` every byte has been looked at. What all ranks hold,
    what replicas hold and what this rank holds alone go round separately: the first must be cut
    alike on all ranks, whatever the sizes of their shards.
    """

    def __init__(self, cover_steps: int, scopes: Sequence[Scope]) -> None:
        self._cover_steps = cover_steps
        self._scopes = tuple(scopes)
        self._rings: dict[Reach, _Ring] = {}
        self._baseline: dict[Piece, bytes] = {}
        # Tensors that now have other bytes in number, and weights with other quantization state.
        self.reshaped: list[Piece] = []

    def cut(self, inventory: Inventory) -> bool:
        """Divides the frozen state of `inventory`; call it when the inventory's version moved.

        True if a tensor that was there before has been replaced by another.
        """
        members = list(self._members(inventory))
        old = self._rings
        before = [piece for part in self._slices() for piece in part.pieces]
        self.reshaped += _reshaped(before, [piece for piece, _ in members])
        known = {
            p: id(held.tensor)
            for part in self._slices()
            for p, held in zip(part.pieces, part.held, strict=True)
        }
        replaced = any(known.get(p, id(held.tensor)) != id(held.tensor) for p, held in members)
        self._rings = {}
        for reach in Reach:
            own = [member for member in members if member[0].reach is reach]
            if own:
                # If only the tensors of a ring are new, its turn stays: one rank may notice that
                # before the others. Other pieces come on every rank alike, or the schema tells.
                ring = old.get(reach)
                same = ring is not None and [p for p, _ in own] == _pieces_of(ring)
                at = ring.at if ring is not None and same else 0
                self._rings[reach] = _Ring(_slices(own, self._cover_steps), at)
        present = {piece for piece, _ in members}
        self._baseline = {p: d for p, d in self._baseline.items() if p in present}
        return replaced or bool(self.reshaped)

    def _members(self, inventory: Inventory) -> Iterator[tuple[Piece, _Held]]:
        for scope in (Scope.FROZEN, Scope.QUANTIZATION):
            if scope not in self._scopes:
                continue
            tensors = inventory.looked_at(scope)
            for name, tensor, layout in zip(
                tensors.names, tensors.tensors, tensors.layouts, strict=True
            ):
                held = _Held(tensor=tensor, form=layout.form)
                for piece in _pieces(scope, name, _size_bytes(held), layout.reach):
                    yield piece, held

    def _slices(self) -> list[_Slice]:
        return [part for ring in self._rings.values() for part in ring.slices]

    def start_next(self, step: int) -> SliceChecksums | None:
        """Begins the next slices; None if nothing is frozen."""
        parts = [ring.turn() for ring in self._rings.values()]
        if not parts:
            return None
        return _start(parts, step, [part.digester for part in parts])

    def start_all(self, step: int) -> SliceChecksums | None:
        """Begins all slices at once."""
        parts = self._slices()
        if not parts:
            return None
        return _start(parts, step, [_digester(part.pieces) for part in parts])

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
            for part in self._slices()
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


def _pieces(scope: Scope, name: str, size_bytes: int, reach: Reach) -> list[Piece]:
    starts = range(0, max(size_bytes, 1), PIECE_BYTES)
    return [
        Piece(
            scope=scope,
            name=name,
            start=start,
            stop=min(start + PIECE_BYTES, size_bytes),
            reach=reach,
        )
        for start in starts
    ]


def _pieces_of(ring: _Ring) -> list[Piece]:
    return [piece for part in ring.slices for piece in part.pieces]


def _size_bytes(held: _Held) -> int:
    own = own_bytes(held.tensor, held.form)
    return 0 if own is None else own.numel() * own.element_size()


def _slices(members: Sequence[tuple[Piece, _Held]], cover_steps: int) -> list[_Slice]:
    """`members` in at most `cover_steps` slices of about the same size."""
    total = sum(piece.size_bytes for piece, _ in members)
    target = max(1, -(-total // cover_steps))
    slices: dict[int, _Slice] = {}
    done = 0
    for piece, held in members:
        part = slices.setdefault(min(done // target, cover_steps - 1), _Slice([], [], Digester()))
        part.pieces.append(piece)
        part.held.append(held)
        done += piece.size_bytes
    for part in slices.values():
        part.digester = _digester(part.pieces)
    return list(slices.values())


def _digester(pieces: Sequence[Piece]) -> Digester:
    return Digester([(piece.start, piece.stop) for piece in pieces])


def _start(parts: Sequence[_Slice], step: int, digesters: Sequence[Digester]) -> SliceChecksums:
    pending = tuple(
        digester.start([own_bytes(held.tensor, held.form) for held in part.held])
        for part, digester in zip(parts, digesters, strict=True)
    )
    last = [part.last_step for part in parts]
    for part in parts:
        part.last_step = step
    return SliceChecksums(
        pieces=tuple(piece for part in parts for piece in part.pieces),
        pending=JoinedDigests(pending),
        last_step=None if None in last else min(s for s in last if s is not None),
    )
