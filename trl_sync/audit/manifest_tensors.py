"""Live tensors against the records of a manifest. Pure: no collective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from trl_sync.audit.digest import xxh3
from trl_sync.audit.manifest_base import summarize_base
from trl_sync.audit.manifest_format import Manifest, TensorRecord
from trl_sync.audit.manifest_problems import Kind, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenTensor:
    """What one rank has seen of a sharded tensor; dtype and shape are of the whole.

    `parts` are checksums of byte ranges of it; `xxh3_128` that of all bytes, if it was seen whole.
    Neither: this rank holds no byte of it. `unseen` says why it could not be looked at.
    """

    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    unseen: str | None = None


Seen = Tensor | TensorRecord | SeenTensor
TensorsByScope = Mapping[str, Iterable[tuple[str, Seen]]]

# Scopes that belong to the base as a whole.
_BASE_SCOPES = ("frozen", "quantization")


def record_scope(scope: str, named: Iterable[tuple[str, Seen]]) -> dict[str, TensorRecord]:
    """The record of each tensor; records stay as they are.

    Raises:
        TypeError: a tensor has no bytes in memory.
        ValueError: two tensors have one name, or one was not seen whole.
    """
    records = {}
    for name, tensor in _distinct(scope, named):
        if isinstance(tensor, SeenTensor):
            raise ValueError(f"{name} was not seen whole: no record of it")
        records[name] = tensor if isinstance(tensor, TensorRecord) else record_tensor(tensor)
    return records


def record_tensor(tensor: Tensor) -> TensorRecord:
    """Checksum, dtype and shape of a tensor that is whole."""
    return TensorRecord(
        xxh3_128=xxh3(tensor).hex(), dtype=dtype_name(tensor), shape=tuple(tensor.shape)
    )


def dtype_name(tensor: Tensor) -> str:
    """Such as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def _distinct(scope: str, named: Iterable[tuple[str, Seen]]) -> Iterator[tuple[str, Seen]]:
    seen = set()
    for name, tensor in named:
        if name in seen:
            raise ValueError(f"two tensors of the scope {scope!r} are called {name!r}")
        seen.add(name)
        yield name, tensor


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
        found = check_scope(scope, written, tensors.get(scope, ()))
        total = len({*written, *(p.name for p in found)})
        problems += summarize_base(found, total) if scope in _BASE_SCOPES else found
    return problems


def check_scope(
    scope: str, written: Mapping[str, TensorRecord], named: Iterable[tuple[str, Seen]]
) -> list[Problem]:
    """What differs between the live tensors of one scope and the records `written`."""
    problems = []
    missing = dict(written)
    owner = {record.xxh3_128: name for name, record in written.items()}
    for name, seen in _distinct(scope, named):
        for kind, detail in _differences(seen, missing.pop(name, None), owner):
            problems.append(Problem(kind=kind, place=scope, name=name, detail=detail))
    for name, record in missing.items():
        detail = f"{record.dtype} {record.shape} was there when saved"
        problems.append(Problem(kind="missing", place=scope, name=name, detail=detail))
    return problems


def _differences(
    seen: Seen, record: TensorRecord | None, owner: Mapping[str, str]
) -> Iterator[tuple[Kind, str]]:
    dtype = dtype_name(seen) if isinstance(seen, Tensor) else seen.dtype
    shape = tuple(seen.shape)
    if record is None:
        yield "unexpected", f"{dtype} {shape} is not in the manifest"
        return
    if dtype != record.dtype:
        yield "dtype", f"{dtype}, {record.dtype} when saved"
    if shape != record.shape:
        yield "shape", f"{shape}, {record.shape} when saved"
    if dtype == record.dtype and shape == record.shape:
        if isinstance(seen, SeenTensor):
            yield from _differences_of_parts(seen, record)
        found = xxh3(seen).hex() if isinstance(seen, Tensor) else seen.xxh3_128
        if found not in (record.xxh3_128, None):
            swapped = f"; these are the bytes of {owner[found]}" if found in owner else ""
            yield "changed", f"checksum {found}, {record.xxh3_128} when saved{swapped}"


def _differences_of_parts(seen: SeenTensor, record: TensorRecord) -> Iterator[tuple[Kind, str]]:
    if seen.unseen is not None:
        yield "not_comparable", seen.unseen
    changed = [span for span, found in seen.parts.items() if found != record.parts.get(span)]
    if changed:
        span = changed[0]
        more = f", and {len(changed) - 1} more parts" if len(changed) > 1 else ""
        written = record.parts.get(span, "not recorded")
        yield (
            "changed",
            f"bytes {span} have checksum {seen.parts[span]}, {written} when saved{more}",
        )
