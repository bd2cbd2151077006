"""Training losses against slow references, their gradients, and what padding must not change."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.train import losses

T, E, V = 7, 5, 11


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


WEIGHTS = torch.tensor([1.0, 1, 0, 1, 0, 1, 1], dtype=torch.float64)
SHARES = draws(T, E, seed=1).softmax(-1)


def slow_entropy(scores: Tensor, weight: Tensor) -> float:
    total = 0.0
    for t in range(T):
        p = [math.exp(float(z)) for z in scores[t]]
        total -= float(weight[t]) * sum(q / sum(p) * math.log(q / sum(p)) for q in p)
    return total / float(weight.sum())


def slow_load_balance(scores: Tensor, weight: Tensor) -> float:
    p = scores.softmax(-1)
    means = [sum(float(weight[t] * p[t, e]) for t in range(T)) / float(weight.sum()) for e in range(E)]
    return E * sum(mean**2 for mean in means)


def slow_separation(scores: Tensor, weight: Tensor) -> float:
    total = 0.0
    for t in range(T):
        for z in scores[t]:
            g = 1 / (1 + math.exp(-float(z)))
            total += float(weight[t]) * (2.0 * g**2 + 0.5 / ((g - 0.5) ** 2 + 1e-6))
    return total / float(weight.sum()) / E


def slow_fit(scores: Tensor, weight: Tensor) -> float:
    terms = [nnf.cross_entropy(scores[t], SHARES[t]) * weight[t] for t in range(T)]
    return float(sum(terms) / weight.sum())


ON_SCORES = {
    "entropy": (losses.entropy, slow_entropy),
    "load_balance": (losses.load_balance, slow_load_balance),
    "separation": (lambda z, w: losses.lte_separation(z, w, eta=2.0), slow_separation),
    "fit": (lambda z, w: losses.contribution_fit(z, SHARES, w), slow_fit),
}


@pytest.mark.parametrize("name", ON_SCORES)
def test_losses_on_scores_are_what_they_are_defined_to_be(name: str) -> None:
    fast, slow = ON_SCORES[name]
    scores = draws(T, E)
    assert float(fast(scores, WEIGHTS)) == pytest.approx(slow(scores, WEIGHTS), rel=1e-9)
    ones = torch.ones(T, dtype=torch.float64)
    assert float(fast(scores, None)) == pytest.approx(slow(scores, ones), rel=1e-9)
    assert torch.autograd.gradcheck(lambda z: fast(z, WEIGHTS), (scores.requires_grad_(),))


def test_extremes_of_load_balance_and_entropy() -> None:
    alike, one = torch.zeros(T, E), 100 * nnf.one_hot(torch.zeros(T, dtype=torch.int64), E).float()
    assert float(losses.load_balance(alike)) == pytest.approx(1) and float(losses.load_balance(one)) == pytest.approx(E)
    assert float(losses.entropy(alike)) == pytest.approx(math.log(E)) and float(losses.entropy(one)) < 1e-6


def test_separation_is_finite_where_routers_start_at_zero() -> None:
    scores = torch.zeros(T, E, requires_grad=True)
    losses.lte_separation(scores).backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_of_logits_is_the_divergence(chunk: int, temperature: float) -> None:
    student, teacher = draws(T, V).requires_grad_(), draws(T, V, seed=1)
    loss = losses.distill_logits(student, teacher, WEIGHTS, temperature=temperature, chunk=chunk)
    log_p, q = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    divergence_T = nnf.kl_div(log_p, q, reduction="none").sum(-1)
    expected = temperature**2 * (divergence_T * WEIGHTS).sum() / WEIGHTS.sum()
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    grad = student.grad
    student.grad = None
    (3 * expected).backward()
    torch.testing.assert_close(grad, student.grad)


def test_distillation_of_logits_keeps_nothing_wide() -> None:
    student = draws(64, 50, dtype=torch.bfloat16).requires_grad_()
    teacher = draws(64, 50, seed=1, dtype=torch.bfloat16)
    loss = losses.distill_logits(student, teacher, chunk=16)
    exact = losses.distill_logits(student.detach().double(), teacher.double())
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(exact), rel=1e-5)
    loss.backward()
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
    assert loss.grad_fn.grad_TV.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_distillation_refuses_another_vocabulary() -> None:
    with pytest.raises(ValueError, match="same vocabulary"):
        losses.distill_logits(draws(T, V), draws(T, V + 1))


def test_distillation_refuses_another_device() -> None:
    with pytest.raises(ValueError, match="move the teacher"):
        losses.distill_logits(draws(T, V), draws(T, V).to("meta"))


def test_distillation_of_outputs_is_a_relative_squared_error() -> None:
    y, target = draws(T, 3).requires_grad_(), draws(T, 3, seed=1).requires_grad_()
    rows = WEIGHTS.bool()
    expected = (y - target)[rows].square().sum() / target[rows].square().sum()
    loss = losses.distill_ffn(y, target, WEIGHTS)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert target.grad is None and y.grad is not None and not bool(y.grad[~rows].any())


def test_nothing_counts() -> None:
    none = torch.zeros(T, dtype=torch.float64)
    scores = draws(T, E)
    for fast, _ in ON_SCORES.values():
        assert float(fast(scores, none)) == 0
    assert float(losses.distill_logits(scores, draws(T, E, seed=1), none)) == 0
    assert float(losses.distill_ffn(scores, draws(T, E, seed=1), none)) == 0
