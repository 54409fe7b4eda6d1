"""What becomes of each fault under each engine: named, seen by nobody, or not there at all.

`FAULTS` says what the audit names where every rank holds everything (DistributedDataParallel). Here
stands what is otherwise: under ZeRO gradients and optimizer state are partitioned, and every rank
receives the updated parameters of the others; ZeRO-3 and FSDP2 partition the parameters, too; HSDP
keeps two or more copies of each FSDP2 shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Engine = Literal["zero1", "zero2", "zero3", "fsdp2", "hsdp"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
Outcome = Literal["named", "unseen", "absent"]
Who = Literal["struck", "replicas", "all"]

_ZERO: tuple[Engine, ...] = ("zero1", "zero2", "zero3")
_REPLICATED_ZERO: tuple[Engine, ...] = ("zero1", "zero2")
_FSDP: tuple[Engine, ...] = ("fsdp2", "hsdp")

_PARTITION = (
    "only the owner of a partition updates it, and all ranks receive the result: no replica departs"
)
_NO_TWIN = "no other rank holds this shard, and an update changes it: nothing tells a wrong one"
_FIXED_PARTITION = "the engine fixed what it updates when it wrapped the model"
_COUNTER = "AdamW's step counter is no shard: every rank holds one, and only it can be compared"
_NEW_PARAMETER = "the next forward fails by itself: a new parameter has no partition to gather"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What the audit says of a fault on an engine, on two ranks (HSDP: two times two).

    `ranks`: the rank that was struck, the ranks that hold the same bytes as it, or all ranks.
    `why`: the reason if it is not what the audit says where every rank holds everything.
    """

    outcome: Outcome
    cause: str | None = None
    ranks: Who = "all"
    why: str = ""


Reasons = dict[str, list[tuple[tuple[Engine, ...], str]]]

# The fault is not planted: ValueError.
_ABSENT: Reasons = {
    "forward_unwrapped": [
        (_ZERO, "hooks on the parameters reduce the gradients, whichever module was called"),
        (_FSDP, "the sharded module itself gathers and reduces: there is no wrapper to bypass"),
    ],
    "no_sync_on_last_micro_batch": [
        (("zero2", "zero3"), "gradients are partitioned as they come: no micro-batch is held back"),
        (("zero1",), "what is not reduced goes into partitions, and all ranks receive the result"),
        (_FSDP, "unreduced gradients never become .grad: the update is empty on all ranks alike"),
    ],
    "extra_optimizer_step": [
        (_ZERO, "the engine's step is collective: it would wait for ranks that take none"),
    ],
    "adapter_merged": [
        (("zero3", *_FSDP), "bitsandbytes cannot unpack a shard: peft's merge fails by itself"),
    ],
    "unfrozen_after_wrapping": [
        (("zero3",), "the engine's optimizer takes nothing new: the parameter stays as it is"),
        (_FSDP, "FSDP2 looks at requires_grad at every gather, and reduces the gradient"),
    ],
    "replaced_after_wrapping": [(("zero3",), _NEW_PARAMETER)],
    "parameter_not_in_optimizer": [(_ZERO, _FIXED_PARTITION)],
    "optimizer_holds_copies": [(("zero3",), _FIXED_PARTITION)],
}
# Nor is it after the first forward ...
_ABSENT_LATE: Reasons = {
    "adapter_added_after_wrapping": [(("zero3",), _NEW_PARAMETER)],
    "tensor_added": [(("zero3",), _NEW_PARAMETER)],
}
# ... or before it.
_ABSENT_AT_ONCE: Reasons = {
    "replaced_after_wrapping": [(_FSDP, "FSDP2 takes what it finds at its first forward")],
}
# The fault is planted, and by the nature of the engine no audit of checksums can see it.
_UNSEEN: Reasons = {
    "optimizer_moment_changed": [(_ZERO, _PARTITION), (("fsdp2",), _NO_TWIN)],
    "step_skipped": [(_ZERO, _PARTITION)],
    "other_learning_rate": [(_ZERO, _PARTITION), (("fsdp2",), _NO_TWIN)],
    "gradients_clipped": [(_ZERO, _PARTITION), (("fsdp2",), _NO_TWIN)],
    "reduction_returned_zeros": [(_ZERO, _PARTITION), (("fsdp2",), _NO_TWIN)],
    "checkpoint_restored_on_one_rank": [
        (("zero3",), "no other rank holds these shards, and nothing was seen before them"),
    ],
    "optimizer_holds_copies": [
        (
            _REPLICATED_ZERO,
            "the engine keeps no gradient that tells a stuck parameter from an idle",
        ),
    ],
}
# Another cause, or other ranks, than where every rank holds everything.
_OTHERWISE: dict[str, list[tuple[tuple[Engine, ...], str, Who, str]]] = {
    "unfrozen_after_wrapping": [
        (_REPLICATED_ZERO, "optimizer_diverged", "all", "no gradient is compared"),
    ],
    "replaced_after_wrapping": [
        (_REPLICATED_ZERO, "not_in_optimizer", "all", "the engine goes on updating the old one"),
        (_FSDP, "never_updated", "all", "FSDP2 puts the old one back; the optimizer has the new"),
    ],
    "step_skipped": [(("fsdp2",), "optimizer_diverged", "all", _COUNTER)],
    "checkpoint_restored_on_one_rank": [
        (_REPLICATED_ZERO, "init_mismatch", "all", "two ranks differ"),
        (("fsdp2",), "init_mismatch", "all", _COUNTER),
        (("hsdp",), "init_mismatch", "replicas", "its twin differs"),
    ],
}
# What stands against what: nothing tells which of the ranks with the same bytes is wrong.
_PAIRS = ("optimizer_moment_changed", "other_learning_rate", "gradients_clipped")


def expectation(fault: str, engine: Engine, *, late: bool = True) -> Expectation:
    """What to expect of `fault` under `engine`; `late`: planted after the first forward."""
    from trl_sync.audit.faults.registry import FAULTS

    absent = (_ABSENT, _ABSENT_LATE if late else _ABSENT_AT_ONCE)
    for table in absent:
        if why := _reason(table, fault, engine):
            return Expectation(outcome="absent", why=why)
    if why := _reason(_UNSEEN, fault, engine):
        return Expectation(outcome="unseen", why=why)
    known = FAULTS[fault]
    ranks: Who = "all" if known.on == "all ranks" else "struck"
    if fault in _PAIRS:
        ranks = "replicas"
    for engines, cause, who, why in _OTHERWISE.get(fault, ()):
        if engine in engines:
            return Expectation(outcome="named", cause=cause, ranks=who, why=why)
    return Expectation(outcome="named", cause=known.cause, ranks=ranks)


def _reason(table: Reasons, fault: str, engine: Engine) -> str:
    return next((why for engines, why in table.get(fault, ()) if engine in engines), "")


def engine_in_use() -> str:
    """The engine of this process's accelerate state: one of ENGINES, or "ddp" for all others."""
    from accelerate.state import AcceleratorState

    # Asking for a state that no Accelerator has made is an error. Checked on accelerate 1.15.
    if not AcceleratorState._shared_state:
        return "ddp"
    state = AcceleratorState()
    kind = str(getattr(state.distributed_type, "value", state.distributed_type))
    if kind == "DEEPSPEED":
        return f"zero{state.deepspeed_plugin.zero_stage}"
    if kind == "FSDP" and state.fsdp_plugin.fsdp_version == 2:
        mesh = state.parallelism_config
        return "hsdp" if mesh is not None and mesh.dp_replicate_enabled else "fsdp2"
    return "ddp"


def refuse_if_absent(fault: str, *, late: bool = True) -> None:
    """Called by a fault before it does anything; `late`: it will act after the first forward.

    Raises:
        ValueError: there is no such fault under the engine in use.
    """
    engine = engine_in_use()
    found = next((expectation(fault, e, late=late) for e in ENGINES if e == engine), None)
    if found is not None and found.outcome == "absent":
        raise ValueError(f"{fault} cannot be planted under {engine}: {found.why}")


def as_markdown() -> str:
    """The whole table, for the documentation."""
    from trl_sync.audit.faults.registry import FAULTS

    lines = ["| fault | " + " | ".join(ENGINES) + " |", "|---" * (len(ENGINES) + 1) + "|"]
    for name, fault in FAULTS.items():
        if fault.on == "checkpoint":
            continue
        cells = (_cell(name, engine) for engine in ENGINES)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(fault: str, engine: Engine) -> str:
    late, at_once = (expectation(fault, engine, late=late) for late in (True, False))
    if late.outcome == at_once.outcome:
        return f"`{late.cause}`" if late.outcome == "named" else late.outcome
    named, when = (late, "late") if late.outcome == "named" else (at_once, "at once")
    return f"`{named.cause}`, {when} only"
