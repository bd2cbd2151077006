"""The options of ``prunepath bench``, checked before anything is loaded.

Nothing heavy is imported here, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from torch_prunepath.bench.geometry import resolve
from torch_prunepath.console.errors import UserError
from torch_prunepath.console.options import option

if TYPE_CHECKING:
    import torch

DTYPES: Mapping[str, str] = MappingProxyType({"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"})
"""Names of the dtypes in torch, by their names on the command line."""


@dataclass(frozen=True)
class Mode:
    """A way to make a function fast.

    Attributes:
        compile: mode of ``torch.compile``; None: the function is not compiled.
        capture: record a CUDA graph of the function.
        combo_kernels: let Inductor join small kernels that do not depend on each other.
    """

    compile: str | None
    capture: bool = False
    combo_kernels: bool = False


MODES: Mapping[str, Mode] = MappingProxyType(
    {
        "eager": Mode(None),
        "default": Mode("default"),
        "max-autotune": Mode("max-autotune"),
        "reduce-overhead": Mode("reduce-overhead"),
        "graph": Mode("default", capture=True),
        "graph-max-autotune": Mode("max-autotune-no-cudagraphs", capture=True),
        "graph-combo": Mode("default", capture=True, combo_kernels=True),
    }
)
"""The modes by name. Those with ``graph`` compile without Inductor's own CUDA graphs, and record the result in one
graph; CUDA only."""

DEFAULT_MODES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cpu": ("default",), "cuda": ("graph", "graph-combo", "reduce-overhead", "graph-max-autotune")}
)
"""Modes of the dense model that are tried by default, by device. The fastest is the baseline, so every mode that may be
the fastest is tried."""

DEFAULT_SPARSE_MODES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cpu": ("default",), "cuda": ("graph", "graph-combo")}
)
"""Modes of the sparse model that are tried by default, by device. On CUDA there are fewer than for the dense model; no
record says why."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The options that both benchmarks take.

    Attributes:
        geometries: known models' sizes by name, or models' folders.
        device: where to run.
        batches: tokens a call (ffn), or sequences decoded at once (decode).
        prompt_lengths: prompt lengths to read at once.
        sparsities: inactive shares of the neurons, in [0, 1).
        dtype: dtype of weights and activations.
        expert_size: neurons an expert, where the model does not have experts already.
        gate: weight of an active expert's output, where the model does not have experts already.
        layers: layers to rotate (ffn) or to build (decode); by default enough to exceed the caches, or all.
        seconds: how long to time each thing.
        seed: seed of everything random (default: 0).
        output: folder for results.json and the plot.

    Raises:
        ValueError: if anything does not fit, or there is no such device.
    """

    geometries: Sequence[str] = option("--geometry", metavar="NAME|DIR")
    device: Literal["cpu", "cuda"] = "cpu"
    batches: Sequence[int] = option("--batch", default=(1,), nargs="*")
    prompt_lengths: Sequence[int] = option("--prompt", default=(), nargs="*")
    sparsities: Sequence[float] = option("--sparsity", default=(0.5, 0.7, 0.8, 0.9, 0.95))
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    expert_size: int = 32
    gate: Literal["one", "sigmoid"] = "one"
    layers: int | None = None
    seconds: float = 1.0
    seed: int = 0
    output: Path | None = option("-o", "--output", default=None)

    def __post_init__(self) -> None:
        for name in self.geometries:
            resolve(name)
        if self.device == "cuda":
            _check_cuda()
        if not (self.batches or self.prompt_lengths) or not self.sparsities:
            raise UserError("nothing to time: give at least one --batch or --prompt, and one --sparsity")
        counts = {"--batch": self.batches, "--prompt": self.prompt_lengths, "--expert-size": [self.expert_size]}
        for name, values in (counts | {"--layers": [] if self.layers is None else [self.layers]}).items():
            if any(value < 1 for value in values):
                raise UserError(f"{name} takes whole numbers from 1")
        for sparsity in self.sparsities:
            if not 0.0 <= sparsity < 1.0:
                raise UserError(f"--sparsity {sparsity:g} is outside [0, 1): it is the inactive share of neurons")
        if not self.seconds > 0:
            raise UserError("--seconds takes a number above 0")

    @property
    def torch_device(self) -> torch.device:
        """The device as a torch object."""
        import torch

        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations as a torch object."""
        import torch

        found: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return found


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device: use --device cpu, or a torch build that fits the driver")


@dataclass(frozen=True, kw_only=True)
class FFNOptions(BenchOptions):
    """The options of ``prunepath bench ffn``, which times one FFN at a time, without help from the caches."""

    @property
    def tokens(self) -> list[int]:
        """Numbers of tokens a call, from batches and prompts together, sorted and without repetition."""
        return sorted({*self.batches, *self.prompt_lengths})


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(BenchOptions):
    """The options of ``prunepath bench decode``, which times a whole compiled model decoding from a static cache.

    Attributes:
        context: tokens in the cache when decoding starts.
        new_tokens: tokens decoded in a timed run.
        modes: dense modes, of which the best is the baseline, of eager, default, max-autotune, reduce-overhead and, on
            CUDA, graph, graph-combo, graph-max-autotune.
        sparse_modes: sparse modes, of which the best counts.
        backend: torch.compile's backend of the sparse model.
        num_prompts: also measure N prompts of different lengths one by one.
        include: names or patterns of the FFNs to make sparse, such as 'layers.*.mlp' (default: all).
        exclude: names or patterns of FFNs to leave dense, such as 'model.layers.0.*' or vision_tower.
        profile: file for where one call's time goes: kernels (CUDA), operators (CPU).
    """

    context: int = 128
    new_tokens: int = 64
    modes: Sequence[str] | None = option(default=None, metavar="MODE")
    sparse_modes: Sequence[str] | None = option(default=None, metavar="MODE")
    backend: str = "prunepath"
    num_prompts: int = option("--prompts", default=0, metavar="N")
    include: Sequence[str] | None = option(default=None, action="extend", metavar="PATTERN")
    exclude: Sequence[str] | None = option(default=None, action="extend", metavar="PATTERN")
    profile: Path | None = option(default=None, metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, least in (
            ("--context", self.context, 1),
            ("--new-tokens", self.new_tokens, 1),
            ("--prompts", self.num_prompts, 0),
        ):
            if value < least:
                raise UserError(f"{name} takes whole numbers from {least}")
        if self.profile and self.output and self.output.absolute() in self.profile.absolute().parents:
            raise UserError(f"--output replaces its folder, and --profile {self.profile} with it: choose another place")
        for mode in {*self.dense_modes, *self.all_sparse_modes}:
            if mode not in MODES:
                raise UserError(f"mode {mode!r} is not known: choose one of {', '.join(MODES)}")
            if MODES[mode].capture and self.device != "cuda":
                raise UserError(f"mode {mode} records a CUDA graph: leave it out, or add --device cuda")

    @property
    def dense_modes(self) -> Sequence[str]:
        """Modes of the dense model: those asked for, or the device's default modes."""
        return self.modes or DEFAULT_MODES[self.device]

    @property
    def all_sparse_modes(self) -> Sequence[str]:
        """Modes of the sparse model: those asked for, or the device's default modes."""
        return self.sparse_modes or DEFAULT_SPARSE_MODES[self.device]
