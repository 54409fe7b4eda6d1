"""SyncAuditor: checks around each optimizer step that all ranks still agree, in any loop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from trl_sync._version import __version__
from trl_sync.audit.compare import Comparison
from trl_sync.audit.config import AUTO, AuditConfig
from trl_sync.audit.diagnose import Context, Evidence, diagnose
from trl_sync.audit.digest import CPU_ALGORITHM, GPU_ALGORITHM
from trl_sync.audit.engine import engine_name, not_distributed, unavailable_scopes
from trl_sync.audit.findings import Cause, Finding, Scope, SyncReport
from trl_sync.audit.inventory import Inventory, torch_optimizer
from trl_sync.audit.journal import JOURNAL_NAME, Journal
from trl_sync.audit.rank_state import MissingRanks, Phase
from trl_sync.audit.repair import repair
from trl_sync.audit.selftest import self_test
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
from trl_sync.audit.uncaught import name_missing_on_uncaught
from trl_sync.audit.watch import ProgressWatch
from trl_sync.errors import DesyncError

logger = logging.getLogger("trl_sync.audit")

# A rank that waits in the exchange longer than this gives up, whatever the watch thinks. The watch
# ends lagging ranks much earlier; legitimate waits, such as rank 0 writing a checkpoint, are long.
EXCHANGE_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSummary:
    """What the audit did in a run.

    `desyncs` counts audits that found something fatal. `seconds` were spent inside the audit, and
    are `share_of_step` of the training time.
    """

    audits: int
    desyncs: int
    size_bytes: int
    seconds: float
    share_of_step: float

    def describe(self) -> str:
        found = "no desync" if not self.desyncs else f"{self.desyncs} DESYNCS"
        return (
            f"sync audit: {self.audits} audits, {found}, {self.size_bytes / 1e6:,.1f} MB hashed, "
            f"{self.seconds:.2f} s ({self.share_of_step:.2%} of training time)"
        )


class SyncAuditor:
    """Checks that every rank trains the same model.

    In a loop of your own, around each optimizer step:

        with SyncAuditor(accelerator, model, optimizer).attach():
            ...

    or by hand with `check(step=...)`, which every rank must call. Options are those of
    `AuditConfig`. `accelerator` is accelerate's `Accelerator` or state; `model` and `optimizer` may
    be wrapped or not.

    It reads tensors and exchanges checksums: no weight, gradient, mode or random state changes.

    Raises:
        ConfigError: an option that cannot work.
        DesyncError: from the audits, with `on_desync="raise"`; on every rank at the same step.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Any = None,
        *,
        output_dir: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.config = AuditConfig(**options)
        self.should_stop = False
        self.unverified_reason: str | None = None
        self.last_equal_step: int | None = None
        self._state = accelerator
        self._model, self._optimizer = model, optimizer
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._begun = False
        self._stack = contextlib.ExitStack()

    # What a loop calls.

    def attach(self) -> SyncAuditor:
        """Audits around every optimizer step from now on; begins with a full audit.

        Usable as a context manager, which detaches at the end. Every rank must call it.
        """
        self.begin()
        inner = torch_optimizer(self._optimizer)
        before = inner.register_step_pre_hook(self._before_step)
        self._stack.callback(before.remove)
        after = inner.register_step_post_hook(self._after_step)
        self._stack.callback(after.remove)
        return self

    def __enter__(self) -> SyncAuditor:
        return self

    def __exit__(self, error_type: Any, *args: Any) -> None:
        if error_type is None:
            self.finish()
        self.detach()

    def detach(self) -> None:
        """Removes every hook, ends the watch and closes the journal; no collective."""
        self._stack.close()

    @contextlib.contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Around evaluation, saving or rollouts, where ranks may be far apart in time."""
        with self.watch.pause(reason):
            yield

    def declare_sync(self, reason: str) -> None:
        """Frozen tensors may move from now on if they do so on all ranks alike; warned about once.

        For reference models that follow the policy, or adapters merged for an inference engine.
        """
        self.begin()
        self._snapshotter.declared_sync = reason

    def check(self, step: int | None = None) -> SyncReport:
        """Audits everything as it is now, all of the frozen state included.

        Collective. With `on_desync="raise"` a desync raises; otherwise it is in the report.
        """
        self.begin()
        self.drain()
        step = self._step if step is None else step
        with self._timed():
            snapshot = self._snapshotter.full(Kind.FULL, step, self._next_audit(), self._updates)
            return self._settle(snapshot)

    # What a trainer calls.

    def begin(self, step: int = 0) -> None:
        """Makes the group, proves that the audit works, audits everything once. Collective.

        Raises:
            DesyncError: ranks do not start alike, or are not distributed at all.
            AuditError: the self-test failed.
        """
        if self._begun:
            return
        self._begun = True
        self._started_s = time.perf_counter()
        self._stack = contextlib.ExitStack()
        self._reset(step)
        with self._timed():
            self._comparison = Comparison(
                timeout_s=EXCHANGE_TIMEOUT_S, on_failure=self._explain_failure
            )
            self._stack.callback(self._comparison.close)
            self._journal = Journal(self._journal_path())
            self._stack.callback(self._journal.close)
            self._refuse_if_alone()
            self._watch_progress()
            self._inventory = Inventory(self._model, self._optimizer, self.config.modules)
            self._unavailable = unavailable_scopes(self._state)
            self._snapshotter = Snapshotter(self._inventory, self.config, self._active_scopes())
            self._stack.callback(self._snapshotter.close)
            self._count_updates()
            self_test_s = self_test(self._comparison) if self.config.self_test else None
            self._write_first_line(self_test_s)
            snapshot = self._snapshotter.full(Kind.BEGIN, step, self._next_audit(), 0)
            self._settle(snapshot)

    def begin_step(self, step: int) -> None:
        """The update that will be number `step` begins with its first forward."""
        self.watch.advance(step, Phase.STEP_BEGUN)

    def before_update(self, step: int) -> None:
        """Gradients are final, the optimizer has not moved: the last look before update `step`."""
        self.watch.advance(step, Phase.BEFORE_UPDATE)
        if not self._due(step):
            return
        with self._timed():
            if self._delayed is not None:
                self.drain()
            self._snapshotter.before_update()

    def after_update(self, step: int) -> SyncReport | None:
        """Update `step` is done; the report, or None if it comes later or is not due."""
        self.watch.advance(step, Phase.AFTER_UPDATE)
        self._step = step
        if not self._due(step):
            return None
        with self._timed():
            snapshot = self._snapshotter.after_update(step, self._next_audit(), self._updates)
            self._updates = 0
            if self._blocking:
                report = self._settle(snapshot)
            else:
                self._delayed, report = snapshot, None
        self.watch.advance(step, Phase.AUDITED)
        return report

    def drain(self) -> None:
        """Waits for a verdict that is still to come."""
        if self._delayed is not None:
            snapshot, self._delayed = self._delayed, None
            self._settle(snapshot)

    def finish(self) -> AuditSummary:
        """A last full audit; the summary goes to the journal. Collective."""
        self.begin()
        if not self.should_stop:
            self.check()
        summary = self.summary()
        self._journal.write("end", **{name: getattr(summary, name) for name in summary.__slots__})
        return summary

    def summary(self) -> AuditSummary:
        """What was done so far."""
        elapsed_s = max(time.perf_counter() - self._started_s, 1e-9)
        return AuditSummary(
            audits=self._num_audits,
            desyncs=self._num_desyncs,
            size_bytes=self._size_bytes,
            seconds=self._seconds,
            share_of_step=self._seconds / elapsed_s,
        )

    @property
    def is_main_process(self) -> bool:
        return self._comparison.rank == 0

    @property
    def comparison(self) -> Comparison:
        """The audit's own collectives."""
        return self._comparison

    @property
    def inventory(self) -> Inventory:
        """The tensors that are audited."""
        return self._inventory

    def note(self, event: str, **fields: Any) -> None:
        """Adds a line to the journal."""
        self._journal.write(event, **fields)

    def report_finding(self, finding: Finding) -> SyncReport:
        """Acts on a finding that every rank knows of, as on one of an audit."""
        report = SyncReport(
            step=finding.step,
            audit=self._num_audits,
            findings=(finding,),
            roots={},
            size_bytes=0,
            seconds=0.0,
        )
        return self._react(report, slots=set())

    # Beginning.

    def _reset(self, step: int) -> None:
        self._step, self._updates = step, 0
        self._num_audits = self._num_desyncs = self._size_bytes = 0
        self._seconds = 0.0
        self._timing = 0
        self._backwards = 0
        self._delayed: Snapshot | None = None
        self._schema: tuple[int, int, int] = (-1, 0, 0)
        self._was_equal = True
        self.warned: set[tuple[Cause, str | None]] = set()

    def _journal_path(self) -> Path | None:
        if self._comparison.rank != 0 or self.config.journal is None:
            return None
        if self.config.journal != AUTO:
            return Path(self.config.journal)
        return None if self._output_dir is None else self._output_dir / JOURNAL_NAME

    def _refuse_if_alone(self) -> None:
        finding = not_distributed(self._state, self._comparison.world_size)
        if finding is not None:
            # No group to share the verdict in; every rank finds the same by itself.
            report = SyncReport(
                step=0, audit=0, findings=(finding,), roots={}, size_bytes=0, seconds=0.0
            )
            self._write_desync(report)
            self._stack.close()
            raise DesyncError(report.describe(), report, report.findings)

    def _watch_progress(self) -> None:
        self.watch = ProgressWatch(
            rank=self._comparison.rank,
            world_size=self._comparison.world_size,
            timeout_s=self.config.timeout_s,
            on_missing=self._on_missing,
        )
        self.watch.start()
        self._stack.callback(self.watch.stop)
        if self._comparison.world_size > 1:
            name_missing_on_uncaught(self.watch)

    def _active_scopes(self) -> list[Scope]:
        return [s for s in Scope if self.config.audits(s) and s not in self._unavailable]

    def _count_updates(self) -> None:
        """Counts real optimizer steps: a trainer's own counter also counts skipped ones."""
        inner = torch_optimizer(self._optimizer)
        register = getattr(inner, "register_step_post_hook", None)
        self._counts_updates = register is not None
        if register is not None:
            self._stack.callback(register(self._count_update).remove)
        trainable = self._inventory.trainable.tensors
        if trainable and engine_name(self._state) not in ("DEEPSPEED", "FSDP"):
            # Gradients of the last parameters come first: where they are, backward has begun.
            hook = trainable[-1].register_post_accumulate_grad_hook(self._count_backward)
            self._stack.callback(hook.remove)

    def _count_update(self, *args: Any) -> None:
        self._updates += 1

    def _count_backward(self, parameter: Any) -> None:
        self._backwards += 1
        self.watch.count_backward()

    def _write_first_line(self, self_test_s: float | None) -> None:
        inventory, active = self._inventory, self._active_scopes()
        state = {
            Scope.TRAINABLE: inventory.trainable,
            Scope.GRADIENTS: inventory.trainable,
            Scope.FROZEN: inventory.frozen,
            Scope.QUANTIZATION: inventory.quantization,
            Scope.BUFFERS: inventory.buffers,
            Scope.OPTIMIZER: inventory.optimizer_state(),
        }
        scopes: dict[str, Any] = {}
        for scope in Scope:
            if scope in active:
                scopes[scope] = {"status": "audited"}
                if scope in state:
                    tensors = state[scope]
                    size = sum(t.numel() * t.element_size() for t in tensors.tensors)
                    scopes[scope] |= {"tensors": len(tensors), "size_bytes": size}
            else:
                reason = self._unavailable.get(scope)
                status = "not chosen" if reason is None else "unavailable"
                scopes[scope] = {"status": status, "reason": reason}
        self._journal.write(
            "begin",
            version=__version__,
            step=self._step,
            world_size=self._comparison.world_size,
            engine=engine_name(self._state),
            algorithms=[CPU_ALGORITHM, GPU_ALGORITHM],
            every_steps=self.config.every_steps,
            frozen_cover_steps=self.config.frozen_cover_steps,
            on_desync=self.config.on_desync,
            blocking=self._blocking,
            self_test_s=self_test_s,
            scopes=scopes,
            roles={
                role.name: {"trainable": role.trainable, "parameters": len(role.parameters)}
                for role in inventory.roles
            },
            unavailable_tensors=inventory.unavailable,
        )
        for scope, reason in self._unavailable.items():
            if self.config.audits(scope) and self.is_main_process:
                logger.warning("sync audit: %s is not checked here: %s", scope, reason)

    # Around each step of an attached optimizer.

    def _before_step(self, *args: Any) -> None:
        if self._backwards:
            self.before_update(self._step + 1)

    def _after_step(self, *args: Any) -> None:
        if not self._backwards:
            # A step without a backward before it: the other ranks may not take it, and to wait for
            # them here would wait for ever. The next audit finds one update too many.
            return
        self._backwards = 0
        self.after_update(self._step + 1)

    # One audit.

    @property
    def _blocking(self) -> bool:
        if self.config.blocking is not None:
            return self.config.blocking
        return all(tensor.device.type != "cuda" for tensor in self._inventory.trainable.tensors)

    def _due(self, step: int) -> bool:
        return step % self.config.every_steps == 0

    def _next_audit(self) -> int:
        self._num_audits += 1
        return self._num_audits

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Counts the time of the outermost block."""
        started_s = time.perf_counter()
        self._timing += 1
        try:
            yield
        finally:
            self._timing -= 1
            if not self._timing:
                self._seconds += time.perf_counter() - started_s

    def _settle(self, snapshot: Snapshot) -> SyncReport:
        """Compares a snapshot with the other ranks and acts on what differs."""
        started_s = time.perf_counter()
        checksums, history = self._snapshotter.resolve(snapshot)
        roots = checksums.roots()
        version, schema, num_tensors = self._schema_checksum()
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
        )
        self._size_bytes += report.size_bytes
        self._warn_of_edits(snapshot, history, report)
        return self._react(report, slots)

    def _schema_checksum(self) -> tuple[int, int, int]:
        if self._schema[0] != self._inventory.version:
            schema = self._inventory.schema()
            self._schema = (self._inventory.version, checksum_of(schema), len(schema))
        return self._schema

    def _investigate(
        self,
        snapshot: Snapshot,
        checksums: Checksums,
        history: History,
        counters: set[str],
        slots: set[Slot],
    ) -> tuple[Finding, ...]:
        """What is wrong; every rank is here, because every rank saw the same header."""
        own = Evidence(
            rank=self._comparison.rank,
            kind=snapshot.kind,
            step=snapshot.step,
            updates=snapshot.updates,
            audit=snapshot.audit,
            algorithm=_ALGORITHM_NAME,
            schema=tuple(self._inventory.schema()) if "schema" in counters else (),
            digests={slot: checksums.by_name(slot) for slot in slots},
            edited=history.edited,
            added=history.added,
            unmoved=history.unmoved,
            gradient_norms=self._snapshotter.gradient_norms() if Slot.GRADIENTS in slots else {},
            learning_rates=snapshot.learning_rates,
            local=tuple(snapshot.local),
        )
        context = Context(
            step=snapshot.step,
            expected_updates=self.config.every_steps,
            last_equal_step=self.last_equal_step,
            was_equal=self._was_equal,
            role_of=self._inventory.role_of,
        )
        findings = diagnose(self._comparison.gather(own), counters, slots, context)
        return tuple(self._localized(finding) for finding in findings)

    def _localized(self, finding: Finding) -> Finding:
        """`finding` with the first element that differs, if ranks hold different bytes."""
        if finding.tensor is None or len(finding.holders) < 2 or finding.scope is None:
            return finding
        tensor = self._tensor(finding.scope, finding.tensor)
        reference = next(r for ranks, _ in finding.holders for r in ranks)
        largest = max(finding.holders, key=lambda holder: len(holder[0]))[0]
        if len(largest) > 1:
            reference = largest[0]
        difference = self._comparison.localize(tensor, reference)
        if difference is None:
            return finding
        cause = finding.cause
        if cause is Cause.GRADIENT_NOT_REDUCED and difference.factor is not None:
            cause = Cause.GRADIENT_SCALED_DIFFERENTLY
        return replace(finding, difference=difference, cause=cause)

    def _tensor(self, scope: Scope, name: str) -> Any:
        inventory = self._inventory
        if scope is Scope.GRADIENTS:
            parameter = dict(inventory.trainable.items()).get(name)
            return None if parameter is None else parameter.grad
        named = {
            Scope.TRAINABLE: inventory.trainable,
            Scope.FROZEN: inventory.frozen,
            Scope.QUANTIZATION: inventory.quantization,
            Scope.BUFFERS: inventory.buffers,
            Scope.OPTIMIZER: inventory.optimizer_state(),
        }[scope]
        return dict(named.items()).get(name)

    # Acting.

    def _react(self, report: SyncReport, slots: set[Slot]) -> SyncReport:
        for finding in report.findings:
            if not finding.fatal:
                self._warn_once(finding)
        if report.equal:
            self._was_equal = True
            self.last_equal_step = report.step
            if report.roots:
                self._write_audit(report)
            return report
        self._num_desyncs += 1
        self._write_desync(report)
        self._was_equal = False
        action = self.config.on_desync
        if action == "repair":
            repair(self._comparison, self._inventory, report, self._snapshotter)
            self._journal.write("repair", step=report.step, audit=report.audit)
            self._was_equal = True
            self.last_equal_step = report.step
        elif action == "raise":
            raise DesyncError(report.describe(), report, report.fatal)
        elif action == "stop":
            self.should_stop = True
            self.unverified_reason = report.describe()
            if self.is_main_process:
                logger.error("%s", report.describe())
        else:
            for finding in report.fatal:
                self._warn_once(finding)
        return report

    def _warn_once(self, finding: Finding) -> None:
        key = (finding.cause, finding.tensor if finding.fatal else None)
        if key not in self.warned and self.is_main_process:
            logger.warning("%s", finding.describe())
            if not finding.fatal:
                self._journal.write("warning", **finding.as_dict())
        self.warned.add(key)

    def _warn_of_edits(self, snapshot: Snapshot, history: History, report: SyncReport) -> None:
        """All ranks edited alike: no desync, but seldom meant."""
        if history.edited and report.equal and self._comparison.world_size > 1:
            names = sorted(history.edited)
            self._warn_once(
                Finding(
                    cause=Cause.EDITED_OUTSIDE_STEP,
                    step=snapshot.step,
                    ranks=tuple(range(self._comparison.world_size)),
                    scope=Scope.TRAINABLE,
                    tensor=names[0],
                    num_tensors=len(names),
                    evidence="All ranks were edited alike.",
                    fatal=False,
                )
            )

    def _write_audit(self, report: SyncReport) -> None:
        self._journal.write(
            "audit",
            step=report.step,
            audit=report.audit,
            roots=report.roots,
            size_bytes=report.size_bytes,
            seconds=round(report.seconds, 6),
        )

    def _write_desync(self, report: SyncReport) -> None:
        self._journal.write(
            "desync",
            step=report.step,
            audit=report.audit,
            action=self.config.on_desync,
            findings=[finding.as_dict() for finding in report.findings],
            message=report.describe(),
        )

    def _missing(self, missing: MissingRanks) -> SyncReport:
        finding = Finding(
            cause=Cause.RANK_MISSING,
            step=self._step + 1,
            ranks=missing.ranks,
            last_equal_step=self.last_equal_step,
            evidence=missing.describe(),
        )
        return SyncReport(
            step=finding.step,
            audit=self._num_audits,
            findings=(finding,),
            roots={},
            size_bytes=0,
            seconds=0.0,
        )

    def _on_missing(self, missing: MissingRanks) -> None:
        """Runs in the watch's thread, right before it ends the process."""
        report = self._missing(missing)
        logger.error("%s", report.describe())
        self._write_missing(report, missing)

    def _write_missing(self, report: SyncReport, missing: MissingRanks) -> None:
        alive = [r for r in range(self._comparison.world_size) if r not in missing.ranks]
        if self._comparison.rank == (alive[0] if alive else 0):
            if not self.is_main_process and self._output_dir is not None:
                # Rank 0 cannot write any more.
                self._journal = Journal(self._output_dir / JOURNAL_NAME)
            self._write_desync(report)

    def _explain_failure(self, error: RuntimeError) -> Exception:
        """The error for a collective of the audit that failed: who is gone, if that is known."""
        missing = self.watch.find_missing()
        if missing is None:
            return DesyncError(
                f"step {self._step}: the audit's exchange failed ({error}), and no rank is known "
                "to be dead. Look at the other ranks' logs."
            )
        report = self._missing(missing)
        self._write_missing(report, missing)
        return DesyncError(report.describe(), report, report.findings)


_ALGORITHM_NAME = f"{CPU_ALGORITHM}, {GPU_ALGORITHM}, trl_sync {__version__}"
_ALGORITHM = checksum_of(_ALGORITHM_NAME)
