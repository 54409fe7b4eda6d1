"""Faults for the mutation check: each shows in one part of the audit only, on one linear layer.

Each takes the audit's options and returns what the audit said: cause, scope, tensor, ranks, step
and message.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn


class Job:
    """A linear layer under DistributedDataParallel, and its auditor, which has not begun."""

    def __init__(
        self,
        options: dict[str, Any],
        *,
        learning_rate: float = 1e-2,
        reward: nn.Module | None = None,
    ) -> None:
        from accelerate import Accelerator

        from trl_sync import SyncAuditor

        self.accelerator = Accelerator(cpu=True)
        self.rank: int = self.accelerator.process_index
        torch.manual_seed(3)
        model = nn.Linear(6, 3)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        modules = {} if reward is None else {"reward": reward.requires_grad_(False)}
        self.auditor = SyncAuditor(
            self.accelerator, self.model, self.optimizer, modules=modules, **options
        )

    def backward(self) -> None:
        inputs = torch.full((4, 6), 1.0 + self.rank)
        self.accelerator.backward(self.model(inputs).pow(2).mean())

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def told(job: Job, act: Callable[[], Any]) -> dict[str, Any]:
    """What `act` said of the job, as an error or, if only warned about, in the report it returns.

    Also the name of an error that is no verdict.
    """
    from trl_sync.errors import AuditError, DesyncError

    row: dict[str, Any] = {"cause": None, "error": None, "message": ""}
    try:
        report = act()
        findings = () if report is None else report.findings
        row["message"] = "" if report is None else report.describe()
    except DesyncError as error:
        findings, row["message"] = error.findings, str(error)
    except (AuditError, RuntimeError) as error:
        findings, row["error"], row["message"] = (), type(error).__name__, str(error)
    finally:
        job.auditor.detach()
    for finding in findings[:1]:
        row |= {
            "cause": finding.cause.value,
            "scope": finding.scope and finding.scope.value,
            "tensor": finding.tensor,
            "role": finding.role,
            "ranks": finding.ranks,
            "step": finding.step,
            "fatal": finding.fatal,
        }
    return row


def buffers_differ(options: dict[str, Any]) -> dict[str, Any]:
    """A buffer of the reward model is another on each rank."""
    reward = nn.Linear(2, 1)
    job = Job(options, reward=reward)
    nn.init.zeros_(reward.weight)
    nn.init.zeros_(reward.bias)
    reward.register_buffer("scale", torch.tensor([1.0 + job.rank]))
    return told(job, job.auditor.check)


def moment_changed_at_rate_0(options: dict[str, Any]) -> dict[str, Any]:
    """One moment of rank 1 changes while a learning rate of 0 keeps it from the parameters."""
    job = Job({"frozen_cover_steps": 2} | options, learning_rate=0.0)

    def train() -> None:
        with job.auditor.attach():
            for number in range(1, 7):
                if number == 3 and job.rank == 1:
                    weight = job.optimizer.param_groups[0]["params"][0]
                    job.optimizer.state[weight]["exp_avg"][2, 1] *= -1
                job.step()

    return told(job, train)


def same_bytes_in_another_shape(options: dict[str, Any]) -> dict[str, Any]:
    """The frozen head is 2 x 4 on rank 0 and 4 x 2 on rank 1, all of it zeros."""
    reward = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2, 4), requires_grad=False)})
    job = Job(options, reward=reward)
    if job.rank == 1:
        reward["weight"] = nn.Parameter(torch.zeros(4, 2), requires_grad=False)
    return told(job, job.auditor.check)


def steps_differ(options: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 believes to be one step further."""
    job = Job(options)
    job.auditor.begin()
    return told(job, lambda: job.auditor.check(step=10 + job.rank))


def kinds_differ(options: dict[str, Any]) -> dict[str, Any]:
    """Rank 0 audits all it has, as before a save, while rank 1 audits an update."""
    job = Job({"scopes": ["roles"]} | options)
    job.auditor.begin()
    job.backward()
    job.auditor.before_update(1)
    job.optimizer.step()
    act = job.auditor.after_update if job.rank == 1 else job.auditor.check
    return told(job, lambda: act(1))


def audits_differ(options: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 has counted one audit more."""
    job = Job(options)
    job.auditor.begin()
    job.auditor._num_audits += job.rank
    return told(job, lambda: job.auditor.check(step=1))


def another_version(options: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 runs another version of the audit."""
    job = Job(options)
    module = "trl_sync.audit.judge"
    number, name = (71, "xxh3-64") if job.rank == 1 else (72, "xxh3-128")
    with mock.patch(f"{module}._ALGORITHM", number), mock.patch(f"{module}._ALGORITHM_NAME", name):
        return told(job, job.auditor.check)


def reward_in_training_mode_on_rank_1(options: dict[str, Any]) -> dict[str, Any]:
    """The frozen reward model runs with active dropout on rank 1 alone."""
    reward = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    for parameter in reward.parameters():
        nn.init.zeros_(parameter)
    # Ranks that part here wait for each other in different collectives.
    with mock.patch("trl_sync.audit.auditor.EXCHANGE_TIMEOUT_S", 5.0):
        job = Job(options, reward=reward)
        job.auditor.begin()
        reward.train(job.rank == 1)
        reward(torch.ones(1, 2))
        return told(job, lambda: job.auditor.check(step=1))


def broken_checksum(options: dict[str, Any]) -> dict[str, Any]:
    """Every tensor has the same checksum."""
    job = Job(options)
    constant = mock.patch("trl_sync.audit.digest.xxhash.xxh3_128_digest", return_value=bytes(16))
    with constant:
        return told(job, job.auditor.check)


def broken_comparison(options: dict[str, Any]) -> dict[str, Any]:
    """Everything compares equal."""
    job = Job(options)
    equal = mock.patch(
        "trl_sync.audit.compare.Comparison.agree", lambda self, values: [True] * len(values)
    )
    with equal:
        return told(job, job.auditor.check)


def restored_with_another_weight(options: dict[str, Any]) -> dict[str, Any]:
    """Every rank loads the same wrong value of one weight from a checkpoint."""
    from safetensors.torch import save_file

    from trl_sync.audit.checkpoints import verify_resumed, write_checkpoint_manifest

    saved = Job(options)
    folders = [tempfile.mkdtemp() if saved.rank == 0 else None]
    torch.distributed.broadcast_object_list(folders)
    folder = Path(str(folders[0]))
    with saved.auditor.attach() as auditor:
        saved.step()
        if saved.rank == 0:
            save_file(dict(saved.model.module.state_dict()), folder / "model.safetensors")
        write_checkpoint_manifest(auditor, folder, 1)
    resumed = Job({"resume_from": folder} | options)
    resumed.step()
    resumed.optimizer.param_groups[0]["params"][0].data[1, 2] += 1.0
    resumed.auditor.begin(1)
    arguments = SimpleNamespace(output_dir=folder)
    row = told(resumed, lambda: verify_resumed(resumed.auditor, arguments, 1))
    torch.distributed.barrier()
    if resumed.rank == 0:
        shutil.rmtree(folder)
    return row


def delayed_rank(watched: bool) -> str:
    """Rank 1 sleeps for three times `timeout_s` before a backward pass."""
    from trl_sync.audit.faults import rank_delayed
    from trl_sync.audit.watch import ProgressWatch

    switched_off = mock.patch.object(ProgressWatch, "start", return_value=None)
    with contextlib.nullcontext() if watched else switched_off:
        job = Job({"timeout_s": 3.0})
        with (
            rank_delayed(job.model, step=2, place="before_backward", delay_s=9.0),
            job.auditor.attach(),
        ):
            for _ in range(3):
                job.step()
    return "ended well"


FAULTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        buffers_differ,
        moment_changed_at_rate_0,
        same_bytes_in_another_shape,
        steps_differ,
        kinds_differ,
        audits_differ,
        another_version,
        broken_checksum,
        broken_comparison,
        restored_with_another_weight,
        reward_in_training_mode_on_rank_1,
    )
}
