"""Selection rules of other methods, against their definitions in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_prunepath.baselines.rules import above_threshold, cumulative_share, near_largest, top_share

RULES = [top_share, above_threshold, near_largest, cumulative_share]
experts = st.integers(1, 40)
taus = st.floats(1e-6, 1.0)


def scores_of(E: int, seed: int, ties: bool = False) -> Tensor:
    scores = 3 * torch.randn(5, E, generator=torch.Generator().manual_seed(seed))
    return scores.round() if ties else scores


def outputs_of(rule, E: int, seed: int, ties: bool = False) -> Tensor:  # type: ignore[no-untyped-def]
    scores = scores_of(E, seed, ties)
    return scores.abs() if rule in (near_largest, cumulative_share) else scores


@settings(max_examples=60, deadline=None)
@given(E=experts, seed=st.integers(0, 1000), a=taus, b=taus, ties=st.booleans(), rule=st.sampled_from(RULES))
def test_a_larger_tau_drops_nothing_and_one_keeps_all(E, seed, a, b, ties, rule) -> None:  # type: ignore[no-untyped-def]
    outputs = outputs_of(rule, E, seed, ties)
    small, large = (rule(outputs, torch.tensor(tau)) for tau in sorted((a, b)))
    assert small.dtype == torch.bool and small.shape == outputs.shape
    assert bool((small <= large).all())
    assert bool(rule(outputs, torch.tensor(1.0)).all())


@settings(max_examples=60, deadline=None)
@given(E=st.integers(1, 3000), part=st.floats(0, 1), seed=st.integers(0, 1000), ties=st.booleans())
def test_top_share_picks_exactly_the_k_best(E: int, part: float, seed: int, ties: bool) -> None:
    k = max(1, round(part * E))
    scores = scores_of(E, seed, ties)
    mask = top_share(scores, torch.tensor(k / E))
    assert (mask.sum(-1) == k).all()
    for row, active in zip(scores.tolist(), mask.tolist(), strict=True):
        best = sorted(range(E), key=lambda e: (-row[e], e))[:k]
        assert [e for e in range(E) if active[e]] == sorted(best)


@settings(max_examples=60, deadline=None)
@given(E=experts, seed=st.integers(0, 1000), tau=st.floats(0.01, 0.99))
def test_above_threshold_is_the_sigmoid_s(E: int, seed: int, tau: float) -> None:
    scores = scores_of(E, seed)
    g = scores.double().sigmoid()
    mask = above_threshold(scores, torch.tensor(tau))
    sure = (g - (1 - tau)).abs() > 1e-5
    assert torch.equal(mask[sure], (g > 1 - tau)[sure])


def test_half_is_the_published_threshold_of_lte_to_the_last_bit() -> None:
    scores = torch.tensor([[-1e-30, 0.0, 1e-30, -100.0, 100.0]])
    assert above_threshold(scores, torch.tensor(0.5)).tolist() == [[False, False, True, False, True]]
    assert not above_threshold(scores, torch.tensor(1e-30))[0, :4].any(), "no expert at all is a possible outcome"


@settings(max_examples=60, deadline=None)
@given(E=experts, seed=st.integers(0, 1000), tau=st.floats(0.01, 0.99))
def test_near_largest_is_the_paper_s_rule(E: int, seed: int, tau: float) -> None:
    norms = scores_of(E, seed).abs()
    mask = near_largest(norms, torch.tensor(tau))
    relative = norms / norms.amax(-1, keepdim=True)
    sure = (relative - (1 - tau)).abs() > 1e-5
    assert torch.equal(mask[sure], (relative >= 1 - tau)[sure])
    assert mask.gather(1, norms.argmax(-1, keepdim=True)).all()


@settings(max_examples=60, deadline=None)
@given(E=experts, seed=st.integers(0, 1000), tau=st.floats(0.01, 0.99))
def test_cumulative_share_includes_the_expert_that_crosses(E: int, seed: int, tau: float) -> None:
    norms = scores_of(E, seed).abs()
    mask = cumulative_share(norms, torch.tensor(tau))
    for row, active in zip(norms.double().tolist(), mask.tolist(), strict=True):
        held = [n / sum(row) for n, a in zip(row, active, strict=True) if a]
        assert sum(held) > tau - 1e-5 and sum(held) - min(held) < tau + 1e-5
        rest = [n / sum(row) for n, a in zip(row, active, strict=True) if not a]
        assert max(rest, default=0.0) <= min(held)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_a_number_shows(rule) -> None:  # type: ignore[no-untyped-def]
    outputs = torch.tensor([[1.0, math.nan, 2.0, 0.5]])
    assert rule(outputs, torch.tensor(0.4))[0, 1]
