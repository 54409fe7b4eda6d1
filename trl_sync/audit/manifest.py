"""`sync_manifest.json` beside a checkpoint: checksums of what was in memory and what was written.

| field | meaning |
|---|---|
| `format` | version of this table; another one is refused |
| `package_version` | of the trl_sync that wrote it |
| `created` | UTC, ISO 8601 |
| `step` | optimizer steps done when the checkpoint was written |
| `world_size` | number of ranks |
| `verified` | true: the audit found all ranks equal at this step |
| `reason` | why it is not verified; else null |
| `algorithm` | of all checksums: "xxh3-128", 32 hexadecimal digits |
| `tensors` | scope -> name -> `xxh3_128`, `dtype`, `shape`, in memory on rank 0, whole |
| `tensors.*.*.parts` | of sharded ones: "start:stop" in bytes -> checksum; each was on one rank |
| `partitioned_by` | the ZeRO optimizer whose partitions are in `partitions`; else null |
| `partitions` | rank -> name -> like `tensors`: what one rank's optimizer held |
| `files` | relative path -> `size_bytes`, `xxh3_128`; `header` and `tensors` of safetensors files |
| `files.*.header` | checksum of the bytes before the data: names, dtypes, shapes, positions |
| `files.*.tensors` | name -> checksum of the tensor's bytes in the file |
| `checksum` | of the manifest itself, without this field |

Format 1 had neither `parts` nor what is about partitions; it is still read.

Scopes: `trainable`, `frozen`, `quantization`, `buffers`, `optimizer`. `files` lists the folder and
what is below it, but no hidden folders, no `checkpoint-N` folders inside, and not the manifest.
4-bit weights are recorded as bytes ("uint8", [number, 1]), whatever type their bytes are stored as:
DDP keeps uint8, FSDP2 shards floats only.

The checksums find accidents. They are no signature: whoever can write the folder can forge them.

Files of single ranks (`rng_state_1.pth`, optimizer shards) are files like all others, and each
process writes its own: every rank must have finished, at a barrier, before `write_manifest` runs.
On a node with a folder of its own, write and check a manifest there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from trl_sync._version import __version__
from trl_sync.audit.checkpoint_files import FileRecord, list_files, read_json, record_file
from trl_sync.audit.manifest_base import check_base
from trl_sync.audit.manifest_files import check_files, list_harmless_changes
from trl_sync.audit.manifest_format import (
    MANIFEST_NAME,
    FormatError,
    Manifest,
    TensorRecord,
    from_content,
    to_text,
)
from trl_sync.audit.manifest_problems import Problem, describe
from trl_sync.audit.manifest_tensors import TensorsByScope, check_tensors, record_scope
from trl_sync.errors import CheckpointError

__all__ = [
    "MANIFEST_NAME",
    "Manifest",
    "Problem",
    "TensorsByScope",
    "check_base",
    "check_files",
    "check_tensors",
    "describe",
    "list_harmless_changes",
    "read_manifest",
    "write_manifest",
]

# Left behind when a process is killed while it writes; the next manifest replaces it.
_UNFINISHED = f"{MANIFEST_NAME}.tmp"


def write_manifest(
    folder: Path,
    tensors: TensorsByScope,
    *,
    step: int,
    world_size: int,
    verified: bool,
    reason: str | None = None,
    partitioned_by: str | None = None,
    partitions: Mapping[str, Mapping[str, TensorRecord]] | None = None,
) -> Manifest:
    """The manifest of the checkpoint in `folder`, written there in one atomic step.

    `tensors` are the live ones by scope, or records of sharded ones; `reason` says why the ranks
    were not verified; `partitions` are what the optimizer `partitioned_by` held on each rank. One
    process per folder writes, after all ranks have finished writing theirs.

    Raises:
        CheckpointError: the folder is empty, a file cannot be read or is cut short.
        OSError: the manifest cannot be written; one that was there before is still whole.
        TypeError: a tensor has no bytes in memory.
        ValueError: two tensors of a scope have one name, or `reason` and `verified` disagree.
    """
    if verified == (reason is not None):
        raise ValueError(f"verified is {verified} and reason {reason!r}: exactly one must be given")
    manifest = Manifest(
        package_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        step=step,
        world_size=world_size,
        verified=verified,
        reason=reason,
        tensors={scope: record_scope(scope, named) for scope, named in tensors.items()},
        files=_record_files(folder),
        partitioned_by=partitioned_by,
        partitions=partitions or {},
    )
    _replace(folder, to_text(manifest))
    return manifest


def _record_files(folder: Path) -> dict[str, FileRecord]:
    try:
        paths = list_files(folder, frozenset({MANIFEST_NAME, _UNFINISHED}))
        files = {path: record_file(folder / path) for path in paths}
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}. No manifest written.") from error
    if not files:
        raise CheckpointError(f"{folder} holds no files: write the manifest after the checkpoint.")
    return files


def _replace(folder: Path, text: str) -> None:
    with (folder / _UNFINISHED).open("w", encoding="ascii") as stream:
        stream.write(text)
        stream.flush()
        # Otherwise a power failure may leave the new name on an empty file.
        os.fsync(stream.fileno())
    os.replace(folder / _UNFINISHED, folder / MANIFEST_NAME)


def read_manifest(folder: Path) -> Manifest:
    """The manifest beside the checkpoint in `folder`.

    Raises:
        CheckpointError: there is none, it is damaged, was edited, or has another format.
    """
    file = folder / MANIFEST_NAME
    try:
        return from_content(read_json(file.read_bytes(), FormatError))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} does not exist: the checkpoint was saved without the audit, or the process "
            "ended before the save was complete."
        ) from error
    except (OSError, FormatError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be used: {error}. Without it the checkpoint cannot be verified; take "
            "an earlier checkpoint or a copy of this one."
        ) from error
