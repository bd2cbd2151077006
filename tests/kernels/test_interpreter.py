"""The premise of every other kernel test: kernels run here, and masked loads and stores stay inside their bounds."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def _double(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    x = tl.load(x_ptr + offsets, mask=inside, other=float("nan"))
    tl.store(y_ptr + offsets, 2.0 * x, mask=inside)


@pytest.mark.parametrize("size", [1, 31, 64, 97])
def test_masked_kernel_writes_inside_its_bounds_only(device: str, size: int) -> None:
    x = torch.randn(size, device=device)
    y = torch.full((size + 32,), float("nan"), device=device)
    _double[(triton.cdiv(size, 32),)](x, y, size, BLOCK=32)
    torch.testing.assert_close(y[:size], 2.0 * x, rtol=0, atol=0)
    assert y[size:].isnan().all()
