"""Which jobs there are, and doing them: each once, and one JSON file for each that is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.store import digest
from benchmarks.harness.task import Task

FORMAT = 2
"""Version of the records; those without one are read by :mod:`benchmarks.harness.earlier`."""


@dataclass(frozen=True)
class Options:
    """What was asked, for every task.

    Attributes:
        output: the folder of results; may hold earlier ones.
        methods: names in ``METHODS``, each with the settings in which it differs from its default.
        sparsity: shares of FFN neurons to leave out, each in (0, 1).
        lr: learning rates that compete, the same for every method.
        seeds: one set of jobs for each.
        dense_lr: learning rates of the fine-tuning that a ``tuned`` task begins with.
        steps: optimiser steps of every method; None: by ``epochs``.
        epochs: passes over the training data instead.
        autocast: train in bfloat16 autocast; weights and evaluation stay in float32.
        compile: train compiled, in this mode of ``torch.compile``; None: do not.
        seconds: of training a job, at most; a job that is cut short says so.
        session_seconds: no job starts later than this after :func:`run` was called.
        commit: what results say they were made from; None: git's answer.
        command_line: for the record.
        progress: show progress bars of single jobs.
    """

    output: Path
    methods: Mapping[str, Mapping[str, Any]]
    sparsity: Sequence[float]
    lr: Sequence[float]
    seeds: Sequence[int] = (0,)
    dense_lr: Sequence[float] = ()
    steps: int | None = None
    epochs: float | None = None
    autocast: bool = False
    compile: str | None = None
    seconds: float | None = None
    session_seconds: float | None = None
    commit: str | None = None
    command_line: str = ""
    progress: bool = True


@dataclass(frozen=True)
class Job:
    """One method on one task: everything that decides what it gives.

    Attributes:
        task: name of the task.
        method: a key of ``METHODS``.
        settings: fields that differ from the method's own.
        sparsity: what it is measured at; a method with a run for each sparsity is trained for the only one; empty: dense.
        lr: peak learning rate of the model's weights.
        seed: of everything random.
        steps: optimiser steps.
        dense_lr: learning rate of the fine-tuning that it begins with; None: it begins with the pretrained model.
        autocast: as in :class:`Options`.
        compile: as in :class:`Options`.
        seconds: as in :class:`Options`.
        model: what results call the model.
        weights: digest of its files.
        about: ``about`` of the task.
    """

    task: str
    method: str
    settings: Mapping[str, Any]
    sparsity: tuple[float, ...]
    lr: float
    seed: int
    steps: int
    dense_lr: float | None
    autocast: bool
    compile: str | None
    seconds: float | None
    model: str
    weights: str
    about: Mapping[str, Any]

    @property
    def decides(self) -> dict[str, Any]:
        """What tells this job from others. The weights' digest says which model it is, whatever it is called."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "model"}

    @property
    def name(self) -> str:
        """Name of the job's file."""
        shares = "-".join(f"{100 * share:g}" for share in self.sparsity) or "0"
        return f"{self.task}-{self.method}-{shares}-lr{self.lr:g}-seed{self.seed}-{digest(self.decides)}"


def run(tasks: Sequence[Task], options: Options) -> dict[str, list[str]]:
    """Do every job that the options ask for and that is not done yet.

    A ``tuned`` task's dense model is fine-tuned first, at each of ``dense_lr``; every method begins with the one that the
    selection half prefers.

    Returns:
        Names of the jobs: ``done`` now, done ``before``, in hand ``elsewhere`` (in another process), and ``left`` because
        ``session_seconds`` were over.

    Raises:
        UserError: if a setting is refused, before anything is trained; if a result cannot be written; or if the folder
            holds something else than results of this version.
    """
    raise NotImplementedError
