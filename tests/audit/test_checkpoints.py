"""When ranks meet around a save, and edits that a loop declares; one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from torch import nn

from trl_sync.audit import checkpoints
from trl_sync.audit.auditor import SyncAuditor
from trl_sync.audit.compare import Comparison


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a save does, in order."""
    seen: list[str] = []
    write = checkpoints.write_manifest

    def writing(folder: Path, *args: Any, **fields: Any) -> Any:
        seen.append("write")
        return write(folder, *args, **fields)

    monkeypatch.setattr(checkpoints, "write_manifest", writing)
    monkeypatch.setattr(Comparison, "barrier", lambda self: seen.append("meet"))
    return seen


@pytest.mark.parametrize(
    "folder, expected",
    [
        ("saved", ["meet", "write", "meet"]),
        ("empty", ["meet", "write", "meet"]),  # refused: it holds no files
        ("missing", ["meet", "meet"]),
    ],
)
def test_ranks_meet_after_every_save(
    events: list[str], tmp_path: Path, folder: str, expected: list[str]
) -> None:
    for name in ("saved", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "saved" / "weights").write_bytes(b"1")
    auditor = SyncAuditor(PartialState(), nn.Linear(2, 1))
    auditor.begin()
    checkpoints.write_checkpoint_manifest(auditor, tmp_path / folder, 0)
    auditor.detach()
    assert events == expected
    written = (tmp_path / folder / checkpoints.MANIFEST_NAME).exists()
    assert written == (folder == "saved")


def test_expected_edits_follow_a_verdict_that_comes_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    auditor = SyncAuditor(PartialState(), model, optimizer, blocking=False)
    edited: list[bool] = []
    monkeypatch.setattr(
        auditor, "_warn_of_edits", lambda snapshot, history: edited.append(bool(history.edited))
    )
    with auditor.attach():
        # As if there were other ranks: on one, edits are told to nobody and not looked for.
        monkeypatch.setattr(auditor._snapshotter, "_alone", False)
        for number in range(4):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            with torch.no_grad():
                model.weight.clamp_(-1e-3, 1e-3)
            if number != 2:
                auditor.expect_edits()
    # At the start, after each update, and at the end; the edit after the third was not announced.
    assert edited == [False, False, False, False, True, False]
