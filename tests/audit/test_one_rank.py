"""Without other ranks the audit hashes only what it can say something about."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import nn

from audit_log import logged
from trl_sync import DesyncError, SyncAuditor
from trl_sync.audit.findings import Cause

# Bytes of the trainable parameters of `model()`.
SIZE_BYTES = 4 * (8 * 8 + 8)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8))


Edit = Callable[[int, SyncAuditor], None]


def train(
    net: nn.Module, optimizer: Any, audit: SyncAuditor, steps: int, edit: Edit | None = None
) -> None:
    with audit.attach() as auditor:
        for step in range(1, steps + 1):
            if edit is not None:
                edit(step, auditor)
            net(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def run(
    net: nn.Module, steps: int, path: Path, edit: Edit | None = None, **options: int
) -> list[dict[str, Any]]:
    """Trains `net` under the audit; the lines of the journal."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    audit = SyncAuditor(PartialState(cpu=True), net, optimizer, journal=path, **options)
    with logged() as messages:
        train(net, optimizer, audit, steps, edit)
    assert not messages  # nothing that was asked for is missing
    return [json.loads(line) for line in path.read_text().splitlines()]


def updates(journal: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The audits of updates, without those of everything at the start and at the end."""
    return [line for line in journal if "after" in line.get("roots", {})]


def test_an_update_hashes_the_parameters_once(tmp_path: Path) -> None:
    journal = run(model(), 3, tmp_path / "journal.jsonl")
    scopes = journal[0]["scopes"]
    assert scopes["gradients"]["status"] == "not needed"
    assert "one rank" in scopes["gradients"]["reason"]
    assert [line["size_bytes"] for line in updates(journal)] == [SIZE_BYTES] * 3
    roots = [line["roots"] for line in updates(journal)]
    for last, now in itertools.pairwise(roots):
        assert now["before"] == last["after"] != now["after"]


def test_what_was_set_or_updated_in_between_is_hashed_anew(tmp_path: Path) -> None:
    net = model()

    def edit(step: int, auditor: SyncAuditor) -> None:
        if step == 2:
            net[0].bias.data.add_(1.0)
            auditor.expect_edits()

    sizes = [line["size_bytes"] for line in updates(run(net, 3, tmp_path / "edited.jsonl", edit))]
    assert sizes == [SIZE_BYTES, 2 * SIZE_BYTES, SIZE_BYTES]
    seldom = run(model(), 4, tmp_path / "seldom.jsonl", every_steps=2)
    assert [line["size_bytes"] for line in updates(seldom)] == [2 * SIZE_BYTES] * 2


def test_a_parameter_that_never_moves_is_named(tmp_path: Path) -> None:
    net = model()
    kept = net[0].bias.detach().clone()

    def restore(*args: object) -> None:
        net[0].bias.data.copy_(kept)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.register_step_post_hook(restore)
    audit = SyncAuditor(PartialState(cpu=True), net, optimizer, journal=None)
    with logged(), pytest.raises(DesyncError) as error:
        train(net, optimizer, audit, steps=6)
    finding = error.value.findings[0]
    assert finding.cause is Cause.NEVER_UPDATED
    assert finding.tensor == "0.bias"
