"""Selection against its definition: properties, and a brute-force version in plain Python."""

from __future__ import annotations

import doctest
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_prunepath.layer.reference import select_reference
from torch_prunepath.select import mask_from_scores, select_experts

SLACK = 1e-5  # float32 sums may be taken in any order: experts this near to tau may differ

# Probabilities are equal, or further apart than float32 rounds: which of two nearly equal ones leads is left open.
scores_strategy = st.lists(st.integers(-30 << 16, 30 << 16).map(lambda i: i / 65536), min_size=1, max_size=40)
taus = st.floats(0.001, 0.9999)
rules = st.sampled_from(["reach", "below"])


def masses(scores: list[float]) -> tuple[list[int], list[float], list[float]]:
    """Order of rank, and mass before and through each expert, in float64."""
    p = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0).tolist()
    order = sorted(range(len(p)), key=lambda e: (-p[e], e))
    before, through, total = [0.0] * len(p), [0.0] * len(p), 0.0
    for e in order:
        before[e], total = total, total + p[e]
        through[e] = total
    return order, before, through


def select(scores: list[float], tau: float, rule: str = "reach", dtype: torch.dtype = torch.float32) -> list[bool]:
    return select_experts(torch.tensor([scores], dtype=dtype), tau, rule)[0].tolist()


@given(scores_strategy, taus, rules)
def test_equals_brute_force(scores: list[float], tau: float, rule: str) -> None:
    _, before, through = masses(scores)
    decides = before if rule == "reach" else through
    found, expected = select(scores, tau, rule), select_reference(scores, tau, rule)
    differing = [e for e in range(len(scores)) if found[e] != expected[e]]
    p32 = torch.softmax(torch.tensor(scores), 0)
    for e in differing:  # rounding may also swap experts that float32 cannot tell apart
        tied = sum(float(p32[e]) == float(q) for q in p32) > 1
        assert abs(decides[e] - tau) <= SLACK or tied


@given(scores_strategy, taus)
def test_kept_mass_reaches_tau_and_the_set_is_minimal(scores: list[float], tau: float) -> None:
    active = select(scores, tau)
    p = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
    kept = p[torch.tensor(active)]
    assert kept.sum() >= tau - SLACK
    assert kept.sum() - kept.min() < tau + SLACK
    dropped = p[~torch.tensor(active)]
    assert not len(dropped) or dropped.max() <= kept.min() + SLACK


@given(scores_strategy, taus, taus, rules)
def test_larger_tau_never_drops_an_expert(scores: list[float], a: float, b: float, rule: str) -> None:
    low, high = select(scores, min(a, b), rule), select(scores, max(a, b), rule)
    assert all(h or not lo for lo, h in zip(low, high, strict=True))


@given(scores_strategy, taus, rules)
def test_top_expert_is_always_active(scores: list[float], tau: float, rule: str) -> None:
    best = int(torch.softmax(torch.tensor(scores), 0).argmax())
    assert select(scores, tau, rule)[best]


@given(scores_strategy, rules)
def test_tau_one_is_everything(scores: list[float], rule: str) -> None:
    assert all(select(scores, 1.0, rule))


@given(st.lists(st.integers(-200, 200), min_size=1, max_size=30, unique=True), taus, st.randoms())
def test_permuting_experts_permutes_the_result(values: list[int], tau: float, random) -> None:  # type: ignore[no-untyped-def]
    scores = [v / 10 for v in values]
    order = list(range(len(scores)))
    random.shuffle(order)
    direct = select(scores, tau)
    permuted = select([scores[i] for i in order], tau)
    _, before, _ = masses(scores)
    p32 = torch.softmax(torch.tensor(scores), 0).tolist()
    for place, e in enumerate(order):
        if permuted[place] != direct[e]:
            assert abs(before[e] - tau) <= SLACK or p32.count(p32[e]) > 1


@pytest.mark.parametrize("rule", ["reach", "below"])
@pytest.mark.parametrize("tau", [0.25, 0.5, 0.75])
def test_ties_go_to_the_lower_index(rule: str, tau: float) -> None:
    active = select([1.0] * 8, tau, rule)
    count = round(tau * 8) - (1 if rule == "below" else 0)
    assert active == [e < count for e in range(8)]


def test_rules_differ_by_the_crossing_expert() -> None:
    scores = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert select(scores, 0.7) == [True, True, False, False]
    assert select(scores, 0.7, "below") == [True, False, False, False]


def test_extreme_scores() -> None:
    assert select([3e38, -3e38, 0.0], 0.99) == [True, False, False]
    assert select([-3e38, -3e38], 0.5) == [True, False]
    assert select([-200.0] * 3 + [-300.0], 0.999) == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes_are_compared_in_float32(dtype: torch.dtype) -> None:
    scores = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(select_experts(scores, 0.6), select_experts(scores.float(), 0.6))


def test_leading_dimensions_and_non_contiguous_scores() -> None:
    scores = torch.randn(9, 4, 3).permute(2, 1, 0)
    flat = select_experts(scores.reshape(-1, 9), 0.5)
    assert torch.equal(select_experts(scores, 0.5).reshape(-1, 9), flat)
    assert select_experts(torch.zeros(0, 5), 0.5).shape == (0, 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_scores_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        select_experts(torch.tensor([[0.0, bad]]), 0.5)


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.01, float("nan")])
def test_tau_outside_its_range_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        select_experts(torch.zeros(1, 2), tau)


def test_docstring_example() -> None:
    results = doctest.testmod(sys.modules[select_experts.__module__])
    assert results.attempted and not results.failed


def test_unknown_rule_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="rule='above' is not known"):
        select_experts(torch.zeros(1, 2), 0.5, "above")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="E >= 1"):
        select_experts(torch.zeros(1, 0), 0.5)
    with pytest.raises(ValueError, match="floating point"):
        select_experts(torch.zeros(1, 2, dtype=torch.int64), 0.5)


@pytest.mark.parametrize("rule", ["reach", "below"])
def test_nan_inside_a_model_activates_everything(rule: str) -> None:
    scores = torch.tensor([[0.0, float("nan"), 1.0], [5.0, 0.0, 0.0]])
    mask = mask_from_scores(scores, torch.tensor(0.5), rule)  # type: ignore[arg-type]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
