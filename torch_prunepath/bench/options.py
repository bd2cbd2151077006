"""What a person asked of ``prunepath bench``, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from torch_prunepath.bench.geometry import resolve
from torch_prunepath.console.errors import UserError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
)


@dataclass(frozen=True)
class Mode:
    """How a function is made fast.

    Attributes:
        compile: ``torch.compile``'s mode; None: not compiled.
        capture: record a CUDA graph of it.
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
"""Those with ``graph`` compile without Inductor's own CUDA graphs, and record the result in one graph; CUDA only."""

DEFAULT_MODES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cpu": ("default",), "cuda": ("graph", "graph-combo", "reduce-overhead", "graph-max-autotune")}
)
DEFAULT_SPARSE_MODES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cpu": ("default",), "cuda": ("graph", "graph-combo")}
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What both benchmarks take.

    Attributes:
        geometries: names, or folders of models.
        device: ``"cpu"`` or ``"cuda"``.
        batches: tokens a call (``ffn``), or sequences decoded at once (``decode``).
        prompts: prompt lengths that are read in one call.
        sparsities: inactive shares of the neurons, in [0, 1).
        dtype: key of ``DTYPES``.
        expert_size: S, where the model does not have experts already.
        gate: ``"one"`` or ``"sigmoid"``, likewise.
        layers: layers to time or to build; None: enough to exceed the caches (``ffn``), all (``decode``).
        seconds: about how long each thing is timed.
        seed: of everything random.
        output: a folder for ``results.json`` and the plot, or None.
        command_line: the command, for the record.

    Raises:
        UserError: if anything does not fit.
    """

    geometries: Sequence[str]
    device: str
    batches: Sequence[int]
    prompts: Sequence[int]
    sparsities: Sequence[float]
    dtype: str
    expert_size: int
    gate: str
    layers: int | None
    seconds: float
    seed: int
    output: Path | None
    command_line: str

    def __post_init__(self) -> None:
        for name in self.geometries:
            resolve(name)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("torch finds no CUDA device: use --device cpu, or a torch build that fits the driver")
        if not (self.batches or self.prompts) or not self.sparsities:
            raise UserError("nothing to time: give at least one --batch or --prompt, and one --sparsity")
        counts = {"--batch": self.batches, "--prompt": self.prompts, "--expert-size": [self.expert_size]}
        for option, values in (counts | {"--layers": [] if self.layers is None else [self.layers]}).items():
            if any(value < 1 for value in values):
                raise UserError(f"{option} takes whole numbers from 1")
        for sparsity in self.sparsities:
            if not 0.0 <= sparsity < 1.0:
                raise UserError(f"--sparsity {sparsity:g} is outside [0, 1): it is the inactive share of neurons")
        if not self.seconds > 0:
            raise UserError("--seconds takes a number above 0")

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class FFNOptions(Options):
    """What ``prunepath bench ffn`` takes."""

    @property
    def tokens(self) -> list[int]:
        """Tokens a call: batches and prompts alike, without repetition, in order."""
        return sorted({*self.batches, *self.prompts})


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(Options):
    """What ``prunepath bench decode`` takes beyond that.

    Attributes:
        context: prompt tokens in the cache when decoding starts.
        new_tokens: decoded tokens a timed run.
        modes: dense modes, of which the best is the baseline; None: the device's default ones.
        sparse_modes: likewise for sparse.
        backend: ``torch.compile``'s backend of the sparse model.
        requests: prompts of different lengths whose latency is measured one by one.
        profile: a file for where the time of one call goes, or None.
    """

    context: int
    new_tokens: int
    modes: Sequence[str] | None
    sparse_modes: Sequence[str] | None
    backend: str
    requests: int
    profile: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value, least in (
            ("--context", self.context, 1),
            ("--new-tokens", self.new_tokens, 1),
            ("--prompts", self.requests, 0),
        ):
            if value < least:
                raise UserError(f"{option} takes whole numbers from {least}")
        if self.profile and self.output and self.output.absolute() in self.profile.absolute().parents:
            raise UserError(f"--output replaces its folder, and --profile {self.profile} with it: choose another place")
        for mode in {*self.dense_modes, *self.all_sparse_modes}:
            if mode not in MODES:
                raise UserError(f"mode {mode!r} is not known: choose of {', '.join(MODES)}")
            if MODES[mode].capture and self.device != "cuda":
                raise UserError(f"mode {mode} records a CUDA graph: leave it out, or add --device cuda")

    @property
    def dense_modes(self) -> Sequence[str]:
        """The modes asked for, or the device's default ones."""
        return self.modes or DEFAULT_MODES[self.device]

    @property
    def all_sparse_modes(self) -> Sequence[str]:
        """Likewise for the sparse model."""
        return self.sparse_modes or DEFAULT_SPARSE_MODES[self.device]
