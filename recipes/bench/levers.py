"""What each lever of speed is worth: PPO iterations with it and without, in turns, in one process.

    python recipes/bench/levers.py [--job 15m:natural] [--rounds 3] [--profile] [--json FILE]

A lever is turned off by putting back what the code did before it. Times are medians over the
rounds after one to warm up; a ratio is the median of each round's own, so a slow minute of the
machine hits both. With --profile one more iteration of each kind runs under torch's profiler: the
operators that took the most time by themselves. Shared base in full precision, `ours_shared` of
ppo_vs_trl.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from jobs import random_job
from measure import PhaseClock, machine
from ppo_side import import_all, make_ours
from torch import nn

PHASES = ("rollout", "score", "update")
OPERATORS = 6


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    previous = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, previous)


def low_rank_step_by_step(trainer: Any) -> AbstractContextManager[None]:
    """LoRA updates cut, multiplied, scaled, added and joined, an autograd node each."""
    from trl_sync.backbone import routing

    return replaced(routing, "_is_plain", lambda layer, adapter: False)


def logits_recomputed(trainer: Any) -> AbstractContextManager[None]:
    """The backward pass through the head as autograd does it, its logits computed twice."""
    from trl_sync.backbone import shared

    statistics_of = shared.chunked_token_statistics

    def recomputed(*args: Any, **options: Any) -> Any:
        return statistics_of(*args, **options | {"head_trains": True})

    return replaced(shared, "chunked_token_statistics", recomputed)


def rows_as_they_come(trainer: Any) -> AbstractContextManager[None]:
    """Micro-batches and scoring passes of rows in the order of the draw."""
    from trl_sync.ppo.padding import Lengths

    def parts(lengths: Lengths, size: int, rows: Any = None) -> Any:
        return (torch.arange(len(lengths.prompts)) if rows is None else rows).split(size)

    return replaced(Lengths, "parts", parts)


def routes_at_every_token(trainer: Any) -> AbstractContextManager[None]:
    """What a layer does with the active routes found anew at each of its calls."""
    from trl_sync.backbone.routing import AdapterRouter

    class Forgetful(dict[Any, Any]):
        def __setitem__(self, layer: Any, plan: Any) -> None:
            pass

    routes = AdapterRouter.routes

    @contextlib.contextmanager
    def forgetting(router: Any, *adapters: str | None) -> Iterator[None]:
        with routes(router, *adapters):
            router._plans = Forgetful()
            yield

    return replaced(AdapterRouter, "routes", forgetting)


def modes_set_anew(trainer: Any) -> AbstractContextManager[None]:
    """The mode of every module set before every micro-batch."""
    from trl_sync.backbone import shared

    def set_all(model: nn.Module, modules: Any, mode: bool) -> None:
        modules = list(modules)
        nn.Module.train(model, False)
        for module in modules:
            module.training = mode

    return replaced(shared, "set_training", set_all)


@contextlib.contextmanager
def reference_always(trainer: Any) -> Iterator[None]:
    """The reference takes part in scoring with `kl_coef=0` too."""
    from trl_sync.ppo import experience

    score = experience.score

    def with_reference(*args: Any, **options: Any) -> Any:
        return score(*args, **options | {"with_reference": True})

    with replaced(experience, "score", with_reference):
        yield


LEVERS: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "LoRA updates in place": low_rank_step_by_step,
    "no logits kept below a frozen head": logits_recomputed,
    "rows sorted by length": rows_as_they_come,
    "routes worked out once a pass": routes_at_every_token,
    "modes set only where wrong": modes_set_anew,
    "no reference pass with kl_coef=0": reference_always,
}


def main() -> None:
    options = parse()
    import_all("ours")
    outcome: dict[str, Any] = {"command": " ".join(sys.argv), "job": options.job} | machine()
    with tempfile.TemporaryDirectory() as name:
        trainer, clock = make_trainer(options.job, Path(name))
        outcome["levers"] = {
            lever: compare(trainer, clock, lever, options) for lever in options.levers
        }
    show(outcome)
    if options.json is not None:
        options.json.write_text(json.dumps(outcome, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", default="15m:natural", metavar="SIZE:LENGTHS")
    parser.add_argument("--levers", nargs="+", choices=list(LEVERS), default=list(LEVERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="one profiled iteration of each")
    parser.add_argument("--json", type=Path, help="file for all figures")
    return parser.parse_args()


def make_trainer(job: str, folder: Path) -> tuple[Any, PhaseClock]:
    """A trainer of one iteration, without the audit."""
    size, _, lengths = job.partition(":")
    made = random_job(size, folder, lengths=lengths).to_dict()
    settings = made["settings"]
    rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    settings["total_episodes"] = rows
    clock = PhaseClock()
    side = Namespace(side="ours_shared", seed=0, output=folder / "out.json")
    trainer, audit = make_ours(side, made, clock, [])
    trainer.remove_callback(audit)
    return trainer, clock


def compare(trainer: Any, clock: PhaseClock, lever: str, options: Any) -> dict[str, Any]:
    """Seconds by phase with and without `lever`, and the ratios."""
    needs_no_kl = LEVERS[lever] is reference_always
    kl_coef = 0.0 if needs_no_kl else trainer.args.kl_coef
    with replaced(trainer.args, "kl_coef", kl_coef):
        rounds = []
        for number in range(options.rounds + 1):
            pair = {}
            for on in (True, False) if number % 2 else (False, True):
                with contextlib.nullcontext() if on else LEVERS[lever](trainer):
                    pair["with" if on else "without"] = iteration(trainer, clock)
            rounds.append(pair)
            print(f"{lever}: round {number} of {options.rounds}", file=sys.stderr, flush=True)
        found: dict[str, Any] = {"rounds": rounds[1:]}
        for phase in (*PHASES, "all"):
            pairs = [(pair["with"][phase], pair["without"][phase]) for pair in rounds[1:]]
            found[phase] = {
                "with_s": statistics.median(own for own, _ in pairs),
                "without_s": statistics.median(other for _, other in pairs),
                "ratio": statistics.median(own / other for own, other in pairs),
            }
        if options.profile:
            found["profile_ms"] = {"with": operators(trainer, clock)}
            with LEVERS[lever](trainer):
                found["profile_ms"]["without"] = operators(trainer, clock)
    return found


def iteration(trainer: Any, clock: PhaseClock) -> dict[str, float]:
    clock.seconds.clear()
    clock.enter("other")
    trainer.train()
    clock.enter(None)
    return clock.seconds | {"all": sum(clock.seconds.values())}


def operators(trainer: Any, clock: PhaseClock) -> dict[str, float]:
    """The operators that took the most time by themselves, in milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        iteration(trainer, clock)
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    return {row.key: round(row.self_cpu_time_total / 1e3, 1) for row in rows[:OPERATORS]}


def show(outcome: dict[str, Any]) -> None:
    print(f"\n### {outcome['job']}: seconds of one iteration with a lever / without it\n")
    titles = ["lever", *PHASES, "all", "all, ratio"]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for lever, found in outcome["levers"].items():
        pairs = [
            f"{found[p]['with_s']:.2f} / {found[p]['without_s']:.2f}" for p in (*PHASES, "all")
        ]
        print("| " + " | ".join([lever, *pairs, f"{found['all']['ratio']:.2f}"]) + " |")
    for lever, found in outcome["levers"].items():
        for kind, times in found.get("profile_ms", {}).items():
            listed = ", ".join(f"{name} {ms:.0f}" for name, ms in times.items())
            print(f"\n{lever}, {kind}: {listed} (ms)")
    print(f"\n{outcome['device']}, {outcome['machine']}, {outcome['threads']} threads, torch "
          f"{outcome['torch']}, {outcome['date']}")  # fmt: skip


if __name__ == "__main__":
    main()
