"""What a verdict of the audit costs with 8 to 4096 ranks.

    python recipes/bench/audit_scaling.py [--ranks 8 64 512 4096] [--layers 32] [--json FILE]

One process, one thread. The state is a LoRA model's: seven adapted projections a layer, small in
bytes, because hashing costs the same for any number of ranks (see checksum_speed.py).

Measured: the real `Judge`, from final checksums to the report, on one rank, in CPU seconds of its
thread, so that other work on the machine counts little. The other ranks are simulated, because one
machine cannot hold thousands: no message is sent, and what they would send is pickled and unpickled
as the gather does. Calculated: all that a network does, from a latency and a bandwidth that are
assumed. The algorithms are gloo's: rings for all-reduce and all-gather, a binomial tree for
broadcast. watch_scaling.py does the same for the progress watch.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trl_sync.audit.compare import Comparison
from trl_sync.audit.config import AuditConfig
from trl_sync.audit.diagnose import Evidence
from trl_sync.audit.findings import Cause, Scope
from trl_sync.audit.inventory import Inventory
from trl_sync.audit.judge import Judge
from trl_sync.audit.snapshot import COUNTERS, Slot
from trl_sync.audit.snapshotter import Snapshotter

ALPHA_S = 30e-6  # One message between two hosts of a data centre, over TCP.
BYTES_PER_S = 10e9 / 8
TIMEOUT_S = 60.0
LORA_SHAPE = (16, 64)
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"]
PROJECTIONS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of difference: what the header shows, and what `rank` of `world_size` would send."""

    cause: Cause
    counters: tuple[str, ...]
    slots: tuple[Slot, ...]
    sent_by: Callable[[Evidence, int, int], Evidence]


class SimulatedRanks(Comparison):
    """A comparison with ranks that are not there; this process is rank 0."""

    def __init__(self, world_size: int) -> None:
        super().__init__(timeout_s=TIMEOUT_S)
        self.world_size = world_size
        self._group = "simulated"
        self.case: Case | None = None
        self.forget()

    def forget(self) -> None:
        """Begins to count anew."""
        self.num_collectives = self.header_bytes = 0
        self.gathered_bytes: list[int] = []
        self.making_s = self.unpickling_s = 0.0

    def _run(self, collective: Callable[[], Any]) -> None:
        """Sends nothing: this rank's numbers come back as if all held the same."""
        self.num_collectives += 1

    def agree(self, values: Sequence[int]) -> list[bool]:
        self.header_bytes += 2 * 8 * len(values)  # [x, ~x] in 64 bits
        agreed = super().agree(values)
        if self.case is not None:
            agreed = [same and not differs(self.case, i) for i, same in enumerate(agreed)]
        return agreed

    def gather(self, value: Any) -> list[Any]:
        """What each rank would send, through pickle as in `all_gather_object`."""
        gathered, largest = [], 0
        for rank in range(self.world_size):
            started_s = time.thread_time()
            sent = value
            if isinstance(value, Evidence) and self.case is not None:
                sent = self.case.sent_by(replace(value, rank=rank), rank, self.world_size)
            data = pickle.dumps(sent)
            largest = max(largest, len(data))
            made_s = time.thread_time()
            gathered.append(pickle.loads(data))
            self.making_s += made_s - started_s
            self.unpickling_s += time.thread_time() - made_s
        self.num_collectives += 2
        self.gathered_bytes.append(largest)
        return gathered


def differs(case: Case, position: int) -> bool:
    """Whether ranks differ in the header's number at `position`."""
    if position < len(COUNTERS):
        return COUNTERS[position] in case.counters
    return list(Slot)[(position - len(COUNTERS)) // 2] in case.slots


def one_tensor_of_the_last(own: Evidence, rank: int, world_size: int) -> Evidence:
    if rank != world_size - 1:
        return own
    table = dict(own.digests[Slot.AFTER])
    table[next(iter(table))] = b"another checksum"
    return replace(own, digests=dict(own.digests) | {Slot.AFTER: table})


def all_gradients_of_each(own: Evidence, rank: int, world_size: int) -> Evidence:
    key = rank.to_bytes(8, "little")
    return replace(
        own,
        digests={
            slot: {name: key + digest[8:] for name, digest in table.items()}
            for slot, table in own.digests.items()
        },
        gradient_norms={
            name: norm * (1 + (7 * rank + 11 * place) % 13)
            for place, (name, norm) in enumerate(own.gradient_norms.items())
        },
    )


def one_tensor_fewer(own: Evidence, rank: int, world_size: int) -> Evidence:
    return replace(own, schema=own.schema[:-1]) if rank == world_size - 1 else own


CASES = (
    (
        "one tensor of one rank",
        Case(Cause.OPTIMIZER_DIVERGED, (), (Slot.AFTER,), one_tensor_of_the_last),
    ),
    (
        "all gradients of each rank",
        Case(Cause.GRADIENT_NOT_REDUCED, (), (Slot.GRADIENTS, Slot.AFTER), all_gradients_of_each),
    ),
    (
        "one tensor fewer on one rank",
        Case(Cause.STRUCTURE_MISMATCH, ("schema", "num_tensors"), (), one_tensor_fewer),
    ),
)


class Training:
    """Updates of a LoRA model of `num_layers` under a judge."""

    def __init__(self, num_layers: int, world_size: int) -> None:
        self.model = lora_model(num_layers)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-3)
        config = AuditConfig()
        self.snapshotter = Snapshotter(
            Inventory(self.model, self.optimizer), config, [s for s in Scope if s != Scope.ROLES]
        )
        self.ranks = SimulatedRanks(world_size)
        self.judge = Judge(self.ranks, self.snapshotter, config.every_steps)
        self.num_audits = 0

    def update(self, case: Case | None = None) -> tuple[float, Any]:
        """Seconds of the verdict on one update, without those of making other ranks' messages."""
        self.num_audits += 1
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, 1.0)
        self.snapshotter.before_update()
        self.optimizer.step()
        snapshot = self.snapshotter.after_update(self.num_audits, self.num_audits, updates=1)
        self.ranks.case = case
        self.ranks.forget()
        gc.collect()
        started_s = time.thread_time()
        report, _ = self.judge.judge(snapshot)
        return time.thread_time() - started_s - self.ranks.making_s, report


def lora_model(num_layers: int) -> nn.Module:
    """Parameters with the names of a Llama's under PEFT: 14 trainable and 9 frozen ones a layer."""
    root, prefix = nn.Module(), "base_model.model.model"
    names = [f"{prefix}.embed_tokens.weight", f"{prefix}.norm.weight", "base_model.lm_head.weight"]
    for layer in (f"{prefix}.layers.{number}" for number in range(num_layers)):
        names += [f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"]
        for projection in (f"{layer}.{name}" for name in PROJECTIONS):
            names += [f"{projection}.base_layer.weight"]
            names += [f"{projection}.lora_{side}.policy.weight" for side in "AB"]
    for name in names:
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        weight = nn.Parameter(torch.ones(LORA_SHAPE), requires_grad=".lora_" in name)
        module.register_parameter(last, weight)
    return root


def measure_verdicts(num_ranks: int, num_layers: int, rounds: int) -> dict[str, Any]:
    """One rank's healthy verdicts and those of each kind of difference; medians in seconds."""
    training = Training(num_layers, num_ranks)
    try:
        healthy = [training.update()[0] for _ in range(10 * rounds + 1)][1:]
        size_bytes = training.ranks.header_bytes
        return {
            "ranks": num_ranks,
            "tensors": len(training.parameters),
            "collectives": training.ranks.num_collectives,
            "header_bytes": size_bytes,
            "healthy_s": statistics.median(healthy),
            "healthy_network_s": all_reduce_s(num_ranks, size_bytes),
            "healthy_tree_s": 2 * broadcast_s(num_ranks, size_bytes),
            "differing": {name: measure_case(training, case, rounds) for name, case in CASES},
        }
    finally:
        training.snapshotter.close()


def measure_case(training: Training, case: Case, rounds: int) -> dict[str, Any]:
    """One kind of difference, found anew `rounds` times."""
    seconds = []
    for _ in range(rounds):
        update_s, report = training.update(case)
        seconds.append(update_s)
        assert report.findings[0].cause == case.cause, report.describe()
    ranks, sizes = training.ranks, training.ranks.gathered_bytes
    network_s = all_reduce_s(ranks.world_size, ranks.header_bytes)
    network_s += sum(gather_object_s(ranks.world_size, size) for size in sizes)
    if len(sizes) > 1:  # The first element that differs was looked for in the tensor's bytes.
        network_s += broadcast_s(ranks.world_size, 4 * math.prod(LORA_SHAPE))
    return {
        "local_s": statistics.median(seconds),
        "unpickling_s": ranks.unpickling_s,
        "collectives": ranks.num_collectives,
        "sent_bytes": sum(sizes),
        "received_bytes": sum(sizes) * (ranks.world_size - 1),
        "network_s": network_s,
        "message_characters": len(report.describe()),
    }


# Calculated.


def all_reduce_s(num_ranks: int, size_bytes: int) -> float:
    """A ring: 2 (W - 1) messages one after another, 2 (W - 1) / W of the bytes past each rank."""
    hops = 2 * (num_ranks - 1)
    return hops * ALPHA_S + hops / num_ranks * size_bytes / BYTES_PER_S


def broadcast_s(num_ranks: int, size_bytes: int) -> float:
    """A binomial tree."""
    return math.ceil(math.log2(num_ranks)) * (ALPHA_S + size_bytes / BYTES_PER_S)


def gather_object_s(num_ranks: int, size_bytes: int) -> float:
    """Two rings of W - 1 messages each: the sizes, then all objects at the size of the largest."""
    return sum((num_ranks - 1) * (ALPHA_S + size / BYTES_PER_S) for size in (8, size_bytes))


# Shown.


def as_text(found: dict[str, Any]) -> str:
    """The table in Markdown; each heading says how its column came about."""
    names = [name for name, _ in CASES]
    head = ["ranks", "bytes per rank (counted)", "collectives (counted)"]
    head += ["healthy, local (measured)", "healthy, network (calculated)"]
    head += [f"{name}, local (measured)" for name in names]
    head += ["received per rank (measured)", "differing, network (calculated)"]
    rows = []
    for row in found["verdicts"]:
        cases = [row["differing"][name] for name in names]
        cells = [row["ranks"], row["header_bytes"], row["collectives"]]
        cells += [f"{1e3 * row[key]:.2f} ms" for key in ("healthy_s", "healthy_network_s")]
        cells += [f"{1e3 * case['local_s']:.0f} ms" for case in cases]
        received, network_s = ([case[k] for case in cases] for k in ("received_bytes", "network_s"))
        cells += [f"{min(received) / 1e6:.1f} to {max(received) / 1e6:.1f} MB"]
        rows.append([*cells, f"{1e3 * min(network_s):.0f} to {1e3 * max(network_s):.0f} ms"])
    note = (
        f"{found['verdicts'][0]['tensors']} trainable tensors; {1e6 * ALPHA_S:g} us a message and "
        f"{8 * BYTES_PER_S / 1e9:g} Gbit/s assumed; {os.cpu_count()} CPU cores, {found['date']}"
    )
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([*(f"| {' | '.join(map(str, line))} |" for line in lines), "", note])


def main(flags: Sequence[str] | None = None) -> None:
    """Prints the table, and writes the figures if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(flags)
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "assumed": {"message_s": ALPHA_S, "bytes_per_s": BYTES_PER_S},
        "verdicts": [
            measure_verdicts(number, arguments.layers, arguments.rounds)
            for number in arguments.ranks
        ],
    }
    print(as_text(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
