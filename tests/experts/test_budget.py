"""Budgets: Fisher information against its definition, costs against brute force, allocation against its optimum."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from architectures import ARCHITECTURES

from torch_prunepath.discover import find_ffns
from torch_prunepath.experts.budget import GIVEN_UP, allocate, cost_curve, fisher_information
from torch_prunepath.inputs.data import as_inputs
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.select import select_experts
from torch_prunepath.sparsity import layer_tau


def test_fisher_predicts_the_divergence_of_a_perturbation() -> None:
    """1/2 delta^T F delta is the mean KL divergence that a small constant shift of an FFN's output causes."""
    model, _ = ARCHITECTURES["llama"]()
    model = model.double().eval()
    ids = torch.randint(3, 90, (256, 1), generator=torch.Generator().manual_seed(0))
    views = [FFNView(model, spec) for spec in find_ffns(model)]
    fisher = fisher_information(model, views, as_inputs(ids, model), progress=False)
    view = views[-1]  # nothing but the norm and the head follows
    delta = torch.randn(view.spec.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e-3
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        handle = view.down.register_forward_hook(lambda m, a, y: y + delta)
        after = model(ids).logits.log_softmax(-1)
        handle.remove()
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    predicted = float(0.5 * delta @ fisher[view.site].double() @ delta)
    assert predicted == pytest.approx(divergence, rel=0.25), "labels are sampled: equal up to their noise"


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "t5_gated", "vit"])
def test_fisher_is_symmetric_positive_and_leaves_nothing(name: str) -> None:
    model, inputs = ARCHITECTURES[name]()
    model.requires_grad_(name != "llama")  # frozen models, too
    views = [FFNView(model, spec) for spec in find_ffns(model)]
    fisher = fisher_information(model, views, as_inputs(inputs, model), progress=False)
    for view in views:
        matrix = fisher[view.site]
        torch.testing.assert_close(matrix, matrix.t())
        assert torch.linalg.eigvalsh(matrix.double()).min() > -1e-6 * matrix.trace() and matrix.trace() > 0
        assert not view.down._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    again = fisher_information(model, views, as_inputs(inputs, model), progress=False)
    assert all(torch.equal(fisher[site], again[site]) for site in fisher), "seeded"


def test_cost_curve_is_the_quadratic_form_of_what_is_dropped() -> None:
    torch.manual_seed(0)
    N, F, D, S = 11, 37, 6, 8
    h, down, scores = torch.randn(N, F), torch.randn(F, D), torch.randn(N, 5)
    root = torch.randn(D, D)
    fisher = root @ root.t()
    curve = cost_curve(h, down, scores, fisher, S, "reach")
    assert len(curve) == len(GIVEN_UP)
    for given_up, (sparsity, cost) in zip(GIVEN_UP, curve, strict=True):
        active = select_experts(scores, 1 - given_up).repeat_interleave(S, 1)[:, :F]
        delta = (h * ~active) @ down
        assert sparsity == pytest.approx(1 - float(active.float().mean()))
        roots = (0.5 * (delta @ root).square().sum(-1)).sqrt()
        assert cost == pytest.approx(float(roots.mean() ** 2), rel=1e-4, abs=1e-6)


def curve(scale: float, power: float = 2.0) -> list[tuple[float, float]]:
    """A layer that is u^0.7 sparse at 1 - tau = u, at a cost of scale * sparsity^power."""
    return [(u**0.7, scale * (u**0.7) ** power) for u in GIVEN_UP]


def test_equal_layers_get_equal_budgets() -> None:
    budgets = allocate({"a": curve(1.0), "b": curve(1.0)})
    assert budgets["a"] == pytest.approx(1.0) and budgets["b"] == pytest.approx(1.0)


def test_sensitive_layers_are_protected_and_the_split_is_nearly_optimal() -> None:
    scales = {"a": 1.0, "b": 4.0, "c": 10.0}
    budgets = allocate({name: curve(scale) for name, scale in scales.items()}, sparsity=0.3)
    assert budgets["a"] < budgets["b"] < budgets["c"]
    assert sum(budgets.values()) / 3 == pytest.approx(1.0)

    def outcome(split: dict[str, float], tau: float) -> tuple[float, float]:
        given = {name: (1 - layer_tau(tau, b)) ** 0.7 for name, b in split.items()}
        return sum(given.values()) / 3, sum(scales[name] * s**2 for name, s in given.items())

    def cost_at(split: dict[str, float]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            tau = (low + high) / 2
            low, high = (tau, high) if outcome(split, tau)[0] > 0.3 else (low, tau)
        return outcome(split, low)[1]

    # Minimising sum k_i s_i^2 at a given mean: s_i proportional to 1 / k_i.
    inverse = {name: 1 / scale for name, scale in scales.items()}
    best = sum(scales[name] * (0.9 * w / sum(inverse.values())) ** 2 for name, w in inverse.items())
    assert cost_at(budgets) < 1.03 * best
    assert cost_at(dict.fromkeys(scales, 1.0)) > 1.4 * best


@pytest.mark.parametrize("flat", [0.0, 1.0])
def test_degenerate_curves_give_finite_positive_budgets(flat: float) -> None:
    curves = {"dead": [(flat, 0.0)] * len(GIVEN_UP), "steep": curve(1e6), "odd": curve(1.0)[::-1]}
    budgets = allocate(curves)
    assert all(math.isfinite(b) and b > 0 for b in budgets.values())
    taus = [layer_tau(t / 50, b) for b in budgets.values() for t in range(1, 51)]
    assert all(0 < tau <= 1 for tau in taus)
    assert all(a <= b for a, b in itertools.pairwise(taus[:50]))
