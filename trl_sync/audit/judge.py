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
from trl_sync.audit.snapshot import (
    Checksums,
    Kind,
    Slot,
    Snapshot,
    checksum_of,
    header,
    read_header,
)
from trl_sync.audit.snapshotter import History, Snapshotter

_ALGORITHM_NAME = f"{CPU_ALGORITHM}, {GPU_ALGORITHM}, trl_sync {__version__}"
_ALGORITHM = checksum_of(_ALGORITHM_NAME)


class Judge:
    """Compares snapshots across ranks and, where they differ, finds out where and why.

    `expected_updates` is the number of optimizer steps between two audits.
    """

    def __init__(
        self, comparison: Comparison, snapshotter: Snapshotter, expected_updates: int
    ) -> None:
        self.last_equal_step: int | None = None
        self.was_equal = self.parameters_were_equal = True
        self._comparison = comparison
        self._snapshotter = snapshotter
        self._expected_updates = expected_updates
        self._schema: tuple[int, int, int] = (-1, 0, 0)

    @property
    def _inventory(self) -> Inventory:
        return self._snapshotter.inventory

    def judge(self, snapshot: Snapshot) -> tuple[SyncReport, History]:
        """The report on `snapshot`, and what this rank's parameters did since the last. Collective:
        one all-reduce if all is well.
        """
        started_s = time.perf_counter()
        checksums, history = self._snapshotter.resolve(snapshot)
        roots = checksums.roots()
        schema, num_tensors = self._schema_checksum()
        values = header(
            snapshot, roots, algorithm=_ALGORITHM, schema=schema, num_tensors=num_tensors
        )
        counters, slots = read_header(self._comparison.agree(values))
        slots.discard(Slot.RNG)  # ranks may draw alike or not; the journal shows the checksum
        findings: tuple[Finding, ...] = ()
        if counters or slots or snapshot.local:
            findings = self._investigate(snapshot, checksums, history, counters, slots)
        report = SyncReport(
            step=snapshot.step,
            audit=snapshot.audit,
            findings=findings,
            roots={slot.value: root.hex() for slot, root in roots.items()},
            size_bytes=snapshot.size_bytes,
            seconds=time.perf_counter() - started_s,
            still_parted=bool(counters or slots - {Slot.BUFFERS}),
        )
        # A slice that is equal does not make up for another one that was not.
        whole = snapshot.kind in (Kind.BEGIN, Kind.FULL)
        self.parameters_were_equal = not counters and not slots & {Slot.BEFORE, Slot.AFTER}
        self.note_outcome(report.step, equal=report.equal and (self.was_equal or whole))
        return report, history

    def note_outcome(self, step: int, *, equal: bool) -> None:
        """Remembers whether the ranks were equal after `step`."""
        self.was_equal = equal
        self.parameters_were_equal |= equal
        if equal:
            self.last_equal_step = step

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
    ) -> tuple[Finding, ...]:
        """What is wrong. Every rank is here, because every rank saw the same header."""
        differing = Slot.GRADIENTS in slots
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
            edited=history.edited,
            added=history.added,
            unmoved=history.unmoved,
            gradient_norms=self._snapshotter.gradient_norms(snapshot) if differing else {},
            learning_rates=tuple(sorted(set(self._inventory.learning_rates().values()))),
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
        difference = self._comparison.localize(tensor, reference_rank=largest[0])
        if difference is None:
            return finding
        cause = finding.cause
        if finding.scope is Scope.GRADIENTS:
            scaled = difference.factor is not None
            cause = Cause.GRADIENT_SCALED_DIFFERENTLY if scaled else Cause.GRADIENT_NOT_REDUCED
        return replace(finding, difference=difference, cause=cause)

    def _tensor(self, scope: Scope, name: str) -> Tensor | None:
        named = self._inventory.tensors_of(scope)
        tensor: Tensor | None = None if named is None else dict(named.items()).get(name)
        return values_of(tensor.grad) if tensor is not None and scope is Scope.GRADIENTS else tensor
