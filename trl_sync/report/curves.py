"""Log history -> charts: which logged names share a chart, and their points.

The names are those of PPOTrainer (trl_sync/ppo/metrics.py, trl_sync/ppo/experience.py) and of the
trainers of TRL that log the same quantities.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from trl_sync.report.text import finite

Row = Mapping[str, Any]
Point = tuple[float, float]

EPISODES, STEPS = "episodes", "optimizer steps"
MOST_POINTS = 400
MOST_CURVES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartKind:
    """A quantity: logged names with the label of each, and prefixes that stand for more names."""

    key: str
    title: str
    unit: str
    names: Mapping[str, str]
    prefix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Points in the order of the log; `colour` counts from 0; `left_out` were no finite numbers."""

    label: str
    colour: int
    points: tuple[Point, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    key: str
    title: str
    unit: str
    x_label: str
    curves: tuple[Curve, ...]


_REWARDS = {
    "objective/scores": "score",
    "objective/rlhf_reward": "score less KL penalty",
    "objective/raw_scores": "score before scaling and clipping",
    "reward": "reward",
    "eval_objective/scores": "score, evaluation",
    "eval_reward": "reward, evaluation",
}
_CLIP_FRACTIONS = {
    "policy/clipfrac_avg": "policy",
    "val/clipfrac_avg": "value model",
    "clip_ratio/region_mean": "policy",
}
_LENGTHS = {
    "objective/response_length": "training",
    "completions/mean_length": "training",
    "eval_objective/response_length": "evaluation",
    "eval_completions/mean_length": "evaluation",
}
_KL = {"objective/kl": "training", "eval_objective/kl": "evaluation"}
_TOKEN_KL = {"kl": "training", "eval_kl": "evaluation"}
_ENTROPY = {"policy/entropy_avg": "training", "entropy": "training", "eval_entropy": "evaluation"}
_EXPLAINED = {"val/explained_variance": ""}
_APPROX_KL = {"policy/approxkl_avg": ""}
_LOSSES = {"loss": "training", "eval_loss": "evaluation"}
_LOSS_PARTS = {"loss/policy_avg": "policy", "loss/value_avg": "value model"}
_RATES = {"learning_rate": "policy", "value_lr": "value model"}
_TIMES = {"time/rollout_s": "rollout", "time/score_s": "scoring"}


def _kind(
    key: str, title: str, unit: str, names: Mapping[str, str], prefix: str | None = None
) -> ChartKind:
    return ChartKind(key=key, title=title, unit=unit, names=names, prefix=prefix)


CHART_KINDS = (
    _kind("reward", "Reward", "mean of episodes", _REWARDS),
    _kind("rewards", "Rewards by source", "mean", {}, "rewards/"),
    _kind("kl", "KL to the reference", "nats a response", _KL),
    _kind("token_kl", "KL to the reference, of a token", "nats a token", _TOKEN_KL),
    _kind("explained_variance", "Value explained variance", "share", _EXPLAINED),
    _kind("entropy", "Entropy of the policy", "nats a token", _ENTROPY),
    _kind("response_entropy", "-log p of responses", "nats a response", {"objective/entropy": ""}),
    _kind("clip_fraction", "Clip fractions", "share of tokens", _CLIP_FRACTIONS),
    _kind("approx_kl", "KL of updates to their rollout", "nats a token", _APPROX_KL),
    _kind("response_length", "Response length", "tokens", _LENGTHS),
    _kind("stopped", "Ended by a stop token", "share of responses", {"objective/stopped": ""}),
    _kind("loss", "Loss", "", _LOSSES),
    _kind("loss_parts", "Loss by part", "", _LOSS_PARTS),
    _kind("grad_norm", "Gradient norm", "before clipping", {"grad_norm": ""}),
    _kind("learning_rate", "Learning rate", "", _RATES),
    _kind("kl_coef", "KL coefficient", "", {"objective/kl_coef": ""}),
    _kind("time", "Time by phase", "seconds a rollout", _TIMES, "time/"),
    _kind("speed", "Speed since training began", "episodes/s", {"eps": ""}),
)


def make_charts(logs: Sequence[Sequence[Row]], run_names: Sequence[str]) -> list[Chart]:
    """A chart of each quantity that a log holds, with a curve for each of its names.

    Several runs share charts: each chart is of one name, with a curve for each run. The axis is
    episodes if all runs that logged anything count them, else optimizer steps.
    """
    by_episode = all(any("episode" in row for row in log) for log in logs if log)
    placed = [list(_place(log, by_episode=by_episode)) for log in logs]
    x_label = EPISODES if by_episode else STEPS
    charts = []
    for kind in CHART_KINDS:
        if len(logs) == 1:
            charts.append(_one_run(kind, placed[0], x_label))
        else:
            charts += _several_runs(kind, placed, run_names, x_label)
    return [chart for chart in charts if chart.curves]


def _place(log: Sequence[Row], *, by_episode: bool) -> Iterable[tuple[float, Row]]:
    """Each row with its place on the axis; evaluations have that of the row before them."""
    episode = 0.0
    for row in log:
        step = finite(row.get("step"))
        if by_episode:
            found = finite(row.get("episode"))
            episode = episode if found is None else found
            yield episode, row
        elif step is not None:
            yield step, row


def _names(kind: ChartKind, rows: Sequence[tuple[float, Row]]) -> dict[str, str]:
    """The names of a quantity that the log holds, with labels."""
    logged = {name for _, row in rows for name in row if isinstance(name, str)}
    found = {name: label for name, label in kind.names.items() if name in logged}
    if kind.prefix is not None:
        more = sorted(n for n in logged if n.startswith(kind.prefix) and not n.endswith("/std"))
        found |= {
            name: name.removeprefix(kind.prefix).removesuffix("/mean")
            for name in more
            if name not in found
        }
    return dict(list(found.items())[:MOST_CURVES])


def _one_run(kind: ChartKind, rows: Sequence[tuple[float, Row]], x_label: str) -> Chart:
    curves: list[Curve] = []
    for name, label in _names(kind, rows).items():
        curve = _curve(rows, name)
        if curve is not None:
            curves.append(replace(curve, label=label or kind.title, colour=len(curves)))
    return Chart(
        key=kind.key, title=kind.title, unit=kind.unit, x_label=x_label, curves=tuple(curves)
    )


def _several_runs(
    kind: ChartKind,
    placed: Sequence[Sequence[tuple[float, Row]]],
    run_names: Sequence[str],
    x_label: str,
) -> list[Chart]:
    names: dict[str, str] = {}
    for rows in placed:
        names |= _names(kind, rows)
    charts = []
    for position, (name, label) in enumerate(names.items()):
        curves: list[Curve] = []
        for number, (rows, run_name) in enumerate(zip(placed, run_names, strict=True)):
            curve = _curve(rows, name)
            if curve is not None:
                curves.append(replace(curve, label=run_name, colour=number))
        key = kind.key if position == 0 else f"{kind.key}_{position + 1}"
        title = f"{kind.title}: {label}" if label and len(names) > 1 else kind.title
        chart = Chart(key=key, title=title, unit=kind.unit, x_label=x_label, curves=tuple(curves))
        charts.append(chart)
    return charts


def _curve(rows: Sequence[tuple[float, Row]], name: str) -> Curve | None:
    """The points of a name, or None if it has none that can be drawn."""
    logged = [(x, finite(row[name])) for x, row in rows if name in row]
    points = spread([(x, y) for x, y in logged if y is not None])
    if not points:
        return None
    left_out = len(logged) - len(points)
    return Curve(label=name, colour=0, points=tuple(thin_out(points)), left_out=left_out)


def spread(points: Sequence[Point]) -> list[Point]:
    """Points in a row that share their place, evenly on the way there from the place before.

    Updates of one iteration log the same number of episodes.
    """
    placed: list[Point] = []
    before = 0.0
    for x, group in groupby(points, key=lambda point: point[0]):
        heights = [y for _, y in group]
        start = before if before < x else x
        for number, y in enumerate(heights, start=1):
            placed.append((x - (x - start) * (len(heights) - number) / len(heights), y))
        before = x
    return placed


def thin_out(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points that keep the first, the last, and each stretch's extremes."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) * 2 // most)
    kept: dict[int, Point] = {0: points[0]}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        heights = [points[index][1] for index in stretch]
        for height in (min(heights), max(heights)):
            index = start + heights.index(height)
            kept[index] = points[index]
    kept[len(points) - 1] = points[-1]
    return [kept[index] for index in sorted(kept)]
