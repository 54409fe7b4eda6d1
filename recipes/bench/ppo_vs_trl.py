"""Our PPO beside TRL 1.12's on the same job: episodes/s, peak memory, time by phase, reward.

    pip install --no-deps --target .oracle trl==1.12.0
    python recipes/bench/ppo_vs_trl.py --pairs 3 --json ppo_vs_trl.json

Sides: TRL with four full models (trl) and with `peft_config` on the policy (trl_peft); ours with
four full models (ours_separate), on one shared base in full precision (ours_shared) and on one in
NF4 (ours_nf4, its reward model in NF4 too; ours_nf4_ckpt with gradient checkpointing, a flag that
TRL's trainer has and ignores). Jobs: the embedded task, and Llamas with random weights of 15 M and
110 M parameters; `natural` responses end by themselves, with `limit` none does. For a GPU there are
`--jobs 1b:limit 8b:limit` too, in bf16.

Every run is a process of its own. A round runs each side once, and the order changes from round to
round. Ratios are medians of each round's own, so a machine that slows down hits both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs import SHAPES, embedded_job, random_job
from measure import lower_bound, machine

ROOT = Path(__file__).resolve().parents[2]
ORACLE = ROOT / ".oracle"
BASELINES = ("trl", "trl_peft")
SIDES = (*BASELINES, "ours_separate", "ours_shared", "ours_nf4", "ours_nf4_ckpt")
JOBS = ("tiny:natural", "15m:natural", "15m:limit", "110m:natural", "110m:limit")
PHASES = ("rollout", "score", "update", "audit", "other")


def main() -> None:
    options = parse()
    if not ORACLE.is_dir():
        sys.exit(f"error: TRL 1.12 is not at {ORACLE}: see the command in --help")
    outcome: dict[str, Any] = {"command": " ".join(sys.argv)} | machine() | {"jobs": {}}
    with tempfile.TemporaryDirectory() as name:
        for job in options.jobs:
            runs = measure(job, options, Path(name))
            outcome["jobs"][job] = summarize(runs, options.sides) | {"runs": runs}
            show(job, outcome["jobs"][job])
            if options.json is not None:
                options.json.write_text(json.dumps(outcome, indent=2) + "\n")
    print(f"{outcome['device']}, {outcome['machine']}, {outcome['threads']} threads, torch "
          f"{outcome['torch']}, {outcome['date']}")  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), metavar="SIZE:LENGTHS")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--pairs", type=int, default=3, help="rounds; each runs every side once")
    parser.add_argument("--episodes", type=int, help="of every run, not the job's own number")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    for job in options.jobs:
        size, _, lengths = job.partition(":")
        if size not in ("tiny", *SHAPES) or lengths not in ("natural", "limit"):
            sizes = ", ".join(("tiny", *SHAPES))
            parser.error(f"--jobs {job}: use SIZE:natural or SIZE:limit with a size of {sizes}")
    return options


def measure(job: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A round for each pair, in each of them every side once."""
    size, _, lengths = job.partition(":")
    place = folder / job.replace(":", "_")
    made = embedded_job(lengths) if size == "tiny" else random_job(size, place, lengths=lengths)
    if options.episodes is not None:
        made.settings["total_episodes"] = options.episodes
    place.mkdir(exist_ok=True)
    (place / "job.json").write_text(json.dumps(made.to_dict()))
    rounds = []
    for number in range(options.pairs):
        # The order turns from round to round, so that no side always comes first.
        shift = number % len(options.sides)
        order = [*options.sides[shift:], *options.sides[:shift]]
        rounds.append({side: run(side, number, place) for side in order})
        speeds = {side: round(rounds[-1][side]["episodes_per_s"], 2) for side in options.sides}
        print(f"{job}, round {number + 1}: episodes/s {speeds}", file=sys.stderr, flush=True)
    return rounds


def run(side: str, seed: int, folder: Path) -> dict[str, Any]:
    environment = dict(os.environ)
    if side in BASELINES:
        environment["PYTHONPATH"] = str(ORACLE)
    output = folder / f"{side}-{seed}.json"
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("ppo_side.py"))]
    command += ["--side", side, "--job", str(folder / "job.json")]
    command += ["--output", str(output), "--seed", str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {side}, seed {seed}:\n{done.stderr[-3000:]}")
    return json.loads(output.read_text())


def summarize(rounds: list[dict[str, Any]], sides: list[str]) -> dict[str, Any]:
    """Medians of each side, and medians of its ratios to the baselines of the same round."""
    return {
        "sides": {side: medians([row[side] for row in rounds]) for side in sides},
        "ratios": {
            baseline: {
                side: {
                    "episodes_per_s": median_ratio(rounds, side, baseline, "episodes_per_s"),
                    "peak_memory": median_ratio(rounds, side, baseline, "peak_bytes"),
                }
                | rewards(rounds, side, baseline)
                for side in sides
                if side not in BASELINES
            }
            for baseline in BASELINES
            if baseline in sides
        },
    }


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    return {
        "episodes_per_s": statistics.median(run["episodes_per_s"] for run in runs),
        "seconds": {
            phase: statistics.median(run["seconds"].get(phase, 0.0) for run in runs)
            for phase in PHASES
        },
        "audit_share": statistics.median(audit_share(run) for run in runs),
        "peak_bytes": statistics.median(peaks) if peaks else None,
        "planned_peak_bytes": runs[0].get("planned_peak_bytes"),
        "state_bytes": sum(runs[0]["state_bytes"].values()),
        "mean_response": statistics.mean(run["mean_response"] for run in runs),
        "response_limit": runs[0]["response_limit"],
        "first_reward": statistics.mean(run["first_reward"] for run in runs),
        "last_reward": statistics.mean(run["last_reward"] for run in runs),
    }


def audit_share(run: dict[str, Any]) -> float:
    """What the audit takes of the time between its first look and its last, which see everything
    and come once a run.
    """
    once_s = run["seconds"]["audit"] - run["audited_updates_s"]
    return run["audited_updates_s"] / (run["wall_s"] - once_s)


def median_ratio(rounds: list[dict[str, Any]], side: str, baseline: str, name: str) -> float | None:
    pairs = [(row[side][name], row[baseline][name]) for row in rounds]
    if any(None in pair for pair in pairs):
        return None
    return statistics.median(own / other for own, other in pairs)


def rewards(rounds: list[dict[str, Any]], side: str, baseline: str) -> dict[str, float]:
    """The mean difference of the last rewards, and the lower end of its one-sided 95% interval."""
    if len(rounds) < 2:
        return {}
    differences = [row[side]["last_reward"] - row[baseline]["last_reward"] for row in rounds]
    return {
        "reward_difference": statistics.mean(differences),
        "reward_lower_bound": lower_bound(differences),
    }


def show(job: str, result: dict[str, Any]) -> None:
    """The table of one job, as Markdown."""
    first = next(iter(result["sides"].values()))
    print(f"\n### {job}: mean response {first['mean_response']:.0f} of {first['response_limit']}\n")
    ratios = [f"x {baseline}" for baseline in result["ratios"]]
    memory = [f"memory x {baseline}" for baseline in result["ratios"]]
    titles = [
        "",
        "episodes/s",
        *ratios,
        "peak MB",
        *memory,
        "computed MB",
        "state MB",
        *PHASES,
        "audit %",
        "last reward",
    ]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for side, row in result["sides"].items():
        of_side = [result["ratios"][baseline].get(side, {}) for baseline in result["ratios"]]
        cells = [
            side,
            f"{row['episodes_per_s']:.2f}",
            *(number(ratio.get("episodes_per_s")) for ratio in of_side),
            megabytes(row["peak_bytes"]),
            *(number(ratio.get("peak_memory")) for ratio in of_side),
            megabytes(row["planned_peak_bytes"]),
            f"{row['state_bytes'] / 1e6:.0f}",
            *(f"{row['seconds'][phase]:.2f}" for phase in PHASES),
            "" if side in BASELINES else f"{100 * row['audit_share']:.2f}",
            f"{row['last_reward']:.3f}",
        ]
        print("| " + " | ".join(cells) + " |")
    sys.stdout.flush()


def megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
