"""The errors this package raises, so that callers can tell a wrong setting from a failed run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """A setting, model or dataset that cannot work; raised before training or writing."""


class CheckpointError(ConfigError):
    """A checkpoint that is incomplete, or that belongs to another base model or configuration."""


class RewardError(RuntimeError):
    """A reward source that returned something other than one finite number per episode."""


class DesyncError(RuntimeError):
    """Ranks parted, or a frozen model moved; raised on every rank at the same step.

    `report` is the audit's `SyncReport`, `findings` what it found; the first one is the cause.
    """

    def __init__(self, message: str, report: Any = None, findings: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.report = report
        self.findings = tuple(findings)


class AuditError(RuntimeError):
    """The audit itself does not work here, so its silence would mean nothing."""
