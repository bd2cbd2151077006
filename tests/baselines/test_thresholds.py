"""CATS and TEAL: thresholds that meet the asked share, what they zero, and what is counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, HAND_WRITTEN
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import tiny_llama
from torch import Tensor, nn

from torch_prunepath import find_ffns
from torch_prunepath.baselines import cats, teal
from torch_prunepath.baselines.teal_search import Path, greedy_path, matrices, uniform_path
from torch_prunepath.baselines.top_k import gate_activations
from torch_prunepath.inputs.data import as_inputs
from torch_prunepath.inputs.visit import visit_inputs
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.quantiles import POINTS, Quantiles

ALL = {**ARCHITECTURES, **HAND_WRITTEN}
STRUCTURES = ["llama", "phi3", "gpt2", "bert", "opt", "t5_gated", "albert", "fused_up_first", "gate_second"]


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def tokens(rows: int = 16, length: int = 32, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))}


def views_of(model: nn.Module) -> list[FFNView]:
    return [FFNView(model, spec) for spec in find_ffns(model)]


# --- quantiles --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 100), rows=st.integers(1, 60))
def test_the_asked_share_lies_under_the_threshold(share: float, seed: int, rows: int) -> None:
    values = torch.randn(rows, 37, generator=torch.Generator().manual_seed(seed))
    limit = Quantiles(values).threshold(share)
    under = float((values.abs() < limit).float().mean())
    assert under == pytest.approx(share, abs=1 / POINTS + 1.5 / values.numel())


@settings(max_examples=40, deadline=None)
@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_thresholds_rise_with_the_share(a: float, b: float) -> None:
    quantiles = Quantiles(torch.tensor([0.0, 0.0, -1.0, 2.0, 2.0, -5.0]))
    assert quantiles.threshold(min(a, b)) <= quantiles.threshold(max(a, b))
    assert quantiles.threshold(0.0) == 0.0 and quantiles.threshold(1.0) == math.inf


def test_a_sample_of_many_values_is_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_prunepath.quantiles.VALUES", 5000)
    values = torch.randn(4096, 64) * torch.arange(1, 65)  # every column another scale
    assert float((values.abs() < Quantiles(values).threshold(0.7)).float().mean()) == pytest.approx(0.7, abs=0.03)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [cats, teal])
@pytest.mark.parametrize("name", STRUCTURES)
def test_they_come_and_go(name: str, method: Any) -> None:
    model, inputs = ALL[name]()
    dense = output_of(model, inputs)
    handle = method(model, 0.5, dict(inputs), progress=False)
    assert not torch.equal(output_of(model, inputs), dense)
    handle.set_sparsity(0.0)
    torch.testing.assert_close(output_of(model, inputs), dense)
    handle.remove()
    assert torch.equal(output_of(model, inputs), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with method(model, 0.9, dict(inputs), progress=False):
        assert not torch.equal(output_of(model, inputs), dense)
    assert torch.equal(output_of(model, inputs), dense)


@pytest.mark.parametrize("method", [cats, teal])
def test_padding_does_not_count(method: Any) -> None:
    model, _ = ALL["llama"]()
    ids = tokens(2, 7)["input_ids"]
    padded = nn.functional.pad(ids, (0, 5), value=7)
    mask = torch.ones_like(padded)
    mask[:, 7:] = 0
    handle = method(model, 0.5, {"input_ids": ids}, progress=False)
    with handle.record() as plain:
        output_of(model, {"input_ids": ids})
    with handle.record() as with_padding:
        output_of(model, {"input_ids": padded, "attention_mask": mask})
    assert with_padding.sparsity == pytest.approx(plain.sparsity, abs=1e-4)
    with pytest.raises(ValueError, match="no token ran"), handle.record() as record:
        _ = record.sparsity
    with handle.record(), pytest.raises(ValueError, match="open already"), handle.record():
        pass


@pytest.mark.parametrize("method", [cats, teal])
def test_gradients_pass_through_and_bfloat16_autocast_works(method: Any) -> None:
    model, data = tiny_llama(), tokens(4, 16)
    handle = method(model, 0.5, data, progress=False)
    with torch.autocast("cpu", torch.bfloat16), handle.record() as record:
        loss = model(**data, labels=data["input_ids"]).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert record.sparsity == pytest.approx(0.5, abs=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("method", [cats, teal])
def test_on_a_cuda_device(method: Any) -> None:
    model, data = tiny_llama().cuda(), {key: value.cuda() for key, value in tokens().items()}
    handle = method(model, 0.5, data, progress=False)
    with handle.record() as record:
        output_of(model, data)
    assert record.sparsity == pytest.approx(0.5, abs=0.05)
    layer, x = model.model.layers[0].mlp, torch.randn(5, 32, device="cuda")
    with handle.record(), torch.no_grad():
        layer(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_what_does_not_fit_is_refused_with_a_remedy() -> None:
    model, inputs = ALL["bert"]()
    for method in (cats, teal):
        with pytest.raises(ValueError, match="outside"):
            method(model, 1.0, inputs, progress=False)
        with pytest.raises(ValueError, match="pass calibration="):
            method(model, 0.5, progress=False)
        handle = method(model, 0.5, inputs, progress=False)
        with pytest.raises(ValueError, match="outside"):
            handle.set_sparsity(-0.1)
        handle.remove()
    with pytest.raises(ValueError, match="'greedy', 'uniform'"):
        teal(model, 0.5, inputs, allocation="best", progress=False)  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- CATS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "bert", "t5_gated", "fused_up_first", "gate_second"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_cats_leaves_out_the_asked_share_of_neurons_and_counts_it(name: str, share: float) -> None:
    model, inputs = ALL[name]()
    handle = cats(model, share, dict(inputs), progress=False)
    hidden = []
    views = views_of(model)
    for view in views:
        view.down.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with handle.record() as record:
        output_of(model, inputs)
    zeros = [float((h == 0).float().mean()) for h in hidden]
    assert handle.unit == "neurons"
    assert list(record.per_layer.values()) == pytest.approx(zeros, abs=1e-6)
    assert zeros[0] == pytest.approx(share, abs=0.01), "the first layer sees what was calibrated on"
    assert record.sparsity == pytest.approx(share, abs=0.12)


def test_cats_keeps_the_largest_gate_activations() -> None:
    model, inputs = ALL["llama"]()
    view = views_of(model)[0]
    x = torch.randn(50, 32)
    handle = cats(model, 0.5, dict(inputs), progress=False)
    site = next(iter(view.gate._forward_hooks.values()))
    gate, limit = gate_activations(view, x), float(site.threshold)
    expected = (view.hidden(x) * (gate.abs() >= limit)) @ view.down_FD
    with torch.no_grad():
        torch.testing.assert_close(view.owner(x), expected, rtol=1e-4, atol=1e-5)
    handle.remove()


def test_cats_counts_neurons_that_relu_zeroes() -> None:
    model, inputs = ALL["opt"]()
    handle = cats(model, 0.0, dict(inputs), progress=False)
    with handle.record() as record:
        output_of(model, inputs)
    assert 0.2 < record.sparsity < 0.8


# --- TEAL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "bert"])
def test_teal_leaves_out_the_asked_share_of_matrix_inputs(name: str, allocation: Any) -> None:
    model, inputs = ALL[name]()
    handle = teal(model, 0.4, dict(inputs), allocation=allocation, progress=False)
    with handle.record() as record:
        output_of(model, inputs)
    assert handle.unit == "matrix inputs"
    assert record.sparsity == pytest.approx(0.4, abs=0.08)
    view = views_of(model)[0]
    assert {matrix for _, matrix in record.per_matrix} == set(matrices(view))
    sizes = {matrix: module.weight.numel() for matrix, module in matrices(view).items()}
    mean = sum(sizes[m] * record.per_matrix[view.site, m] for m in sizes) / sum(sizes.values())
    assert record.per_layer[view.site] == pytest.approx(mean)
    if allocation == "uniform":
        assert record.per_matrix[view.site, "up"] == pytest.approx(0.4, abs=0.02)


def test_teal_zeroes_the_smallest_entries_of_every_input() -> None:
    model, inputs = ALL["llama"]()
    handle = teal(model, 0.5, dict(inputs), allocation="uniform", progress=False)
    seen: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    view = views_of(model)[0]
    view.owner.register_forward_pre_hook(lambda module, args: before.__setitem__("x", args[0]))
    for name, module in matrices(view).items():
        module.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
    output_of(model, inputs)
    for name in ("gate", "up"):
        kept = seen[name] != 0
        assert torch.equal(seen[name][kept], before["x"][kept])
        assert before["x"][~kept].abs().max() <= before["x"][kept].abs().min()
    assert float((seen["down"] == 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    handle.remove()


def search(name: str, find: Any) -> tuple[Path, FFNView, Tensor, dict[str, Quantiles], dict[str, int]]:
    model, inputs = ALL[name]()
    view, kept = views_of(model)[0], {}
    visit_inputs(model, [view], as_inputs(inputs, model), lambda view, x: kept.__setitem__("x", x))
    x = kept["x"]
    with torch.no_grad():
        found = {m: Quantiles(view.hidden(x) if m == "down" else x) for m in matrices(view)}
    sizes = {m: module.weight.numel() for m, module in matrices(view).items()}
    return find(view, x, found, sizes), view, x, found, sizes


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_the_greedy_path_runs_from_dense_to_nothing_and_is_no_worse(name: str) -> None:
    path, view, x, found, sizes = search(name, greedy_path)
    even = uniform_path(view, x, found, sizes)
    assert path.totals[0] == 0 and path.totals[-1] == pytest.approx(1.0)
    assert all(a < b for a, b in zip(path.totals, path.totals[1:], strict=False))
    for shares in path.shares.values():
        assert shares == sorted(shares) and shares[-1] == 1.0

    def error(way: Path, total: float) -> float:
        shares = {m: way.share_of(m, total) for m in sizes}
        assert sum(sizes[m] * s for m, s in shares.items()) / sum(sizes.values()) == pytest.approx(total)
        limits = {m: found[m].threshold(s) for m, s in shares.items()}
        keep = {m: (lambda v, limit=limit: v.masked_fill(v.abs() <= limit, 0)) for m, limit in limits.items()}
        with torch.no_grad():
            inner = FFNView.hidden
            if view.gate is None and view.gate_FD is None:
                h = inner(view, keep["up"](x))
            else:
                gate = gate_activations(view, keep["gate" if view.gate is not None else "up"](x))
                h = gate * (keep["up"](x) @ view.up_FD.t())
            change = keep["down"](h) @ view.down_FD - inner(view, x) @ view.down_FD
        return float(change.norm(dim=-1).mean())

    points = [0.2, 0.4, 0.6]
    assert sum(error(path, p) for p in points) <= 1.02 * sum(error(even, p) for p in points)
