"""Dense training on the same loop, the activation sparsity stage of D2DMoE, PrunePath as released, LTE's recipe."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, HAND_WRITTEN
from tiny_llama import tiny_llama
from torch import Tensor, nn

from torch_prunepath import find_ffns, sparse_layers, sparsify
from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.baselines import enforce_sparsity, square_hoyer, train_dense
from torch_prunepath.baselines.hoyer import _Penalty
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.train import TrainConfig, all_experts, fixed_tau, hold, recipes, train

ALL = {**ARCHITECTURES, **HAND_WRITTEN}
FAST: dict[str, Any] = {"lr": 3e-3, "warmup": 0.0, "decay": "constant"}


def batches(number: int = 1, rows: int = 4, length: int = 16, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 90, (rows, length), generator=generator)} for _ in range(number)]


def views_of(model: nn.Module) -> list[FFNView]:
    return [FFNView(model, spec) for spec in find_ffns(model)]


# --- dense ------------------------------------------------------------------------------------------------------------


def own_loop(model: nn.Module, data: list[dict[str, Tensor]], config: TrainConfig) -> list[float]:
    """What training a dense model is, written down."""
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1]
    rest = [p for n, p in model.named_parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    seen = []
    model.train()
    for step in range(config.steps or 0):
        batch = data[step % len(data)]
        loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def test_dense_training_is_what_an_own_loop_does() -> None:
    config = TrainConfig(steps=6, **FAST)
    model, data = tiny_llama(), batches(3)
    history = train_dense(model, data, config, progress=False)
    expected = own_loop(tiny_llama(), data, config)
    assert [record["task"] for record in history] == pytest.approx(expected, rel=1e-4)
    assert [record["sparsity"] for record in history] == [0.0] * 6
    assert len(find_ffns(model)) == 2, "dense again"
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3"])
def test_dense_training_of_other_structures_leaves_their_names_and_layout(name: str) -> None:
    model, _ = ALL[name]()
    before = {k: (v.shape, v.stride()) for k, v in model.state_dict().items()}
    history = train_dense(model, batches(), TrainConfig(steps=30, **FAST), progress=False)
    assert history[-1]["task"] < 0.9 * history[0]["task"]
    assert {k: (v.shape, v.stride()) for k, v in model.state_dict().items()} == before


def test_an_interrupted_run_leaves_a_dense_model() -> None:
    model = tiny_llama()

    def stop(state: Any, record: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_dense(model, batches(), TrainConfig(steps=5), callback=stop, progress=False)
    assert len(find_ffns(model)) == 2


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"contribution_fit": 0.1}, {}, "contribution_fit says nothing"),
        ({"train": "routers"}, {}, "leaves nothing to train"),
        ({}, {"state": None}, "leave state= out"),
        ({"distill_logits": 1.0}, {}, "pass teacher="),
    ],
)
def test_what_is_no_dense_training_is_refused(fields: dict[str, Any], options: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        train_dense(model, batches(), TrainConfig(steps=2, **fields), progress=False, **options)
    assert len(find_ffns(model)) == 2


# --- activation sparsity ----------------------------------------------------------------------------------------------


def test_square_hoyer_counts_equal_values() -> None:
    values = torch.tensor([[0.0, 0.0, 3.0, 0.0], [1.0, -1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0], [0.0] * 4])
    torch.testing.assert_close(square_hoyer(values), torch.tensor([1.0, 4.0, 2.0, 0.0]))
    noise = torch.randn(50, 7)
    assert ((square_hoyer(noise) >= 1) & (square_hoyer(noise) <= 7)).all()
    torch.testing.assert_close(square_hoyer(1000 * noise), square_hoyer(noise))


def gate_inputs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The task's loss, and each FFN's pre-activations ``[T, F]``, with their graph."""
    seen: list[Tensor] = []
    handles = []
    for view in views_of(model):

        def keep(module: nn.Module, args: Any, output: Tensor, view: FFNView = view) -> None:
            parts = output.chunk(2, -1) if view.spec.fused else (output, output)
            seen.append(parts[1 if view.spec.fused == "up_gate" else 0].reshape(-1, view.spec.ffn_size))

        handles.append((view.up if view.gate is None else view.gate).register_forward_hook(keep))
    loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
    for handle in handles:
        handle.remove()
    return loss, seen


@pytest.mark.parametrize("on", ["activations", "preactivations"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
def test_the_penalty_s_gradient_is_that_of_the_sum(name: str, on: Any) -> None:
    model, _ = ALL[name]()
    batch = batches()[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 9:] = 0
    keep = mask.reshape(-1).bool()
    batch["attention_mask"] = mask
    loss, pre = gate_inputs(model, batch)
    act = ACTIVATIONS[views_of(model)[0].spec.activation]
    target = [act(p) if on == "activations" else (p + 1.0).clamp_min(0.0) for p in pre]
    terms = [(t.abs().sum(-1) ** 2 / (t**2).sum(-1)).nan_to_num()[keep].mean() for t in target]
    (loss + 0.3 * sum(terms) / len(terms)).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad(set_to_none=True)
    penalty, views = _Penalty(len(pre), 0.3, on, -1.0), views_of(model)
    with penalty.watching(model, views):
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    for n, p in model.named_parameters():
        if n in expected:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-3, atol=1e-5)
    assert penalty.means(1) == pytest.approx([float(sum(terms) / len(terms))], rel=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("name", "on"), [("llama", "activations"), ("opt", None), ("gpt2", None)])
def test_enforcement_makes_activations_sparser(name: str, on: Any) -> None:
    found = {}
    for weight in (0.0, 0.1):
        model = tiny_llama() if name == "llama" else ALL[name]()[0]
        config = TrainConfig(steps=40, accumulation=2, **FAST)
        history = enforce_sparsity(model, batches(2), config, weight=weight, on=on, displacement=-1.0, progress=False)
        assert history[-1]["task"] < history[0]["task"]
        found[weight] = history[-1]["hoyer"]
        assert len(find_ffns(model)) == 2
    assert found[0.1] < 0.8 * found[0.0]


def test_enforcement_with_autocast_and_checkpointing_counts_once() -> None:
    model = tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = TrainConfig(steps=2, autocast=True, **FAST)
    checkpointed = enforce_sparsity(model, batches(), config, weight=0.1, on="activations", progress=False)
    plain = enforce_sparsity(tiny_llama(), batches(), config, weight=0.1, on="activations", progress=False)
    for one, two in zip(checkpointed, plain, strict=True):
        assert one == pytest.approx(two, rel=2e-2)
    with pytest.raises(ValueError, match="must not be negative"):
        enforce_sparsity(model, batches(), config, weight=-1.0)
    with pytest.raises(ValueError, match="'activations', 'preactivations'"):
        enforce_sparsity(model, batches(), config, on="outputs")  # type: ignore[arg-type]


# --- PrunePath as released --------------------------------------------------------------------------------------------


def test_prunepath_as_released() -> None:
    config, stages = recipes.EXPERTS["paper"], recipes.paper(epochs=2, tau=0.5)
    assert (config.expert_size, config.partition, config.router) == (32, "kmeans", "zero")
    assert (config.rule, config.gate, config.gate_offset, config.budget) == ("below", "sigmoid", 0.0, "uniform")
    assert stages.phases == (all_experts(), fixed_tau(0.5)) and stages.epochs == 4
    assert stages.losses == {"task": 1.0, "entropy": 3e-4, "load_balance": 1e-3}
    assert (stages.lr, stages.router_lr, stages.weight_decay) == (1e-4, 1e-3, 1e-2)
    assert recipes.paper().phases[1] == fixed_tau(0.95)

    model, data = tiny_llama(), batches(2)
    small = dataclasses.replace(config, expert_size=8)
    sparsify(model, tau=1.0, config=small, progress=False)
    for layer in sparse_layers(model).values():
        assert layer.router.bias is None and not layer.router.weight.any() and layer.budget == 1.0
    inputs = torch.randn(3, 32)
    layer = next(iter(sparse_layers(model).values()))
    with torch.no_grad():
        half = layer(inputs[None])[0]
        layer.experts = dataclasses.replace(layer.experts, gate="one")
        torch.testing.assert_close(half, 0.5 * layer(inputs[None])[0])
    layer.experts = dataclasses.replace(layer.experts, gate="sigmoid")

    history = train(model, data, stages, progress=False)
    assert [record["tau"] for record in history] == [1.0] * 4 + [0.5] * 4
    assert all(record["sparsity"] == 0 for record in history[:4])
    # A router that is still nearly uniform keeps 3 or 4 of 8 experts below a mass of 0.5.
    assert all(0.45 < record["sparsity"] < 0.65 for record in history[4:])
    assert all(layer.router.weight.any() for layer in sparse_layers(model).values())


# --- LTE's recipe -----------------------------------------------------------------------------------------------------


def test_lte_stages() -> None:
    first, second = recipes.lte_stages(steps=100, eta=2.0, first=0.6)
    assert (first.steps, second.steps) == (60, 40)
    assert first.phases == (all_experts(),) and second.phases == (fixed_tau(0.5),)
    assert first.lte_separation == 1.0 and first.separation_eta == 2.0 and second.lte_separation == 0.0
    assert first.lr == second.lr == 5e-5 and first.warmup == second.warmup == 0.06
    assert [c.steps for c in recipes.lte_stages(steps=2)] == [1, 1]
    for steps, share in ((1, 0.5), (10, 0.0), (10, 1.0)):
        with pytest.raises(ValueError, match="both stages need a step"):
            recipes.lte_stages(steps, first=share)
    assert dataclasses.replace(second, phases=(hold(0.8),)).phases == (hold(0.8),)


def test_a_callback_may_end_the_enforcing() -> None:
    config = TrainConfig(steps=4, **FAST)
    history = enforce_sparsity(
        tiny_llama(), batches(4), config, on="activations", progress=False, callback=lambda state, record: True
    )
    assert 1 <= len(history) < 4
    assert all(record["hoyer"] > 0 for record in history)
