"""The audit in the trackers of `report_to`: its figures at every log line, its events when found.

wandb and trackio get both in the run that is open, an event as an alert too. TensorBoard gets a
run of its own beside the training's: it does not follow two files that grow in one folder.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trl_sync.audit.findings import AuditSummary
from trl_sync.tracker_runs import open_wandb_run, trackio_has_run

# Events of the journal that somebody should see; the others are routine.
TOLD_EVENTS = ("desync", "warning", "repair", "save_without_manifest")


class AuditTrackers:
    """Sends figures and events to wandb, trackio and TensorBoard; used on the main process alone.

    Other trackers are not served: `AuditConfig.on_event` is there for them.
    """

    def __init__(self, report_to: Collection[str], output_dir: str | Path) -> None:
        self._wanted = set(report_to)
        self._folder = _tensorboard_folder(Path(output_dir))
        self._writer: Any = None
        self._step = 0

    def log_figures(self, summary: AuditSummary, step: int) -> None:
        """What the audit did so far, beside the metrics of `step`."""
        self._step = step
        self._log(
            {
                "audit/audits": summary.audits,
                "audit/desyncs": summary.desyncs,
                "audit/seconds": summary.seconds,
                "audit/share_of_step": summary.share_of_step,
            }
        )

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        """An event of the journal as text, if it is one that somebody should see."""
        if event not in TOLD_EVENTS:
            return
        self._step = fields.get("step") or self._step
        title, level = f"sync audit: {event}", "ERROR" if event == "desync" else "WARN"
        text = str(fields.get("message") or f"{event} at step {self._step}")
        if "wandb" in self._wanted and (run := open_wandb_run()) is not None:
            run.alert(title=title, text=text, level=level)
        if "trackio" in self._wanted and trackio_has_run():
            import trackio

            trackio.alert(title, text, level=trackio.AlertLevel[level])
        if "tensorboard" in self._wanted:
            writer = self._open_writer()
            # As code: Markdown would join the lines and read stars in names of tensors.
            writer.add_text(f"audit/{event}", f"```\n{text}\n```", self._step)
            writer.flush()  # the error that follows may end the process
        self._log({f"audit/{event}": 1})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _log(self, figures: dict[str, float]) -> None:
        if "wandb" in self._wanted and (run := open_wandb_run()) is not None:
            run.log({**figures, "train/global_step": self._step})
        if "trackio" in self._wanted and trackio_has_run():
            import trackio

            trackio.log({**figures, "train/global_step": self._step})
        if "tensorboard" in self._wanted:
            for name, value in figures.items():
                self._open_writer().add_scalar(name, value, self._step)
            self._open_writer().flush()

    def _open_writer(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(self._folder))
        return self._writer


def _tensorboard_folder(output_dir: Path) -> Path:
    """Beside the folder that transformers' callback writes to, and named like it."""
    chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
    started = f"{time.strftime('%b%d_%H-%M-%S')}_{socket.gethostname()}"
    run = Path(chosen).expanduser() if chosen else output_dir / "runs" / started
    return run.with_name(f"{run.name}_sync_audit")
