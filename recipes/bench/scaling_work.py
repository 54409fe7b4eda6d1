"""What scaling.py measures: an update of one micro-batch, or an iteration of `PPOTrainer`."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jobs import Shape, llama_config
from measure import PeakMemory, PhaseClock, now_s
from ppo_side import make_ours

# Names of operators, also of the backward pass, contain this.
ATTENTION = "scaled_dot_product"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One size of one part, and what is measured at it."""

    part: str
    size: int
    shape: Shape
    chunk_bytes: int | None = None
    job: dict[str, Any] = field(default_factory=dict)
    folder: str = ""


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
        self._clock = PhaseClock()
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


def inside_attention(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (ATTENTION in parent.name or inside_attention(parent))


WORK = {"vocabulary": Update, "sequence": Update, "batch": Iteration}
