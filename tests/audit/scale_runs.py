"""What an audit sends, counted below torch's Python functions, on worlds of several sizes."""

from __future__ import annotations

import datetime
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_sync.audit.auditor import SyncAuditor
from trl_sync.audit.compare import Comparison

NUM_STEPS = 3
FEATURES = 4
OPTIONS: dict[str, Any] = {"journal": None, "on_desync": "warn", "frozen_cover_steps": 2}

# The operation and the bytes of all tensors that it is given.
Sent = tuple[str, int]


class Collectives(TorchDispatchMode):
    """Records every collective that the thread makes while it is entered, of any group.

    Every function of `torch.distributed`, and every method of a process group, ends in an operator
    of the namespace c10d, so there is no list of functions to keep complete.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.sent.append((function._opname.rstrip("_"), size_bytes))
        return function(*args, **(kwargs or {}))


def collectives_of(function: Callable[[], Any]) -> list[Sent]:
    with Collectives() as collectives:
        function()
    return collectives.sent


def worlds(sizes: list[int], tensors: list[int]) -> dict[str, Any]:
    """What this rank counted in the worlds it belongs to, by `<world size>/<tensors>`. In the
    world of two also what the counters see of each kind of collective and of audits that send more.

    `sizes` go down: audits meet by their number in a process, so a rank may leave but not come.
    """
    rank = int(os.environ["RANK"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, sizes[0], is_master=rank == 0)
    counted: dict[str, Any] = {}
    for size in sizes:
        if rank >= size:
            continue
        with world(store, rank, size):
            for number in tensors:
                counted[f"{size}/{number}"] = audited_run(rank, size, number)
            if size == 2:
                counted["kinds"] = kinds_of_collectives(rank)
                counted["more"] = steps_that_send_more(rank)
    return counted


@contextmanager
def world(store: Any, rank: int, size: int) -> Iterator[None]:
    """A default process group of the first `size` ranks."""
    os.environ["WORLD_SIZE"] = str(size)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"world of {size}", store),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        yield
    finally:
        dist.barrier()
        dist.destroy_process_group()


class Branches(nn.Module):
    """The sum of many linear layers, every other one frozen; two tensors a layer."""

    def __init__(self, num_tensors: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Linear(FEATURES, FEATURES) for _ in range(num_tensors // 2)
        )
        for branch in self.branches[1::2]:
            branch.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([branch(features) for branch in self.branches]).mean(dim=0)


class Run:
    """A plain data-parallel loop under the audit; each rank has data of its own."""

    def __init__(self, rank: int, size: int, num_tensors: int) -> None:
        torch.manual_seed(0)
        self.model = Branches(num_tensors)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-2)
        self.features = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(rank))
        state = SimpleNamespace(distributed_type="MULTI_GPU", num_processes=size)
        self.auditor = SyncAuditor(state, self.model, self.optimizer, **OPTIONS)

    def step(self) -> tuple[list[Sent], int, int]:
        """One update: what was sent but for the mean of the gradients, and how many collectives
        torch itself counted on the audit's group and on the default one.
        """
        group = self.auditor.comparison._group
        before = (sequence_number(group), sequence_number(dist.group.WORLD))
        self.optimizer.zero_grad()
        sent = collectives_of(lambda: self.model(self.features).square().mean().backward())
        gradients = torch.cat([p.grad.flatten() for p in self.trained if p.grad is not None])
        dist.all_reduce(gradients)
        parts = gradients.div_(dist.get_world_size()).split([p.numel() for p in self.trained])
        for parameter, part in zip(self.trained, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        sent += collectives_of(self.optimizer.step)
        own, default = sequence_number(group), sequence_number(dist.group.WORLD)
        return sent, own - before[0], default - before[1]


def audited_run(rank: int, size: int, num_tensors: int) -> dict[str, Any]:
    """What the audit sent at the start, in each healthy update, in an audit by hand and in an
    update after an edit on the last rank; and what it then found.
    """
    run = Run(rank, size, num_tensors)
    begin = collectives_of(run.auditor.attach)
    assert len(list(run.model.parameters())) == num_tensors
    steps = [run.step() for _ in range(NUM_STEPS)]
    full = collectives_of(run.auditor.check)
    equal = run.auditor.last_equal_step
    if rank == size - 1:
        with torch.no_grad():
            run.trained[-1][0] += 1.0
    parted, _, _ = run.step()
    run.auditor.detach()
    return {
        "begin": [name for name, _ in begin],
        "steps": [sent for sent, _, _ in steps],
        "torch_counted": [numbers for _, *numbers in steps],
        "full": full,
        "equal": equal,
        "parted": [name for name, _ in parted],
        "desyncs": run.auditor.summary().desyncs,
    }


def steps_that_send_more(rank: int) -> dict[str, Any]:
    """One healthy update each of an audit that gathers as well: itself, and in a thread."""
    agree = Comparison.agree

    def gathers(comparison: Comparison, values: Sequence[int]) -> list[bool]:
        comparison.gather(None)
        return agree(comparison, values)

    def gathers_in_a_thread(comparison: Comparison, values: Sequence[int]) -> list[bool]:
        thread = threading.Thread(target=lambda: comparison.gather(None))
        thread.start()
        thread.join()
        return agree(comparison, values)

    found: dict[str, Any] = {}
    for changed in (gathers, gathers_in_a_thread):
        run = Run(rank, 2, 10)
        with run.auditor.attach(), mock.patch.object(Comparison, "agree", changed):
            sent, own, _ = run.step()
        found[changed.__name__] = ([name for name, _ in sent], own)
    return found


def sequence_number(group: Any) -> int:
    """How many collectives the group has seen from any thread, counted by torch in C++.

    A private name, as of torch 2.13: it sees what a thread of the audit's own would send.
    """
    return int(group._get_sequence_number_for_group())


def kinds_of_collectives(rank: int) -> dict[str, list[Sent]]:
    """What the counter records of one call of each kind, in a world of two."""
    eight, sixteen = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(eight),
        "broadcast": lambda: dist.broadcast(eight, src=0),
        "reduce": lambda: dist.reduce(eight, dst=0),
        "all_gather": lambda: dist.all_gather([eight.clone(), eight.clone()], eight),
        "all_gather_single": lambda: dist.all_gather_single(sixteen, eight),
        "all_to_all": lambda: dist.all_to_all_single(sixteen, sixteen.clone()),
        "all_gather_object": lambda: dist.all_gather_object([None, None], "text"),
        "broadcast_object": lambda: dist.broadcast_object_list(["text"], src=0),
        "send": lambda: dist.send(eight, dst=1) if rank == 0 else dist.recv(eight, src=0),
        "barrier": dist.barrier,
        "method": lambda: dist.group.WORLD.allreduce([eight]).wait(),
    }
    return {name: collectives_of(call) for name, call in calls.items()}
