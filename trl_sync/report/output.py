"""Runs -> the page and the plots on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trl_sync.report.curves import make_charts
from trl_sync.report.files import write_whole
from trl_sync.report.page import build_page
from trl_sync.report.plots import plot_charts
from trl_sync.report.run_folder import Run

PAGE_NAME = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFiles:
    """What was written; `plots` is None where matplotlib is not installed."""

    page: Path
    plots: tuple[Path, ...] | None


def write_report(runs: Sequence[Run], page: Path) -> ReportFiles:
    """Writes the page of a run, or of several that are compared, and plots beside it.

    Raises:
        OSError: a file cannot be written.
    """
    charts = make_charts([run.log for run in runs], [run.name for run in runs])
    write_whole(page, build_page(runs, charts).encode("utf-8", "replace"))
    try:
        return ReportFiles(page=page, plots=tuple(plot_charts(charts, page)))
    except ImportError:
        return ReportFiles(page=page, plots=None)
