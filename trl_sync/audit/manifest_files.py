"""The files of a checkpoint against its manifest, without loading anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path, PurePosixPath

from trl_sync.audit.checkpoint_files import (
    FileRecord,
    FileSums,
    Layout,
    LayoutError,
    checksums,
    is_inside,
    list_files,
    open_regular,
    read_json,
    read_layout,
    stream_size,
)
from trl_sync.audit.manifest_format import MANIFEST_NAME, Manifest
from trl_sync.audit.manifest_problems import HEADER, Kind, Problem

INDEX_ENDING = ".safetensors.index.json"
# Model cards are written by people, and by uploads after the save.
_FOR_READERS = "README.md"


def check_files(folder: Path, manifest: Manifest) -> list[Problem]:
    """What is wrong with the files of `folder`; empty if every byte is as it was written.

    Nothing is said of what may change after the save: files that were added since, and model cards
    (README.md). `list_harmless_changes` names those. A manifest that was written unverified is a
    problem of its own.
    """
    problems = []
    if not manifest.verified:
        detail = f"saved at step {manifest.step} without a verdict that all ranks were equal"
        problems.append(_problem("unverified", "manifest", None, f"{detail}: {manifest.reason}"))
    for path, record in sorted(manifest.files.items()):
        if not _is_for_readers(path):
            problems += _file_problems(folder, path, record)
    for path in sorted(manifest.files):
        if path.endswith(INDEX_ENDING):
            problems += _index_problems(folder, path, manifest)
    return problems


def list_harmless_changes(folder: Path, manifest: Manifest) -> list[Problem]:
    """Files added since the manifest was written, and model cards that were edited or removed."""
    changes = []
    try:
        present = list_files(folder)
    except OSError as error:
        return [_problem("unreadable", str(folder), None, str(error))]
    for path in sorted(set(present) - set(manifest.files) - {MANIFEST_NAME}):
        changes.append(_problem("added", path, None, "not in the manifest"))
    for path, record in sorted(manifest.files.items()):
        if _is_for_readers(path) and _file_problems(folder, path, record):
            changes.append(_problem("edited", path, None, "a model card may change after the save"))
    return changes


def _is_for_readers(path: str) -> bool:
    return PurePosixPath(path).name == _FOR_READERS


def _problem(kind: Kind, place: str, name: str | None, detail: str) -> Problem:
    return Problem(kind=kind, place=place, name=name, detail=detail)


def _file_problems(folder: Path, path: str, record: FileRecord) -> list[Problem]:
    try:
        with open_regular(folder / path) as stream:
            if record.tensors is None:
                return list(_opaque_problems(stream, path, record))
            return _safetensors_problems(stream, path, record)
    except FileNotFoundError:
        return [_problem("missing", path, None, f"{record.size_bytes} bytes were written")]
    except (OSError, ValueError) as error:  # a ValueError: no file can have this name
        return [_problem("unreadable", path, None, str(error))]


def _opaque_problems(stream: BufferedReader, path: str, record: FileRecord) -> Iterator[Problem]:
    size_bytes = stream_size(stream)
    if size_bytes < record.size_bytes:
        yield _problem("truncated", path, None, _sizes(size_bytes, record))
    elif size_bytes > record.size_bytes:
        yield _problem("changed", path, None, _sizes(size_bytes, record))
    else:
        found = checksums(stream, size_bytes).xxh3_128
        if found != record.xxh3_128:
            yield _problem("changed", path, None, _sums(found, record.xxh3_128))


def _sizes(size_bytes: int, record: FileRecord) -> str:
    return f"{size_bytes} bytes, {record.size_bytes} were written"


def _sums(found: str, written: str) -> str:
    return f"checksum {found}, {written} was written"


def _safetensors_problems(stream: BufferedReader, path: str, record: FileRecord) -> list[Problem]:
    size_bytes = stream_size(stream)
    try:
        layout = read_layout(stream, size_bytes)
    except LayoutError as error:
        if size_bytes < record.size_bytes:
            return [_problem("truncated", path, None, f"{_sizes(size_bytes, record)}; {error}")]
        return [_problem("changed", path, HEADER, str(error))]
    sums = checksums(stream, size_bytes, layout)
    problems = list(_layout_problems(path, record, layout, sums, size_bytes))
    if sums.header == record.header or layout.end == size_bytes:
        # Behind a damaged header no tensor can be told from another.
        problems += _tensor_problems(path, record.tensors or {}, sums)
    if not problems and sums.xxh3_128 != record.xxh3_128:
        # Header and tensors cover the file: only a forged manifest comes here.
        problems.append(_problem("changed", path, None, _sums(sums.xxh3_128, record.xxh3_128)))
    return problems


def _layout_problems(
    path: str, record: FileRecord, layout: Layout, sums: FileSums, size_bytes: int
) -> Iterator[Problem]:
    if sums.header != record.header:
        detail = "names, dtypes, shapes or positions of the tensors are not those written"
        if layout.end != size_bytes:
            detail += f"; it promises {layout.end} bytes, the file has {size_bytes}"
        yield _problem("changed", path, HEADER, detail)
        if size_bytes < min(layout.end, record.size_bytes):
            yield _problem("truncated", path, None, _sizes(size_bytes, record))
    elif sums.cut:
        detail = f"{_sizes(size_bytes, record)}: {len(sums.cut)} of {len(layout.spans)} tensors "
        yield _problem("truncated", path, sums.cut[0], detail + "lack bytes, this one first")
    elif size_bytes > layout.end:
        detail = f"{size_bytes - layout.end} bytes after the last tensor"
        yield _problem("changed", path, None, detail)


def _tensor_problems(path: str, written: Mapping[str, str], sums: FileSums) -> list[Problem]:
    present = {*sums.tensors, *sums.cut}
    changed = [n for n, found in sums.tensors.items() if found != written.get(n, found)]
    if len(changed) == len(written) > 1:
        detail = f"all {len(written)} tensors differ: the file of another run or step?"
        return [_problem("replaced", path, None, detail)]
    owner = {checksum: name for name, checksum in written.items()}
    problems = []
    for name in changed:
        other = owner.get(sums.tensors[name])
        swapped = "" if other is None else f"; these are the bytes of {other}"
        detail = _sums(sums.tensors[name], written[name]) + swapped
        problems.append(_problem("changed", path, name, detail))
    for name in sorted(set(written) - present):
        problems.append(_problem("missing", path, name, "not in the header any more"))
    for name in sorted(present - set(written)):
        problems.append(_problem("unexpected", path, name, "was not in the file when it was saved"))
    return problems


def _index_problems(folder: Path, path: str, manifest: Manifest) -> Iterator[Problem]:
    """Shards that the index names and that were never there, or do not hold the tensor."""
    try:
        with open_regular(folder / path) as stream:
            shards = weight_map(stream.read())
    except FileNotFoundError:
        return  # reported as a file that is missing
    except (OSError, ValueError) as error:
        yield _problem("unreadable", path, None, str(error))
        return
    parent = PurePosixPath(path).parent
    unknown: dict[str, list[str]] = {}
    for name, shard in sorted(shards.items()):
        record = manifest.files.get((parent / shard).as_posix()) if is_inside(shard) else None
        if record is None:
            unknown.setdefault(shard, []).append(name)
        elif name not in (record.tensors or {}):
            yield _problem("missing", path, name, f"the index says {shard}, which does not hold it")
    for shard, names in unknown.items():
        detail = f"the index names the shard {shard}, which was not written: {len(names)} tensors"
        yield _problem("missing", path, names[0], f"{detail}, this one first")


def weight_map(content: bytes) -> dict[str, str]:
    """Tensor -> file, from the bytes of an index file.

    Raises:
        ValueError: it holds no such map.
    """
    shards = read_json(content, ValueError).get("weight_map")
    if not isinstance(shards, dict) or not all(type(file) is str for file in shards.values()):
        raise ValueError("no weight_map from tensors to files")
    return shards
