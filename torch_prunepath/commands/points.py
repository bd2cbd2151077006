"""Where a command measures a model: at a tau, at a sparsity, or at a share of bytes. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch_prunepath.config import check_bytes, check_sparsity, check_tau


@dataclass(frozen=True)
class Point:
    """One place, of which one number is given.

    Attributes:
        tau: tau of the model.
        sparsity: the sparsity that is reached on the calibration text by finding a tau.
        bytes: the share of the FFNs' bytes that is read on the calibration text, by tau and thresholds of each layer.
    """

    tau: float | None = None
    sparsity: float | None = None
    bytes: float | None = None

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self._kind} {self.asked:g}"

    @property
    def asked(self) -> float:
        """The number that was given."""
        return float(getattr(self, self._kind))

    @property
    def dense(self) -> bool:
        """Whether everything is read there."""
        return self.tau == 1.0 or self.sparsity == 0.0 or self.bytes == 1.0

    @property
    def _kind(self) -> str:
        return next(kind for kind in ("bytes", "sparsity", "tau") if getattr(self, kind) is not None)


def at_taus(taus: Iterable[float]) -> list[Point]:
    """Points from dense to sparse, once each.

    Raises:
        ValueError: if a tau is not in (0, 1].
    """
    return [Point(tau=tau) for tau in sorted({check_tau(tau) for tau in taus}, reverse=True)]


def at_sparsities(sparsities: Iterable[float]) -> list[Point]:
    """Points from dense to sparse, once each.

    Raises:
        ValueError: if a sparsity is not in [0, 1).
    """
    return [Point(sparsity=share) for share in sorted({check_sparsity(share) for share in sparsities})]


def at_bytes(shares: Iterable[float]) -> list[Point]:
    """Points from dense to sparse, once each.

    Raises:
        ValueError: if a share of bytes is not in (0, 1].
    """
    return [Point(bytes=share) for share in sorted({check_bytes(share) for share in shares}, reverse=True)]
