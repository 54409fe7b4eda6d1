"""Correct training in all the ways that a careless audit would take for a fault."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FEATURES = 16


def run_twins(steps: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Real optimizer steps, audits and warnings of each twin on this rank."""
    return {name: TWINS[name](number) for name, number in steps.items()}


def data(step: int, size: int = 8) -> Tensor:
    """This rank's inputs, others on each rank."""
    generator = torch.Generator().manual_seed(1000 * step + torch.distributed.get_rank())
    return torch.randn(size, FEATURES, generator=generator)


class Lora(nn.Module):
    """A frozen layer with a low-rank update that starts at zero, and dropout before it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(FEATURES, 4, bias=False)
        self.lora_B = nn.Linear(4, FEATURES, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.lora_B(self.lora_A(self.dropout(inputs)))


def train(
    model: nn.Module,
    num_steps: int,
    *,
    accumulation: int = 1,
    batch_size: Callable[[int], int] = lambda step: 8,
    learning_rate: Callable[[int], float] = lambda step: 1e-2,
    between_steps: Callable[[int, Any], None] = lambda step, auditor: None,
    modules: dict[str, nn.Module] | None = None,
    declared: str | None = None,
    find_unused_parameters: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Plain training with the audit attached; gradients are reduced in the last micro-batch."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    from trl_sync import SyncAuditor

    unused = DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[unused])
    torch.manual_seed(7)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    auditor = SyncAuditor(
        accelerator, wrapped, optimizer, modules=modules or {}, frozen_cover_steps=8, **options
    )
    real_steps = []
    with auditor.attach():
        if declared is not None:
            auditor.declare_sync(declared)
        handle = optimizer.optimizer.register_step_post_hook(lambda *_: real_steps.append(1))
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            for micro_batch in range(accumulation):
                last = micro_batch == accumulation - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                    size = batch_size(step) + accelerator.process_index * (batch_size(step) != 8)
                    loss = wrapped(data(step * accumulation + micro_batch, size)).pow(2).mean()
                    accelerator.backward(loss / accumulation)
            optimizer.step()
            optimizer.zero_grad()
            between_steps(step, auditor)
        handle.remove()
    summary = auditor.summary()
    return {
        "steps": len(real_steps),
        "audits": summary.audits,
        "desyncs": summary.desyncs,
        "warnings": sorted(f"{cause}" for cause, _ in auditor.reaction.warned),
    }


def plain(steps: int) -> dict[str, Any]:
    return train(nn.Linear(FEATURES, 4), steps)


def accumulation_with_no_sync(steps: int) -> dict[str, Any]:
    return train(nn.Linear(FEATURES, 4), steps, accumulation=3)


def uneven_batches(steps: int) -> dict[str, Any]:
    """Every fifth batch is short, and of another size on each rank."""
    return train(nn.Linear(FEATURES, 4), steps, batch_size=lambda s: 3 if s % 5 == 4 else 8)


def zero_lora_with_dropout(steps: int) -> dict[str, Any]:
    """lora_A has no gradient in the first step; dropout differs on each rank."""
    torch.manual_seed(torch.distributed.get_rank())
    return train(Lora(dropout=0.3), steps)


def batch_norm(steps: int) -> dict[str, Any]:
    """Statistics differ on each rank at the end of a step."""
    return train(nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), steps)


def warm_up_from_zero(steps: int) -> dict[str, Any]:
    """A learning rate of 0 for a third of the run, and of nearly 0 at its end."""
    third = steps // 3
    return train(
        Lora(),
        steps,
        learning_rate=lambda s: 0.0 if s < third else 1e-2 if s < 2 * third else 1e-12,
    )


def unused_parameter(steps: int) -> dict[str, Any]:
    """A trainable parameter whose gradient is always zero."""
    model = nn.Linear(FEATURES, 4)
    model.weight.register_hook(lambda gradient: gradient * 0)
    return train(model, steps)


def reference_with_dropout_in_evaluation(steps: int) -> dict[str, Any]:
    """Run after every step; its mode is right, though it has dropout and batch norm."""
    reference = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    reference.eval().requires_grad_(False)

    def run(step: int, auditor: Any) -> None:
        with torch.no_grad():
            reference(data(step))

    return train(nn.Linear(FEATURES, 4), steps, between_steps=run, modules={"reference": reference})


def declared_reference_sync(steps: int) -> dict[str, Any]:
    """The reference follows the policy every tenth step, on all ranks alike: one warning."""
    policy = nn.Linear(FEATURES, 4)
    reference = nn.Linear(FEATURES, 4).requires_grad_(False).eval()

    def follow(step: int, auditor: Any) -> None:
        if step % 10 == 9:
            with torch.no_grad():
                for own, other in zip(reference.parameters(), policy.parameters(), strict=True):
                    own.lerp_(other, 0.6)

    return train(
        policy,
        steps,
        between_steps=follow,
        modules={"reference": reference},
        declared="sync_ref_model",
    )


def evaluation_and_random_numbers(steps: int) -> dict[str, Any]:
    """Evaluation mode and unequal random draws between steps, announced as a pause."""

    def evaluate(step: int, auditor: Any) -> None:
        if step % 20 == 0:
            with auditor.pause("evaluation"), torch.no_grad():
                torch.rand(1 + torch.distributed.get_rank())

    return train(nn.Linear(FEATURES, 4), steps, between_steps=evaluate)


class Conditional(nn.Module):
    """Its last parameters are used on rank 1 only, and there now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 4)
        self.extra = nn.Linear(FEATURES, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.body(inputs)
        if torch.distributed.get_rank() == 1 and float(inputs[0, 0]) > 0:
            outputs = outputs + self.extra(inputs)
        return outputs


def parameters_used_on_one_rank(steps: int) -> dict[str, Any]:
    return train(Conditional(), steps, find_unused_parameters=True)


class LongestMask(nn.Module):
    """Keeps a buffer as long as the longest batch this rank has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 4)
        self.register_buffer("mask", torch.ones(1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > len(self.mask):
            self.register_buffer("mask", torch.ones(len(inputs)), persistent=False)
        return self.body(inputs) * self.mask[: len(inputs), None]


def buffers_that_follow_the_data(steps: int) -> dict[str, Any]:
    """Of another length on each rank from time to time: a warning, no alarm."""
    model = LongestMask()
    # DDP itself broadcasts buffers of equal shape only.
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, ["mask"]
    )
    return train(model, steps, batch_size=lambda s: 3 + s % 11)


def every_third_step(steps: int) -> dict[str, Any]:
    return train(nn.Linear(FEATURES, 4), steps, every_steps=3)


def verdict_one_step_late(steps: int) -> dict[str, Any]:
    return train(Lora(), steps, blocking=False)


def sixteen_bits(steps: int) -> dict[str, Any]:
    """Updates of bfloat16 weights that underflow: a warning, no alarm."""
    model = nn.Linear(FEATURES, 4, bias=False)
    nn.init.constant_(model.weight, 256.0)
    return train(
        nn.Sequential(_Cast(torch.bfloat16), model.bfloat16(), _Cast(torch.float32)),
        steps,
        learning_rate=lambda s: 1e-3,
    )


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.dtype)


TWINS: dict[str, Callable[[int], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        plain,
        accumulation_with_no_sync,
        uneven_batches,
        zero_lora_with_dropout,
        batch_norm,
        warm_up_from_zero,
        unused_parameter,
        reference_with_dropout_in_evaluation,
        declared_reference_sync,
        evaluation_and_random_numbers,
        parameters_used_on_one_rank,
        buffers_that_follow_the_data,
        every_third_step,
        verdict_one_step_late,
        sixteen_bits,
    )
}


def skipped_fp16_step(steps: int) -> dict[str, Any]:
    """A gradient scaler that drops every seventh step on all ranks, as a trainer's loop sees it."""
    from accelerate import Accelerator

    from trl_sync import SyncAuditor

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(7)
    model = accelerator.prepare(nn.Linear(FEATURES, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    real_steps = []
    handle = optimizer.register_step_post_hook(lambda *_: real_steps.append(1))
    auditor = SyncAuditor(accelerator, model, optimizer)
    auditor.begin()
    for step in range(1, steps + 1):
        loss = model(data(step)).pow(2).mean()
        scaler.scale(loss * (float("inf") if step % 7 == 0 else 1.0)).backward()
        scaler.unscale_(optimizer)
        auditor.before_update(step)
        scaler.step(optimizer)
        auditor.after_update(step)
        scaler.update()
        optimizer.zero_grad()
    summary = auditor.finish()
    auditor.detach()
    handle.remove()
    return {
        "steps": len(real_steps),
        "audits": summary.audits,
        "desyncs": summary.desyncs,
        "warnings": sorted(f"{cause}" for cause, _ in auditor.reaction.warned),
    }


TWINS["skipped_fp16_step"] = skipped_fp16_step
