"""The models that are timed: sizes of well-known models by name, or a model's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch_prunepath.console.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model whose weights will be random.

    Attributes:
        name: name of the model.
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
        """Whether the FFNs are plain, with biases and ``gelu_tanh``; otherwise they are gated with ``silu``."""
        return self.family == "gpt2"

    @property
    def activation(self) -> str:
        """Name of the activation function, a key of ``ACTIVATIONS``."""
        return "gelu_tanh" if self.plain else "silu"

    def config(self, layers: int | None = None) -> Any:
        """Build the transformers configuration, with ``layers`` layers if that is given."""
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
"""Sizes of known models by name, as their publishers give them."""


def resolve(name: str) -> Geometry | Path:
    """Return the geometry called ``name``, or the path of the model's folder with that name.

    Raises:
        UserError: if there is neither.
    """
    if name in GEOMETRIES:
        return GEOMETRIES[name]
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if os.path.isfile(name):
        raise UserError(f"{name} is a file: name its folder, {Path(name).parent}")
    raise UserError(
        f"{name!r} is neither a geometry nor a model's folder with a config.json: choose one of {', '.join(GEOMETRIES)}"
    )
