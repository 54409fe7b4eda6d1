"""What every benchmark needs: time by phase, peak memory, intervals, and the machine."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# 95% quantiles of Student's t by degrees of freedom, of one side and of two.
ONE_SIDED = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 9: 1.833}
TWO_SIDED = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 9: 2.262}


def now_s() -> float:
    """The clock, once a GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class PhaseClock:
    """Seconds by phase; time runs for the phase that was entered last."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._since_s = 0.0

    def enter(self, phase: str | None) -> None:
        """Time runs for `phase` from now on; for none with None."""
        moment_s = now_s()
        if self._phase is not None:
            passed_s = moment_s - self._since_s
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + passed_s
        self._phase, self._since_s = phase, moment_s


class PeakMemory:
    """The most memory that was in use since this was made, above what was in use then, in bytes.

    On a GPU what torch has allocated there; elsewhere the resident set of the process, which Linux
    alone can tell, so the peak is None on other systems.
    """

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
            return
        self._before = _status_bytes("VmRSS")
        if self._before is not None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def peak_bytes(self) -> int | None:
        if self._before is None:
            return None
        if self._cuda:
            import torch

            return torch.cuda.max_memory_allocated() - self._before
        peak = _status_bytes("VmHWM")
        return None if peak is None else peak - self._before


def _status_bytes(field: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def lower_bound(differences: list[float]) -> float:
    """The lower end of the one-sided 95% interval of the mean (t distribution)."""
    return statistics.mean(differences) - _standard_errors(differences, ONE_SIDED)


def half_width(values: list[float]) -> float:
    """Half the two-sided 95% interval of the mean (t distribution)."""
    return _standard_errors(values, TWO_SIDED)


def _standard_errors(values: list[float], quantiles: dict[int, float]) -> float:
    degrees = len(values) - 1
    # Between two entries the smaller number of degrees is the stricter one.
    quantile = quantiles[max(d for d in quantiles if d <= degrees)]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def fitted_exponent(sizes: Iterable[float], costs: Iterable[float]) -> float:
    """The b of cost = a x size^b, by least squares of the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope


def machine() -> dict[str, Any]:
    """Where and when a figure was measured."""
    import torch

    return {
        "machine": f"{_processor()}, {os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return platform.machine() if found is None else found[1]
