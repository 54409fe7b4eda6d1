"""SyncAuditCallback: the audit in any transformers or TRL trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_sync.audit.auditor import SyncAuditor
from trl_sync.audit.checkpoints import verify_resumed, write_checkpoint_manifest
from trl_sync.audit.config import AuditConfig
from trl_sync.audit.findings import AuditSummary
from trl_sync.audit.trackers import AuditTrackers

logger = logging.getLogger("trl_sync.audit")


class SyncAuditCallback(TrainerCallback):
    """Checks after every optimizer step that all ranks train the same model.

        trainer = DPOTrainer(..., callbacks=[SyncAuditCallback()])

    Options are those of `AuditConfig`. Models that the trainer does not hand to callbacks are
    passed by role: `modules={"reference": ref_model}`.

    Raises:
        ConfigError: an option that cannot work.
        DesyncError: during training, on every rank at the same step; see `SyncAuditor.check`.
        AuditError: as training begins, see `SyncAuditor.begin`.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._config = AuditConfig(**options)
        self._auditor: SyncAuditor | None = None
        self._paused = False
        self._save_total_limit: tuple[Any, int | None] | None = None
        self._summary: AuditSummary | None = None
        self._trackers: AuditTrackers | None = None

    @property
    def auditor(self) -> SyncAuditor:
        """The auditor of the training under way.

        Raises:
            RuntimeError: training has not begun.
        """
        if self._auditor is None:
            raise RuntimeError("The audit begins with training: there is no auditor yet.")
        return self._auditor

    def summary(self) -> AuditSummary:
        """What the last training's audit did, or that of the training under way so far.

        Raises:
            RuntimeError: training has not begun.
        """
        return self._summary if self._summary is not None else self.auditor.summary()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the auditor and audits everything; of a resumed run also the checkpoint's manifest.

        Raises:
            ConfigError: as `SyncAuditor.begin`.
            AuditError: as `SyncAuditor.begin`.
            DesyncError: as `SyncAuditor.begin`, or what was loaded is not what was saved.
        """
        self.close()
        self._summary, self._paused = None, False
        self._auditor = SyncAuditor(
            _accelerate_state(),
            kwargs["model"],
            kwargs.get("optimizer"),
            output_dir=args.output_dir,
            **self._options,
        )
        if state.is_world_process_zero:
            self._trackers = AuditTrackers(args.report_to, args.output_dir)
            self._auditor.listen(self._trackers.tell)
        self._auditor.begin(state.global_step, wants_fsdp=bool(getattr(args, "fsdp", None)))
        declared = _declared_sync(args)
        if declared is not None:
            self._auditor.declare_sync(declared)
        if state.global_step and self._config.manifest:
            verify_resumed(self._auditor, args, state.global_step)
        self._pause("training to begin")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on this rank is named if it lags."""
        self._resume()
        self.auditor.begin_step(state.global_step + 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`SyncAuditor.before_update`.

        Raises:
            DesyncError: as that.
        """
        self.auditor.before_update(state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`SyncAuditor.after_update`; after a desync with `on_desync="stop"`, saves and ends.

        Raises:
            DesyncError: as that.
        """
        self.auditor.after_update(state.global_step + 1)
        self._stops(args, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Audits everything before a save; waits for late verdicts before evaluation and the end.

        Raises:
            DesyncError: as `SyncAuditor.check`.
        """
        self._pause("work between two steps")
        self._before_save_or_evaluation(args, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As `on_step_end`, for what is due at the end of an epoch.

        Raises:
            DesyncError: as `SyncAuditor.check`.
        """
        self._before_save_or_evaluation(args, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes `sync_manifest.json` into the checkpoint, unless `manifest=False`. Collective.

        Raises:
            DesyncError: as `SyncAuditor.check`, if this step was not audited yet.
        """
        if self._config.manifest:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_checkpoint_manifest(self.auditor, folder, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sends the audit's figures to wandb, trackio and TensorBoard, where `report_to` has them.

        The main process does.
        """
        if self._trackers is not None:
            self._trackers.log_figures(self.auditor.summary(), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A last full audit; the main process prints the summary.

        Raises:
            DesyncError: as `SyncAuditor.finish`.
        """
        self._pause("training to end")
        if args.load_best_model_at_end:
            self.auditor.expect_edits()
        self._summary = self.auditor.finish()
        if self.auditor.is_main_process:
            print(self._summary.describe(), flush=True)
        self.close()

    def close(self) -> None:
        """Removes the hooks of the last training, also one that ended with an error."""
        if self._auditor is not None:
            self._auditor.detach()
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None
        if self._save_total_limit is not None:
            arguments, limit = self._save_total_limit
            arguments.save_total_limit = limit
            self._save_total_limit = None

    def _before_save_or_evaluation(self, args: Any, control: Any) -> None:
        if self.auditor.should_stop:
            return
        if control.should_save:
            self.auditor.check()
        elif control.should_evaluate or control.should_training_stop:
            self.auditor.drain()
        self._stops(args, control)

    def _stops(self, args: Any, control: Any) -> None:
        """After a desync, training ends with a checkpoint; no good one is deleted for it."""
        if self.auditor.should_stop:
            if self._save_total_limit is None:
                self._save_total_limit = (args, args.save_total_limit)
            args.save_total_limit = None
            control.should_save = control.should_training_stop = True

    def _pause(self, reason: str) -> None:
        if not self._paused:
            self.auditor.watch.begin_pause(reason)
            self._paused = True

    def _resume(self) -> None:
        if self._paused:
            self.auditor.watch.end_pause()
            self._paused = False


def _accelerate_state() -> Any:
    """The state that knows the engine: the trainer has made an Accelerator by now."""
    return AcceleratorState() if AcceleratorState._shared_state else PartialState()


def _declared_sync(args: Any) -> str | None:
    """What the trainer's own settings say about frozen weights that are meant to move."""
    if getattr(args, "sync_ref_model", False):
        return "sync_ref_model moves the reference towards the policy"
    if getattr(args, "use_vllm", False):
        return "adapters are merged into the base for the inference engine"
    return None
