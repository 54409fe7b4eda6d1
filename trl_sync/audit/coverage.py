"""What is audited, what is not, and why: the journal's first line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_sync.audit.config import AuditConfig
from trl_sync.audit.findings import Scope
from trl_sync.audit.inventory import Inventory


def coverage(
    scope: Scope, inventory: Inventory, config: AuditConfig, unavailable: Mapping[Scope, str]
) -> dict[str, Any]:
    """Whether `scope` is audited and how much there is, or why it is not."""
    if scope in unavailable:
        return {"status": "unavailable", "reason": unavailable[scope]}
    if not config.audits(scope):
        return {"status": "not chosen"}
    tensors = inventory.tensors_of(scope)
    if tensors is None:
        return {"status": "audited"}
    size = sum(tensor.nbytes for tensor in tensors.tensors)
    found: dict[str, Any] = {"status": "audited", "tensors": len(tensors), "size_bytes": size}
    if scope is Scope.OPTIMIZER and not len(tensors):
        found["reason"] = "the first update makes the state"
    return found
