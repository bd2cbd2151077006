"""Sparse models under torch.compile's stock backends: one graph, the same numbers, no recompilation for another tau."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES

from torch_prunepath import SparsifyConfig, register_routing_hook, set_tau, sparsify

CONFIG = SparsifyConfig(expert_size=8, partition="contiguous", router="centroid", budget="uniform")


@pytest.fixture(autouse=True)
def fresh_dynamo():  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_one_graph_for_every_tau(name: str, backend: str) -> None:
    model, inputs = ARCHITECTURES[name]()
    sparsify(model.eval(), tau=0.5, config=CONFIG, progress=False)
    graphs = []
    inner = torch._dynamo.lookup_backend(backend)

    def counting(graph, example_inputs, **options):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return inner(graph, example_inputs, **options)

    compiled = torch.compile(model, backend=counting, fullgraph=True)
    with torch.no_grad():
        for tau in (0.5, 0.8, 1.0):
            set_tau(model, tau)
            torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_gradients_through_a_compiled_model() -> None:
    model, inputs = ARCHITECTURES["llama"]()
    sparsify(model.train(), tau=0.5, config=CONFIG, progress=False)
    labels = inputs["input_ids"]

    def gradients(call) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        model.zero_grad()
        call(**inputs, labels=labels).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients(model)
    found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_routing_hook_added_after_compilation_counts() -> None:
    model, inputs = ARCHITECTURES["llama"]()
    sparsify(model.eval(), tau=0.1, config=CONFIG, progress=False)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        sparse = compiled(**inputs)[0]
        with register_routing_hook(model, lambda routing: torch.ones_like(routing.mask_TE)):
            full = compiled(**inputs)[0]
        assert not torch.allclose(full, sparse)
        set_tau(model, 1.0)
        torch.testing.assert_close(full, model(**inputs)[0], rtol=1e-5, atol=1e-5)
