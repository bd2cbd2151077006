"""The kernel of dense linear layers that read one token, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

linear = pytest.importorskip("torch_prunepath.csrc_triton.linear")
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, [1]), (50, [7]), (64, [33, 5, 9]), (1030, [40, 3]), (2500, [2])], ids=str
)
def test_linears(inputs: int, outputs: list[int], rows: bool, dtype: torch.dtype, device: str) -> None:
    x = random(1, inputs, dtype=dtype, device=device)
    weights = [random(N, inputs, dtype=dtype, device=device) / inputs**0.5 for N in outputs]
    weights = [weight.t() if rows else weight.t().contiguous() for weight in weights]
    biases = [random(N, dtype=dtype, device=device) if N % 2 else None for N in outputs]
    found = linear.linears(x, weights, biases)
    assert len(found) == len(outputs)
    for y, weight, bias in zip(found, weights, biases, strict=True):
        expected = x.double() @ weight.double() + (0 if bias is None else bias.double())
        assert y.dtype == dtype
        assert y.shape == expected.shape
        torch.testing.assert_close(y.double(), expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


def test_a_token_that_is_no_row_of_its_own(device: str) -> None:
    x = random(6, 4, dtype=torch.float32, device=device)[:, 1:2].t()
    weight = random(6, 5, dtype=torch.float32, device=device)
    torch.testing.assert_close(linear.linears(x, [weight], [None])[0], x @ weight)


def test_more_than_it_takes_is_refused(device: str) -> None:
    x, weight = random(2, 4, dtype=torch.float32, device=device), random(4, 4, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="one token"):
        linear.linears(x, [weight], [None])
    with pytest.raises(ValueError, match="at most 3 layers"):
        linear.linears(x[:1], [weight] * 4, [None] * 4)
