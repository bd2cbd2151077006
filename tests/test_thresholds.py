"""Thresholds on inputs and neurons: what counts, every path against the definition, and how they are set."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, HAND_WRITTEN
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_prunepath import (
    Routing,
    SparsifyConfig,
    densify,
    describe,
    fit_routers,
    load,
    rebuild,
    record_sparsity,
    register_routing_hook,
    set_tau,
    set_threshold_shares,
    set_thresholds,
    sparse_layers,
    sparsify,
)
from torch_prunepath.config import FFNSpec
from torch_prunepath.layer import ExpertsSpec
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.manifest import Manifest
from torch_prunepath.layer.reference import count_reference, norms_reference, sparse_ffn_reference
from torch_prunepath.layer.router import Router
from torch_prunepath.layer.sparse import Neurons
from torch_prunepath.layer.swap import Swap, make_routed
from torch_prunepath.layer.views import recording_neurons, sparse_views
from torch_prunepath.ops.experts import expand_experts
from torch_prunepath.select import keep_counted, uncounted
from torch_prunepath.weights import Threshold

ALL = {**ARCHITECTURES, **HAND_WRITTEN}
STRUCTURES = ["llama", "phi3", "gpt2", "bert", "opt", "t5", "t5_gated", "albert", "falcon", "fused_up_first"]
"""Gated and plain, fused gate and up in either order, halves apart, Conv1D, biases, layers that are called twice."""


def tiny(name: str, tau: float = 0.7, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = ALL[name]()
    weights_only: dict[str, Any] = {"partition": "contiguous", "router": "centroid", "budget": "uniform"}
    config = SparsifyConfig(**{"expert_size": 8, **weights_only, **changes})
    return sparsify(model.eval(), tau=tau, config=config, progress=False), inputs


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


# --- the definition ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    values=st.lists(st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0]), min_size=1, max_size=9),
    norm=st.floats(0, 10, width=32),
    theta=st.floats(0, 10, width=32),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_what_counts(values: list[float], norm: float, theta: float, dtype: torch.dtype) -> None:
    value_TN = torch.tensor([values]).to(dtype)
    norm_N = torch.full((len(values),), norm)
    threshold = Threshold(torch.tensor(theta), norm_N)
    off = uncounted(value_TN, threshold)
    for v, is_off in zip(value_TN[0].double().tolist(), off[0].tolist(), strict=True):
        product = float(torch.tensor(abs(v), dtype=torch.float32) * norm_N[0])
        assert is_off == (product < theta)
        if v != v or theta == 0:
            assert not is_off
    kept = keep_counted(value_TN, threshold)
    assert kept.dtype == dtype and not kept[off].any()
    assert torch.equal(kept[~off].nan_to_num(7.0), value_TN[~off].nan_to_num(7.0))
    assert keep_counted(value_TN, None) is value_TN


class Dense(nn.Module):
    """An FFN whose projections have random weights."""

    def __init__(self, D: int, F: int, gated: bool, bias: bool, activation: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, F, bias=bias), nn.Linear(F, D, bias=bias)
        if gated:
            self.gate = nn.Linear(D, F, bias=bias)
        self.spec = FFNSpec("", "up", "down", activation, D, F, gate="gate" if gated else None)


def threshold_in_a_gap(size_N: Tensor, share: float) -> float:
    """A number that lies well between two of the sizes, about this share of which are smaller."""
    sizes = size_N.flatten().double().sort().values
    place = min(int(share * len(sizes)), len(sizes) - 1)
    low, high = (float(sizes[place - 1]) if place else 0.0), float(sizes[place])
    assume(high - low > 1e-3 * high)
    return (low + high) / 2 if place else 0.0


@settings(deadline=None, max_examples=80)
@given(
    tokens=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 90), st.integers(1, 20)),
    gated=st.booleans(),
    bias=st.booleans(),
    gate=st.sampled_from(["one", "sigmoid"]),
    activation=st.sampled_from(["silu", "relu", "gelu"]),
    shared=st.integers(0, 1),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    tau=st.sampled_from([0.3, 0.8, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_a_layer_is_the_definition(  # type: ignore[no-untyped-def]
    tokens, sizes, gated, bias, gate, activation, shared, shares, tau, dtype, seed
) -> None:
    """One operator, its parts, the modules by themselves, and all of them while training."""
    (D, F, S), generator = sizes, torch.manual_seed(seed)
    layer = Dense(D, F, gated, bias, activation).to(dtype)
    view = FFNView(layer, layer.spec)
    offset, shared = 0.5 if gate == "sigmoid" else 0.0, min(shared, -(-F // S) - 1)
    experts = ExpertsSpec(S, gate=gate, gate_offset=offset, shared=shared)
    router = Router.of(2 * torch.randn(-(-F // S), D, generator=generator), None).to(dtype)
    make_routed(Swap(view, experts, router, torch.arange(F), tau, 1.0, SparsifyConfig()))
    x_TD = torch.randn(tokens, D, generator=generator, dtype=dtype)

    column_norm_D, row_norm_F = norms_reference(view)
    column_norm_D, row_norm_F = column_norm_D.detach(), row_norm_F.detach()
    theta_x = threshold_in_a_gap((x_TD * column_norm_D).abs(), shares[0])
    set_thresholds(layer, inputs=theta_x)
    off_TD = torch.tensor([[not one for one in count_reference(x_D, column_norm_D, theta_x)] for x_D in x_TD])
    h_TF = view.hidden(x_TD.masked_fill(off_TD, 0)).detach()
    theta_h = threshold_in_a_gap((h_TF * row_norm_F).abs(), shares[1])
    set_thresholds(layer, neurons=theta_h)

    seen: list[Routing] = []
    with register_routing_hook(layer, seen.append):  # type: ignore[arg-type]
        parts = layer(x_TD)
    assert torch.equal(seen[0].x_TD, x_TD), "the router reads everything"
    weights_TE = None
    if gate == "sigmoid":
        weights_TE = torch.sigmoid(seen[0].scores_TE.double() + 0.5)
        weights_TE[:, : experts.shared] = 1
    wide = x_TD.double()
    with torch.no_grad():
        expected = sparse_ffn_reference(view, wide, seen[0].mask_TE, weights_TE, S, theta_x, theta_h)
        at_once = layer(x_TD)
    trained = layer.train()(x_TD)
    bound = 1e-5 if dtype == torch.float32 else 1e-7  # scores and their gates are float32
    for found in (parts, at_once, trained):
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
@torch.no_grad()
def test_thresholds_of_0_change_no_bit(name: str) -> None:
    model, inputs = tiny(name)
    before = output_of(model, inputs)
    keys = model.state_dict().keys()
    set_thresholds(model, inputs=0, neurons=0.0)
    assert torch.equal(output_of(model, inputs), before)
    assert model.state_dict().keys() == keys
    with record_sparsity(model) as record:
        assert torch.equal(output_of(model, inputs), before)
    assert record.shares.inputs == record.shares.neurons == 1.0


class ByHooks:
    """An implementation of its own: hooks on a dense model's projections, with masks that were seen elsewhere."""

    def __init__(self, sparse: nn.Module, dense: nn.Module, theta_x: float, theta_h: float) -> None:
        self.masks: dict[str, list[Tensor]] = {}
        layers = sparse_layers(sparse)
        for name, view in sparse_views(sparse).items():
            owner, spec = dense.get_submodule(view.spec.name), view.spec
            plain = FFNView(dense, spec)
            column_norm_D, row_norm_F = norms_reference(plain)
            first = [owner.get_submodule(part) for part in (spec.up, spec.gate) if part is not None]
            for module in first:
                module.register_forward_pre_hook(self.inputs(column_norm_D, theta_x))
            size = layers[name].experts.expert_size
            plain.down.register_forward_pre_hook(self.neurons(layers[name].name, row_norm_F, theta_h, size))

    def see(self, routing: Routing) -> None:
        self.masks.setdefault(routing.name, []).append(routing.mask_TE)

    def inputs(self, norm_D: Tensor, theta: float):  # type: ignore[no-untyped-def]
        return lambda module, args: (torch.where(args[0].double().abs() * norm_D >= theta, args[0], 0),)

    def neurons(self, name: str, norm_F: Tensor, theta: float, size: int):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            h = args[0]
            mask = expand_experts(self.masks[name].pop(0), size, h.shape[-1]).view(h.shape)
            return (torch.where(mask & (h.double().abs() * norm_F >= theta), h, 0),)

        return hook


@pytest.mark.parametrize("name", STRUCTURES)
@torch.no_grad()
def test_models_against_hooks_on_the_dense_model(name: str) -> None:
    model, inputs = tiny(name)
    dense = copy.deepcopy(model)
    for layer in sparse_layers(dense).values():  # neurons stay in expert order
        layer.permutation.copy_(torch.arange(layer.ffn.ffn_size))
    densify(dense)
    set_threshold_shares(model, [inputs], inputs=0.3, neurons=0.4, progress=False)
    thetas = [(float(layer.theta_x), float(layer.theta_h)) for layer in sparse_layers(model).values()]
    theta_x, theta_h = (sum(each) / len(thetas) * 1.0001 for each in zip(*thetas, strict=True))
    set_thresholds(model, inputs=theta_x, neurons=theta_h)
    other = ByHooks(model, dense, theta_x, theta_h)
    with register_routing_hook(model, other.see):
        expected = output_of(model, inputs)
    torch.testing.assert_close(output_of(dense, inputs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output_of(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, unthresholded(model, inputs), rtol=1e-3, atol=1e-3)


def unthresholded(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    model = copy.deepcopy(model)
    set_thresholds(model, inputs=0, neurons=0)
    return output_of(model, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@torch.no_grad()
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Operators and modules agree; a neuron at the threshold may fall on either side, and one token shows it."""
    model, inputs = tiny(name)
    set_threshold_shares(model, [inputs], inputs=0.3, neurons=0.3, progress=False)
    thetas = [float(layer.theta_x) for layer in sparse_layers(model).values()]
    wide = output_of(model, inputs)
    half = output_of(model.to(dtype), inputs)
    assert [float(layer.theta_x) for layer in sparse_layers(model).values()] == thetas
    assert half.dtype == dtype
    assert float((half.double() - wide.double()).norm() / wide.double().norm()) < 0.1
    for view, layer in zip(sparse_views(model).values(), sparse_layers(model).values(), strict=True):
        assert layer.column_norm_D.dtype == torch.float32
        torch.testing.assert_close(layer.column_norm_D.double(), norms_reference(view)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama", "bert", "opt", "fused_up_first"])
def test_a_token_does_not_depend_on_the_batch(name: str) -> None:
    model, inputs = tiny(name)
    set_threshold_shares(model, [inputs], inputs=0.3, neurons=0.4, progress=False)
    with torch.no_grad():
        together = output_of(model, inputs)
        alone = torch.cat([output_of(model, {key: value[i : i + 1] for key, value in inputs.items()}) for i in (0, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "fused_up_first"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_are_those_of_hooks_on_the_dense_model(name: str, training: bool) -> None:
    model, inputs = tiny(name)
    model = without_dropout(model.double())
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    dense = copy.deepcopy(model)
    for layer in sparse_layers(dense).values():
        layer.permutation.copy_(torch.arange(layer.ffn.ffn_size))
    densify(dense)
    set_thresholds(model, inputs=0.4, neurons=0.1)
    other = ByHooks(model, dense, 0.4, 0.1)
    model.train(training)
    with register_routing_hook(model, other.see):
        output_of(model, inputs).square().sum().backward()
    output_of(dense, inputs).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if "router" not in name}
    expected = {name: p.grad for name, p in dense.named_parameters()}
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_norms_follow_the_weights() -> None:
    """In training they are those of the weights at each step; in evaluation, after every switch and load."""
    for name in ("llama", "opt"):
        model, inputs = tiny(name)
        set_thresholds(model, inputs=0.5, neurons=0.2)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        without_dropout(model).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
            trained = output_of(model, inputs)
            torch.testing.assert_close(trained, output_of(model.eval(), inputs), rtol=1e-4, atol=1e-4)
            other.load_state_dict(model.state_dict())
            torch.testing.assert_close(output_of(other, inputs), trained, rtol=1e-4, atol=1e-4)
        for kind in (model, other):
            for view, (column, row) in norms_kept(kind):
                expected = norms_reference(view)
                torch.testing.assert_close(column.double(), expected[0], rtol=1e-5, atol=0)
                torch.testing.assert_close(row.double(), expected[1], rtol=1e-5, atol=0)


def norms_kept(model: nn.Module) -> list[tuple[FFNView, tuple[Tensor, Tensor]]]:
    views, layers = sparse_views(model), sparse_layers(model)
    return [
        (view, (layers[name].column_norm_D, view.down.row_norm_F if view.spec.split else layers[name].row_norm_F))
        for name, view in views.items()
    ]


# --- setting ----------------------------------------------------------------------------------------------------------


def test_one_value_one_a_layer_or_some_by_name() -> None:
    model, _ = tiny("llama")
    layers = sparse_layers(model)
    first, second = layers
    set_thresholds(model, inputs=0.5)
    assert [float(layer.theta_x) for layer in layers.values()] == [0.5, 0.5]
    assert [float(layer.theta_h) for layer in layers.values()] == [0.0, 0.0]
    set_thresholds(model, inputs=[0.25, 1], neurons={second: 2.0})
    assert [float(layer.theta_x) for layer in layers.values()] == [0.25, 1.0]
    assert [float(layer.theta_h) for layer in layers.values()] == [0.0, 2.0]
    set_thresholds(model, neurons={first: 3.0})
    assert [float(layer.theta_h) for layer in layers.values()] == [3.0, 2.0]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "nothing to set"),
    ({"inputs": -0.1}, "finite float32 number of at least 0, not -0.1"),
    ({"inputs": float("nan")}, "not nan"),
    ({"inputs": float("inf")}, "not inf"),
    ({"neurons": 1e39}, "not 1e\\+39"),
    ({"neurons": True}, "a number of at least 0, not True"),
    ({"neurons": "0.5"}, "a number of at least 0, not '0.5'"),
    ({"inputs": [0.5]}, "1 values of inputs for 2 sparse layers"),
    ({"inputs": [0.5, None]}, "a number of at least 0, not None"),
    ({"neurons": {"nope": 0.5}}, "no sparse layer is called 'nope'"),
    ({"inputs": 1.0, "neurons": [1.0, -1.0]}, "not -1.0"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=str)
def test_wrong_values_change_nothing(values: dict[str, Any], message: str) -> None:
    model, inputs = tiny("llama")
    with pytest.raises(ValueError, match=message):
        set_thresholds(model, **values)
    if values:
        with pytest.raises(ValueError):
            set_threshold_shares(model, [inputs], **values, progress=False)
    for layer in sparse_layers(model).values():
        assert not layer.has_norms and float(layer.theta_x) == float(layer.theta_h) == 0.0


def test_models_that_cannot_have_thresholds() -> None:
    dense, inputs = ARCHITECTURES["llama"]()
    for call in (lambda: set_thresholds(dense, inputs=1.0), lambda: set_threshold_shares(dense, [inputs], inputs=0.5)):
        with pytest.raises(ValueError, match="holds no sparse FFN"):
            call()
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match="cannot be read as they are"):
        set_thresholds(copy.deepcopy(model).to("meta"), inputs=1.0)


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_dense_again_nothing_is_left(name: str) -> None:
    dense, inputs = ARCHITECTURES[name]()
    model, _ = tiny(name)
    set_thresholds(model, inputs=0.5, neurons=0.2)
    with record_sparsity(model), torch.no_grad():
        output_of(model, inputs)
    densify(model)
    with torch.no_grad():
        assert torch.equal(output_of(model, inputs), output_of(dense, inputs))
    for module, other in zip(model.modules(), dense.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()
        assert module._buffers.keys() == other._buffers.keys()
        assert module._non_persistent_buffers_set == other._non_persistent_buffers_set
        assert not module._load_state_dict_post_hooks


@pytest.mark.parametrize("name", ["llama", "opt"])
@torch.no_grad()
def test_copies_and_pickles_keep_them(name: str) -> None:
    model, inputs = tiny(name)
    set_thresholds(model, inputs=0.5, neurons=0.2)
    expected = output_of(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output_of(twin, inputs), expected)
        set_thresholds(twin, inputs=0, neurons=0)
    assert torch.equal(output_of(model, inputs), expected), "the copies have their own"


def test_a_pickle_from_before_there_were_thresholds() -> None:
    model, _ = tiny("llama")
    for layer in sparse_layers(model).values():
        for name in ("theta_x", "theta_h"):
            del layer._buffers[name]
    twin = pickle.loads(pickle.dumps(model))
    assert all(float(layer.theta_h) == 0.0 for layer in sparse_layers(twin).values())


def test_set_inside_inference_mode() -> None:
    model, inputs = tiny("llama")
    with torch.inference_mode():
        set_thresholds(model, inputs=0.5, neurons=0.1)
        output_of(model, inputs)
    output_of(model, inputs).sum().backward()
    set_thresholds(model, inputs=0.2)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "phi3"])
@torch.no_grad()
def test_a_checkpoint_holds_them(name: str, tmp_path: Path) -> None:
    model, inputs = tiny(name)
    model.save_pretrained(tmp_path / "without")
    assert "theta_x" not in (tmp_path / "without" / "config.json").read_text()
    set_thresholds(model, inputs=0.1, neurons=[1 / 3, 0.0])
    model.save_pretrained(tmp_path / "with")
    entries = json.loads((tmp_path / "with" / "config.json").read_text())["quantization_config"]["layers"]
    third = float(torch.tensor(1 / 3))
    assert [(entry["theta_x"], entry.get("theta_h")) for entry in entries] == [
        (float(torch.tensor(0.1)), third),
        (float(torch.tensor(0.1)), None),
    ]
    again = load(tmp_path / "with")
    assert torch.equal(output_of(again, inputs), output_of(model, inputs))
    assert [float(layer.theta_h) for layer in sparse_layers(again).values()] == [third, 0.0]
    for (_, kept), (_, expected) in zip(norms_kept(again), norms_kept(model), strict=True):
        torch.testing.assert_close(kept, expected, rtol=1e-6, atol=0)
    plain = load(tmp_path / "without")
    assert not any(layer.has_norms for layer in sparse_layers(plain).values())


def test_a_manifest_rebuilds_them() -> None:
    model, inputs = tiny("llama")
    set_thresholds(model, inputs=0.25, neurons=0.125)
    dense, _ = ARCHITECTURES["llama"]()
    twin = rebuild(dense, describe(model).to_dict())
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(output_of(twin, inputs), output_of(model, inputs))
    with pytest.raises(ValueError, match="give them data first"):
        rebuild(ARCHITECTURES["llama"]()[0].to("meta"), describe(model))
    for wrong in (-1.0, float("nan"), "0.5", True):
        data = describe(model).to_dict()
        data["layers"][0]["theta_x"] = wrong
        with pytest.raises(ValueError, match="damaged prunepath manifest"):
            Manifest.from_dict(data)


# --- shares and records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "t5_gated"])
def test_shares_are_met_and_recorded(name: str) -> None:
    model, inputs = tiny(name)
    if "input_ids" in inputs:
        generator = torch.Generator().manual_seed(1)
        inputs = {key: torch.randint(3, 90, (8, 40), generator=generator) for key in inputs}
        inputs["attention_mask"] = torch.ones(8, 40, dtype=torch.long)
        inputs["attention_mask"][:, 31:] = 0
    set_threshold_shares(model, [inputs], inputs=0.35, neurons=0.5, progress=False)
    by_hand = Counted(model, inputs, keep=inputs.get("attention_mask") if name != "t5_gated" else None)
    with record_sparsity(model) as record, torch.no_grad():
        output_of(model, inputs)
    if name != "t5_gated":  # whose decoder has a mask of its own
        for layer, shares in record.shares_per_layer.items():
            assert shares == pytest.approx(by_hand.shares[layer])
        overall = [sum(each) / len(each) for each in zip(*by_hand.shares.values(), strict=True)]
        assert record.shares == pytest.approx(overall), "layers are of one size"
    assert record.shares.inputs == pytest.approx(0.65, abs=0.05)
    assert record.shares.neurons == pytest.approx(0.5, abs=0.05)
    assert record.shares.experts == pytest.approx(1 - record.sparsity, abs=0.05), "last experts are smaller"


class Noting:
    def __init__(self, note: Callable[[Neurons], None]) -> None:
        self.note_neurons = note


class Counted:
    """Shares by hand, one neuron at a time."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], keep: Tensor | None) -> None:
        self.shares: dict[str, tuple[float, float, float, float]] = {}
        self.layers = {layer.name: layer for layer in sparse_layers(model).values()}
        self.keep = slice(None) if keep is None else keep.reshape(-1).bool()
        self.routing: dict[str, Routing] = {}
        with contextlib.ExitStack() as stack, torch.no_grad():
            stack.enter_context(register_routing_hook(model, self.see))
            for layer, view in zip(sparse_layers(model).values(), sparse_views(model).values(), strict=True):
                stack.enter_context(recording_neurons(layer, view, Noting(partial(self.count, layer.name))))
            output_of(model, inputs)

    def see(self, routing: Routing) -> None:
        self.routing[routing.name] = routing

    def count(self, name: str, neurons: Neurons) -> None:
        routing, layer = self.routing[name], self.layers[name]
        active = neurons.active_TF[self.keep].double()
        size = (neurons.h_TF * neurons.threshold.norm_N).abs()[self.keep]
        counted = active * (size >= layer.theta_h)
        inputs = ((routing.x_TD * layer.column_norm_D).abs()[self.keep] >= layer.theta_x).double().mean(1)
        gated = 2 if layer.ffn.gated else 1
        one = layer.ffn.ffn_size * layer.ffn.hidden_size
        read = gated * one * active.mean(1) * inputs + one * counted.mean(1) + layer.router.weight.numel()
        self.shares[name] = (
            float(routing.mask_TE[self.keep].double().mean()),
            float(inputs.mean()),
            float(counted.sum() / active.sum()),
            float(read.mean()) / ((gated + 1) * one),
        )


def test_without_thresholds_a_record_counts_everything_in_active_experts() -> None:
    model, inputs = tiny("llama")
    with record_sparsity(model) as record, torch.no_grad():
        output_of(model, inputs)
    shares = record.shares
    assert (shares.inputs, shares.neurons) == (1.0, 1.0)
    layer = next(iter(sparse_layers(model).values()))
    assert shares.bytes == pytest.approx(1 - record.sparsity + layer.num_experts / (3 * layer.ffn.ffn_size))
    with pytest.raises(ValueError, match="no token ran"), record_sparsity(model) as record:
        _ = record.shares


def test_nothing_stays_behind_a_record() -> None:
    for name in ("llama", "bert"):
        model, inputs = tiny(name)
        set_thresholds(model, inputs=0.1, neurons=0.1)
        with record_sparsity(model), torch.no_grad():
            output_of(model, inputs)
        assert not any(getattr(module, "neuron_recorders", ()) for module in model.modules())


def test_exact_zeros_are_left_out_first() -> None:
    """relu leaves more zeros than the share: they are left out, all of them, and the output keeps its bits."""
    model, inputs = tiny("opt", tau=1.0)
    before = output_of(model, inputs)
    set_threshold_shares(model, [inputs], neurons=0.01, progress=False)
    with record_sparsity(model) as record, torch.no_grad():
        torch.testing.assert_close(output_of(model, inputs), before, rtol=1e-5, atol=1e-5)
    assert record.shares.neurons < 0.9


def test_shares_of_0_and_failures_leave_things_as_they_were() -> None:
    model, inputs = tiny("llama")
    set_threshold_shares(model, [inputs], inputs=0.0, neurons=0.0, progress=False)
    assert all(float(layer.theta_x) == float(layer.theta_h) == 0.0 for layer in sparse_layers(model).values())
    set_thresholds(model, inputs=0.25, neurons=0.125)

    def fail(routing: Routing) -> None:
        if float(sparse_layers(model)[routing.name].theta_x) > 0:  # inputs are done, neurons are being measured
            raise RuntimeError("out of memory")

    with register_routing_hook(model, fail), pytest.raises(RuntimeError, match="out of memory"):
        set_threshold_shares(model, [inputs], inputs=0.5, neurons=0.5, progress=False)
    for layer in sparse_layers(model).values():
        assert (float(layer.theta_x), float(layer.theta_h)) == (0.25, 0.125)


def test_routers_are_fitted_to_all_that_a_layer_reads() -> None:
    model, inputs = tiny("llama")
    twin = copy.deepcopy(model)
    set_thresholds(twin, inputs=0.6, neurons=0.2)
    for one in (model, twin):
        fit_routers(one, [inputs], progress=False)
    for a, b in zip(sparse_layers(model).values(), sparse_layers(twin).values(), strict=True):
        assert torch.equal(a.router.weight, b.router.weight)
        assert float(b.theta_x) == pytest.approx(0.6)


def test_tau_and_thresholds_are_apart() -> None:
    model, inputs = tiny("llama")
    set_thresholds(model, inputs=0.3, neurons=0.1)
    set_tau(model, 0.4)
    assert all(float(layer.theta_x) == pytest.approx(0.3) for layer in sparse_layers(model).values())
    with record_sparsity(model) as record, torch.no_grad():
        output_of(model, inputs)
    assert record.sparsity > 0.4 and record.shares.inputs < 1


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_one_graph_for_every_value(name: str) -> None:
    torch._dynamo.reset()
    model, inputs = tiny(name)
    graphs = []
    inner = torch._dynamo.lookup_backend("aot_eager")

    def counting(graph, example_inputs, **options):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return inner(graph, example_inputs, **options)

    compiled = torch.compile(model, backend=counting, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs)[0], output_of(model, inputs), rtol=1e-5, atol=1e-5)
        for theta_x, theta_h in ((0.31, 0.11), (0.0, 0.0), (0.52, 0.23)):
            set_thresholds(model, inputs=theta_x, neurons=theta_h)
            torch.testing.assert_close(compiled(**inputs)[0], output_of(model, inputs), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2, "one before there were thresholds, one for all their values"
    torch._dynamo.reset()
