"""One run of one method: its model, data and settings, and what every method does with them: convert and train."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.common.store import Cache
from torch_prunepath import SparsifyConfig
from torch_prunepath.bench.decode import release
from torch_prunepath.train import TrainConfig, recipes
from torch_prunepath.train.compiling import RECORDING_MODES

EXPERTS = {f.name for f in dataclasses.fields(SparsifyConfig)} - {"seed"}


class Data(Protocol):
    """What methods see of a task."""

    def batches(self, seed: int, one_shape: bool = False) -> Any:
        """Training batches with labels, sized, in a new order at each pass; all of one shape if asked for."""

    def calibration(self) -> list[dict[str, Any]]:
        """Some training batches without labels."""


@dataclass(frozen=True)
class Ready:
    """The model can be measured.

    Attributes:
        target: the sparsity asked for.
        tau: that realises it, if the model is routed.
        removed: share of neurons that are gone for good, if the model is pruned; 0 if it is dense.
    """

    target: float
    tau: float | None = None
    removed: float | None = None


@dataclass
class Work:
    """One run of one method.

    Attributes:
        model: dense and fine-tuned; changed in place, or another one in its place once it is converted.
        data: to train and calibrate on.
        sparsity: the targets.
        steps: optimiser steps that the method may take.
        lr: peak learning rate of the model's weights.
        seed: of everything random.
        fields: what the method's own settings are replaced by.
        autocast: train in bfloat16 autocast.
        compile: train compiled, in this mode of ``torch.compile``, on batches of one shape; None: neither.
        progress: show progress bars.
        stages: what was trained, in order; filled in.
        cache: of conversions; None keeps none.
        origin: what decides the model and the data, besides the model's weights; for the cache.
        kept: whether the conversion was found in the cache; None before there is one.
    """

    model: nn.Module
    data: Data
    sparsity: Sequence[float]
    steps: int
    lr: float
    seed: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    autocast: bool = False
    compile: str | None = None
    progress: bool = False
    stages: list[dict[str, Any]] = field(default_factory=list)
    cache: Cache | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    kept: bool | None = None

    def __post_init__(self) -> None:
        self.teacher = copy.deepcopy(self.model) if self.fields.get("distill_logits") else None

    def config(self, recipe: TrainConfig, steps: int | None = None) -> TrainConfig:
        """A recipe with this run's rate, length and settings."""
        known = {f.name for f in dataclasses.fields(TrainConfig)}
        changes = {name: value for name, value in self.fields.items() if name in known}
        length = {} if steps is None else {"steps": steps, "epochs": None}
        return dataclasses.replace(recipe, lr=self.lr, seed=self.seed, autocast=self.autocast, **length, **changes)

    def experts(self) -> SparsifyConfig:
        """How ours makes the model sparse."""
        changes = {name: value for name, value in self.fields.items() if name in EXPERTS}
        return dataclasses.replace(recipes.EXPERTS["ours"], seed=self.seed, **changes)

    def of(self, *names: str) -> dict[str, Any]:
        """These of the settings, where they are given."""
        return {name: self.fields[name] for name in names if name in self.fields}

    def fit(
        self,
        trainer: Callable[..., list[dict[str, float]]],
        config: TrainConfig,
        *,
        hooks: bool = False,
        **options: Any,
    ) -> None:
        """Train, towards the fine-tuned dense model too if ``distill_logits`` is set, and note how it went.

        A trainer that works by ``hooks`` is not compiled; its batches are the same.
        """
        start = time.perf_counter()
        batches = self.data.batches(self.seed, one_shape=self.compile is not None)
        compiled = None if hooks else self.compile
        common = {"teacher": self.teacher, "compile": compiled or False, "progress": self.progress}
        with releasing(compiled, next(self.model.parameters()).device):
            history = trainer(self.model, batches, config, **common, **options)
        last = history[-max(1, len(history) // 10) :]
        means = {name: sum(record[name] for record in last) / len(last) for name in last[-1] if name != "step"}
        stage = {"config": config.to_dict(), "seconds": round(time.perf_counter() - start, 2), "last_tenth": means}
        self.stages.append({**stage, "compiled": compiled, "conversion_kept": self.kept})

    def convert(self, kind: str, how: Mapping[str, Any], change: Callable[[nn.Module], Any]) -> None:
        """Let ``change`` convert the model in place, which happens once for the same model, data and settings.

        Args:
            kind: of conversion, for the file's name.
            how: every setting of it, the seed included.
            change: converts.
        """
        if self.cache is None:
            change(self.model)
            return
        dense, device = self.model, next(self.model.parameters()).device

        def make() -> nn.Module:
            change(dense)
            return dense

        key = {"origin": dict(self.origin), "weights": digest_of_weights(dense), "how": dict(how)}
        made, self.kept = self.cache.get(kind, key, make)
        self.model = made.to(device)

    def calibrated(self) -> dict[str, Any]:
        """Arguments that every conversion takes."""
        return {"calibration": self.data.calibration(), "progress": self.progress}


@contextlib.contextmanager
def releasing(how: str | None, device: torch.device) -> Iterator[None]:
    """Afterwards the memory of CUDA graphs is free, if this mode of ``torch.compile`` records any."""
    try:
        yield
    finally:
        if how in RECORDING_MODES:
            release(device)


def digest_of_weights(model: nn.Module) -> str:
    """Of everything that a checkpoint of the model would hold, by name; the same on every device."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
