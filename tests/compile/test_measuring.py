"""Measuring a compiled model leaves it compiled: hooks and records do not use up torch's limit of recompilations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, DECODER, randomise
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from torch_prunepath import (
    SparsifyConfig,
    fit_routers,
    record_sparsity,
    register_routing_hook,
    set_sparsity,
    set_tau,
    sparse_layers,
    sparsify,
)
from torch_prunepath.evaluation.perplexity import perplexity

CONFIG = SparsifyConfig(expert_size=8, partition="contiguous", router="centroid", budget="uniform")
TIMES = 12
"""More often than torch compiles one function (``recompile_limit``, 8)."""


class Counting:
    """A backend of torch.compile that counts graphs, and how often one ran."""

    def __init__(self) -> None:
        self.graphs = self.ran = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph(*args)

        return run


@pytest.fixture(autouse=True)
def fresh_dynamo():  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    # Where torch would go on eagerly without a word, there is an error.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def whole(model: nn.Module, backend: Counting) -> nn.Module:
    return torch.compile(model, backend=backend)  # type: ignore[return-value]


def fullgraph(model: nn.Module, backend: Counting) -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[return-value]


def in_place(model: nn.Module, backend: Counting) -> nn.Module:
    model.compile(backend=backend, fullgraph=True)
    return model


def by_blocks(model: nn.Module, backend: Counting) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile(backend=backend, fullgraph=True)
    return model


HOW = [whole, fullgraph, in_place, by_blocks]


def sparse(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name == "deep_llama":  # more layers than ways in which torch compiles what they share
        model = randomise(LlamaForCausalLM(LlamaConfig(**{**DECODER, "num_hidden_layers": 10, "use_cache": False})))
        inputs = ARCHITECTURES["llama"]()[1]
    else:
        model, inputs = ARCHITECTURES[name]()
    return sparsify(model.eval(), tau=0.5, config=CONFIG, progress=False), inputs


def record(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with record_sparsity(model) as found:
        model(**inputs)
    assert 0 < found.sparsity < 1
    assert len(found.per_layer) == len(sparse_layers(model))


def record_padded(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -2:] = 0
    with record_sparsity(model) as found:
        model(**inputs, attention_mask=mask)
    assert found.tokens in (mask.sum(), mask.numel())  # a decoder's tokens all count


def record_twice_at_once(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with record_sparsity(model) as outer, record_sparsity(model) as inner:
        model(**inputs)
    assert outer.per_layer == inner.per_layer


def watch(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    seen: list[str] = []
    with register_routing_hook(model, lambda routing: seen.append(routing.name)):
        model(**inputs)
    assert len(seen) >= len(sparse_layers(model))


def search(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    set_tau(model, 0.6)
    set_sparsity(model, 0.4, inputs, tolerance=0.05, progress=False)


CASES = [("llama", how, measure) for how in HOW for measure in (record, record_padded, record_twice_at_once, search)]
CASES += [("bert", how, measure) for how in (fullgraph, by_blocks) for measure in (record, search)]


@pytest.mark.parametrize(("name", "how", "measure"), CASES)
@torch.no_grad()
def test_a_measured_model_stays_compiled(
    name: str, how: Callable[..., nn.Module], measure: Callable[..., None]
) -> None:
    model, inputs = sparse(name)
    backend = Counting()
    compiled = how(model, backend)
    for _ in range(2):
        measure(compiled, inputs)
    graphs = backend.graphs
    for _ in range(TIMES):
        measure(compiled, inputs)
    assert backend.graphs == graphs, "a graph more each time"
    backend.ran = 0
    found = compiled(**inputs)[0]
    assert backend.ran > 0
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(found, model(**inputs)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
@torch.no_grad()
def test_layers_that_share_their_code_are_recorded_by_one_graph(how: Callable[..., nn.Module]) -> None:
    model, inputs = sparse("deep_llama")
    expected = {}
    with record_sparsity(model) as found:
        model(**inputs)
        expected = found.per_layer
    backend = Counting()
    compiled = how(model, backend)
    for _ in range(3):
        with record_sparsity(compiled) as found:
            compiled(**inputs)
        assert found.per_layer == pytest.approx(expected)
    assert backend.graphs == 1
    compiled(**inputs)
    assert backend.graphs == 2


@pytest.mark.parametrize("how", HOW)
@torch.no_grad()
def test_routing_hooks_leave_a_model_compiled(how: Callable[..., nn.Module]) -> None:
    model, inputs = sparse("llama")
    backend = Counting()
    compiled = how(model, backend)
    watch(compiled, inputs)
    graphs = backend.graphs
    for _ in range(TIMES):
        watch(compiled, inputs)
    assert backend.graphs == graphs
    backend.ran = 0
    compiled(**inputs)
    assert backend.ran > 0


@pytest.mark.parametrize("how", HOW)
def test_perplexity_and_fitting_routers(how: Callable[..., nn.Module]) -> None:
    model, inputs = sparse("llama")
    backend = Counting()
    compiled = how(model, backend)
    expected = perplexity(sparse("llama")[0], inputs["input_ids"])
    for _ in range(TIMES):
        assert perplexity(compiled, inputs["input_ids"]) == pytest.approx(expected, rel=1e-5)
    graphs = backend.graphs
    assert graphs == 1
    for _ in range(TIMES):
        fit_routers(compiled, inputs["input_ids"], progress=False)
    assert backend.graphs == graphs, "what fits routers is no part of the model"
    backend.ran = 0
    with torch.no_grad():
        compiled(**inputs)
    assert backend.ran > 0


@torch.no_grad()
def test_modes_of_gradients_and_inference_in_one_record() -> None:
    model, inputs = sparse("llama")
    tokens = inputs["input_ids"].numel()
    with record_sparsity(model) as record, torch.inference_mode():
        model(**inputs)
    with torch.inference_mode(), record_sparsity(model) as other:
        model(**inputs)
    assert other.per_layer == record.per_layer
    with record_sparsity(model) as mixed:
        model(**inputs)
        with torch.inference_mode():
            model(**inputs)
        with torch.enable_grad():
            model(**inputs)
    assert mixed.tokens == 3 * tokens
    assert mixed.per_layer == pytest.approx(record.per_layer)
