"""Log history -> plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Logged name -> title and unit of the axis.
CURVES = {
    "objective/scores": "reward",
    "objective/kl": "KL to the reference (nats a sequence)",
    "val/explained_variance": "value explained variance",
    "policy/entropy_avg": "entropy (nats a token)",
}


def plot_learning_curve(log_history: list[dict[str, Any]], path: Path) -> None:
    """Writes a PNG of reward, KL, value explained variance and entropy against episodes.

    `log_history` is `trainer.state.log_history`.

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
        axes.set_title(title)
        axes.set_xlabel("episodes")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
