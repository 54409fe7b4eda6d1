"""`trl-sync verify`: a checkpoint's files against the manifest that was written beside them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from trl_sync.audit.manifest import (
    Manifest,
    Problem,
    check_base,
    check_files,
    describe,
    list_harmless_changes,
    read_manifest,
)
from trl_sync.errors import ConfigError


def show_verification(checkpoint: Path, base: Path | None, *, as_json: bool) -> bool:
    """Prints what is wrong with a checkpoint; True if nothing is.

    Raises:
        ConfigError: there is no manifest that can be read, or no such folder.
    """
    for folder in (checkpoint, base):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; expected one with a checkpoint in it.")
    manifest = read_manifest(checkpoint)
    problems = check_files(checkpoint, manifest)
    if base is not None:
        problems += check_base(manifest, base)
    # What cannot be compared is said, and is nothing that is wrong.
    wrong = [problem for problem in problems if problem.kind != "not_comparable"]
    notes = [problem for problem in problems if problem.kind == "not_comparable"]
    notes += list_harmless_changes(checkpoint, manifest)
    if as_json:
        print(json.dumps(as_content(checkpoint, manifest, wrong, notes), indent=2))
    else:
        print_text(manifest, wrong, notes)
    return not wrong


def as_content(
    checkpoint: Path, manifest: Manifest, wrong: list[Problem], notes: list[Problem]
) -> dict[str, object]:
    return {
        "checkpoint": str(checkpoint),
        "verified": not wrong,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "files": len(manifest.files),
        "tensors": num_tensors(manifest),
        "problems": [asdict(problem) for problem in wrong],
        "notes": [asdict(problem) for problem in notes],
    }


def print_text(manifest: Manifest, wrong: list[Problem], notes: list[Problem]) -> None:
    if wrong:
        print(describe(wrong))
    else:
        files, tensors = len(manifest.files), num_tensors(manifest)
        print(f"verified: {files} files, {tensors} tensors, step {manifest.step}")
    for note in notes:
        print(f"note: {note}")


def num_tensors(manifest: Manifest) -> int:
    """Tensors whose bytes lie in the checkpoint's safetensors files and were checked there."""
    return sum(len(record.tensors or ()) for record in manifest.files.values())
