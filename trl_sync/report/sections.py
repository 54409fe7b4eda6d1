"""The page's parts other than curves and audit: the first look, completions, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_sync.report.comparison import flatten
from trl_sync.report.completions import Answer, Completion, mean_scores
from trl_sync.report.run_folder import Run
from trl_sync.report.tables import definitions, not_shown, tiles
from trl_sync.report.text import count, escape, finite, join, show

MOST_COMPLETIONS, COMPLETION_LIMIT = 24, 1500
MOST_SETTINGS = 500
# Shown without a click; the others are a click away.
MAIN_SETTINGS = (
    *("learning_rate", "value_learning_rate", "lr_scheduler_type", "total_episodes"),
    *("batch_size", "num_mini_batches", "num_ppo_epochs", "num_generations", "response_length"),
    *("temperature", "stop_token", "stop_token_id", "missing_eos_penalty", "kl_coef"),
    *("kl_estimator", "kl_target", "target_kl", "cliprange", "cliprange_high", "cliprange_value"),
    *("vf_coef", "gamma", "lam", "value_lam", "whiten_rewards", "reward_weights"),
    *("max_grad_norm", "bf16", "seed"),
)


def overview(run: Run) -> str:
    """The figures to be seen first, as far as they are known."""
    facts = [
        (name, show(number), "")
        for name, key in (
            ("reward, first tenth", "reward_first"),
            ("reward, last tenth", "reward_last"),
            ("KL, last tenth", "kl_last"),
            ("episodes", "episodes"),
            ("episodes/s", "episodes_per_s"),
            ("seconds of training", "wall_s"),
        )
        if (number := finite(run.summary.get(key))) is not None
    ]
    if not run.summary:
        facts += _from_log(run)
    return tiles([*facts, *_audit_tiles(run)]) + sources(run)


def _from_log(run: Run) -> list[tuple[str, str, str]]:
    """Of a run without summary: the last number of what matters most."""
    wanted = {"objective/scores": "last reward", "reward": "last reward", "loss": "last loss"}
    wanted |= {"objective/kl": "last KL", "episode": "episodes", "step": "optimizer steps"}
    found: dict[str, tuple[str, str, str]] = {}
    for name, label in wanted.items():
        numbers = [n for row in run.log if (n := finite(row.get(name))) is not None]
        if numbers:
            found.setdefault(label, (label, show(numbers[-1]), ""))
    return list(found.values())


def _audit_tiles(run: Run) -> list[tuple[str, str, str]]:
    if not run.attempts:
        return [("audit", "none", "")]
    audits = sum(attempt.num_audits for attempt in run.attempts)
    desyncs = sum(attempt.desyncs for attempt in run.attempts)
    end = "regular" if run.attempts[-1].ended else "none written"
    return [
        ("audits", f"{audits:,}", ""),
        ("desyncs", f"{desyncs:,}", "bad" if desyncs else "good"),
        ("end of the audit", end, "" if run.attempts[-1].ended else "warn"),
    ]


def sources(run: Run) -> str:
    """Where the figures come from, and what the folder does not hold."""
    read = f"<li>Curves: {escape(run.log_file)}.</li>" if run.log_file else ""
    missing = "".join(f"<li>Not there: {escape(text)}</li>" for text in run.missing)
    folder = f"<li>Folder: {escape(str(run.folder))}</li>"
    return f'<ul class="plain note">{folder}{read}{missing}</ul>'


def completions_section(completions: Sequence[Completion]) -> str:
    """Answers before and after training, side by side where there is room."""
    before, after = mean_scores(completions)
    pairs = ((before, "before"), (after, "after"))
    means = [f"{show(mean)} {when}" for mean, when in pairs if mean is not None]
    shown = completions[:MOST_COMPLETIONS]
    said = f"Mean score {', '.join(means)} training. " if means else ""
    return join(
        [
            f"<p>{said}{len(shown):,} of {count(len(completions), 'prompt')} shown.</p>",
            '<div class="answers">',
            *(_completion(completion) for completion in shown),
            "</div>",
        ]
    )


def _completion(completion: Completion) -> str:
    sides = "".join(
        _side(answer, when)
        for answer, when in ((completion.before, "before"), (completion.after, "after"))
        if answer is not None
    )
    query = escape(completion.query, COMPLETION_LIMIT)
    return f'<div class="answer"><pre>{query}</pre><div class="sides">{sides}</div></div>'


def _side(answer: Answer, when: str) -> str:
    score = "" if answer.score is None else f", score {show(answer.score)}"
    text = escape(answer.text, COMPLETION_LIMIT)
    return f"<div><span>{when}{score}</span><pre>{text}</pre></div>"


def configuration_section(record: Mapping[str, Any]) -> str:
    """The settings: those that matter most, then all of them."""
    config = record.get("config")
    if not isinstance(config, Mapping) or not config:
        return "<p>run_record.json holds no settings.</p>"
    main = {n: config[n] for n in MAIN_SETTINGS if config.get(n) is not None}
    every = list(flatten(config).items())
    return join(
        [
            definitions(main),
            f"<details><summary>All {count(len(every), 'setting')}</summary>",
            definitions(dict(sorted(every[:MOST_SETTINGS]))),
            not_shown(len(every) - MOST_SETTINGS, "setting"),
            "</details>",
        ]
    )


def environment_section(record: Mapping[str, Any]) -> str:
    """Versions, platform, devices and engine, as they were when training began."""
    names = ("engine", "world_size", "device", "devices", "platform", "base_model", "first_step")
    facts = {name: record[name] for name in names if record.get(name) is not None}
    devices = facts.get("devices")
    if isinstance(devices, list):
        facts["devices"] = "; ".join(str(device) for device in devices[:64])
    versions = record.get("versions")
    known = dict(list(versions.items())[:64]) if isinstance(versions, Mapping) else {}
    return definitions(facts | known)
