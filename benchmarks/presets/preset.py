"""What a preset is: the model, the parts of a figure, and where each of their settings comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.methods import METHODS
from benchmarks.sources import SOURCES

PAPER = "paper"
RELEASED = "released code"
BASELINE = "the baseline's paper"
OURS = "ours"
ORIGINS = (PAPER, RELEASED, BASELINE, OURS)
"""Where a setting can come from. ``ours``: the paper's text does not say, or it is not known to us."""

TASKS: Mapping[str, tuple[str, ...]] = {
    "glue": ("train", "dev"),
    "writing": ("train", "valid", "test"),
    "instruct": ("train",),
    "books": ("train", "test"),
}
"""Kinds of parts whose jobs the harness enumerates, and the splits that each needs."""
ANALYSES = ("reconstruction", "initialisation", "ablations", "taus")
"""Kinds of parts that are analyses; they read the same splits as ``books``."""


@dataclass(frozen=True)
class Given:
    """One setting and where it comes from.

    Attributes:
        name: what is set.
        value: as people read it.
        origin: one of ``ORIGINS``.
        note: the place in the source, or the reason.

    Raises:
        ValueError: if the origin is unknown.
    """

    name: str
    value: str
    origin: str
    note: str = ""

    def __post_init__(self) -> None:
        if self.origin not in ORIGINS:
            raise ValueError(f"{self.name}: origin={self.origin!r} is unknown: choose from {', '.join(ORIGINS)}")


@dataclass(frozen=True)
class Model:
    """A pretrained model.

    Attributes:
        name: on the hub.
        config: name of its configuration class in ``transformers``.
        architecture: name of its model class there.
        sizes: the published fields of the configuration that decide how many parameters there are.
        checkpointing: whether it trains with gradient checkpointing, which computes each forward pass twice.
    """

    name: str
    config: str
    architecture: str
    sizes: Mapping[str, Any]
    checkpointing: bool = False


@dataclass(frozen=True)
class Run:
    """One job that a part needs.

    Attributes:
        task: what it trains on.
        method: a method of the harness, or a variant of an analysis.
        sparsity: what it is measured at; empty: dense.
        lr: peak learning rate.
        seed: of everything random.
        teacher: whether the dense model runs beside it as a teacher.
    """

    task: str
    method: str
    sparsity: tuple[float, ...]
    lr: float
    seed: int
    teacher: bool = False


@dataclass(frozen=True)
class Part:
    """One experiment of the harness.

    Attributes:
        kind: a key of ``TASKS``, or one of ``ANALYSES``.
        sources: names of data sets; a ``glue`` part has a task for each, others read the only one.
        methods: methods of the harness, each with the settings in which it differs from its default.
        sparsity: shares of FFN neurons to leave out.
        lr: learning rates of the methods, which compete.
        dense_lr: learning rates of the fine-tuning before; empty where methods begin with the pretrained model.
        seeds: one set of jobs for each.
        epochs: passes over the training data; None: ``steps`` instead.
        steps: optimiser steps of every job.
        batch: rows a step.
        length: tokens a row, at most.
        variants: analyses only: what is compared in place of methods, one model each.
        taus: analyses only: thresholds that are measured.
        new_tokens: ``writing`` only: tokens that are generated for a text, at most.
        options: ``instruct``: ``accumulation``, batches a step; analyses: options of their own commands.

    Raises:
        ValueError: if a name is unknown, or fields contradict each other.
    """

    kind: str
    sources: tuple[str, ...]
    methods: Mapping[str, Mapping[str, Any]]
    sparsity: tuple[float, ...]
    lr: tuple[float, ...] = (1e-4,)
    dense_lr: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    epochs: float | None = None
    steps: int | None = None
    batch: int = 32
    length: int = 512
    variants: tuple[str, ...] = ()
    taus: tuple[float, ...] = ()
    new_tokens: int = 96
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in TASKS and self.kind not in ANALYSES:
            raise ValueError(f"kind={self.kind!r} is unknown: choose from {', '.join((*TASKS, *ANALYSES))}")
        for name in self.sources:
            if name not in SOURCES:
                raise ValueError(f"{name!r} is no data set: choose from {', '.join(SOURCES)}")
        if not self.sources or (self.kind != "glue" and len(self.sources) > 1):
            raise ValueError(f"{self.kind} reads one data set, not {len(self.sources)}")
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"{name!r} is no method of the harness: choose from {', '.join(METHODS)}")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs= or steps=, and not both")
        if self.tuned and not self.dense_lr:
            raise ValueError(f"{self.kind} fine-tunes a dense model first: give dense_lr=")

    @property
    def tuned(self) -> bool:
        """Whether methods begin with a dense model that is fine-tuned first."""
        return self.kind in ("glue", "writing")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of each source that it reads."""
        return TASKS.get(self.kind, TASKS["books"])

    def runs(self) -> list[Run]:
        """The jobs in the order in which they are done, as the harness enumerates them."""
        return [run for name in self.sources for seed in self.seeds for run in self._runs(name, seed)]

    def _runs(self, task: str, seed: int) -> list[Run]:
        if self.variants:
            return [Run(task, name, self.sparsity, lr, seed) for name in self.variants for lr in self.lr]
        tuning = [Run(task, "dense", (), lr, seed) for lr in self.dense_lr] if self.tuned else []
        return tuning + [
            Run(task, name, shares, lr, seed, bool(settings.get("distill_logits")))
            for name, settings in self.methods.items()
            for lr in self.lr
            for shares in self._shares(name)
        ]

    def _shares(self, name: str) -> list[tuple[float, ...]]:
        method = METHODS[name]
        if method.dense:
            return [()]
        shares = tuple(sorted(set(self.sparsity)))
        if self.kind in ANALYSES:
            return [shares[:1]] if method.each else [shares]
        return [(share,) for share in shares] if method.each else [shares]


@dataclass(frozen=True)
class Preset:
    """One figure of the paper.

    Attributes:
        name: of the figure, and of the command.
        title: what the figure shows.
        model: which model.
        parts: its experiments.
        given: where each setting comes from.
        autocast: train in bfloat16 autocast.

    Raises:
        ValueError: if there is no part.
    """

    name: str
    title: str
    model: Model
    parts: tuple[Part, ...]
    given: tuple[Given, ...]
    autocast: bool = True

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"{self.name} needs at least one part")

    def changed(self, **fields: Any) -> Preset:
        """The same with these fields of every part changed."""
        return dataclasses.replace(self, parts=tuple(dataclasses.replace(part, **fields) for part in self.parts))
