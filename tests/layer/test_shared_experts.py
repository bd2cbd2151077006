"""Experts that are always active: selection, gates, conversion, checkpoints, and every path that computes them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.test_conversion import watching
from torch_prunepath import (
    SparsifyConfig,
    densify,
    fit_routers,
    load,
    record_sparsity,
    set_sparsity,
    set_tau,
    sparse_layers,
    sparsify,
)
from torch_prunepath.card import model_card
from torch_prunepath.checkpoint import read_info
from torch_prunepath.discover import find_ffns
from torch_prunepath.experts.fit import contribution_shares
from torch_prunepath.experts.partition import largest_contributions, partition
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.reference import select_reference, sparse_ffn_reference
from torch_prunepath.layer.views import sparse_views
from torch_prunepath.ops import operators as ops
from torch_prunepath.ops.cpu import select as cpu_select
from torch_prunepath.select import mask_from_scores, select_experts, sigmoid_weights
from torch_prunepath.train import RoutingTape, TrainConfig, losses
from torch_prunepath.train.terms import Targets

CONFIG = SparsifyConfig(expert_size=8, shared_experts=2)


def sparse(name: str = "llama", tau: float = 0.4, **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = ARCHITECTURES[name]()
    config = dataclasses.replace(CONFIG, **changes)
    return sparsify(model.eval(), tau=tau, config=config, calibration=inputs, progress=False), inputs


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs)[0]


# --- selection and weights --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    T=st.integers(0, 5),
    routed=st.integers(1, 40),
    shared=st.integers(0, 6),
    tau=st.one_of(st.floats(1e-3, 1.0), st.just(1.0)),
    rule=st.sampled_from(["reach", "below"]),
    levels=st.sampled_from([1, 3, None]),
    seed=st.integers(0, 1000),
)
def test_selection_is_that_of_the_others(
    T: int, routed: int, shared: int, tau: float, rule: Any, levels: int | None, seed: int
) -> None:
    """Every implementation; a shared expert's own score, however high, broken or low, decides nothing."""
    rng = torch.Generator().manual_seed(seed)
    scores = 4 * torch.randn(T, shared + routed, generator=rng)
    if levels is not None:
        scores = torch.randint(levels, scores.shape, generator=rng).float()
    others = mask_from_scores(scores[:, shared:], torch.tensor(tau), rule)
    scores[:, :shared] = torch.tensor([99.0, -99.0, float("nan"), float("inf")])[
        torch.randint(4, (T, shared), generator=rng)
    ]
    level = torch.tensor(tau)
    found = mask_from_scores(scores, level, rule, shared)
    assert found[:, :shared].all() and torch.equal(found[:, shared:], others)
    assert torch.equal(cpu_select.select_experts(scores, level, rule, shared), found)
    assert torch.equal(ops.select_experts(scores, level, rule, shared), found)
    assert torch.equal(ops.select_experts._init_fn(scores, level, rule, shared), found)
    for scores_E, mask_E in zip(scores, found, strict=True):
        active_K = cpu_select.active_experts(scores_E, float(level), rule, shared)
        assert torch.equal(active_K.sort().values, mask_E.nonzero().squeeze(1))


def test_the_definition_and_the_reference_agree() -> None:
    scores = 3 * torch.randn(50, 17, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([select_reference(row, 0.7, "reach", 3) for row in scores.tolist()])
    assert torch.equal(select_experts(scores, 0.7, "reach", 3), expected)
    assert expected[:, :3].all() and not expected[:, 3:].all()


@pytest.mark.parametrize("shared", [-1, 5])
def test_as_many_as_all_or_fewer_than_none_are_refused(shared: int) -> None:
    with pytest.raises(ValueError, match=f"shared={shared} must be at least 0, and fewer than the 5 experts"):
        select_experts(torch.zeros(1, 5), 0.5, "reach", shared)


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_weights(shared: int) -> None:
    scores = torch.randn(4, 7, requires_grad=True)
    weights = sigmoid_weights(scores, 0.5, shared)
    expected = torch.cat([torch.ones(4, shared), torch.sigmoid(scores[:, shared:] + 0.5)], dim=1)
    torch.testing.assert_close(weights, expected)
    weights.sum().backward()
    assert scores.grad is not None and not scores.grad[:, :shared].any() and scores.grad[:, shared:].all()


def test_opcheck() -> None:
    for shared in (0, 4):
        torch.library.opcheck(ops.select_experts, (torch.randn(3, 9), torch.tensor(0.5), "below", shared))


# --- which neurons ----------------------------------------------------------------------------------------------------


def test_largest_contributions() -> None:
    contributions = torch.tensor([[1.0, 5.0, 0.0, 3.0, 3.0], [1.0, 0.0, 6.0, 3.0, 3.0]])
    assert largest_contributions(contributions, 2).tolist() == [2, 3], "a tie goes to the lower index"
    assert largest_contributions(contributions, 0).tolist() == []
    assert largest_contributions(contributions.bfloat16(), 4).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["coactivation", "kmeans", "contiguous", "random"])
def test_partition_groups_the_others_as_if_they_were_alone(name: Any) -> None:
    model, _ = ARCHITECTURES["llama"]()
    view = FFNView(model, find_ffns(model)[0])
    F = view.spec.ffn_size
    contributions = torch.rand(60, F, generator=torch.Generator().manual_seed(0))
    first = torch.tensor([0, 3, 4, 9, 11, 17, 20, 21])
    order = partition(name, view, contributions, 8, first_N=first)
    assert torch.equal(order.sort().values, torch.arange(F)) and torch.equal(order[:8], first)
    others = torch.tensor([f for f in range(F) if f not in first.tolist()])
    if name == "contiguous":
        assert torch.equal(order[8:], others)
    if name == "coactivation":  # the contributions of the first ones make no difference
        contributions[:, first] = 7.0
        assert torch.equal(partition(name, view, contributions, 8, first_N=first), order)
    assert torch.equal(
        partition(name, view, contributions, 8, first_N=first[:0]), partition(name, view, contributions, 8)
    )


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["one", "sigmoid"])
@pytest.mark.parametrize("name", ["llama", "opt", "bert", "phi3"])
def test_models_compute_the_reference(name: str, gate: Any) -> None:
    model, inputs = sparse(name, gate=gate, gate_offset=0.5 if gate == "sigmoid" else 0.0)
    parts = model(**inputs)[0]
    with watching(model) as seen:
        torch.testing.assert_close(output(model, inputs), parts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(model, inputs), parts, rtol=1e-4, atol=1e-5)
    layers, views = sparse_layers(model), sparse_views(model)
    for site, record in seen.items():
        scores = layers[site].router(record["x"]).detach()
        gates = None if gate == "one" else torch.sigmoid(scores + 0.5)
        if gates is not None:
            gates[:, :2] = 1.0
        assert record["mask"][:, :2].all() and not record["mask"].all()
        assert torch.equal(record["mask"], mask_from_scores(scores, layers[site].tau, "reach", 2))
        expected = sparse_ffn_reference(views[site], record["x"], record["mask"], gates, 8).detach()
        torch.testing.assert_close(record["y"].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_tau_1_is_dense_and_densify_restores_every_bit() -> None:
    dense, inputs = ARCHITECTURES["llama"]()
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    expected = output(dense, inputs)
    model, _ = sparse(tau=1.0)
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-5)
    after = densify(model).state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())


def test_the_shared_neurons_are_those_that_contribute_most() -> None:
    model, inputs = ARCHITECTURES["llama"]()
    view = FFNView(model, find_ffns(model)[0])
    seen: list[Tensor] = []
    handle = view.up.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    output(model, inputs)
    handle.remove()
    means_F = (view.hidden(seen[0]).abs() * view.down_FD.norm(dim=-1)).mean(0)
    sparsify(model, config=CONFIG, calibration=inputs, progress=False)
    order = next(iter(sparse_layers(model).values())).permutation.tolist()
    assert order[:16] == means_F.topk(16).indices.sort().values.tolist()


def test_they_count_as_active() -> None:
    model, inputs = sparse(tau=1e-6)
    with record_sparsity(model) as record:
        output(model, inputs)
    F = next(iter(sparse_layers(model).values())).ffn.ffn_size
    one = (8, F % 8 or 8)  # is chosen besides, perhaps the last and smaller one
    assert 1 - (16 + max(one)) / F <= record.sparsity <= 1 - (16 + min(one)) / F
    with pytest.raises(ValueError, match="out of reach: one expert a layer beside the shared ones is active"):
        set_sparsity(model, 0.7, inputs, progress=False)
    set_sparsity(model, 0.2, inputs, progress=False)


def test_budgets_know_of_them() -> None:
    """Layers are costed with the shared experts active: had all of them a score of 0, budgets would differ."""
    model, inputs = sparse()
    other, _ = ARCHITECTURES["llama"]()
    plain = sparsify(other, config=SparsifyConfig(expert_size=8), calibration=inputs, progress=False)
    budgets = [[layer.budget for layer in sparse_layers(m).values()] for m in (model, plain)]
    assert budgets[0] != budgets[1] and all(b > 0 for b in budgets[0])


def test_routers_are_fitted_to_the_others() -> None:
    model, inputs = sparse()
    for _ in range(2):
        for layer in sparse_layers(model).values():
            assert not layer.router.weight[:2].any() and not layer.router.bias[:2].any()
            assert layer.router.weight[2:].any(1).all()
            assert layer.routed(layer.router.weight.t()).shape[1] == layer.num_experts - 2
            layer.router.weight.data.fill_(1.0)
        fit_routers(model, inputs, progress=False)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_checkpoints_keep_them(name: str, tmp_path: Path) -> None:
    model, inputs = sparse(name)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(output(again, inputs), output(model, inputs))
    assert all(layer.experts.shared == 2 for layer in sparse_layers(again).values())
    set_tau(again, 0.4)
    again.save_pretrained(tmp_path / "again")
    info = read_info(tmp_path / "again")
    assert info == read_info(tmp_path)
    assert info["config"]["shared_experts"] == 2 and all(layer["shared_experts"] == 2 for layer in info["layers"])
    assert "5 of 8, 2 always active" in model_card(again)


def test_adapters_keep_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from torch_prunepath.integrations.peft import PrunePathConfig

    base, inputs = ARCHITECTURES["llama"]()
    config = PrunePathConfig(
        tau=0.4, expert_size=8, shared_experts=2, gate="sigmoid", calibration=inputs, progress=False
    )
    adapted = peft.get_peft_model(base, config)
    expected = output(adapted, inputs)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(ARCHITECTURES["llama"]()[0], tmp_path)
    torch.testing.assert_close(output(again, inputs), expected)
    merged = again.merge_and_unload()
    assert all(layer.experts.shared == 2 for layer in sparse_layers(merged).values())
    torch.testing.assert_close(output(merged, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_share_of_each_layers_experts(name: str, tmp_path: Path) -> None:
    model, inputs = ARCHITECTURES[name]()
    config = SparsifyConfig(expert_size=8, shared_experts=0.3)
    dense = output(model, inputs)
    sparsify(model, tau=1.0, config=config, calibration=inputs, progress=False)
    for layer in sparse_layers(model).values():
        assert layer.experts.shared == round(0.3 * layer.num_experts) > 0
    torch.testing.assert_close(output(model, inputs), dense)
    set_tau(model, 0.4)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(load(tmp_path), inputs), output(model, inputs))
    assert read_info(tmp_path)["config"]["shared_experts"] == 0.3


def test_layers_of_different_sizes_share_different_numbers() -> None:
    model, inputs = ARCHITECTURES["llama"]()
    wider = copy.deepcopy(model.config)
    wider.intermediate_size = 2 * model.config.intermediate_size
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(wider)
    config = SparsifyConfig(expert_size=8, shared_experts=0.3)
    sparsify(model.eval(), config=config, calibration=inputs, progress=False)
    first, second = sparse_layers(model).values()
    assert first.experts.shared == round(0.3 * first.num_experts) < second.experts.shared
    assert second.experts.shared == round(0.3 * second.num_experts)


def test_how_many_a_share_is() -> None:
    config = SparsifyConfig(expert_size=8, shared_experts=0.3)
    assert [config.num_shared(neurons) for neurons in (8, 9, 80, 81)] == [0, 1, 3, 3]
    assert SparsifyConfig(shared_experts=0.01).num_shared(80) == 0
    assert SparsifyConfig(shared_experts=3).num_shared(80) == 3


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals_leave_the_model_dense() -> None:
    with pytest.raises(ValueError, match="shared_experts=-1 must not be negative"):
        SparsifyConfig(shared_experts=-1)
    with pytest.raises(ValueError, match="shared_experts=nan must not be negative"):
        SparsifyConfig(shared_experts=float("nan"))
    with pytest.raises(ValueError, match=r"shared_experts=1.5 is no whole number, and no share below 1"):
        SparsifyConfig(shared_experts=1.5)
    model, inputs = ARCHITECTURES["llama"]()
    with pytest.raises(ValueError, match=r"shared_experts=500 leaves no expert to choose: model.layers.0.mlp has"):
        sparsify(model, config=SparsifyConfig(expert_size=8, shared_experts=500), calibration=inputs, progress=False)
    encoder, _ = ARCHITECTURES["bert"]()
    weights_only = dataclasses.replace(CONFIG, partition="kmeans", router="centroid", budget="uniform")
    with pytest.raises(ValueError, match="BertForMaskedLM cannot write its own: pass calibration="):
        sparsify(encoder, config=weights_only, progress=False)
    for dense in (model, encoder):
        with pytest.raises(ValueError, match="holds no sparse FFN"):
            sparse_layers(dense)


def test_a_manifest_that_shares_everything_is_damaged(tmp_path: Path) -> None:
    model, _ = sparse()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"shared": 2', '"shared": 5000'))
    with pytest.raises(ValueError, match=r"damaged prunepath manifest \(model.layers.0.mlp: 5000 of"):
        load(tmp_path)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detached", [False, True])
def test_router_losses_are_about_the_others(detached: bool) -> None:
    model, inputs = sparse(gate="sigmoid")
    config = TrainConfig(
        steps=1,
        task=0.0,
        entropy=1.0,
        load_balance=1.0,
        lte_separation=1.0,
        contribution_fit=1.0,
        fit_detached=detached,
    )
    tape = RoutingTape(model, inside=Targets(config, "seed", torch.device("cpu")))
    with tape:
        model.train()(**inputs)
    total = torch.zeros(())
    for call in tape.calls:
        scores = call.scores_TE[:, 2:]
        h_NF = call.view.hidden(call.x_TD).detach()
        shares = contribution_shares(h_NF[:, 16:], call.view.down_FD[16:], 8)
        expected = {
            "entropy": losses.entropy(scores, call.weight_T),
            "load_balance": losses.load_balance(scores, call.weight_T),
            "lte_separation": losses.lte_separation(scores, call.weight_T),
            "contribution_fit": losses.contribution_fit(scores, shares, call.weight_T),
        }
        torch.testing.assert_close(call.inside.terms, expected)
        total = total + sum(call.inside.terms.values())
    total.backward()
    for layer in sparse_layers(model).values():
        assert layer.router.weight.grad[2:].any() and not layer.router.weight.grad[:2].any()
