"""Bytes read as one knob: the walk through a layer's settings, what all layers make of it, and what is kept."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_prunepath.budget as budget
from torch_prunepath import (
    SparsifyConfig,
    densify,
    describe,
    load,
    rebuild,
    record_sparsity,
    set_budget,
    set_tau,
    sparse_layers,
    sparsify,
)
from torch_prunepath.experts.path import LayerCosts, Point, Setting, convex, layer_path, shared_out
from torch_prunepath.layer.reference import select_reference
from torch_prunepath.layer.views import sparse_views

CONFIG = SparsifyConfig(expert_size=8, partition="kmeans", router="centroid", budget="uniform")
FAMILIES = ["llama", "gpt2", "phi3", "bert", "opt", "bloom", "t5_gated"]


def sparse(name: str = "llama", **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A sparse model, and data of 256 tokens."""
    model, inputs = ARCHITECTURES[name]()
    ids = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(1))
    data = {key: ids for key in inputs}
    return sparsify(model, 0.9, config=dataclasses.replace(CONFIG, **settings), progress=False), data


def knobs(model: nn.Module) -> list[tuple[float, float, float]]:
    return [(float(v.tau), float(v.theta_x), float(v.theta_h)) for v in sparse_layers(model).values()]


def read(model: Any, data: dict[str, Tensor]) -> float:
    with torch.no_grad(), record_sparsity(model) as record:
        model(**data)
    return record.shares.bytes


# --- one layer --------------------------------------------------------------------------------------------------------


points = st.lists(
    st.builds(
        lambda b, c: Point(b, c, Setting(1.0, b, c)),
        st.floats(0.0, 1.0, width=16),
        st.floats(0.0, 4.0, width=16),
    ),
    min_size=1,
    max_size=12,
)


@given(points, st.floats(0.0, 8.0))
def test_convex_keeps_what_is_best_at_some_price(found: list[Point], price: float) -> None:
    hull = convex(found)
    assert set(hull) <= set(found)
    assert all(a.bytes > b.bytes and a.cost < b.cost for a, b in itertools.pairwise(hull))
    best = min(p.cost + price * p.bytes for p in found)
    assert min(p.cost + price * p.bytes for p in hull) == pytest.approx(best, abs=1e-9)
    slopes = [(b.cost - a.cost) / (a.bytes - b.bytes) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)


@pytest.mark.parametrize("gate", ["one", "sigmoid"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_costs_are_those_of_the_definition(name: str, gate: str) -> None:
    """Against loops over tokens: what counts, what is missing in the output, how many bytes are read."""
    model, _ = sparse(name, gate=gate)
    (site, layer), view = next(iter(sparse_layers(model).items())), next(iter(sparse_views(model).values()))
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(40, layer.ffn.hidden_size, generator=generator)
    root_DD = torch.randn(layer.ffn.hidden_size, layer.ffn.hidden_size, generator=generator)
    fisher_DD = root_DD @ root_DD.t()
    with torch.no_grad():
        costs = LayerCosts(view, layer, x_ND, fisher_DD)
        point = costs.point((5, 4, 5))
        tau, theta_x, theta_h = point.setting
        scores_NE = layer.router(x_ND).float()
        first = [w for w in (view.up_FD, view.gate_FD) if w is not None]
        column_D = sum(w.square().sum(0) for w in first).sqrt()
        row_F = view.down_FD.norm(dim=1)
        weights_NE = scores_NE.sigmoid() if gate == "sigmoid" else torch.ones_like(scores_NE)
        size, roots, read_bytes = layer.experts.expert_size, [], []
        for x_D, scores_E, weights_E in zip(x_ND, scores_NE, weights_NE, strict=True):
            active_E = select_reference(scores_E.tolist(), tau)
            counts_D = x_D.abs() * column_D >= theta_x
            h_F = view.hidden((x_D * counts_D)[None])[0]
            expert_F = torch.arange(len(h_F)) // size
            active_F = torch.tensor(active_E)[expert_F]
            kept_F = active_F & (h_F.abs() * row_F >= theta_h)
            y_D = (h_F * kept_F * weights_E[expert_F]) @ view.down_FD
            delta_D = y_D - (view.hidden(x_D[None])[0] * weights_E[expert_F]) @ view.down_FD
            roots.append(float(0.5 * delta_D @ fisher_DD @ delta_D) ** 0.5)
            up = active_F.float().mean() * counts_D.float().mean() * len(first)
            read_bytes.append(float(up + kept_F.float().mean()) / (len(first) + 1))
    assert theta_x > 0.2 and theta_h > 0 and site in sparse_layers(model)
    assert point.cost == pytest.approx((sum(roots) / 40) ** 2, rel=1e-3)
    router = layer.router.weight.numel() / ((len(first) + 1) * view.down_FD.numel())
    assert point.bytes == pytest.approx(sum(read_bytes) / 40 + router, rel=1e-5)


def test_a_walk_goes_down_from_the_whole_layer() -> None:
    model, _ = sparse()
    layer, view = next(iter(sparse_layers(model).values())), next(iter(sparse_views(model).values()))
    x_ND = torch.randn(64, layer.ffn.hidden_size, generator=torch.Generator().manual_seed(0))
    path = layer_path(LayerCosts(view, layer, x_ND, torch.eye(layer.ffn.hidden_size)))
    assert path[0].setting == Setting(1.0, 0.0, 0.0) and path[0].cost == 0.0
    assert path[-1].bytes < 0.35 and len(path) > 8
    for before, after in itertools.pairwise(path):
        assert before.bytes > after.bytes and before.cost < after.cost
        assert before.setting.tau >= after.setting.tau and before.setting.theta_x <= after.setting.theta_x


# --- all layers -------------------------------------------------------------------------------------------------------


@given(st.lists(points, min_size=1, max_size=4), st.floats(0.05, 1.0))
def test_shared_out_reads_what_is_asked(found: list[list[Point]], share: float) -> None:
    paths = {str(i): convex(layer) for i, layer in enumerate(found)}
    sizes = {name: 1.0 + int(name) for name in paths}
    total = sum(sizes.values())
    most = sum(path[0].bytes * sizes[name] for name, path in paths.items()) / total
    least = sum(path[-1].bytes * sizes[name] for name, path in paths.items()) / total
    target = least + share * (most - least)
    settings = shared_out(paths, sizes, target)
    # In these paths theta_x is the bytes, so that the interpolated settings tell what is read.
    got = sum(setting.theta_x * sizes[name] for name, setting in settings.items()) / total
    assert got == pytest.approx(target, abs=1e-6)
    if least > 0.01:
        with pytest.raises(ValueError, match="out of reach"):
            shared_out(paths, sizes, least * 0.99)


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_are_as_asked(name: str) -> None:
    model, data = sparse(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for share in (0.6, 0.45, 0.3):
        given_back = set_budget(model, share, data if share == 0.6 else None, progress=False)
        assert given_back == pytest.approx(share)
        assert read(model, data) == pytest.approx(share, abs=0.03)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    set_budget(model, 1.0)
    assert knobs(model) == [(1.0, 0.0, 0.0)] * len(knobs(model))


def test_the_knob_is_monotone_and_needs_no_data_again() -> None:
    model, data = sparse()
    set_budget(model, 0.5, data, progress=False)
    at_half = knobs(model)
    shares = [1.0, 0.9, 0.75, 0.6, 0.5, 0.4, 0.3]
    found = []
    for share in shares:
        set_budget(model, share)
        found.append(read(model, data))
    assert all(a > b for a, b in itertools.pairwise(found))
    set_tau(model, 0.7)
    assert set_budget(model, 0.5) == pytest.approx(0.5) and knobs(model) == at_half


def test_padding_and_tokens_in_front_do_not_count() -> None:
    model, data = sparse()
    ids = data["input_ids"]
    set_budget(model, 0.5, {"input_ids": ids}, progress=False)
    expected = sum(knobs(model), ())
    padded = torch.cat([ids, torch.zeros_like(ids[:, :5])], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :5])], 1)
    set_budget(model, 0.5, {"input_ids": padded, "attention_mask": mask}, progress=False)
    assert sum(knobs(model), ()) == pytest.approx(expected, rel=0.05)


def test_it_costs_less_than_one_sparsity_alone() -> None:
    """At equal bytes the output is nearer to the dense one's than with experts alone."""
    model, data = sparse(config := "llama")
    dense, _ = ARCHITECTURES[config]()

    def error() -> float:
        with torch.no_grad():
            return float((model(**data).logits - dense(**data).logits).square().mean())

    set_budget(model, 0.5, data, progress=False)
    ours = error()
    for layer in sparse_layers(model).values():
        layer.theta_x.zero_()
        layer.theta_h.zero_()
    low, high = 1e-3, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        set_tau(model, middle)
        low, high = (low, middle) if read(model, data) > 0.5 else (middle, high)
    assert ours < error()


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_checkpoints_keep_path_and_place(name: str, tmp_path: Path) -> None:
    model, data = sparse(name)
    set_budget(model, 0.5, data, progress=False)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert knobs(again) == knobs(model) and describe(again) == describe(model)
    with torch.no_grad():
        assert torch.equal(again(**data)[0], model(**data)[0])
    set_budget(model, 0.33)
    set_budget(again, 0.33)
    assert knobs(again) == knobs(model)
    fresh, _ = ARCHITECTURES[name]()
    rebuild(fresh, describe(model).to_dict()).load_state_dict(model.state_dict())
    set_budget(fresh, 0.7)
    set_budget(model, 0.7)
    assert knobs(fresh) == knobs(model)
    copied = copy.deepcopy(model)
    set_budget(copied, 0.4)
    assert knobs(copied) != knobs(model)


def test_densify_takes_the_path_away() -> None:
    model, data = sparse()
    set_budget(model, 0.5, data, progress=False)
    densify(model)
    sparsify(model, config=CONFIG, progress=False)
    with pytest.raises(ValueError, match="no path yet: pass batches"):
        set_budget(model, 0.5)


def test_a_compiled_model_stays_compiled() -> None:
    ran = 0

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal ran
            ran += 1
            return graph(*args)

        return run

    torch._dynamo.reset()  # of what other tests compiled of the same class
    model, data = sparse()
    compiled = torch.compile(model, backend=backend)
    for share in (0.5, 0.6):
        set_budget(compiled, share, data, progress=False)
    assert ran == 0, "measuring runs eagerly"
    with torch.no_grad():
        compiled(**data)
        first = ran
        assert first > 0
        for share in (0.7, 0.4, 0.3):
            set_budget(compiled, share)
            found = compiled(**data)[0]
            torch.testing.assert_close(found, model(**data)[0])
    assert ran == 4 * first


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan"), True, "0.5", None])
def test_shares_that_are_none(share: Any) -> None:
    model, data = sparse()
    before = knobs(model)
    with pytest.raises(ValueError, match=r"is outside \(0, 1\]"):
        set_budget(model, share, data, progress=False)
    assert knobs(model) == before


def test_out_of_reach() -> None:
    model, data = sparse()
    before = knobs(model)
    with pytest.raises(ValueError, match=r"0.001 of the bytes is out of reach: the least that this model can read"):
        set_budget(model, 0.001, data, progress=False)
    assert knobs(model) == before
    assert not any(layer.has_norms or layer.path for layer in sparse_layers(model).values())


def test_a_dense_model() -> None:
    with pytest.raises(ValueError, match="holds no sparse FFN"):
        set_budget(ARCHITECTURES["llama"]()[0], 0.5, torch.randint(3, 90, (8, 32)), progress=False)


def test_parts_measured_apart() -> None:
    model, data = sparse()
    set_budget(model, 0.5, data, progress=False)
    layer = next(iter(sparse_layers(model).values()))
    assert layer.path is not None
    layer.path = layer.path[:-1]
    with pytest.raises(ValueError, match="were not measured together"):
        set_budget(model, 0.5)


@pytest.mark.parametrize("where", ["fisher_information", "_bytes_read", "layer_path"])
def test_interrupted_it_leaves_everything_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = sparse()
    set_tau(model, 0.8)
    before = knobs(model)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(budget, where, stop)
    with pytest.raises(KeyboardInterrupt):
        set_budget(model, 0.5, data, progress=False)
    assert knobs(model) == before
    assert not any(layer.has_norms or layer.path for layer in sparse_layers(model).values())
    assert all(not layer.routing_hooks and not layer.recorders for layer in sparse_layers(model).values())
