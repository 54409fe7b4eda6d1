"""Takes the checksums of one rank around each update, and knows how they were before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl_sync.audit.baseline import FrozenBaseline
from trl_sync.audit.config import AuditConfig
from trl_sync.audit.diagnose import BATCH_STATISTICS
from trl_sync.audit.digest import ABSENT, Digester
from trl_sync.audit.findings import Cause, Scope
from trl_sync.audit.inventory import Inventory
from trl_sync.audit.liveness import Liveness, Motion
from trl_sync.audit.named_tensors import NamedTensors
from trl_sync.audit.roles import LocalFinding, RoleWatch, check_roles
from trl_sync.audit.sharding import Reach
from trl_sync.audit.snapshot import Checksums, Kind, Slot, Snapshot, Taken


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """How the trainable parameters of a snapshot changed, by the checksums before it.

    `edited`: between the last update and this one; `added`: not there then; `unmoved`: by the
    update itself. `edited_shards` are those of `edited` that no other rank holds.
    """

    edited: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()
    unmoved: frozenset[str] = frozenset()
    edited_shards: frozenset[str] = frozenset()


@dataclass(slots=True)
class _BeforeUpdate:
    taken: dict[Slot, Taken] = field(default_factory=dict)
    expected: dict[str, Motion] = field(default_factory=dict)
    gradient_norms: list[Tensor | None] | None = None


class Snapshotter:
    """Snapshots of one rank: call `before_update`, `after_update`, or `full`, then `resolve`.

    `alone`: there is no other rank. What the parameters were after the last update then stands for
    what they are before the next: an edit in between could be seen, but compared with nothing.
    """

    def __init__(
        self,
        inventory: Inventory,
        config: AuditConfig,
        scopes: Sequence[Scope],
        *,
        has_gradients: bool = True,
        alone: bool = False,
    ) -> None:
        self.inventory = inventory
        self._alone = alone
        # Without them nothing says what should have moved.
        self._has_gradients = has_gradients
        self._scopes = frozenset(scopes)
        self._cover_steps = config.frozen_cover_steps
        self.baseline = FrozenBaseline(
            config.frozen_cover_steps,
            [scope for scope in (Scope.FROZEN, Scope.QUANTIZATION) if scope in self._scopes],
        )
        self._roles = RoleWatch()
        self._liveness = Liveness()
        self._digesters: dict[Slot, Digester] = {}
        self._before = _BeforeUpdate()
        self._num_audits = 0
        self._last: tuple[Sequence[str], list[bytes]] | None = None
        self._known_version = -1
        self._tensors_replaced = False
        self._optimizer_size = -1
        self._underflowed: set[str] = set()
        self.declared_sync: str | None = None
        # A verdict that comes late finds other gradients in their place.
        self.keeps_gradient_norms = False

    def close(self) -> None:
        """Removes every hook."""
        self._roles.close()
        self.inventory.close()

    def before_update(self, *, updated_since: bool = False) -> None:
        """Gradients as they will be used, and the parameters they will be applied to.

        `updated_since`: there was an update after the last snapshot.
        """
        self._follow_inventory()
        trainable, inventory = self.inventory.trainable, self.inventory
        self._before = _BeforeUpdate()
        if Scope.TRAINABLE in self._scopes:
            named = inventory.looked_at(Scope.TRAINABLE)
            if updated_since or not self._knows(named.names):
                self._take_named(self._before.taken, Slot.BEFORE, named)
            if self._has_gradients:
                self._before.expected = self._liveness.expect(
                    trainable.names, trainable.tensors, inventory.learning_rates
                )
        if Scope.GRADIENTS in self._scopes:
            gradients, named = inventory.gradients(), inventory.looked_at(Scope.TRAINABLE)
            self._take(self._before.taken, Slot.GRADIENTS, named.names, gradients, named.reaches())
            if self.keeps_gradient_norms:
                self._before.gradient_norms = _norms(gradients)

    def after_update(self, step: int, audit: int, updates: int) -> Snapshot:
        """The updated parameters and the next slice of the frozen state."""
        snapshot = Snapshot(
            kind=Kind.UPDATE,
            step=step,
            audit=audit,
            updates=updates,
            taken=self._before.taken,
            expected=self._before.expected,
            gradient_norms=self._before.gradient_norms,
        )
        self._before = _BeforeUpdate()
        self._num_audits += 1
        self._take_parameters(snapshot, Slot.AFTER)
        snapshot.frozen = self.baseline.start_next(step)
        if self._num_audits % self._cover_steps == 0:
            self._take_rest(snapshot)
            snapshot.local += self._check_roles()
        snapshot.local += self._pending_local()
        return snapshot

    def full(self, kind: Kind, step: int, audit: int, updates: int) -> Snapshot:
        """Everything there is, all of the frozen state included."""
        self._follow_inventory(force=True)
        snapshot = Snapshot(
            kind=kind,
            step=step,
            audit=audit,
            updates=updates,
        )
        self._take_parameters(snapshot, Slot.BEFORE)
        snapshot.frozen = self.baseline.start_all(step)
        self._take_rest(snapshot)
        snapshot.local += self._check_roles()
        snapshot.local += self._pending_local()
        return snapshot

    def resolve(self, snapshot: Snapshot) -> tuple[Checksums, History]:
        """The checksums of `snapshot`, waited for, and what they say about the past.

        Adds to `snapshot.local` what they say of frozen tensors and of liveness.
        """
        names = {slot: taken.names for slot, taken in snapshot.taken.items()}
        digests = {slot: taken.pending.result() for slot, taken in snapshot.taken.items()}
        if Slot.AFTER in names and Slot.BEFORE not in names and self._last is not None:
            names[Slot.BEFORE], digests[Slot.BEFORE] = self._last
        reaches = {
            slot: taken.reaches
            for slot, taken in snapshot.taken.items()
            if taken.reaches is not None
        }
        checksums = Checksums(names=names, digests=digests, reaches=reaches)
        self._resolve_frozen(snapshot, checksums)
        history = self._history(snapshot, checksums)
        if snapshot.kind is Kind.UPDATE and snapshot.updates:
            snapshot.local += self._dead_parameters(snapshot, checksums, history)
        newest = Slot.AFTER if Slot.AFTER in digests else Slot.BEFORE
        if newest in digests:
            self._last = (names[newest], digests[newest])
        return checksums, history

    def _knows(self, names: Sequence[str]) -> bool:
        """Whether the last checksums of the parameters of these names hold until their update."""
        return self._alone and self._last is not None and self._last[0] == names

    def forget_parameters(self) -> None:
        """The trainable parameters were set on purpose: what they were before says nothing."""
        self._last = None

    def forget(self) -> None:
        """All state was set on purpose: comparisons with the past are void."""
        self.forget_parameters()
        self.baseline.forget()

    def gradient_norms(self, snapshot: Snapshot) -> dict[str, float]:
        """The norm of each gradient, 0.0 where there is none; asked when something differs."""
        names = self.inventory.looked_at(Scope.TRAINABLE).names
        if snapshot.gradient_norms is not None:
            kept = [0.0 if norm is None else float(norm) for norm in snapshot.gradient_norms]
            return dict(zip(names, kept, strict=False))
        gradients = self.inventory.gradients()
        norms = [0.0 if g is None else float(g.detach().double().norm()) for g in gradients]
        return dict(zip(names, norms, strict=True))

    def _follow_inventory(self, force: bool = False) -> None:
        self.inventory.refresh(force)
        if self.inventory.version != self._known_version:
            self._known_version = self.inventory.version
            self._tensors_replaced |= self.baseline.cut(self.inventory)
            self._digesters = {}
            if Scope.ROLES in self._scopes:
                self._roles.listen(self.inventory)
                self._optimizer_size = -1

    def _take(
        self,
        taken: dict[Slot, Taken],
        slot: Slot,
        names: Sequence[str],
        tensors: Sequence[Tensor | None],
        reaches: Sequence[Reach] | None = None,
    ) -> None:
        digester = self._digesters.setdefault(slot, Digester())
        taken[slot] = Taken(names=names, pending=digester.start(tensors), reaches=reaches)

    def _take_named(self, taken: dict[Slot, Taken], slot: Slot, named: NamedTensors) -> None:
        self._take(taken, slot, named.names, named.own(), named.reaches())

    def _take_parameters(self, snapshot: Snapshot, slot: Slot) -> None:
        if Scope.TRAINABLE in self._scopes:
            self._take_named(snapshot.taken, slot, self.inventory.looked_at(Scope.TRAINABLE))

    def _take_rest(self, snapshot: Snapshot) -> None:
        """What is looked at once in `frozen_cover_steps`."""
        if Scope.OPTIMIZER in self._scopes:
            self._take_state(snapshot, Slot.OPTIMIZER, self.inventory.optimizer_state())
        if Scope.BUFFERS in self._scopes:
            self._take_state(
                snapshot, Slot.BUFFERS, _without_batch_statistics(self.inventory.buffers)
            )
        if Scope.RNG in self._scopes:
            self._take(snapshot.taken, Slot.RNG, ["cpu"], [torch.get_rng_state()])

    def _take_state(self, snapshot: Snapshot, slot: Slot, named: NamedTensors) -> None:
        """What moves in every update: nothing can be said of shards that no other rank holds."""
        own = named.own()
        if not named.is_plain:
            pairs = zip(own, named.layouts, strict=True)
            own = [None if layout.reach is Reach.SELF else tensor for tensor, layout in pairs]
        self._take(snapshot.taken, slot, named.names, own, named.reaches())

    def _check_roles(self) -> list[LocalFinding]:
        return check_roles(self.inventory) if Scope.ROLES in self._scopes else []

    def _pending_local(self) -> list[LocalFinding]:
        if Scope.ROLES not in self._scopes:
            return []
        found = self._roles.drain()
        size = len(self.inventory.optimizer_parameters())
        if size != self._optimizer_size:
            # The optimizer or the model got or lost parameters since the last look.
            self._optimizer_size = size
            found += [new for new in self._check_roles() if new not in found]
        return found

    def _resolve_frozen(self, snapshot: Snapshot, checksums: Checksums) -> None:
        if snapshot.frozen is None:
            return
        pieces, digests = snapshot.frozen.pieces, snapshot.frozen.pending.result()
        for slot in (Slot.FROZEN, Slot.QUANTIZATION):
            chosen = [
                (piece, digest)
                for piece, digest in zip(pieces, digests, strict=True)
                if piece.scope == slot.scope
            ]
            checksums.names[slot] = [piece.label for piece, _ in chosen]
            checksums.digests[slot] = [digest for _, digest in chosen]
            checksums.reaches[slot] = [piece.reach for piece, _ in chosen]
        # Replaced tensors are all looked at now, by this rank for itself: the slices of the ranks
        # must stay in step.
        if self.baseline.compare(pieces, digests) or self._tensors_replaced:
            snapshot.local += self._moved(snapshot)

    def _moved(self, snapshot: Snapshot) -> list[LocalFinding]:
        """What moved of the whole frozen state, now that a slice did; if declared, from here on."""
        self._tensors_replaced = False
        everything = self.baseline.start_all(snapshot.step)
        assert everything is not None
        digests, num_pieces = everything.pending.result(), len(everything.pieces)
        changed = self.baseline.compare(everything.pieces, digests)
        changed += [piece for piece in self.baseline.reshaped if piece not in changed]
        self.baseline.reshaped = []
        if self.declared_sync is not None:
            self.baseline.accept(everything.pieces, digests)
        findings = []
        for scope, cause in (
            (Scope.FROZEN, Cause.FROZEN_CHANGED),
            (Scope.QUANTIZATION, Cause.QUANTIZATION_CHANGED),
        ):
            pieces = [piece for piece in changed if piece.scope is scope]
            if not pieces:
                continue
            size = sum(piece.size_bytes for piece in pieces)
            text = (
                f"Not as it was when first seen: {len(pieces)} of {num_pieces} checked pieces, "
                f"{size:,} bytes in {len({piece.name for piece in pieces})} tensor(s)."
            )
            if self.declared_sync is not None:
                text += f" Declared: {self.declared_sync}."
            findings.append(
                LocalFinding(
                    cause=cause,
                    scope=scope,
                    tensors=tuple(dict.fromkeys(piece.name for piece in pieces)),
                    evidence=text,
                    fatal=self.declared_sync is None,
                    last_equal_step=snapshot.frozen.last_step if snapshot.frozen else None,
                    # A rank that sees its own part move looks at all, and accepts all: even what
                    # every rank holds is then seen to move at different audits.
                    in_parts=any(p.reach is not Reach.ALL for p in everything.pieces),
                )
            )
        return findings

    def _history(self, snapshot: Snapshot, checksums: Checksums) -> History:
        names = checksums.names.get(Slot.BEFORE)
        if names is None:
            return History()
        before, after = checksums.digests[Slot.BEFORE], checksums.digests.get(Slot.AFTER)
        edited: frozenset[str] = frozenset()
        added: frozenset[str] = frozenset()
        if self._last is not None:
            last_names, last = self._last
            if last_names is names or last_names == names:
                # One comparison of two lists on the healthy path.
                pairs = zip(names, last, before, strict=True) if last != before else ()
                changed = frozenset(n for n, then, now in pairs if _moved(then, now))
            else:
                known = dict(zip(last_names, last, strict=True))
                now_by_name = dict(zip(names, before, strict=True))
                added = frozenset(now_by_name) - frozenset(known)
                changed = frozenset(
                    n for n, now in now_by_name.items() if _moved(known.get(n, now), now)
                )
            # After several updates since, or before the first, a change is none.
            edited = changed if snapshot.updates == (snapshot.kind is Kind.UPDATE) else edited
        after_names = checksums.names.get(Slot.AFTER)
        unmoved: frozenset[str] = frozenset()
        if after is not None and (after_names is names or after_names == names):
            still = zip(names, before, after, strict=True)
            unmoved = frozenset(name for name, then, now in still if then == now)
        return History(
            edited=edited,
            added=added,
            unmoved=unmoved,
            edited_shards=edited.intersection(checksums.by_name(Slot.BEFORE, Reach.SELF))
            if edited
            else edited,
        )

    def _dead_parameters(
        self, snapshot: Snapshot, checksums: Checksums, history: History
    ) -> list[LocalFinding]:
        names = checksums.names.get(Slot.BEFORE, ())
        stuck, underflowed = self._liveness.observe(names, history.unmoved, snapshot.expected)
        underflowed = [name for name in underflowed if name not in self._underflowed]
        self._underflowed.update(underflowed)
        findings = []
        if stuck:
            findings.append(
                LocalFinding(
                    cause=Cause.NEVER_UPDATED,
                    scope=Scope.TRAINABLE,
                    tensors=tuple(stuck),
                    evidence="It has had clear gradients and a positive learning rate, and its "
                    "bytes did not change.",
                )
            )
        if underflowed:
            findings.append(
                LocalFinding(
                    cause=Cause.NEVER_UPDATED,
                    scope=Scope.TRAINABLE,
                    tensors=tuple(underflowed),
                    evidence="Its updates are smaller than the rounding of its 16-bit type.",
                    fatal=False,
                )
            )
        return findings


def _moved(then: bytes, now: bytes) -> bool:
    """True if both are checksums, and different: ZeRO-3 may have gathered a tensor only now."""
    return then != now and ABSENT not in (then, now)


def _norms(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The norm of each gradient, on its device and without waiting for it."""
    present = [g.detach() for g in gradients if g is not None]
    # The kernel that torch's own gradient clipping uses; it has no public name (torch 2.13).
    norms = iter(torch._foreach_norm(present) if present else ())
    return [None if g is None else next(norms) for g in gradients]


def _without_batch_statistics(buffers: NamedTensors) -> NamedTensors:
    kept = NamedTensors()
    for name, buffer, layout in zip(buffers.names, buffers.tensors, buffers.layouts, strict=True):
        if name.rpartition(".")[2] not in BATCH_STATISTICS:
            kept.add(name, buffer, layout)
    return kept
