"""A folder with an unquantized base model against the frozen tensors of a manifest."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from trl_sync.audit.checkpoint_files import (
    LayoutError,
    is_inside,
    open_regular,
    read_layout,
    stream_size,
)
from trl_sync.audit.digest import xxh3
from trl_sync.audit.manifest_files import INDEX_ENDING, weight_map
from trl_sync.audit.manifest_format import Manifest, TensorRecord
from trl_sync.audit.manifest_problems import Problem

SCOPE = "frozen"
# What wrappers put in front of a name (PEFT, DDP, torch.compile, FSDP, activation checkpointing)
# and what PEFT puts inside it around a layer that it adapts or copies.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(base_model\.model\.|module\.|_orig_mod\.|_fsdp_wrapped_module\."
    r"|_checkpoint_wrapped_module\.|base_layer\.|original_module\.)"
)
# Parts of adapters, frozen or not, are no part of the base.
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|modules_to_save)(\.|$)")
# Weights packed into 4 or 8 bits: no tensor of an unquantized base has these bytes.
_PACKED = re.compile(r"u?int8|float[48]_\w+")


def check_base(
    manifest: Manifest, base_folder: Path, other_models: Collection[str] = ()
) -> list[Problem]:
    """What in `base_folder` (safetensors, sharded or not) is not the frozen base of `manifest`.

    Names are compared without the prefixes of wrappers; frozen adapters, and the modules called
    `other_models` (such as "reward"), are left out. Tensors are cast to the dtype that they had in
    memory, as loading does. Quantized weights have other bytes in memory than on disk: they are
    named once as not comparable, and compared when a run resumes.
    """
    frozen = {
        name: record
        for name, record in manifest.tensors.get(SCOPE, {}).items()
        if not _ADAPTER.search(name) and name.split(".")[0] not in other_models
    }
    if not frozen:
        return [_not_comparable("the manifest holds no frozen base: nothing was compared")]
    try:
        files = _base_tensors(base_folder)
    except (OSError, ValueError) as error:
        detail = f"the base cannot be read: {error}"
        return [Problem(kind="unreadable", place=str(base_folder), name=None, detail=detail)]
    packed = [name for name, record in frozen.items() if _PACKED.fullmatch(record.dtype)]
    floating = {name: frozen[name] for name in frozen if name not in packed}
    problems = summarize_base(_differences(floating, files), len(floating))
    if packed:
        detail = f"{len(packed)} of {len(frozen)} frozen tensors are quantized in memory, "
        problems.append(
            _not_comparable(f"{detail}{packed[0]} first: they are compared when a run resumes")
        )
    return problems


def _not_comparable(detail: str) -> Problem:
    return Problem(kind="not_comparable", place=SCOPE, name=None, detail=detail)


def plain_name(name: str) -> str:
    """`name` as it was before PEFT and other wrappers were put around the model."""
    return _WRAPPERS.sub("", name)


def _differences(frozen: Mapping[str, TensorRecord], files: Mapping[str, Path]) -> list[Problem]:
    problems = []
    for name, record in sorted(frozen.items()):
        stored = _match(plain_name(name), files)
        if stored is None:
            detail = "no tensor of the base has this name"
            problems.append(Problem(kind="missing", place=SCOPE, name=name, detail=detail))
        else:
            problem = _difference(name, record, stored, files[stored])
            problems += [problem] if problem else []
    return problems


def _match(name: str, files: Mapping[str, Path]) -> str | None:
    """The base's name of a tensor: the same, or the longest one that differs by a prefix alone.

    Modules around the model, and heads that have a bare model or none, add or drop a prefix.
    """
    if name in files:
        return name
    longer = [n for n in files if n.endswith(f".{name}")]
    shorter = [n for n in files if name.endswith(f".{n}")]
    if len(longer) == 1 and not shorter:
        return longer[0]
    return max(shorter, key=len, default=None)


def _difference(name: str, record: TensorRecord, stored: str, file: Path) -> Problem | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            tensor = tensors.get_tensor(stored)
    except (OSError, ValueError, SafetensorError) as error:
        return Problem(kind="unreadable", place=SCOPE, name=name, detail=f"{file}: {error}")
    if tuple(tensor.shape) != record.shape:
        detail = f"{tuple(tensor.shape)} in {file.name}, {record.shape} when saved"
        return Problem(kind="shape", place=SCOPE, name=name, detail=detail)
    dtype = getattr(torch, record.dtype, None)
    if not isinstance(dtype, torch.dtype):
        detail = f"{record.dtype} when saved, which this torch does not have"
        return Problem(kind="dtype", place=SCOPE, name=name, detail=detail)
    try:
        found = xxh3(tensor.to(dtype)).hex()
    except (RuntimeError, TypeError) as error:
        detail = f"{record.dtype} when saved, which {tensor.dtype} cannot be cast to: {error}"
        return Problem(kind="dtype", place=SCOPE, name=name, detail=detail)
    if found == record.xxh3_128:
        return None
    detail = f"{file.name} has checksum {found}, {record.xxh3_128} when saved"
    if tensor.dtype != dtype:
        detail += f"; stored as {str(tensor.dtype).removeprefix('torch.')}, cast to {record.dtype}"
    return Problem(kind="changed", place=SCOPE, name=name, detail=detail)


def summarize_base(problems: Sequence[Problem], total: int) -> list[Problem]:
    """`problems` of the frozen scope; as one if most of its `total` tensors differ."""
    names = {problem.name for problem in problems}
    if len(names) * 2 <= total or len(names) < 2:
        return list(problems)
    first = problems[0]
    detail = (
        "the base is another model or was quantized differently: "
        f"{len(names)} of {total} {first.place} tensors differ, this one first "
        f"({first.kind}: {first.detail})"
    )
    return [Problem(kind="another_base", place=first.place, name=first.name, detail=detail)]


def _base_tensors(folder: Path) -> dict[str, Path]:
    """Tensor -> file of a base folder: by its index, else `model.safetensors`, else all files.

    Raises:
        OSError, ValueError: there are none, or they cannot be read.
    """
    for index in sorted(folder.glob(f"*{INDEX_ENDING}")):
        with open_regular(index) as stream:
            shards = weight_map(stream.read())
        outside = [shard for shard in shards.values() if not is_inside(shard)]
        if outside:
            raise ValueError(f"{index} names {outside[0]!r}, expected a file in its folder")
        return {name: folder / shard for name, shard in shards.items()}
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors files; is it the folder of the base?")
    return {name: file for file in files for name in _names(file)}


def _names(file: Path) -> list[str]:
    with open_regular(file) as stream:
        try:
            layout = read_layout(stream, stream_size(stream))
        except LayoutError as error:
            raise ValueError(f"{file}: {error}") from error
    return [name for name, _, _ in layout.spans]
