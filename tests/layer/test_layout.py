"""Weights with ordinary strides: what needs them works, every path gives the same numbers, and there is a way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

from torch_prunepath import Packs, SparsifyConfig, contiguous, densify, neuron_major, set_tau, sparse_layers, sparsify
from torch_prunepath.layer.views import sparse_views

CONFIG = SparsifyConfig(expert_size=8, partition="random", router="centroid", budget="uniform")
NAMES = ["llama", "phi3", "gpt2", "bert", "opt", "t5_gated"]


def sparse(name: str) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = ARCHITECTURES[name]()
    return sparsify(model.eval(), tau=0.5, config=CONFIG, progress=False), inputs


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: parameter.stride() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_and_back(name: str, tmp_path: Path) -> None:
    model, inputs = sparse(name)
    parameters, before, laid = list(model.parameters()), model.state_dict(), strides(model)
    before = {key: value.clone() for key, value in before.items()}
    assert not all(parameter.is_contiguous() for parameter in parameters)
    with torch.no_grad():
        expected = model(**inputs)[0]
    assert contiguous(model) is model
    assert all(parameter.is_contiguous() for parameter in parameters), "the same parameters"
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert strides(again) == laid, "loading brings the fast layout back"
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], expected)
    assert neuron_major(model) is model
    assert strides(model) == laid
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize("tau", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_path_on_a_cpu(dtype: torch.dtype, tokens: int, tau: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(96, 768), nn.GELU(), nn.Linear(768, 96)))
    sparsify(model, tau=tau, config=CONFIG, progress=False).to(dtype).eval()
    x = torch.randn(tokens, 96, dtype=dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    with torch.no_grad():
        for packs in (None, Packs(every=True)):
            neuron_major(model)
            for layer in sparse_layers(model).values():
                layer.packs = packs
            expected = [model(x) for _ in range(3)]
            contiguous(model)
            found = [model(x) for _ in range(3)]
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def to_vector(model: nn.Module) -> None:
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(2 * vector, model.parameters())
    assert torch.equal(parameters_to_vector(model.parameters()), 2 * vector)


def pruned(model: Any) -> None:
    down = model.model.layers[0].mlp.down_proj
    prune.l1_unstructured(down, "weight", 0.3)
    prune.remove(down, "weight")
    assert float((down.weight == 0).float().mean()) == pytest.approx(0.3, abs=0.01)


def lbfgs(model: Any) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(ARCHITECTURES["llama"]()[1]["input_ids"])[0].square().mean()
        loss.backward()
        return loss

    before = float(closure())
    optimizer.step(closure)
    assert float(closure()) < before


def flat_views(model: nn.Module) -> None:
    assert sum(parameter.view(-1).shape[0] for parameter in model.parameters()) > 0


def saved(model: nn.Module) -> None:
    tensors = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}  # it is tied
    save_file(tensors, "weights.safetensors")
    assert all(torch.equal(value, tensors[key]) for key, value in load_file("weights.safetensors").items())


@pytest.mark.parametrize("use", [to_vector, pruned, lbfgs, flat_views, saved])
def test_what_needs_ordinary_strides(
    use: Callable[[nn.Module], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"contiguous|stride"):
        use(sparse("llama")[0])
    use(contiguous(sparse("llama")[0]))


def test_a_pruned_model_runs_and_goes_back() -> None:
    model, inputs = sparse("llama")
    pruned(contiguous(model))
    neuron_major(model)
    with torch.no_grad():
        found = model(**inputs)[0]
        set_tau(model, 1.0)
        full = model(**inputs)[0]
    assert not torch.equal(found, full)
    dense = densify(model)
    assert all(parameter.is_contiguous() for parameter in dense.parameters())
    with torch.no_grad():
        torch.testing.assert_close(dense(**inputs)[0], full, rtol=1e-5, atol=1e-5)


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, inputs = sparse("llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = compiled(**inputs)[0]
        contiguous(compiled)
        torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
        neuron_major(compiled)
        torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_prunepath_backend() -> None:
    torch._dynamo.reset()
    model, inputs = sparse("llama")
    with torch.no_grad():
        expected = model(**inputs)[0]
        contiguous(model)
        compiled = torch.compile(model, backend="prunepath")
        for rows in (inputs["input_ids"], inputs["input_ids"][:1, :1]):
            torch.testing.assert_close(compiled(rows)[0], model(rows)[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("change", [contiguous, neuron_major])
def test_a_dense_model_is_refused(change: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ValueError, match="holds no sparse FFN"):
        change(ARCHITECTURES["llama"]()[0])


def test_gradients_are_the_same() -> None:
    found = []
    for change in (neuron_major, contiguous):
        model, inputs = sparse("llama")
        change(model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert all(view.down.weight.is_contiguous() == (change is contiguous) for view in sparse_views(model).values())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
