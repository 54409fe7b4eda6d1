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
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from jobs import SHAPES, Shape, llama_config, random_job
from measure import PeakMemory, PhaseClock, fitted_exponent, machine
from ppo_side import import_all, make_ours

VOCABULARIES = (4096, 16384, 65536, 150016)
RESPONSES = (64, 128, 256, 512, 1024)
EPISODES = (8, 16, 32, 64)
# Of the sequence part: short beside the shortest response.
PROMPT_TOKENS = 8
# Names of operators, also of the backward pass, contain this.
ATTENTION = "scaled_dot_product"
QUICK = replace(SHAPES["15m"], hidden=192, layers=3, heads=3, intermediate=576)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One size of one part, and what is measured at it."""

    part: str
    size: int
    shape: Shape
    chunk_bytes: int | None = None
    job: dict[str, Any] = field(default_factory=dict)
    folder: str = ""


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


class Update:
    """One micro-batch's update, as often as it is asked for."""

    def __init__(self, point: Point) -> None:
        from transformers import LlamaForCausalLM

        from trl_sync import PPOConfig, SharedBackbone

        shape, self._point = point.shape, point
        self._config = PPOConfig(output_dir=os.devnull, use_cpu=not torch.cuda.is_available())
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        with self._device:
            model = LlamaForCausalLM(llama_config(shape)).to(shape.dtype)
        ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        chunk = {} if point.chunk_bytes is None else {"logprob_chunk_bytes": point.chunk_bytes}
        self._backbone = SharedBackbone(model, **chunk).train()
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        self._ends_bytes = sum(weight.nbytes for weight in ends)
        self._others_bytes = held - self._ends_bytes
        self._micro_batch = self._batch(shape.micro_batch, shape.prompt_tokens)
        # What is loaded at the first pass of all is not what an update takes.
        self._run(self._batch(1, 2, response_tokens=2))
        self._memory = PeakMemory()

    def turn(self) -> dict[str, float]:
        """Seconds of an update, and in the sequence part of attention in another one."""
        figures = {"update_s": self._run(self._micro_batch)}
        if self._point.part == "sequence":
            figures["attention_s"] = self._attention_s()
        return figures

    def figures(self) -> dict[str, Any]:
        """What holds of the point, not of a turn."""
        from trl_sync.backbone.logprob import default_chunk_bytes

        shape = self._point.shape
        process_bytes = self._memory.peak_bytes()  # before the profiler takes its share
        on_gpu = self._device.type == "cuda"
        return {
            "rows": shape.micro_batch,
            "tokens": shape.micro_batch * (shape.prompt_tokens + shape.response_tokens),
            "chunk_bytes": self._backbone.logprob_chunk_bytes or default_chunk_bytes(self._device),
            "embedding_and_head_bytes": self._ends_bytes,
            "other_weights_bytes": self._others_bytes,
            "update_bytes": process_bytes if on_gpu else self._tensor_bytes(),
            "process_bytes": process_bytes,
        }

    def _run(self, micro_batch: dict[str, torch.Tensor]) -> float:
        from trl_sync.ppo.loss import ppo_loss

        autocast = torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._point.shape.dtype == torch.bfloat16
        )
        started_s = now_s()
        with autocast:
            said = self._backbone(
                micro_batch["input_ids"],
                micro_batch["attention_mask"],
                micro_batch["response_mask"],
                roles=("policy", "value"),
            )
        logprobs, values = said["policy"]["logprobs"], said["value"]["values"]
        loss, _ = ppo_loss(logprobs, values, micro_batch, self._config)
        loss.backward()
        passed_s = now_s() - started_s
        self._backbone.zero_grad()
        return passed_s

    def _tensor_bytes(self) -> int:
        """The most bytes of tensors that an update holds at once, in the host's memory."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self._run(self._micro_batch)
        # Not found.events(): those lack what is allocated inside an operator.
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return max(accumulate(event.nbytes() for event in events))

    def _attention_s(self) -> float:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            self._run(self._micro_batch)
        kind = torch.autograd.DeviceType.CPU  # also on a GPU: these know what they started there
        events = [e for e in found.events() if e.device_type == kind and ATTENTION in e.name]
        # An operator may be made of others of that name.
        outermost = [e for e in events if not inside_attention(e)]
        if not any("backward" in event.name for event in outermost):
            sys.exit("error: the attention that ran has a backward pass of other operators")
        time_us = "device_time_total" if self._device.type == "cuda" else "cpu_time_total"
        return sum(getattr(event, time_us) for event in outermost) / 1e6

    def _batch(
        self, rows: int, prompt_tokens: int, response_tokens: int | None = None
    ) -> dict[str, torch.Tensor]:
        """A hand-made micro-batch without padding, of a policy that knows nothing."""
        shape = self._point.shape
        if response_tokens is None:
            response_tokens = shape.response_tokens
        whole, responses = (rows, prompt_tokens + response_tokens), (rows, response_tokens)
        with self._device:
            return {
                "input_ids": torch.randint(2, shape.vocabulary, whole),
                "attention_mask": torch.ones(whole, dtype=torch.bool),
                "response_mask": torch.ones(responses, dtype=torch.bool),
                "old_logprobs": -torch.full(responses, float(shape.vocabulary)).log(),
                "old_values": torch.zeros(responses),
                "advantages": torch.randn(responses),
                "returns": torch.randn(responses),
                "loss_denominator": torch.tensor(rows * response_tokens),
            }


class Iteration:
    """One iteration of `PPOTrainer`, as often as it is asked for."""

    def __init__(self, point: Point) -> None:
        self._shape, self._episodes = point.shape, point.size
        self._memory = PeakMemory()
        self._clock = SynchronisedClock()
        output = Path(point.folder) / f"{point.size}.json"
        options = Namespace(side="ours_shared", seed=0, output=output)
        self._trainer, audit = make_ours(options, point.job, self._clock, [])
        self._trainer.remove_callback(audit)

    def turn(self) -> dict[str, float]:
        self._clock.seconds.clear()
        self._clock.enter("other")
        self._trainer.train()
        self._clock.enter(None)
        seconds = self._clock.seconds
        return {"update_s": seconds["update"], "iteration_s": sum(seconds.values())}

    def figures(self) -> dict[str, Any]:
        shape = self._shape
        tokens = self._episodes * (shape.prompt_tokens + shape.response_tokens)
        return {"tokens": tokens, "peak_bytes": self._memory.peak_bytes()}


class SynchronisedClock(PhaseClock):
    def enter(self, phase: str | None) -> None:
        now_s()
        super().enter(phase)


def now_s() -> float:
    """The clock, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def inside_attention(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (ATTENTION in parent.name or inside_attention(parent))


def measure(points: list[Point], repeats: int) -> list[dict[str, Any]]:
    """What each point gives, in the order of `points`: medians over the rounds, and the rounds."""
    with ExitStack() as stack:
        processes = [stack.enter_context(PointProcess(point)) for point in points]
        for process in processes:
            process.wait()
        turns: list[list[dict[str, float]]] = [[] for _ in points]
        for number in range(repeats + 1):
            shift = number % len(points)
            order = [*range(shift, len(points)), *range(shift)]
            for index in order:
                turns[index].append(processes[index].ask("turn"))
            print(f"{points[0].part}: round {number} of {repeats}", file=sys.stderr, flush=True)
        rows = []
        for point, process, taken in zip(points, processes, turns, strict=True):
            rounds = taken[1:]
            medians = {name: statistics.median(turn[name] for turn in rounds) for name in rounds[0]}
            rows.append({"size": point.size} | process.ask("figures") | medians | {"turns": rounds})
    return rows


class PointProcess:
    """A process that measures one point, a turn whenever it is asked."""

    def __init__(self, point: Point) -> None:
        context = multiprocessing.get_context("spawn")
        self._point = point
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, point), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed here

    def __enter__(self) -> PointProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()  # which ends the process
        self._process.join(timeout=10)
        self._process.kill()

    def ask(self, method: str) -> dict[str, Any]:
        self._pipe.send(method)
        return self.wait()

    def wait(self) -> dict[str, Any]:
        name = f"{self._point.part} at {self._point.size}"
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            sys.exit(f"error: {name}: the process ended, exit code {self._process.exitcode}")
        if isinstance(answer, str):
            sys.exit(f"error: {name}:\n{answer[-3000:]}")
        return answer


def serve(pipe: Any, point: Point) -> None:
    """Answers what `PointProcess` asks, with an error's text if there is one."""
    # Progress bars, log lines and warnings of every process would hide the tables.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        import_all("ours")
        measured = MEASURED[point.part](point)
        pipe.send({})
        while True:
            pipe.send(getattr(measured, pipe.recv())())
    except EOFError:
        return
    except BaseException:
        pipe.send(traceback.format_exc())


def summarize_vocabulary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios to the smallest vocabulary, and exponents, of each size of chunks."""
    by_chunk: dict[int, Any] = {}
    for row in rows:
        row["bytes"] = row["update_bytes"] + row["other_weights_bytes"]
        by_chunk.setdefault(row["chunk_bytes"], []).append(row)
    for own in by_chunk.values():
        least = min(own, key=lambda row: row["size"])
        for row in own:
            for name in ("update_bytes", "bytes", "process_bytes"):
                known = row[name] is not None
                row[f"{name}_ratio"] = row[name] / least[name] if known else None
    names = ("update_s", "update_bytes", "bytes", "process_bytes")
    return {
        "points": rows,
        "exponents": {chunk: exponents(own, names) for chunk, own in by_chunk.items()},
    }


def summarize_sequence(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Microseconds per token: in all, of attention, and without it."""
    for row in rows:
        row["us_per_token"] = 1e6 * row["update_s"] / row["tokens"]
        row["attention_us_per_token"] = 1e6 * row["attention_s"] / row["tokens"]
        # Of the same turn, so that a slow moment hits both.
        others = [turn["update_s"] - turn["attention_s"] for turn in row["turns"]]
        row["other_us_per_token"] = 1e6 * statistics.median(others) / row["tokens"]
    names = ("us_per_token", "attention_us_per_token", "other_us_per_token")
    return {
        "points": rows,
        "exponents": exponents(rows, names),
        "max_over_min": {name: max_over_min(rows, name) for name in names},
    }


def summarize_batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    for row in rows:
        row["us_per_token"] = 1e6 * row["update_s"] / row["tokens"]
    names = ("update_s", "iteration_s", "us_per_token", "peak_bytes")
    return {
        "points": rows,
        "exponents": exponents(rows, names),
        "max_over_min": {name: max_over_min(rows, name) for name in names[2:]},
    }


def exponents(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
    if len({row["size"] for row in rows}) < 2:
        return {}
    sizes = [row["size"] for row in rows]
    return {
        name: fitted_exponent(sizes, [row[name] for row in rows])
        for name in names
        if all(row.get(name) is not None for row in rows)
    }


def max_over_min(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows]
    return None if None in values else max(values) / min(values)


def show_vocabulary(result: dict[str, Any]) -> None:
    first = result["points"][0]
    print(f"\n### Vocabulary: {first['rows']} rows, {first['tokens']} tokens\n")
    titles = ["vocabulary", "chunk MiB", "update s", "update MB", "x smallest"]
    titles += ["in all MB", "x smallest", "process MB", "x smallest", "not counted MB"]
    table(
        titles,
        [
            [
                f"{row['size']}",
                f"{row['chunk_bytes'] / 2**20:g}",
                f"{row['update_s']:.3f}",
                megabytes(row["update_bytes"]),
                number(row["update_bytes_ratio"]),
                megabytes(row["bytes"]),
                number(row["bytes_ratio"]),
                megabytes(row["process_bytes"]),
                number(row["process_bytes_ratio"]),
                megabytes(row["embedding_and_head_bytes"]),
            ]
            for row in result["points"]
        ],
    )
    for chunk, fitted in result["exponents"].items():
        print(f"\nExponents with chunks of {chunk / 2**20:g} MiB: {listed(fitted)}")
    sys.stdout.flush()


def show_sequence(result: dict[str, Any]) -> None:
    print("\n### Sequence: equal response tokens in every micro-batch\n")
    titles = ("response tokens", "rows", "tokens", "us/token", "attention us/token")
    names = ("us_per_token", "attention_us_per_token", "other_us_per_token")
    table(
        (*titles, "without attention us/token"),
        [
            [f"{row[name]}" for name in ("size", "rows", "tokens")]
            + [f"{row[name]:.1f}" for name in names]
            for row in result["points"]
        ],
    )
    print(f"\nLargest / smallest: {listed(result['max_over_min'])}")
    print(f"Exponents: {listed(result['exponents'])}", flush=True)


def show_batch(result: dict[str, Any]) -> None:
    print("\n### Batch: episodes in a rollout batch\n")
    table(
        ("episodes", "tokens", "update s", "update us/token", "iteration s", "peak MB"),
        [
            [
                f"{row['size']}",
                f"{row['tokens']}",
                f"{row['update_s']:.2f}",
                f"{row['us_per_token']:.1f}",
                f"{row['iteration_s']:.2f}",
                megabytes(row["peak_bytes"]),
            ]
            for row in result["points"]
        ],
    )
    print(f"\nLargest / smallest: {listed(result['max_over_min'])}")
    print(f"Exponents: {listed(result['exponents'])}", flush=True)


def table(titles: Sequence[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def listed(values: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items() if value is not None)


POINTS = {"vocabulary": vocabulary_points, "sequence": sequence_points, "batch": batch_points}
MEASURED = {"vocabulary": Update, "sequence": Update, "batch": Iteration}
SUMMARIES = {
    "vocabulary": summarize_vocabulary,
    "sequence": summarize_sequence,
    "batch": summarize_batch,
}
SHOW = {"vocabulary": show_vocabulary, "sequence": show_sequence, "batch": show_batch}


if __name__ == "__main__":
    main()
