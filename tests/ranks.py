"""Runs a function on several gloo ranks, with one deadline that ends them all."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from typing import Any
from unittest import mock

TRAINERS = ("sft", "dpo", "kto", "reward", "rloo", "grpo")
PRELOADED = [
    "torch.distributed",
    "transformers.trainer",
    "datasets",
    *(f"trl.trainer.{name}_trainer" for name in TRAINERS),
    "trl_sync.ppo",
    "trl_sync.audit",
    "trl_sync.legacy",
]


class RankError(AssertionError):
    """A rank failed, died or did not finish in time; carries every rank's traceback."""


def run_on_ranks(
    function: Callable[..., Any],
    *args: Any,
    num_ranks: int = 2,
    deadline_s: float = 120,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """What `function(*args)` returned on each rank, by rank; it must be importable.

    The processes find the environment that `accelerate launch` makes for CPU ranks; `environment`
    replaces the part of it that chooses the engine. Without it a rank is a fork of a server that
    has imported the libraries already, which takes most of the time of a short test; with it, as
    DeepSpeed and others read theirs when they are imported, a process of its own.

    Raises:
        RankError: a rank raised, exited with another code than 0, or ran past the deadline.
    """
    context = _forkserver() if environment is None else multiprocessing.get_context("spawn")
    answers = context.Queue()
    port = free_port()
    processes = []
    for rank in range(num_ranks):
        born_with = os.environ | launcher_environment(rank, num_ranks, port, environment)
        work = (function, args, rank, answers)
        process = context.Process(target=_serve, args=(work, born_with))
        with mock.patch.dict(os.environ, born_with):
            process.start()
        processes.append(process)
    try:
        results = _collect(answers, processes, time.monotonic() + deadline_s)
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in results.items() if not ok]
    missing = sorted(set(range(num_ranks)) - set(results))
    failures += [f"rank {r}: no answer, exit code {processes[r].exitcode}" for r in missing]
    if failures:
        raise RankError("\n".join(failures))
    return [results[rank][1] for rank in range(num_ranks)]


def _collect(answers: Any, processes: list[Any], deadline: float) -> dict[int, tuple[bool, Any]]:
    results: dict[int, tuple[bool, Any]] = {}
    while len(results) < len(processes) and time.monotonic() < deadline:
        try:
            rank, ok, value = answers.get(timeout=0.2)
        except queue.Empty:
            dead = [p for rank, p in enumerate(processes) if rank not in results and p.exitcode]
            if dead:
                # The others would wait for it in a collective until the deadline.
                break
            continue
        results[rank] = (ok, value)
        if not ok:
            break
    return results


def launcher_environment(
    rank: int, num_ranks: int, port: int, engine: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What a launcher sets for one rank; `engine` chooses how ranks work together."""
    engine = {"ACCELERATE_USE_CPU": "true"} if engine is None else engine
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **engine,
    }


def _forkserver() -> Any:
    """A server that has imported what ranks need, on the one thread that each of them has.

    Started at the first call, it lives as long as this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def _serve(work: tuple[Callable[..., Any], Any, int, Any], environment: dict[str, str]) -> None:
    function, args, rank, answers = work
    # A fork has the server's, which may be older than what a test has set since.
    os.environ.clear()
    os.environ.update(environment)
    try:
        value = function(*args)
    except BaseException:  # also a SystemExit: the parent waits for an answer of every rank
        answers.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None
    answers.put((rank, True, value))
    _close_process_group()


def _close_process_group() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
