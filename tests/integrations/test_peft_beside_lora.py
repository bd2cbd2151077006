"""PrunePath adapters and those of other kinds on one base model: on attention, on the experts, in either order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, token_ids
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from torch_prunepath import sparse_layers
from torch_prunepath.integrations.peft import PrunePathConfig

ATTENTION = {"llama": ["q_proj"], "gpt2": ["c_attn"], "opt": ["q_proj"], "bert": ["query"]}
EXPERTS = {
    "llama": ["up_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_fc", "mlp.c_proj"],
    "opt": ["fc1", "fc2"],
    "bert": ["intermediate.dense", "output.dense"],
}
ON = {
    "attention": ATTENTION,
    "experts": EXPERTS,
    "down": {name: parts[-1:] for name, parts in EXPERTS.items()},
    "both": {name: ATTENTION[name] + EXPERTS[name] for name in EXPERTS},
}


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def lora(name: str, on: str, **settings: Any) -> LoraConfig:
    """One that changes the output, but not so much that the base would not be known again."""
    defaults = {"init_lora_weights": False, "r": 8, "lora_alpha": 1, "fan_in_fan_out": name == "gpt2"}
    return LoraConfig(target_modules=ON[on][name], **{**defaults, **settings})


def sparse(calibration: Any, **settings: Any) -> PrunePathConfig:
    return PrunePathConfig(**{"tau": 0.6, "gate": "sigmoid", "calibration": calibration, "progress": False, **settings})


def both_on(name: str, on: str, order: str, **settings: Any) -> tuple[PeftModel, PeftModel, dict[str, Any], Tensor]:
    """A base model with adapters of both kinds: their PeftModels, inputs, and the dense output."""
    base, inputs = ARCHITECTURES[name]()
    dense = output(base, inputs)
    torch.manual_seed(0)
    if order == "sparse first":
        mine = get_peft_model(base, sparse(inputs))
        return mine, get_peft_model(base, lora(name, on, **settings)), inputs, dense
    other = get_peft_model(base, lora(name, on, **settings))
    return get_peft_model(base, sparse(inputs)), other, inputs, dense


@pytest.mark.parametrize("order", ["sparse first", "lora first"])
@pytest.mark.parametrize("on", list(ON))
@pytest.mark.parametrize("name", list(EXPERTS))
def test_both_act_and_each_is_saved_by_itself(name: str, on: str, order: str, tmp_path: Path) -> None:
    """The same as merging the LoRA adapter into a base without PrunePath, and adapting the result."""
    mine, other, inputs, dense = both_on(name, on, order)
    found = output(mine, inputs)
    assert torch.equal(output(other, inputs), found) and not torch.allclose(found, dense, atol=1e-2)
    mine.save_pretrained(tmp_path / "sparse")
    other.save_pretrained(tmp_path / "lora")
    assert all(".prunepath" in key for key in load_file(tmp_path / "sparse" / "adapter_model.safetensors"))
    assert all(".lora_" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))

    merged = PeftModel.from_pretrained(ARCHITECTURES[name]()[0], tmp_path / "lora").merge_and_unload()
    close(found, output(PeftModel.from_pretrained(merged, tmp_path / "sparse"), inputs))

    base, _ = ARCHITECTURES[name]()
    for kind in ("lora", "sparse") if order == "sparse first" else ("sparse", "lora"):
        again = PeftModel.from_pretrained(base, tmp_path / kind)
    assert torch.equal(output(again, inputs), found), "loaded in the other order"

    with mine.disable_adapter():
        assert torch.equal(output(mine, inputs), dense)
    assert torch.equal(output(mine, inputs), found)


@pytest.mark.parametrize("order", ["sparse first", "lora first"])
@pytest.mark.parametrize("name", list(EXPERTS))
def test_merging_both(name: str, order: str) -> None:
    mine, other, inputs, _ = both_on(name, "both", order)
    found = output(mine, inputs)
    with pytest.raises(ValueError, match=r"is under another adapter: call merge_and_unload\(\) or unload\(\) of that"):
        mine.merge_and_unload()
    assert torch.equal(output(mine, inputs), found), "nothing was changed"
    other.merge_and_unload()
    close(output(mine, inputs), found)
    merged = mine.merge_and_unload()
    close(output(merged, inputs), found)
    assert len(sparse_layers(merged)) == 2 and not hasattr(merged, "peft_config")


@pytest.mark.parametrize("order", ["sparse first", "lora first"])
@pytest.mark.parametrize("name", list(EXPERTS))
def test_unloading_one_leaves_the_other(name: str, order: str) -> None:
    mine, other, inputs, dense = both_on(name, "both", order)
    alone, _ = ARCHITECTURES[name]()
    expected = output(get_peft_model(alone, sparse(inputs)), inputs)
    other.unload()
    assert torch.equal(output(mine, inputs), expected)
    assert torch.equal(output(mine.unload(), inputs), dense)

    mine, other, inputs, _ = both_on(name, "both", order)
    torch.manual_seed(0)
    only = get_peft_model(ARCHITECTURES[name]()[0], lora(name, "both"))
    mine.unload()
    assert torch.equal(output(other, inputs), output(only, inputs))


@pytest.mark.parametrize("order", ["sparse first", "lora first"])
def test_both_train(order: str) -> None:
    mine, _, inputs, _ = both_on("llama", "both", order)
    trained = {n for n, p in mine.named_parameters() if p.requires_grad}
    assert all(".router." in n or ".lora_" in n for n in trained)
    assert {".router." in n for n in trained} == {True, False}
    mine.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in mine.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name


def test_inactive_neurons_do_not_reach_a_lora_adapter_on_the_last_projection() -> None:
    """Where fc1 has an adapter, a neuron that its expert leaves inactive is not 0 after the activation."""
    mine, other, inputs, _ = both_on("opt", "experts", "sparse first")
    seen: list[Tensor] = []
    fc2 = mine.get_base_model().model.decoder.layers[0].fc2
    fc2.lora_A["default"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    masks: list[Tensor] = []
    layer = next(iter(sparse_layers(mine).values()))
    layer.register_routing_hook(lambda routing: masks.append(routing.mask_TE))
    output(other, inputs)
    active_TF = masks[0].index_select(1, layer.state().expert_of_F)
    h_TF = seen[0].reshape(active_TF.shape)
    assert active_TF.any() and not active_TF.all()
    assert not h_TF[~active_TF].any() and h_TF[active_TF].any()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_variants_that_read_or_change_the_base_weights(settings: dict[str, Any]) -> None:
    """Neurons never change places under them."""
    mine, other, inputs, dense = both_on("llama", "experts", "sparse first", **settings)
    found = output(mine, inputs)
    torch.manual_seed(0)
    merged = get_peft_model(ARCHITECTURES["llama"]()[0], lora("llama", "experts", **settings)).merge_and_unload()
    reference = get_peft_model(merged, sparse(inputs))
    adapters = {key: value for key, value in mine.state_dict().items() if ".prunepath." in key}
    reference.load_state_dict(adapters, strict=False)
    close(found, output(reference, inputs))
    other.merge_and_unload()
    close(output(mine, inputs), found)
    assert not torch.allclose(found, dense, atol=1e-2)


def test_all_linear_leaves_routers_alone() -> None:
    base, inputs = ARCHITECTURES["llama"]()
    mine = get_peft_model(base, sparse(inputs))
    expected = output(mine, inputs)
    other = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    assert not any(".prunepath." in name for name, _ in other.named_parameters() if ".lora_" in name)
    assert torch.equal(output(other, inputs), expected)


def test_ia3_beside_it() -> None:
    base, inputs = ARCHITECTURES["llama"]()
    mine = get_peft_model(base, sparse(inputs))
    expected = output(mine, inputs)
    settings = {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}
    other = get_peft_model(base, IA3Config(**settings))
    assert torch.equal(output(other, inputs), expected), "IA3 starts as nothing"
    other.merge_and_unload()
    assert torch.equal(output(mine, inputs), expected)


def test_lora_s_own_merge_in_place() -> None:
    mine, other, inputs, _ = both_on("llama", "both", "sparse first")
    found = output(mine, inputs)
    other.merge_adapter()
    close(output(mine, inputs), found)
    other.unmerge_adapter()
    close(output(mine, inputs), found)


def test_a_second_prunepath_adapter_under_lora() -> None:
    mine, _, inputs, _ = both_on("llama", "both", "lora first")
    first = output(mine, inputs)
    mine.add_adapter("two", sparse(token_ids(7), tau=0.3))
    assert torch.equal(output(mine, inputs), first)
    mine.set_adapter("two")
    assert not torch.equal(output(mine, inputs), first)
    assert {n.partition(".lora_")[2] != "" for n, p in mine.named_parameters() if p.requires_grad} == {True, False}
