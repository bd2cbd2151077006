"""Tiny models of classes whose keys transformers renames when it saves them, most with a vision tower.

A builder returns ``(model, inputs)``: random weights, and keyword arguments for its ``forward``.
"""

from __future__ import annotations

from typing import Any

import torch
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
    NemotronHConfig,
    NemotronHForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {"image_size": 16, "patch_size": 4}
IMAGE = 120
"""The token whose places an image's features take."""

ROTATED = {
    "vocab_size": 128,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}
MERGED = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
MARKS = {"image_token_id": IMAGE, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}

Made = tuple[nn.Module, dict[str, Any]]


def picture_and_text() -> dict[str, Any]:
    ids = torch.randint(3, 119, (2, 12))
    ids[:, 1:5] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def patches_and_text() -> dict[str, Any]:
    """Two images of 16 patches each, of which four make a token."""
    inputs = picture_and_text()
    del inputs["pixel_values"]
    patches = {"pixel_values": torch.randn(2 * 16, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return {**inputs, **patches, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


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


def qwen2_vl() -> Made:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config={**SMALL, **ROTATED}, vision_config={**vision, **MERGED}, **MARKS)
    return Qwen2VLForConditionalGeneration(config), patches_and_text()


def qwen3_vl() -> Made:
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    deep = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {**SMALL, **ROTATED, "head_dim": 8}
    config = Qwen3VLConfig(text_config=text, vision_config={**vision, **MERGED, **deep}, **MARKS)
    return Qwen3VLForConditionalGeneration(config), patches_and_text()


def paligemma() -> Made:
    tower = {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 32}
    text = {"model_type": "gemma", "vocab_size": 128, "num_key_value_heads": 2, "head_dim": 8}
    config = PaliGemmaConfig(
        vision_config={**SMALL, **tower, "vision_use_head": False},
        text_config={**SMALL, **text},
        image_token_index=IMAGE,
        projection_dim=32,
    )
    inputs = picture_and_text()
    return PaliGemmaForConditionalGeneration(config), {
        **inputs,
        "token_type_ids": (inputs["input_ids"] == IMAGE).long(),
    }


def nemotron_h() -> Made:
    """Some layers are attention, some state-space models, and the others FFNs alone."""
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    kinds = ["mamba", "mlp", "attention", "mlp"]
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64}
    config = NemotronHConfig(layers_block_type=kinds, **sizes, **mamba, **attention)
    return NemotronHForCausalLM(config), {"input_ids": torch.randint(3, 119, (2, 12))}


def wav2vec2() -> Made:
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(vocab_size=32, **SMALL, **convolutions, **positions)
    return Wav2Vec2ForCTC(config), {"input_values": torch.randn(2, 640)}
