"""A plain DDP loop under the progress watch, with a fault to order; torch and gloo only.

As a launcher runs it: `watched_run.py '{"fault": "kill", ...}'`. With `fork DIRECTORY NUMBER` it
is its own launcher for a list of such plans on stdin, NUMBER at a time: torch is imported once,
every rank is a fork with the environment of a launcher and its output in
`DIRECTORY/<plan>.<rank>.err`, and the answer on stdout is for each plan and rank its exit code and
when it ended.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn

from trl_sync.audit.uncaught import name_missing_on_uncaught
from trl_sync.audit.watch import MissingRanks, Phase, ProgressWatch

NUM_STEPS = 6
STEP_S = 0.02


def main(plan: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    audit_group = torch.distributed.new_group(backend="gloo")
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def on_missing(missing: MissingRanks) -> None:
        print(missing.describe(), file=sys.stderr)

    watch = ProgressWatch(
        rank=rank, world_size=world_size, timeout_s=plan["timeout_s"], on_missing=on_missing
    )
    name_missing_on_uncaught(watch)
    model.module.weight.register_hook(lambda gradient: watch.count_backward())
    watch.start()
    for step in range(NUM_STEPS):
        watch.advance(step, Phase.STEP_BEGUN)
        time.sleep(STEP_S)
        loss = model(torch.ones(2, 4)).square().mean()
        commit(plan, "before_backward", step, rank, watch)
        loss.backward()
        watch.advance(step, Phase.BEFORE_UPDATE)
        commit(plan, "in_step", step, rank, watch)
        optimizer.step()
        optimizer.zero_grad()
        watch.advance(step, Phase.AFTER_UPDATE)
        commit(plan, "before_audit", step, rank, watch)
        watch.advance(step, Phase.COMPARING)
        torch.distributed.all_reduce(torch.zeros(1), group=audit_group)
        watch.advance(step, Phase.AUDITED)
    finish(plan, rank, watch)


def finish(plan: dict[str, Any], rank: int, watch: ProgressWatch) -> None:
    """The ways to an end that must all be silent."""
    end = plan.get("end", "stop")
    if end == "late" and rank == 1:
        time.sleep(plan["timeout_s"] * 1.5)
    if end != "destroy_first":
        if end != "never_stop":
            watch.stop()
        torch.distributed.destroy_process_group()
        return
    torch.distributed.destroy_process_group()
    time.sleep(plan["timeout_s"] * 0.5)
    watch.stop()


def commit(plan: dict[str, Any], place: str, step: int, rank: int, watch: ProgressWatch) -> None:
    """Commits the plan's fault if its place, step and rank have come."""
    fault, timeout_s = plan.get("fault"), plan["timeout_s"]
    if fault == "slow" and rank == 1 and place == "before_backward":
        time.sleep(timeout_s * 0.4)
    if rank not in plan.get("ranks", []) or (place, step) != (plan["place"], plan["step"]):
        return
    if fault in ("kill", "freeze", "raise"):
        # What the others report is the last state that was published.
        time.sleep(2 * watch.poll_s)
    print(f"fault at {time.time()}", flush=True)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "raise":
        raise ValueError("a planned error")
    with watch.pause("evaluation") if fault == "pause" else nullcontext():
        time.sleep(timeout_s * plan.get("times", 1.6))


def fork_rank(environment: dict[str, str], output: Path) -> int:
    """The id of a process that becomes the rank; 0 in that process itself."""
    pid = os.fork()
    if pid == 0:
        os.environ.update(environment)
        for stream, suffix in ((1, "out"), (2, "err")):
            file = os.open(f"{output}.{suffix}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            os.dup2(file, stream)
    return pid


def fork_all(
    directory: Path, plans: list[dict[str, Any]], num_at_a_time: int
) -> dict[str, Any] | None:
    """The plan in a process that has become a rank; None in the launcher, after all have ended."""
    # Any optimizer imports it, which takes longer than all else that a rank does.
    importlib.import_module("torch._dynamo")
    running: dict[int, tuple[str, int]] = {}
    frozen = {plan["name"]: plan["ranks"][0] for plan in plans if plan.get("fault") == "freeze"}
    waiting = list(reversed(plans))
    ends: list[tuple[str, int, int, float]] = []
    while waiting or running:
        while waiting and len({name for name, _ in running.values()}) < num_at_a_time:
            plan = waiting.pop()
            for rank, environment in enumerate(plan["environments"]):
                pid = fork_rank(environment, directory / f"{plan['name']}.{rank}")
                if pid == 0:
                    return plan
                running[pid] = (plan["name"], rank)
        pid, status = os.wait()
        name, rank = running.pop(pid)
        ends.append((name, rank, os.waitstatus_to_exitcode(status), time.time()))
        for other, (other_name, other_rank) in running.items():
            # Nothing else ends a stopped process.
            if other_name == name and frozen.get(name) == other_rank:
                os.kill(other, signal.SIGKILL)
    print(json.dumps(ends))
    return None


if __name__ == "__main__":
    if sys.argv[1] == "fork":
        chosen = fork_all(Path(sys.argv[2]), json.load(sys.stdin), int(sys.argv[3]))
    else:
        chosen = json.loads(sys.argv[1])
    if chosen is not None:
        main(chosen)
