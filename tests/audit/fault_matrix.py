"""Plants every fault that a process survives, one after another, in one launch of ranks."""

from __future__ import annotations

import time
from typing import Any

STEPS = 9
FAULT_STEP = 3
COVER_STEPS = 4


def run_both(
    names: list[str | None], audit_options: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`run_matrix` with faults planted before training where they can be, and in the middle."""
    return run_matrix(names, False, audit_options), run_matrix(names, True, audit_options)


def run_matrix(
    names: list[str | None], late: bool, audit_options: dict[str, Any]
) -> list[dict[str, Any]]:
    """What the audit said of each fault, on this rank; None as a name is the healthy job."""
    return [run_one(name, late, audit_options) for name in names]


Case = tuple[str | None, bool]  # a fault, None for the healthy job, and whether it comes late


def run_under_engine(
    cases: list[Case], absent: list[Case]
) -> tuple[list[dict[str, Any]], dict[Case, str]]:
    """What the audit said of `cases`, and why those in `absent` cannot be planted."""
    return [run_one(name, late, {}) for name, late in cases], refusals(absent)


def refusals(absent: list[Case]) -> dict[Case, str]:
    from trl_sync.audit.drill import DrillJob, plant_on

    job = DrillJob()
    found = {}
    for name, late in absent:
        try:
            with plant_on(job, str(name), step=FAULT_STEP, late=late):
                found[name, late] = "it was planted"
        except ValueError as error:
            found[name, late] = str(error)
    job.close()
    return found


def run_one(name: str | None, late: bool, audit_options: dict[str, Any]) -> dict[str, Any]:
    from trl_sync.audit.drill import JOB_OPTIONS, DrillJob

    job = DrillJob(**JOB_OPTIONS.get(name or "", {}))
    try:
        row = run_job(job, name, late, audit_options)
        row["parameters"] = digests(job)
        return row
    finally:
        job.close()


def digests(job: Any) -> dict[str, str]:
    """What this rank holds of each trainable parameter."""
    from fault_observer import digest

    from trl_sync.audit.faults.state import local_tensor, named_parameters

    parameters = named_parameters(job.model)
    return {n: digest(local_tensor(p)) for n, p in parameters.items() if p.requires_grad}


def run_job(
    job: Any, name: str | None, late: bool, audit_options: dict[str, Any]
) -> dict[str, Any]:
    import contextlib

    from trl_sync.audit.drill import plant_on
    from trl_sync.errors import DesyncError

    planting = (
        contextlib.nullcontext()
        if name is None
        else plant_on(job, name, step=FAULT_STEP, late=late)
    )
    row: dict[str, Any] = {"fault": name, "late": late, "cause": None}
    started_s = time.perf_counter()
    try:
        with planting as planted:
            train_audited(job, audit_options, row)
    except DesyncError as error:
        finding = error.findings[0]
        row |= {
            "cause": finding.cause.value,
            "scope": finding.scope and finding.scope.value,
            "tensor": finding.tensor,
            "role": finding.role,
            "ranks": finding.ranks,
            "step": finding.step,
            "message": str(error),
            "milliseconds": error.report.seconds * 1e3,
        }
    if name is not None:
        row["planted_tensor"], row["struck"] = planted.tensor, planted.struck
    row["updates"], row["wall_s"] = job.num_updates, time.perf_counter() - started_s
    return row


def train_audited(job: Any, audit_options: dict[str, Any], row: dict[str, Any]) -> None:
    from trl_sync import SyncAuditor

    options = {"frozen_cover_steps": COVER_STEPS, "timeout_s": 30} | audit_options
    auditor = SyncAuditor(job.accelerator, job.model, job.optimizer, modules=job.modules, **options)
    try:
        with auditor.attach():
            job.train(STEPS)
        row["audits"] = auditor.summary().audits
    finally:
        auditor.detach()
