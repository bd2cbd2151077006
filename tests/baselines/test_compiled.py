"""Other methods trained with compiled blocks: one graph for all alike layers, the losses of the uncompiled run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, token_ids
from torch import Tensor, nn
from torch._dynamo.utils import counters

from torch_prunepath import register_routing_hook, sparse_layers
from torch_prunepath.baselines import LTE, d2dmoe, lte, moefication
from torch_prunepath.train import TrainConfig, compiled_blocks, fixed_tau, hold, ramp, recipes, train
from torch_prunepath.train.compiling import blocks

BACKEND = "aot_eager"  # traces and differentiates like Inductor, and computes with the same kernels as eager
QUICK: dict[str, Any] = {"expert_size": 4, "progress": False}
HELD = TrainConfig(steps=4, phases=(ramp(0.0, 0.5), hold(0.5)))
FIRST, SECOND = (dataclasses.replace(stage, lr=1e-3) for stage in recipes.lte_stages(steps=8, router_lr=1e-2))


def apply_centroid(model: nn.Module, inputs: dict[str, Any]) -> None:
    moefication(model, router="centroid", **QUICK)


def apply_mlp(model: nn.Module, inputs: dict[str, Any]) -> None:
    moefication(model, inputs, epochs=2, **QUICK)


def apply_first_stage(model: nn.Module, inputs: dict[str, Any]) -> None:
    lte(model, **QUICK)


def apply_second_stage(model: nn.Module, inputs: dict[str, Any]) -> None:
    lte(model, **QUICK).start_second_stage()


def apply_max(model: nn.Module, inputs: dict[str, Any]) -> None:
    d2dmoe(model, inputs, epochs=2, width=8, **QUICK)


def apply_cumulative(model: nn.Module, inputs: dict[str, Any]) -> None:
    d2dmoe(model, inputs, rule="cumulative", epochs=2, width=8, **QUICK)


Apply = Callable[[nn.Module, dict[str, Any]], None]
METHODS: list[tuple[Apply, TrainConfig]] = [
    (apply_centroid, TrainConfig(steps=4, phases=(fixed_tau(0.3),))),
    (apply_mlp, HELD),
    (apply_first_stage, FIRST),
    (apply_second_stage, SECOND),
    (apply_max, HELD),
    (apply_cumulative, HELD),
]
methods = pytest.mark.parametrize(
    ("apply", "config"), METHODS, ids=[apply.__name__.removeprefix("apply_") for apply, _ in METHODS]
)


def converted(name: str, apply: Apply) -> nn.Module:
    """Without dropout: compiled code draws other random numbers."""
    model, inputs = ARCHITECTURES[name]()
    for module in model.modules():
        for attribute in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    apply(model, inputs)
    return model


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": token_ids(seed)} for seed in (3, 4)]


def trained(model: nn.Module, config: TrainConfig, **options: Any) -> list[dict[str, float]]:
    return train(model, batches(), config, progress=False, **options)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def alike(found: list[dict[str, float]], expected: list[dict[str, float]], rel: float = 1e-5) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(one.keys() == other.keys() and one == pytest.approx(other, rel=rel) for one, other in pairs)


@pytest.fixture(autouse=True)
def forget() -> None:
    torch._dynamo.reset()
    counters.clear()


@methods
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_one_graph_for_all_layers_computes_what_eager_training_does(
    name: str, apply: Apply, config: TrainConfig
) -> None:
    model = converted(name, apply)
    other = copy.deepcopy(model)
    expected = trained(other, config)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = trained(model, config, compile=BACKEND)
    # One graph for the blocks, of which there are at least two, and one for the model's loss.
    assert len(blocks(model)) >= 2 and graphs() == 2 and not counters["graph_break"]
    assert alike(found, expected)
    stage = apply is apply_first_stage
    assert all(record["sparsity"] == 0 if stage else record["sparsity"] > 0 for record in found[1:])
    for (key, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=key)


@methods
def test_autocast(apply: Apply, config: TrainConfig) -> None:
    config = dataclasses.replace(config, autocast=True)
    model = converted("llama", apply)
    expected = trained(copy.deepcopy(model), config)
    found = trained(model, config, compile=BACKEND)
    assert graphs() == 2 and not counters["graph_break"]
    assert alike(found, expected, rel=1e-2)


def test_the_stages_of_lte_are_a_graph_each_and_so_is_another_run() -> None:
    for _ in range(2):
        model = converted("llama", apply_first_stage)
        other, losses = copy.deepcopy(model), []
        for each, compiled in ((other, False), (model, BACKEND)):
            handle = LTE(each, None)
            handle.start_first_stage()
            first = trained(each, FIRST, compile=compiled)
            handle.start_second_stage()
            losses.append(first + trained(each, SECOND, compile=compiled))
        assert alike(losses[1], losses[0])
        assert not counters["graph_break"]
    # A graph for each stage's blocks, the second run's among them; each run's model has a loss function of its own,
    # which is compiled for each stage.
    assert graphs() <= 2 + 4


def test_a_rule_that_is_changed_counts() -> None:
    """And so does a hook, which sees and may change what the rule selects."""
    model = converted("llama", apply_second_stage)
    ids = batches()[0]

    def logits() -> Tensor:
        with torch.no_grad():
            return model(**ids).logits

    rules = [lambda scores_TE, tau: scores_TE > 0.3, lambda scores_TE, tau: scores_TE < 0]
    seen: list[Tensor] = []
    with compiled_blocks(model, BACKEND):
        for rule in rules:
            for layer in sparse_layers(model).values():
                layer.selection = rule
            found = logits()
            for layer in sparse_layers(model).values():
                layer.selection = None
            with register_routing_hook(model, lambda routing, rule=rule: rule(routing.scores_TE, None)):
                torch.testing.assert_close(found, logits(), rtol=1e-5, atol=1e-5)
            seen.append(found)
    assert not torch.allclose(*seen)
