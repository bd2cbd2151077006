"""A module that keeps tau in float32 whatever its weights are cast to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Float32Tau(nn.Module):
    """Mixed into modules that hold a buffer ``tau``, 0-d float32: casts of the module leave its value as it is."""

    tau: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # half() and to(bfloat16) move every floating point buffer.
        tau = self.tau
        super()._apply(fn, recurse)
        if self.tau.dtype != tau.dtype:
            self.tau = tau.to(self.tau.device)
        return self
