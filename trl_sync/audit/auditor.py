"""SyncAuditor: checks around each optimizer step that all ranks still agree, in any loop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from trl_sync._version import __version__
from trl_sync.audit.compare import Comparison
from trl_sync.audit.config import AuditConfig
from trl_sync.audit.coverage import coverage, gaps
from trl_sync.audit.digest import CPU_ALGORITHM, GPU_ALGORITHM
from trl_sync.audit.engine import (
    engine_name,
    keeps_no_gradients,
    needless_scopes,
    not_distributed,
    unavailable_scopes,
    uncompared_parts,
)
from trl_sync.audit.findings import AuditSummary, Cause, Finding, Scope, SyncReport
from trl_sync.audit.inventory import Inventory, torch_optimizer
from trl_sync.audit.journal import Listener
from trl_sync.audit.judge import Judge
from trl_sync.audit.rank_state import MissingRanks, Phase
from trl_sync.audit.reaction import Reaction
from trl_sync.audit.repair import repair
from trl_sync.audit.selftest import self_test
from trl_sync.audit.sharding import Reach
from trl_sync.audit.snapshot import Kind, Snapshot, checksum_of
from trl_sync.audit.snapshotter import History, Snapshotter
from trl_sync.audit.uncaught import name_missing_on_uncaught
from trl_sync.audit.update_hooks import LoopHooks
from trl_sync.audit.watch import ProgressWatch
from trl_sync.errors import AuditError, ConfigError, DesyncError

logger = logging.getLogger("trl_sync.audit")

# A rank that waits in the exchange longer than this gives up, whatever the watch thinks. The watch
# ends lagging ranks much earlier; legitimate waits, such as rank 0 writing a checkpoint, are long.
EXCHANGE_TIMEOUT_S = 1800.0
DEATH_PATIENCE_S = 2.0


class SyncAuditor:
    """Checks that every rank trains the same model.

    In a loop of your own, around each optimizer step:

        with SyncAuditor(accelerator, model, optimizer).attach():
            ...

    or by hand with `check(step=...)`, which every rank must call. Options are those of
    `AuditConfig`. `accelerator` is accelerate's `Accelerator` or state; `model` and `optimizer` may
    be wrapped or not.

    It reads tensors and exchanges checksums: no weight, gradient, mode or random state changes,
    unless `on_desync="repair"` has something to repair.

    Raises:
        ConfigError: an option that cannot work.
        DesyncError: from the audits, with `on_desync="raise"`, or with `"repair"` where that fails;
            on every rank at the same step. With any option, if a rank is gone.
    """

    # Made by `begin()`.
    comparison: Comparison
    reaction: Reaction
    inventory: Inventory
    watch: ProgressWatch
    _delayed: Snapshot | None

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
        self._state = accelerator
        self._model, self._optimizer = model, optimizer
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._listeners: list[Listener] = []
        self._begun = False
        self._judge: Judge | None = None
        self._reset(0)

    # What a loop calls.

    def attach(self) -> SyncAuditor:
        """Audits around every optimizer step from now on; begins with a full audit.

        Usable as a context manager, which ends with `finish()` and detaches. Every rank must call
        it.

        Raises:
            ConfigError: the optimizer has no hooks around its steps, or as `begin()`.
            DesyncError: as `begin()`.
            AuditError: as `begin()`.
        """
        self.begin()
        self._attached = True
        if self._hooks.inside_backward:
            return self
        inner = torch_optimizer(self._optimizer)
        if not hasattr(inner, "register_step_pre_hook"):
            self.detach()
            raise ConfigError(
                f"attach() needs the optimizer whose steps it audits, not {type(inner).__name__}. "
                "Pass it as the third argument, or call check() by hand."
            )
        before = inner.register_step_pre_hook(self._before_step)
        self._stack.callback(before.remove)
        after = inner.register_step_post_hook(self._after_step)
        self._stack.callback(after.remove)
        return self

    def __enter__(self) -> SyncAuditor:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *args: Any) -> None:
        if error_type is None:
            try:
                self.finish()
            finally:
                self.detach()
        elif issubclass(error_type, DesyncError):
            self.detach()
        else:
            self._leave_watch_on()

    def detach(self) -> None:
        """Removes every hook, ends the watch and closes the journal; no collective."""
        self._stack.close()
        if self._begun and hasattr(self, "watch"):
            self.watch.stop()

    @contextlib.contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Around evaluation, saving or rollouts, where ranks may be far apart in time.

        Within the block this rank is never named for lagging behind the others.
        """
        with self.watch.pause(reason):
            yield

    def declare_sync(self, reason: str) -> None:
        """Frozen tensors may move from now on if they do so on all ranks alike; warned about once.

        For reference models that follow the policy, or adapters merged for an inference engine.
        Calls `begin()`, and raises what it does, if nobody has.
        """
        self.begin()
        self._snapshotter.declared_sync = reason

    def expect_edits(self) -> None:
        """The trainable parameters have been set on purpose since the last update, on all ranks.

        Every rank calls it, between the edit and the next update. Collective where verdicts come
        late: the one on the last update, which knows nothing of the edit, is waited for. Calls
        `begin()`, and raises what it does, if nobody has.

        Raises:
            DesyncError: as `drain()`.
        """
        self.begin()
        if not self.should_stop:
            with self._timed():
                self.drain()
        self._snapshotter.forget_parameters()

    def check(self, step: int | None = None) -> SyncReport:
        """Audits everything as it is now, all of the frozen state included. Collective.

        `step` is the number of updates that are done; by default, as `after_update` said last.
        Calls `begin()`, and raises what it does, if nobody has.

        Raises:
            DesyncError: ranks differ, with `on_desync="raise"`; else the report says so. With
                `"repair"`: a repair failed. With any option: a rank is gone.
            AuditError: the audit has ended, with `detach()` or a desync.
        """
        self.begin()
        with self._timed(), self.watch.waiting():
            self.drain()
            step = self._step if step is None else step
            return self._settle(
                self._snapshotter.full(Kind.FULL, step, self._next_audit(), self._hooks.updates)
            )

    # What a trainer calls.

    def begin(self, step: int = 0, *, wants_fsdp: bool = False) -> None:
        """Makes the group, proves that the audit works, audits everything once. Collective.

        Nothing, if it was called before. `step` is the number of updates that are done.
        `wants_fsdp`: the training arguments ask for FSDP, which must run then.

        Raises:
            DesyncError: ranks are not distributed at all, or do not start alike; the latter as
                `check()`.
            ConfigError: `on_desync="repair"` with state that is sharded.
            AuditError: the self-test failed, or a rank has not begun within 10 `timeout_s`.
        """
        if self._begun:
            return
        self._begun = True
        self._reset(step)
        with self._timed():
            try:
                self._open(wants_fsdp)
                snapshot = self._snapshotter.full(Kind.BEGIN, step, self._next_audit(), 0)
                self._settle(snapshot)
                self.watch.advance(step, Phase.AUDITED)
            except (DesyncError, AuditError, ConfigError):
                self.detach()
                raise
            except BaseException:
                self._leave_watch_on()
                raise

    def begin_step(self, step: int) -> None:
        """The update that will be number `step` begins with its first forward."""
        self.watch.advance(step, Phase.STEP_BEGUN)

    def before_update(self, step: int) -> None:
        """Gradients are final, the optimizer has not moved: the last look before update `step`.

        Under DeepSpeed, which updates inside `backward`, that look was taken there. Collective
        where the verdict on the last update is still to come.

        Raises:
            DesyncError: as `drain()`.
        """
        if not self._hooks.inside_backward:
            self._look_before(step)

    def _look_before(self, step: int) -> None:
        self.watch.advance(step, Phase.BEFORE_UPDATE)
        with self._timed():
            self.drain()
            if self._due(step):
                self._snapshotter.before_update(updated_since=self._hooks.updates > 0)

    def after_update(self, step: int) -> SyncReport | None:
        """Update `step` is done; the report, or None if it comes later or is not due.

        Collective where a report is due now.

        Raises:
            DesyncError: as `check()`.
            AuditError: the audit has ended.
        """
        self.watch.advance(step, Phase.AFTER_UPDATE)
        self._step = step
        report = None
        if self._due(step):
            with self._timed():
                updates, self._hooks.updates = self._hooks.updates, 0
                snapshot = self._snapshotter.after_update(step, self._next_audit(), updates)
                self.watch.advance(step, Phase.COMPARING)
                if self._blocking:
                    report = self._settle(snapshot)
                else:
                    self._delayed = snapshot
        self.watch.advance(step, Phase.AUDITED)
        return report

    def _leave_watch_on(self) -> None:
        """After an error of this rank alone: the watch can still say who was missing, and others
        see when this rank is gone. What its process does until then is no lag.
        """
        self._stack.close()
        if hasattr(self, "watch"):
            self.watch.begin_pause("an error")

    def drain(self) -> None:
        """Waits for a verdict that is still to come; then collective.

        Raises:
            DesyncError: as `check()`.
        """
        if self._delayed is not None:
            snapshot, self._delayed = self._delayed, None
            self._settle(snapshot)

    def finish(self) -> AuditSummary:
        """A last full audit; the summary goes to the journal. Collective.

        Without the audit if `should_stop`.

        Raises:
            DesyncError: as `check()`.
            AuditError: as `check()`.
        """
        self.begin()
        if not self.should_stop:
            self.check()
        summary = self.summary()
        self.note("end", **asdict(summary))
        return summary

    def summary(self) -> AuditSummary:
        """What was done so far, on this rank."""
        elapsed_s = max(time.perf_counter() - self._started_s, 1e-9)
        return AuditSummary(
            audits=self._num_audits,
            desyncs=self.reaction.num_desyncs,
            size_bytes=self._size_bytes,
            seconds=self._seconds,
            share_of_step=self._seconds / elapsed_s,
        )

    @property
    def should_stop(self) -> bool:
        """True once a desync was found with `on_desync="stop"`."""
        return self._begun and self.reaction.should_stop

    @property
    def is_main_process(self) -> bool:
        return self.comparison.rank == 0

    @property
    def last_equal_step(self) -> int | None:
        """The last step after which all ranks were known to be equal; None before there is one."""
        return None if self._judge is None else self._judge.last_equal_step

    def listen(self, listener: Listener) -> None:
        """From `begin()` on, the main process calls it with name and fields of each journal event.

        To be called before `begin()`.
        """
        self._listeners.append(listener)

    def note(self, event: str, **fields: Any) -> None:
        """Adds a line to the journal, on the main process; elsewhere nothing happens."""
        self.reaction.journal.write(event, **fields)

    def refuse(self, finding: Finding) -> DesyncError:
        """The error for a finding that every rank knows of, written down."""
        return self.reaction.refuse(self._report(finding))

    # Beginning.

    def _reset(self, step: int) -> None:
        self._started_s = time.perf_counter()
        self._stack = contextlib.ExitStack()
        self._step = step
        self._hooks, self._attached = LoopHooks(), False
        self._num_audits = self._size_bytes = 0
        self._seconds, self._timing = 0.0, 0
        self._delayed = None

    def _open(self, wants_fsdp: bool) -> None:
        self.comparison = Comparison(
            timeout_s=EXCHANGE_TIMEOUT_S,
            meeting_s=10 * self.config.timeout_s,
            on_failure=self._explain_failure,
        )
        self._stack.callback(self.comparison.close)
        self.reaction = Reaction(self.comparison, self.config, self._output_dir, self._listeners)
        self._stack.callback(self.reaction.close)
        alone = not_distributed(self._state, self.comparison.world_size, wants_fsdp)
        if alone is not None:
            # There is no group to share the verdict in; every rank finds the same by itself.
            raise self.refuse(alone)
        self._watch_progress()
        self.inventory = Inventory(self._model, self._optimizer, self.config.modules)
        self._stack.callback(self.inventory.close)
        self._check_repair()
        self._unavailable = unavailable_scopes(self._state)
        self._needless = needless_scopes(self.comparison.world_size)
        self._snapshotter = Snapshotter(
            self.inventory,
            self.config,
            self._active_scopes(),
            has_gradients=not keeps_no_gradients(self._state),
            alone=self.comparison.world_size == 1,
        )
        self._stack.callback(self._snapshotter.close)
        self._judge = self._make_judge()
        self._listen()
        on_gpu = any(tensor.is_cuda for tensor in self.inventory.trainable.tensors)
        wanted = True if self.config.on_desync == "repair" else self.config.blocking
        self._blocking = not on_gpu if wanted is None else wanted
        self._snapshotter.keeps_gradient_norms = not self._blocking
        # By type: each rank has a GPU of another number, and each must test as often.
        devices = {"cpu", *(tensor.device.type for tensor in self.inventory.trainable.tensors)}
        self_test_s = None
        if self.config.self_test:
            self_test_s = self_test(self.comparison, sorted(devices))
        self._write_first_line(self_test_s)

    def _check_repair(self) -> None:
        """Nothing, if a repair could copy everything that ranks hold.

        Raises:
            ConfigError: it could not; on every rank.
        """
        engine = engine_name(self._state)
        in_parts = engine == "DEEPSPEED" or self.inventory.is_sharded
        if in_parts and self.config.on_desync == "repair":
            raise ConfigError(
                "on_desync='repair' copies the state of a rank of the majority, but under "
                f"{engine} ranks hold parts of parameters or optimizer that no other rank could "
                "give them. Use on_desync='raise' or 'stop', and go on from the last checkpoint."
            )

    def _make_judge(self) -> Judge:
        """The judge, with a group of its own for shards that several ranks hold."""
        partition = self.inventory.partition
        replicas = None
        # Groups are made alike on all ranks or on none; if not, the first audit says why.
        if all(self.comparison.agree([checksum_of(partition)])) and partition:
            replicas = self.comparison.split(partition)
        alone = any(layout.reach is Reach.SELF for layout in self.inventory.trainable.layouts)
        return Judge(
            self.comparison,
            self._snapshotter,
            self.config.every_steps,
            replicas=replicas,
            updates_shards=alone or engine_name(self._state) == "DEEPSPEED",
        )

    def _watch_progress(self) -> None:
        self.watch = ProgressWatch(
            rank=self.comparison.rank,
            world_size=self.comparison.world_size,
            timeout_s=self.config.timeout_s,
            on_missing=self._on_missing,
        )
        self.watch.start()
        if self.comparison.world_size > 1:
            name_missing_on_uncaught(self.watch)

    def _active_scopes(self) -> list[Scope]:
        without = self._unavailable.keys() | self._needless.keys()
        return [s for s in Scope if self.config.audits(s) and s not in without]

    def _listen(self) -> None:
        """Hooks the loop: backward passes, and real optimizer steps."""
        engine = engine_name(self._state)
        if engine == "DEEPSPEED":
            undos = self._hooks.listen_inside_backward(
                self._optimizer, self._before_engine_step, self._after_engine_step
            )
        else:
            undos = self._hooks.listen(
                self.inventory, self._optimizer, self.watch.count_backward, engine=engine
            )
        for undo in undos:
            self._stack.callback(undo)

    def _before_engine_step(self) -> None:
        self._look_before(self._step + 1)

    def _after_engine_step(self) -> None:
        if self._attached:
            self.after_update(self._step + 1)

    def _write_first_line(self, self_test_s: float | None) -> None:
        inventory = self.inventory
        uncompared = uncompared_parts(self._state, inventory)
        absent = (self._unavailable, self._needless)
        scopes = {
            scope.value: coverage(scope, inventory, self.config, *absent, uncompared)
            for scope in Scope
        }
        self.note(
            "begin",
            version=__version__,
            step=self._step,
            world_size=self.comparison.world_size,
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
        if self.is_main_process:
            for gap in gaps(scopes, inventory, self.config):
                logger.warning("sync audit: %s", gap)

    # Around each step of an attached optimizer.

    def _before_step(self, *args: Any) -> None:
        if self._hooks.had_backward or not self._hooks.sees_backward:
            self.before_update(self._step + 1)

    def _after_step(self, *args: Any) -> None:
        if self._hooks.sees_backward and not self._hooks.had_backward:
            # A step without a backward before it: the other ranks may not take it, and to wait for
            # them here would wait for ever. The next audit finds one update too many.
            return
        self._hooks.had_backward = False
        self.after_update(self._step + 1)

    # One audit.

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
        assert self._judge is not None
        report, history = self._judge.judge(snapshot)
        self._size_bytes += report.size_bytes
        if report.equal:
            self._warn_of_edits(snapshot, history)
        try:
            wants_repair = self.reaction.react(report)
        except DesyncError:
            self.detach()  # on every rank; there is nothing left to audit
            raise
        if wants_repair:
            repair(self.comparison, self.inventory, report, self._snapshotter)
            self.note("repair", step=report.step, audit=report.audit)
            self._judge.note_outcome(report.step, equal=True)
        return report

    def _warn_of_edits(self, snapshot: Snapshot, history: History) -> None:
        """All ranks edited alike: no desync, but seldom meant."""
        if not history.edited or self.comparison.world_size == 1:
            return
        names = sorted(history.edited)
        self.reaction.warn_once(
            Finding(
                cause=Cause.EDITED_OUTSIDE_STEP,
                step=snapshot.step,
                ranks=tuple(range(self.comparison.world_size)),
                scope=Scope.TRAINABLE,
                tensor=names[0],
                num_tensors=len(names),
                evidence="All ranks were edited alike between two steps.",
                fatal=False,
            )
        )

    # Ranks that are gone.

    def _missing(self, missing: MissingRanks) -> SyncReport:
        return self._report(
            Finding(
                cause=Cause.RANK_MISSING,
                step=self.watch.step,
                ranks=missing.ranks,
                last_equal_step=self.last_equal_step,
                evidence=missing.describe(),
            )
        )

    def _on_missing(self, missing: MissingRanks) -> None:
        """Runs in the watch's thread, right before it ends the process."""
        report = self._missing(missing)
        logger.error("%s", report.describe())
        self.reaction.write_missing(report, missing)

    def _explain_failure(self, error: RuntimeError) -> Exception:
        """The error for a collective of the audit that failed: who is gone, if that is known."""
        missing = self._await_missing()
        if missing is None:
            return DesyncError(
                f"step {self._step}: the audit's exchange failed ({error}), and no rank is known "
                "to be dead. Look at the other ranks' logs."
            )
        self.watch.report(missing)
        report = self._missing(missing)
        return DesyncError(report.describe(), report, report.findings)

    def _await_missing(self) -> MissingRanks | None:
        """Who is dead; a connection may break a moment before the process is gone."""
        deadline_s = time.monotonic() + DEATH_PATIENCE_S
        while (missing := self.watch.find_missing()) is None and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return missing

    def _report(self, finding: Finding) -> SyncReport:
        return SyncReport(
            step=finding.step,
            audit=self._num_audits,
            findings=(finding,),
            roots={},
            size_bytes=0,
            seconds=0.0,
        )
