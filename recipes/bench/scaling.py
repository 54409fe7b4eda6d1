"""What an update of our PPO costs as vocabulary, sequence length and batch grow.

    python recipes/bench/scaling.py [--part vocabulary sequence batch] [--json FILE]
    python recipes/bench/scaling.py --part vocabulary --chunk-mib 64 16 4
    python recipes/bench/scaling.py --quick    # small models, under three minutes on two cores

- vocabulary: time and peak memory of one micro-batch's update at 4 k to 150 k tokens. Embedding and
  LM head do not count as memory. `update` is what the update's tensors add to the model, `in all`
  has the model's other weights too. `process` is what the update adds to the resident set, where
  there is no GPU: freed tensors of less than 32 MiB that the C library keeps, too.
- sequence: time per token of one micro-batch's update from 64 to 1,024 response tokens, with fewer
  rows the longer they are, and without attention. Attention is what torch's profiler finds in
  scaled_dot_product_attention and its backward pass. Prompts of eight tokens count as tokens.
- batch: time and peak memory of whole PPO iterations with `PPOTrainer`, at 8 to 64 episodes a
  rollout batch in micro-batches and rollout passes of one size.

An update is the pass of policy and value model on one shared base, the loss and the backward pass;
in the batch part the optimizer's step is in it too. No response ends before the limit. Every point
has a process of its own, because a peak of memory only grows. The points take turns, in an order
that changes from round to round, so that a slow minute of the machine hits all; times are medians
of the rounds after one to warm up. Exponents are those of cost = a x size^b, fitted to all points.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs import SHAPES, Shape, random_job
from measure import machine
from scaling_processes import measure
from scaling_tables import SHOW, SUMMARIES
from scaling_work import Point

VOCABULARIES = (4096, 16384, 65536, 150016)
RESPONSES = (64, 128, 256, 512, 1024)
EPISODES = (8, 16, 32, 64)
# Of the sequence part: short beside the shortest response.
PROMPT_TOKENS = 8
QUICK = replace(SHAPES["15m"], hidden=192, layers=3, heads=3, intermediate=576)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    shape = QUICK if options.quick else SHAPES[options.shape]
    shown = dataclasses.asdict(shape) | {"dtype": str(shape.dtype)}
    outcome: dict[str, Any] = {"command": " ".join(sys.argv)} | machine()
    outcome |= {"repeats": options.repeats, "shape": shown, "parts": {}}
    for part in options.part:
        with tempfile.TemporaryDirectory() as folder:
            points = POINTS[part](shape, options, folder)
            rows = measure(points, options.repeats)
        outcome["parts"][part] = SUMMARIES[part](rows)
        SHOW[part](outcome["parts"][part])
        if options.json is not None:
            options.json.write_text(json.dumps(outcome, indent=2) + "\n")
    print(f"\n{outcome['device']}, {outcome['machine']}, {outcome['threads']} threads, torch "
          f"{outcome['torch']}, {outcome['date']}")  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = list(POINTS)
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument("--quick", action="store_true", help="a model of 2 M parameters instead")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--chunk-mib", nargs="+", type=int, help="logprob_chunk_bytes, in MiB")
    parser.add_argument("--response-tokens", nargs="+", type=int, default=list(RESPONSES))
    parser.add_argument("--episodes", nargs="+", type=int, default=list(EPISODES))
    parser.add_argument("--repeats", type=int, default=3, help="rounds after one to warm up")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(arguments)
    longest = max(options.response_tokens)
    if any(longest % tokens for tokens in options.response_tokens):
        parser.error(f"--response-tokens: each must divide the largest, {longest}")
    micro_batch = (QUICK if options.quick else SHAPES[options.shape]).micro_batch
    if any(episodes % micro_batch for episodes in options.episodes):
        parser.error(f"--episodes: each must be a multiple of the micro-batch, {micro_batch}")
    return options


def vocabulary_points(shape: Shape, options: Any, folder: str) -> list[Point]:
    chunks = [None] if options.chunk_mib is None else [2**20 * mib for mib in options.chunk_mib]
    return [
        Point(part="vocabulary", size=v, shape=replace(shape, vocabulary=v), chunk_bytes=chunk)
        for chunk in chunks
        for v in options.vocabularies
    ]


def sequence_points(shape: Shape, options: Any, folder: str) -> list[Point]:
    longest = max(options.response_tokens)
    job = {"prompt_tokens": PROMPT_TOKENS}
    return [
        Point(
            part="sequence",
            size=tokens,
            shape=replace(shape, **job, response_tokens=tokens, micro_batch=longest // tokens),
        )
        for tokens in options.response_tokens
    ]


def batch_points(shape: Shape, options: Any, folder: str) -> list[Point]:
    most = replace(shape, micro_batches=max(options.episodes) // shape.micro_batch)
    job = random_job("", Path(folder), lengths="limit", shape=most).to_dict()
    # One epoch: the others cost the same again. Rollout and scoring pass as many rows as updates.
    fixed = {"num_ppo_epochs": 1, "local_rollout_forward_batch_size": shape.micro_batch}
    points = []
    for episodes in options.episodes:
        count = {
            "total_episodes": episodes,
            "gradient_accumulation_steps": episodes // shape.micro_batch,
        }
        own = job | {"settings": job["settings"] | fixed | count}
        points.append(Point(part="batch", size=episodes, shape=shape, job=own, folder=folder))
    return points


POINTS = {"vocabulary": vocabulary_points, "sequence": sequence_points, "batch": batch_points}


if __name__ == "__main__":
    main()
