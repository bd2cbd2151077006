"""tau, target sparsity, recording and routing hooks on tiny models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torch_prunepath import (
    SparsifyConfig,
    record_sparsity,
    register_routing_hook,
    set_sparsity,
    set_tau,
    sparse_layers,
    sparsify,
)
from torch_prunepath.sparsity import Noted, SparsityRecord, layer_tau

CONFIG = SparsifyConfig(expert_size=8, partition="random", router="centroid", budget="uniform")


@pytest.fixture
def llama():  # type: ignore[no-untyped-def]
    model, inputs = ARCHITECTURES["llama"]()
    return sparsify(model.eval(), tau=0.5, config=CONFIG, progress=False), inputs


def counted(model: nn.Module, inputs: dict, keep: torch.Tensor | None = None) -> float:
    """Sparsity by hand: share of inactive neurons over kept tokens, then over layers."""
    shares: dict[str, float] = {}

    def hook(routing) -> None:  # type: ignore[no-untyped-def]
        layer = sparse_layers(model)[routing.name]
        F, S = layer.ffn.ffn_size, layer.experts.expert_size
        neurons = routing.mask_TE.repeat_interleave(S, 1)[:, :F]
        neurons = neurons if keep is None else neurons[keep.reshape(-1).bool()]
        shares[routing.name] = 1 - float(neurons.double().mean())

    with register_routing_hook(model, hook), torch.no_grad():
        model(**inputs)
    return sum(shares.values()) / len(shares)


def test_set_tau_everywhere_and_one_by_one(llama) -> None:  # type: ignore[no-untyped-def]
    model, _ = llama
    layers = sparse_layers(model)
    names = list(layers)
    set_tau(model, 0.75)
    assert all(float(layer.tau) == 0.75 for layer in layers.values())
    set_tau(model, [0.25, *[0.5] * (len(names) - 1)])
    assert float(layers[names[0]].tau) == 0.25 and float(layers[names[1]].tau) == 0.5
    set_tau(model, {names[1]: 1.0})
    assert float(layers[names[0]].tau) == 0.25 and float(layers[names[1]].tau) == 1.0
    assert [entry["tau"] for entry in model.config.quantization_config["layers"]][:2] == [0.25, 1.0]


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        (0.0, "outside"),
        (1.1, "outside"),
        ([0.5], "values of tau for"),
        ({"nope": 0.5}, "no sparse layer is called 'nope'"),
        ({"model.layers.0.mlp": 2.0}, "outside"),
    ],
    ids=str,
)
def test_wrong_tau_changes_nothing(llama, tau, message: str) -> None:  # type: ignore[no-untyped-def]
    model, _ = llama
    with pytest.raises(ValueError, match=message):
        set_tau(model, tau)
    assert all(float(layer.tau) == 0.5 for layer in sparse_layers(model).values())


def test_budgets_scale_what_a_layer_gives_up() -> None:
    assert layer_tau(1.0, 7.0) == 1.0
    assert layer_tau(0.9, 1.0) == pytest.approx(0.9)
    assert layer_tau(0.9, 2.0) == pytest.approx(1 - 0.1**2)
    assert layer_tau(1e-20, 5.0) == pytest.approx(5e-20)
    taus = [layer_tau(tau / 100, 0.3) for tau in range(1, 101)]
    assert taus == sorted(taus)


def test_record_counts_neurons(llama) -> None:  # type: ignore[no-untyped-def]
    model, inputs = llama
    expected = counted(model, inputs)
    with record_sparsity(model) as record, torch.no_grad():
        model(**inputs)
        model(**inputs)
    assert record.sparsity == pytest.approx(expected)
    assert record.tokens == 2 * inputs["input_ids"].numel()
    assert record.per_layer.keys() == sparse_layers(model).keys()
    assert not any(layer.routing_hooks for layer in sparse_layers(model).values()), "nothing stays behind"


@settings(deadline=None, max_examples=30)
@given(
    neurons=st.integers(5, 70),
    size=st.integers(1, 9),
    tokens=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_what_was_noted_is_counted_like_single_neurons(neurons: int, size: int, tokens: int, seed: int) -> None:
    """Now, or later and with padding left out; the last expert may be smaller."""
    layer = next(iter(sparse_layers(sparse_ffn(neurons, size)).values()))
    generator = torch.Generator().manual_seed(seed)
    mask_TE = torch.rand(tokens, layer.num_experts, generator=generator) < 0.5
    inactive_TF = ~mask_TE.repeat_interleave(size, 1)[:, :neurons]
    noted = Noted.of("a", layer, mask_TE)
    assert noted.inactive_T.dtype == torch.int64
    assert (noted.neurons, noted.inactive_T.tolist()) == (neurons, inactive_TF.sum(1).tolist())

    record = SparsityRecord()
    record.count(noted, None)
    assert record.sparsity == pytest.approx(float(inactive_TF.double().mean()))
    keep_T = torch.rand(tokens, generator=generator) < 0.5
    record.count(noted, keep_T)  # a second call of the same layer
    both_TF = torch.cat([inactive_TF, inactive_TF[keep_T]])
    assert record.per_layer == {"a": pytest.approx(float(both_TF.double().mean()))}
    assert record.tokens == len(both_TF)


def sparse_ffn(neurons: int, size: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, neurons), nn.ReLU(), nn.Linear(neurons, 4))
    return sparsify(nn.ModuleList([model]), config=dataclasses.replace(CONFIG, expert_size=size), progress=False)


def test_a_layer_that_saw_only_padding_counts_as_all_active() -> None:
    layer = next(iter(sparse_layers(sparse_ffn(9, 4)).values()))
    noted = Noted.of("a", layer, torch.zeros(2, 3, dtype=torch.bool))
    record = SparsityRecord()
    record.count(noted, torch.zeros(2, dtype=torch.bool))
    assert record.per_layer == {"a": 0.0}
    with pytest.raises(ValueError, match="no token ran"):
        _ = record.sparsity


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "bert", "opt", "t5_gated", "distilbert"])
def test_padding_does_not_count(name: str, side: str) -> None:
    model, inputs = ARCHITECTURES[name]()
    sparsify(model.eval(), tau=0.5, config=CONFIG, progress=False)
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    place = slice(0, 3) if side == "left" else slice(ids.shape[1] - 3, None)
    mask[0, place] = 0
    inputs = {**inputs, "attention_mask": mask}
    if "decoder_input_ids" in inputs:  # the decoder's own mask, of another shape
        inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    per_layer: dict[str, float] = {}
    decoder = inputs.get("decoder_attention_mask")

    def hook(routing) -> None:  # type: ignore[no-untyped-def]
        keep = decoder if "decoder" in routing.name and decoder is not None else mask
        layer = sparse_layers(model)[routing.name]
        neurons = routing.mask_TE.repeat_interleave(8, 1)[:, : layer.ffn.ffn_size][keep.reshape(-1).bool()]
        per_layer[routing.name] = 1 - float(neurons.double().mean())

    with register_routing_hook(model, hook), record_sparsity(model) as record, torch.no_grad():
        model(**inputs)
    assert record.per_layer == pytest.approx(per_layer)


def test_padding_is_known_while_decoding_with_a_cache(llama) -> None:  # type: ignore[no-untyped-def]
    model, inputs = llama
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with record_sparsity(model) as record:
        model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert record.tokens == int(mask.sum()) + 2 * ids.shape[0]


def test_reading_before_any_token_is_an_error(llama) -> None:  # type: ignore[no-untyped-def]
    with record_sparsity(llama[0]) as record:
        pass
    with pytest.raises(ValueError, match="no token ran"):
        _ = record.sparsity


@pytest.mark.parametrize("target", [0.0, 0.2, 0.5, 0.8])
def test_set_sparsity_reaches_its_target(llama, target: float) -> None:  # type: ignore[no-untyped-def]
    model, _ = llama
    ids = torch.randint(3, 90, (16, 32), generator=torch.Generator().manual_seed(0))
    tau = set_sparsity(model, target, ids, progress=False)
    assert float(next(iter(sparse_layers(model).values())).tau) == pytest.approx(tau)
    assert counted(model, {"input_ids": ids}) == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize(("target", "message"), [(1.0, "outside"), (-0.1, "outside"), (0.999, "out of reach")])
def test_set_sparsity_out_of_reach_changes_nothing(llama, target: float, message: str) -> None:  # type: ignore[no-untyped-def]
    model, inputs = llama
    with pytest.raises(ValueError, match=message):
        set_sparsity(model, target, inputs, progress=False)
    assert all(float(layer.tau) == 0.5 for layer in sparse_layers(model).values())


def test_routing_hook_observes_and_replaces(llama) -> None:  # type: ignore[no-untyped-def]
    model, inputs = llama
    dense = model(**inputs).logits
    calls = []

    def everything(routing) -> torch.Tensor:  # type: ignore[no-untyped-def]
        calls.append(routing.name)
        assert routing.x_TD.shape[0] == routing.scores_TE.shape[0] == inputs["input_ids"].numel()
        assert routing.shape == inputs["input_ids"].shape
        return torch.ones_like(routing.mask_TE)

    handle = register_routing_hook(model, everything)
    full = model(**inputs).logits
    handle.remove()
    assert calls == list(sparse_layers(model))
    set_tau(model, 1.0)
    torch.testing.assert_close(full, model(**inputs).logits)
    assert not torch.allclose(full, dense)
    assert len(calls) == len(sparse_layers(model)), "removed"


@pytest.mark.parametrize("wrong", [torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 2)], ids=["shape", "dtype"])
def test_wrong_mask_from_a_hook_is_refused(llama, wrong: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    model, inputs = llama
    with (
        register_routing_hook(model, lambda routing: wrong),
        pytest.raises(ValueError, match="must return None or a bool"),
    ):
        model(**inputs)
