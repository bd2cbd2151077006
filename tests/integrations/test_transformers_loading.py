"""Sparse checkpoints as transformers saves and loads them: classes, devices, dtypes, cards, what was quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import byte_tokenizer, save_tiny_llama, tiny_llama
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from torch_prunepath import SparsifyConfig, densify, record_sparsity, set_sparsity, set_tau, sparse_layers, sparsify
from torch_prunepath.card import model_card, write_card
from torch_prunepath.commands import sparsify as work
from torch_prunepath.commands.options import SparsifyOptions

CONFIG = SparsifyConfig(expert_size=8, partition="kmeans", router="centroid", budget="uniform")
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
TAU = [0.4, 0.7]


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(ids)[0]
    return found


def taus(model: nn.Module) -> list[Tensor]:
    return [layer.tau for layer in sparse_layers(model).values()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A sparse model with a tau of its own in each layer, and its folder."""
    folder = tmp_path_factory.mktemp("saved")
    model = sparsify(tiny_llama(), config=CONFIG, progress=False)
    set_tau(model, TAU)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel])
def test_from_pretrained_restores_a_sparse_model(saved: tuple[Any, Path], cls: Any) -> None:
    model, folder = saved
    again = cls.from_pretrained(folder)
    expected = model if cls is AutoModelForCausalLM else model.model
    assert torch.equal(logits(again), logits(expected))
    assert taus(again) == taus(model) and len(taus(again)) == 2


SPREAD = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, SPREAD], ids=["cpu", "auto", "whole", "disk"])
def test_device_map(saved: tuple[Any, Path], device_map: Any, tmp_path: Path) -> None:
    model, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits(again), logits(model)) and taus(again) == taus(model)
    offloaded = "model.layers.1" in SPREAD and device_map is SPREAD
    assert again.model.layers[1].mlp.up_proj.weight.is_meta == offloaded
    set_tau(again, 1.0)
    torch.testing.assert_close(logits(again), logits(tiny_llama()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto"], ids=str)
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype(saved: tuple[Any, Path], name: str, dtype: Any) -> None:
    model, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder, **{name: dtype})
    wanted = {"auto": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert {p.dtype for p in again.parameters()} == {wanted}
    assert {tau.dtype for tau in taus(again)} == {torch.float32} and taus(again) == taus(model)
    assert logits(again).dtype == wanted


def test_half_and_to_keep_tau_of_a_loaded_model_exact(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder)
    for move in (again.half, lambda: again.to(torch.bfloat16), lambda: again.to("cpu", torch.float64), again.float):
        move()
        assert {tau.dtype for tau in taus(again)} == {torch.float32} and taus(again) == taus(model)
    again.half().save_pretrained(tmp_path)
    assert taus(AutoModelForCausalLM.from_pretrained(tmp_path)) == taus(model)


# --- quantised weights ------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """As weight-only int8 methods keep a linear layer: integers, and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


def quantise(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Int8Linear(getattr(layer.mlp, name)))
    return model


def test_quantised_bases_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Int8Linear without a weight parameter: quantised or computed weights"):
        sparsify(quantise(tiny_llama()), config=CONFIG, progress=False)
    marked = tiny_llama()
    marked.is_quantized = True
    with pytest.raises(ValueError, match="the model is quantised: make it sparse before quantising"):
        sparsify(marked, config=CONFIG, progress=False)
    marked = tiny_llama()
    marked.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="carries a quantization_config: make it sparse before quantising"):
        sparsify(marked, config=CONFIG, progress=False)


def test_a_quantisation_asked_for_while_loading_is_refused(saved: tuple[Any, Path]) -> None:
    with pytest.raises(ValueError, match="quantized with PrunePathQuantizationConfig but you are passing a Bits"):
        AutoModelForCausalLM.from_pretrained(saved[1], quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_sparse_model_can_be_quantised_afterwards() -> None:
    model = sparsify(tiny_llama(), 0.5, config=CONFIG, progress=False)
    expected = logits(model)
    quantise(model)
    assert float((logits(model) - expected).norm() / expected.norm()) < 0.1
    found = set_sparsity(model, 0.5, IDS, progress=False)
    assert 0 < found < 1
    with record_sparsity(model) as record:
        logits(model)
    assert record.sparsity == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match=r"up_proj of model.layers.0.mlp was replaced since"):
        densify(model)
    assert len(sparse_layers(model)) == 2


# --- files ------------------------------------------------------------------------------------------------------------


def test_shape_of_files(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """What goes to the hub: nothing that it does not know."""
    assert {file.name for file in saved[1].iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    saved[0].save_pretrained(tmp_path, max_shard_size="20KB")
    names = {file.name for file in tmp_path.iterdir()}
    shards = {name for name in names if name.startswith("model-0000")}
    assert len(shards) > 2
    assert names - shards == {"config.json", "generation_config.json", "model.safetensors.index.json"}


def test_model_card(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = saved
    with record_sparsity(model) as record:
        logits(model)
    card = model_card(model, base_model="some/base", record=record, measured={"perplexity": "12.5"})
    assert card.startswith(
        "---\nlibrary_name: transformers\nbase_model: some/base\ntags:\n- prunepath\n- sparse\n---\n"
    )
    assert f"| inactive FFN neurons | {record.sparsity:.1%} |" in card and "| perplexity | 12.5 |" in card
    rows = [line for line in card.splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{name}` | 64 | 8 of 8 | {tau:g} | {record.per_layer[name]:.1%} |"
        for name, tau in zip(sparse_layers(model), TAU, strict=True)
    ]
    assert "sparsity |" not in model_card(model) and "base_model" not in model_card(model)
    with pytest.raises(ValueError, match="no sparse FFN"):
        model_card(tiny_llama())


def test_a_card_of_one_s_own_stays(saved: tuple[Any, Path], tmp_path: Path) -> None:
    assert write_card(saved[0], tmp_path)
    assert (tmp_path / "README.md").read_text() == model_card(saved[0])
    (tmp_path / "README.md").write_text("mine")
    assert not write_card(saved[0], tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_command_writes_a_card(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} times {i} is {i * i}." for i in range(800)))
    settings = {"expert_size": 8, "calibration_tokens": 256}
    base = save_tiny_llama(tmp_path / "base")
    options = SparsifyOptions(model=str(base), text=str(text), output=tmp_path / "out", tau=0.6, settings=settings)
    results = work.run(options)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| inactive FFN neurons | {results['sparsity']:.1%} |" in card
    assert f"| perplexity | {results['perplexity']:.2f} |" in card
    assert "base_model" not in card, "a folder is no name on the hub"
