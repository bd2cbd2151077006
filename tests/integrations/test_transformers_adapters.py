"""LoRA on the projections of sparse models: they are found, recorded and trained; densify refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from torch_prunepath import SparsifyConfig, densify, fit_routers, record_sparsity, set_sparsity, sparse_layers, sparsify
from torch_prunepath.integrations.peft import PrunePathConfig
from torch_prunepath.layer.views import sparse_views
from torch_prunepath.train import TrainConfig, fixed_tau, train
from torch_prunepath.train.tape import RoutingTape

CONFIG = SparsifyConfig(expert_size=8, partition="kmeans", router="centroid", budget="uniform")
FIRST = {"opt": ["fc1"], "bert": ["intermediate.dense"], "llama": ["up_proj", "gate_proj"], "gpt2": ["c_fc"]}
LAST = {"opt": ["fc2"], "bert": ["output.dense"], "llama": ["down_proj"], "gpt2": ["mlp.c_proj"]}
PLACES = {"first": FIRST, "last": LAST, "both": {name: FIRST[name] + LAST[name] for name in FIRST}}


def with_lora(name: str, where: str) -> tuple[Any, nn.Module, dict[str, Any]]:
    base, inputs = ARCHITECTURES[name]()
    sparsify(base, 0.5, config=CONFIG, progress=False)
    torch.manual_seed(0)
    config = LoraConfig(target_modules=PLACES[where][name], init_lora_weights=False, r=2, fan_in_fan_out=name == "gpt2")
    return get_peft_model(base, config), base, inputs


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs)[0]
    return found


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", FIRST)
def test_views_and_tapes_find_what_is_under_lora(name: str, where: str) -> None:
    model, _, inputs = with_lora(name, where)
    expected = ARCHITECTURES[name]()[0]
    sparsify(expected, 0.5, config=CONFIG, progress=False)
    for view, plain in zip(sparse_views(model).values(), sparse_views(expected).values(), strict=True):
        assert torch.equal(view.up_FD, plain.up_FD) and torch.equal(view.down_FD, plain.down_FD)
    with RoutingTape(model.eval(), outputs=True) as tape:
        model(**inputs)
    assert [call.name for call in tape.calls] == list(sparse_layers(model))
    tokens = inputs["input_ids"].numel()
    for call in tape.calls:
        assert call.x_TD.shape == call.y_TD.shape == (tokens, 32)
        last = call.view.down if call.layer.ffn.split else call.layer
        seen: list[Tensor] = []
        handle = last.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y))
        logits(model, inputs)
        handle.remove()
        torch.testing.assert_close(call.y_TD, seen[0].reshape(tokens, 32))
    fit_routers(model, inputs, progress=False)
    set_sparsity(model, 0.4, inputs, progress=False)
    with record_sparsity(model) as record:
        logits(model, inputs)
    assert record.sparsity == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("name", FIRST)
def test_train_reaches_lora_under_split_layers(name: str) -> None:
    model, _, inputs = with_lora(name, "both")
    for layer in sparse_layers(model).values():
        layer.router.requires_grad_(True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    config = TrainConfig(steps=2, phases=(fixed_tau(0.5),), contribution_fit=1.0, warmup=0.0)
    train(model, [{**inputs, "labels": inputs["input_ids"]}], config)
    still = [n for n, p in model.named_parameters() if n in before and torch.equal(before[n], p)]
    assert len(before) > 8 and not still


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", FIRST)
def test_densify_refuses_what_lora_is_on(name: str, where: str) -> None:
    """LoRA's weights are in expert order; neurons that move away from them would compute something else."""
    model, base, inputs = with_lora(name, where)
    expected = logits(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for holder in (model, base):
        with pytest.raises(ValueError, match=r"was replaced since, .* call merge_and_unload\(\) or unload\(\) of that"):
            densify(holder)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(model, inputs), expected)
    dense = densify(model.unload())
    assert torch.equal(logits(dense, inputs), logits(ARCHITECTURES[name]()[0], inputs))


def test_densify_keeps_lora_on_attention() -> None:
    base, inputs = ARCHITECTURES["llama"]()
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    expected = logits(model, inputs)
    sparsify(base, 0.5, config=CONFIG, progress=False)
    densify(model)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("name", FIRST)
def test_densify_refuses_a_prunepath_adapter(name: str) -> None:
    base, inputs = ARCHITECTURES[name]()
    model = get_peft_model(base, PrunePathConfig(tau=0.5, calibration=inputs, progress=False))
    expected = logits(model, inputs)
    before = [type(module) for module in model.modules()]
    for holder in (model, base):
        with pytest.raises(ValueError, match=r"is a PEFT adapter's, .* call model.unload\(\) instead"):
            densify(holder)
    assert [type(module) for module in model.modules()] == before
    assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model.unload(), inputs), logits(ARCHITECTURES[name]()[0], inputs))
