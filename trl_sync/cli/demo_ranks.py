"""The ranks of `trl-sync demo`: started as processes of their own, and what each leaves behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_sync.audit.journal import JOURNAL_NAME, read_journal

NUM_RANKS = 2
DEADLINE_S = 120.0
GRACE_S = 30.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOutcome:
    """What one rank left behind: exit code, output, what was planted there, what was named."""

    rank: int
    exit_code: int
    log: str
    planted: Mapping[str, Any] | None
    message: str | None
    findings: tuple[Mapping[str, Any], ...]
    after_ms: float
    since: str
    summary: str | None


def run_ranks(fault: str, seed: int, folder: Path) -> list[RankOutcome]:
    """Every rank's outcome; ranks that still run after the deadline are killed."""
    until_s = time.monotonic() + DEADLINE_S
    with started(fault, seed, folder) as processes:
        while any(process.poll() is None for process in processes) and time.monotonic() < until_s:
            if any(process.poll() for process in processes):
                # The others wait for it: whatever they have to say of that, they say soon.
                until_s = min(until_s, time.monotonic() + GRACE_S)
                break
            time.sleep(POLL_S)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(until_s - time.monotonic(), POLL_S))
    return [
        read_outcome(rank, process.returncode, folder / f"rank{rank}")
        for rank, process in enumerate(processes)
    ]


@contextmanager
def started(fault: str, seed: int, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The ranks' processes, whose end is certain when the block ends."""
    port, processes = free_port(), []
    try:
        for rank in range(NUM_RANKS):
            own = folder / f"rank{rank}"
            own.mkdir()
            command = [sys.executable, "-P", "-m", "trl_sync.cli.demo_rank"]
            with (own / "log.txt").open("wb") as log:
                process = subprocess.Popen(
                    [*command, fault, str(own), str(seed)],
                    env=rank_environment(rank, port),
                    # Never written to: its end tells a rank that this process is gone.
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def rank_environment(rank: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets, on a machine that seems to have no GPU."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    return inherited | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(NUM_RANKS),
        "LOCAL_WORLD_SIZE": str(NUM_RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def read_outcome(rank: int, exit_code: int, folder: Path) -> RankOutcome:
    """From `outcome.json`; from the journal where the audit ended the process itself."""
    file = folder / "outcome.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    message, findings = content.get("message"), content.get("findings", [])
    named_s, journal = content.get("named_s"), folder / JOURNAL_NAME
    if message is None and journal.exists():
        for event in read_journal(journal):
            if event["event"] == "desync":
                message, findings = event["message"], event["findings"]
                named_s = journal.stat().st_mtime
    since, since_s = planted_time(content)
    return RankOutcome(
        rank=rank,
        exit_code=exit_code,
        log=(folder / "log.txt").read_text(errors="replace"),
        planted=content.get("planted"),
        message=message,
        findings=tuple(findings),
        after_ms=((named_s or since_s) - since_s) * 1e3,
        since=since,
        summary=content.get("summary"),
    )


def planted_time(content: Mapping[str, Any]) -> tuple[str, float]:
    """The beginning of the update in which the fault strikes, else of the audit."""
    step = (content.get("planted") or {}).get("step")
    begun_s = content.get("updates_begun_s", [])
    if step is None or len(begun_s) < step:
        return "the audit began", content.get("begun_s", 0.0)
    return f"update {step} began", begun_s[step - 1]
