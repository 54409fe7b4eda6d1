"""Manifests of a trainer's checkpoints: written after each save, verified after each resume."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from trl_sync.audit.auditor import SyncAuditor
from trl_sync.audit.findings import Cause, Finding, Scope
from trl_sync.audit.manifest import (
    MANIFEST_NAME,
    check_files,
    check_tensors,
    describe,
    read_manifest,
    write_manifest,
)
from trl_sync.errors import CheckpointError

logger = logging.getLogger("trl_sync.audit")


def state_by_scope(auditor: SyncAuditor) -> dict[str, list[tuple[str, Tensor]]]:
    """The tensors a manifest holds, by scope."""
    inventory = auditor.inventory
    return {
        Scope.TRAINABLE.value: list(inventory.trainable.items()),
        Scope.FROZEN.value: list(inventory.frozen.items()),
        Scope.QUANTIZATION.value: list(inventory.quantization.items()),
        Scope.BUFFERS.value: list(inventory.buffers.items()),
        Scope.OPTIMIZER.value: list(inventory.optimizer_state().items()),
    }


def write_checkpoint_manifest(auditor: SyncAuditor, folder: Path, step: int) -> None:
    """`sync_manifest.json` in `folder`, once every rank has written its files. Collective."""
    reason = auditor.reaction.unverified_reason
    if reason is None and auditor.last_equal_step != step and not auditor.check(step).equal:
        reason = f"ranks differ at step {step}: {auditor.last_equal_step} was the last equal one"
    auditor.inventory.refresh(force=True)
    auditor.comparison.barrier()
    if not auditor.is_main_process:
        return
    if not folder.is_dir():
        logger.warning("sync audit: no folder %s; the checkpoint has no manifest", folder)
        return
    try:
        write_manifest(
            folder,
            state_by_scope(auditor),
            step=step,
            world_size=auditor.comparison.world_size,
            verified=reason is None,
            reason=reason,
        )
    except (CheckpointError, OSError) as error:
        # The checkpoint is the trainer's; that it cannot be verified later is no reason to lose it.
        logger.warning("sync audit: %s has no manifest: %s", folder, error)
        auditor.note("save_without_manifest", step=step, folder=str(folder), reason=str(error))
        return
    auditor.note("save", step=step, folder=str(folder), verified=reason is None)


def verify_resumed(auditor: SyncAuditor, args: Any, step: int) -> None:
    """Compares what was loaded with the manifest of the checkpoint it came from. Collective.

    Raises:
        DesyncError: `manifest_mismatch`, on every rank, before the first step.
    """
    problems: list[str] = []
    folder = resumed_folder(auditor, args, step)
    if folder is None:
        if auditor.is_main_process:
            logger.warning(
                "sync audit: resumed at step %d without a %s: what was loaded is not verified. If "
                "the checkpoint lies elsewhere, pass SyncAuditCallback(resume_from=...)",
                step,
                MANIFEST_NAME,
            )
    else:
        problems = _problems(auditor, folder)
    everyone = auditor.comparison.gather(problems)
    ranks = tuple(rank for rank, found in enumerate(everyone) if found)
    if ranks:
        raise auditor.refuse(
            Finding(
                cause=Cause.MANIFEST_MISMATCH,
                step=step,
                ranks=ranks,
                tensor=everyone[ranks[0]][0] or None,
                evidence=everyone[ranks[0]][1],
            )
        )
    if folder is not None:
        auditor.note("resume", step=step, folder=str(folder), verified=True)


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


def _problems(auditor: SyncAuditor, folder: Path) -> list[str]:
    """Nothing, or the first tensor or file and all that is wrong."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [MANIFEST_NAME, str(error)]
    if not manifest.verified:
        return [MANIFEST_NAME, f"{folder} is marked unverified: {manifest.reason}"]
    live: dict[str, Iterable[tuple[str, Tensor]]] = dict(state_by_scope(auditor))
    # Buffers may be computed anew when a model is loaded.
    problems = check_tensors(manifest, live, [scope for scope in live if scope != Scope.BUFFERS])
    if problems and auditor.is_main_process:
        problems += check_files(folder, manifest)
    if not problems:
        return []
    return [problems[0].name or "", f"{folder}: {describe(problems)}."]
