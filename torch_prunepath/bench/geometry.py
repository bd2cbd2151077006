"""What is timed: well-known models' sizes by name, or a model's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch_prunepath.console.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model; its weights will be random.

    Attributes:
        name: what people call it.
        family: ``model_type`` of transformers: ``"gpt2"``, ``"llama"`` or ``"qwen2"``.
        hidden_size: D.
        ffn_size: F.
        layers: decoder layers.
        heads: attention heads.
        kv_heads: key-value heads.
        vocab_size: tokens of the vocabulary.
        tied: whether input and output embeddings are one weight.
        positions: longest context.
    """

    name: str
    family: str
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    tied: bool
    positions: int

    @property
    def plain(self) -> bool:
        """Whether its FFNs are plain, with biases and ``gelu_tanh``, rather than gated with ``silu``."""
        return self.family == "gpt2"

    @property
    def activation(self) -> str:
        """Key of ``ACTIVATIONS``."""
        return "gelu_tanh" if self.plain else "silu"

    def config(self, layers: int | None = None) -> Any:
        """The transformers configuration, with another number of layers if wanted."""
        from transformers import AutoConfig

        layers = self.layers if layers is None else layers
        if self.plain:
            return AutoConfig.for_model(
                "gpt2",
                n_embd=self.hidden_size,
                n_inner=self.ffn_size,
                n_layer=layers,
                n_head=self.heads,
                n_positions=self.positions,
                vocab_size=self.vocab_size,
                tie_word_embeddings=self.tied,
            )
        return AutoConfig.for_model(
            self.family,
            hidden_size=self.hidden_size,
            intermediate_size=self.ffn_size,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden_size // self.heads,
            max_position_embeddings=self.positions,
            vocab_size=self.vocab_size,
            tie_word_embeddings=self.tied,
        )


GEOMETRIES: Mapping[str, Geometry] = MappingProxyType(
    {
        geometry.name: geometry
        for geometry in (
            Geometry("gpt2-medium", "gpt2", 1024, 4096, 24, 16, 16, 50257, True, 1024),
            Geometry("smollm2-135m", "llama", 576, 1536, 30, 9, 3, 49152, True, 8192),
            Geometry("qwen2-0.5b", "qwen2", 896, 4864, 24, 14, 2, 151936, True, 32768),
            Geometry("llama-3.2-1b", "llama", 2048, 8192, 16, 32, 8, 128256, True, 131072),
            Geometry("qwen2-7b", "qwen2", 3584, 18944, 28, 28, 4, 152064, False, 32768),
            Geometry("llama-3-8b", "llama", 4096, 14336, 32, 32, 8, 128256, False, 8192),
        )
    }
)
"""Sizes as the models' publishers give them."""


def resolve(name: str) -> Geometry | Path:
    """The geometry called ``name``, or the model's folder that it names.

    Raises:
        UserError: if it is neither.
    """
    if name in GEOMETRIES:
        return GEOMETRIES[name]
    if (Path(name) / "config.json").is_file():
        return Path(name)
    raise UserError(
        f"{name!r} is neither a geometry nor a model's folder with a config.json: choose one of {', '.join(GEOMETRIES)}"
    )
