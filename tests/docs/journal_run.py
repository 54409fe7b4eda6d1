"""A run of three ranks whose journal holds every event there is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def write_journal(folder: str) -> None:
    """Runs on a rank: updates, a repaired flip, a buffer that differs, saves and resumes."""
    import torch
    from accelerate import Accelerator
    from torch import nn

    from trl_sync import SyncAuditor
    from trl_sync.audit.checkpoints import verify_resumed, write_checkpoint_manifest

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    model.register_buffer("seen", torch.zeros(()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    inner = accelerator.unwrap_model(model)
    saved, empty = Path(folder, "checkpoint-2"), Path(folder, "checkpoint-0")
    for path in (saved, empty):
        path.mkdir(exist_ok=True)
    Path(saved, "model.txt").write_text("weights")
    auditor = SyncAuditor(accelerator, model, optimizer, output_dir=folder, on_desync="repair")
    with auditor.attach():
        for number in range(2):
            accelerator.backward(model(torch.ones(2, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            if number == 0 and accelerator.process_index == 2:
                inner.weight.data[0, 0] += 1.0
        write_checkpoint_manifest(auditor, saved, 2)
        write_checkpoint_manifest(auditor, empty, 2)
        verify_resumed(auditor, SimpleNamespace(output_dir=folder), 2)
        resume_from_zero(auditor, Path(folder, "checkpoint-3"))
        inner.seen += accelerator.process_index


def resume_from_zero(auditor: Any, saved: Path) -> None:
    """Resumes from what ZeRO-2 would have saved: its partitions compare with nothing here."""
    from trl_sync.audit.checkpoints import verify_resumed
    from trl_sync.audit.manifest import write_manifest
    from trl_sync.audit.manifest_state import whole_tensors

    saved.mkdir(exist_ok=True)
    if auditor.is_main_process:
        Path(saved, "model.txt").write_text("weights")
        tensors = {**whole_tensors(auditor.inventory), "optimizer": []}
        partitions: dict[str, dict[str, Any]] = {"0": {}, "1": {}, "2": {}}
        write_manifest(
            saved,
            tensors,
            step=3,
            world_size=3,
            verified=True,
            partitioned_by="ZeRO-2",
            partitions=partitions,
        )
    auditor.comparison.barrier()
    verify_resumed(auditor, SimpleNamespace(output_dir=str(saved.parent)), 3)


def read_fields(journal: Path) -> dict[str, set[str]]:
    """The fields of each kind of event, and of a finding and its difference."""
    fields: dict[str, set[str]] = {}
    for line in journal.read_text().splitlines():
        event: dict[str, Any] = json.loads(line)
        found = fields.setdefault(event["event"], set())
        assert not found or found == set(event), f"{event['event']} has different fields"
        found |= set(event)
        for finding in event.get("findings", []):
            assert set(finding) == fields.setdefault("finding", set(finding))
            if finding["difference"] is not None:
                fields["difference"] = set(finding["difference"])
    return fields
