"""What ``prunepath sweep`` takes, and the points that follow. Nothing heavy is imported here, so help is quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch_prunepath.commands.options import SETTINGS, TAUS
from torch_prunepath.commands.points import Point, at_bytes, at_sparsities, at_taus
from torch_prunepath.config import SparsifyConfig
from torch_prunepath.console.options import option, settings


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Evaluate lm-eval tasks over a list of tau, of sparsities or of bytes, and draw the curve.

    Attributes:
        model: name or folder of a causal language model, dense or sparse, or a GGUF file.
        tasks: lm-eval's tasks, groups or tags, with its wildcards; a comma separates them too.
        taus: thresholds, one row each (default: 0.97 0.95 0.9 0.8 0.7).
        sparsities: sparsities to find the tau of on the calibration text.
        shares: shares of the FFNs' bytes that a token reads, in place of taus (set_budget).
        text: UTF-8 text to calibrate on (default: Python's help topics).
        limit: documents of each task, or their share if below 1.
        num_fewshot: examples in a prompt (default: the task's own).
        include_path: folder with more tasks.
        batch_size: sequences a batch, or auto.
        device: where to run (default: cuda if there is any, else cpu).
        dtype: dtype of the weights; auto is the checkpoint's own (default: auto).
        output: folder for results.json and the plot.
        include: names or patterns of the FFNs to make sparse, such as 'layers.*.mlp' (default: all).
        exclude: names or patterns of FFNs to leave dense, such as 'model.layers.0.*' or vision_tower.
        settings: fields of :class:`torch_prunepath.SparsifyConfig` that were given.

    Raises:
        ValueError: if a value is out of range, or two exclude each other.
    """

    model: str = option(positional=True, metavar="MODEL")
    tasks: Sequence[str] = option(metavar="TASK")
    taus: Sequence[float] | None = option("--tau", default=None, one_of="points")
    sparsities: Sequence[float] | None = option("--sparsity", default=None, one_of="points", metavar="SHARE")
    shares: Sequence[float] | None = option("--bytes", default=None, one_of="points", metavar="SHARE")
    text: str | None = option(default=None, metavar="FILE")
    limit: float | None = option(default=None, metavar="N")
    num_fewshot: int | None = option(default=None, metavar="N")
    include_path: str | None = option(default=None, metavar="DIR")
    batch_size: str = option(default="1", metavar="N")
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    output: Path | None = option("-o", "--output", default=None, metavar="DIR")
    include: Sequence[str] | None = option(default=None, action="extend", metavar="PATTERN")
    exclude: Sequence[str] | None = option(default=None, action="extend", metavar="PATTERN")
    settings: Mapping[str, Any] = settings(SparsifyConfig, f"{SETTINGS}, for a dense model")

    def __post_init__(self) -> None:
        lists = {"tau": self.taus, "sparsity": self.sparsities, "bytes": self.shares}
        given = [name for name, values in lists.items() if values is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given: give one list")
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"limit={self.limit:g} leaves no document: give a positive number")
        assert self.config and self.points

    @property
    def task_names(self) -> list[str]:
        """The tasks one by one."""
        return [name for task in self.tasks for name in task.split(",") if name]

    @property
    def about_experts(self) -> list[str]:
        """Names of the options given that say how experts are made, and so belong to a dense model."""
        return [*self.settings, *(name for name in ("include", "exclude") if getattr(self, name) is not None)]

    @cached_property
    def config(self) -> SparsifyConfig:
        """How a dense model is made sparse."""
        return SparsifyConfig(**self.settings)

    @cached_property
    def points(self) -> list[Point]:
        """Where to evaluate, from dense to sparse, once each."""
        if self.shares is not None:
            return at_bytes(self.shares)
        if self.sparsities is not None:
            return at_sparsities(self.sparsities)
        return at_taus(TAUS if self.taus is None else self.taus)
