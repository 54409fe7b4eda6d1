"""Faults of what is loaded: a flipped byte, a missing file, another base. Undone when a block ends.

They act when the block begins, in the process that calls them; in a job of several ranks on one
folder, call them on one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from trl_sync.audit.faults.planting import Planted, bytes_of, is_frozen
from trl_sync.audit.faults.state import named_parameters, unwrap


@contextmanager
def byte_flipped(
    checkpoint: str | Path, *, file: str | None = None, tensor: str | None = None
) -> Iterator[Planted]:
    """All bits of one byte of a file are inverted: the first of `tensor`, else the file's last.

    `file` is a path inside the folder; without it, the largest safetensors file, else the largest.
    """
    path = Path(checkpoint, file) if file is not None else _largest_file(Path(checkpoint))
    position = path.stat().st_size - 1 if tensor is None else _start_of(path, tensor)
    _invert(path, position)
    try:
        yield Planted(step=None, rank=None, tensor=tensor or path.name, struck=True)
    finally:
        _invert(path, position)


def _largest_file(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    if not files:
        raise ValueError(f"{folder} holds no file that is not empty: is it a checkpoint?")
    return max(files, key=lambda path: (path.suffix == ".safetensors", path.stat().st_size))


def _start_of(path: Path, tensor: str) -> int:
    """The byte where a tensor begins: header size in 8 bytes, a JSON header, then the data."""
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    if tensor not in header:
        raise ValueError(f"{path.name} holds no {tensor}; it holds {', '.join(header)}")
    return 8 + header_bytes + int(header[tensor]["data_offsets"][0])


def _invert(path: Path, position: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 0xFF]))


@contextmanager
def shard_missing(checkpoint: str | Path, *, file: str | None = None) -> Iterator[Planted]:
    """A file is not there: `file`, else the largest safetensors file, else the largest."""
    path = Path(checkpoint, file) if file is not None else _largest_file(Path(checkpoint))
    # Beside the checkpoint, so that the file is renamed and not copied.
    with tempfile.TemporaryDirectory(dir=Path(checkpoint).resolve().parent) as folder:
        away = path.rename(Path(folder, path.name))
        try:
            yield Planted(step=None, rank=None, tensor=path.name, struck=True)
        finally:
            away.rename(path)


@contextmanager
def other_base(model: nn.Module) -> Iterator[Planted]:
    """The frozen parameters hold other values: their bytes in reverse order, on every rank alike.

    Stands for a checkpoint of adapters that is loaded onto another base.
    """
    frozen = [(n, p) for n, p in named_parameters(model).items() if is_frozen(p)]
    if not frozen:
        raise ValueError(f"{type(unwrap(model)).__name__} has no frozen parameter")
    _reverse(frozen)
    try:
        yield Planted(step=None, rank=None, tensor=frozen[0][0], struck=True)
    finally:
        _reverse(frozen)


def _reverse(parameters: list[tuple[str, nn.Parameter]]) -> None:
    for _, parameter in parameters:
        content = bytes_of(parameter)
        content.copy_(content.flip(0))
