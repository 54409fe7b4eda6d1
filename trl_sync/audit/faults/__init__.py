"""The fault matrix as context managers, for drills on a training script and for tests.

Each plants one fault on one rank, or on all where that is its nature, and yields a `Planted` that
tells whether it has struck and where. When the block ends every hook and patch is gone; the damage
stays, save where a function says otherwise. `step` is the 1-based number of an optimizer update
counted from the start of the block. `FAULTS` has all of them by name with the expected cause.

They strike what the engine really holds: a shard of FSDP2, a partition of ZeRO-3, a replica of the
others. `engines.py` tells what the audit names under each engine, and what cannot be planted there.
"""

from trl_sync.audit.faults.between_steps import (
    absmax_changed,
    adapter_merged,
    base_byte_changed,
    bit_flipped,
    optimizer_moment_changed,
    rows_swapped,
)
from trl_sync.audit.faults.checkpoints import byte_flipped, other_base, shard_missing
from trl_sync.audit.faults.gradients import (
    forward_unwrapped,
    gradients_clipped,
    no_sync_on_last_micro_batch,
    reduction_returned_zeros,
)
from trl_sync.audit.faults.in_step import (
    extra_optimizer_step,
    other_learning_rate,
    step_skipped,
)
from trl_sync.audit.faults.planting import FaultNotPlantedError, Planted
from trl_sync.audit.faults.processes import launched_alone, rank_delayed, rank_killed
from trl_sync.audit.faults.registry import FAULTS, Fault
from trl_sync.audit.faults.structure import (
    adapter_added_after_wrapping,
    checkpoint_restored_on_one_rank,
    dropout_in_reference,
    head_seeded_per_rank,
    optimizer_holds_copies,
    parameter_not_in_optimizer,
    replaced_after_wrapping,
    tensor_added,
    unfrozen_after_wrapping,
)

__all__ = [
    "FAULTS",
    "Fault",
    "FaultNotPlantedError",
    "Planted",
    "absmax_changed",
    "adapter_added_after_wrapping",
    "adapter_merged",
    "base_byte_changed",
    "bit_flipped",
    "byte_flipped",
    "checkpoint_restored_on_one_rank",
    "dropout_in_reference",
    "extra_optimizer_step",
    "forward_unwrapped",
    "gradients_clipped",
    "head_seeded_per_rank",
    "launched_alone",
    "no_sync_on_last_micro_batch",
    "optimizer_holds_copies",
    "optimizer_moment_changed",
    "other_base",
    "other_learning_rate",
    "parameter_not_in_optimizer",
    "rank_delayed",
    "rank_killed",
    "reduction_returned_zeros",
    "replaced_after_wrapping",
    "rows_swapped",
    "shard_missing",
    "step_skipped",
    "tensor_added",
    "unfrozen_after_wrapping",
]
