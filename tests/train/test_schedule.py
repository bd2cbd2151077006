"""Phases, the learning rate's schedule, configs and recipes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from torch_prunepath.train import Phase, TrainConfig, all_experts, draw, fixed_tau, hold, ramp, recipes
from torch_prunepath.train.optimizer import lr_factor
from torch_prunepath.train.schedule import aim_at


def aims(*phases: Phase, steps: int = 10, seed: int = 0) -> list[tuple[float | None, float | None]]:
    return [(aim.tau, aim.sparsity) for aim in (aim_at(phases, step, steps, seed) for step in range(steps))]


def test_phases_follow_one_another_by_their_share() -> None:
    assert (
        aims(all_experts(), fixed_tau(0.9), hold(0.5, share=3.0))
        == [(1.0, None)] * 2 + [(0.9, None)] * 2 + [(None, 0.5)] * 6
    )
    assert aims(hold(0.5), hold(0.7), steps=1) == [(None, 0.7)]


def test_a_ramp_reaches_both_ends() -> None:
    found = [sparsity for _, sparsity in aims(ramp(0.1, 0.9), steps=5)]
    assert found == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert [s for _, s in aims(ramp(0.0, 0.8), hold(0.8), steps=10)] == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, *[0.8] * 5]
    )


def test_draws_are_a_function_of_seed_and_step_and_fill_the_range() -> None:
    phases = (draw(0.3, 0.9),)
    once = [aim_at(phases, step, 1000, 7).sparsity for step in range(1000)]
    assert once[400] == aim_at(phases, 400, 1000, 7).sparsity
    assert once != [aim_at(phases, step, 1000, 8).sparsity for step in range(1000)]
    values = [value for value in once if value is not None]
    assert len(values) == 1000 and 0.3 <= min(values) < 0.31 and 0.89 < max(values) <= 0.9
    assert sum(values) / 1000 == pytest.approx(0.6, abs=0.02)
    # Pinned: a run that is resumed by a later version must draw the same.
    assert aim_at(phases, 0, 1000, 0).sparsity == pytest.approx(0.8033673402969184, abs=1e-12)


def test_logarithmic_draws_give_each_halving_of_the_active_share_as_many_steps() -> None:
    phases = (draw(0.2, 0.95, log=True),)
    drawn = [aim_at(phases, step, 2000, 7).sparsity for step in range(2000)]
    active = [1 - value for value in drawn if value is not None]
    assert len(active) == 2000 and 0.05 <= min(active) < 0.051 and 0.79 < max(active) <= 0.8
    for upper in (0.8, 0.4, 0.2, 0.1):  # four halvings
        assert sum(upper / 2 <= share <= upper for share in active) / 2000 == pytest.approx(0.25, abs=0.03)
    both = [aim_at(phases, 0, 1, 7, i, 2).sparsity for i in range(2)]
    assert both[0] <= 0.8 <= both[1]


def test_the_batches_of_a_step_share_the_range_out_among_them() -> None:
    phases = (draw(0.3, 0.9),)
    found = [[aim_at(phases, step, 500, 7, i, 3).sparsity for i in range(3)] for step in range(500)]
    for i, values in enumerate(zip(*found, strict=True)):
        low, high = 0.3 + 0.2 * i, 0.5 + 0.2 * i
        assert low <= min(values) < low + 0.01 and high - 0.01 < max(values) <= high
    assert all(aim_at((hold(0.4),), 0, 5, 7, i, 3).sparsity == 0.4 for i in range(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sparsity", 1.0, 0.5), "outside"),
        (("sparsity", -0.1, 0.5), "outside"),
        (("tau", 0.0, 0.5), "outside"),
        (("random", 0.9, 0.3), "draw from 0.3 to 0.9"),
        (("random-log", 0.9, 0.3), "draw from 0.3 to 0.9"),
        (("hold", 0.5, 0.5), "choose one of"),
        (("tau", 0.5, 0.5, 0.0), "leave the phase out"),
    ],
    ids=str,
)
def test_bad_phases_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase(*arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either steps= or epochs="),
        ({"steps": 1, "epochs": 1.0}, "either steps= or epochs="),
        ({"steps": 0}, "steps=0 must be positive"),
        ({"steps": 1, "lr": -1.0}, "lr=-1.0 must be positive"),
        ({"steps": 1, "entropy": -1.0}, "0 turns it off"),
        ({"steps": 1, "entropy": float("nan")}, "0 turns it off"),
        ({"steps": 1, "task": 0.0}, "every loss has weight 0"),
        ({"steps": 1, "warmup": 2.0}, "share of the steps"),
        ({"steps": 1, "phases": ()}, "at least one Phase"),
        ({"steps": 1, "phases": (0.5,)}, "at least one Phase"),
        ({"steps": 1, "train": "trunk"}, "choose one of 'all', 'routers'"),
        ({"steps": 1, "decay": "no"}, "choose one of"),
        ({"steps": 1, "control_rate": 0.0}, "outside"),
    ],
    ids=str,
)
def test_bad_configs_are_refused_with_a_remedy(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


@pytest.mark.parametrize(
    "config", [recipes.paper(), recipes.ours(100, distil=1.0), recipes.held(100, 0.7)], ids=["paper", "ours", "held"]
)
def test_configs_survive_json(config: TrainConfig) -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="'lrr' is no field"):
        TrainConfig.from_dict({**config.to_dict(), "lrr": 1})


def test_the_papers_recipe_is_the_released_one() -> None:
    config = recipes.RECIPES["paper"]()
    assert config.losses == {"task": 1.0, "entropy": 3e-4, "load_balance": 1e-3}
    assert (config.lr, config.router_lr, config.weight_decay, config.epochs) == (1e-4, 1e-3, 1e-2, 2.0)
    assert aims(*config.phases) == [(1.0, None)] * 5 + [(0.95, None)] * 5


@pytest.mark.parametrize(("decay", "last"), [("constant", 1.0), ("linear", 1 / 90), ("cosine", 0.0003)], ids=str)
def test_learning_rates_rise_and_fall(decay: str, last: float) -> None:
    config = dataclasses.replace(TrainConfig(steps=100, warmup=0.1), decay=decay)
    factors = [lr_factor(config, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(last, abs=1e-4)
