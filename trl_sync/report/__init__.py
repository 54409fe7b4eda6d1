"""What a run left in its folder -> one HTML page and plots; and the completions that it shows."""

from trl_sync.report.completions import write_completions
from trl_sync.report.output import ReportFiles, write_report
from trl_sync.report.plots import plot_learning_curve
from trl_sync.report.run_folder import Run, read_runs

__all__ = [
    "ReportFiles",
    "Run",
    "plot_learning_curve",
    "read_runs",
    "write_completions",
    "write_report",
]
