"""PrunePath adapters through PEFT's own calls: what they compute, save, load, leave alone and give back."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, token_ids
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from torch_prunepath import (
    densify,
    fit_routers,
    load,
    record_sparsity,
    set_sparsity,
    set_tau,
    set_thresholds,
    sparse_layers,
    sparsify,
)
from torch_prunepath.config import SparsifyConfig
from torch_prunepath.integrations.peft import PrunePathConfig
from torch_prunepath.layer.hooks import after_call, before_call
from torch_prunepath.layer.views import sparse_views

STRUCTURES = ["llama", "gpt2", "opt", "bert", "phi3", "t5_gated", "modernbert"]


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def config(calibration: Any, **settings: Any) -> PrunePathConfig:
    return PrunePathConfig(**{"tau": 0.6, "calibration": calibration, "progress": False, **settings})


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT asks the hub for files that a folder lacks."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Where a dense model is saved, and inputs for it."""
    model, inputs = ARCHITECTURES["llama"]()
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base", inputs


def base_of(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("gate", ["one", "sigmoid"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_computes_what_a_sparse_model_computes(name: str, gate: str) -> None:
    """On the dense base, and merged bit for bit as ``sparsify`` makes it."""
    base, inputs = ARCHITECTURES[name]()
    expected, _ = ARCHITECTURES[name]()
    dense = output(base, inputs)
    sparsify(expected, 0.6, config=SparsifyConfig(gate=gate), calibration=inputs, progress=False)
    model = get_peft_model(base, config(inputs, gate=gate))
    sparse = output(model, inputs)
    close(sparse, output(expected, inputs))
    assert not torch.allclose(sparse, dense, rtol=1e-3, atol=1e-3)
    with record_sparsity(model) as mine, record_sparsity(expected) as theirs:
        output(model, inputs), output(expected, inputs)
    assert mine.sparsity == theirs.sparsity > 0.1
    merged = model.merge_and_unload()
    assert torch.equal(output(merged, inputs), output(expected, inputs))
    assert merged.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(output(densify(merged), inputs), dense)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_base_model_stays_as_it_was(name: str) -> None:
    base, inputs = ARCHITECTURES[name]()
    before = {key: (value.clone(), value.stride()) for key, value in base.state_dict().items()}
    dense, classes = output(base, inputs), [type(module) for module in base.modules()]
    model = get_peft_model(base, config(inputs))
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), dense)
    assert not torch.equal(output(model, inputs), dense)
    back = model.unload()
    assert back is base and [type(module) for module in base.modules()] == classes
    assert not any(module._forward_pre_hooks for module in base.modules())
    after = base.state_dict()
    assert after.keys() == before.keys()
    for key, (value, stride) in before.items():
        assert torch.equal(after[key], value) and after[key].stride() == stride, key
    assert torch.equal(output(base, inputs), dense)
    assert not hasattr(base, "peft_config") and getattr(base.config, "quantization_config", None) is None


def test_all_experts_give_the_dense_output_bit_for_bit() -> None:
    base, inputs = ARCHITECTURES["llama"]()
    dense = output(base, inputs)
    assert torch.equal(output(get_peft_model(base, config(inputs, tau=1.0)), inputs), dense)


@pytest.mark.parametrize("name", STRUCTURES)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    base, inputs = ARCHITECTURES[name]()
    own = {f"base_model.model.{key}" for key in base.state_dict()}
    model = get_peft_model(base, config(inputs))
    taus = [0.3 + 0.05 * i for i in range(len(sparse_layers(model)))]
    set_tau(model, taus)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not tensors.keys() & own, "nothing of the base model"
    assert {key.partition(".prunepath")[2].partition(".")[2] for key in tensors} == {
        "router.weight", "router.bias", "permutation", "tau"
    }  # fmt: skip
    again = PeftModel.from_pretrained(ARCHITECTURES[name]()[0], tmp_path)
    assert torch.equal(output(again, inputs), expected)
    assert [float(layer.tau) for layer in sparse_layers(again).values()] == pytest.approx(taus)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "PRUNEPATH" and "calibration" not in saved
    assert [part["tau"] for part in saved["manifest"]["layers"]] == pytest.approx(taus)
    assert not any(p.requires_grad for p in again.parameters()), "is_trainable=False is PEFT's default"
    trainable = PeftModel.from_pretrained(ARCHITECTURES[name]()[0], tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, _ in trainable.named_parameters() if ".router." in n
    }


def test_auto_class_and_low_memory(llama: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, inputs = llama
    model = get_peft_model(base_of(folder), config(inputs, task_type="CAUSAL_LM"))
    expected = output(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(output(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), inputs), expected)
    light = PeftModel.from_pretrained(base_of(folder), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(output(light, inputs), expected)


def test_in_another_process(llama: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, inputs = llama
    model = get_peft_model(base_of(folder), config(inputs, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    torch.save({"inputs": inputs, "logits": output(model, inputs)}, tmp_path / "expected.pt")
    code = f"""
import torch
import torch_prunepath.integrations.peft
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r}).eval()
expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_seen_without_the_import(
    llama: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, inputs = llama
    get_peft_model(base_of(folder), config(inputs)).save_pretrained(tmp_path / "adapter")
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "PRUNEPATH")
    with pytest.raises(KeyError, match=r"^'PRUNEPATH'$"):
        PeftModel.from_pretrained(base_of(folder), tmp_path / "adapter")


def test_several_adapters_with_permutations_of_their_own(llama: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, inputs = llama
    model = get_peft_model(base_of(folder), config(inputs, expert_size=4), adapter_name="one")
    first = output(model, inputs)
    model.add_adapter("two", config(token_ids(7), tau=0.4, gate="sigmoid", seed=1))
    assert torch.equal(output(model, inputs), first), "a new adapter is not active"
    model.set_adapter("two")
    second = output(model, inputs)
    layers = sparse_layers(model).values()
    assert {layer.experts.expert_size for layer in layers} == {8}
    assert any(not torch.equal(layer.adapters["one"].permutation, layer.permutation) for layer in layers)
    expected = base_of(folder)
    sparsify(expected, 0.4, config=SparsifyConfig(gate="sigmoid", seed=1), calibration=token_ids(7), progress=False)
    close(second, output(expected, inputs))
    set_tau(model, 0.9)
    model.set_adapter("one")
    assert torch.equal(output(model, inputs), first), "each has a tau of its own"
    set_tau(model, 0.2)
    model.set_adapter("two")
    assert not torch.equal(output(model, inputs), second)
    set_tau(model, 0.4)
    close(output(model, inputs), second)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(folder), tmp_path / "two", adapter_name="two")
    again.load_adapter(tmp_path / "one", "one")
    assert torch.equal(output(again, inputs), output(model, inputs))
    model.set_adapter("one"), again.set_adapter("one")
    assert torch.equal(output(again, inputs), output(model, inputs))


def test_only_the_active_adapter_trains() -> None:
    base, inputs = ARCHITECTURES["llama"]()
    model = get_peft_model(base, config(inputs), adapter_name="one")
    model.add_adapter("two", config(inputs))

    def trained() -> set[str]:
        return {n.partition(".adapters.")[2].partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}

    assert trained() == {"one"}
    model.set_adapter("two")
    assert trained() == {"two"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_deleting_adapters(name: str) -> None:
    base, inputs = ARCHITECTURES[name]()
    dense = output(base, inputs)
    model = get_peft_model(base, config(inputs), adapter_name="one")
    first = output(model, inputs)
    model.add_adapter("two", config(inputs, tau=0.3))
    model.delete_adapter("two")
    assert torch.equal(output(model, inputs), first) and list(model.peft_config) == ["one"]
    model.add_adapter("two", config(inputs, tau=0.3))
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("one")
    assert model.active_adapters == ["two"] and not torch.equal(output(model, inputs), first)
    model.delete_adapter("two")
    assert torch.equal(output(base, inputs), dense)
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_merged_adapter_by_name(llama: tuple[Path, dict[str, Any]]) -> None:
    folder, inputs = llama
    model = get_peft_model(base_of(folder), config(inputs), adapter_name="one")
    model.add_adapter("two", config(inputs, tau=0.3))
    first = output(model, inputs)
    model.set_adapter("two")
    close(output(model.merge_and_unload(adapter_names=["one"]), inputs), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_model_is_saved_in_our_own_format(
    llama: tuple[Path, dict[str, Any]], dtype: torch.dtype, tmp_path: Path
) -> None:
    folder, inputs = llama
    model = get_peft_model(base_of(folder, dtype=dtype), config(inputs))
    merged = model.merge_and_unload()
    expected = output(merged, inputs)
    merged.save_pretrained(tmp_path / "sparse")
    again = load(tmp_path / "sparse")
    assert torch.equal(output(again, inputs), expected) and again.dtype == dtype
    assert torch.equal(output(densify(merged), inputs), output(base_of(folder, dtype=dtype), inputs))


def test_routers_stay_in_float32_over_a_bfloat16_base(llama: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, inputs = llama
    model = get_peft_model(base_of(folder, dtype=torch.bfloat16), config(inputs, tau=0.61))
    assert {p.dtype for n, p in model.named_parameters() if ".router." in n} == {torch.float32}
    expected = output(model, inputs)
    assert expected.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(folder, dtype=torch.bfloat16), tmp_path)
    assert torch.equal(output(again, inputs), expected)
    tau = [float(layer.tau) for layer in sparse_layers(model).values()]
    model.to(torch.bfloat16)
    assert [float(layer.tau) for layer in sparse_layers(model).values()] == tau, "tau keeps its float32 value"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_copied_and_pickled(name: str) -> None:
    base, inputs = ARCHITECTURES[name]()
    model = get_peft_model(base, config(inputs))
    expected = output(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other, inputs), expected)
        set_tau(other, 1.0)
        assert not torch.equal(output(other, inputs), expected)
    assert torch.equal(output(model, inputs), expected)


def test_a_config_serves_several_models() -> None:
    shared = config(token_ids())
    first, inputs = ARCHITECTURES["llama"]()
    second, _ = ARCHITECTURES["gpt2"]()
    for base in (first, second):
        expected = output(get_peft_model(copy.deepcopy(base), config(token_ids())), inputs)
        assert torch.equal(output(get_peft_model(base, shared), inputs), expected)
    assert shared.manifest is None and torch.equal(shared.calibration, token_ids())


def test_the_library_s_own_tools_work_on_adapters(llama: tuple[Path, dict[str, Any]]) -> None:
    folder, inputs = llama
    model = get_peft_model(base_of(folder), config(inputs, expert_size=4, task_type="CAUSAL_LM"))
    set_sparsity(model, 0.4, [token_ids(1), token_ids(2)], tolerance=0.03, progress=False)
    with record_sparsity(model) as record:
        output(model, {"input_ids": torch.cat([token_ids(1), token_ids(2)])})
    assert record.sparsity == pytest.approx(0.4, abs=0.05)
    expected = base_of(folder)
    sparsify(expected, 0.6, config=SparsifyConfig(expert_size=4), calibration=inputs, progress=False)
    for sparse in (model, expected):
        fit_routers(sparse, [token_ids(5)], progress=False)
    for mine, theirs in zip(sparse_layers(model).values(), sparse_layers(expected).values(), strict=True):
        close(mine.router.weight, theirs.router.weight)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_hooks_reach_what_runs(name: str) -> None:
    """Layers of adapters, and their views of projections, are never called themselves."""
    base, inputs = ARCHITECTURES[name]()
    model = get_peft_model(base, config(token_ids()))
    (site, layer), *_ = sparse_layers(model).items()
    view, widths = sparse_views(model)[site], {}
    for key, module in {"layer": layer, "up": view.up, "down": view.down}.items():
        for way, before, after in (
            ("torch", type(module).register_forward_pre_hook, type(module).register_forward_hook),
            ("ours", before_call, after_call),
        ):
            before(module, lambda _, args, *more, k=f"{way} {key} in": widths.__setitem__(k, args[0].shape[-1]))
            after(module, lambda _, args, y, k=f"{way} {key} out": widths.__setitem__(k, y.shape[-1]))
    output(model, inputs)
    hidden, neurons = layer.ffn.hidden_size, layer.ffn.ffn_size
    ends = {"layer": (hidden, hidden), "up": (hidden, neurons), "down": (neurons, hidden)}
    expected = {
        f"{key} {end}": width for key, pair in ends.items() for end, width in zip(("in", "out"), pair, strict=True)
    }
    assert widths == {f"{way} {key}": width for way in ("torch", "ours") for key, width in expected.items()}


def test_without_data_the_model_writes_its_own_text(llama: tuple[Path, dict[str, Any]]) -> None:
    folder, inputs = llama
    settings = {"calibration_tokens": 64, "budget": "uniform"}
    model = get_peft_model(base_of(folder), config(None, **settings))
    expected = base_of(folder)
    sparsify(expected, 0.6, config=SparsifyConfig(**settings), progress=False)
    close(output(model, inputs), output(expected, inputs))


def test_generation_and_left_padding(llama: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = llama
    model = get_peft_model(base_of(folder), config(token_ids(), task_type="CAUSAL_LM")).eval()
    prompt = token_ids()[:1]
    alone = model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False)
    padding = torch.zeros(1, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([padding, prompt], 1),
        "attention_mask": torch.cat([padding, torch.ones_like(prompt)], 1),
    }
    assert torch.equal(model.generate(**padded, max_new_tokens=5, do_sample=False)[:, 3:], alone)


def test_compiled() -> None:
    base, inputs = ARCHITECTURES["llama"]()
    model = get_peft_model(base, config(inputs)).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**inputs)[0], model(**inputs)[0])
        set_tau(model, 0.3)
        assert torch.equal(compiled(**inputs)[0], model(**inputs)[0])


def test_status_is_what_peft_expects() -> None:
    base, inputs = ARCHITECTURES["bert"]()
    model = get_peft_model(base, config(inputs))
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["default"], ["default"])
    assert status.peft_types == {"default": "PRUNEPATH"} and status.requires_grad == {"default": True}
    trained, total = model.get_nb_trainable_parameters()
    assert trained == sum(
        layer.router.weight.numel() + layer.router.bias.numel() for layer in model.base_model.layers()
    )
    assert trained < total


def test_an_adapter_has_every_setting_of_a_sparse_model() -> None:
    settings = {field.name: field.default for field in dataclasses.fields(SparsifyConfig)}
    assert settings.items() <= vars(PrunePathConfig()).items()
    assert PrunePathConfig(expert_size=3, seed=5).sparsify_config() == SparsifyConfig(expert_size=3, seed=5)
    assert typing.get_type_hints(PrunePathConfig).items() >= typing.get_type_hints(SparsifyConfig).items()


# --- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["one", "sigmoid"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "phi3"])
def test_thresholds_are_those_of_a_sparse_model(name: str, gate: str) -> None:
    base, inputs = ARCHITECTURES[name]()
    expected, _ = ARCHITECTURES[name]()
    sparsify(expected, 0.6, config=SparsifyConfig(gate=gate), calibration=inputs, progress=False)
    model = get_peft_model(base, config(inputs, gate=gate))
    before = output(model, inputs)
    set_thresholds(model, inputs=0.0, neurons=0.0)
    assert torch.equal(output(model, inputs), before)
    for one in (model, expected):
        set_thresholds(one, inputs=0.4137, neurons=0.1193)
    close(output(model, inputs), output(expected, inputs))
    assert not torch.allclose(output(model, inputs), before, rtol=1e-3, atol=1e-3)
    with record_sparsity(model) as mine, record_sparsity(expected) as theirs:
        output(model, inputs), output(expected, inputs)
    assert mine.shares == pytest.approx(theirs.shares) and mine.shares.inputs < 1 and mine.shares.neurons < 1
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), output(ARCHITECTURES[name]()[0], inputs))
    merged = model.merge_and_unload()
    assert torch.equal(output(merged, inputs), output(expected, inputs))


def test_each_adapter_has_its_own_thresholds() -> None:
    base, inputs = ARCHITECTURES["llama"]()
    model = get_peft_model(base, config(inputs))
    model.add_adapter("other", config(inputs, tau=0.9))
    first = output(model, inputs)
    model.set_adapter("other")
    second = output(model, inputs)
    set_thresholds(model, inputs=0.5, neurons=0.2)
    assert not torch.allclose(output(model, inputs), second, rtol=1e-3, atol=1e-3)
    thetas = [float(layer.theta_x) for layer in sparse_layers(model).values()]
    assert set(thetas) == {0.5} and model.half() is model
    assert [layer.column_norm_D.dtype for layer in sparse_layers(model).values()] == [torch.float32] * len(thetas)
    model.float().set_adapter("default")
    assert not any(layer.has_norms for layer in sparse_layers(model).values())
    torch.testing.assert_close(output(model, inputs), first, rtol=1e-2, atol=1e-2)


def test_an_adapter_is_saved_with_its_thresholds(llama: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, inputs = llama
    model = get_peft_model(base_of(folder), config(inputs))
    set_thresholds(model, inputs=0.4137, neurons=[0.1193, 0.0])
    expected = output(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base_of(folder), tmp_path / "adapter")
    assert torch.equal(output(again, inputs), expected)
    thetas = [(float(layer.theta_x), float(layer.theta_h)) for layer in sparse_layers(again).values()]
    assert thetas == [(float(layer.theta_x), float(layer.theta_h)) for layer in sparse_layers(model).values()]
    close(output(again.merge_and_unload(), inputs), expected)
