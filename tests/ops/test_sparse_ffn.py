"""Where nobody needs what lies between, a sparse FFN is one operator; elsewhere its parts are called one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES
from torch.utils._python_dispatch import TorchDispatchMode

from torch_prunepath import SparsifyConfig, record_sparsity, register_routing_hook, sparse_layers, sparsify


class Calls(TorchDispatchMode):
    """Counts calls of this library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "prunepath":
            self.names.append(func._schema.name.removeprefix("prunepath::"))
        return func(*args, **(kwargs or {}))


def called(model: torch.nn.Module, inputs: dict) -> set[str]:
    with Calls() as calls:
        model(**inputs)
    return set(calls.names)


def tiny(name: str, **settings):  # type: ignore[no-untyped-def]
    model, inputs = ARCHITECTURES[name]()
    weights_only = {"partition": "contiguous", "router": "centroid", "budget": "uniform"}
    config = SparsifyConfig(expert_size=8, **weights_only, **settings)
    return sparsify(model.eval(), tau=0.5, config=config, progress=False), inputs


SETTINGS = [{}, {"gate": "sigmoid"}, {"router_norm": True}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "t5", "falcon"])
def test_the_same_numbers(name: str, settings: dict) -> None:
    model, inputs = tiny(name, **settings)
    parts = model(**inputs)[0]
    with torch.no_grad():
        assert called(model, inputs) == {"sparse_ffn"}
        torch.testing.assert_close(model(**inputs)[0], parts, rtol=1e-5, atol=1e-5)


def test_parts_where_a_gradient_is_wanted() -> None:
    model, inputs = tiny("llama")
    assert "sparse_ffn" not in called(model, inputs)
    with torch.no_grad():
        assert "sparse_ffn" not in called(model.train(), inputs)


def scaled(layer: torch.nn.Module) -> None:
    layer.up_proj.register_forward_hook(lambda module, args, output: 2 * output)


def scaled_router(layer: torch.nn.Module) -> None:
    layer.router.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("watch", [scaled, scaled_router])
@torch.no_grad()
def test_parts_where_something_watches(watch: Callable[[torch.nn.Module], None]) -> None:
    model, inputs = tiny("llama")
    before = model(**inputs)[0]
    for layer in sparse_layers(model).values():
        watch(layer)
    assert "sparse_ffn" not in called(model, inputs)
    assert not torch.allclose(model(**inputs)[0], before)


@torch.no_grad()
def test_routing_hooks_see_every_call() -> None:
    model, inputs = tiny("llama")
    with record_sparsity(model) as record:
        assert "sparse_ffn" not in called(model, inputs)
    assert record.tokens == inputs["input_ids"].numel()
    with register_routing_hook(model, lambda routing: torch.ones_like(routing.mask_TE)):
        assert "sparse_ffn" not in called(model, inputs)
    assert called(model, inputs) == {"sparse_ffn"}


@torch.no_grad()
def test_autocast_keeps_the_parts() -> None:
    model, inputs = tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert "sparse_ffn" not in called(model, inputs)


@torch.no_grad()
def test_dropout_switched_on_by_itself_is_applied() -> None:
    model, inputs = tiny("gpt2")
    before = model(**inputs)[0]
    dropouts = [layer.get_submodule(layer.ffn.output_dropout) for layer in sparse_layers(model).values()]
    for dropout in dropouts:
        dropout.p = 0.5
        dropout.train()
    assert "sparse_ffn" not in called(model, inputs)
    assert not torch.allclose(model(**inputs)[0], before)
