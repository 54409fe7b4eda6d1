"""The fault matrix: each fault by name, with what the audit must say about it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

from trl_sync.audit.faults import (
    between_steps,
    checkpoints,
    gradients,
    in_step,
    processes,
    structure,
)
from trl_sync.audit.faults.planting import Planted

Plant = Callable[..., AbstractContextManager[Planted]]
Row = tuple[str, str, str, str, Plant]
On = Literal["one rank", "all ranks", "checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One line of the matrix: `plant` makes the block; `cause` and `seen_by` are what to expect."""

    name: str
    cause: str
    on: On
    seen_by: str
    description: str
    plant: Plant


def _matrix() -> dict[str, Fault]:
    faults = [*_all_ranks(), *_one_rank(), *_structure(), *_processes(), *_checkpoints()]
    return {fault.name: fault for fault in faults}


def _one_rank() -> list[Fault]:
    rows: list[Row] = [
        ("bit_flipped", "edited_outside_step", "trainable, before the update",
         "one bit of a weight, between steps", between_steps.bit_flipped),
        ("rows_swapped", "edited_outside_step", "trainable, before the update",
         "two rows of a weight swapped, between steps", between_steps.rows_swapped),
        ("base_byte_changed", "frozen_changed", "frozen",
         "one byte of the frozen (NF4) base", between_steps.base_byte_changed),
        ("absmax_changed", "quantization_changed", "quantization",
         "one absmax value of a 4-bit weight", between_steps.absmax_changed),
        ("optimizer_moment_changed", "optimizer_diverged", "optimizer or trainable, after",
         "one optimizer moment", between_steps.optimizer_moment_changed),
        ("step_skipped", "stale_replica", "trainable, after the update",
         "an update that is lost", in_step.step_skipped),
        ("other_learning_rate", "optimizer_diverged", "trainable, after the update",
         "another learning rate", in_step.other_learning_rate),
        ("extra_optimizer_step", "step_skew", "header",
         "one optimizer step more", in_step.extra_optimizer_step),
        ("gradients_clipped", "gradient_scaled_differently", "gradients",
         "gradient clipping", gradients.gradients_clipped),
        ("reduction_returned_zeros", "gradient_not_reduced", "gradients",
         "a reduction that returns zeros for one tensor", gradients.reduction_returned_zeros),
    ]  # fmt: skip
    return _faults("one rank", rows)


def _all_ranks() -> list[Fault]:
    rows: list[Row] = [
        ("forward_unwrapped", "gradient_not_reduced", "gradients",
         "forward through the unwrapped module", gradients.forward_unwrapped),
        ("no_sync_on_last_micro_batch", "gradient_not_reduced", "gradients",
         "no_sync around the last micro-batch", gradients.no_sync_on_last_micro_batch),
        ("adapter_merged", "frozen_changed", "frozen, baseline",
         "adapters merged into the base and taken out again", between_steps.adapter_merged),
    ]  # fmt: skip
    return _faults("all ranks", rows)


def _structure() -> list[Fault]:
    on_all: list[Row] = [
        ("unfrozen_after_wrapping", "gradient_not_reduced", "gradients",
         "a parameter unfrozen after wrapping", structure.unfrozen_after_wrapping),
        ("replaced_after_wrapping", "gradient_not_reduced", "gradients",
         "a parameter replaced after wrapping", structure.replaced_after_wrapping),
        ("adapter_added_after_wrapping", "init_mismatch", "trainable, before the first update",
         "an adapter added after wrapping, with a seed per rank",
         structure.adapter_added_after_wrapping),
        ("head_seeded_per_rank", "init_mismatch", "trainable or frozen, at train begin",
         "a head that nothing broadcasts, with a seed per rank", structure.head_seeded_per_rank),
        ("optimizer_holds_copies", "never_updated", "liveness",
         "an optimizer that holds copies of the parameters", structure.optimizer_holds_copies),
        ("parameter_not_in_optimizer", "not_in_optimizer", "roles",
         "a trainable parameter that is not in the optimizer",
         structure.parameter_not_in_optimizer),
        ("dropout_in_reference", "role_violation", "roles",
         "dropout active in the frozen reference", structure.dropout_in_reference),
    ]  # fmt: skip
    on_one: list[Row] = [
        ("checkpoint_restored_on_one_rank", "init_mismatch",
         "trainable and optimizer, at train begin", "a checkpoint restored on one rank only",
         structure.checkpoint_restored_on_one_rank),
        ("tensor_added", "structure_mismatch", "header",
         "one more trainable tensor", structure.tensor_added),
    ]  # fmt: skip
    return _faults("all ranks", on_all) + _faults("one rank", on_one)


def _processes() -> list[Fault]:
    rows: list[Row] = []
    for place in ("before_backward", "in_step", "before_audit"):
        where = place.replace("_", " ")
        killed = partial(processes.rank_killed, place=place)
        delayed = partial(processes.rank_delayed, place=place)
        rows += [
            (f"killed_{place}", "rank_missing", "progress", f"a rank killed {where}", killed),
            (f"delayed_{place}", "rank_missing", "progress", f"a rank delayed {where}", delayed),
        ]
    alone = ("launched_alone", "not_distributed", "at train begin",
             "several processes that each believe to be alone",
             processes.launched_alone)  # fmt: skip
    return _faults("one rank", rows) + _faults("all ranks", [alone])


def _checkpoints() -> list[Fault]:
    rows: list[Row] = [
        ("byte_flipped", "manifest_mismatch", "manifest",
         "a flipped byte in a checkpoint", checkpoints.byte_flipped),
        ("shard_missing", "manifest_mismatch", "manifest",
         "a missing file of a checkpoint", checkpoints.shard_missing),
        ("other_base", "manifest_mismatch", "manifest",
         "a checkpoint on another base", checkpoints.other_base),
    ]  # fmt: skip
    return _faults("checkpoint", rows)


def _faults(on: On, rows: list[Row]) -> list[Fault]:
    return [
        Fault(name=name, cause=cause, on=on, seen_by=seen_by, description=text, plant=plant)
        for name, cause, seen_by, text, plant in rows
    ]


FAULTS: dict[str, Fault] = _matrix()
