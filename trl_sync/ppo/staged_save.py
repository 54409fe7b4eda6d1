"""Checkpoint folders that appear in one step: written under another name, then renamed.

A process may be killed at any time. What it leaves behind in an output folder is then one of

| name | what it is | at the next save |
|---|---|---|
| `checkpoint-N` | a whole checkpoint | stays |
| `_incomplete-checkpoint-N` | one that was being written | deleted |
| `_deleted-checkpoint-N` | one that was being deleted | deleted |
| `_replaced-checkpoint-N` | one whose step was saved again | takes its name back, if that is free |

Nobody takes the last three for a checkpoint, and hub uploads of transformers leave out names that
begin with `_`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_LEFTOVER_NAME = re.compile(rf"_(incomplete|deleted|replaced)-({PREFIX_CHECKPOINT_DIR}-\d+)")


class StagedFolder:
    """The folder that becomes the checkpoint `final`; several processes may write into it.

    One process calls `open`, then `publish`; in between all write into `folder`. Its name is that
    of the checkpoint, so a writer that is told `parent` as the output folder needs no other change.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.parent = _beside(final, "incomplete")
        self.folder = self.parent / final.name

    def open(self) -> None:
        """Makes `folder`, after tidying up what a killed process left behind.

        Raises:
            OSError: it cannot be made.
        """
        self.final.parent.mkdir(parents=True, exist_ok=True)
        restore_replaced(self.final.parent)
        for _, path, _ in _leftovers(self.final.parent):
            _remove(path)
        self.folder.mkdir(parents=True)

    def publish(self) -> None:
        """Gives `folder` its final name in one step, once all it holds is on the disk.

        A folder that has that name already is whole, under that name or another, until then.

        Raises:
            OSError: a file cannot be written to the disk, or the folder not renamed. What had the
                name before has it again.
        """
        _flush(self.folder)
        replaced = _beside(self.final, "replaced")
        try:
            if self.final.exists() or self.final.is_symlink():
                os.rename(self.final, replaced)
            os.rename(self.folder, self.final)
        except OSError:
            restore_replaced(self.final.parent)
            raise
        _flush_file(self.final.parent)
        _remove(replaced)
        self.discard()

    def discard(self) -> None:
        """Deletes what was written and not published."""
        _remove(self.parent)


def restore_replaced(output_dir: Path) -> None:
    """Gives replaced checkpoints their name back where a kill left none under it."""
    for kind, path, final in list(_leftovers(output_dir)):
        if kind == "replaced" and not final.exists():
            os.rename(path, final)


def rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Deletes the oldest checkpoints until `limit` are left, but none of `keep`.

    Each loses its name first, so that none is ever there in part. Without a positive limit nothing
    happens, as in transformers.
    """
    if limit is None or limit <= 0:
        return
    folders = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    folders = [folder for folder in folders if CHECKPOINT_NAME.fullmatch(folder.name)]
    kept = keep & set(folders)
    excess = len(folders) - max(limit, len(kept))
    spare = [folder for folder in folders if folder not in kept]
    for folder in spare[: max(0, excess)]:
        deleted = _beside(folder, "deleted")
        os.rename(folder, deleted)
        _remove(deleted)


def _beside(final: Path, kind: str) -> Path:
    return final.with_name(f"_{kind}-{final.name}")


def _leftovers(output_dir: Path) -> Iterator[tuple[str, Path, Path]]:
    """Kind, path and the checkpoint it belongs to, of each folder that a killed process left."""
    for path in sorted(output_dir.glob("_*")):
        match = _LEFTOVER_NAME.fullmatch(path.name)
        if match:
            yield match[1], path, path.with_name(match[2])


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Waits until all of `folder` is on the disk: a rename may get there before the bytes."""
    for root, _, names in os.walk(folder):
        for name in names:
            _flush_file(Path(root, name))
        _flush_file(Path(root))


def _flush_file(path: Path) -> None:
    if os.name != "posix":  # Windows cannot flush what was not opened for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
