"""Conversion and its undoing, on a tiny model of every supported architecture."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn

import torch_prunepath
import torch_prunepath.conversion
from torch_prunepath import SparsifyConfig, densify, fit_routers, set_tau, sparse_layers, sparsify
from torch_prunepath.layer import is_sparse
from torch_prunepath.layer.reference import sparse_ffn_reference
from torch_prunepath.layer.sparse import SparseDown
from torch_prunepath.sparsity import register_routing_hook

WEIGHTS_ONLY = SparsifyConfig(expert_size=8, partition="kmeans", router="centroid", budget="uniform")
HERE = Path(__file__).parent
module = torch_prunepath.conversion


def first_output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output[0] if not isinstance(output, Tensor) else output


@contextmanager
def watching(model: nn.Module) -> Iterator[dict[str, dict[str, Any]]]:
    """Input, mask and output of every sparse FFN in one forward pass (a copy: Falcon adds to its FFN's output)."""
    seen: dict[str, dict[str, Any]] = {}
    handles: list[Any] = [
        register_routing_hook(model, lambda r: seen.setdefault(r.name, {}).update(x=r.x_TD, mask=r.mask_TE))
    ]
    for name, view in module.sparse_views(model).items():
        out = view.down if view.spec.split else view.owner
        handles.append(out.register_forward_hook(lambda m, a, y, name=name: seen[name].update(y=y.clone())))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def snapshot(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything that a conversion could leave changed."""
    state = {k: (v.clone(), v.stride()) for k, v in model.state_dict().items()}
    modules = {
        f"module {n}": (type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
        for n, m in model.named_modules()
    }
    grads = {f"grad {n}": (p.requires_grad, p.grad is None) for n, p in model.named_parameters()}
    return {**state, **modules, **grads}


def assert_same(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value[0], Tensor):
            assert torch.equal(value[0], after[key][0]) and value[1] == after[key][1], key
        else:
            assert value == after[key], key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    """tau 1 is the dense model; tau 0.5 is the reference; densify restores every bit."""
    model, inputs = ARCHITECTURES[name]()
    model = model.double().eval()
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    dense, before = first_output(model, inputs), snapshot(model)

    sparsify(model, tau=1.0, config=WEIGHTS_ONLY, progress=False)
    torch.testing.assert_close(first_output(model, inputs), dense, rtol=1e-9, atol=1e-9)

    set_tau(model, 0.5)
    with watching(model) as seen:
        sparse = first_output(model, inputs)
    assert not torch.allclose(sparse, dense)
    views = module.sparse_views(model)
    assert seen.keys() == views.keys() == sparse_layers(model).keys()
    for site, record in seen.items():
        assert 0 < record["mask"].float().mean() < 1
        expected = sparse_ffn_reference(views[site], record["x"], record["mask"], None, 8)
        torch.testing.assert_close(record["y"].reshape(expected.shape), expected, rtol=1e-9, atol=1e-9)

    densify(model)
    assert_same(before, snapshot(model))
    assert torch.equal(first_output(model, inputs), dense)


FAMILIES = ["llama", "gpt2", "opt", "bert", "t5_gated", "vit", "phi3", "bloom"]


@pytest.mark.parametrize("gate", ["one", "sigmoid"])
@pytest.mark.parametrize("name", FAMILIES)
def test_calibrated_conversion(name: str, gate: str) -> None:
    """The default recipe on model inputs of each kind; the sigmoid gate weighs every expert."""
    model, inputs = ARCHITECTURES[name]()
    model = model.double().eval()
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    config = SparsifyConfig(expert_size=8, gate=gate, gate_offset=2.0 if gate == "sigmoid" else 0.0)
    sparsify(model, tau=0.6, config=config, calibration=inputs, progress=False)
    budgets = [layer.budget for layer in sparse_layers(model).values()]
    assert min(budgets) > 0 and len(set(budgets)) == len(budgets)
    with watching(model) as seen:
        first_output(model, inputs)
    layers, views = sparse_layers(model), module.sparse_views(model)
    for site, record in seen.items():
        gates = None
        if gate == "sigmoid":
            gates = torch.sigmoid(layers[site].router(record["x"]) + 2.0)
        expected = sparse_ffn_reference(views[site], record["x"], record["mask"], gates, 8)
        torch.testing.assert_close(record["y"].reshape(expected.shape), expected, rtol=1e-6, atol=1e-6)


def test_names_and_shapes_stay_and_rows_are_contiguous() -> None:
    model, _ = ARCHITECTURES["llama"]()
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    sparsify(model, config=WEIGHTS_ONLY, progress=False)
    after = model.state_dict()
    assert {k: after[k].shape for k in shapes} == shapes
    assert {k.rsplit(".", 2)[-2] if "router" in k else k.rsplit(".", 1)[-1] for k in after.keys() - shapes} == {
        "router",
        "permutation",
    }
    mlp = model.model.layers[0].mlp
    for view in module.sparse_views(model).values():
        for rows in (view.gate_FD, view.up_FD, view.down_FD):
            assert rows.stride() == (view.spec.hidden_size, 1)
    assert isinstance(mlp, type(ARCHITECTURES["llama"]()[0].model.layers[0].mlp)), "still an instance of its class"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["make_routed", "permute", "plan", "budget", "router"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_failing_half_way_leaves_the_model_as_it_was(
    name: str, where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = ARCHITECTURES[name]()
    model.train()
    before = snapshot(model)

    def failing(original: Any, at: int) -> Any:
        calls = 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            result = original(*args, **kwargs)  # fails after it has done its work: the harder case
            if calls == at:
                raise error("stop")
            return result

        return wrapped

    from torch_prunepath.experts import fit, plan
    from torch_prunepath.inputs.padding import PaddingTracker
    from torch_prunepath.layer import swap
    from torch_prunepath.layer.ffn import FFNView

    if where == "make_routed":
        monkeypatch.setattr(swap, "make_routed", failing(swap.make_routed, 2))
    elif where == "permute":
        monkeypatch.setattr(FFNView, "permute_", failing(FFNView.permute_, 2))
    elif where == "plan":
        monkeypatch.setattr(plan, "partition", failing(plan.partition, 2))
    elif where == "budget":
        monkeypatch.setattr(PaddingTracker, "keep", failing(PaddingTracker.keep, 2))
    else:
        monkeypatch.setattr(fit, "fit_router", failing(fit.fit_router, 2))
    with pytest.raises(error, match="stop"):
        sparsify(model, calibration=inputs, progress=False)
    assert_same(before, snapshot(model))
    monkeypatch.undo()
    sparsify(model, calibration=inputs, progress=False)


def test_model_state_survives_conversion() -> None:
    """Modes, gradients, hooks and the random state."""
    model, inputs = ARCHITECTURES["llama"]()
    model.train()
    model.model.layers[0].eval()
    model(**inputs).logits.sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    sparsify(model, calibration=inputs, progress=False)
    densify(model)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    for n, p in model.named_parameters():
        assert torch.equal(p.grad, grads[n])


def test_self_written_calibration_is_seeded() -> None:
    routers = []
    for seed in (0, 0, 1):
        model, _ = ARCHITECTURES["llama"]()
        random = torch.get_rng_state()
        config = SparsifyConfig(calibration_tokens=64, seed=seed)
        sparsify(model, config=config, progress=False)
        assert torch.equal(random, torch.get_rng_state())
        routers.append(next(iter(sparse_layers(model).values())).router.weight)
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])


def test_model_that_cannot_write_falls_back_to_weights_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = ARCHITECTURES["bert"]()
    with caplog.at_level(logging.WARNING, logger="torch_prunepath"):
        sparsify(model, tau=1.0, progress=False)
    assert len(caplog.records) == 1 and "pass calibration=" in caplog.text
    assert first_output(model, inputs).isfinite().all()


def test_padding_does_not_count_in_calibration() -> None:
    model, _ = ARCHITECTURES["llama"]()
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    routers = []
    for junk in (5, 7):
        padded = torch.cat([torch.full((4, 3), junk), ids], 1)
        inputs = {"input_ids": padded, "attention_mask": (torch.arange(15) >= 3).long().expand(4, -1)}
        inputs["position_ids"] = (torch.arange(15) - 3).clamp_min(0).expand(4, -1)
        converted = sparsify(copy.deepcopy(model), calibration=inputs, progress=False)
        routers.append(torch.cat([layer.router.weight for layer in sparse_layers(converted).values()]))
    torch.testing.assert_close(routers[0], routers[1])


def test_texts_need_a_tokenizer_and_batches_may_differ_in_length() -> None:
    model, _ = ARCHITECTURES["llama"]()
    with pytest.raises(ValueError, match="pass tokenizer="):
        sparsify(model, calibration=["some text"], progress=False)
    batches = [torch.randint(3, 90, (2, 9)), torch.randint(3, 90, (1, 14))]
    sparsify(model, calibration=batches, progress=False)


def test_bfloat16_model_keeps_its_dtype() -> None:
    model, inputs = ARCHITECTURES["llama"]()
    model = model.bfloat16()
    sparsify(model, tau=0.7, calibration=inputs, progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    layer = next(iter(sparse_layers(model).values()))
    assert layer.tau.dtype == torch.float32
    assert model(**inputs).logits.dtype == torch.bfloat16


def test_half_and_to_keep_tau_exact() -> None:
    model, _ = ARCHITECTURES["llama"]()
    sparsify(model, config=WEIGHTS_ONLY, tau=0.9, progress=False)
    layer = next(iter(sparse_layers(model).values()))
    exact = layer.tau.clone()
    for convert in (model.bfloat16, model.half, model.double, model.float, lambda: model.to("cpu", torch.bfloat16)):
        convert()
        assert layer.tau.dtype == torch.float32 and torch.equal(layer.tau, exact)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_deepcopy_and_pickle(name: str) -> None:
    model, inputs = ARCHITECTURES[name]()
    sparsify(model, config=WEIGHTS_ONLY, tau=0.5, progress=False)
    expected = first_output(model.eval(), inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(first_output(twin, inputs), expected)
        set_tau(twin, 1.0)
        assert torch.equal(first_output(model, inputs), expected), "the copy shares nothing"
        densify(twin)
        assert not any(is_sparse(m) for m in twin.modules())


def test_sparsify_inside_a_larger_module() -> None:
    model, _ = ARCHITECTURES["opt"]()
    outer = nn.ModuleDict({"inner": sparsify(model, config=WEIGHTS_ONLY, tau=0.5, progress=False)})
    assert all(name.startswith("inner.") for name in sparse_layers(outer))
    densify(outer)
    assert not any(is_sparse(m) for m in outer.modules())


def test_plain_module_without_config() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 37), nn.GELU(), nn.Linear(37, 8))
    x = torch.randn(5, 8)
    dense = model(x)
    sparsify(model, tau=1.0, config=WEIGHTS_ONLY, progress=False)
    torch.testing.assert_close(model(x), dense)
    densify(model)
    assert torch.equal(model(x), dense)


def test_lora_on_the_experts_projections_counts() -> None:
    """A wrapped projection is called, not bypassed."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    model, _ = ARCHITECTURES["llama"]()
    sparsify(model, tau=1.0, config=WEIGHTS_ONLY, progress=False)
    mlp = model.model.layers[0].mlp
    x = torch.randn(4, model.config.hidden_size)
    plain = mlp(x)
    mlp.down_proj = Doubled(mlp.down_proj)
    torch.testing.assert_close(mlp(x), 2 * plain)
    mlp.up_proj = Doubled(mlp.up_proj)
    torch.testing.assert_close(mlp(x), 4 * plain)
    mask = torch.zeros(4, mlp.num_experts, dtype=torch.bool)
    mask[:, 0] = True
    with register_routing_hook(model, lambda r: mask):
        sparse = mlp(x)
    mlp.up_proj, mlp.down_proj = mlp.up_proj.inner, mlp.down_proj.inner
    with register_routing_hook(model, lambda r: mask):
        torch.testing.assert_close(sparse, 4 * mlp(x))


def test_autocast_computes_in_its_dtype() -> None:
    model, _ = ARCHITECTURES["llama"]()
    sparsify(model, tau=0.8, config=WEIGHTS_ONLY, progress=False)
    mlp = model.model.layers[0].mlp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mlp(torch.randn(4, model.config.hidden_size))
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert mlp.up_proj.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5_gated"])
def test_gradients_reach_weights_and_sigmoid_routers(name: str) -> None:
    model, inputs = ARCHITECTURES[name]()
    config = SparsifyConfig(partition="kmeans", router="centroid", budget="uniform", gate="sigmoid")
    sparsify(model, tau=0.7, config=config, progress=False)
    model.train()
    first = model(**inputs)[0]
    (first * torch.randn_like(first)).sum().backward()
    for site, view in module.sparse_views(model).items():
        layer = sparse_layers(model)[site]
        for p in [*view.parameters(), layer.router.weight]:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any()


def test_fit_routers_improves_a_sparse_model() -> None:
    model, inputs = ARCHITECTURES["llama"]()
    sparsify(model, tau=0.5, config=WEIGHTS_ONLY, progress=False)
    dense = first_output(densify(copy.deepcopy(model)), inputs)

    def error_at_half() -> float:
        tau = torch_prunepath.set_sparsity(model, 0.5, inputs, progress=False)
        assert 0 < tau < 1
        return float((first_output(model, inputs) - dense).norm())

    before = error_at_half()
    fit_routers(model, inputs, progress=False)
    assert error_at_half() < before
    assert model.config.quantization_config["config"]["router"] == "fitted"


def test_errors_name_the_remedy() -> None:
    model, inputs = ARCHITECTURES["llama"]()
    with pytest.raises(ValueError, match=r"tau=1.5 is outside \(0, 1\]"):
        sparsify(model, tau=1.5)
    with pytest.raises(ValueError, match=r"nothing in .* uses it"):
        sparsify(model, config=WEIGHTS_ONLY, calibration=inputs)
    with pytest.raises(TypeError, match="calibration must hold"):
        sparsify(model, calibration=[object()])
    with pytest.raises(ValueError, match="calibration is empty"):
        sparsify(model, calibration=[])
    for call in (densify, lambda m: set_tau(m, 0.5), sparse_layers):
        with pytest.raises(ValueError, match="no sparse FFN"):
            call(model)
    sparsify(model, config=WEIGHTS_ONLY, progress=False)
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(model)
    meta, _ = ARCHITECTURES["llama"]()
    with pytest.raises(ValueError, match="load its weights first"):
        sparsify(meta.to("meta"))
    quantised, _ = ARCHITECTURES["llama"]()
    quantised.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="before quantising"):
        sparsify(quantised)
    with pytest.raises(ValueError, match="no feed-forward network"):
        sparsify(nn.Linear(3, 3))


def test_calibration_that_misses_an_ffn_is_refused() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
            self.unused = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(ValueError, match="does not reach 1 of 2 FFNs"):
        sparsify(Half(), calibration={"x": torch.randn(4, 8)}, config=SparsifyConfig(budget="uniform"), progress=False)


class TwoModes(nn.Module):
    """An FFN that text does not run, and one whose output nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image, self.skipped = (
            nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(3)
        )

    def forward(self, text: Tensor, image: Tensor | None = None) -> Tensor:
        self.skipped(text)
        return self.text(text) + (0 if image is None else self.image(image))


def test_data_that_miss_an_ffn_are_refused_before_gradients_are_asked_for() -> None:
    model = TwoModes()
    del model.text, model.skipped
    model.text = model.skipped = nn.Identity()
    with pytest.raises(ValueError, match=r"does not reach 1 of 1 FFNs.*images too.*budget='uniform'"):
        sparsify(model, calibration={"text": torch.randn(4, 16, 8)}, progress=False)
    assert not is_sparse(model.image)


def test_an_ffn_that_the_output_does_not_depend_on_costs_nothing() -> None:
    model = TwoModes()
    sparsify(model, calibration={"text": torch.randn(4, 16, 8), "image": torch.randn(4, 16, 8)}, progress=False)
    budgets = {name: layer.budget for name, layer in sparse_layers(model).items()}
    assert budgets["skipped"] == min(budgets.values()), "it gives up most"


def test_under_inference_mode() -> None:
    torch.manual_seed(0)
    model, inputs = ARCHITECTURES["llama"]()
    same = copy.deepcopy(model)
    sparsify(model, calibration=inputs["input_ids"], progress=False)
    with torch.inference_mode():
        sparsify(same, calibration=inputs["input_ids"].clone(), progress=False)
    set_tau(same, 0.9)  # its tensors are ordinary ones
    torch.testing.assert_close(first_output(same, inputs), first_output(model, inputs))
    with torch.inference_mode():
        made_inside, _ = ARCHITECTURES["llama"]()
    with pytest.raises(ValueError, match="make or load it outside"):
        sparsify(made_inside, calibration=inputs["input_ids"], progress=False)


@pytest.mark.parametrize("how", ["inside", "whole", "replaced"])
def test_compiled_modules_are_refused_wherever_they_are(how: str) -> None:
    model, _ = ARCHITECTURES["llama"]()
    if how == "replaced":
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    else:
        (model if how == "whole" else model.model.layers[1].mlp).compile(backend="eager")
    with pytest.raises(ValueError, match="is compiled, and its graph has the dense weights"):
        sparsify(model, config=WEIGHTS_ONLY, progress=False)
    assert not any(is_sparse(module) for module in model.modules())


def test_a_dense_model_with_a_sparse_config_is_told_so() -> None:
    model, _ = ARCHITECTURES["llama"]()
    sparsify(model, config=WEIGHTS_ONLY, progress=False)
    fresh = type(model)(copy.deepcopy(model.config))
    with pytest.raises(ValueError, match="its config is that of a sparse checkpoint"):
        sparsify(fresh, config=WEIGHTS_ONLY, progress=False)
    del fresh.config.quantization_config
    sparsify(fresh, config=WEIGHTS_ONLY, progress=False)


def test_split_down_is_called_after_its_up() -> None:
    model, inputs = ARCHITECTURES["opt"]()
    sparsify(model, config=WEIGHTS_ONLY, progress=False)
    down = next(m for m in model.modules() if isinstance(m, SparseDown))
    first_output(model, inputs)
    assert down.handoff.routing is None, "nothing is kept between calls"


def test_peak_memory_is_the_model_and_one_layer() -> None:
    """Resident memory, in a process of its own: conversion, then what stays."""
    code = """
import torch, resource
from torch import nn
import torch_prunepath
import torch_prunepath.conversion
from torch_prunepath import SparsifyConfig

def resident(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1024

torch.set_num_threads(1)
class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(512, 8192, bias=False), nn.Linear(8192, 512, bias=False)
    def forward(self, x):
        return self.down(torch.relu(self.up(x)))
model = nn.Sequential(*[FFN() for _ in range(8)])      # 8 x 32 MiB
config = SparsifyConfig(expert_size=64, partition="random", router="zero", budget="uniform")
torch_prunepath.sparsify(nn.Sequential(FFN()), config=config, progress=False)  # imports and allocator warm
open("/proc/self/clear_refs", "w").write("5")           # reset the peak
before = resident("VmRSS")
torch_prunepath.sparsify(model, config=config, progress=False)
print(resident("VmHWM") - before, resident("VmRSS") - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=HERE).stdout
    peak, stays = map(float, output.split())
    assert peak < 1.5 * 32 + 8, f"{peak} MiB over the model while converting layers of 32 MiB"
    assert stays < 8 * 0.25 + 24, f"{stays} MiB more afterwards; routers take 2 MiB"
