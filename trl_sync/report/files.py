"""Files of a run folder, read as what they may be: cut short, huge, or made by somebody else."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from trl_sync.errors import ConfigError

LIMIT_BYTES = 512 * 2**20


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it is no plain file, too large, or cannot be read.
    """
    check_size(path)
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}.") from error


def check_size(path: Path) -> None:
    """Nothing, if `path` is a plain file of a size that is read whole.

    Raises:
        ConfigError: it is not.
    """
    try:
        is_file, size = path.is_file(), path.stat().st_size
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}.") from error
    if not is_file:
        raise ConfigError(f"{path} is not a plain file.")
    if size > LIMIT_BYTES:
        raise ConfigError(
            f"{path} has {size:,} bytes; a report reads files of at most {LIMIT_BYTES:,}. Move it "
            "out of the folder, or shorten it."
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: there is no file that can be read, or it holds something else.
    """
    content = parse(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line; a last line that was cut short is left out.

    Raises:
        ConfigError: there is no file that can be read, or a line before the last is no object.
    """
    rows: list[dict[str, Any]] = []
    lines = read_text(path).split("\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = parse(line, f"{path}, line {number + 1}")
        except ConfigError:
            if number == last:
                return rows
            raise
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number + 1}: expected a JSON object.")
        rows.append(row)
    return rows


def parse(text: str, where: str) -> Any:
    """The value of JSON text.

    Raises:
        ConfigError: names `where` and the reason.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}: not JSON ({error.msg} at character {error.pos:,}). Was it cut short? "
            "Repair it, or move it out of the folder: a report says what is missing."
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested too deeply.") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{where}: {error}.") from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file in one step: a link that has its name is replaced, not followed.

    Raises:
        OSError: it cannot be written.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    unfinished = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        # mkstemp lets nobody but the owner read; this is what open() would have allowed.
        unfinished.chmod(0o666 & ~_umask())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
