"""What ``prunepath quickstart``, ``sparsify`` and ``info`` take. Nothing heavy is imported here, so help is quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch_prunepath.commands.points import Point, at_bytes, at_taus
from torch_prunepath.config import SparsifyConfig, check_bytes, check_sparsity, check_tau
from torch_prunepath.console.options import option, settings

TAUS = (0.97, 0.95, 0.9, 0.8, 0.7)
"""Thresholds from nearly dense to where quality without training is visibly worse, on SmolLM2-135M."""

SETTINGS = "settings of torch_prunepath.SparsifyConfig"


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """Sparsify a small model; measure quality and speed; save and reload it.

    Attributes:
        model: name or folder of a causal language model (default: SmolLM2-135M-Instruct).
        text: UTF-8 text to fit and measure on (default: Python's help topics).
        output: folder to write.
        taus: thresholds to measure; the checkpoint keeps the middle one.
        shares: shares of the FFNs' bytes to measure in place of taus, such as 0.7 0.5 (set_budget); the checkpoint
            keeps the middle one.
        include: names or patterns of the FFNs to make sparse, such as 'layers.*.mlp' (default: all).
        exclude: names or patterns of FFNs to leave dense, such as 'model.layers.0.*' or vision_tower.
        seed: seed of everything random (default: 0).

    Raises:
        ValueError: if a threshold or a share is not in (0, 1].
    """

    model: str | None = None
    text: str | None = option(default=None, metavar="FILE")
    output: Path = option("-o", "--output", default=Path("prunepath-quickstart"))
    taus: Sequence[float] = option("--tau", default=TAUS, one_of="points")
    shares: Sequence[float] | None = option("--bytes", default=None, one_of="points", metavar="SHARE")
    include: Sequence[str] | None = option(default=None, action="extend", metavar="PATTERN")
    exclude: Sequence[str] | None = option(default=None, action="extend", metavar="PATTERN")
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.points

    @cached_property
    def points(self) -> list[Point]:
        """Where to measure, from dense to sparse, once each."""
        return at_taus(self.taus) if self.shares is None else at_bytes(self.shares)


@dataclass(frozen=True, kw_only=True)
class SparsifyOptions:
    """Sparsify a causal language model and save the checkpoint.

    Attributes:
        model: name or folder of a causal language model, or a GGUF file.
        output: folder to write; must not exist, or be empty.
        tau: threshold in (0, 1].
        sparsity: find the tau that reaches this inactive share of neurons.
        bytes: find each layer's tau and thresholds so that a token reads this share of the FFNs' bytes (set_budget).
        text: UTF-8 text to fit and measure on (default: Python's help topics).
        include: names or patterns of the FFNs to make sparse, such as 'layers.*.mlp' (default: all).
        exclude: names or patterns of FFNs to leave dense, such as 'model.layers.0.*' or vision_tower.
        settings: fields of :class:`torch_prunepath.SparsifyConfig` that were given.

    Raises:
        ValueError: if a value is not allowed, or two exclude each other.
    """

    model: str = option(positional=True, metavar="MODEL")
    output: Path = option("-o", "--output")
    tau: float = option(default=0.9, one_of="knob")
    sparsity: float | None = option(default=None, one_of="knob")
    bytes: float | None = option(default=None, one_of="knob", metavar="SHARE")
    text: str | None = option(default=None, metavar="FILE")
    include: Sequence[str] | None = option(default=None, action="extend", metavar="PATTERN")
    exclude: Sequence[str] | None = option(default=None, action="extend", metavar="PATTERN")
    settings: Mapping[str, Any] = settings(SparsifyConfig, SETTINGS)

    def __post_init__(self) -> None:
        check_tau(self.tau)
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if self.bytes is not None:
            check_bytes(self.bytes)
            if self.sparsity is not None:
                raise ValueError("sparsity and bytes are both given: give only one of them")
        assert self.config

    @cached_property
    def config(self) -> SparsifyConfig:
        """How experts and routers are built."""
        return SparsifyConfig(**self.settings)


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Describe a sparse checkpoint without loading its weights.

    Attributes:
        folder: a folder that save_pretrained wrote.
    """

    folder: Path = option(positional=True, metavar="DIR")
