"""The content of `sync_manifest.json`, and its strict reading; the fields: `audit/manifest.py`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
import xxhash

from trl_sync.audit.checkpoint_files import FileRecord, is_inside

MANIFEST_NAME = "sync_manifest.json"
FORMAT = 2
# Format 1 knew nothing of shards: neither `parts` nor `partitions` nor `partitioned_by`.
READABLE_FORMATS = (1, 2)
ALGORITHM = "xxh3-128"

_T = TypeVar("_T")


class FormatError(ValueError):
    """A manifest that is not what this module writes; says where and what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """Checksum, dtype ("float32") and shape of a tensor as it was in memory, whole.

    `parts`: checksums of its byte ranges "start:stop" that single ranks held, if it was sharded.
    """

    xxh3_128: str
    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `sync_manifest.json` says; each field is explained in `audit/manifest.py`."""

    package_version: str
    created: str
    step: int
    world_size: int
    verified: bool
    reason: str | None
    tensors: Mapping[str, Mapping[str, TensorRecord]]
    files: Mapping[str, FileRecord]
    partitioned_by: str | None = None
    partitions: Mapping[str, Mapping[str, TensorRecord]] = field(default_factory=dict)
    format: int = FORMAT
    algorithm: str = ALGORITHM


def to_text(manifest: Manifest) -> str:
    """`manifest` as indented JSON with sorted keys and its own checksum."""
    content = asdict(manifest)
    content["format"] = FORMAT
    for named in (*content["tensors"].values(), *content["partitions"].values()):
        for tensor in named.values():
            if not tensor["parts"]:
                del tensor["parts"]
    for record in content["files"].values():
        if record["tensors"] is None:
            del record["header"], record["tensors"]
    content["checksum"] = own_checksum(content)
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def own_checksum(content: Mapping[str, Any]) -> str:
    """xxh3-128 of the compact, sorted JSON of all fields but `checksum`."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return str(xxhash.xxh3_128_hexdigest(text.encode("ascii")))


def from_content(content: Mapping[str, Any]) -> Manifest:
    """The manifest in a JSON object.

    Raises:
        FormatError: another format, a missing field, a wrong type, a path that leaves the folder,
            or content that is not what was written.
    """
    version = _field(content, "format", int, "the manifest")
    if version not in READABLE_FORMATS:
        known = " and ".join(map(str, READABLE_FORMATS))
        raise FormatError(
            f"format {version}, this version of trl_sync reads format {known}. Check it with the "
            f"version that wrote it: {content.get('package_version')}"
        )
    _check_own_checksum(content)
    if version == 1:
        content = {**content, "partitioned_by": None, "partitions": {}}
    manifest = Manifest(
        package_version=_field(content, "package_version", str, "the manifest"),
        created=_field(content, "created", str, "the manifest"),
        step=_field(content, "step", int, "the manifest"),
        world_size=_field(content, "world_size", int, "the manifest"),
        verified=_field(content, "verified", bool, "the manifest"),
        reason=_optional_text(content, "reason"),
        tensors=_scopes(content, "tensors"),
        files=_files(_field(content, "files", dict, "the manifest")),
        partitioned_by=_optional_text(content, "partitioned_by"),
        partitions=_scopes(content, "partitions"),
        format=version,
        algorithm=_field(content, "algorithm", str, "the manifest"),
    )
    if manifest.algorithm != ALGORITHM:
        raise FormatError(f"algorithm {manifest.algorithm!r}, expected {ALGORITHM!r}")
    return manifest if version > 1 else _with_packed_as_bytes(manifest)


def _check_own_checksum(content: Mapping[str, Any]) -> None:
    written = _field(content, "checksum", str, "the manifest")
    found = own_checksum(content)
    if found != written:
        raise FormatError(
            f"it was changed after it was written: its content has checksum {found}, the field "
            f"`checksum` says {written}"
        )


def _with_packed_as_bytes(manifest: Manifest) -> Manifest:
    """4-bit weights as bytes: format 1 kept the type that they happened to be stored in."""
    packed = packed_weights(manifest.tensors.get("quantization", {}))
    tensors = {
        scope: {name: _as_bytes(r) if name in packed else r for name, r in records.items()}
        for scope, records in manifest.tensors.items()
    }
    return replace(manifest, tensors=tensors)


def packed_weights(quantization: Iterable[str]) -> set[str]:
    """The 4-bit weights that tensors of these names say how to unpack."""
    return {name.removesuffix(".absmax") for name in quantization if name.endswith(".absmax")}


def _as_bytes(record: TensorRecord) -> TensorRecord:
    dtype = getattr(torch, record.dtype, None)
    if not isinstance(dtype, torch.dtype):
        return record
    size_bytes = math.prod(record.shape) * dtype.itemsize
    return replace(record, dtype="uint8", shape=(size_bytes, 1))


def _scopes(content: Mapping[str, Any], key: str) -> dict[str, dict[str, TensorRecord]]:
    scopes = _field(content, key, dict, "the manifest")
    return {
        scope: {
            name: _tensor(record, f"{key}.{scope}.{name}")
            for name, record in _field(scopes, scope, dict, key).items()
        }
        for scope in scopes
    }


def _tensor(record: Any, where: str) -> TensorRecord:
    shape = _field(record, "shape", list, where)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise FormatError(f"{where}.shape is {shape!r:.80}, expected a list of sizes")
    parts = _field(record, "parts", dict, where) if "parts" in record else {}
    for span in parts:
        if not re.fullmatch("[0-9]{1,19}:[0-9]{1,19}", span):
            raise FormatError(f"{where}.parts holds {span!r:.80}, expected bytes as 'start:stop'")
    return TensorRecord(
        xxh3_128=_checksum(record, "xxh3_128", where),
        dtype=_field(record, "dtype", str, where),
        shape=tuple(shape),
        parts={span: _checksum(parts, span, f"{where}.parts") for span in parts},
    )


def _files(content: dict[str, Any]) -> dict[str, FileRecord]:
    files = {}
    for path, record in content.items():
        if not is_inside(path):
            raise FormatError(f"files holds {path!r:.80}, expected a path that stays in the folder")
        where = f"files.{path}"
        tensors = None
        if isinstance(record, dict) and "tensors" in record:
            inner = _field(record, "tensors", dict, where)
            tensors = {name: _checksum(inner, name, f"{where}.tensors") for name in inner}
        files[path] = FileRecord(
            size_bytes=_field(record, "size_bytes", int, where),
            xxh3_128=_checksum(record, "xxh3_128", where),
            header=None if tensors is None else _checksum(record, "header", where),
            tensors=tensors,
        )
    return files


def _field(content: Any, key: str, expected: type[_T], where: str) -> _T:
    if not isinstance(content, dict):
        raise FormatError(f"{where} is a {type(content).__name__}, expected an object")
    if key not in content:
        raise FormatError(f"{where} has no field {key!r}")
    value = content[key]
    # bool is a subclass of int: isinstance would take true for a step.
    if type(value) is not expected:
        raise FormatError(f"{where}.{key} is {value!r:.80}, expected {expected.__name__}")
    return value


def _checksum(content: Any, key: str, where: str) -> str:
    value = _field(content, key, str, where)
    if not re.fullmatch("[0-9a-f]{32}", value):
        raise FormatError(f"{where}.{key} is {value!r:.80}, expected 32 hexadecimal digits")
    return value


def _optional_text(content: Mapping[str, Any], key: str) -> str | None:
    return None if content.get(key, "") is None else _field(content, key, str, "the manifest")
