"""Runs of the benchmarks on tasks: which there are to do, doing them, and one JSON file for each that is done.

A run whose file is there is not done again. One that diverged is noted as failed, and the others go on.

OUT/runs/TASK-METHOD-SPARSITY-seedN-HASH.json   what one run gave
OUT/dense/TASK-dense-0-seedN-HASH.pt            fine-tuned dense weights, which the other runs start from
OUT/cache/KIND-HASH.pt                          these, converted: what several targets and learning rates start from
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

from benchmarks.common.report import origin
from benchmarks.common.store import Run, Store, digest, load, replacing
from benchmarks.tasks.methods import METHODS
from benchmarks.tasks.options import Options
from benchmarks.tasks.work import Data, Ready, Work
from torch_prunepath import record_sparsity
from torch_prunepath.baselines import train_dense
from torch_prunepath.console.errors import UserError, one_line
from torch_prunepath.inputs.data import evaluating
from torch_prunepath.sparsity import SparsityRecord
from torch_prunepath.train import TrainConfig
from torch_prunepath.train.loop import steps_of


class Task(Data, Protocol):
    """A task: its data, a model for it, and how well a model does it.

    Attributes:
        name: for files and tables.
        digest: of the data, and of what is done with them.
        packages: whose versions matter besides the usual ones, where they are installed.
    """

    name: str
    digest: str
    packages: tuple[str, ...]

    def fresh(self, seed: int) -> nn.Module:
        """The pretrained model in float32 on its device, a new head drawn from the seed."""

    def evaluate(self, model: nn.Module, sparse: bool) -> dict[str, Any]:
        """``select`` and ``report``: what the two held-out parts give, each with realised ``sparsity`` if sparse.

        ``select["score"]`` is what choices are made by, larger is better.
        """


@dataclass(frozen=True)
class Job:
    """One run to do: everything that decides what it gives."""

    task: str
    method: str
    targets: tuple[float, ...]
    seed: int
    lr: float
    dense_lr: float
    steps: int
    fields: Mapping[str, Any]
    model: str
    weights: str
    data: str
    batch: int
    autocast: bool
    compile: str | None = None

    @property
    def decides(self) -> dict[str, Any]:
        """What tells this run from others."""
        # The weights' digest says which model it is, wherever its folder lies and whatever it is called. Runs that are
        # not compiled are called as they were before any could be.
        left_out = {"model"} if self.compile is not None else {"model", "compile"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    @property
    def name(self) -> str:
        """Of the run's file."""
        of = "-".join(f"{100 * target:g}" for target in self.targets) or "0"
        return f"{self.task}-{self.method}-{of}-seed{self.seed}-{digest(self.decides, 8)}"


class Runner:
    """Does the runs of one task."""

    def __init__(self, task: Task, options: Options, store: Store) -> None:
        self.task, self.options, self.store = task, options, store
        batches = task.batches(0)
        self.steps = options.steps or steps_of(TrainConfig(epochs=options.epochs), batches)
        self.done: list[str] = []
        self.skipped: list[str] = []

    @property
    def number(self) -> int:
        """Of runs."""
        options, dense = self.options, len(self.options.dense_lr)
        each = [len(self._targets(name)) * len(options.lr) for name in options.methods if METHODS[name].trains]
        return len(options.seeds) * (dense + sum(each))

    def run(self) -> Iterator[str]:
        """Every run, dense ones first; yields the name of each that is there."""
        if self.options.compile is not None:
            torch.compiler.reset()  # another task's shape before this one's would make torch compile for any shape
        for seed in self.options.seeds:
            dense = [self._job("dense", (), seed, lr, lr) for lr in self.options.dense_lr]
            for job in dense:
                yield self._ensure(job)
            best = self._best(dense)
            for method in self.options.methods:
                if METHODS[method].trains:
                    for targets in self._targets(method):
                        for lr in self.options.lr:
                            yield self._ensure(self._job(method, targets, seed, lr, best.lr))

    def _targets(self, method: str) -> list[tuple[float, ...]]:
        kind, sparsity = METHODS[method], tuple(self.options.sparsity)
        if kind.dense:
            return [()]
        return [sparsity] if kind.one_run else [(target,) for target in sparsity]

    def _job(self, method: str, targets: tuple[float, ...], seed: int, lr: float, dense_lr: float) -> Job:
        options, fields = self.options, dict(self.options.fields.get(method, {}))
        about = {"model": options.model, "weights": options.weights, "data": self.task.digest}
        about |= {"batch": options.batch, "autocast": options.autocast, "compile": options.compile}
        return Job(self.task.name, method, targets, seed, lr, dense_lr, self.steps, fields, **about)

    def _ensure(self, job: Job) -> str:
        if self.store.read(job.name) is None:
            self.store.write(job.name, self._do(job))
            self.done.append(job.name)
        else:
            self.skipped.append(job.name)
        return job.name

    def _best(self, dense: Sequence[Job]) -> Job:
        """The fine-tuning that the selection half prefers; the first of equals."""
        scores = [score_of(self.store.read(job.name) or {}) for job in dense]
        number = max(range(len(dense)), key=lambda i: scores[i])
        if scores[number] == -math.inf:
            failed = self.store.runs / f"{dense[0].name}.json"
            raise UserError(f"fine-tuning {self.task.name} diverged: give a smaller --dense-lr, or remove {failed}")
        return dense[number]

    def _do(self, job: Job) -> Run:
        torch.manual_seed(job.seed)
        start = time.perf_counter()
        stages: list[dict[str, Any]] = []
        found: dict[str, Any] = {}
        try:
            found["points"] = list(self._points(job, stages))
        except FloatingPointError as error:
            found = {"failed": one_line(error), "points": []}
        return {
            "command": f"benchmark {job.task}",
            **origin(" ".join(sys.argv), self.options.commit, self.task.packages),
            "config": dataclasses.asdict(job),
            "stages": stages,
            "seconds": round(time.perf_counter() - start, 2),
            **found,
        }

    def _points(self, job: Job, stages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        work = self._work(self._fine_tuned(job, stages), job, stages)
        parameters = sum(parameter.numel() for parameter in work.model.parameters())
        try:
            for ready in METHODS[job.method].run(work):
                yield {**self._measure(work.model, ready), "parameters": parameters}
        except ValueError as error:
            raise UserError(f"{job.name}: {one_line(error)}") from error

    def _measure(self, model: nn.Module, ready: Ready) -> dict[str, Any]:
        found = self.task.evaluate(model, sparse=ready.removed is None)
        for half in ("select", "report"):
            bad = [name for name, value in found[half].items() if not math.isfinite(value)]
            if bad:
                raise FloatingPointError(
                    f"{bad[0]} of the {half} half is {found[half][bad[0]]}: lower the learning rates"
                )
        if ready.removed is not None:
            for half in ("select", "report"):
                found[half]["sparsity"] = ready.removed
        return {"target": ready.target, "tau": ready.tau, **found}

    def _dense(self, job: Job) -> Job:
        """The fine-tuning that a run starts from."""
        return self._job("dense", (), job.seed, job.dense_lr, job.dense_lr)

    def _work(self, model: nn.Module, job: Job, stages: list[dict[str, Any]]) -> Work:
        return Work(
            *(model, self.task, job.targets, job.steps, job.lr, job.seed, job.fields),
            autocast=job.autocast,
            compile=job.compile,
            progress=self.options.progress,
            stages=stages,
            cache=self.store.cache,
            origin=self._dense(job).decides,
        )

    def _fine_tuned(self, job: Job, stages: list[dict[str, Any]]) -> nn.Module:
        """The model with the dense weights that the run starts from: those that are kept, or else by fine-tuning."""
        model, dense = self.task.fresh(job.seed), self._dense(job)
        path = self.store.output / "dense" / f"{dense.name}.pt"
        if path.exists():
            model.load_state_dict(load(path, weights_only=True))
            return model
        tuning = self._work(model, dense, stages)
        tuning.fit(train_dense, tuning.config(TrainConfig(steps=job.steps)))
        with replacing(path) as part:
            torch.save(model.state_dict(), part)
        return model


def score_of(run: Run) -> float:
    """What the selection half says of a run with one point; minus infinity if it failed."""
    points = run.get("points") or []
    return float(points[0]["select"]["score"]) if points else -math.inf


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """No words from transformers on loading a model: that a head is new is meant."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def measured(model: nn.Module, sparse: bool) -> Iterator[SparsityRecord | None]:
    """Evaluation mode without gradients; a record of sparsity where there is any."""
    with evaluating(model), record_sparsity(model) if sparse else contextlib.nullcontext() as record:
        yield record


def run_all(tasks: Sequence[Task], options: Options) -> dict[str, list[str]]:
    """Do every run of every task that is not done yet.

    Returns:
        Names of the runs: ``done`` now, and ``skipped`` because they were done before.
    """
    store = Store(options.output)
    store.check_free()
    runners = [Runner(task, options, store) for task in tasks]
    with tqdm(total=sum(runner.number for runner in runners), unit="run", disable=None) as bar:
        for runner in runners:
            for name in runner.run():
                bar.set_postfix_str(name)
                bar.update()
    return {
        "done": [name for runner in runners for name in runner.done],
        "skipped": [name for runner in runners for name in runner.skipped],
    }
