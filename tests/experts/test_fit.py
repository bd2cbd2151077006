"""Routers: precision, initialisations, and the fit against what it minimises."""

from __future__ import annotations

import pytest
import torch

from torch_prunepath.config import FFNSpec
from torch_prunepath.experts.fit import centroid_init, contribution_shares, fit_router
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.router import Router
from torch_prunepath.ops.experts import expert_sums


class MLP(torch.nn.Module):
    def __init__(self, D: int = 12, F: int = 37) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(D, F)
        self.up = torch.nn.Linear(D, F)
        self.down = torch.nn.Linear(F, D)


def view(D: int = 12, F: int = 37) -> FFNView:
    torch.manual_seed(0)
    return FFNView(MLP(D, F), FFNSpec("", "up", "down", "silu", D, F, gate="gate"))


def cross_entropy(x, shares, weight, bias):  # type: ignore[no-untyped-def]
    return -(shares * torch.log_softmax(x @ weight.t() + bias, -1)).sum(-1).mean()


def test_computes_in_float32_whatever_it_is_stored_in() -> None:
    torch.manual_seed(0)
    router = Router(64, 9).bfloat16()
    x = torch.randn(5, 64).bfloat16()
    expected = x.double() @ router.weight.double().t() + router.bias.double()
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            scores = router(x)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("S", [1, 5, 8, 37, 50])
def test_expert_sums(S: int) -> None:
    values = torch.randn(3, 37)
    expected = torch.stack([part.sum(-1) for part in values.split(S, dim=-1)], -1)
    torch.testing.assert_close(expert_sums(values, S), expected)


@pytest.mark.parametrize("S", [1, 5, 8])
def test_shares_are_norms_of_the_experts_outputs(S: int) -> None:
    v = view()
    h = torch.randn(6, 37)
    outputs = torch.stack([h[:, i : i + S] @ v.down_FD[i : i + S] for i in range(0, 37, S)], 1)
    norms = outputs.norm(dim=-1)
    torch.testing.assert_close(contribution_shares(h, v.down_FD, S), norms / norms.sum(-1, keepdim=True))
    others = norms[:, 2:]
    torch.testing.assert_close(contribution_shares(h, v.down_FD, S, 2), others / others.sum(-1, keepdim=True))
    assert torch.equal(contribution_shares(h * 0, v.down_FD, S), torch.zeros_like(norms)), "no output, no share, no NaN"


def test_centroids_are_means_of_unit_rows() -> None:
    v = view()
    order = torch.randperm(37)
    unit = torch.nn.functional.normalize(v.gate_FD, dim=-1)[order]  # type: ignore[arg-type]
    expected = torch.stack([part.mean(0) for part in unit.split(8)])
    torch.testing.assert_close(centroid_init(v, order, 8), expected)


def test_fit_recovers_a_linear_teacher() -> None:
    torch.manual_seed(0)
    scales = torch.logspace(-2, 1, 12)  # badly conditioned, off-centre
    x = (torch.randn(4000, 12) + 1.0) * scales
    weight, bias = torch.randn(9, 12) / scales / 3, torch.randn(9)
    shares = torch.softmax(x @ weight.t() + bias, -1)
    best = cross_entropy(x, shares, weight, bias)
    found = cross_entropy(x, shares, *fit_router(x, shares, iterations=200, ridge=1e-9))
    constant = cross_entropy(x, shares, torch.zeros(9, 12), shares.mean(0).log())
    assert found - best < 1e-2 * (constant - best)


def test_fit_never_ends_above_the_constant_router() -> None:
    torch.manual_seed(0)
    x, shares = torch.randn(500, 12), torch.softmax(torch.randn(500, 9), -1)
    constant = cross_entropy(x, shares, torch.zeros(9, 12), shares.mean(0).log())
    assert cross_entropy(x, shares, *fit_router(x, shares)) < constant


@pytest.mark.parametrize("N", [1, 3])
def test_fit_survives_fewer_tokens_than_features(N: int) -> None:
    weight, bias = fit_router(torch.randn(N, 12), torch.full((N, 9), 1 / 9))
    assert weight.isfinite().all() and bias.isfinite().all() and weight.shape == (9, 12)


def test_fit_on_constant_inputs() -> None:
    weight, bias = fit_router(torch.zeros(10, 12), torch.full((10, 9), 1 / 9))
    assert weight.isfinite().all() and bias.isfinite().all()
