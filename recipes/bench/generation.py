"""Rollouts with a dynamic key-value cache and with a static one: seconds, tokens/s, peak memory.

    python recipes/bench/generation.py [--shape 15m] [--rows 32] [--rounds 3] [--json FILE]

The policy of a shared backbone with LoRA on every linear layer, in full precision and in NF4; no
response ends before the limit. The static cache is what `generation_kwargs={"cache_implementation":
"static"}` asks for; on a GPU transformers compiles the decoding step then. Kinds of cache take
turns, after one round to warm up; a ratio is the median of each round's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from jobs import SHAPES, random_job
from measure import PeakMemory, machine, now_s
from ppo_side import LORA, frozen_options, import_all

BASES = ("plain", "nf4")
CACHES = ("dynamic", "static")


def main() -> None:
    options = parse()
    import_all("ours")
    outcome: dict[str, Any] = {"command": " ".join(sys.argv)} | machine() | {"bases": {}}
    with tempfile.TemporaryDirectory() as name:
        made = random_job(options.shape, Path(name), lengths="limit").to_dict()
        for base in options.bases:
            outcome["bases"][base] = measure(made, base, options)
    show(outcome)
    if options.json is not None:
        options.json.write_text(json.dumps(outcome, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--rows", type=int, default=32, help="sequences that are generated at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for all figures")
    return parser.parse_args()


def measure(job: dict[str, Any], base: str, options: Any) -> dict[str, Any]:
    """Seconds and peak memory of each cache, and the ratio static / dynamic."""
    backbone = load(job, base)
    shape = SHAPES[options.shape]
    device = next(backbone.parameters()).device
    torch.manual_seed(0)
    ids = torch.randint(2, shape.vocabulary, (options.rows, shape.prompt_tokens), device=device)
    rounds = []
    for number in range(options.rounds + 1):
        order = CACHES if number % 2 else CACHES[::-1]
        rounds.append({cache: once(backbone, ids, shape.response_tokens, cache) for cache in order})
    counted = rounds[1:]
    tokens = options.rows * shape.response_tokens
    found: dict[str, Any] = {}
    for cache in CACHES:
        seconds = statistics.median(row[cache]["seconds"] for row in counted)
        peaks = [row[cache]["peak_bytes"] for row in counted]
        found[cache] = {
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "peak_bytes": None if None in peaks else max(peaks),
        }
    ratios = [row["static"]["seconds"] / row["dynamic"]["seconds"] for row in counted]
    return found | {"static_over_dynamic": statistics.median(ratios), "rounds": counted}


def load(job: dict[str, Any], base: str) -> Any:
    from peft import LoraConfig

    from trl_sync import load_shared_backbone

    backbone = load_shared_backbone(
        job["model"], LoraConfig(**LORA), **frozen_options(job, quantized=base == "nf4")
    )
    return backbone.to("cuda") if torch.cuda.is_available() else backbone


def once(backbone: Any, ids: torch.Tensor, limit: int, cache: str) -> dict[str, Any]:
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=True,
        pad_token_id=0,
        cache_implementation="static" if cache == "static" else None,
    )
    memory = PeakMemory()
    started_s = now_s()
    generated = backbone.generate(ids, torch.ones_like(ids, dtype=torch.bool), config)
    seconds = now_s() - started_s
    assert generated.shape[1] == ids.shape[1] + limit
    return {"seconds": seconds, "peak_bytes": memory.peak_bytes()}


def show(outcome: dict[str, Any]) -> None:
    titles = ("base", "cache", "s", "tokens/s", "peak MB", "static / dynamic")
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for base, found in outcome["bases"].items():
        for cache in CACHES:
            row = found[cache]
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
            ratio = f"{found['static_over_dynamic']:.2f}" if cache == "static" else ""
            cells = (
                base,
                cache,
                f"{row['seconds']:.2f}",
                f"{row['tokens_per_s']:.0f}",
                peak,
                ratio,
            )
            print("| " + " | ".join(cells) + " |")
    print(f"\n{outcome['device']}, {outcome['machine']}, {outcome['threads']} threads, torch "
          f"{outcome['torch']}, {outcome['date']}")  # fmt: skip


if __name__ == "__main__":
    main()
