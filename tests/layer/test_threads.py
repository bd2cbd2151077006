"""Servers call one model from several threads: every call is computed with its own routing."""

from __future__ import annotations

import asyncio
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn

from torch_prunepath import SparsifyConfig, sparsify
from torch_prunepath.layer.handoff import Handoff

CONFIG = SparsifyConfig(expert_size=8, partition="random", router="zero", budget="uniform")
SPLIT = ("bert", "opt", "bloom", "whisper")
CALLS = 400


def sharpened(model: nn.Module) -> nn.Module:
    """Routers that choose differently for each token, in a model that evaluates."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            router = getattr(module, "router", None)
            if isinstance(router, nn.Linear):
                router.weight.normal_(std=3 * router.weight.shape[1] ** -0.5)
    return model.eval()


def sparse(name: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A sparse model whose routers are sharp, and eight requests that it answers differently."""
    model, inputs = ARCHITECTURES[name]()
    sparsify(model, tau=0.5, config=CONFIG, progress=False)
    torch.manual_seed(1)
    return sharpened(model), [{key: scrambled(value) for key, value in inputs.items()} for _ in range(8)]


def scrambled(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.flatten()[torch.randperm(value.numel())].view_as(value)


def answer(model: nn.Module, request: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**request)
    return output if isinstance(output, Tensor) else output[0]


def assert_right_in_threads(model: nn.Module, requests: list[dict[str, Any]]) -> None:
    alone = [answer(model, request) for request in requests]
    assert not torch.equal(alone[0], alone[1])

    def one(i: int) -> None:
        torch.testing.assert_close(answer(model, requests[i % 8]), alone[i % 8], rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, range(CALLS)))


@pytest.mark.parametrize("name", SPLIT)
def test_calls_in_several_threads_are_those_of_one(name: str) -> None:
    assert_right_in_threads(*sparse(name))


def test_several_models_in_several_threads() -> None:
    pairs = [sparse(name) for name in ("bert", "opt")]
    alone = [[answer(model, request) for request in requests] for model, requests in pairs]

    def one(i: int) -> None:
        (model, requests), expected = pairs[i % 2], alone[i % 2]
        torch.testing.assert_close(answer(model, requests[i % 8]), expected[i % 8], rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, range(CALLS)))


def test_asyncio_to_thread() -> None:
    model, requests = sparse("bert")
    alone = [answer(model, request) for request in requests]

    async def all_at_once() -> list[Tensor]:
        return await asyncio.gather(*(asyncio.to_thread(answer, model, requests[i % 8]) for i in range(CALLS)))

    for i, found in enumerate(asyncio.run(all_at_once())):
        torch.testing.assert_close(found, alone[i % 8], rtol=1e-5, atol=1e-5)


def test_adapters_in_several_threads() -> None:
    peft = pytest.importorskip("peft")
    from torch_prunepath.integrations.peft import PrunePathConfig

    model, inputs = ARCHITECTURES["bert"]()
    config = PrunePathConfig(
        tau=0.5, expert_size=8, partition="random", router="zero", budget="uniform", task_type=None
    )
    adapted = sharpened(peft.get_peft_model(model, config))
    torch.manual_seed(1)
    assert_right_in_threads(adapted, [{key: scrambled(value) for key, value in inputs.items()} for _ in range(8)])


def test_a_handoff_is_empty_in_another_thread_and_in_copies() -> None:
    handoff = Handoff()
    handoff.routing = torch.ones(2, 3, dtype=torch.bool), None
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: handoff.routing).result() is None
    assert copy.deepcopy(handoff).routing is None
    assert pickle.loads(pickle.dumps(handoff)).routing is None
    assert handoff.take() is not None
    assert handoff.routing is None
