"""The kernel of distillation, against torch's divergence and gradient in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as nnf

kernels = pytest.importorskip("torch_prunepath.csrc_triton.divergence")
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of gradients; the loss is float32 whatever they are."""


def logits(tokens: int, vocabulary: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(tokens, vocabulary, generator=generator)).to(device, dtype)


def shares(tokens: int, device: str) -> Tensor:
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
    weights[1::3] = 0
    return (weights / weights.sum()).to(device)


def exact(student: Tensor, teacher: Tensor, share: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student = student.double().requires_grad_()
    log_p, log_q = ((x.double() / temperature).log_softmax(-1) for x in (student, teacher))
    divergence_T = nnf.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    loss = temperature**2 * (divergence_T * share.double()).sum()
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (7, 33), (4, 4096), (3, 5001), (2, 12289)])
def test_loss_and_gradient(tokens: int, vocabulary: int, temperature: float, dtype: torch.dtype, device: str) -> None:
    student, teacher = (logits(tokens, vocabulary, seed, dtype, device) for seed in (0, 1))
    share = shares(tokens, device)
    loss, grad = kernels.divergence(student, teacher, share, temperature, True)
    expected, expected_grad = exact(student, teacher, share, temperature)
    assert (loss.dtype, loss.shape, grad.dtype) == (torch.float32, (), dtype)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    scale = max(float(expected_grad.abs().max()), 1e-6)
    torch.testing.assert_close(grad.double() / scale, expected_grad / scale, rtol=0, atol=BOUNDS[dtype])
    assert torch.equal(kernels.divergence(student, teacher, share, temperature, False)[0], loss)


@settings(deadline=None, max_examples=60)
@given(
    vocabulary=st.integers(1, 70),
    offset=st.sampled_from([-1e4, 0.0, 1e4]),
    spread=st.floats(0.0, 80.0),
    seed=st.integers(0, 5),
)
def test_large_logits_do_not_overflow(vocabulary: int, offset: float, spread: float, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (spread * logits(2, vocabulary, seed + i, torch.float32, device) + offset for i in (0, 1))
    share = torch.ones(2, device=device)
    loss, grad = kernels.divergence(student, teacher, share, 1.0, True)
    expected, expected_grad = exact(student, teacher, share, 1.0)
    # Beside 1e4 float32 has steps of 1e-3, but the logits of a token have 1e4 in common.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=1e-5)


def test_strides_and_what_lies_behind(device: str) -> None:
    wide = logits(5, 80, 3, torch.float32, device)
    student, teacher = wide[:, :66:2], wide.t()[:33, :5].t()
    share = shares(5, device)
    found = kernels.divergence(student, teacher, share, 1.0, True)
    apart = kernels.divergence(student.contiguous(), teacher.contiguous(), share, 1.0, True)
    assert all(torch.equal(a, b) for a, b in zip(found, apart, strict=True))


def test_no_tokens(device: str) -> None:
    loss, grad = kernels.divergence(*2 * (torch.empty(0, 9, device=device),), torch.empty(0, device=device), 1.0, True)
    assert float(loss) == 0 and grad.shape == (0, 9)


def test_what_is_not_finite_is_not_hidden(device: str) -> None:
    student = logits(2, 9, 0, torch.float32, device)
    student[0, 3] = float("nan")
    loss, _ = kernels.divergence(student, torch.zeros_like(student), torch.ones(2, device=device), 1.0, False)
    assert bool(loss.isnan())
