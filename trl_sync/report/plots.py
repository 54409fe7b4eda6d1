"""Plots as PNG files, for where a page does not do. They need matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_sync.report.curves import Chart
from trl_sync.report.files import write_whole

# Logged name -> title and unit of the axis.
CURVES = {
    "objective/scores": "reward",
    "objective/kl": "KL to the reference (nats a sequence)",
    "val/explained_variance": "value explained variance",
    "policy/entropy_avg": "entropy (nats a token)",
}
_UNUSUAL = re.compile(r"[^\x20-\x7e]")


def plot_learning_curve(
    log_history: list[dict[str, Any]], path: Path, reward: str = "reward"
) -> None:
    """Writes a PNG of reward, KL, value explained variance and entropy against episodes.

    `log_history` is `trainer.state.log_history`; `reward` is the title of the reward's curve, for
    one that has a name, such as accuracy.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the log holds no PPO metrics.
    """
    from matplotlib.figure import Figure

    rows = [row for row in log_history if "episode" in row and "objective/scores" in row]
    if not rows:
        raise ValueError("The log history holds no PPO metrics, so there is no curve to draw.")
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        points = [(row["episode"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), linewidth=1.5)
        axes.set_title(reward if title == "reward" else title)
        axes.set_xlabel("episodes")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_charts(charts: Sequence[Chart], page: Path) -> list[Path]:
    """Writes a PNG of each chart beside `page`; the paths, such as report-reward.png.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    # Before anything is written: without it there is none of them.
    import matplotlib.figure  # noqa: F401

    written = []
    for chart in charts:
        path = page.with_name(f"{page.stem}-{chart.key}.png")
        write_whole(path, draw_png(chart))
        written.append(path)
    return written


def draw_png(chart: Chart) -> bytes:
    """A chart as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    lines: list[Any] = []
    for curve in chart.curves:
        alone = "o" if len(curve.points) == 1 else None
        colour = f"C{curve.colour % 10}"
        lines += axes.plot(*zip(*curve.points, strict=True), color=colour, marker=alone)
    axes.set_title(_literal(chart.title), parse_math=False)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.unit)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        # Names are put in afterwards: a legend leaves out labels that begin with "_".
        legend = axes.legend(lines, [str(number) for number in range(len(lines))])
        for text, curve in zip(legend.get_texts(), chart.curves, strict=True):
            text.set_parse_math(False)
            text.set_text(_literal(curve.label))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _literal(text: str) -> str:
    """A name of a run as the built-in font can draw it, and short."""
    return _UNUSUAL.sub("?", text)[:60]
