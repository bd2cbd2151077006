"""What PrunePath adapters refuse: with a remedy, and before anything is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, NOTHING_TO_FIND, token_ids
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torch_prunepath import SparsifyConfig, find_ffns, sparsify
from torch_prunepath.integrations import peft_state
from torch_prunepath.integrations.peft import PrunePathConfig
from torch_prunepath.layer import swap
from torch_prunepath.layer.ffn import FFNView

WEIGHTS = "adapter_model.safetensors"
FROM_WEIGHTS = SparsifyConfig(partition="kmeans", router="centroid", budget="uniform")


def config(**settings: Any) -> PrunePathConfig:
    return PrunePathConfig(**{"tau": 0.6, "calibration": token_ids(), "progress": False, **settings})


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an adapter could change."""
    return {
        "classes": [type(module) for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "config": model.config.to_dict(),
    }


def unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    tensors, earlier = after.pop("tensors"), before.pop("tensors")
    assert after == before
    assert tensors.keys() == earlier.keys()
    assert all(torch.equal(value, earlier[key]) for key, value in tensors.items() if not value.is_meta)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT asks the hub for the base model that an adapter names."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A saved adapter of the tiny llama."""
    base, _ = ARCHITECTURES["llama"]()
    get_peft_model(base, config()).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "tiny-llama"}))
    return tmp_path / "adapter"


def already_sparse(base: nn.Module) -> None:
    sparsify(base, 0.5, config=FROM_WEIGHTS, progress=False)


def quantised(base: nn.Module) -> None:
    base.config.quantization_config = {"quant_method": "bitsandbytes"}


def on_meta(base: nn.Module) -> None:
    base.to("meta")


def with_adapters(base: nn.Module) -> None:
    get_peft_model(base, config())


REFUSED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "already sparse": (already_sparse, r"base model is sparse already: .*densify\(model\) first"),
    "quantised": (quantised, r"carries a quantization_config: load it unquantised"),
    "with adapters": (with_adapters, r"has PrunePath adapters already: call add_adapter .* or unload\(\) first"),
}


@pytest.mark.parametrize("how", list(REFUSED))
def test_base_that_takes_no_adapter(how: str, adapter: Path) -> None:
    prepare, message = REFUSED[how]
    base, _ = ARCHITECTURES["llama"]()
    prepare(base)
    before = state(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config())
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, adapter)
    unchanged(base, before)


def test_base_without_weights_or_ffns() -> None:
    base, _ = ARCHITECTURES["llama"]()
    on_meta(base)
    with pytest.raises(ValueError, match="parameters without data"):
        get_peft_model(base, config())
    base, _ = NOTHING_TO_FIND["mamba"]()
    before = state(base)
    with pytest.raises(ValueError, match="no feed-forward network to make sparse was found"):
        get_peft_model(base, config())
    unchanged(base, before)


def test_adapters_around_adapters() -> None:
    base, inputs = ARCHITECTURES["llama"]()
    model = get_peft_model(base, config())
    before = state(base)
    with pytest.raises(
        ValueError, match=r"LoraConfig cannot be added to .* get_peft_model\(model.get_base_model\(\), c"
    ):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    unchanged(base, before)
    assert list(model.peft_config) == ["default"]
    model(**inputs)
    base, _ = ARCHITECTURES["llama"]()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    before = state(base)
    with pytest.raises(ValueError, match=r"is a PeftModel already: .* pass the base model itself"):
        get_peft_model(model, config())
    unchanged(base, before)


def test_what_an_adapter_cannot_do() -> None:
    base, _ = ARCHITECTURES["llama"]()
    model = get_peft_model(base, config(), adapter_name="one")
    model.add_adapter("two", config())
    before = state(base)
    with pytest.raises(ValueError, match="one PrunePath adapter can be active at a time, not one, two: name one"):
        model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"cannot be merged in place: call model.merge_and_unload\(\)"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"one PrunePath adapter can be merged, not 2"):
        model.merge_and_unload(adapter_names=["one", "two"])
    with pytest.raises(ValueError, match=r"no PrunePath adapter called 'three'"):
        model.merge_and_unload(adapter_names=["three"])
    unchanged(base, before)


def test_new_adapter_with_low_cpu_mem_usage() -> None:
    base, _ = ARCHITECTURES["llama"]()
    before = state(base)
    with pytest.raises(ValueError, match="leaves a new adapter without weights: leave it out, and use it only to"):
        get_peft_model(base, config(), low_cpu_mem_usage=True)
    unchanged(base, before)


def test_data_that_nothing_uses_and_data_that_does_not_fit() -> None:
    base, _ = ARCHITECTURES["llama"]()
    before = state(base)
    with pytest.raises(ValueError, match="calibration is given, but nothing"):
        get_peft_model(base, config(partition="kmeans", router="centroid", budget="uniform"))
    with pytest.raises(ValueError, match="pass tokenizer= as well"):
        get_peft_model(base, config(calibration=["a text"]))
    unchanged(base, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0.0}, r"tau=0.0 is outside \(0, 1\]"),
        ({"expert_size": 0}, "expert_size=0 must be at least 1"),
        ({"router": "trained"}, "router='trained' is not known"),
        ({"gate_offset": 1.0}, "gate_offset moves the sigmoid gate"),
        ({"router_loss": -1.0}, "router_loss=-1.0 must not be negative"),
    ],
    ids=str,
)
def test_config_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrunePathConfig(**settings)


def test_config_of_a_newer_format(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    data = json.loads(path.read_text())
    data["manifest"]["format_version"] = 99
    path.write_text(json.dumps(data))
    base, _ = ARCHITECTURES["llama"]()
    before = state(base)
    with pytest.raises(ValueError, match=r"format 99, .* upgrade torch_prunepath"):
        PeftModel.from_pretrained(base, adapter)
    unchanged(base, before)


def test_config_without_its_weights(adapter: Path) -> None:
    base, inputs = ARCHITECTURES["llama"]()
    model = get_peft_model(base, PeftConfig.from_pretrained(adapter))
    with pytest.raises(ValueError, match=r"configuration is here, but not its weights: load both with"):
        model(**inputs)
    with pytest.raises(ValueError, match="'default' has no weights"):
        model.merge_and_unload()


@pytest.mark.parametrize("where", ["make_routed", "permute_", "router"])
def test_a_merge_that_fails_half_way_leaves_the_base_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, inputs = ARCHITECTURES["llama"]()
    model = get_peft_model(base.eval(), config())
    before, expected = state(base), model(**inputs).logits
    holder, name = {
        "make_routed": (swap, "make_routed"),
        "permute_": (FFNView, "permute_"),
        "router": (peft_state, "_copied"),
    }[where]
    original, calls = getattr(holder, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)  # fails after it has done its work: the harder case
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(holder, name, failing)
    with pytest.raises(KeyboardInterrupt):
        model.merge_and_unload()
    monkeypatch.undo()
    unchanged(base, before)
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.allclose(model.merge_and_unload()(**inputs).logits, expected, atol=1e-5)


def other_shape() -> nn.Module:
    base, _ = ARCHITECTURES["llama"]()
    wider = type(base.config)(**{**base.config.to_dict(), "intermediate_size": 53})
    return type(base)(wider)


def other_weights() -> nn.Module:
    base, _ = ARCHITECTURES["llama"]()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 6)
    return base


def other_order() -> nn.Module:
    """As a sparse checkpoint's weights stand when it is loaded without this package."""
    base, _ = ARCHITECTURES["llama"]()
    for spec in find_ffns(base):
        FFNView(base, spec).permute_(torch.randperm(spec.ffn_size, generator=torch.Generator().manual_seed(1)))
    return base


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ARCHITECTURES["gpt2"]()[0], r"was made for tiny-llama: .* an FFN at 'model.layers.0.mlp', but GPT2LM"),
        (lambda: ARCHITECTURES["llama"]()[0].model, r"FFN at 'model.layers.0.mlp'; here it is at 'layers.0.mlp': load"),
        (other_shape, r"FFN at 'model.layers.0.mlp' is 32x37; here it is 32x53: load it onto its own base model"),
        (other_weights, r"the same shape but other weights, or its neurons in another order"),
        (other_order, r"the same shape but other weights, or its neurons in another order"),
    ],
    ids=["architecture", "headless", "shape", "weights", "order"],
)
def test_adapter_of_another_base(make: Callable[[], nn.Module], message: str, adapter: Path) -> None:
    base = make()
    before = state(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, adapter)
    unchanged(base, before)


def test_second_adapter_of_another_base(adapter: Path, tmp_path: Path) -> None:
    get_peft_model(other_shape(), config()).save_pretrained(tmp_path / "other")
    base, inputs = ARCHITECTURES["llama"]()
    model = PeftModel.from_pretrained(base, adapter)
    expected, before = model(**inputs).logits, state(base)
    with pytest.raises(ValueError, match="load it onto its own base model"):
        model.load_adapter(tmp_path / "other", "two")
    unchanged(base, before)
    assert list(model.peft_config) == ["default"] and torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_that_was_fine_tuned_or_cast_is_known_again(dtype: torch.dtype, adapter: Path) -> None:
    base, inputs = ARCHITECTURES["llama"]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model = PeftModel.from_pretrained(base.to(dtype), adapter)
    assert model(**inputs).logits.isfinite().all()


def change(key: str, value: Callable[[Tensor], Tensor] | None) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        name = f"base_model.model.model.layers.1.mlp.prunepath.{key}"
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors.get(name, torch.zeros(1)))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("router.weight", None), r"file lacks .*layers.1.mlp.prunepath.router.weight; save the adapter again"),
        (change("permutation", None), r"file lacks .*prunepath.permutation"),
        (change("router.gain", lambda t: t), r"has an unknown .*prunepath.router.gain"),
        (change("router.weight", lambda t: t[:, :-1].contiguous()), r"router.weight has shape \(5, 31\) .* \(5, 32\)"),
        (change("permutation", torch.zeros_like), r"prunepath.permutation is no permutation"),
    ],
    ids=["no router", "no permutation", "unknown", "shape", "permutation"],
)
@pytest.mark.parametrize("first", [True, False], ids=["first adapter", "second adapter"])
def test_damaged_weights(damage: Callable[[dict[str, Tensor]], None], message: str, first: bool, adapter: Path) -> None:
    base, inputs = ARCHITECTURES["llama"]()
    model = None if first else get_peft_model(base, config(), adapter_name="one")
    before = state(base)
    tensors = load_file(adapter / WEIGHTS)
    damage(tensors)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, adapter) if model is None else model.load_adapter(adapter, "two")
    if model is not None:
        unchanged(base, before)
        assert list(model.peft_config) == ["one"]
        model(**inputs)
    else:
        before["trainable"] = [False] * len(before["trainable"])  # PEFT freezes the base before it reads weights
        unchanged(base, before)
