"""The files of a checkpoint folder: which there are, and checksums of their bytes.

A safetensors file is eight bytes of header size (little endian), a JSON header, then the tensors
without gaps: https://github.com/huggingface/safetensors#format. The header is read here and not
with the safetensors library because a damaged file must yield a name, not an exception of a parser.
Files are streamed: no more than `CHUNK_BYTES` of one are in memory.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from trl_sync.errors import CheckpointError

CHUNK_BYTES = 1 << 22
# The safetensors library refuses larger headers, too.
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_OTHER_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What the manifest holds of one file; `header` and `tensors` of safetensors files only."""

    size_bytes: int
    xxh3_128: str
    header: str | None = None
    tensors: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the parts of a safetensors file lie: bytes from its start, tensors in file order."""

    header_bytes: int
    spans: tuple[tuple[str, int, int], ...]

    @property
    def end(self) -> int:
        """The size that the header promises."""
        return self.spans[-1][2] if self.spans else self.header_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSums:
    """Checksums of a file as it lies there; tensors that its end cuts off are in `cut`."""

    xxh3_128: str
    header: str | None
    tensors: Mapping[str, str]
    cut: tuple[str, ...]


class LayoutError(ValueError):
    """A file that is not a safetensors file, or whose header is damaged."""


def list_files(folder: Path, leave_out: frozenset[str] = frozenset()) -> list[str]:
    """The files below `folder` as sorted relative paths with "/"; `leave_out` are names at its top.

    Not part of a checkpoint: hidden folders (version control, upload caches), `checkpoint-N`
    folders inside (they have a manifest of their own), and what is no regular file. Symbolic links
    to files count, as model hubs store files that way; links to folders are not followed.

    Raises:
        OSError: a folder cannot be listed.
    """
    found = []
    for root, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [n for n in folders if not n.startswith(".") and not _is_checkpoint(n)]
        relative = Path(root).relative_to(folder)
        paths = [(relative / name).as_posix() for name in names]
        found += [p for p in paths if p not in leave_out and (folder / p).is_file()]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _is_checkpoint(name: str) -> bool:
    return _OTHER_CHECKPOINT.fullmatch(name) is not None


def is_inside(path: str) -> bool:
    """True if `path` is relative, in its plainest form, and cannot lead out of its folder."""
    pure = PurePosixPath(path)
    plain = pure.as_posix() == path and path not in ("", ".") and not pure.is_absolute()
    # A backslash and a drive letter mean something elsewhere than on this system.
    return plain and ".." not in pure.parts and not re.search(r"[\\\0]|^[A-Za-z]:", path)


def record_file(file: Path) -> FileRecord:
    """Size and checksums of `file` as it lies there.

    Raises:
        CheckpointError: it is called .safetensors and is none, or not a whole one.
        OSError: it cannot be read.
    """
    with open_regular(file) as stream:
        size_bytes = stream_size(stream)
        try:
            layout = read_layout(stream, size_bytes) if is_safetensors(file.name) else None
        except LayoutError as error:
            raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error
        if layout is not None and layout.end != size_bytes:
            raise CheckpointError(
                f"{file} is not a whole safetensors file: {size_bytes} bytes, its header promises "
                f"{layout.end}. Was the disk full, or another process still writing?"
            )
        sums = checksums(stream, size_bytes, layout)
    return FileRecord(
        size_bytes=size_bytes,
        xxh3_128=sums.xxh3_128,
        header=sums.header,
        tensors=None if layout is None else sums.tensors,
    )


def is_safetensors(path: str) -> bool:
    return path.endswith(".safetensors")


def open_regular(file: Path) -> BufferedReader:
    """`file`, opened for reading.

    Raises:
        OSError: it does not exist, cannot be read, or is a folder, pipe or device: reading those
            might never end.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(f"{file.name} is not a regular file")
    return file.open("rb")


def stream_size(stream: BufferedReader) -> int:
    """Bytes in the open file."""
    return os.fstat(stream.fileno()).st_size


def checksums(stream: BufferedReader, size_bytes: int, layout: Layout | None = None) -> FileSums:
    """xxh3-128 of the whole stream, and by `layout` of its header and of each tensor; one pass."""
    stream.seek(0)
    whole, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(CHUNK_BYTES, size_bytes)))
    header, tensors, cut = None, {}, []
    if layout is not None:
        header = _part(stream, layout.header_bytes, whole, buffer)
        for name, start, end in layout.spans:
            part = _part(stream, end - start, whole, buffer)
            if end > size_bytes:
                cut.append(name)
            else:
                tensors[name] = part
    _part(stream, max(0, size_bytes - stream.tell()), whole, buffer)
    return FileSums(xxh3_128=whole.hexdigest(), header=header, tensors=tensors, cut=tuple(cut))


def _part(stream: BufferedReader, length_bytes: int, whole: Any, buffer: memoryview) -> str:
    part = xxhash.xxh3_128()
    while length_bytes > 0:
        count = stream.readinto(buffer[: min(length_bytes, len(buffer))])
        if not count:
            break
        part.update(buffer[:count])
        whole.update(buffer[:count])
        length_bytes -= count
    return str(part.hexdigest())


def read_layout(stream: BufferedReader, size_bytes: int) -> Layout:
    """Where header and tensors of an open safetensors file lie.

    Raises:
        LayoutError: the header is damaged; says how.
    """
    stream.seek(0)
    prefix = stream.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        raise LayoutError(f"{size_bytes} bytes, too few for a header")
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER_BYTES, size_bytes - _LENGTH_BYTES):
        raise LayoutError(f"its header is said to have {length} bytes, the file has {size_bytes}")
    header = read_json(stream.read(length), LayoutError)
    header.pop("__metadata__", None)
    spans = sorted(((n, *_offsets(n, entry)) for n, entry in header.items()), key=lambda s: s[1:])
    start, position = _LENGTH_BYTES + length, 0
    for name, begin, end in spans:
        if begin != position:
            raise LayoutError(f"{name} starts at byte {begin} of the data, expected {position}")
        position = end
    return Layout(
        header_bytes=start, spans=tuple((n, start + begin, start + end) for n, begin, end in spans)
    )


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    match entry:
        case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
            return begin, end
    raise LayoutError(f"{name} has no data_offsets in the header")


def read_json(content: bytes, error_class: type[ValueError]) -> dict[str, Any]:
    """The JSON object in `content`.

    Raises:
        error_class: it is no JSON, no object, nested too deeply, or holds NaN or infinity.
    """
    try:
        value = json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise error_class(f"no JSON ({error})") from error
    if not isinstance(value, dict):
        raise error_class(f"a JSON {type(value).__name__}, an object was expected")
    return value


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")
