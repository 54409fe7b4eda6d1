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
| `tensors` | scope -> name -> `xxh3_128`, `dtype`, `shape`, in memory on rank 0 |
| `files` | relative path -> `size_bytes`, `xxh3_128`; `header` and `tensors` of safetensors files |
| `files.*.header` | checksum of the bytes before the data: names, dtypes, shapes, positions |
| `files.*.tensors` | name -> checksum of the tensor's bytes in the file |
| `checksum` | of the manifest itself, without this field |

Scopes: `trainable`, `frozen`, `quantization`, `buffers`, `optimizer`. `files` lists the folder and
what is below it, but no hidden folders, no `checkpoint-N` folders inside, and not the manifest.

The checksums find accidents. They are no signature: whoever can write the folder can forge them.

Files of single ranks (`rng_state_1.pth`, optimizer shards) are files like all others, and each
process writes its own: every rank must have finished, at a barrier, before `write_manifest` runs.
On a node with a folder of its own, write and check a manifest there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from trl_sync._version import __version__
from trl_sync.audit.checkpoint_files import FileRecord, list_files, read_json, record_file
from trl_sync.audit.digest import xxh3
from trl_sync.audit.manifest_base import check_base, summarize_base
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

TensorsByScope = Mapping[str, Iterable[tuple[str, Tensor]]]

# Left behind when a process is killed while it writes; the next manifest replaces it.
_UNFINISHED = f"{MANIFEST_NAME}.tmp"
# Scopes that belong to the base as a whole.
_BASE_SCOPES = ("frozen", "quantization")


def write_manifest(
    folder: Path,
    tensors: TensorsByScope,
    *,
    step: int,
    world_size: int,
    verified: bool,
    reason: str | None = None,
) -> Manifest:
    """The manifest of the checkpoint in `folder`, written there in one atomic step.

    `tensors` are the live ones by scope; `reason` says why the ranks were not verified. One process
    per folder writes, after all ranks have finished writing theirs.

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
        tensors={scope: _records(scope, named) for scope, named in tensors.items()},
        files=_record_files(folder),
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


def _records(scope: str, named: Iterable[tuple[str, Tensor]]) -> dict[str, TensorRecord]:
    return {name: _record(tensor) for name, tensor in _distinct(scope, named)}


def _record(tensor: Tensor) -> TensorRecord:
    return TensorRecord(
        xxh3_128=xxh3(tensor).hex(), dtype=_dtype(tensor), shape=tuple(tensor.shape)
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _distinct(scope: str, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name, tensor in named:
        if name in seen:
            raise ValueError(f"two tensors of the scope {scope!r} are called {name!r}")
        seen.add(name)
        yield name, tensor


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
    except (OSError, FormatError) as error:
        raise CheckpointError(
            f"{file} cannot be used: {error}. Without it the checkpoint cannot be verified; take "
            "an earlier checkpoint or a copy of this one."
        ) from error


def check_tensors(
    manifest: Manifest, tensors: TensorsByScope, scopes: Sequence[str] | None = None
) -> list[Problem]:
    """What differs between live tensors and those of the manifest; empty if no byte does.

    `scopes` restricts the check; otherwise all scopes of the manifest and all given are compared.
    If most of the frozen base differs, one problem says so.

    Raises:
        ValueError: a scope is in neither, or two tensors of one have the same name.
    """
    known = {*manifest.tensors, *tensors}
    unknown = sorted(set(scopes or ()) - known)
    if unknown:
        raise ValueError(f"no scope {unknown[0]!r}: manifest and tensors have {sorted(known)}")
    problems = []
    for scope in sorted(known if scopes is None else set(scopes)):
        written = manifest.tensors.get(scope, {})
        found = list(_scope_problems(scope, written, tensors.get(scope, ())))
        total = len({*written, *(p.name for p in found)})
        problems += summarize_base(found, total) if scope in _BASE_SCOPES else found
    return problems


def _scope_problems(
    scope: str, written: Mapping[str, TensorRecord], named: Iterable[tuple[str, Tensor]]
) -> Iterator[Problem]:
    missing = dict(written)
    owner = {record.xxh3_128: name for name, record in written.items()}
    for name, tensor in _distinct(scope, named):
        record = missing.pop(name, None)
        if record is None:
            detail = f"{_dtype(tensor)} {tuple(tensor.shape)} is not in the manifest"
            yield Problem(kind="unexpected", place=scope, name=name, detail=detail)
        else:
            yield from _tensor_problems(scope, name, tensor, record, owner)
    for name, record in missing.items():
        detail = f"{record.dtype} {record.shape} was there when saved"
        yield Problem(kind="missing", place=scope, name=name, detail=detail)


def _tensor_problems(
    scope: str, name: str, tensor: Tensor, record: TensorRecord, owner: Mapping[str, str]
) -> Iterator[Problem]:
    if _dtype(tensor) != record.dtype:
        detail = f"{_dtype(tensor)}, {record.dtype} when saved"
        yield Problem(kind="dtype", place=scope, name=name, detail=detail)
    if tuple(tensor.shape) != record.shape:
        detail = f"{tuple(tensor.shape)}, {record.shape} when saved"
        yield Problem(kind="shape", place=scope, name=name, detail=detail)
    if _dtype(tensor) == record.dtype and tuple(tensor.shape) == record.shape:
        found = xxh3(tensor).hex()
        if found != record.xxh3_128:
            swapped = f"; these are the bytes of {owner[found]}" if found in owner else ""
            detail = f"checksum {found}, {record.xxh3_128} when saved{swapped}"
            yield Problem(kind="changed", place=scope, name=name, detail=detail)
