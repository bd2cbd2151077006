"""One run: a method with its settings, a learning rate and a seed; trained, then measured."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.adaptation.material import Material, spread
from benchmarks.adaptation.measure import Constant, Knob, Unreachable, perplexity_row
from benchmarks.common.store import digest
from torch_prunepath.sparsity import set_tau
from torch_prunepath.train import TrainConfig, train
from torch_prunepath.train.batches import Later
from torch_prunepath.train.loop import steps_of

WARM_STEPS = 3
"""Steps whose time is not counted in the median: the first ones load and compile kernels."""


_TRAINED = ("configs", "history", "intervals", "train_seconds", "steps_done", "cut")
"""What a job knows of training."""


class _OutOfTime(Exception):
    """Ends training between two steps."""


@dataclass(frozen=True)
class Run:
    """What one run is.

    Attributes:
        method: a key of ``METHODS``.
        settings: fields that differ from the method's own.
        lr: peak learning rate of the model's weights.
        seed: of conversion, order of the data, and everything random in training.
        sparsity: that it is trained for; None: one run for every sparsity.
    """

    method: str
    settings: Mapping[str, Any]
    lr: float
    seed: int
    sparsity: float | None

    def pick(self, names: Iterable[str]) -> dict[str, Any]:
        """The settings among these."""
        return {name: self.settings[name] for name in names if name in self.settings}


@dataclass
class Adapted:
    """A trained model.

    Attributes:
        model: on its device.
        knob: makes it sparse.
        taus: further settings to measure, such as the one that a method's authors publish, by name.
    """

    model: Any
    knob: Knob
    taus: dict[str, float] = field(default_factory=dict)


@dataclass
class Job:
    """A run at work; collects what it did."""

    run: Run
    material: Material
    configs: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    intervals: list[float] = field(default_factory=list)
    train_seconds: float = 0.0
    cut: bool = False
    kept_conversion: bool | None = None
    steps_done: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.material.settings.budget.steps

    def converted(self, method: str, how: Mapping[str, Any], convert: Callable[[Any], Any]) -> Any:
        """The model as ``convert`` makes it, which happens once for the same method, settings and seed."""
        model, self.kept_conversion = self.material.converted(method, how, convert)
        return model

    def trained_once(self, config: TrainConfig, how: Callable[..., Any]) -> Any:
        """The dense model as :meth:`train` trains it; its weights and the record of its training are kept."""
        same = ("lr", "seed", "budget", "bf16", "compile", "seconds", "texts")
        about = {key: value for key, value in describe(self.run, self.material).items() if key in same}
        about |= {"model": self.material.model_key(), "config": config.to_dict()}
        model = self.material.dense()

        def make() -> dict[str, Any]:
            self.train(model, config, how)
            record = {key: getattr(self, key) for key in _TRAINED}
            return {"weights": {key: value.cpu() for key, value in model.state_dict().items()}, "record": record}

        made, kept = self.material.cache.get("dense", about, make)
        if kept:
            model.load_state_dict(made["weights"])
            for key, value in made["record"].items():
                setattr(self, key, value)
        return model

    def common(self, base: TrainConfig) -> TrainConfig:
        """A recipe with what is the same for every method."""
        settings = self.material.settings
        common = {"lr": self.run.lr, "seed": self.run.seed, "accumulation": settings.budget.accumulation}
        return dataclasses.replace(base, **common, autocast=settings.bf16)

    def train(self, model: Any, config: TrainConfig, how: Callable[..., Any] = train, *, hooks: bool = False) -> None:
        """One stage of training, with ``how(model, batches, config, ...)``, after those before it.

        What works by hooks, as ``hooks`` or routing hooks say, is not compiled.
        """
        settings = self.material.settings
        teacher = {"teacher": self.material.teacher} if config.distill_logits else {}
        batches = self.material.batches(self.run.seed, config.accumulation)
        feed = Later(batches, self.steps_done * config.accumulation)
        before = self.steps_done
        self.configs.append(config.to_dict())
        start = last = time.perf_counter()

        def note(state: Any, record: dict[str, float]) -> None:
            nonlocal last
            now = time.perf_counter()
            self.history.append({key: round(value, 6) for key, value in record.items()})
            self.intervals.append(now - last)
            self.steps_done, last = before + state.step, now
            if settings.seconds is not None and self.train_seconds + now - start > settings.seconds:
                raise _OutOfTime

        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(_OutOfTime))
            compiles = bool(settings.compile) and not hooks and not _hooked(model)
            how(model, feed, config, callback=note, compile=compiles and settings.compile, **teacher)
        if settings.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.train_seconds += time.perf_counter() - start
        self.cut = self.steps_done < before + steps_of(config, feed)

    def training(self) -> dict[str, Any]:
        """What training did, for the record."""
        budget, steps = self.material.settings.budget, self.steps_done
        tokens = steps * budget.batch_tokens
        timed = sorted(self.intervals[WARM_STEPS:])
        return {
            "steps": steps,
            "tokens": tokens,
            "cut": self.cut,
            "seconds": round(self.train_seconds, 2),
            "tokens_per_second": round(tokens / self.train_seconds, 1) if self.train_seconds else None,
            "median_step_ms": round(statistics.median(timed) * 1e3, 3) if timed else None,
        }

    def measure(self, adapted: Adapted) -> list[dict[str, Any]]:
        """A row for each text and sparsity."""
        settings, rows = self.material.settings, []
        shares = settings.sparsities if self.run.sparsity is None else (self.run.sparsity,)
        if isinstance(adapted.knob, Constant):
            shares = (self.run.sparsity or 0.0,)
        model, knob = adapted.model, adapted.knob
        for text, window_NC in self.material.texts.items():
            search_NC = spread(window_NC, settings.search_windows)

            for name, tau in adapted.taus.items():
                set_tau(model, tau)
                found = perplexity_row(model, knob, window_NC, settings.eval_rows)
                rows.append({"text": text, "asked": None, "setting": name, "tau": tau, **found})
            for share in shares:
                try:
                    tau_found = knob.set(share, search_NC)
                except Unreachable as error:
                    rows.append({"text": text, "asked": share, "unreachable": str(error)})
                    continue
                found = perplexity_row(model, knob, window_NC, settings.eval_rows)
                rows.append({"text": text, "asked": share, "tau": tau_found, **found})
        return rows


def _hooked(model: Any) -> bool:
    return any(getattr(module, "routing_hooks", None) for module in model.modules())


def describe(run: Run, material: Material) -> dict[str, Any]:
    """What a run is, apart from the machine that it ran on; runs are the same if this is."""
    settings = material.settings
    return {
        "method": run.method,
        "settings": dict(run.settings),
        "lr": run.lr,
        "seed": run.seed,
        "sparsity": run.sparsity,
        "model": Path(settings.model).name,
        "budget": dataclasses.asdict(settings.budget),
        "sparsities": list(settings.sparsities) if run.sparsity is None else [run.sparsity],
        "bf16": settings.bf16,
        "compile": settings.compile,
        "seconds": settings.seconds,
        "windows": settings.windows,
        "search_windows": settings.search_windows,
        "texts": material.fingerprints,
    }


def name_of(run: Run, material: Material) -> str:
    """A file name, the same for the same run."""
    share = "" if run.sparsity is None else f"-{100 * run.sparsity:g}"
    return f"{run.method}{share}-lr{run.lr:g}-seed{run.seed}-{digest(describe(run, material))}"
