"""From a dense model fine-tuned on a task to a sparse one, by each method, with the same optimiser steps and data.

A method is a generator: it changes the model in place and yields a :class:`Ready` for each sparsity that the model
shall be measured at. What each trains on, and how long, is the same; what it does with it follows its source.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from torch_prunepath import SparsifyConfig, set_sparsity, sparsify
from torch_prunepath.baselines import d2dmoe, enforce_sparsity, lte, moefication, prune, train_dense
from torch_prunepath.baselines.pruning import Score
from torch_prunepath.config import check_choice
from torch_prunepath.train import TrainConfig, fixed_tau, hold, recipes, train

COMMON = ("weight_decay", "norm_lr", "warmup", "decay", "accumulation", "clip", "distill_logits", "temperature")
"""Fields that every method which trains has."""
CONTROLLED = (*COMMON, "expert_size", "control_rate")
SET_ELSEWHERE = {"steps", "epochs", "phases", "lr", "autocast", "seed"}
OURS = tuple(
    f.name for kind in (TrainConfig, SparsifyConfig) for f in dataclasses.fields(kind) if f.name not in SET_ELSEWHERE
)
EXPERTS = {f.name for f in dataclasses.fields(SparsifyConfig)} - {"seed"}


class Data(Protocol):
    """What methods see of a task."""

    def batches(self, seed: int) -> Any:
        """Training batches with labels, sized, in a new order at each pass."""

    def calibration(self) -> list[dict[str, Any]]:
        """Some training batches without labels."""


class _Nothing:
    """No data: enough to look at settings."""

    def batches(self, seed: int) -> Any:
        return []

    def calibration(self) -> list[dict[str, Any]]:
        return []


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
        model: dense and fine-tuned; changed in place.
        data: to train and calibrate on.
        sparsity: the targets.
        steps: optimiser steps that the method may take.
        lr: peak learning rate of the model's weights.
        seed: of everything random.
        fields: what the method's own settings are replaced by.
        autocast: train in bfloat16 autocast.
        progress: show progress bars.
        stages: what was trained, in order; filled in.
    """

    model: nn.Module
    data: Data
    sparsity: Sequence[float]
    steps: int
    lr: float
    seed: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    autocast: bool = False
    progress: bool = False
    stages: list[dict[str, Any]] = field(default_factory=list)

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
        return SparsifyConfig(seed=self.seed, **changes)

    def of(self, *names: str) -> dict[str, Any]:
        """These of the settings, where they are given."""
        return {name: self.fields[name] for name in names if name in self.fields}

    def fit(self, trainer: Callable[..., list[dict[str, float]]], config: TrainConfig, **options: Any) -> None:
        """Train, towards the fine-tuned dense model too if ``distill_logits`` is set, and note how it went."""
        start = time.perf_counter()
        batches = self.data.batches(self.seed)
        history = trainer(self.model, batches, config, teacher=self.teacher, progress=self.progress, **options)
        last = history[-max(1, len(history) // 10) :]
        means = {name: sum(record[name] for record in last) / len(last) for name in last[-1] if name != "step"}
        stage = {"config": config.to_dict(), "seconds": round(time.perf_counter() - start, 2), "last_tenth": means}
        self.stages.append(stage)

    def calibrated(self) -> dict[str, Any]:
        """Arguments that every conversion takes."""
        return {"calibration": self.data.calibration(), "progress": self.progress}


def fine_tuned(work: Work) -> Iterator[Ready]:
    """The dense model as it is."""
    yield Ready(0.0, removed=0.0)


def longer(work: Work) -> Iterator[Ready]:
    """The dense model, trained on for as long as the others are."""
    work.fit(train_dense, work.config(TrainConfig(steps=work.steps)))
    yield Ready(0.0, removed=0.0)


def ours(work: Work) -> Iterator[Ready]:
    """Routed experts, trained with the sparsity held at one target."""
    (target,) = work.sparsity
    sparsify(work.model, tau=1.0, config=work.experts(), **work.calibrated())
    work.fit(train, work.config(recipes.held(work.steps, target)))
    yield _at(work, target)


def ours_one(work: Work) -> Iterator[Ready]:
    """Routed experts, trained once for the whole range of targets."""
    sparsify(work.model, tau=1.0, config=work.experts(), **work.calibrated())
    low, high = min(work.sparsity), max(work.sparsity)
    work.fit(train, work.config(recipes.ours(work.steps, low, high)))
    for target in work.sparsity:
        yield _at(work, target)


def static(work: Work) -> Iterator[Ready]:
    """Neurons removed by their score, and the rest trained."""
    (target,) = work.sparsity
    pruned = prune(work.model, target, seed=work.seed, **work.of("score"), **work.calibrated())
    work.fit(train_dense, work.config(TrainConfig(steps=work.steps)))
    yield Ready(target, removed=pruned.sparsity)


def moefied(work: Work) -> Iterator[Ready]:
    """MoEfication with MLP routers: a fixed number of experts, the model trained around frozen routers."""
    (target,) = work.sparsity
    handle = moefication(work.model, router="mlp", seed=work.seed, **work.of("expert_size"), **work.calibrated())
    tau = handle.set_sparsity(target)
    work.fit(train, work.config(TrainConfig(steps=work.steps, phases=(fixed_tau(tau),))))
    yield Ready(target, tau=tau)


def dynamic_k(work: Work) -> Iterator[Ready]:
    """D2DMoE: sparser activations first, then routers for the experts' norms; what steps are left train the model.

    The paper stops once routers are fitted: ``first=1``.
    """
    (target,) = work.sparsity
    first = _first_stage(work)
    if first:
        config = work.config(TrainConfig(steps=first), first)
        penalty = {"weight": work.fields["hoyer"]} if "hoyer" in work.fields else {}
        work.fit(enforce_sparsity, config, **penalty)
    handle = d2dmoe(work.model, seed=work.seed, **work.of("expert_size"), **work.calibrated())
    if work.steps > first:
        rest = work.steps - first
        work.fit(train, work.config(TrainConfig(steps=rest, phases=(hold(target),)), rest))
    tau = handle.set_sparsity(target, work.data.calibration())
    yield Ready(target, tau=tau)


def learn_to_be_efficient(work: Work) -> Iterator[Ready]:
    """LTE in its two stages; in the second, its threshold is moved to hold the target."""
    (target,) = work.sparsity
    given = {"router_lr": work.lr, **work.of("eta", "first", "router_lr")}
    first, second = recipes.lte_stages(work.steps, lr=work.lr, **given)
    handle = lte(work.model, seed=work.seed, progress=work.progress, **work.of("expert_size"))
    work.fit(train, work.config(first))
    handle.start_second_stage()
    work.fit(train, work.config(dataclasses.replace(second, phases=(hold(target),))))
    tau = handle.set_sparsity(target, work.data.calibration())
    yield Ready(target, tau=tau)


def _at(work: Work, target: float) -> Ready:
    return Ready(target, tau=set_sparsity(work.model, target, work.data.calibration(), progress=work.progress))


def _first_stage(work: Work) -> int:
    share = work.fields.get("first", 0.5)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"first={share} is outside [0, 1]: it is the first stage's share of the steps")
    return round(share * work.steps)


@dataclass(frozen=True)
class Method:
    """How a method is run.

    Attributes:
        run: see the head of this file.
        fields: settings it has.
        one_run: one run serves every target; otherwise each target has its own.
        dense: it has no sparsity.
        trains: it takes optimiser steps.
    """

    run: Callable[[Work], Iterator[Ready]]
    fields: tuple[str, ...] = COMMON
    one_run: bool = False
    dense: bool = False
    trains: bool = True


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "dense": Method(fine_tuned, (), dense=True, trains=False),
        "dense-longer": Method(longer, dense=True),
        "ours": Method(ours, OURS),
        "ours-one": Method(ours_one, OURS, one_run=True),
        "static": Method(static, (*COMMON, "score")),
        "moefication": Method(moefied, (*COMMON, "expert_size")),
        "d2dmoe": Method(dynamic_k, (*CONTROLLED, "hoyer", "first")),
        "lte": Method(learn_to_be_efficient, (*CONTROLLED, "eta", "first", "router_lr")),
    }
)
"""The methods by name."""


def check(method: str, fields: Mapping[str, Any], steps: int, lr: float) -> None:
    """Refuse settings before anything heavy runs.

    Raises:
        ValueError: with a remedy.
    """
    work = Work(nn.Identity(), _Nothing(), (0.5,), steps, lr, 0, fields)
    work.config(TrainConfig(steps=1))
    if METHODS[method].run in (ours, ours_one):
        work.experts()
    if method == "lte":
        recipes.lte_stages(steps, lr=lr, **{"router_lr": lr, **work.of("eta", "first", "router_lr")})
    if method == "d2dmoe":
        _first_stage(work)
    if method == "static":
        check_choice("score", fields.get("score", "norm"), Score)
