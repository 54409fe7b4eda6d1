"""One rank of `trl-sync demo`: an audited job with a planted fault, and what the audit made of it.

    python -m trl_sync.cli.demo_rank FAULT FOLDER SEED

Writes `outcome.json` into FOLDER, early and then again, so that a killed rank leaves one as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trl_sync.audit.auditor import SyncAuditor
from trl_sync.audit.checkpoints import verify_resumed, write_checkpoint_manifest
from trl_sync.audit.drill import JOB_OPTIONS, DrillJob, plant_on
from trl_sync.audit.faults import (
    FAULTS,
    Planted,
    byte_flipped,
    launched_alone,
    other_base,
    shard_missing,
)
from trl_sync.errors import DesyncError

UPDATES = 9
FAULT_UPDATE = 3
# Every byte of the frozen base is checked within this many updates.
COVER_UPDATES = 4
TIMEOUT_S = 30.0
# Short, so that nobody waits long for the verdict; long enough for a busy machine's hiccups.
MISSING_TIMEOUT_S = 5.0
DELAY_S = 20.0
INTERRUPTED = 130
WEIGHTS, OPTIMIZER = "adapter_model.safetensors", "optimizer.pt"


class Record:
    """What this rank knows of the drill, on disk whenever something was added."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "outcome.json"
        self._content: dict[str, Any] = {"begun_s": time.time(), "updates_begun_s": []}

    def add(self, **fields: Any) -> None:
        self._content |= fields
        # In one step: the watch may end this process at any moment.
        unfinished = self._file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self._content), encoding="utf-8")
        unfinished.replace(self._file)

    def begin_update(self) -> None:
        self.add(updates_begun_s=[*self._content["updates_begun_s"], time.time()])

    def plant(self, planted: Planted) -> None:
        self.add(planted={"rank": planted.rank, "step": planted.step, "tensor": planted.tensor})


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however that came about."""
    # Not through sys.stdin: a lock that is held there would crash the interpreter when it ends.
    while os.read(0, 1):
        pass
    os._exit(INTERRUPTED)


def main() -> None:
    fault, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    threading.Thread(target=end_with_parent, daemon=True).start()
    record = Record(folder)
    try:
        if fault in FAULTS and FAULTS[fault].on == "checkpoint":
            resume(fault, folder, seed, record)
        else:
            train(fault, folder, seed, record)
    except DesyncError as error:
        findings = [finding.as_dict() for finding in error.findings]
        record.add(named_s=time.time(), message=str(error), findings=findings)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train(fault: str, folder: Path, seed: int, record: Record) -> None:
    """The job with a fault that strikes while it runs, or with none."""
    if fault == "launched_alone":
        with launched_alone() as planted:
            record.plant(planted)
            train_audited(DrillJob(seed=seed), folder, record)
        return
    job = DrillJob(seed=seed, **JOB_OPTIONS.get(fault, {}))
    with planting(job, fault, record):
        missing = fault in FAULTS and FAULTS[fault].cause == "rank_missing"
        timeout_s = MISSING_TIMEOUT_S if missing else TIMEOUT_S
        train_audited(job, folder, record, timeout_s=timeout_s)


@contextlib.contextmanager
def planting(job: DrillJob, fault: str, record: Record) -> Iterator[None]:
    """The fault's block; what it did is recorded when it begins and when it ends."""
    if fault == "none":
        yield
        return
    options: dict[str, Any] = {"delay_s": DELAY_S} if fault.startswith("delayed") else {}
    with plant_on(job, fault, step=FAULT_UPDATE, **options) as planted:
        record.plant(planted)
        try:
            yield
        finally:
            record.plant(planted)


def train_audited(
    job: DrillJob, folder: Path, record: Record, *, timeout_s: float = TIMEOUT_S
) -> None:
    auditor = make_auditor(job, folder, timeout_s=timeout_s)
    record.add(begun_s=time.time())
    with auditor.attach():
        record.begin_update()
        job.train(UPDATES, on_step=lambda *_: record.begin_update())
    record.add(summary=auditor.summary().describe())


def make_auditor(job: DrillJob, folder: Path, **options: Any) -> SyncAuditor:
    return SyncAuditor(
        job.accelerator,
        job.model,
        job.optimizer,
        modules=job.modules,
        output_dir=folder,
        frozen_cover_steps=COVER_UPDATES,
        **options,
    )


def resume(fault: str, folder: Path, seed: int, record: Record) -> None:
    """Trains, saves with a manifest, damages what was saved, and resumes in a second job."""
    checkpoint = folder.parent / f"checkpoint-{FAULT_UPDATE}"
    with make_auditor(job := DrillJob(seed=seed), folder).attach() as auditor:
        job.train(FAULT_UPDATE)
        if auditor.is_main_process:
            save(job, checkpoint)
        write_checkpoint_manifest(auditor, checkpoint, FAULT_UPDATE)
    resumed = DrillJob(seed=seed)
    with contextlib.ExitStack() as stack:
        if fault == "other_base" or resumed.accelerator.is_main_process:
            record.plant(stack.enter_context(damage(fault, resumed, checkpoint)))
        resumed.accelerator.wait_for_everyone()
        load(resumed, checkpoint)
        auditor = make_auditor(resumed, folder, resume_from=checkpoint)
        record.add(begun_s=time.time())
        try:
            auditor.begin(FAULT_UPDATE)
            verify_resumed(auditor, SimpleNamespace(output_dir=folder), FAULT_UPDATE)
        finally:
            auditor.detach()


def damage(
    fault: str, job: DrillJob, checkpoint: Path
) -> contextlib.AbstractContextManager[Planted]:
    if fault == "byte_flipped":
        return byte_flipped(checkpoint, file=WEIGHTS, tensor=next(iter(adapters(job))))
    return shard_missing(checkpoint) if fault == "shard_missing" else other_base(job.model)


def adapters(job: DrillJob) -> dict[str, torch.Tensor]:
    named = job.unwrapped_model.named_parameters()
    return {name: p.detach() for name, p in named if p.requires_grad}


def save(job: DrillJob, checkpoint: Path) -> None:
    from safetensors.torch import save_file

    checkpoint.mkdir()
    save_file(adapters(job), checkpoint / WEIGHTS)
    torch.save(job.optimizer.state_dict(), checkpoint / OPTIMIZER)


def load(job: DrillJob, checkpoint: Path) -> None:
    """Loads what is there and says nothing of what is not, as lenient loaders do."""
    from safetensors.torch import load_file

    if (checkpoint / WEIGHTS).exists():
        job.unwrapped_model.load_state_dict(load_file(checkpoint / WEIGHTS), strict=False)
    job.optimizer.load_state_dict(torch.load(checkpoint / OPTIMIZER, weights_only=True))


if __name__ == "__main__":
    main()
