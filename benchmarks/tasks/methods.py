"""From a dense model fine-tuned on a task to a sparse one, by each method, with the same optimiser steps and data.

A method is a generator: it changes its :class:`Work`'s model and yields a :class:`Ready` for each sparsity that the
model shall be measured at. What each trains on, and how long, is the same; what it does with it follows its source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from benchmarks.tasks.work import Ready, Work
from torch_prunepath import SparsifyConfig, set_sparsity, sparsify
from torch_prunepath.baselines import LTE, MoEfication, d2dmoe, enforce_sparsity, lte, moefication, prune, train_dense
from torch_prunepath.baselines.pruning import Score
from torch_prunepath.config import check_choice
from torch_prunepath.train import TrainConfig, fixed_tau, hold, recipes, train
from torch_prunepath.train.compiling import check_compilable

COMMON = ("weight_decay", "norm_lr", "warmup", "decay", "accumulation", "clip", "task", "distill_logits", "temperature")
"""Fields that every method which trains has."""
CONTROLLED = (*COMMON, "expert_size", "control_rate")
SET_ELSEWHERE = {"steps", "epochs", "phases", "lr", "autocast", "seed"}
OURS = tuple(
    f.name for kind in (TrainConfig, SparsifyConfig) for f in dataclasses.fields(kind) if f.name not in SET_ELSEWHERE
)


class _Nothing:
    """No data: enough to look at settings."""

    def batches(self, seed: int, one_shape: bool = False) -> Any:
        return []

    def calibration(self) -> list[dict[str, Any]]:
        return []


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
    _sparsified(work)
    work.fit(train, work.config(recipes.held(work.steps, target)))
    yield _at(work, target)


def ours_one(work: Work) -> Iterator[Ready]:
    """Routed experts, trained once for the whole range of targets."""
    _sparsified(work)
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
    how = {"router": "mlp", "seed": work.seed, **work.of("expert_size")}
    work.convert("moefication", how, lambda model: moefication(model, **how, **work.calibrated()))
    tau = MoEfication(work.model, None).set_sparsity(target)
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
        work.fit(enforce_sparsity, config, hooks=True, **penalty)
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
    how = {"seed": work.seed, **work.of("expert_size")}
    work.convert("lte", how, lambda model: lte(model, progress=work.progress, **how))
    handle = LTE(work.model, None)
    handle.start_first_stage()
    work.fit(train, work.config(first))
    handle.start_second_stage()
    work.fit(train, work.config(dataclasses.replace(second, phases=(hold(target),))))
    tau = handle.set_sparsity(target, work.data.calibration())
    yield Ready(target, tau=tau)


def _sparsified(work: Work) -> None:
    config = work.experts()
    how = dataclasses.asdict(config)
    work.convert("sparsified", how, lambda model: sparsify(model, tau=1.0, config=config, **work.calibrated()))


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


def check(method: str, fields: Mapping[str, Any], steps: int, lr: float, compile: str | None = None) -> None:
    """Refuse settings before anything heavy runs.

    Raises:
        ValueError: with a remedy.
    """
    work = Work(nn.Identity(), _Nothing(), (0.5,), steps, lr, 0, fields)
    config = work.config(TrainConfig(steps=1))
    if compile is not None:
        check_compilable(work.model, config)
    if METHODS[method].run in (ours, ours_one):
        work.experts()
    if method == "lte":
        recipes.lte_stages(steps, lr=lr, **{"router_lr": lr, **work.of("eta", "first", "router_lr")})
    if method == "d2dmoe":
        _first_stage(work)
    if method == "static":
        check_choice("score", fields.get("score", "norm"), Score)
