"""Tiny models with random weights, one of each architecture that must work, by name.

A builder returns ``(model, inputs)``: a model in evaluation mode, the same weights at every call, and keyword arguments
for its ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

Builder = Callable[[], tuple[nn.Module, dict[str, Any]]]

VOCABULARY = 96
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Llama's relatives: grouped heads, and a width that is no multiple of 8.
DECODER = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 37, "max_position_embeddings": 256}
ENCODER = {**SMALL, "intermediate_size": 37, "max_position_embeddings": 256}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
OPT = {"ffn_dim": 37, "word_embed_proj_dim": 32, "max_position_embeddings": 256, "dropout": 0.1}


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Weights large enough that every FFN matters to the output, biases and norms other than 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(1 + 0.1 * noise)
    return model.eval()


def token_ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(seed))


def _tokens() -> dict[str, Any]:
    return {"input_ids": token_ids()}


def _two_texts() -> dict[str, Any]:
    return {"input_ids": token_ids(), "decoder_input_ids": token_ids(1)}


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def _sound() -> dict[str, Any]:
    features = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": token_ids(1)}


def _build(
    model_class: str, config_class: str, settings: dict[str, Any], inputs: Callable[[], dict[str, Any]] = _tokens
) -> tuple[nn.Module, dict[str, Any]]:
    config = getattr(hf, config_class)(**{**TOKENS, **settings})
    with torch.random.fork_rng(devices=[]):
        return randomise(getattr(hf, model_class)(config)), inputs()


def _entry(prefix: str, settings: dict[str, Any], task: str = "ForCausalLM", **options: Any) -> Builder:
    return partial(_build, f"{prefix}{task}", f"{prefix}Config", settings, **options)


ARCHITECTURES: dict[str, Builder] = {
    "llama": _entry("Llama", DECODER),
    "mistral": _entry("Mistral", DECODER),
    "qwen2": _entry("Qwen2", DECODER),
    "qwen3": _entry("Qwen3", {**DECODER, "head_dim": 8}),
    "smollm3": _entry("SmolLM3", DECODER),
    "gemma": _entry("Gemma", {**DECODER, "head_dim": 8}),
    "gemma2": _entry("Gemma2", {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": partial(_build, "Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "head_dim": 8}),
    "phi": _entry("Phi", {**DECODER, "partial_rotary_factor": 0.5}),
    "phi3": _entry("Phi3", DECODER),
    "gpt2": _entry("GPT2", {**GPT, "n_inner": 37}, "LMHeadModel"),
    "gpt_neox": _entry("GPTNeoX", {**ENCODER, "rotary_pct": 0.5}),
    "gptj": _entry("GPTJ", {**GPT, "n_inner": 41, "rotary_dim": 4}),
    "falcon": _entry("Falcon", {**SMALL, "ffn_hidden_size": 40, "bias": True}),
    "falcon_new": _entry(
        "Falcon", {**SMALL, "ffn_hidden_size": 40, "new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "bloom": _entry("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 20, "n_layer": 2, "n_head": 4}),
    "opt": _entry("OPT", {**SMALL, **OPT}),
    "opt_norm_after": _entry("OPT", {**SMALL, **OPT, "do_layer_norm_before": False}),
    "starcoder2": _entry("Starcoder2", DECODER),
    "starcoder2_dropout": _entry("Starcoder2", {**DECODER, "residual_dropout": 0.1}),
    "stablelm": _entry("StableLm", DECODER),
    "olmo2": _entry("Olmo2", DECODER),
    "granite": _entry("Granite", DECODER),
    "mpt": _entry("Mpt", {"vocab_size": VOCABULARY, "d_model": 20, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "t5": _entry("T5", {**T5, "feed_forward_proj": "relu"}, "ForConditionalGeneration", inputs=_two_texts),
    "t5_gated": _entry("T5", {**T5, "feed_forward_proj": "gated-gelu"}, "ForConditionalGeneration", inputs=_two_texts),
    "bert": _entry("Bert", ENCODER, "ForMaskedLM"),
    "roberta": _entry("Roberta", ENCODER, "ForMaskedLM"),
    "distilbert": _entry(
        "DistilBert",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 37, "n_layers": 2, "n_heads": 4},
        "ForMaskedLM",
    ),
    "modernbert": _entry(
        "ModernBert", {**ENCODER, "mlp_dropout": 0.1, "cls_token_id": 1, "sep_token_id": 2}, "ForMaskedLM"
    ),
    "albert": _entry("Albert", {**ENCODER, "embedding_size": 16, "num_hidden_layers": 3}, "ForMaskedLM"),
    "vit": _entry("ViT", {**ENCODER, "image_size": 8, "patch_size": 4}, "ForImageClassification", inputs=_image),
    "whisper": _entry(
        "Whisper",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "num_mel_bins": 8,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 37,
            "decoder_ffn_dim": 41,
            "max_source_positions": 12,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
        },
        "ForConditionalGeneration",
        inputs=_sound,
    ),
}

MOE = {**DECODER, "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2}

NOTHING_TO_FIND: dict[str, Builder] = {
    "mamba": _entry("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}),
    "mixtral": _entry("Mixtral", MOE),
}


class Gated(nn.Module):
    """``down(act(gate(x)) * up(x))``, with the factors in either order and the activation called as a function."""

    def __init__(self, hidden: int, width: int, gate_first: bool) -> None:
        super().__init__()
        self.wo = nn.Linear(width, hidden)
        self.wg = nn.Linear(hidden, width)
        self.wu = nn.Linear(hidden, width)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_first:
            return self.wo(F.silu(self.wg(x)) * self.wu(x))
        return self.wo(self.wu(x) * F.silu(self.wg(x)))


class FusedUpFirst(nn.Module):
    """One layer for both, of which the second half is the gate (GEGLU)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.wi = nn.Linear(hidden, 2 * width)
        self.drop = nn.Dropout(0.2)
        self.wo = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.wi(x).chunk(2, dim=-1)
        return self.drop(self.wo(self.drop(up * F.gelu(gate, approximate="tanh"))))


class Plain(nn.Module):
    """``fc2(act(fc1(x)))`` with an activation written out."""

    def __init__(self, hidden: int, width: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(hidden, width), nn.Linear(width, hidden, bias=False), act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Stack(nn.Module):
    """Residual blocks ``x + ffn(norm(x))``."""

    def __init__(self, *ffns: nn.Module) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(ffns)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, len(ffns))

    def forward(self, x: Tensor) -> Tensor:
        for ffn in self.ffns:
            x = x + ffn(self.norm(x))
        return self.head(x)


def _sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 37), nn.GELU(), nn.Dropout(0.1), nn.Linear(37, 16), nn.Dropout(0.2))


def _stack(*make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        model = randomise(Stack(*(build() for build in make)))
    return model, {"x": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))}


def written_out_quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def written_out_relu2(x: Tensor) -> Tensor:
    return x.clamp(min=0) ** 2


HAND_WRITTEN: dict[str, Builder] = {
    "sequential": partial(_stack, _sequential, _sequential),
    "functional_silu": partial(_stack, partial(Gated, 16, 37, True), partial(Gated, 16, 24, True)),
    "gate_second": partial(_stack, partial(Gated, 16, 37, False), partial(Gated, 16, 24, False)),
    "gated_square": partial(_stack, partial(Gated, 16, 16, True), partial(Gated, 16, 16, False)),
    "fused_up_first": partial(_stack, partial(FusedUpFirst, 16, 21), partial(FusedUpFirst, 16, 16)),
    "bottleneck": partial(_stack, partial(Plain, 16, 5, written_out_relu2), partial(Plain, 16, 3, written_out_relu2)),
    "plain_square": partial(_stack, partial(Plain, 16, 16, written_out_quick_gelu)),
}
