"""Drill jobs under `on_desync="repair"`: what was found, and the state at the end, bit for bit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

FAULT_STEP, STEPS = 3, 6
Plant = Callable[[Any, int], AbstractContextManager[Any]]


def run_all(cases: list[tuple[str, int]]) -> dict[tuple[str, int], dict[str, Any]]:
    """What came of each fault on each rank it was planted on, on this rank."""
    return {(name, rank): run(name, rank) for name, rank in cases}


def run(name: str, rank: int) -> dict[str, Any]:
    """What came of the fault `name` on `rank`: findings, error, number of desyncs, final state."""
    from trl_sync import DesyncError, SyncAuditor
    from trl_sync.audit.auditor import repair
    from trl_sync.audit.drill import DrillJob

    job = DrillJob()
    found: list[Any] = []

    def recording(comparison: Any, inventory: Any, report: Any, snapshotter: Any) -> None:
        found.extend((f.cause.value, f.ranks, f.step, f.tensor) for f in report.findings)
        repair(comparison, inventory, report, snapshotter)

    auditor = SyncAuditor(
        job.accelerator,
        job.model,
        job.optimizer,
        modules=job.modules,
        on_desync="repair",
        frozen_cover_steps=1,
        timeout_s=30,
    )
    row: dict[str, Any] = {"error": None}
    with mock.patch("trl_sync.audit.auditor.repair", recording):
        try:
            with PLANTS[name](job, rank), auditor.attach():
                job.train(STEPS)
            row["desyncs"] = auditor.summary().desyncs
        except DesyncError as error:
            row["error"] = str(error)
        finally:
            auditor.detach()
    return row | {"found": found, "updates": job.num_updates, "state": state_of(job)}


def state_of(job: Any) -> dict[str, str]:
    """A checksum of each part of the job's state, computed without the audit's code."""
    from trl_sync.quantization_state import quantization_tensors

    named = list(job.unwrapped_model.named_parameters())
    optimizer = job.optimizer.state_dict()
    moments = [
        (f"{index}.{key}", value)
        for index, state in sorted(optimizer["state"].items())
        for key, value in sorted(state.items())
    ]
    frozen = [(name, p) for name, p in named if not p.requires_grad]
    frozen += [item for module in job.modules.values() for item in module.named_parameters()]
    frozen += list(quantization_tensors(job.unwrapped_model))
    return {
        "trainable": checksum([(name, p) for name, p in named if p.requires_grad]),
        "frozen": checksum(frozen),
        "optimizer": checksum(moments) + repr(optimizer["param_groups"]),
    }


def checksum(named: Any) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in named:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(flat.numpy().tobytes())
    return sha.hexdigest()


# Faults.


def of_matrix(name: str, step: int = FAULT_STEP, **options: Any) -> Plant:
    def plant(job: Any, rank: int) -> AbstractContextManager[Any]:
        from trl_sync.audit.drill import plant_on

        return plant_on(job, name, step=step, rank=rank, late=True, **options)

    return plant


def healthy(job: Any, rank: int) -> AbstractContextManager[Any]:
    return nullcontext()


def frozen_byte_changed(find: Callable[[Any], torch.Tensor]) -> Plant:
    """A byte of a frozen tensor changes in the optimizer's step, after the forward."""

    @contextmanager
    def plant(job: Any, rank: int) -> Iterator[None]:
        from trl_sync.audit.faults.planting import bytes_of, counting, planted

        with (
            planted(step=FAULT_STEP, rank=rank) as fault,
            counting(job.optimizer) as clock,
        ):

            def strike() -> None:
                if fault.is_due(clock.update):
                    bytes_of(find(job))[3] ^= 0x10
                    fault.struck = True

            clock.on_before = strike
            yield

    return plant


def first_packed(job: Any) -> Any:
    return next(p for p in job.unwrapped_model.parameters() if hasattr(p, "quant_state"))


@contextmanager
def head_changed_at_start(job: Any, rank: int) -> Iterator[None]:
    if rank_here() == rank:
        job.reward_head[0].weight.data[0, 0] += 1.0
    yield


@contextmanager
def three_learning_rates(job: Any, rank: int) -> Iterator[None]:
    """Rank 0 keeps its learning rate, 1 doubles and 2 trebles it."""
    with ExitStack() as stack:
        for other in (1, 2):
            plant = of_matrix("other_learning_rate", factor=1.0 + other)
            stack.enter_context(plant(job, other))
        yield


@contextmanager
def on_two_ranks(job: Any, rank: int) -> Iterator[None]:
    """The same update is lost on every rank but `rank`, which then is the minority."""
    with ExitStack() as stack:
        for other in {0, 1, 2} - {rank}:
            stack.enter_context(of_matrix("other_learning_rate")(job, other))
        yield


@contextmanager
def repair_without_optimizer(job: Any, rank: int) -> Iterator[None]:
    """The repair itself is broken: it leaves the optimizer's state as it is."""
    plant = of_matrix("optimizer_moment_changed")
    with mock.patch("trl_sync.audit.repair._copy_optimizer"), plant(job, rank):
        yield


def on_all_ranks(name: str) -> Plant:
    def plant(job: Any, rank: int) -> AbstractContextManager[Any]:
        from trl_sync.audit.drill import plant_on

        return plant_on(job, name, step=FAULT_STEP)

    return plant


def rank_here() -> int:
    return int(os.environ["RANK"])


PLANTS: dict[str, Plant] = {
    "healthy": healthy,
    "step_skipped": of_matrix("step_skipped"),
    "first_step_skipped": of_matrix("step_skipped", step=1),
    "other_learning_rate": of_matrix("other_learning_rate"),
    "optimizer_moment_changed": of_matrix("optimizer_moment_changed"),
    "gradients_clipped": of_matrix("gradients_clipped"),
    "reduction_returned_zeros": of_matrix("reduction_returned_zeros"),
    "base_byte_changed_in_step": frozen_byte_changed(first_packed),
    "absmax_changed_in_step": frozen_byte_changed(lambda job: first_packed(job).quant_state.absmax),
    "head_changed_at_start": head_changed_at_start,
    # The difference takes part in a forward.
    "bit_flipped": of_matrix("bit_flipped", bit=30),
    "rows_swapped": of_matrix("rows_swapped"),
    "base_byte_changed": of_matrix("base_byte_changed"),
    "absmax_changed": of_matrix("absmax_changed"),
    # Not for a majority to decide.
    "three_learning_rates": three_learning_rates,
    "tensor_added": of_matrix("tensor_added"),
    "extra_optimizer_step": of_matrix("extra_optimizer_step"),
    "adapter_merged": on_all_ranks("adapter_merged"),
    "forward_unwrapped": on_all_ranks("forward_unwrapped"),
    "repair_without_optimizer": repair_without_optimizer,
    # The majority is wrong, which no vote can know.
    "other_learning_rate_on_two": on_two_ranks,
}
