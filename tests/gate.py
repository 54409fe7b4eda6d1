"""In CI (environment variable CI) a run also fails when a required test did not run.

A pytest plugin, loaded by conftest.py. A test may be skipped only if it is marked `gpu` and there
is no GPU, or `browser` and there is no chromium. A run of the whole suite, or of `make test`, must
contain tests of the kinds in REQUIRED.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

import browsers

# Kinds of tests by what -m selects; another selection need not have any.
REQUIRED = {
    "": ("ranks", "oracle"),
    "not engines": ("ranks", "oracle"),
}


class Gate:
    """Counts what was skipped and which kinds of tests ran."""

    def __init__(self, config: pytest.Config) -> None:
        self.skipped: list[str] = []
        self.ran: set[str] = set()
        options = config.option
        from_the_settings = config.args_source is pytest.Config.ArgsSource.TESTPATHS
        narrowed = options.keyword or options.deselect or options.collectonly
        whole = from_the_settings and not narrowed
        self.required = REQUIRED.get(options.markexpr, ()) if whole else ()

    def complaints(self) -> list[str]:
        missing = [name for name in self.required if name not in self.ran]
        return self.skipped + [f"no test marked {name!r} ran" for name in missing]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            needs_gpu, needs_browser = ("gpu" in report.keywords, "browser" in report.keywords)
            excused = (needs_gpu and not _has_gpu()) or (needs_browser and not browsers.chromium())
            self._add_skip(report, excused=excused)
        elif report.when == "call":
            self.ran |= {name for name in self.required if name in report.keywords}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._add_skip(report, excused=False)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.complaints() and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.complaints():
            terminalreporter.section("required tests that did not run", red=True)
            for line in self.complaints():
                terminalreporter.line(line)

    def _add_skip(self, report: Any, *, excused: bool) -> None:
        if not excused:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.skipped.append(f"{report.nodeid}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI"):
        config.pluginmanager.register(Gate(config))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
