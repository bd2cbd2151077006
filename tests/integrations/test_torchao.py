"""Sparse models quantised by torchao: each result against the model whose weights are what torchao's stand for."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from tiny_llama import tiny_llama
from torch import Tensor, nn

pytest.importorskip("torchao", reason="torchao is not installed")

from torchao import quantization
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

from torch_prunepath import SparsifyConfig, densify, record_sparsity, set_sparsity, set_tau, sparse_layers, sparsify
from torch_prunepath.integrations.torchao import quantize_
from torch_prunepath.layer.router import Router

CONFIG = SparsifyConfig(expert_size=8, partition="kmeans", router="centroid", budget="uniform")
IDS = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(1))
FFN = {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")}


def sparse_llama() -> Any:
    return sparsify(tiny_llama(), 0.5, config=CONFIG, progress=False).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def quantised(model: nn.Module) -> dict[str, Any]:
    """The quantised weights of a model by the module's name."""
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return {name: weight for name, weight in weights.items() if type(weight).__name__ == "Int8Tensor"}


def dequantised(model: Any, sparse: Any) -> Any:
    """A copy of ``sparse``, as it was before, with the weights that the quantised ``model`` computes with."""
    twin = copy.deepcopy(sparse)
    for name, weight in quantised(model).items():
        twin.get_submodule(name).weight = nn.Parameter(weight.dequantize())
    return twin


@pytest.mark.parametrize("experts", [False, True], ids=["around", "experts_too"])
def test_computes_what_its_dequantised_weights_do(experts: bool) -> None:
    sparse = sparse_llama()
    model = copy.deepcopy(sparse)
    quantize_(model, Int8WeightOnlyConfig(), experts=experts)
    names = quantised(model).keys()
    assert {"lm_head", "model.layers.1.self_attn.q_proj"} <= names and (FFN & names) == (FFN if experts else set())
    assert all(type(layer.router) is Router for layer in sparse_layers(model).values())
    assert not [name for name in names if name.endswith("router")]
    twin = dequantised(model, sparse)
    for tau in (1.0, 0.5, 0.2):
        set_tau(model, tau)
        set_tau(twin, tau)
        torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
    with record_sparsity(model) as record:
        logits(model)
    with record_sparsity(twin) as expected:
        logits(twin)
    assert record.sparsity == pytest.approx(expected.sparsity, abs=1e-3) and record.sparsity > 0.3


def test_the_example_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    model = sparse_llama()
    exec(compile(block, "transformers.md", "exec"), {"model": model})
    assert quantised(model) and not FFN & quantised(model).keys()


def test_a_quarter_of_the_memory_and_nearly_the_same_function() -> None:
    model = sparse_llama()
    before = logits(model)
    quantize_(model, Int8WeightOnlyConfig(), experts=True)
    weights = quantised(model).values()
    stored = sum(weight.qdata.nbytes + weight.scale.nbytes for weight in weights)
    assert 0.25 < stored / sum(4 * weight.numel() for weight in weights) < 0.3
    difference = float((logits(model) - before).norm() / before.norm())
    assert 1e-3 < difference < 0.3


def test_it_writes_and_is_searched_for_a_sparsity() -> None:
    model = sparse_llama()
    quantize_(model, Int8WeightOnlyConfig(), experts=True)
    tau = set_sparsity(model, 0.4, IDS, progress=False)
    assert 0 < tau < 1
    written, without = (
        model.generate(IDS[:1, :8], max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert written.shape == (1, 14) and torch.equal(written, without)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    set_tau(again, 1.0)
    assert not torch.equal(logits(again), logits(model))


def test_activations_may_be_quantised_too() -> None:
    model = sparse_llama()
    before = logits(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    assert not FFN & quantised(model).keys() and quantised(model)
    assert float((logits(model) - before).norm() / before.norm()) < 0.5


def test_ffns_whose_layers_are_called_apart_stay_as_they_are() -> None:
    made, inputs = ARCHITECTURES["bert"]()
    model = sparsify(made, 0.5, config=CONFIG, progress=False).eval()
    quantize_(model, Int8WeightOnlyConfig(), experts=True)
    names = quantised(model).keys()
    assert names and not [
        name for name in names if "attention" not in name and ("intermediate" in name or "output" in name)
    ]
    with torch.no_grad():
        found = model(**inputs)
    assert all(torch.isfinite(value).all() for value in found.values() if isinstance(value, Tensor))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no sparse FFN"):
        quantize_(tiny_llama(), Int8WeightOnlyConfig())
    model = sparse_llama()
    quantize_(model, Int8WeightOnlyConfig(), experts=True)
    with pytest.raises(ValueError, match=r"up_proj of model.layers.0.mlp was replaced since"):
        densify(model)
    around = sparse_llama()
    quantize_(around, Int8WeightOnlyConfig())
    dense = densify(around)
    assert not FFN & quantised(dense).keys() and quantised(dense)
    first = tiny_llama()
    quantization.quantize_(first, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"Linear with a Int8Tensor of torch.float32: quantised or sharded weights"):
        sparsify(first, config=CONFIG, progress=False)


def test_it_cannot_be_saved(tmp_path: Path) -> None:
    model = sparse_llama()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(RuntimeError, match="invalid python storage"):
        model.save_pretrained(tmp_path)
