"""Which FFNs are made sparse, what is said of the others, and dropouts that are calls."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import token_ids
from tiny_llama import tiny_llama
from torch.nn.utils import prune

from torch_prunepath import SparsifyConfig, baselines, densify, find_ffns, set_tau, sparse_layers, sparsify
from torch_prunepath.train import TrainConfig

LOGGER = "torch_prunepath.conversion"
PLAIN = SparsifyConfig(partition="contiguous", router="zero", budget="uniform")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llava() -> Any:
    vision = hf.CLIPVisionConfig(**SMALL, image_size=16, patch_size=8)
    text = hf.LlamaConfig(**SMALL, vocab_size=128)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=120)
    ).eval()


def gemma() -> Any:
    vision = hf.SiglipVisionConfig(**SMALL, image_size=16, patch_size=8)
    text = hf.Gemma3TextConfig(**SMALL, vocab_size=128, head_dim=8, num_key_value_heads=2)
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 120, "boi_token_index": 121, "eoi_token_index": 122}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=vision, **tokens)).eval()


@pytest.mark.parametrize(
    ("make", "exclude"), [(llava, ["vision_tower", "multi_modal_projector"]), (gemma, "vision_tower")]
)
def test_text_calibrates_a_model_without_its_vision_tower(make: Any, exclude: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = make(), torch.randint(3, 119, (8, 32))
    with pytest.raises(ValueError, match=r"does not reach . of 5 FFNs.*leave such FFNs dense \(exclude='model"):
        sparsify(model, calibration=ids, progress=False)
    sparsify(model, tau=0.5, calibration=ids, exclude=exclude, progress=False)
    assert list(sparse_layers(model)) == [f"model.language_model.layers.{i}.mlp" for i in range(2)]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert list(sparse_layers(again)) == list(sparse_layers(model))


def test_a_refused_choice_changes_nothing() -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="means no FFN of this model"):
        sparsify(model, exclude="vision_tower", progress=False)
    assert not any("Sparse" in type(module).__name__ for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_was_not_converted_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.3)
    with caplog.at_level(logging.INFO, LOGGER):
        sparsify(model, config=PLAIN, progress=False)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith("1 of 2 FFNs were not converted: model.layers.0.mlp (up_proj is a Linear without")
    assert "prune.remove" in record.message and list(sparse_layers(model)) == ["model.layers.1.mlp"]


def test_what_was_left_out_as_asked_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        sparsify(tiny_llama(), config=PLAIN, exclude="layers.0", progress=False)
    (record,) = caplog.records
    assert (record.levelno, record.message) == (
        logging.INFO,
        "1 of 2 FFNs were left out as asked: model.layers.0.mlp",
    )


def test_a_whole_conversion_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        sparsify(tiny_llama(), config=PLAIN, progress=False)
    assert not caplog.records


def test_routed_experts_are_one_entry(caplog: pytest.LogCaptureFixture) -> None:
    experts = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
    model = hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SMALL, num_key_value_heads=2, vocab_size=64, **experts)).eval()
    sparsify(model, config=PLAIN, progress=False)
    (record,) = caplog.records
    assert record.message.startswith("2 of 4 FFNs were not converted: model.layers.0.mlp.experts, model.layers.1.mlp")


@pytest.mark.parametrize(
    "make",
    [
        lambda model, **choice: baselines.cats(model, 0.5, **choice),
        lambda model, **choice: baselines.teal(model, 0.5, allocation="uniform", **choice),
        lambda model, **choice: baselines.prune(model, 0.5, **choice),
        lambda model, **choice: baselines.moefication(model, router="centroid", **choice),
        lambda model, **choice: baselines.lte(model, **choice),
    ],
    ids=["cats", "teal", "prune", "moefication", "lte"],
)
def test_baselines_take_a_choice(make: Any) -> None:
    """Layer 0 computes what it did."""
    model, x = tiny_llama(), torch.randn(5, 32)
    with torch.no_grad():
        kept, changed = (layer.mlp(x) for layer in model.model.layers)
        make(model, exclude="layers.0", progress=False)
        assert torch.equal(model.model.layers[0].mlp(x), kept)
        assert not torch.equal(model.model.layers[1].mlp(x), changed)


def test_dense_training_with_a_choice() -> None:
    model = tiny_llama()
    batches = [{"input_ids": token_ids()[:, :16], "labels": token_ids()[:, :16]}]
    baselines.train_dense(model, batches, TrainConfig(steps=1), include="layers.1", progress=False)
    assert len(find_ffns(model)) == 2


# --- set_tau ----------------------------------------------------------------------------------------------------------


def test_tau_as_an_array() -> None:
    model = sparsify(tiny_llama(), config=PLAIN, progress=False)
    for taus in (torch.tensor([0.25, 0.5]), torch.tensor([0.25, 0.5]).numpy(), (0.25, 0.5)):
        set_tau(model, 1.0)
        set_tau(model, taus)
        assert [float(layer.tau) for layer in sparse_layers(model).values()] == [0.25, 0.5]
    set_tau(model, torch.tensor(0.75))
    assert [float(layer.tau) for layer in sparse_layers(model).values()] == [0.75, 0.75]


@pytest.mark.parametrize("tau", [None, "0.5", "ab", b"ab", [0.5, "x"], [0.5, None], {"model.layers.0.mlp": "a"}, {0.5}])
def test_tau_that_is_no_number(tau: Any) -> None:
    model = sparsify(tiny_llama(), tau=0.5, config=PLAIN, progress=False)
    with pytest.raises(TypeError, match=r"tau=.* is no number: give one such as 0\.9"):
        set_tau(model, tau)
    assert [float(layer.tau) for layer in sparse_layers(model).values()] == [0.5, 0.5]
    with pytest.raises(TypeError, match="is no number"):
        sparsify(tiny_llama(), tau=None, progress=False)  # type: ignore[arg-type]


# --- dropouts that are calls ------------------------------------------------------------------------------------------


def seed_oss(dropout: float) -> Any:
    torch.manual_seed(0)
    config = hf.SeedOssConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, vocab_size=128, attention_dropout=0.0, residual_dropout=dropout
    )
    return hf.SeedOssForCausalLM(config).eval()


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
def test_dropout_on_the_output_that_is_a_call_is_kept(dropout: float, tmp_path: Path) -> None:
    model, ids = seed_oss(dropout), torch.randint(3, 119, (4, 16))
    dense = copy.deepcopy(model)
    assert [spec.output_dropout for spec in find_ffns(model)] == [dropout or None] * 2
    sparsify(model, tau=1.0, calibration=ids, progress=False)
    for training in (False, True):
        outputs = []
        for each in (model, dense):
            torch.manual_seed(1)
            outputs.append(each.train(training)(input_ids=ids).logits)
        torch.testing.assert_close(*outputs)
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert [layer.ffn for layer in sparse_layers(again).values()] == [
        dataclasses.replace(layer.ffn) for layer in sparse_layers(model).values()
    ]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    densify(model)
    torch.testing.assert_close(model(input_ids=ids).logits, dense.eval()(input_ids=ids).logits, rtol=0, atol=0)
