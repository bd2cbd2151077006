"""The controller against routers that are known functions of tau, which it is not told."""

from __future__ import annotations

import json
import logging
import math
import random

import pytest

from torch_prunepath.train import SparsityController
from torch_prunepath.train.controller import logit, sigmoid


def curve(tau: float, slope: float = 1.0, shift: float = 0.0) -> float:
    """Sparsity of a router that spreads its mass less (or more) evenly than the controller assumes at first."""
    return sigmoid(-slope * logit(tau) + shift)


CURVES = {"even": (1.0, 0.0), "sharp": (1.0, 4.0), "steep": (2.5, -3.0), "flat": (0.4, 2.0), "far": (0.5, -6.0)}


@pytest.mark.parametrize("late", [0, 1], ids=["at_once", "a_step_late"])
@pytest.mark.parametrize("name", CURVES)
def test_it_finds_targets_one_after_the_other(name: str, late: int) -> None:
    controller, waiting = SparsityController(), []
    for target in (0.5, 0.7, 0.9, 0.3):
        for _ in range(25):
            tau = controller.tau_for(target)
            waiting.append((tau, curve(tau, *CURVES[name])))
            while len(waiting) > late:
                controller.observe(*waiting.pop(0))
        assert curve(controller.tau_for(target), *CURVES[name]) == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize("name", CURVES)
def test_it_serves_a_range_at_once_under_noise(name: str) -> None:
    controller, dice = SparsityController(), random.Random(0)
    for _ in range(150):
        tau = controller.tau_for(dice.uniform(0.3, 0.9))
        controller.observe(tau, curve(tau, *CURVES[name]) + dice.gauss(0, 0.01))
    for target in (0.3, 0.5, 0.7, 0.9):
        assert curve(controller.tau_for(target), *CURVES[name]) == pytest.approx(target, abs=0.04)


def test_it_follows_a_router_that_sharpens() -> None:
    controller = SparsityController()
    for step in range(200):
        tau = controller.tau_for(0.7)
        found = curve(tau, 1.0, shift=0.02 * step)
        controller.observe(tau, found)
        assert step < 10 or found == pytest.approx(0.7, abs=0.02)


def test_nonsense_leaves_tau_in_its_range_and_is_forgotten() -> None:
    controller, dice = SparsityController(), random.Random(0)
    for _ in range(100):
        controller.observe(dice.uniform(0.001, 0.999), dice.random())
        assert all(0 < controller.tau_for(target / 100) <= 1 for target in range(100))
    for _ in range(25):
        tau = controller.tau_for(0.7)
        controller.observe(tau, curve(tau))
    assert curve(controller.tau_for(0.7)) == pytest.approx(0.7, abs=0.005)


def test_sparsity_0_is_every_expert_and_tau_1_teaches_nothing() -> None:
    controller = SparsityController()
    before = controller.state_dict()
    assert controller.tau_for(0.0) == 1.0
    controller.observe(1.0, 0.0)
    assert controller.state_dict() == before


def test_its_state_survives_json() -> None:
    controller, other = SparsityController(0.7), SparsityController()
    for tau in (0.9, 0.4, 0.01):
        controller.observe(tau, curve(tau, 2.0, 1.0))
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    for one in (controller, other):
        one.observe(0.3, 0.8)
    assert [controller.tau_for(s / 10) for s in range(10)] == [other.tau_for(s / 10) for s in range(10)]


def test_it_says_when_the_target_is_out_of_reach(caplog: pytest.LogCaptureFixture) -> None:
    controller = SparsityController()
    with caplog.at_level(logging.WARNING):
        for _ in range(200):
            tau = controller.tau_for(0.95)
            controller.observe(tau, min(0.8, curve(tau)))
    assert len(caplog.records) == 1 and "smaller expert_size" in caplog.text


def test_a_bad_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        SparsityController(rate=1.0)


def test_logit_and_sigmoid_are_inverse_far_out() -> None:
    for u in (-50.0, -1.0, 0.0, 3.0):
        assert logit(sigmoid(u)) == pytest.approx(u, abs=1e-9)
    assert math.isclose(sigmoid(800.0), 1.0) and sigmoid(-800.0) == 0.0
