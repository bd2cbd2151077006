"""MoEfication, LTE and D2DMoE on tiny models: what defines each, and that records, targets and training serve them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, HAND_WRITTEN
from tiny_llama import tiny_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from torch_prunepath import find_ffns, record_sparsity, register_routing_hook, set_tau, sparse_layers
from torch_prunepath.baselines import RoutedBaseline, d2dmoe, lte, moefication
from torch_prunepath.baselines.dynamic_k import expert_norms
from torch_prunepath.baselines.routers import MLPRouter
from torch_prunepath.baselines.top_k import activation_sums
from torch_prunepath.experts.fit import centroid_init
from torch_prunepath.layer import RoutedExperts, Routing
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.views import sparse_views
from torch_prunepath.train import RoutingTape, TrainConfig, draw, fixed_tau, hold, recipes, train

QUICK: dict[str, Any] = {"expert_size": 4, "progress": False}
STRUCTURES = ["llama", "phi3", "gpt2", "opt", "bert", "t5_gated", "falcon", "fused_up_first"]
ALL = {**ARCHITECTURES, **HAND_WRITTEN}


def apply_centroid(model: nn.Module, inputs: dict[str, Any]) -> RoutedBaseline:
    return moefication(model, router="centroid", **QUICK)


def apply_mlp(model: nn.Module, inputs: dict[str, Any]) -> RoutedBaseline:
    return moefication(model, inputs, epochs=2, **QUICK)


def apply_lte(model: nn.Module, inputs: dict[str, Any]) -> RoutedBaseline:
    return lte(model, **QUICK)


def apply_max(model: nn.Module, inputs: dict[str, Any]) -> RoutedBaseline:
    return d2dmoe(model, inputs, epochs=2, width=8, **QUICK)


def apply_cumulative(model: nn.Module, inputs: dict[str, Any]) -> RoutedBaseline:
    return d2dmoe(model, inputs, rule="cumulative", epochs=2, width=8, **QUICK)


Apply = Callable[[nn.Module, dict[str, Any]], RoutedBaseline]
METHODS: list[Apply] = [apply_centroid, apply_mlp, apply_lte, apply_max, apply_cumulative]
methods = pytest.mark.parametrize("apply", METHODS, ids=lambda apply: apply.__name__.removeprefix("apply_"))


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def masks_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Routing]:
    """What every layer selected last."""
    seen: dict[str, Routing] = {}
    with register_routing_hook(model, lambda routing: seen.__setitem__(routing.name, routing)):
        output_of(model, inputs)
    return seen


def token_batch(rows: int = 4, length: int = 16, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))}


def text(tokens: int = 4096) -> dict[str, Tensor]:
    return token_batch(tokens // 64, 64, seed=5)


# --- all of them ------------------------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("name", STRUCTURES)
def test_tau_one_is_dense_and_removing_brings_back_every_bit(name: str, apply: Apply) -> None:
    model, inputs = ALL[name]()
    dense, before = output_of(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    handle = apply(model, inputs)
    handle.set_gate("one")
    set_tau(model, 1.0)
    torch.testing.assert_close(output_of(model, inputs), dense, rtol=1e-4, atol=1e-5)
    set_tau(model, 0.3)
    assert not torch.equal(output_of(model, inputs), dense)
    handle.remove()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(output_of(model, inputs), dense)
    assert len(find_ffns(model)) > 0


@methods
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])  # none whose activations are 0 by themselves
def test_records_and_tape_tell_what_was_computed(name: str, apply: Apply) -> None:
    model, inputs = ALL[name]()
    apply(model, inputs)
    set_tau(model, 0.4)
    routings = masks_of(model, inputs)
    zeros, hidden = [], []
    for view in sparse_views(model).values():
        view.down.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    tape = RoutingTape(model)
    with record_sparsity(model) as record, tape:
        model(**inputs)
    for view, h in zip(sparse_views(model).values(), hidden, strict=True):
        zeros.append(float((h.reshape(-1, view.spec.ffn_size) == 0).float().mean()))
    for share, name in zip(zeros, record.per_layer, strict=True):
        assert record.per_layer[name] == pytest.approx(share, abs=1e-6)
        size, mask = sparse_layers(model)[name].experts.expert_size, routings[name].mask_TE
        active = mask.repeat_interleave(size, 1)[:, : sparse_layers(model)[name].ffn.ffn_size].float().mean()
        assert share == pytest.approx(1 - float(active), abs=1e-6)
    assert float(tape.sparsity()) == pytest.approx(record.sparsity, abs=1e-6) and 0 < record.sparsity < 1


@methods
def test_sparsity_follows_what_is_asked(apply: Apply) -> None:
    model, data = tiny_llama(), token_batch()
    handle = apply(model, data)
    handle.set_gate("one")
    for share in (0.25, 0.5, 0.75):
        handle.set_sparsity(share, data)
        with record_sparsity(model) as record:
            output_of(model, data)
        assert record.sparsity == pytest.approx(share, abs=0.03)


@methods
def test_targets_are_held_in_training_and_routers_stay(apply: Apply) -> None:
    model, data = tiny_llama(), [token_batch()]
    handle = apply(model, data[0])
    handle.set_gate("one")
    handle.freeze_routers()
    routers = {n: p.clone() for n, p in model.named_parameters() if ".router." in n}
    history = train(model, data, TrainConfig(steps=40, phases=(hold(0.5),), lr=3e-3), progress=False)
    assert history[-1]["task"] < 0.8 * history[0]["task"]
    assert sum(record["sparsity"] for record in history[20:]) / 20 == pytest.approx(0.5, abs=0.05)
    assert all(torch.equal(p, routers[n]) for n, p in model.named_parameters() if n in routers)
    handle.remove()
    trained = output_of(model, data[0])
    assert torch.isfinite(trained).all()


@methods
def test_bfloat16_autocast_with_checkpointing(apply: Apply) -> None:
    model, data = tiny_llama(), [token_batch()]
    apply(model, data[0]).set_gate("one")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = TrainConfig(steps=3, phases=(fixed_tau(0.5),), autocast=True)
    history = train(model, data, config, progress=False)
    assert all(0 < record["sparsity"] < 1 for record in history)
    model.bfloat16()
    with record_sparsity(model) as record:
        assert torch.isfinite(output_of(model, data[0])).all()
    assert 0 < record.sparsity < 1
    assert all(routing.scores_TE.dtype == torch.float32 for routing in masks_of(model, data[0]).values())


@methods
def test_a_copy_goes_its_own_way(apply: Apply) -> None:
    model, inputs = ALL["llama"]()
    apply(model, inputs).set_gate("one")
    set_tau(model, 0.3)
    other, before = copy.deepcopy(model), output_of(model, inputs)
    assert torch.equal(output_of(other, inputs), before)
    set_tau(other, 1.0)
    assert torch.equal(output_of(model, inputs), before) and not torch.equal(output_of(other, inputs), before)


@methods
def test_saving_is_refused_and_the_state_dict_goes_on(apply: Apply, tmp_path: Path) -> None:
    model, data = tiny_llama(), token_batch()
    handle = apply(model, data)
    handle.set_gate("one")
    set_tau(model, 0.3)
    for each in (model, model.model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"selects experts by .*keep model\.state_dict"):
            each.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert not hasattr(model.config, "quantization_config")

    other = tiny_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    apply(other, data).set_gate("one")
    set_tau(other, 0.3)
    assert not torch.equal(output_of(other, data), output_of(model, data))
    other.load_state_dict(model.state_dict())
    assert torch.equal(output_of(other, data), output_of(model, data))

    handle.remove()
    assert not any("save_pretrained" in vars(module) for module in model.modules())
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(output_of(LlamaForCausalLM.from_pretrained(tmp_path / "dense"), data), output_of(model, data))


@methods
def test_what_fails_half_way_leaves_the_dense_model(apply: Apply, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ALL["llama"]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []

    def fail(layer: nn.Module, rule: Any) -> None:
        calls.append(rule)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RoutedExperts, "selection", property(lambda layer: None, fail))
    with pytest.raises(KeyboardInterrupt):
        apply(model, inputs)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert len(calls) == 2


@pytest.mark.gpu
@methods
def test_on_a_cuda_device(apply: Apply) -> None:
    model, data = tiny_llama(), token_batch()
    on_device = {key: value.cuda() for key, value in data.items()}
    handle = apply(model.cuda(), on_device)
    handle.set_gate("one")
    set_tau(model, 0.5)
    expected = masks_of(model, on_device)
    output = output_of(model, on_device)
    layer, x = model.model.layers[0].mlp, torch.randn(5, 32, device="cuda")
    with torch.no_grad():
        layer(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    other = copy.deepcopy(model).cpu()
    for name, routing in masks_of(other, data).items():
        agree = (routing.mask_TE == expected[name].mask_TE.cpu()).float().mean()
        assert agree > 0.98
    assert torch.isfinite(output).all()


# --- MoEfication ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["centroid", "mlp"])
def test_moefication_picks_exactly_k_for_every_token(router: str) -> None:
    model, inputs = ALL["llama"]()
    handle = moefication(model, None if router == "centroid" else inputs, router=router, epochs=1, **QUICK)
    E = next(iter(handle.layers.values())).num_experts
    for k in range(1, E + 1):
        set_tau(model, k / E)
        assert all((r.mask_TE.sum(-1) == k).all() for r in masks_of(model, inputs).values())
    assert handle.set_sparsity(0.8) == pytest.approx(0.2)
    assert all((r.mask_TE.sum(-1) == round(0.2 * E)).all() for r in masks_of(model, inputs).values())


def test_moefication_publishes_a_fifth() -> None:
    model = tiny_llama()
    moefication(model, router="centroid", **QUICK)
    assert all((r.mask_TE.sum(-1) == 3).all() for r in masks_of(model, token_batch()).values())  # of 16


def test_centroids_rank_by_the_distance_from_the_mean_unit_row() -> None:
    model, inputs = ALL["phi3"]()
    moefication(model, router="centroid", **QUICK)
    views = sparse_views(model)
    for name, routing in masks_of(model, inputs).items():
        rows = F.normalize(views[name].gate_FD, dim=-1)
        centres = torch.stack([part.mean(0) for part in rows.split(4)])
        far = torch.cdist(F.normalize(routing.x_TD, dim=-1), centres)
        order = routing.scores_TE.argsort(-1, descending=True)
        assert (far.gather(1, order).diff(dim=-1) > -1e-5).all()


def test_the_mlp_router_starts_at_centroids_and_learns_what_activates() -> None:
    model, data = tiny_llama(), text()
    with torch.no_grad():  # how large rows are is not in the centroids
        for view in (FFNView(model, spec) for spec in find_ffns(model)):
            view.gate_FD.mul_(torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).exp())
    handle = moefication(model, data, epochs=0, **QUICK)
    views = sparse_views(model)
    for name, layer in handle.layers.items():
        router = layer.router
        assert isinstance(router, MLPRouter) and router.bias is None and router.inner.bias is None
        order = torch.arange(views[name].spec.ffn_size)
        torch.testing.assert_close(router.inner.weight, centroid_init(views[name], order, 4))
        assert torch.equal(router.weight, torch.eye(16))
        x = torch.randn(3, 32)
        torch.testing.assert_close(router(x), torch.tanh(F.normalize(x, dim=-1) @ router.inner.weight.t()))
    handle.remove()

    def captured(epochs: int) -> float:
        handle = moefication(model, data, epochs=epochs, **QUICK)
        views, total = sparse_views(model), 0.0
        set_tau(model, 1.0)
        for name, routing in masks_of(model, token_batch(16, 64, seed=9)).items():
            sums = activation_sums(views[name], routing.x_TD, 4).detach()
            best = routing.scores_TE.topk(3, dim=-1).indices
            total += float((sums.gather(1, best).sum(-1) / sums.sum(-1)).mean())
        handle.remove()
        return total / 2

    assert captured(20) > captured(0) + 0.05 > 0.3


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5"])
def test_activation_sums_are_positive_activations_of_unit_tokens(name: str) -> None:
    model, _ = ALL[name]()
    view = FFNView(model, find_ffns(model)[0])
    x = torch.randn(7, view.spec.hidden_size)
    act = {"silu": F.silu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"), "relu": F.relu, "gelu": F.gelu}
    rows, bias = (view.up_FD, view.up_bias_F) if view.gate_FD is None else (view.gate_FD, view.gate_bias_F)
    positive = act[view.spec.activation](F.linear(x, rows, bias)).clamp_min(0) / x.norm(dim=-1, keepdim=True)
    expected = torch.stack([part.sum(-1) for part in positive.split(5, 1)], -1)
    torch.testing.assert_close(activation_sums(view, x, 5), expected)
    if name == "t5":  # ReLU without biases: what the released code computes
        unit = F.relu(F.normalize(x, dim=-1) @ view.up_FD.t())
        torch.testing.assert_close(activation_sums(view, x, 1), unit)


# --- LTE --------------------------------------------------------------------------------------------------------------


def test_lte_goes_through_its_two_stages() -> None:
    model, data = tiny_llama(), [token_batch()]
    handle = lte(model, **QUICK)
    assert all(layer.router.bias is None and layer.experts.gate == "sigmoid" for layer in handle.layers.values())
    first, second = recipes.lte_stages(steps=60, eta=4.0)
    assert (first.steps, second.steps) == (30, 30)
    assert first.losses == {"task": 1.0, "lte_separation": 1.0} and second.losses == {"task": 1.0}
    fast = {"lr": 3e-3, "router_lr": 3e-2}
    before = {n: p.clone() for n, p in model.named_parameters() if ".router." in n}
    history = train(model, data, dataclasses.replace(first, **fast), progress=False)
    assert all(record["sparsity"] == 0 and record["tau"] == 1 for record in history)
    moved = {n: p.clone() for n, p in model.named_parameters() if n in before}
    assert all(not torch.equal(moved[n], before[n]) for n in before)
    assert history[-1]["lte_separation"] < history[0]["lte_separation"]

    handle.start_second_stage()
    history = train(model, data, dataclasses.replace(second, **fast), progress=False)
    assert all(torch.equal(p, moved[n]) for n, p in model.named_parameters() if n in moved)
    assert all(record["sparsity"] > 0 and record["tau"] == 0.5 for record in history)
    assert history[-1]["task"] < history[0]["task"]
    for routing in masks_of(model, data[0]).values():
        assert torch.equal(routing.mask_TE, routing.scores_TE > 0)


def test_lte_weighs_in_the_first_stage_and_only_there() -> None:
    model, _ = ALL["llama"]()
    handle = lte(model, **QUICK)
    name, layer = next(iter(handle.layers.items()))
    view = sparse_views(model)[name]
    x = torch.randn(1, 6, 32)
    h, scores = view.hidden(x[0]), layer.router(x[0])
    weights = scores.sigmoid().repeat_interleave(4, 1)[:, :37]
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], (weights * h) @ view.down_FD, rtol=1e-4, atol=1e-5)
        handle.start_second_stage()
        chosen = (scores > 0).repeat_interleave(4, 1)[:, :37]
        torch.testing.assert_close(layer(x)[0], (chosen * h) @ view.down_FD, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in layer.router.parameters())
    handle.start_first_stage()
    assert all(p.requires_grad for p in layer.router.parameters()) and float(layer.tau) == 1.0


def test_lte_starts_the_same_for_the_same_seed() -> None:
    routers = []
    for seed in (0, 0, 1):
        model = tiny_llama()
        handle = lte(model, seed=seed, **QUICK)
        routers.append(torch.cat([layer.router.weight.flatten() for layer in handle.layers.values()]))
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])


# --- D2DMoE -----------------------------------------------------------------------------------------------------------


def test_expert_norms_are_norms_of_the_experts_outputs() -> None:
    torch.manual_seed(0)
    h, down = torch.randn(5, 11), torch.randn(11, 6)
    expected = torch.stack([(h[:, i : i + 4] @ down[i : i + 4]).norm(dim=-1) for i in (0, 4, 8)], -1)
    torch.testing.assert_close(expert_norms(h, down, 4), expected)


def test_routers_regress_norms_on_tokens_they_have_not_seen() -> None:
    model, data = tiny_llama(), text()
    handle = d2dmoe(model, data, width=64, epochs=40, lr=3e-3, **QUICK)
    views = sparse_views(model)
    set_tau(model, 1.0)
    for name, routing in masks_of(model, token_batch(16, 64, seed=9)).items():
        norms = expert_norms(views[name].hidden(routing.x_TD), views[name].down_FD, 4)
        assert (routing.scores_TE >= 0).all()
        error = (routing.scores_TE - norms).square().mean()
        assert error < 0.5 * (norms - norms.mean(0)).square().mean()
    assert all(isinstance(layer.router, MLPRouter) for layer in handle.layers.values())


@pytest.mark.parametrize("rule", ["max", "cumulative"])
def test_k_depends_on_the_token(rule: Any) -> None:
    model, inputs = ALL["llama"]()
    d2dmoe(model, inputs, rule=rule, epochs=2, tau=0.6, **QUICK)
    for routing in masks_of(model, inputs).values():
        counts = routing.mask_TE.sum(-1)
        assert counts.min() >= 1 and counts.unique().numel() > 1
        norms = routing.scores_TE
        if rule == "max":
            assert torch.equal(routing.mask_TE, norms >= 0.4 * norms.amax(-1, keepdim=True))


def test_a_drawn_sparsity_serves_d2dmoe_too() -> None:
    model, data = tiny_llama(), [token_batch()]
    d2dmoe(model, data[0], epochs=5, **QUICK)
    history = train(model, data, TrainConfig(steps=60, phases=(draw(0.3, 0.7),), lr=1e-3), progress=False)
    late = history[30:]
    assert sum(abs(record["sparsity"] - record["target"]) for record in late) / len(late) < 0.06


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_a_remedy() -> None:
    model, inputs = ALL["bert"]()
    with pytest.raises(ValueError, match="pass calibration="):
        moefication(model, **QUICK)
    with pytest.raises(ValueError, match="leave calibration out"):
        moefication(model, inputs, router="centroid", **QUICK)
    with pytest.raises(ValueError, match="'mlp', 'centroid'"):
        moefication(model, inputs, router="linear", **QUICK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outside"):
        moefication(model, router="centroid", tau=0.0, **QUICK)
    with pytest.raises(ValueError, match="'max', 'cumulative'"):
        d2dmoe(model, inputs, rule="top", **QUICK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass calibration="):
        d2dmoe(model, **QUICK)
    with pytest.raises(ValueError, match="outside"):
        d2dmoe(model, inputs, tau=1.5, epochs=1, **QUICK)
    assert len(find_ffns(model)) == 2, "still dense"
    handle = lte(model, **QUICK)
    with pytest.raises(ValueError, match="pass batches="):
        handle.set_sparsity(0.5)
    with pytest.raises(ValueError, match="sparse already"):
        lte(model, **QUICK)


def test_text_is_sampled_where_there_is_none() -> None:
    model = tiny_llama()
    with moefication(model, tokens=256, epochs=1, **QUICK) as handle:
        assert len(handle.layers) == 2
    with pytest.raises(ValueError, match="no sparse FFN"):
        sparse_layers(model)
