"""The memory floor: bytes that a step must read, and how near to it a measured speed-up comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Traffic:
    """Bytes that dense and sparse must read in one call, and the copy bandwidth measured in the same run.

    Attributes:
        dense_bytes: what the dense call reads.
        sparse_bytes: what the sparse call reads, routers included.
        bandwidth: bytes read and written a second by a large copy.
    """

    dense_bytes: float
    sparse_bytes: float
    bandwidth: float

    @property
    def floor_speedup(self) -> float:
        """Speed-up of a sparse call at the floor over a dense call at the floor."""
        return self.dense_bytes / self.sparse_bytes

    def row(self, dense_us: float, sparse_us: float) -> dict[str, Any]:
        """What a table's row says about two measured times in microseconds."""
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
