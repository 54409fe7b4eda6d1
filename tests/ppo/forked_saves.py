"""Saves in forked processes that are killed at a chosen moment, for test_atomic_save.py."""

from __future__ import annotations

import faulthandler
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import set_seed

from trl_sync.backbone import export

# Python's own events of these kinds come at every call on a file or folder.
FILE_EVENTS = ("open", "os.", "shutil.")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save(trainer: Any, step: int) -> None:
    """What the training loop does when a checkpoint is due at `step`."""
    trainer.state.global_step = step
    trainer._save_checkpoint(trainer.model, None)
    trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


RUNS = b"!"
ANSWER_S = 60.0


class Child:
    """A forked process that does `work`, tells so, and waits to be killed."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._answer, answer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            set_seed(0)  # Python seeds its own generator anew in a forked process
            self._serve(work, answer)
        os.close(answer)
        # It runs. No more than that byte: a save that fails at once may have answered already.
        assert os.read(self._answer, len(RUNS)) == RUNS

    def _serve(self, work: Callable[[], Any], answer: int) -> None:
        # Where it stands, should it hang: shortly before the parent gives up.
        faulthandler.dump_traceback_later(ANSWER_S - 5)
        try:
            os.write(answer, RUNS)
            os.write(answer, str(work()).encode())
            signal.pause()
        except BaseException as error:  # a child must never go on as a second pytest
            os.write(answer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(1)

    def kill_after(self, delay_s: float) -> bool:
        """Kills it then; whether that was before it was done."""
        time.sleep(delay_s)
        os.kill(self._pid, signal.SIGKILL)
        return not self.wait()

    def wait(self) -> str:
        """What `work` returned or raised; nothing if the child was killed before that."""
        ready, _, _ = select.select([self._answer], [], [], ANSWER_S)
        answer = os.read(self._answer, 65536) if ready else b""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._answer)
        return answer.decode()


def save_until(trainer: Any, step: int, folder: Path, moment: int) -> int:
    """Saves, but dies at that file operation below `folder`; returns how many there were.

    A file operation is what Python reports to its audit hooks; and the begin, half and end of each
    file that torch and safetensors write by themselves.
    """
    operations = 0

    def count() -> None:
        nonlocal operations
        operations += 1
        if operations == moment:
            die()

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        paths = [a for a in arguments if isinstance(a, (str, Path))]
        if event.startswith(FILE_EVENTS) and any(str(folder) in str(path) for path in paths):
            count()

    def in_parts(write: Callable[..., None]) -> Callable[..., None]:
        def written(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            write(content, file, *args, **kwargs)
            whole = Path(file).read_bytes()
            Path(file).write_bytes(whole[: len(whole) // 2])
            count()
            Path(file).write_bytes(whole)
            count()

        return written

    torch.save = in_parts(torch.save)
    export.save_file = in_parts(safetensors.torch.save_file)
    sys.addaudithook(on_event)
    save(trainer, step)
    return operations


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below `folder`."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def put_back(backup: Path, folder: Path) -> None:
    """Makes `folder` what it was when `backup` was copied from it."""
    shutil.rmtree(folder)
    shutil.copytree(backup, folder)
