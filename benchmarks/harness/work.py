"""One job while it runs: the model, what was trained and how, and conversions that several jobs begin with."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.harness.kept import describe, restore
from benchmarks.harness.store import Cache, digest_of_weights
from benchmarks.harness.task import Task
from torch_prunepath.baselines import train_dense
from torch_prunepath.bench.decode import release
from torch_prunepath.console.errors import as_user_error
from torch_prunepath.train import Phase, TrainConfig, train
from torch_prunepath.train.compiling import RECORDING_MODES
from torch_prunepath.train.loop import steps_of

if TYPE_CHECKING:
    from benchmarks.harness.jobs import Job

TRAIN_FIELDS = frozenset(f.name for f in dataclasses.fields(TrainConfig)) - {
    "steps",
    "epochs",
    "lr",
    "seed",
    "autocast",
}
"""Settings that every method has."""
TARGET = "target"
"""Inside the setting ``phases``: the sparsity that a job is trained for."""
WARM_STEPS = 3
"""Steps whose time is not in the median: the first ones load and compile kernels."""
LEAST_STEPS = 2
"""Steps of a job that trains nothing, so that every recipe can be written down."""


class _OutOfTime(Exception):
    """Ends training between two steps."""


@dataclass
class Training:
    """What training did so far.

    Attributes:
        stages: each stage's configuration and what came of it, in order.
        history: a record of each step.
        intervals: seconds of each step.
        seconds: of all stages.
        steps: optimiser steps that were done.
        cut: whether time ran out.
    """

    stages: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    intervals: list[float] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    cut: bool = False

    def summary(self, step_tokens: int | None) -> dict[str, Any]:
        """The same for the record."""
        timed = self.intervals[WARM_STEPS:]
        found = {"steps": self.steps, "cut": self.cut, "seconds": round(self.seconds, 2)}
        if step_tokens is not None:
            tokens = self.steps * step_tokens
            speed = round(tokens / self.seconds, 1) if self.seconds else None
            found |= {"tokens": tokens, "tokens_per_second": speed}
        return {**found, "median_step_ms": round(statistics.median(timed) * 1e3, 3) if timed else None}


@dataclass
class Work:
    """One job at work.

    Attributes:
        job: which.
        task: to train and calibrate on.
        model: what the method begins with; changed in place, or another one in its place once it is converted.
        cache: of what several jobs begin with; None keeps nothing.
        progress: show progress bars.
        trains: whether anything is trained; otherwise methods only convert.
        before: called with the converted model, before it is trained first; None: nobody looks.
        training: what was done.
        kept: whether the conversion was in the cache; None before there is one.
    """

    job: Job
    task: Task
    model: nn.Module
    cache: Cache | None = None
    progress: bool = False
    trains: bool = True
    before: Callable[[nn.Module], None] | None = None
    training: Training = field(default_factory=Training)
    kept: bool | None = None

    def __post_init__(self) -> None:
        self._begin = copy.deepcopy(self.model) if self.job.settings.get("distill_logits") else None

    # --- settings -----------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole job."""
        return self.job.steps if self.trains else LEAST_STEPS

    @property
    def target(self) -> float:
        """The sparsity that a method with a run for each is trained for."""
        (target,) = self.job.sparsity
        return target

    def pick(self, names: Iterable[str]) -> dict[str, Any]:
        """The settings among these, where they are given."""
        return {name: self.job.settings[name] for name in names if name in self.job.settings}

    def config(self, recipe: TrainConfig) -> TrainConfig:
        """A recipe with what is the same for every method, and with this job's settings.

        Raises:
            UserError: if a setting is refused.
        """
        same = {"lr": self.job.lr, "seed": self.job.seed, "autocast": self.job.autocast}
        same["accumulation"] = self.task.accumulation
        with as_user_error(ValueError, TypeError):
            given = self.pick(TRAIN_FIELDS)
            if "phases" in given:
                given["phases"] = tuple(
                    Phase(*(self.target if value == TARGET else value for value in phase)) for phase in given["phases"]
                )
            return dataclasses.replace(recipe, **{**same, **given})

    def plain(self, steps: int | None = None) -> TrainConfig:
        """The task alone."""
        return self.config(TrainConfig(steps=self.steps if steps is None else steps))

    @functools.cached_property
    def calibration(self) -> Any:
        """What conversions are made from."""
        return self.task.calibration()

    def calibrated(self) -> dict[str, Any]:
        """Arguments that every baseline's conversion takes."""
        return {"calibration": self.calibration, "tokens": self.task.calibration_tokens, "progress": self.progress}

    # --- training -----------------------------------------------------------------------------------------------------

    def fit(self, config: TrainConfig, how: Callable[..., Any] = train, *, hooks: bool = False, **options: Any) -> None:
        """One stage of training, towards the model that the job began with as well if its settings distil.

        Args:
            config: of the stage.
            how: ``how(model, batches, config, ...)`` trains.
            hooks: it works by hooks, so that it is not compiled; its batches are the same.
            **options: further ones of ``how``.
        """
        if self.before is not None:
            self.before(self.model)
            self.before = None
        training = self.training
        if not self.trains or training.cut:
            return
        batches = self._batches(config)
        compiled = None if hooks or _hooked(self.model) else self.job.compile
        common = {"teacher": self._begin, "compile": compiled or False, "progress": self.progress}
        records: list[dict[str, float]] | None = None  # what time cut short answers nothing
        start, before, first = time.perf_counter(), training.steps, len(training.history)
        with self._noting(start) as note, _releasing(compiled, next(self.model.parameters()).device):
            records = how(self.model, batches, config, callback=note, **common, **options)
        seconds = time.perf_counter() - start
        training.seconds += seconds
        training.cut = training.steps < before + steps_of(config, batches)
        said = {
            "seconds": round(seconds, 2),
            "compiled": compiled,
            "last_tenth": _means(records or training.history[first:]),
        }
        training.stages.append({"config": config.to_dict(), **said})

    def _batches(self, config: TrainConfig) -> Any:
        skip = self.training.steps * config.accumulation
        shape = {"one_shape": self.job.compile is not None, "accumulation": config.accumulation}
        return self.task.batches(self.job.seed, **shape, skip=skip)

    @contextlib.contextmanager
    def _noting(self, start: float) -> Iterator[Callable[[Any, dict[str, float]], None]]:
        """A callback that keeps what each step says, and ends the training when the time is over."""
        training, before, last = self.training, self.training.steps, start

        def note(state: Any, record: dict[str, float]) -> None:
            nonlocal last
            now = time.perf_counter()
            training.history.append({key: round(value, 6) for key, value in record.items()})
            training.intervals.append(now - last)
            training.steps, last = before + state.step, now
            if self.job.seconds is not None and training.seconds + now - start > self.job.seconds:
                raise _OutOfTime

        with contextlib.suppress(_OutOfTime):
            yield note

    def fit_dense_once(self) -> None:
        """Train the dense model for all steps on the task alone; its weights and the record of it are kept."""
        config, device = self.plain(), next(self.model.parameters()).device

        def make() -> tuple[dict[str, torch.Tensor], Any]:
            self.fit(config, train_dense)
            return self.model.state_dict(), dataclasses.asdict(self.training)

        if self.cache is None:
            make()
            return
        same = {name: getattr(self.job, name) for name in ("task", "seed", "dense_lr", "compile", "seconds", "about")}
        key = {**same, "begin": digest_of_weights(self.model), "config": config.to_dict()}
        weights, record, kept = self.cache.tensors("dense", key, make)
        if kept:
            self.model.load_state_dict({name: value.to(device) for name, value in weights.items()})
            self.training = Training(**record)

    # --- conversions --------------------------------------------------------------------------------------------------

    def convert(self, kind: str, how: Mapping[str, Any], change: Callable[[nn.Module], Any]) -> None:
        """Let ``change`` convert the model in place, which happens once for the same model, data and settings.

        Args:
            kind: of conversion, for the file's name.
            how: every setting of it, the seed included.
            change: converts.
        """
        model = self.model

        def make() -> tuple[dict[str, torch.Tensor], Any]:
            change(model)
            return model.state_dict(), describe(model)

        if self.cache is None:
            make()
            return
        key = {"task": self.job.task, "about": dict(self.job.about), "begin": digest_of_weights(model)}
        tensors, said, self.kept = self.cache.tensors(kind, {**key, "how": dict(how)}, make)
        if self.kept:
            restore(model, tensors, said)


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    """Means over the last tenth of a stage's steps."""
    last = records[-max(1, len(records) // 10) :]
    return (
        {name: sum(record[name] for record in last) / len(last) for name in last[-1] if name != "step"} if last else {}
    )


def _hooked(model: nn.Module) -> bool:
    return any(getattr(module, "routing_hooks", None) for module in model.modules())


@contextlib.contextmanager
def _releasing(how: str | None, device: torch.device) -> Iterator[None]:
    """Afterwards the device has done its work, and the memory of CUDA graphs is free if this mode records any."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize()
        if how in RECORDING_MODES:
            release(device)
