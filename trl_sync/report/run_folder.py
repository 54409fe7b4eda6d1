"""A run's folder -> what a report tells of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_sync.audit.journal import JOURNAL_NAME
from trl_sync.errors import ConfigError
from trl_sync.report import completions
from trl_sync.report.audit_events import Attempt, read_attempts
from trl_sync.report.completions import Completion, read_completions
from trl_sync.report.files import read_object

STATE, SUMMARY, RECORD = "trainer_state.json", "summary.json", "run_record.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")

_MISSING = {
    STATE: "no curves: neither the folder nor a checkpoint in it has a trainer_state.json "
    "(trainer.save_state() writes one).",
    JOURNAL_NAME: "no audit: the run was not audited, or ended before its first audit.",
    SUMMARY: "no summary: the PPO recipes write summary.json when they end.",
    RECORD: "no configuration and no environment: PPOTrainer writes run_record.json when training "
    "begins, other trainers do not.",
    completions.FILE: "no completions: trl_sync.report.write_completions() writes them.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run. What its folder does not hold is empty, and a sentence in `missing` says so.

    `log_file` tells where `log` was read, by its path in the folder.
    """

    name: str
    folder: Path
    log: tuple[Mapping[str, Any], ...]
    log_file: str | None
    attempts: tuple[Attempt, ...]
    summary: Mapping[str, Any]
    record: Mapping[str, Any]
    completions: tuple[Completion, ...]
    missing: tuple[str, ...]


def has_sources(folder: Path) -> bool:
    """Whether `folder` is one that a run left; a checkpoint is none, but the folder around it."""
    if (folder / JOURNAL_NAME).is_file():
        return True
    if _CHECKPOINT.fullmatch(folder.resolve().name):
        return False
    files = (SUMMARY, RECORD, completions.FILE)
    return _find_state(folder) is not None or any((folder / file).is_file() for file in files)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`, under names that tell them apart.

    Raises:
        ConfigError: a folder holds nothing of a run, or a file that cannot be read.
    """
    return [
        read_run(folder, name) for folder, name in zip(folders, run_names(folders), strict=True)
    ]


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; where two have the same, the paths as given, with a number."""
    names = [folder.resolve().name or str(folder) for folder in folders]
    return [
        name if names.count(name) == 1 else f"{number}: {folder}"
        for number, (name, folder) in enumerate(zip(names, folders, strict=True), start=1)
    ]


def read_run(folder: Path, name: str) -> Run:
    """The run in `folder`.

    Raises:
        ConfigError: it holds nothing of a run, or a file that cannot be read.
    """
    if not has_sources(folder):
        raise ConfigError(
            f"{folder} holds nothing of a run: neither {JOURNAL_NAME} nor {STATE}, {SUMMARY}, "
            f"{RECORD} or {completions.FILE}. Pass the output_dir of a run."
        )
    state = _find_state(folder)
    present = {file for file in _MISSING if (folder / file).is_file()}
    if state is not None:
        present.add(STATE)
    return Run(
        name=name,
        folder=folder,
        log=() if state is None else read_log(state),
        log_file=None if state is None else state.relative_to(folder).as_posix(),
        attempts=read_attempts(folder / JOURNAL_NAME) if JOURNAL_NAME in present else (),
        summary=read_object(folder / SUMMARY) if SUMMARY in present else {},
        record=read_object(folder / RECORD) if RECORD in present else {},
        completions=read_completions(folder / completions.FILE)
        if completions.FILE in present
        else (),
        missing=tuple(text for file, text in _MISSING.items() if file not in present),
    )


def read_log(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The log history of a trainer_state.json.

    Raises:
        ConfigError: there is none that can be read.
    """
    log = read_object(path).get("log_history")
    if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
        raise ConfigError(f"{path}: log_history is not a list of objects, as a Trainer writes it.")
    return tuple(log)


def _find_state(folder: Path) -> Path | None:
    """The folder's trainer_state.json, or that of its last checkpoint."""
    own = folder / STATE
    if own.is_file():
        return own
    steps = {}
    for path in folder.glob(f"checkpoint-*/{STATE}"):
        match = _CHECKPOINT.fullmatch(path.parent.name)
        if match and path.is_file():
            steps[int(match[1])] = path
    return steps[max(steps)] if steps else None
