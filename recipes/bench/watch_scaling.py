"""What the progress watch costs with 8 to 4096 ranks, and what it asks of the store's holder.

    python recipes/bench/watch_scaling.py [--ranks 8 64 512 4096] [--json FILE]

Measured: the real `RankObserver` of one rank on a real TCPStore in the same process, in CPU seconds
of that process, so with the holder's work. The other ranks are simulated, because one machine
cannot hold thousands: only their states lie in the store. Calculated: what all ranks together ask
of the holder, from the seconds between two polls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trl_sync.audit.observer import RankObserver, machine
from trl_sync.audit.rank_state import RankState
from trl_sync.audit.state_store import StateStore
from trl_sync.audit.watch import ProgressWatch

TIMEOUT_S = 60.0
RANKS_PER_HOST = 8


def measure_watch(num_ranks: int, rounds: int) -> dict[str, Any]:
    """One rank's poll of the others' states, and what all polls ask of the store's holder.

    `holder_busy`: seconds of one read times reads a second; the reader's own work is in it, so the
    holder's one thread is busy for at most that share of the time.
    """
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    states = [simulated_state(rank) for rank in range(num_ranks)]
    for state in states:
        server.set(f"watch/{state.rank}", state.encoded())
    client = server.clone()
    poll_s = default_poll_s(num_ranks)
    store = StateStore(name="watch", store=client, answer_s=30.0)
    observer = RankObserver(
        rank=0, world_size=num_ranks, timeout_s=TIMEOUT_S, poll_s=poll_s, store=store, holder=0
    )
    polls_s = [timed(lambda: observer.exchange(states[0])) for _ in range(rounds + 1)]
    keys = [f"watch/{rank}" for rank in range(1, num_ranks)]
    read_s = statistics.median(timed(lambda: client.multi_get(keys)) for _ in range(rounds))
    observer.close()
    size_bytes, reads_per_s = len(states[-1].encoded()), num_ranks / poll_s
    return {
        "ranks": num_ranks,
        "poll_s": poll_s,
        "first_poll_s": polls_s[0],
        "local_s": statistics.median(polls_s[1:]),
        "state_bytes": size_bytes,
        "requests_per_s": 2 * reads_per_s,
        "states_per_s": (num_ranks - 1) * reads_per_s,
        "bytes_per_s": (num_ranks - 1) * reads_per_s * size_bytes,
        "holder_busy": read_s * reads_per_s,
    }


def simulated_state(rank: int) -> RankState:
    """A healthy rank's; those of this rank's host are this process, so that they are looked up."""
    here = rank < RANKS_PER_HOST
    host = rank // RANKS_PER_HOST
    return RankState(
        rank=rank,
        host=f"node-{host:04d}.cluster.internal",
        machine=machine() if here else f"node-{host:04d} {machine()}",
        pid=os.getpid(),
        heartbeat=1234,
        position=(118, 1, 4),
        paused=None,
        ended=None,
        store_released=False,
        verdict=None,
    )


def default_poll_s(num_ranks: int) -> float:
    return ProgressWatch(
        rank=0, world_size=num_ranks, timeout_s=TIMEOUT_S, on_missing=lambda missing: None
    ).poll_s


def timed(function: Callable[[], Any]) -> float:
    """CPU seconds of all threads: the reader's and the holder's."""
    started_s = time.process_time()
    function()
    return time.process_time() - started_s


def as_text(found: dict[str, Any]) -> str:
    """The table in Markdown; each heading says how its column came about."""
    head = ["ranks", "seconds between polls", "first poll (measured)"]
    head += ["poll (measured)", "requests a second at the holder (calculated)"]
    head += ["states a second from the holder (calculated)", "MB/s from the holder (calculated)"]
    head += ["holder busy at most (calculated from measured reads)"]
    rows = [
        [row["ranks"], f"{row['poll_s']:g}"]
        + [f"{1e3 * row[key]:.1f} ms" for key in ("first_poll_s", "local_s")]
        + [f"{row[key]:,.0f}" for key in ("requests_per_s", "states_per_s")]
        + [f"{row['bytes_per_s'] / 1e6:.3g}", f"{row['holder_busy']:.1%}"]
        for row in found["watch"]
    ]
    note = f"timeout_s={TIMEOUT_S:g}; {os.cpu_count()} CPU cores, {found['date']}"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([*(f"| {' | '.join(map(str, line))} |" for line in lines), "", note])


def main(flags: Sequence[str] | None = None) -> None:
    """Prints the table, and writes the figures if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(flags)
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "watch": [measure_watch(number, arguments.rounds) for number in arguments.ranks],
    }
    print(as_text(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
