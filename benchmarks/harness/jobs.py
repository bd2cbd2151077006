"""Which jobs there are, and doing them: each once, and one JSON file for each that is done."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.methods import METHODS, check
from benchmarks.harness.parts import Part, Worker, bar_of
from benchmarks.harness.store import Record, Store, digest
from benchmarks.harness.task import Task
from benchmarks.harness.work import LEAST_STEPS, Work
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.train import TrainConfig
from torch_prunepath.train.compiling import check_how
from torch_prunepath.train.loop import steps_of


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

    def __post_init__(self) -> None:
        check_shares(self.sparsity)
        names = ("steps", "epochs", "seconds", "session_seconds")
        check_positive({name: getattr(self, name) for name in names})
        for name in ("lr", "dense_lr"):
            for rate in getattr(self, name):
                check_positive({name: rate})
        if (self.steps is None) == (self.epochs is None):
            raise UserError("either --steps or --epochs says how long to train: give one of them")
        with as_user_error(ValueError):
            check_how(self.compile or False)


def check_positive(values: Mapping[str, float | None]) -> None:
    """Refuse numbers that are not positive; None is not given.

    Raises:
        UserError: with the option that gave it.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value} must be positive")


def check_shares(values: Sequence[float]) -> None:
    """Refuse sparsities outside (0, 1).

    Raises:
        UserError: if one is outside.
    """
    for value in values:
        if not 0.0 < value < 1.0:
            raise UserError(f"--sparsity {value} is outside (0, 1): 0.8 leaves a fifth of the neurons")


@dataclass(frozen=True)
class Job:
    """One method on one task: everything that decides what it gives.

    Attributes:
        task: name of the task.
        method: a key of ``METHODS``.
        settings: fields that differ from the method's own.
        sparsity: what it is measured at; with a run for each sparsity, the one that it is trained for; empty: dense.
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


class Jobs:
    """The jobs of one task.

    Args:
        task: which.
        options: what was asked.
        worker: does them.
    """

    def __init__(self, task: Task, options: Options, worker: Worker) -> None:
        self.task, self.options, self.worker = task, options, worker
        config = TrainConfig(steps=options.steps, epochs=None if options.steps else options.epochs)
        self.steps = steps_of(config, task.batches(0))
        names = [name for name in options.methods if not (task.tuned and name == "dense")]
        self.wanted = [
            (seed, name, shares, lr)
            for seed in options.seeds
            for name in names
            for lr in options.lr
            for shares in self._shares(name)
        ]

    @property
    def number(self) -> int:
        """How many jobs there are."""
        dense = len(self.options.seeds) * len(self.options.dense_lr) if self.task.tuned else 0
        return dense + len(self.wanted)

    def check(self) -> None:
        """Refuse settings that the task cannot do.

        Raises:
            UserError: if steps would differ in size.
        """
        for settings in self.options.methods.values():
            self.task.batches(0, accumulation=settings.get("accumulation", self.task.accumulation))

    def run(self, bar: Any) -> None:
        """Do those that are not done yet: the fine-tuning of each seed first, if the task has it."""
        if self.options.compile is not None:
            torch.compiler.reset()  # another task's shape before this one's would make torch compile for any shape
        best = {seed: self._tuned(seed, bar) for seed in self.options.seeds} if self.task.tuned else {}
        for seed, name, shares, lr in self.wanted:
            self.worker.do(self.part(self.job(name, shares, seed, lr, best.get(seed))), bar)

    def _shares(self, name: str) -> list[tuple[float, ...]]:
        method, sparsity = METHODS[name], tuple(sorted(set(self.options.sparsity)))
        if method.dense:
            return [()]
        return [(share,) for share in sparsity] if method.each else [sparsity]

    def job(self, name: str, shares: tuple[float, ...], seed: int, lr: float, dense_lr: float | None) -> Job:
        """One of them."""
        options, task = self.options, self.task
        how = {key: getattr(options, key) for key in ("autocast", "compile", "seconds")}
        about = {"model": task.model, "weights": task.weights, "about": task.about}
        settings = dict(options.methods.get(name, {}))
        return Job(task.name, name, settings, shares, lr, seed, self.steps, dense_lr, **how, **about)

    def _tuned(self, seed: int, bar: Any) -> float:
        """The learning rate of the fine-tuning that the selection half prefers; the first of equals."""
        jobs = [self.job("dense", (), seed, lr, None) for lr in self.options.dense_lr]
        records = [self.worker.do(self.part(job), bar, wait=True) or {} for job in jobs]
        scores = [score_of(record) for record in records]
        number = max(range(len(jobs)), key=lambda i: scores[i])
        if scores[number] == -math.inf and not self.worker.outcome["left"]:
            failed = self.worker.store.runs / f"{jobs[0].name}.json"
            raise UserError(f"fine-tuning {self.task.name} diverged: give a smaller --dense-lr, or remove {failed}")
        return jobs[number].lr

    def part(self, job: Job) -> Part:
        """What does a job."""
        return Part(
            job.name, {"job": dataclasses.asdict(job)}, lambda record: self._do(job, record), self.task.packages
        )

    def _do(self, job: Job, record: Record) -> None:
        torch.manual_seed(job.seed)
        work = self._begin(job, record)
        try:
            trained = METHODS[job.method].train(work)
        finally:
            _note(work, record)
        record["parameters"] = sum(parameter.numel() for parameter in trained.model.parameters())
        start = time.perf_counter()
        record["rows"] = self.task.evaluate(trained, job.sparsity or (0.0,))
        record["evaluation_seconds"] = round(time.perf_counter() - start, 2)

    def _begin(self, job: Job, record: Record) -> Work:
        """The job with the model that it begins with: fresh, or fine-tuned, now if nobody did it before."""
        same = {"cache": self.worker.store.cache, "progress": self.options.progress}
        model = self.task.fresh(job.seed)
        if job.dense_lr is not None:
            tuning = Work(self.job("dense", (), job.seed, job.dense_lr, None), self.task, model, **same)
            METHODS["dense"].train(tuning)
            model = tuning.model
        return Work(job, self.task, model, **same)


def _note(work: Work, record: Record) -> None:
    training = work.training
    record |= {"stages": training.stages, "training": training.summary(work.task.step_tokens)}
    record |= {"conversion_kept": work.kept, "evaluation_seconds": 0.0, "history": training.history}


class _NoTask:
    """Enough of a task to look at settings."""

    accumulation = 1


def check_settings(options: Options) -> None:
    """Refuse methods' settings before any data are read.

    Raises:
        UserError: if one is refused.
    """
    for name, settings in options.methods.items():
        shares = options.sparsity[:1] if METHODS[name].each else options.sparsity
        for lr in options.lr:
            given = ("", name, settings, tuple(shares), lr, 0, options.steps or LEAST_STEPS, None)
            job = Job(*given, options.autocast, options.compile, None, "", "", {})
            check(Work(job, _NoTask(), nn.Identity()))  # type: ignore[arg-type]


def score_of(record: Mapping[str, Any]) -> float:
    """What the selection half says of a dense job; minus infinity if it failed."""
    rows = record.get("rows") or []
    return float(rows[0]["select"]["score"]) if rows else -math.inf


def run(tasks: Sequence[Task], options: Options) -> dict[str, list[str]]:
    """Do every job that the options ask for and that is not done yet.

    The dense model of a task that is ``tuned`` is fine-tuned first, at each of ``dense_lr``; every method begins with
    the one that the selection half prefers.

    Returns:
        Names of the jobs: ``done`` now, done ``before``, in hand ``elsewhere`` (in another process), and ``left``
        because ``session_seconds`` were over.

    Raises:
        UserError: if a setting is refused, before anything is trained; if a result cannot be written; or if the folder
            holds something else than results of this version.
    """
    check_settings(options)
    store = Store(options.output)
    store.check_free()
    worker = Worker(store, options.command_line, options.commit, options.session_seconds)
    found = [Jobs(task, options, worker) for task in tasks]
    for jobs in found:
        jobs.check()
    with bar_of(sum(jobs.number for jobs in found)) as bar:
        for jobs in found:
            jobs.run(bar)
    return worker.outcome
