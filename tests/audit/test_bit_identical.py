"""A run with the audit equals one without, bit for bit, and nothing of the audit stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import identical_runs
from identical_runs import MEDDLING, OPTIONS
from ranks import run_on_ranks

ALONE = [("drill", name) for name in OPTIONS]
ALONE += [("trainer", name) for name in ("default", "verdict one step late", "every third step")]
ALONE += [("ppo", name) for name in ("default", "verdict one step late")]
TOGETHER = [*ALONE[: len(OPTIONS)], ("trainer", "default"), ("trainer", "verdict one step late")]
TOGETHER += [("ppo", "default")]


def with_bases(cases: list[tuple[str, str]]) -> list[tuple[str, str | None]]:
    """The cases, and each kind of training without the audit, twice."""
    return [*((kind, None) for kind in dict.fromkeys(kind for kind, _ in cases)), *cases]


def assert_identical(plain: Any, audited: Any) -> None:
    """Names the first event and the parts of the state that differ."""
    assert [event for event, _ in plain] == [event for event, _ in audited]
    for (event, expected), (_, found) in zip(plain, audited, strict=True):
        different = sorted(part for part in expected if found.get(part) != expected[part])
        assert not different, f"{event}: {', '.join(different)}"
        assert found.keys() == expected.keys()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The traces of one process of its own: checked annotations draw random numbers in this one."""
    folder = tmp_path_factory.mktemp("alone")
    return run_on_ranks(
        identical_runs.traces_and_meddled, folder, with_bases(ALONE), num_ranks=1, deadline_s=280
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The traces of two ranks."""
    folder = tmp_path_factory.mktemp("together")
    return run_on_ranks(identical_runs.traces, folder, with_bases(TOGETHER), deadline_s=280)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("kind, options", ALONE)
def test_one_process_trains_the_same_with_the_audit(alone: Any, kind: str, options: str) -> None:
    traces, _ = alone[0]
    assert_identical(traces[kind, None], traces[kind, options])


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("kind, options", TOGETHER)
def test_two_ranks_train_the_same_with_the_audit(together: Any, kind: str, options: str) -> None:
    for rank in together:
        assert_identical(rank[kind, None], rank[kind, options])


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drill", "trainer", "ppo"])
def test_the_traces_are_of_training_with_random_numbers(together: Any, kind: str) -> None:
    first, second = (rank[kind, None] for rank in together)
    states = [state for event, state in first if event.startswith("step")]
    assert len(states) >= identical_runs.STEPS
    for part in ("trainable", "optimizer", "torch random state"):
        assert len({state[part] for state in states}) >= identical_runs.STEPS
    assert first[-2][1]["trainable"] == second[-2][1]["trainable"]
    events = {event.rpartition(" ")[0] for event, _ in first}
    if kind != "drill":
        assert {"evaluate", "save"} <= events


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("name", MEDDLING)
def test_an_audit_that_meddles_is_caught(alone: Any, name: str) -> None:
    traces, meddled = alone[0]
    _, event, parts = MEDDLING[name]
    with pytest.raises(AssertionError) as failure:
        assert_identical(traces["drill", None], meddled[name])
    assert str(failure.value).startswith(f"{event}: {', '.join(sorted(parts))}\n")


# What is left behind.


def leftovers(modules: list[nn.Module], optimizer: Any) -> dict[str, int]:
    """Counts of hooks, threads and process groups that an audit may have made."""
    from torch.nn.modules import module as module_hooks
    from torch.optim import optimizer as optimizer_hooks

    inner = getattr(optimizer, "optimizer", optimizer)
    parts = [part for module in modules for part in module.modules()]
    parameters = [p for module in modules for p in module.parameters()]
    of_modules = [n for n in vars(nn.Linear(1, 1)) if n.endswith("_hooks")]
    of_optimizers = [name for name in vars(inner) if name.endswith("_hooks")]
    groups = torch.distributed.distributed_c10d._world.pg_map
    return {
        "module hooks": sum(len(getattr(part, name)) for part in parts for name in of_modules),
        "parameter hooks": sum(
            len(getattr(p, name) or ())
            for p in parameters
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
        ),
        "optimizer hooks": sum(len(getattr(inner, name)) for name in of_optimizers),
        "global hooks": sum(
            len(value)
            for owner in (module_hooks, optimizer_hooks)
            for name, value in vars(owner).items()
            if name.startswith("_global_") and name.endswith("_hooks")
        ),
        "threads": threading.active_count(),
        "process groups": len(groups),
    }


def counts_around_audits(folder: Path) -> dict[str, Any]:
    """Leftovers before, during and after audits of three kinds, on this rank."""
    return {
        "ends well": around(folder, None),
        "in training": around(folder, "step_skipped"),
        "at begin": around(folder, "head_seeded_per_rank"),
    }


def around(folder: Path, fault: str | None) -> dict[str, Any]:
    import contextlib

    from trl_sync import DesyncError
    from trl_sync.audit.drill import DrillJob, plant_on

    job = DrillJob()
    modules = [job.unwrapped_model, *job.modules.values()]
    job.train(1)
    found = {"before": leftovers(modules, job.optimizer), "error": None}

    def look(job: Any, number: int) -> None:
        found["during"] = leftovers(modules, job.optimizer)

    planting = contextlib.nullcontext() if fault is None else plant_on(job, fault, step=2)
    try:
        with planting, audited(job, folder):
            job.train(3, look)
    except DesyncError as error:
        found["error"] = error.findings[0].cause.value
    until_s = time.monotonic() + 5
    # A thread that was told to end has yet to be scheduled to do so.
    while leftovers(modules, job.optimizer) != found["before"] and time.monotonic() < until_s:
        time.sleep(0.01)
    found["after"] = leftovers(modules, job.optimizer)
    return found


def audited(job: Any, folder: Path) -> Any:
    from trl_sync import SyncAuditor

    journal = folder / "journal.jsonl"
    return SyncAuditor(
        job.accelerator, job.model, job.optimizer, modules=job.modules, journal=journal
    ).attach()


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_on_ranks(counts_around_audits, tmp_path_factory.mktemp("left"))


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, error",
    [("ends well", None), ("in training", "stale_replica"), ("at begin", "init_mismatch")],
)
def test_nothing_is_left_behind(counts: Any, name: str, error: str | None) -> None:
    for rank in counts:
        assert rank[name]["error"] == error
        assert rank[name]["after"] == rank[name]["before"]


@pytest.mark.ranks
@pytest.mark.slow
def test_the_count_sees_what_the_audit_uses(counts: Any) -> None:
    for rank in counts:
        before, during = rank["ends well"]["before"], rank["ends well"]["during"]
        assert all(during[name] > before[name] for name in before), (before, during)


# Memory.

MEGABYTE = 2**20
MEMORY = """
    import sys
    from pathlib import Path

    import torch
    from accelerate.state import PartialState
    from torch import nn

    from trl_sync import SyncAuditor

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    def audit(size, num_layers):
        layers = [nn.Linear(size, size, bias=False) for _ in range(num_layers)]
        model = nn.Sequential(*layers)
        for layer in layers[: num_layers // 2]:
            layer.requires_grad_(False)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.1)
        for parameter in trainable:
            parameter.grad = torch.full_like(parameter, 1e-3)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        auditor = SyncAuditor(PartialState(cpu=True), model, optimizer, journal=None)
        auditor.begin()
        for step in range(1, 5):
            for parameter in trainable:
                parameter.grad.fill_(0.0 if step == {idle_step} else 1e-3)
            auditor.before_update(step)
            optimizer.step()
            auditor.after_update(step)
        auditor.check()
        auditor.detach()
        return status("VmHWM") - before

    torch.ones(2**16).abs().sum()  # large enough to start torch's threads
    audit(8, 2)
    print(audit(1024, 16))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"),
    reason="the peak of memory is read and reset in Linux's /proc",
)
@pytest.mark.parametrize("idle_step", [0, 2])
def test_memory_is_at_most_one_tensor(idle_step: int) -> None:
    script = textwrap.dedent(MEMORY).replace("{idle_step}", str(idle_step))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    peak_bytes = int(done.stdout)
    largest_bytes = 4 * MEGABYTE
    print(f"\n{peak_bytes / MEGABYTE:.1f} MiB more while 64 MiB are audited")
    # 1 MiB: what Python keeps about 16 tensors.
    assert peak_bytes <= largest_bytes + MEGABYTE
