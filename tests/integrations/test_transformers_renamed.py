"""Classes whose keys transformers renames when it saves and when it loads: what was saved is loaded, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

from torch_prunepath import densify, load, sparse_layers, sparsify

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {"image_size": 16, "patch_size": 4}
IMAGE = 120
"""The token whose places an image's features take."""

Made = tuple[nn.Module, dict[str, Any]]


def picture_and_text() -> dict[str, Any]:
    ids = torch.randint(3, 119, (2, 12))
    ids[:, 1:5] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def vit() -> Made:
    return ViTForImageClassification(ViTConfig(**SMALL, **PATCHES)), {"pixel_values": torch.randn(8, 3, 16, 16)}


def dino() -> Made:
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **PATCHES)
    return Dinov2Model(config), {"pixel_values": torch.randn(8, 3, 16, 16)}


def llava() -> Made:
    """Reads the last vision layer but one, so that nothing depends on the last one's output."""
    vision = CLIPVisionConfig(**SMALL, image_size=16, patch_size=8)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SMALL, vocab_size=128), image_token_index=IMAGE
    )
    return LlavaForConditionalGeneration(config), picture_and_text()


def gemma3() -> Made:
    text = Gemma3TextConfig(**SMALL, vocab_size=128, head_dim=8, num_key_value_heads=2)
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**SMALL, **PATCHES),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=121,
        eoi_token_index=122,
    )
    inputs = picture_and_text()
    return Gemma3ForConditionalGeneration(config), {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def mistral3() -> Made:
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**SMALL, **PATCHES, head_dim=8),
        text_config=MistralConfig(**SMALL, vocab_size=128, num_key_value_heads=2, head_dim=8),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return Mistral3ForConditionalGeneration(config), {**picture_and_text(), "image_sizes": torch.tensor([[16, 16]] * 2)}


MODELS = (vit, dino, llava, gemma3, mistral3)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_what_was_saved_is_loaded(make: Callable[[], Made], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    with torch.no_grad():
        dense = model(**inputs)[0]
    sparsify(model, tau=0.5, calibration=inputs, progress=False)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs)[0]
    assert not torch.equal(expected, dense)
    for again in (type(model).from_pretrained(tmp_path), load(tmp_path)):
        again.eval()
        assert list(sparse_layers(again)) == list(sparse_layers(model))
        with torch.no_grad():
            assert torch.equal(again(**inputs)[0], expected)
    densify(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], dense)


@pytest.mark.parametrize("lost", ["router.weight", "permutation"])
def test_a_lost_tensor_is_missed_under_any_name(lost: str, tmp_path: Path) -> None:
    model, inputs = vit()
    sparsify(model, calibration=inputs, progress=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (name, *_) = [key for key in tensors if key.endswith(lost)]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged checkpoint: .* is missing from the weights"):
        ViTForImageClassification.from_pretrained(tmp_path)
