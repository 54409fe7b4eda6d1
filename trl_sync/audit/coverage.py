"""What is audited, what is not, and why: the journal's first line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from trl_sync.audit.config import AuditConfig
from trl_sync.audit.findings import Scope
from trl_sync.audit.inventory import Inventory
from trl_sync.audit.named_tensors import NamedTensors
from trl_sync.audit.sharding import Reach


def coverage(
    scope: Scope,
    inventory: Inventory,
    config: AuditConfig,
    unavailable: Mapping[Scope, str],
    needless: Mapping[Scope, str],
    uncompared: Mapping[Scope, str] | None = None,
) -> dict[str, Any]:
    """Whether `scope` is audited, how much there is and whom it is compared with; or why not."""
    if scope in unavailable:
        return {"status": "unavailable", "reason": unavailable[scope]}
    if not config.audits(scope):
        return {"status": "not chosen"}
    if scope in needless:
        return {"status": "not needed", "reason": needless[scope]}
    missing = {} if uncompared is None else uncompared
    found: dict[str, Any] = {"status": "audited"}
    if scope in missing:
        found["not_compared"] = missing[scope]
    tensors = inventory.tensors_of(scope)
    if tensors is None:
        return found
    own = [tensor for tensor in tensors.own() if tensor is not None]
    found |= {"tensors": len(tensors), "size_bytes": sum(tensor.nbytes for tensor in own)}
    if not tensors.is_plain:
        found["compared_with"] = _compared_with(scope, tensors)
        if scope is Scope.GRADIENTS and not found["compared_with"]:
            return {"status": "unavailable", "reason": missing[scope]}
    if scope is Scope.OPTIMIZER and not len(tensors):
        found["reason"] = "the first update makes the state"
    return found


def gaps(
    scopes: Mapping[str, Mapping[str, Any]], inventory: Inventory, config: AuditConfig
) -> Iterator[str]:
    """What was asked for and is not checked, each with the reason; `scopes` has the `coverage` of
    each scope.
    """
    if inventory.unavailable:
        name, reason = next(iter(inventory.unavailable.items()))
        yield f"{len(inventory.unavailable)} tensors are not checked, such as {name}: {reason}"
    for scope, line in scopes.items():
        if not config.audits(Scope(scope)):
            continue
        if line["status"] == "unavailable":
            yield f"{scope} is not checked here: {line['reason']}"
        elif "not_compared" in line:
            yield f"{scope} is checked in part here, without {line['not_compared']}"


def _compared_with(scope: Scope, tensors: NamedTensors) -> dict[str, int]:
    """The number of tensors by whom they are compared with."""
    counts = Counter(layout.reach for layout in tensors.layouts)
    if scope in (Scope.GRADIENTS, Scope.OPTIMIZER):
        # They are others after each update: what they were before says nothing.
        del counts[Reach.SELF]
    return {reach.value: counts[reach] for reach in Reach if counts[reach]}
