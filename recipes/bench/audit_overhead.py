"""What the audit costs: the embedded PPO job with it and without, in turns, in one process.

    python recipes/bench/audit_overhead.py --pairs 5 --json overhead.json
    accelerate launch --config_file recipes/accelerate_configs/cpu_2.yaml \\
        recipes/bench/audit_overhead.py

Two figures. `share`: seconds inside the audit over seconds of training, summed over the audited
runs. `slowdown`: training time with the audit over training time without, minus one, from the
alternating pairs, with the 95% interval of their mean (t distribution); on a noisy machine it is
far wider than the share. Further flags are those of recipes/ppo.py.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo

# Two-sided 95% quantiles of Student's t by degrees of freedom.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 9: 2.262}
EPISODES = "1280"


def main() -> None:
    options, rest = parse()
    results: list[dict[str, Any]] = []
    run(rest, audited=True)  # warms up caches and the allocator; not counted
    for pair in range(options.pairs):
        # The order changes from pair to pair, so that a drift of the machine cancels.
        for audited in (True, False) if pair % 2 else (False, True):
            results.append({"pair": pair, "audited": audited, **run(rest, audited)})
    if results[0]["rank"] == 0:
        outcome = summarize(results) | {"command": " ".join(sys.argv)} | machine()
        show(outcome)
        if options.json is not None:
            options.json.write_text(json.dumps(outcome | {"runs": results}, indent=2) + "\n")


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs, at least 2")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options, rest = parser.parse_known_args()
    if options.pairs < 2:
        parser.error("--pairs must be at least 2: an interval needs two")
    if not any(flag.startswith("--total_episodes") for flag in rest):
        rest += ["--total_episodes", EPISODES]
    return options, rest


def run(flags: list[str], audited: bool) -> dict[str, Any]:
    """Seconds of one training, and those that the audit took of it."""
    with tempfile.TemporaryDirectory() as folder:
        argv, sys.argv = (
            sys.argv,
            [
                sys.argv[0],
                *flags,
                *("--output_dir", folder, "--disable_tqdm", "true"),
                "--audit" if audited else "--no_audit",
            ],
        )
        try:
            trainer, audit = ppo.make_trainer(*ppo.parse_arguments())
        finally:
            sys.argv = argv
        started_s = time.perf_counter()
        trainer.train()
        wall_s = time.perf_counter() - started_s
    figures = {
        "wall_s": wall_s,
        "updates": trainer.state.global_step,
        "rank": trainer.args.process_index,
    }
    if audit is not None:
        done = audit.summary()
        figures |= {"audit_s": done.seconds, "audits": done.audits, "hashed_bytes": done.size_bytes}
    return figures


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    with_audit = [r for r in results if r["audited"]]
    without = [r for r in results if not r["audited"]]
    audit_s = sum(r["audit_s"] for r in with_audit)
    updates = sum(r["updates"] for r in with_audit)
    pairs = {r["pair"]: r["wall_s"] for r in without}
    ratios = [r["wall_s"] / pairs[r["pair"]] - 1 for r in with_audit]
    half = half_width(ratios)
    return {
        "share": audit_s / sum(r["wall_s"] for r in with_audit),
        "audit_ms_per_update": 1e3 * audit_s / updates,
        "update_ms": 1e3 * sum(r["wall_s"] for r in without) / sum(r["updates"] for r in without),
        "slowdown": statistics.mean(ratios),
        "slowdown_interval": [statistics.mean(ratios) - half, statistics.mean(ratios) + half],
        "pairs": len(ratios),
        "hashed_mb_per_update": sum(r["hashed_bytes"] for r in with_audit) / updates / 1e6,
    }


def half_width(values: list[float]) -> float:
    """Half the 95% interval of the mean."""
    degrees = len(values) - 1
    quantile = T_QUANTILES.get(degrees, T_QUANTILES[max(d for d in T_QUANTILES if d <= degrees)])
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def machine() -> dict[str, Any]:
    import os

    import torch

    return {
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def show(outcome: dict[str, Any]) -> None:
    low, high = outcome["slowdown_interval"]
    print(
        f"share of training time inside the audit: {outcome['share']:.3%} "
        f"({outcome['audit_ms_per_update']:.2f} ms of {outcome['update_ms']:.0f} ms an update, "
        f"{outcome['hashed_mb_per_update']:.1f} MB hashed)\n"
        f"training time with against without: {outcome['slowdown']:+.2%}, 95% interval "
        f"{low:+.2%} to {high:+.2%}, {outcome['pairs']} alternating pairs\n"
        f"{outcome['world_size']} process(es), {outcome['device']}, {outcome['machine']}, "
        f"torch {outcome['torch']}, {outcome['date']}"
    )


if __name__ == "__main__":
    main()
