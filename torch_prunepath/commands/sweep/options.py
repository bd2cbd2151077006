"""What ``prunepath sweep`` is asked, and the points that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_prunepath.config import SparsifyConfig, check_tau
from torch_prunepath.console.errors import as_user_error
from torch_prunepath.evaluation.make_sparse import check_sparsity

TAUS = (0.97, 0.95, 0.9, 0.8, 0.7)


@dataclass(frozen=True)
class Point:
    """Where to evaluate: at ``tau``, or where the tau is that reaches ``sparsity`` on the calibration text."""

    tau: float | None = None
    sparsity: float | None = None

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"tau {self.tau:g}" if self.sparsity is None else f"sparsity {self.sparsity:g}"

    @property
    def dense(self) -> bool:
        """Whether every expert is active there."""
        return self.tau == 1.0 or self.sparsity == 0.0


@dataclass(frozen=True)
class Options:
    """What ``prunepath sweep`` was asked.

    Attributes:
        model: a name or folder, or a GGUF file; dense or sparse.
        tasks: names of lm-eval's tasks, groups or tags, with its wildcards.
        taus: thresholds to evaluate at, one row each.
        sparsities: in place of ``taus``: the sparsities to reach on the calibration text.
        text: the calibration text, a UTF-8 file; None for Python's help topics.
        settings: fields of :class:`torch_prunepath.SparsifyConfig` that differ from their defaults.
        include_path: a folder with more tasks.
        num_fewshot: examples in a prompt; None for each task's own number.
        limit: documents of each task, or their share if below 1; None for all.
        batch_size: sequences a batch, or ``"auto"``.
        device: where to run; None for CUDA if there is any, else the CPU.
        dtype: of the weights; ``"auto"`` for the checkpoint's own.
        output: the folder to write; None to write nothing.
    """

    model: str
    tasks: Sequence[str]
    taus: Sequence[float] | None = None
    sparsities: Sequence[float] | None = None
    text: str | None = None
    settings: Mapping[str, Any] | None = None
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: str = "1"
    device: str | None = None
    dtype: str = "auto"
    output: Path | None = None


def check(options: Options) -> tuple[list[Point], SparsifyConfig]:
    """The points, from dense to sparse, and how a dense model is made sparse.

    Raises:
        UserError: if a value is out of range, or two exclude each other.
    """
    with as_user_error(ValueError):
        config = SparsifyConfig(**(options.settings or {}))
        if options.limit is not None and options.limit <= 0:
            raise ValueError(f"limit={options.limit:g} leaves no document: give a positive number")
        if options.sparsities is None:
            taus = TAUS if options.taus is None else options.taus
            return [Point(tau=tau) for tau in sorted({check_tau(tau) for tau in taus}, reverse=True)], config
        if options.taus is not None:
            raise ValueError("tau and sparsity are both given: give one list")
        return [Point(sparsity=share) for share in sorted({check_sparsity(s) for s in options.sparsities})], config
