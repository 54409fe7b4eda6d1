"""A process for every point that scaling.py measures; the points take turns."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import traceback
from contextlib import ExitStack
from typing import Any

from ppo_side import import_all
from scaling_work import WORK, Point


def measure(points: list[Point], repeats: int) -> list[dict[str, Any]]:
    """What each point gives, in the order of `points`: medians over the rounds, and the rounds."""
    with ExitStack() as stack:
        processes = [stack.enter_context(PointProcess(point)) for point in points]
        for process in processes:
            process.wait()
        turns: list[list[dict[str, float]]] = [[] for _ in points]
        for number in range(repeats + 1):
            shift = number % len(points)
            order = [*range(shift, len(points)), *range(shift)]
            for index in order:
                turns[index].append(processes[index].ask("turn"))
            print(f"{points[0].part}: round {number} of {repeats}", file=sys.stderr, flush=True)
        rows = []
        for point, process, taken in zip(points, processes, turns, strict=True):
            rounds = taken[1:]
            medians = {name: statistics.median(turn[name] for turn in rounds) for name in rounds[0]}
            rows.append({"size": point.size} | process.ask("figures") | medians | {"turns": rounds})
    return rows


class PointProcess:
    """A process that measures one point, a turn whenever it is asked."""

    def __init__(self, point: Point) -> None:
        context = multiprocessing.get_context("spawn")
        self._point = point
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, point), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed here

    def __enter__(self) -> PointProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()  # which ends the process
        self._process.join(timeout=10)
        self._process.kill()

    def ask(self, method: str) -> dict[str, Any]:
        self._pipe.send(method)
        return self.wait()

    def wait(self) -> dict[str, Any]:
        name = f"{self._point.part} at {self._point.size}"
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            sys.exit(f"error: {name}: the process ended, exit code {self._process.exitcode}")
        if isinstance(answer, str):
            sys.exit(f"error: {name}:\n{answer[-3000:]}")
        return answer


def serve(pipe: Any, point: Point) -> None:
    """Answers what `PointProcess` asks, with an error's text if there is one."""
    # Progress bars, log lines and warnings of every process would hide the tables.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        import_all("ours")
        measured = WORK[point.part](point)
        pipe.send({})
        while True:
            pipe.send(getattr(measured, pipe.recv())())
    except EOFError:
        return
    except BaseException:
        pipe.send(traceback.format_exc())
