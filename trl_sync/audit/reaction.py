"""What happens to a report: the journal, a warning, an error, a stop or a repair."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_sync.audit.compare import Comparison
from trl_sync.audit.config import AUTO, AuditConfig
from trl_sync.audit.findings import Cause, Finding, SyncReport
from trl_sync.audit.journal import JOURNAL_NAME, Journal, Listener
from trl_sync.audit.rank_state import MissingRanks
from trl_sync.errors import DesyncError

logger = logging.getLogger("trl_sync.audit")


class Reaction:
    """Writes reports down and acts on them as `config.on_desync` says; alike on every rank."""

    def __init__(
        self,
        comparison: Comparison,
        config: AuditConfig,
        output_dir: Path | None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.num_desyncs = 0
        self.should_stop = False
        self.unverified_reason: str | None = None
        self.warned: set[tuple[Cause, str | None]] = set()
        self._comparison = comparison
        self._action = config.on_desync
        self._path = _journal_path(config, output_dir)
        heard = (*listeners, *([config.on_event] if config.on_event is not None else []))
        on_main = comparison.rank == 0
        self.journal = Journal(self._path, heard) if on_main else Journal(None)

    def close(self) -> None:
        self.journal.close()

    def react(self, report: SyncReport) -> bool:
        """True if the ranks have to be repaired; nothing else is left to do then.

        Raises:
            DesyncError: with `on_desync="raise"`, on every rank.
        """
        for finding in report.findings:
            if not finding.fatal:
                self.warn_once(finding)
        if not report.fatal:
            self._write_audit(report)
            return False
        if self._action == "warn" and all(_key(finding) in self.warned for finding in report.fatal):
            self._write_audit(report)  # as it was when it was warned about
            return False
        self.num_desyncs += 1
        self._write_desync(report)
        if self._action == "raise":
            raise DesyncError(report.describe(), report, report.fatal)
        if self._action == "stop":
            self.should_stop = True
            self.unverified_reason = report.describe()
            if self._comparison.rank == 0:
                logger.error("%s", report.describe())
        elif self._action == "warn":
            for finding in report.fatal:
                self.warn_once(finding)
        return self._action == "repair"

    def refuse(self, report: SyncReport) -> DesyncError:
        """The error for what no option can go on from, written down."""
        self.num_desyncs += 1
        self._write_desync(report)
        return DesyncError(report.describe(), report, report.findings)

    def warn_once(self, finding: Finding) -> None:
        """A warning on rank 0, once for each cause; of a desync, for each tensor too."""
        key = _key(finding)
        if key not in self.warned and self._comparison.rank == 0:
            logger.warning("%s", finding.describe())
            if not finding.fatal:
                self.journal.write("warning", **finding.as_dict(), message=finding.describe())
        self.warned.add(key)

    def write_missing(self, report: SyncReport, missing: MissingRanks) -> None:
        """The journal's last line, from the lowest rank that is there to write it."""
        ranks = range(self._comparison.world_size)
        present = [rank for rank in ranks if rank not in missing.ranks]
        if self._comparison.rank == (present or [0])[0]:
            # Without listeners: the watch ends the process next, and nobody's code may hold it up.
            self.journal = Journal(self._path)
            self._write_desync(report)

    def _write_audit(self, report: SyncReport) -> None:
        if report.roots:
            self.journal.write(
                "audit",
                step=report.step,
                audit=report.audit,
                equal=report.equal,
                roots=report.roots,
                size_bytes=report.size_bytes,
                seconds=round(report.seconds, 6),
            )

    def _write_desync(self, report: SyncReport) -> None:
        findings: list[dict[str, Any]] = [finding.as_dict() for finding in report.findings]
        self.journal.write(
            "desync",
            step=report.step,
            audit=report.audit,
            action=self._action,
            findings=findings,
            message=report.describe(),
        )


def _key(finding: Finding) -> tuple[Cause, str | None]:
    return finding.cause, finding.tensor if finding.fatal else None


def _journal_path(config: AuditConfig, output_dir: Path | None) -> Path | None:
    if config.journal is None:
        return None
    if config.journal != AUTO:
        return Path(config.journal)
    return None if output_dir is None else output_dir / JOURNAL_NAME
