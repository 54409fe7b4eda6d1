"""The errors this package raises, so that callers can tell a wrong setting from a failed run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """A setting, model or dataset that cannot work; raised before training or writing.

    It is a `ValueError`.
    """


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used or saved.

    It is incomplete or damaged, or belongs to another base model or configuration; or writing it
    failed. It is a `ConfigError`.
    """


class RewardError(RuntimeError):
    """A reward source that returned something other than one finite number per episode.

    Also raised on the other processes where rolling out or scoring failed on one, so that all end
    together. It is a `RuntimeError`.
    """


class DesyncError(RuntimeError):
    """Ranks parted, or a frozen model moved; raised on every rank at the same step.

    Where a rank is gone the others raise it, or end with exit code 75. `report` is the audit's
    `SyncReport`, None if an exchange failed without a known reason; `findings` is what it found,
    the first one the cause. It is a `RuntimeError`.
    """

    def __init__(self, message: str, report: Any = None, findings: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.report = report
        self.findings = tuple(findings)


class AuditError(RuntimeError):
    """The audit itself does not work here, so its silence would mean nothing.

    Its self-test failed, a rank has not begun it, or it has ended. It is a `RuntimeError`.
    """
