"""Timing of CUDA graphs and CPU calls, and measurements of copy bandwidth, cache size and peak memory.

The memory floor is the time that reading the bytes alone would take, see :class:`Traffic`.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

FEWEST_ROUNDS = 5
"""Smallest number of rounds, however long they take: with fewer, an inter-quartile range means nothing."""

MOST_ROUNDS = 500
"""Largest number of rounds, however short they are: more hardly change a median. A guess."""

CPU_COPY_BYTES = 256 << 20
"""Size of the copy that measures bandwidth on CPUs: larger than most caches, and done quickly."""

CUDA_COPY_BYTES = 1 << 30
"""Size of the copy that measures bandwidth on CUDA devices: larger than on CPUs because the devices are faster."""

COVER_BYTES = 512 << 20
"""Bytes that are summed before each timed CUDA call. While the device is busy with the sum, the host queues the call.
The sum also clears the cache, and as it only reads, the timed call need not write anything back. The size is a guess.
"""


@dataclass(frozen=True)
class Timing:
    """Time of one call in microseconds: median, minimum and inter-quartile range over the rounds."""

    median_us: float
    min_us: float
    iqr_us: float
    rounds: int

    @classmethod
    def of(cls, samples_us: Sequence[float], calls: int) -> Timing:
        """Compute the timing from the times of rounds that make ``calls`` calls each."""
        each = sorted(sample / calls for sample in samples_us)
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
        return cls(statistics.median(each), each[0], high - low, len(each))


def timed(
    runs: Mapping[str, Call],
    device: torch.device,
    *,
    calls: int,
    seconds: float,
    before: Call | None = None,
) -> dict[str, Timing]:
    """Time several runs in turn, so that a drifting clock rate affects all of them alike.

    Args:
        runs: the runs by name; each makes ``calls`` calls. On CUDA they should be graph replays.
        device: the device on which they run.
        calls: number of calls that a run makes.
        seconds: about how long to time each run; at least ``FEWEST_ROUNDS`` rounds are timed.
        before: a function that is called before every run and not timed.
    """
    clock = _cuda_rounds if device.type == "cuda" else _cpu_rounds
    with torch.no_grad():
        once = sum(sum(samples) for samples in clock(runs, 2, before).values()) / 2 / 1e6
        rounds = int(seconds * len(runs) / max(once, 1e-6))
        samples = clock(runs, min(MOST_ROUNDS, max(FEWEST_ROUNDS, rounds)), before)
    return {name: Timing.of(values, calls) for name, values in samples.items()}


def _cpu_rounds(runs: Mapping[str, Call], rounds: int, before: Call | None) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if before is not None:
                before()
            start = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - start) * 1e6)
    return samples


def _cuda_rounds(runs: Mapping[str, Call], rounds: int, before: Call | None) -> dict[str, list[float]]:
    cover = torch.zeros(COVER_BYTES // 4, device="cuda")
    total = torch.zeros((), device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    torch.cuda.synchronize()
    for _ in range(rounds):
        for name, run in runs.items():
            if before is not None:
                before()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.sum(cover, dim=0, out=total)
            start.record()
            run()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(stop) * 1e3 for start, stop in pairs] for name, pairs in events.items()}


class Captured:
    """A call recorded as a CUDA graph. Calling it replays the graph and returns the recorded call's own output.

    Args:
        call: a function on tensors that stay where they are; it is called four times, the last time under capture.
        before: a function that is called before each of these calls, outside the graph.
    """

    def __init__(self, call: Call, before: Call | None = None) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                if before is not None:
                    before()
                call()
        torch.cuda.current_stream().wait_stream(side)
        if before is not None:
            before()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = call()

    def __call__(self) -> Any:
        """Replay the graph, and return the recorded call's output."""
        self._graph.replay()
        return self._output


def ready(call: Call, device: torch.device) -> Call:
    """Return the call as it is timed: recorded as a CUDA graph on CUDA, unchanged on CPU."""
    return Captured(call) if device.type == "cuda" else call


@dataclass(frozen=True)
class Traffic:
    """Bytes that a dense and a sparse call must read, and the copy bandwidth measured in the same run.

    Attributes:
        dense_bytes: bytes that the dense call reads.
        sparse_bytes: bytes that the sparse call reads, routers included.
        bandwidth: bytes that a large copy reads and writes in a second.
    """

    dense_bytes: float
    sparse_bytes: float
    bandwidth: float

    @property
    def floor_speedup(self) -> float:
        """Speed-up of sparse over dense if both calls took only the time that reading their bytes takes."""
        return self.dense_bytes / self.sparse_bytes

    def row(self, dense_us: float, sparse_us: float) -> dict[str, Any]:
        """Return the columns of a row that compare two measured times, in microseconds, with the memory floor."""
        speedup = dense_us / sparse_us
        dense_rate, sparse_rate = self.dense_bytes / dense_us * 1e6, self.sparse_bytes / sparse_us * 1e6
        return {
            "dense_us": dense_us,
            "sparse_us": sparse_us,
            "speedup": speedup,
            "floor_speedup": self.floor_speedup,
            "kappa": speedup / self.floor_speedup,
            "floor_us": self.sparse_bytes / self.bandwidth * 1e6,
            "dense_bytes": round(self.dense_bytes),
            "sparse_bytes": round(self.sparse_bytes),
            "dense_bytes_per_s": dense_rate,
            "sparse_bytes_per_s": sparse_rate,
            "dense_bandwidth_share": dense_rate / self.bandwidth,
            "sparse_bandwidth_share": sparse_rate / self.bandwidth,
        }


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes that a large copy reads and writes in a second, as the median of several."""
    size = CUDA_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    timing = timed({"copy": lambda: target.copy_(source)}, device, calls=1, seconds=0.3)["copy"]
    return 2 * size / timing.median_us * 1e6


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory: L2 on CUDA, the largest that the system lists on CPU.

    If the system lists none, it is 32 MiB, a guess.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on the device; 4 GiB, a guess, where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 4 << 30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """Peak memory of a block in bytes, and how much more that is than at its start; see :func:`peak_memory`.

    Both are None until the block has ended, and where the system does not tell.
    """

    bytes: int | None = None
    growth: int | None = None

    def row(self) -> dict[str, int | None]:
        """Return the columns of a row that are about memory."""
        return {"peak_bytes": self.bytes, "peak_growth_bytes": self.growth}


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of a block, including weights and everything else from before it.

    On CUDA it is the largest memory of all tensors; on CPU, the process's largest resident memory, which only Linux
    tells.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.bytes = torch.cuda.max_memory_allocated()
        peak.growth = peak.bytes - start
        return
    resident = _restart_high_water()
    yield peak
    if resident is not None:
        peak.bytes = _status_bytes("VmHWM")
        peak.growth = max(0, peak.bytes - resident)


def _restart_high_water() -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
