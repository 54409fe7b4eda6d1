"""Manifests of a trainer's checkpoints: written after each save, verified after each resume."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from trl_sync.audit.auditor import SyncAuditor
from trl_sync.audit.findings import Cause, Finding, Scope
from trl_sync.audit.manifest import (
    MANIFEST_NAME,
    Manifest,
    Problem,
    check_files,
    check_tensors,
    describe,
    read_manifest,
    write_manifest,
)
from trl_sync.audit.manifest_problems import Kind
from trl_sync.audit.manifest_shards import look_at_sharded, record_sharded
from trl_sync.audit.manifest_state import (
    own_partitions,
    partitioned_by,
    sharded_tensors,
    whole_tensors,
)
from trl_sync.audit.manifest_tensors import check_scope
from trl_sync.errors import CheckpointError

logger = logging.getLogger("trl_sync.audit")


# The last manifest that was written or verified: what did not move since is not gathered again.
_last: WeakKeyDictionary[SyncAuditor, Manifest] = WeakKeyDictionary()


def write_checkpoint_manifest(auditor: SyncAuditor, folder: Path, step: int) -> None:
    """`sync_manifest.json` in `folder`, once every rank has written its files. Collective."""
    reason = auditor.reaction.unverified_reason
    if reason is None and auditor.last_equal_step != step and not auditor.check(step).equal:
        reason = f"ranks differ at step {step}: {auditor.last_equal_step} was the last equal one"
    auditor.inventory.refresh(force=True)
    auditor.comparison.barrier()
    _write(auditor, folder, step, reason)
    # Else the others would wait for rank 0's files and checksums in training's next collective,
    # whose limit may be shorter than the audit's.
    auditor.comparison.barrier()


def _write(auditor: SyncAuditor, folder: Path, step: int, reason: str | None) -> None:
    """The manifest, by rank 0, from what all hold; `reason`: why it is unverified. Collective."""
    try:
        state = _state_to_write(auditor)
        if not auditor.is_main_process:
            return
        if not folder.is_dir():
            logger.warning("sync audit: no folder %s; the checkpoint has no manifest", folder)
            return
        _last[auditor] = write_manifest(
            folder,
            **state,
            step=step,
            world_size=auditor.comparison.world_size,
            verified=reason is None,
            reason=reason,
        )
    except (CheckpointError, OSError) as error:
        # The checkpoint is the trainer's; that it cannot be verified later is no reason to lose it.
        if auditor.is_main_process:
            logger.warning("sync audit: %s has no manifest: %s", folder, error)
        auditor.note("save_without_manifest", step=step, folder=str(folder), reason=str(error))
        return
    auditor.note("save", step=step, folder=str(folder), verified=reason is None)


def _state_to_write(auditor: SyncAuditor) -> dict[str, Any]:
    """Tensors and partitions for `write_manifest`; complete on rank 0. Collective.

    Raises:
        CheckpointError: ranks hold different sharded tensors; on every rank.
    """
    inventory, comparison = auditor.inventory, auditor.comparison
    known = _last[auditor].tensors if auditor in _last else {}
    sharded = record_sharded(comparison, sharded_tensors(inventory), known)
    engine = partitioned_by(inventory)
    partitions = comparison.gather(own_partitions(inventory)) if engine else []
    return {
        "tensors": {
            scope: [*named, *sharded.get(scope, {}).items()]
            for scope, named in whole_tensors(inventory).items()
        },
        "partitioned_by": engine,
        "partitions": {str(rank): records for rank, records in enumerate(partitions)},
    }


def verify_resumed(auditor: SyncAuditor, args: Any, step: int) -> None:
    """Compares what was loaded with the manifest of the checkpoint it came from. Collective.

    Optimizer state that ZeRO keeps in partitions is compared if it was saved by the same optimizer
    on as many ranks; else the files are, and a warning says so.

    Raises:
        DesyncError: `manifest_mismatch`, on every rank, before the first step.
    """
    folder = resumed_folder(auditor, args, step)
    if folder is None and auditor.is_main_process:
        logger.warning(
            "sync audit: resumed at step %d without a %s: what was loaded is not verified. If "
            "the checkpoint lies elsewhere, pass SyncAuditCallback(resume_from=...)",
            step,
            MANIFEST_NAME,
        )
    manifest, own = _read(folder)
    own += _differences(auditor, manifest)
    uncompared = None if manifest is None else _uncompared(auditor, manifest)
    # Texts, which stay short however many tensors differ.
    said = [(own[0].name or own[0].place, describe(own))] if own else []
    everyone = auditor.comparison.gather((said, uncompared))
    found = {rank: first for rank, (said, _) in enumerate(everyone) for first in said}
    reason = next((reason for _, reason in everyone if reason is not None), None)
    if found or reason is not None:
        files = auditor.comparison.gather(_damaged_files(auditor, folder, manifest))[0]
        if found or files:
            everywhere = tuple(range(len(everyone)))
            raise auditor.refuse(_finding(folder, step, found, files, everywhere))
        if auditor.is_main_process:
            logger.warning("sync audit: %s", reason)
        auditor.note("not_compared", step=step, folder=str(folder), reason=reason)
    if folder is not None and manifest is not None:
        _last[auditor] = manifest
        auditor.note("resume", step=step, folder=str(folder), verified=True)


def _read(folder: Path | None) -> tuple[Manifest | None, list[Problem]]:
    """The manifest in `folder` if it can be relied on, else why not."""
    if folder is None:
        return None, []
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return None, [_about_manifest("unreadable", str(error))]
    if not manifest.verified:
        detail = f"{folder} is marked unverified: {manifest.reason}"
        return None, [_about_manifest("unverified", detail)]
    return manifest, []


def _about_manifest(kind: Kind, detail: str) -> Problem:
    return Problem(kind=kind, place=MANIFEST_NAME, name=None, detail=detail)


def _differences(auditor: SyncAuditor, manifest: Manifest | None) -> list[Problem]:
    """What this rank holds that is not as the manifest says. Collective, with a manifest or not."""
    inventory = auditor.inventory
    members = [member for member in sharded_tensors(inventory) if member.scope != Scope.BUFFERS]
    seen = look_at_sharded(
        auditor.comparison, members, None if manifest is None else manifest.tensors
    )
    if manifest is None:
        return []
    live = {
        scope: [*named, *seen.get(scope, ())] for scope, named in whole_tensors(inventory).items()
    }
    # Buffers may be computed anew when a model is loaded.
    scopes = [scope for scope in live if scope != Scope.BUFFERS]
    if manifest.partitioned_by != partitioned_by(inventory):
        scopes.remove(Scope.OPTIMIZER.value)
    problems = check_tensors(manifest, live, scopes)
    if manifest.partitioned_by is not None and _uncompared(auditor, manifest) is None:
        written = manifest.partitions.get(str(auditor.comparison.rank), {})
        held = own_partitions(inventory)
        problems += check_scope(Scope.OPTIMIZER.value, written, held.items())
    return problems


def _uncompared(auditor: SyncAuditor, manifest: Manifest) -> str | None:
    """Why the optimizer's state cannot be compared with the manifest; None if it can."""
    engine, ranks = partitioned_by(auditor.inventory), auditor.comparison.world_size
    if manifest.partitioned_by != engine:
        saved, held = (name or "whole tensors" for name in (manifest.partitioned_by, engine))
        return (
            "the optimizer's state was not compared with the manifest: it was recorded as "
            f"{saved}, and is held as {held}. The checkpoint's files were."
        )
    if engine is not None and manifest.world_size != ranks:
        return (
            f"the optimizer's state was not compared with the manifest: {engine} divides it among "
            f"{ranks} ranks, and did among {manifest.world_size}. The checkpoint's files were."
        )
    return None


def _damaged_files(
    auditor: SyncAuditor, folder: Path | None, manifest: Manifest | None
) -> list[tuple[str, str]]:
    """The first file that is not as it was written and what is said of all, on rank 0."""
    if folder is None or manifest is None or not auditor.is_main_process:
        return []
    problems = check_files(folder, manifest)
    return [(problems[0].place, f"Of the files: {describe(problems)}")] if problems else []


def _finding(
    folder: Path | None,
    step: int,
    found: Mapping[int, tuple[str, str]],
    files: Sequence[tuple[str, str]],
    everywhere: tuple[int, ...],
) -> Finding:
    """`manifest_mismatch`, the same on every rank; damaged files concern all of them.

    `found`: by rank the first tensor and all that is said; `files` the same, once or not at all.
    """
    told = [*list(found.values())[:1], *files]
    said = "\n".join(text for _, text in told)
    return Finding(
        cause=Cause.MANIFEST_MISMATCH,
        step=step,
        ranks=tuple(found) or everywhere,
        tensor=told[0][0],
        evidence=f"{folder}: {said}.",
    )


def resumed_folder(auditor: SyncAuditor, args: Any, step: int) -> Path | None:
    """Where this run was resumed from, if a manifest lies there.

    A trainer does not tell callbacks the path that was passed to `train()`; it is looked up.
    """
    known = auditor.config.resume_from or _path_being_resumed()
    folder = Path(known) if known is not None else Path(args.output_dir) / f"checkpoint-{step}"
    return folder if (folder / MANIFEST_NAME).is_file() else None


def _path_being_resumed() -> str | None:
    """The checkpoint that the running `Trainer.train` loads, from its own variable.

    Checked on transformers 5.23; tests/audit/test_trl_trainers.py resumes from a folder elsewhere.
    """
    frame = inspect.currentframe()
    while frame is not None:
        path = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_globals.get("__name__") == "transformers.trainer" and isinstance(path, str):
            return path
        frame = frame.f_back
    return None
