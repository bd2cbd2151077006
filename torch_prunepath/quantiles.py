"""Quantiles: thresholds under which a given share of measured magnitudes lies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

POINTS = 2048
"""Largest number of intervals of equal share in the table of a distribution. A guess."""
VALUES = 1 << 22
"""Largest number of magnitudes that are sorted; of more, an even sample is taken. A guess."""


class Quantiles:
    """A distribution of magnitudes as a table of quantiles.

    Args:
        values: values of any shape, not empty; their absolute values count.
    """

    def __init__(self, values: Tensor) -> None:
        flat = values.detach().reshape(-1)
        # An odd step, so that the sample does not stay on a few columns of a matrix.
        flat = flat[:: -(-flat.numel() // VALUES) | 1].abs().float()
        points = max(1, min(POINTS, flat.numel() - 1))
        places = torch.linspace(0, flat.numel() - 1, points + 1, dtype=torch.float64).round().long()
        self.table: list[float] = flat.sort().values[places.to(flat.device)].tolist()

    def threshold(self, share: float) -> float:
        """Return the magnitude under which this share of the values lies: 0 for the share 0, infinity for 1."""
        if share <= 0.0:
            return 0.0
        if share >= 1.0:
            return math.inf
        place = share * (len(self.table) - 1)
        below = int(place)
        low, high = self.table[below], self.table[below + 1]
        return low + (place - below) * (high - low)


class Sample:
    """An even sample of magnitudes that arrive part by part, at most ``most`` of them; it synchronises with the device.

    Args:
        most: largest number of values that are kept.
    """

    def __init__(self, most: int = VALUES) -> None:
        self._most, self._rate = most, 1.0
        self._parts: list[Tensor] = []
        self._generator: torch.Generator | None = None

    def add(self, values: Tensor) -> None:
        """Take in values of any shape."""
        flat = values.detach().reshape(-1).abs().float()
        self._parts.append(flat if self._rate == 1.0 else self._some(flat, self._rate))
        while sum(part.numel() for part in self._parts) > self._most:
            self._parts = [self._some(torch.cat(self._parts), 0.5)]
            self._rate /= 2

    def _some(self, flat: Tensor, share: float) -> Tensor:
        """A random share: an even step would stay on a few columns of a matrix, or on the same places of each text."""
        if self._generator is None:
            self._generator = torch.Generator(flat.device).manual_seed(0)
        return flat[torch.rand(flat.shape, generator=self._generator, device=flat.device) < share]

    def quantiles(self) -> Quantiles | None:
        """The distribution of what came in; None if nothing did."""
        flat = torch.cat(self._parts) if self._parts else None
        return Quantiles(flat) if flat is not None and flat.numel() else None
