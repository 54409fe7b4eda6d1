"""Speed of the audit's checksum against bare xxh3, SHA-1 and torch.hash_tensor.

    python recipes/bench/checksum_speed.py [--rounds 9] [--json FILE]

Candidates take turns, so that a change in the machine's load meets them all; each runs twice in its
turn and the second run counts. The checksum and xxh3 alternate by themselves: SHA-1's and
hash_tensor's temporary copies empty the caches for whoever comes next.
Speeds are bytes of the bfloat16 tensors over seconds, on one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from trl_sync.audit.digest import Digester

LARGE_MIB = (4, 16, 64)
SMALL_BYTES = (64, 4096)
NUM_SMALL = 500
GPU_TENSOR_MIB = (1, 4, 16, 64, 256)
GPU_TENSORS_OF_A_SIZE = 4


def main() -> None:
    """Prints the table, and writes the figures if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "large": [measure_large(size_mib, arguments.rounds) for size_mib in LARGE_MIB],
        "small": [measure_small(size_bytes, arguments.rounds) for size_bytes in SMALL_BYTES],
        "gpu": measure_gpu(arguments.rounds) if torch.cuda.is_available() else None,
    }
    print(as_text(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def measure_large(size_mib: int, rounds: int) -> dict[str, Any]:
    """Seconds for one tensor of `size_mib` MiB, median and best, by candidate."""
    tensor = torch.randn(size_mib << 19).to(torch.bfloat16)
    ready = tensor.view(torch.int16).numpy()
    digester = Digester()
    candidates = {
        "trl_sync": lambda: digester.start([tensor]).result(),
        "xxh3": lambda: xxhash.xxh3_128_digest(ready),
    }
    others = {
        "sha1_of_float32": lambda: sha1_of_float32(tensor),
        "hash_tensor": lambda: torch.hash_tensor(tensor),
    }
    return {"size_mib": size_mib} | merge(alternate(candidates, rounds), alternate(others, rounds))


def measure_small(size_bytes: int, rounds: int) -> dict[str, Any]:
    """Seconds for one tensor in a list of small ones, median and best, by candidate."""
    tensors = [torch.randn(size_bytes // 2).to(torch.bfloat16) for _ in range(NUM_SMALL)]
    ready = [tensor.view(torch.int16).numpy() for tensor in tensors]
    digester = Digester()
    candidates = {
        "trl_sync": lambda: digester.start(tensors).result(),
        "xxh3": lambda: [xxhash.xxh3_128_digest(view) for view in ready],
    }
    others = {
        "sha1_of_float32": lambda: [sha1_of_float32(tensor) for tensor in tensors],
        "hash_tensor": lambda: [torch.hash_tensor(tensor) for tensor in tensors],
    }
    return {"size_bytes": size_bytes} | merge(
        alternate(candidates, rounds, NUM_SMALL), alternate(others, rounds, NUM_SMALL)
    )


def sha1_of_float32(tensor: Tensor) -> bytes:
    """What Megatron-LM compares between replicas: SHA-1 over a float32 copy on the host."""
    return hashlib.sha1(tensor.cpu().float().numpy().data).digest()


def measure_gpu(rounds: int) -> dict[str, Any]:
    """Seconds to hash and to copy the same tensors on the device, by its own clock."""
    tensors = [
        torch.randn(size_mib << 19, device="cuda").to(torch.bfloat16)
        for size_mib in GPU_TENSOR_MIB
        for _ in range(GPU_TENSORS_OF_A_SIZE)
    ]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    digester = Digester()
    candidates = {
        "trl_sync": lambda: digester.start(tensors),
        "copy": lambda: torch._foreach_copy_(copies, tensors),
    }
    size_bytes = sum(tensor.nbytes for tensor in tensors)
    name = torch.cuda.get_device_name()
    return {"device": name, "size_bytes": size_bytes} | alternate(candidates, rounds, on_gpu=True)


def alternate(
    candidates: dict[str, Callable[[], Any]], rounds: int, divisor: int = 1, *, on_gpu: bool = False
) -> dict[str, Any]:
    """`{"median_s": {name: seconds}, "best_s": {name: seconds}}`, each divided by `divisor`."""
    clock = device_seconds if on_gpu else host_seconds
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            run()
            taken[name].append(clock(run) / divisor)
    return {
        "median_s": {name: statistics.median(times) for name, times in taken.items()},
        "best_s": {name: min(times) for name, times in taken.items()},
    }


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The figures of two sets of candidates side by side."""
    return {key: first[key] | second[key] for key in first}


def host_seconds(run: Callable[[], Any]) -> float:
    """Seconds that `run` took."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def device_seconds(run: Callable[[], Any]) -> float:
    """Seconds between two events of the current stream around what `run` launches."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


def as_text(found: dict[str, Any]) -> str:
    """The medians as a table, and what they say about the targets."""
    names = list(found["large"][0]["median_s"])
    lines = [f"{'one CPU thread, medians':26}" + "".join(f"{name:>18}" for name in names)]
    for row in found["large"]:
        speeds = [(row["size_mib"] << 20) / row["median_s"][name] / 1e9 for name in names]
        cells = "".join(f"{speed:>13.2f} GB/s" for speed in speeds)
        lines.append(
            f"{row['size_mib']:>5} MiB{'':17}{cells}   {speeds[0] / speeds[1]:.0%} of xxh3"
        )
    for row in found["small"]:
        times_us = [row["median_s"][name] * 1e6 for name in names]
        cells = "".join(f"{time_us:>15.2f} us" for time_us in times_us)
        above_us = times_us[0] - times_us[1]
        lines.append(f"{row['size_bytes']:>5} B{'':19}{cells}   {above_us:.2f} us above xxh3")
    gpu = found["gpu"]
    if gpu is None:
        return "\n".join([*lines, "GPU speed: not measured, there is no GPU here."])
    hashed, copied = (
        gpu["size_bytes"] / gpu["median_s"][name] / 1e9 for name in ("trl_sync", "copy")
    )
    lines.append(
        f"{gpu['device']}: {gpu['size_bytes'] >> 20} MiB hashed at {hashed:.0f} GB/s, copied at "
        f"{copied:.0f} GB/s (bytes copied; each is read and written): {hashed / copied:.0%}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
