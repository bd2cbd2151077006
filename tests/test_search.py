"""Finding the setting that gives a sparsity: over any monotone function, and from router scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prunepath.search import (
    MEASUREMENTS,
    TAU,
    TOLERANCE,
    OutOfReach,
    find_setting,
    find_tau,
    logit,
    logit_of_share,
    sigmoid,
    tau_of_scores,
)
from torch_prunepath.select import mask_from_scores

Curve = Callable[[float], float]


def steps(cuts: list[float], values: list[float]) -> Curve:
    """A step function of tau as layers see it, in float32: from its last value near 0 down to 0 at tau = 1."""
    cuts32 = sorted({float(np.float32(sigmoid(cut))) for cut in cuts})
    values = sorted(values, reverse=True)

    def measure(tau: float) -> float:
        assert 0.0 < tau < 1.0, "tau = 1 needs no measurement"
        return values[min(sum(float(np.float32(tau)) >= cut for cut in cuts32), len(values) - 1)]

    return measure


# The range in which float32 tells tau from 1.
CUTS = st.lists(st.floats(-58.0, 16.0), min_size=1, max_size=12, unique=True)
SHARES = st.lists(st.floats(0.0, 1.0), min_size=13, max_size=13)


@settings(max_examples=400, deadline=None)
@given(CUTS, SHARES, st.floats(0.0, 0.999), st.floats(0.0005, 0.05))
def test_every_step_that_float32_tells_apart_is_found(
    cuts: list[float], shares: list[float], target: float, tolerance: float
) -> None:
    measure = steps(cuts, shares)
    reached = [0.0, *(measure(tau) for tau in plateaus(cuts))]
    asked: dict[float, float] = {}

    def watched(tau: float) -> float:
        check_inside_the_bracket(tau, asked, target)
        asked[tau] = measure(tau)
        return asked[tau]

    if max(reached) < target - tolerance:
        with pytest.raises(OutOfReach) as caught:
            find_tau(watched, target, tolerance=tolerance)
        assert caught.value.most == max(reached)
    else:
        tau = find_tau(watched, target, tolerance=tolerance)
        found = 0.0 if tau == 1.0 else measure(tau)
        assert abs(found - target) <= max(tolerance, min(abs(value - target) for value in reached))
    assert len(asked) <= MEASUREMENTS


def plateaus(cuts: list[float]) -> list[float]:
    """A float32 tau of each step of :func:`steps`."""
    cuts32 = sorted({np.float32(sigmoid(cut)) for cut in cuts})
    return [float(np.nextafter(cuts32[0], np.float32(0))), *map(float, cuts32)]


def check_inside_the_bracket(tau: float, asked: dict[float, float], target: float) -> None:
    assert tau not in asked, "measured twice"
    assert all(tau > other for other, value in asked.items() if value >= target)
    assert all(tau < other for other, value in asked.items() if value < target)


@pytest.mark.parametrize("bend", [0.3, 0.6, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("shift", [-6.0, -2.0, 0.0, 2.0, 6.0])
@pytest.mark.parametrize("target", [0.02, 0.1, 0.5, 0.9, 0.98])
def test_smooth_curves_take_few_measurements(bend: float, shift: float, target: float) -> None:
    asked: dict[float, float] = {}

    def measure(tau: float) -> float:
        asked[tau] = sigmoid(shift - bend * logit(tau))
        return asked[tau]

    tau = find_tau(measure, target)
    assert abs(asked[tau] - target) <= TOLERANCE
    assert len(asked) <= 8


def test_a_jump_past_the_target_gives_the_nearer_side() -> None:
    tau = find_tau(lambda tau: 0.7 if tau < 0.4 else 0.2, 0.5)
    assert tau < 0.4
    assert find_tau(lambda tau: 0.7 if tau < 0.4 else 0.2, 0.4) >= 0.4


def test_out_of_reach_takes_few_measurements_and_says_how_far_one_gets() -> None:
    asked = []
    with pytest.raises(OutOfReach, match=r"sparsity 0.9 is out of reach: .* 0\.700") as caught:
        find_tau(lambda tau: asked.append(tau) or 0.7 * (1 - tau), 0.9)  # type: ignore[func-returns-value]
    assert caught.value.most == pytest.approx(0.7)
    assert len(asked) <= 4


@pytest.mark.parametrize("target", [0.0, TOLERANCE])
def test_dense_needs_no_measurement(target: float) -> None:
    assert find_tau(lambda tau: pytest.fail("measured"), target) == 1.0


def test_what_was_seen_is_not_measured_again() -> None:
    def measure(tau: float) -> float:
        asked.append(tau)
        return sigmoid(-1.3 * logit(tau) + 0.4)

    asked: list[float] = []
    seen: dict[float, float] = {}
    taus = [find_tau(measure, target, seen=seen) for target in (0.2, 0.5, 0.8)]
    assert sorted(seen) == sorted(asked) and len(asked) <= 7
    count = len(asked)
    assert [find_tau(measure, target, seen=seen) for target in (0.2, 0.5, 0.8)] == taus
    assert len(asked) == count


def test_a_curve_that_is_not_quite_monotone_ends_near_the_target() -> None:
    """Sparse layers change what later routers read, so that sparsity need not fall everywhere."""
    noise = itertools.cycle([0.003, -0.003, 0.001])
    tau = find_tau(lambda tau: 1 - tau + next(noise), 0.6)
    assert 1 - tau == pytest.approx(0.6, abs=0.006)


def test_another_knob() -> None:
    """A threshold from 0 (dense) upwards."""
    threshold = type(TAU)(
        dense=0.0, sparsest=-20.0, densest=20.0, setting=lambda u: float(np.exp(-u)), point=lambda t: -float(np.log(t))
    )
    found = find_setting(threshold, lambda theta: theta / (1 + theta), 0.75)
    assert found == pytest.approx(3.0, rel=0.02)


@given(st.floats(-40.0, 30.0))
def test_logits_and_back(u: float) -> None:
    assert logit(sigmoid(u)) == pytest.approx(u, rel=1e-6, abs=1e-6) if u < 15 else sigmoid(u) < 1
    assert logit_of_share(0.0) == logit(1e-4) and logit_of_share(1.0) == logit(1 - 1e-4)


# --- from scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 7])
@pytest.mark.parametrize("rule", ["reach", "below"])
@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.95])
def test_asked_sparsity_is_realised_within_one_expert(sparsity: float, tokens: int, rule: str, shared: int) -> None:
    scores_TE = 3 * torch.randn(tokens, 96, generator=torch.Generator().manual_seed(tokens))
    tau = torch.tensor(tau_of_scores(scores_TE, sparsity, rule, shared))  # type: ignore[arg-type]
    active = int(mask_from_scores(scores_TE, tau, rule, shared).sum())  # type: ignore[arg-type]
    fewest = tokens * (shared + 1)
    assert abs(active - max(fewest, (1 - sparsity) * tokens * 96)) <= 1


def test_equal_scores_keep_at_least_one_expert() -> None:
    tau = tau_of_scores(torch.zeros(3, 8), 0.99)
    assert 0 < tau < 1
