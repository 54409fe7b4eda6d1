"""A training with the audit whose figures and events go to trackers.

Run as a program it logs to trackio, which chooses its folder when it is imported, and prints what
trackio stored, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import trainer_runs
from trl_sync import DesyncError, SyncAuditCallback

PROJECT, RUN = "audited", "broken"


class MovesReference(TrainerCallback):
    """After step 2 it edits a model that must not change."""

    def __init__(self, reference: torch.nn.Module) -> None:
        self.reference = reference

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.reference.weight.data[0, 0] += 1.0


def train_broken(folder: Path, **changes: Any) -> DesyncError:
    """The error that ends a training whose frozen reference moved after step 2."""
    trainer_runs.save_bases(folder)
    reference = torch.nn.Linear(4, 4).requires_grad_(False)
    audit = SyncAuditCallback(modules={"reference": reference}, frozen_cover_steps=1)
    trainer = trainer_runs.trainer("trainer", "full", folder, audit, name="run", **changes)
    trainer.add_callback(MovesReference(reference))
    try:
        trainer.train()
    except DesyncError as error:
        return error
    raise AssertionError("the audit did not see that the reference moved")


def main(folder: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    error = train_broken(folder, report_to=["trackio"], project=PROJECT, run_name=RUN)
    import trackio

    trackio.finish()  # the training ended before its callback could
    stored = {
        "error": str(error),
        "logs": SQLiteStorage.get_logs(PROJECT, RUN),
        "alerts": SQLiteStorage.get_alerts(PROJECT, RUN),
    }
    print("STORED " + json.dumps(stored, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
