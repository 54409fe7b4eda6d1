"""Runs -> one HTML page that needs nothing else: no network, no other file, no script.

Everything that comes from a run passes `escape`; besides, the page's own policy forbids scripts
and whatever lies outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trl_sync._version import __version__
from trl_sync.report.audit_section import audit_section
from trl_sync.report.comparison import differing_settings, summary_table
from trl_sync.report.curves import Chart
from trl_sync.report.run_folder import Run
from trl_sync.report.sections import (
    completions_section,
    configuration_section,
    environment_section,
    overview,
)
from trl_sync.report.style import STYLE
from trl_sync.report.svg_chart import draw_chart
from trl_sync.report.text import escape, join

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
Section = tuple[str, str, str]  # its anchor, its title, its content


def build_page(runs: Sequence[Run], charts: Sequence[Chart]) -> str:
    """The page of a run, or of several that are compared; `charts` are `make_charts` of them."""
    title = f"Run report: {', '.join(run.name for run in runs)}"
    sections = list(_sections(runs, charts))
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in sections)
    return join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f"</head>\n<body>\n<header><h1>{escape(title)}</h1>",
            f"<nav>{links}</nav></header>\n<main>",
            *(
                f'<section id="{anchor}"><h2>{name}</h2>\n{content}\n</section>'
                for anchor, name, content in sections
            ),
            f'</main>\n<footer class="note">Made by trl_sync {__version__}.</footer>',
            "</body>\n</html>\n",
        ]
    )


def _sections(runs: Sequence[Run], charts: Sequence[Chart]) -> list[Section]:
    several = len(runs) > 1
    compared = [
        ("figures", "Figures side by side", summary_table(runs)),
        ("differences", "Settings that differ", differing_settings(runs)),
    ]
    return [
        ("overview", "Overview", _of_each(runs, overview)),
        *(compared if several else []),
        ("curves", "Curves", _curves(charts)),
        ("audit", "Audit", _of_each(runs, _audit)),
        ("completions", "Completions", _of_each(runs, _completions)),
        ("configuration", "Configuration", _of_each(runs, _configuration)),
        ("environment", "Environment", _of_each(runs, _environment)),
    ]


def _of_each(runs: Sequence[Run], make: Callable[[Run], str]) -> str:
    if len(runs) == 1:
        return make(runs[0])
    return join([f"<h3>{escape(run.name)}</h3>\n{make(run)}" for run in runs])


def _curves(charts: Sequence[Chart]) -> str:
    if not charts:
        return "<p>There is no log, or it holds none of the quantities that are drawn here.</p>"
    return join(['<div class="charts">', *(draw_chart(chart) for chart in charts), "</div>"])


def _audit(run: Run) -> str:
    return audit_section(run) if run.attempts else "<p>No audit in this folder.</p>"


def _completions(run: Run) -> str:
    none = "<p>No completions in this folder.</p>"
    return completions_section(run.completions) if run.completions else none


def _configuration(run: Run) -> str:
    return configuration_section(run.record) if run.record else "<p>Not recorded.</p>"


def _environment(run: Run) -> str:
    return environment_section(run.record) if run.record else "<p>Not recorded.</p>"
