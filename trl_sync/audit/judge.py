"""A snapshot of every rank -> one report, the same on all of them."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import Tensor

from trl_sync._version import __version__
from trl_sync.audit.compare import Comparison
from trl_sync.audit.diagnose import Context, Evidence, diagnose
from trl_sync.audit.digest import CPU_ALGORITHM, GPU_ALGORITHM
from trl_sync.audit.findings import Cause, Finding, Scope, SyncReport
from trl_sync.audit.inventory import Inventory, values_of
from trl_sync.audit.sharding import Reach, local_tensor, own_bytes
from trl_sync.audit.snapshot import (
    Checksums,
    Kind,
    Slot,
    Snapshot,
    as_mask,
    checksum_of,
    differing_slots,
    header,
    read_header,
    root_words,
)
from trl_sync.audit.snapshotter import History, Snapshotter

_ALGORITHM_NAME = f"{CPU_ALGORITHM}, {GPU_ALGORITHM}, trl_sync {__version__}"
_ALGORITHM = checksum_of(_ALGORITHM_NAME)


class Judge:
    """Compares snapshots across ranks and, where they differ, finds out where and why.

    `expected_updates` is the number of optimizer steps between two audits. `replicas` compares
    this rank with those that hold the same shards. `updates_shards`: each rank updates a part of
    its own, so that what drives the update must be compared too.
    """

    def __init__(
        self,
        comparison: Comparison,
        snapshotter: Snapshotter,
        expected_updates: int,
        *,
        replicas: Comparison | None = None,
        updates_shards: bool = False,
    ) -> None:
        self.last_equal_step: int | None = None
        self.was_equal = self.parameters_were_equal = True
        # A shard that was edited and that nobody else holds is wrong from then on.
        self._damaged = False
        self._replicas = replicas
        self._updates_shards = updates_shards
        self._comparison = comparison
        self._snapshotter = snapshotter
        self._expected_updates = expected_updates
        self._schema: tuple[int, int, int] = (-1, 0, 0)

    @property
    def _inventory(self) -> Inventory:
        return self._snapshotter.inventory

    def judge(self, snapshot: Snapshot) -> tuple[SyncReport, History]:
        """The report on `snapshot`, and what this rank's parameters did since the last. Collective:
        one all-reduce if all is well, and one more among the replicas of shards.
        """
        started_s = time.perf_counter()
        checksums, history = self._snapshotter.resolve(snapshot)
        roots = checksums.roots()
        schema, num_tensors = self._schema_checksum()
        parted = self._compare_replicas(checksums)
        values = header(
            snapshot,
            roots,
            algorithm=_ALGORITHM,
            schema=schema,
            num_tensors=num_tensors,
            replicas=as_mask(parted),
            edited=checksum_of(sorted(history.edited_shards)) if history.edited_shards else 0,
            rates=checksum_of(self._learning_rates()) if self._updates_shards else 0,
        )
        counters, slots = read_header(self._comparison.agree(values))
        slots.discard(Slot.RNG)  # ranks may draw alike or not; the journal shows the checksum
        findings: tuple[Finding, ...] = ()
        if counters or slots or parted or snapshot.local:
            findings = self._investigate(snapshot, checksums, history, counters, slots, parted)
        self._damaged |= any(_is_edited_shard(finding) for finding in findings)
        # What only some ranks found by themselves, or edited of their own shards, parts nobody
        # unless it is fatal. A shard that all edited differs in its name if some have none of it.
        parting = counters - {"edited", "local"}
        report = SyncReport(
            step=snapshot.step,
            audit=snapshot.audit,
            findings=findings,
            roots={slot.value: root.hex() for slot, root in roots.items()},
            size_bytes=snapshot.size_bytes,
            seconds=time.perf_counter() - started_s,
            still_parted=bool(parting or (slots | parted) - {Slot.BUFFERS}) or self._damaged,
        )
        # A slice that is equal does not make up for another one that was not.
        whole = snapshot.kind in (Kind.BEGIN, Kind.FULL)
        parameters = {Slot.BEFORE, Slot.AFTER}
        self.parameters_were_equal = not (
            (counters if report.fatal else parting) or (slots | parted) & parameters
        )
        self.note_outcome(report.step, equal=report.equal and (self.was_equal or whole))
        return report, history

    def note_outcome(self, step: int, *, equal: bool) -> None:
        """Remembers whether the ranks were equal after `step`."""
        self.was_equal = equal
        self.parameters_were_equal |= equal
        if equal:
            self.last_equal_step = step

    def _compare_replicas(self, checksums: Checksums) -> set[Slot]:
        """The slots in which the ranks that hold the same shards as this one differ. Collective
        among them, and the same on all of them.
        """
        if self._replicas is None:
            return set()
        return differing_slots(self._replicas.agree(root_words(checksums.replica_roots())))

    def _learning_rates(self) -> tuple[float, ...]:
        return tuple(sorted(set(self._inventory.group_learning_rates())))

    def _schema_checksum(self) -> tuple[int, int]:
        if self._schema[0] != self._inventory.version:
            schema = self._inventory.schema()
            self._schema = (self._inventory.version, checksum_of(schema), len(schema))
        return self._schema[1:]

    def _investigate(
        self,
        snapshot: Snapshot,
        checksums: Checksums,
        history: History,
        counters: set[str],
        slots: set[Slot],
        parted: set[Slot],
    ) -> tuple[Finding, ...]:
        """What is wrong. Every rank is here, because every rank saw the same header."""
        differing = Slot.GRADIENTS in slots | parted
        own = Evidence(
            rank=self._comparison.rank,
            kind=snapshot.kind,
            step=snapshot.step,
            updates=snapshot.updates,
            audit=snapshot.audit,
            algorithm=_ALGORITHM_NAME,
            last_equal_step=self.last_equal_step,
            schema=tuple(self._inventory.schema()) if "schema" in counters else (),
            digests={slot: checksums.by_name(slot) for slot in slots},
            replicas=self._replicas.ranks if self._replicas is not None else (),
            replica_slots=frozenset(parted),
            replica_digests={slot: checksums.by_name(slot, Reach.REPLICAS) for slot in parted},
            edited_shards=history.edited_shards,
            empty_shards=self._empty_shards() if "edited" in counters else frozenset(),
            edited=history.edited,
            added=history.added,
            unmoved=history.unmoved,
            gradient_norms=self._snapshotter.gradient_norms(snapshot) if differing else {},
            learning_rates=self._learning_rates(),
            local=tuple(snapshot.local),
        )
        evidence = self._comparison.gather(own)
        known = [e.last_equal_step for e in evidence if e.last_equal_step is not None]
        context = Context(
            step=min(e.step for e in evidence),
            expected_updates=self._expected_updates,
            last_equal_step=min(known) if len(known) == len(evidence) else None,
            was_equal=self.parameters_were_equal,
            role_of=self._inventory.role_of,
        )
        findings = diagnose(evidence, counters, slots, context)
        late = snapshot.gradient_norms is not None
        return tuple(
            # Of gradients that are gone by now only the norms are known.
            finding if late and finding.scope is Scope.GRADIENTS else self._localized(finding)
            for finding in findings
        )

    def _localized(self, finding: Finding) -> Finding:
        """`finding` with the first element that differs, if ranks hold different bytes."""
        if finding.tensor is None or len(finding.holders) < 2 or finding.scope is None:
            return finding
        tensor = self._tensor(finding.scope, finding.tensor)
        largest = max((ranks for ranks, _ in finding.holders), key=len)
        if not finding.replicas:
            difference = self._comparison.localize(tensor, reference_rank=largest[0])
        else:
            own = None
            if self._replicas is not None and self._comparison.rank in finding.replicas:
                own = self._replicas.localize(tensor, reference_rank=largest[0])
            found = self._comparison.gather(own)
            difference = next((item for item in found if item is not None), None)
        if difference is None:
            return finding
        cause = finding.cause
        if finding.scope is Scope.GRADIENTS:
            scaled = difference.factor is not None
            cause = Cause.GRADIENT_SCALED_DIFFERENTLY if scaled else Cause.GRADIENT_NOT_REDUCED
        return replace(finding, difference=difference, cause=cause)

    def _empty_shards(self) -> frozenset[str]:
        """The trainable parameters of which this rank holds nothing: they are too small."""
        trainable = self._inventory.looked_at(Scope.TRAINABLE)
        own = zip(trainable.names, trainable.own(), strict=True)
        return frozenset(name for name, tensor in own if tensor is not None and not tensor.numel())

    def _tensor(self, scope: Scope, name: str) -> Tensor | None:
        """What this rank holds of the tensor `name`, or of its gradient."""
        named = self._inventory.tensors_of(scope)
        if named is None or name not in named.names:
            return None
        place = named.names.index(name)
        tensor, form = named.tensors[place], named.layouts[place].form
        if scope is Scope.GRADIENTS:
            return values_of(local_tensor(tensor.grad))
        return own_bytes(tensor, form)


def _is_edited_shard(finding: Finding) -> bool:
    return finding.fatal and finding.cause is Cause.EDITED_OUTSIDE_STEP and not finding.holders
