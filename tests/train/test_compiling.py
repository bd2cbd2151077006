"""Training with compiled blocks: one graph for all alike layers, losses as without, nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, token_ids
from torch import nn
from torch._dynamo.utils import counters

from torch_prunepath import SparsifyConfig, sparse_layers, sparsify
from torch_prunepath.train import TrainConfig, compiled_blocks, hold, ramp, train
from torch_prunepath.train.compiling import blocks

CONFIG = SparsifyConfig(expert_size=4, partition="random", router="centroid", budget="uniform")
LOSSES: dict[str, Any] = {"entropy": 0.1, "load_balance": 0.1, "lte_separation": 1e-4, "contribution_fit": 1.0}
RECIPE = TrainConfig(steps=4, phases=(ramp(0.0, 0.5), hold(0.5)), fit_tokens=5, **LOSSES)
BACKEND = "aot_eager"  # traces and differentiates like Inductor, and computes with the same kernels as eager


def dense(name: str) -> nn.Module:
    """Without dropout: compiled code draws other random numbers."""
    model = ARCHITECTURES[name]()[0]
    for module in model.modules():
        for attribute in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def sparse(name: str) -> nn.Module:
    return sparsify(dense(name), tau=0.5, config=CONFIG, progress=False)


def batches(padding: int = 0) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in (3, 4):
        ids = token_ids(seed)
        mask = torch.ones_like(ids)
        mask[:, ids.shape[1] - padding :] = 0
        found.append({"input_ids": ids, "attention_mask": mask} if padding else {"input_ids": ids})
    return found


def trained(model: nn.Module, config: TrainConfig = RECIPE, **options: Any) -> tuple[list[dict[str, float]], nn.Module]:
    padding = options.pop("padding", 0)
    return train(model, batches(padding), config, progress=False, **options), model


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def forget() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_it_computes_what_eager_training_computes_with_one_graph_for_all_layers(name: str, bf16: bool) -> None:
    model = sparse(name)
    config = TrainConfig(steps=4, phases=RECIPE.phases, fit_tokens=5, autocast=bf16, **LOSSES)
    expected, eager = trained(copy.deepcopy(model), config)
    found, compiled = trained(model, config, compile=BACKEND)
    # One graph for the blocks, of which there are at least two, and one for the model's loss.
    assert len(blocks(model)) >= 2 and graphs() == 2 and not counters["graph_break"]
    assert [sorted(record) for record in found] == [sorted(record) for record in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3 if bf16 else 1e-5)
    for (key, a), b in zip(compiled.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 if bf16 else 1e-5, msg=key)


def test_padding_does_not_count_when_compiled_either() -> None:
    model = sparse("llama")
    expected, _ = trained(copy.deepcopy(model), padding=5)
    found, _ = trained(model, padding=5, compile=BACKEND)
    assert not counters["graph_break"]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_more_steps_and_another_run_compile_nothing_anew() -> None:
    model = sparse("llama")
    trained(model, compile=BACKEND)
    before = graphs()
    trained(sparse("llama"), compile=BACKEND)
    assert graphs() - before <= 1  # the new model's loss function is a new object


def test_shared_experts_and_normalised_routers_train_alike() -> None:
    config = dataclasses.replace(CONFIG, shared_experts=2, router_norm=True)
    model = sparsify(dense("llama"), tau=0.5, config=config, calibration=token_ids(8), progress=False)
    held = TrainConfig(steps=12, phases=(hold(0.5),), fit_tokens=5, **LOSSES)
    expected, _ = trained(copy.deepcopy(model), held)
    found, _ = trained(model, held, compile=BACKEND)
    assert not counters["graph_break"]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    routed = sparse_layers(model)["model.layers.0.mlp"].num_experts - 2
    assert all(0 < record["entropy"] <= math.log(routed) + 1e-6 for record in found), "shared experts have no share"
    assert found[-1]["sparsity"] == pytest.approx(0.5, abs=0.1)


def test_the_teacher_is_compiled_too() -> None:
    model, teacher = sparse("llama"), dense("llama")
    config = TrainConfig(steps=3, phases=(hold(0.5),), contribution_fit=1.0, distill_logits=1.0)
    expected, _ = trained(copy.deepcopy(model), config, teacher=teacher)
    found, _ = trained(model, config, teacher=teacher, compile=BACKEND)
    assert graphs() >= 3 and not counters["graph_break"]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert all(module._compiled_call_impl is None for each in (model, teacher) for module in each.modules())


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_nothing_stays_behind_even_if_a_step_fails(name: str) -> None:
    model = sparse(name)
    before = set(vars(model))
    with pytest.raises(RuntimeError, match="stop"), compiled_blocks(model, BACKEND):
        assert all(block._compiled_call_impl is not None for block in blocks(model))
        raise RuntimeError("stop")
    assert set(vars(model)) == before
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_each_ffn_is_in_one_block() -> None:
    for name in ("llama", "opt", "bert", "t5", "gpt2"):
        model = sparse(name)
        held = [{id(m) for m in block.modules()} for block in blocks(model)]
        routers = [m for m in model.modules() if hasattr(m, "router")]
        assert routers and all(sum(id(router) in each for each in held) == 1 for router in routers), name
        assert len(blocks(dense(name))) == len(held)


def test_what_cannot_be_compiled_is_refused_before_anything_happens() -> None:
    model = sparse("llama")
    with pytest.raises(ValueError, match="distill_ffn"):
        trained(model, TrainConfig(steps=1, distill_ffn=1.0), compile=BACKEND)
    with compiled_blocks(model, BACKEND), pytest.raises(ValueError, match="compiled already"):
        trained(model, compile=BACKEND)
    with pytest.raises(ValueError, match=r"'nonsense': torch\.compile knows no such mode: choose from default"):
        trained(model, compile="nonsense")
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        trained(model, compile=BACKEND)
    assert graphs() == 0


def test_many_kinds_of_runs_in_one_process_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("entropy", "load_balance", "lte_separation", "contribution_fit")
    kinds = [{n: 0.1 for i, n in enumerate(names) if bits >> i & 1} for bits in range(1, 11)]
    model = sparse("llama")
    for kind in kinds:
        trained(model, TrainConfig(steps=1, phases=(hold(0.5),), fit_tokens=5, **kind), compile=BACKEND)
    assert graphs() == len(kinds) + 1  # that of the loss
    monkeypatch.setattr("torch_prunepath.train.compiling.VARIANTS", 4)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for kind in kinds:
            trained(model, TrainConfig(steps=1, phases=(hold(0.5),), fit_tokens=5, **kind), compile=BACKEND)


def test_inductor_trains() -> None:
    model = sparse("llama")
    expected, _ = trained(copy.deepcopy(model))
    found, _ = trained(model, compile=True)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-2)


@pytest.mark.parametrize(
    ("how", "own", "teachers"),
    [
        ("reduce-overhead", {"mode": "reduce-overhead"}, {"mode": "default"}),
        ("max-autotune", {"mode": "max-autotune"}, {"mode": "max-autotune-no-cudagraphs"}),
        ("default", {"mode": "default"}, {"mode": "default"}),
        (BACKEND, {"backend": BACKEND}, {"backend": BACKEND}),
        (True, {}, {}),
        (False, None, None),
    ],
)
def test_a_teacher_records_no_cuda_graphs(monkeypatch: pytest.MonkeyPatch, how: Any, own: Any, teachers: Any) -> None:
    """One block's replay would write over what the block before it answered."""
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: modes.append((module, options)))
    model, teacher = sparse("llama"), ARCHITECTURES["llama"]()[0]
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    trained(model, dataclasses.replace(RECIPE, steps=1, distill_logits=1.0), teacher=teacher, compile=how)
    expected = [*((block, own) for block in blocks(model)), *((block, teachers) for block in blocks(teacher))]
    assert modes == (expected if how else [])


@pytest.mark.gpu
@pytest.mark.parametrize("distil", [0.0, 1.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_recorded_as_cuda_graphs(accumulation: int, distil: float) -> None:
    """Gradients that are added up outlive the graphs that gave them; so do a teacher's outputs."""
    model = sparse("llama").cuda()
    config = dataclasses.replace(RECIPE, steps=12, accumulation=accumulation, distill_logits=distil)
    teacher = ARCHITECTURES["llama"]()[0].cuda() if distil else None
    expected, _ = trained(copy.deepcopy(model), config, teacher=teacher)
    found, _ = trained(model, config, teacher=teacher, compile="reduce-overhead")
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-2, abs=1e-6)
