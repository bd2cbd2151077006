"""Modules that keep their settings in float32 whatever their weights are cast to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

FLOAT32 = ("tau", "theta_x", "theta_h", "column_norm_D", "row_norm_F")
"""Buffers that stay float32: half a precision would move settings, and norms are compared with them."""


class Float32Buffers(nn.Module):
    """Mixed into modules that hold buffers of ``FLOAT32``: casts of the module leave their values as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # half() and to(bfloat16) move every floating point buffer.
        before = {name: value for name in FLOAT32 if (value := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self
