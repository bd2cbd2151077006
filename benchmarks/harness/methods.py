"""How each method makes a model sparse and trains it, all with the same steps, data and learning rates.

What a method's authors publish is its default here, apart from the learning rate, which comes from the same grid for
all, and the number of steps. ``--set`` changes fields of ``TrainConfig``, and of the method's own. Methods have the
names of the recipes: ``ours`` is one checkpoint for a range of sparsities, ``held`` a run for each.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

from torch import nn

from benchmarks.harness.knobs import Constant, ShareKnob, TauKnob, ThresholdKnob
from benchmarks.harness.task import Task, Trained
from benchmarks.harness.work import TRAIN_FIELDS, Work
from torch_prunepath import SparsifyConfig, sparsify
from torch_prunepath.baselines import (
    LTE,
    cats,
    d2dmoe,
    enforce_sparsity,
    lte,
    moefication,
    prune,
    released_prunepath,
    teal,
    train_dense,
)
from torch_prunepath.baselines.pruning import Score
from torch_prunepath.baselines.sigmoid import PUBLISHED_TAU
from torch_prunepath.baselines.top_k import MoEficationRouter
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.train import TrainConfig, draw, fixed_tau, hold, recipes
from torch_prunepath.train.compiling import check_compilable

SPARSIFY_FIELDS = frozenset(field.name for field in dataclasses.fields(SparsifyConfig)) - {"seed", "calibration_tokens"}
RANGE = frozenset({"low", "high", "log"})
MOEFICATION = frozenset({"expert_size", "epochs"})
LTE_FIELDS = frozenset({"expert_size", "eta", "first"})
D2DMOE = frozenset({"expert_size", "width", "epochs", "router_fit_lr", "hoyer", "first"})


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        title: in tables.
        train: converts and trains.
        own: names of its settings besides those of ``TrainConfig``.
        each: whether each sparsity needs a run of its own.
        dense: whether it has no sparsity at all.
        tuned: whether only tasks whose methods begin with a fine-tuned model have it.
        causal: whether only causal language models have it.
    """

    title: str
    train: Callable[[Work], Trained]
    own: frozenset[str] = frozenset()
    each: bool = False
    dense: bool = False
    tuned: bool = False
    causal: bool = False

    @property
    def fields(self) -> frozenset[str]:
        """What ``--set`` may change."""
        return TRAIN_FIELDS | self.own

    def fits(self, task: type[Task] | Task) -> bool:
        """Whether a task has this method."""
        return (task.tuned or not self.tuned) and (task.causal or not self.causal)


# --- dense and static -------------------------------------------------------------------------------------------------


def _dense(work: Work) -> Trained:
    """Trained once for the methods that begin with it."""
    work.fit_dense_once()
    return Trained(work.model, Constant(0.0))


def _static(work: Work, score: Score) -> Trained:
    pruned = prune(work.model, work.target, score=score, seed=work.job.seed, **work.calibrated())
    work.fit(work.plain(), train_dense)
    return Trained(work.model, Constant(pruned.sparsity))


def _thresholds(work: Work, make: Callable[..., Any]) -> Trained:
    work.fit_dense_once()
    given = {"seed": work.job.seed, **work.calibrated(), **work.pick(["allocation"])}
    return Trained(work.model, ThresholdKnob(make(work.model, work.job.sparsity[0], **given)))


# --- this library's ---------------------------------------------------------------------------------------------------


def _sparsified(work: Work, base: SparsifyConfig) -> None:
    config = _experts(work, base)
    data = {"calibration": work.calibration if config.needs_data else None, "progress": work.progress}
    work.convert(
        "sparsified", dataclasses.asdict(config), lambda model: sparsify(model, tau=1.0, config=config, **data)
    )


def _experts(work: Work, base: SparsifyConfig) -> SparsifyConfig:
    with as_user_error(ValueError, TypeError):
        same = {"seed": work.job.seed, "calibration_tokens": work.task.calibration_tokens}
        return dataclasses.replace(base, **{**same, **work.pick(SPARSIFY_FIELDS)})


def _ours(work: Work) -> Trained:
    config = _range(work)
    _sparsified(work, recipes.EXPERTS["ours"])
    work.fit(config)
    return Trained(work.model, TauKnob(work.model))


def _range(work: Work) -> TrainConfig:
    with as_user_error(ValueError, TypeError):
        return work.config(recipes.ours(work.steps, **work.pick(RANGE)))


def _held(work: Work) -> Trained:
    config = work.config(recipes.held(work.steps, work.target))
    _sparsified(work, recipes.EXPERTS["held"])
    work.fit(config)
    return Trained(work.model, TauKnob(work.model))


def _prunepath(work: Work) -> Trained:
    experts, stages = released_prunepath(**work.pick(["tau"]))
    config = work.config(dataclasses.replace(stages, steps=work.steps, epochs=None))
    _sparsified(work, experts)
    work.fit(config)
    tau = work.job.settings.get("tau", inspect.signature(released_prunepath).parameters["tau"].default)
    return Trained(work.model, TauKnob(work.model), {"as trained": tau})


def _routers(work: Work) -> Trained:
    return _adapters(work, 0)


def _lora(work: Work) -> Trained:
    return _adapters(work, work.job.settings.get("rank", 16))


def _adapters(work: Work, rank: int) -> Trained:
    """Routers as an adapter, and LoRA on every projection if ``rank`` is not 0; the model's own weights stay."""
    from peft import LoraConfig, get_peft_model

    from torch_prunepath.integrations.peft import PrunePathConfig

    projections = _linear_names(work.model)
    data = {"calibration": work.calibration, "calibration_tokens": work.task.calibration_tokens, "seed": work.job.seed}
    with as_user_error(ValueError, TypeError):
        settings = PrunePathConfig(
            task_type="CAUSAL_LM", tau=1.0, router_loss=0.0, **data, **work.pick(SPARSIFY_FIELDS)
        )
    model = get_peft_model(work.model, settings)
    config = _range(work)
    work.model = model
    if rank:
        lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=projections)
        beside = get_peft_model(model.get_base_model(), lora)
        work.fit(config)
        beside.merge_and_unload()
    else:
        work.fit(dataclasses.replace(config, task=0.0))  # its gradient would reach nothing that is trained
    work.model = model.merge_and_unload()
    return Trained(work.model, TauKnob(work.model))


def _linear_names(model: Any) -> list[str]:
    """Last parts of the names of linear modules, without the head."""
    head = model.get_output_embeddings()
    linear = (name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


# --- other routed methods ---------------------------------------------------------------------------------------------


def _moefication(work: Work, router: MoEficationRouter) -> Trained:
    how = {"router": router, "seed": work.job.seed, **work.pick(MOEFICATION)}
    given = work.calibrated() if router == "mlp" else {"progress": work.progress}
    work.convert("moefication", how, lambda dense: moefication(dense, **given, **how))
    work.fit(work.config(TrainConfig(steps=work.steps, phases=(fixed_tau(1.0 - work.target),))))
    return Trained(work.model, ShareKnob(work.model))


def _lte(work: Work, held: bool) -> Trained:
    """If a sparsity is held, the second stage moves the threshold to do so; else ``eta`` decides."""
    first, second = _lte_stages(work)
    if held:
        second = dataclasses.replace(second, phases=(hold(work.target),))
    how = {"seed": work.job.seed, **work.pick(["expert_size"])}
    work.convert("lte", how, lambda dense: lte(dense, progress=work.progress, **how))
    handle = LTE(work.model, None)
    handle.start_first_stage()
    work.fit(work.config(first))
    handle.start_second_stage()
    work.fit(work.config(second))
    return Trained(work.model, TauKnob(work.model), {} if held else {"as published": PUBLISHED_TAU})


def _lte_stages(work: Work) -> tuple[TrainConfig, TrainConfig]:
    with as_user_error(ValueError, TypeError):
        return recipes.lte_stages(work.steps, router_lr=work.job.lr, **work.pick(["eta", "first"]))


def _d2dmoe(work: Work, rule: Any, first: float = 1.0) -> Trained:
    """Sparser activations first, for this share of the steps, then routers; the rest trains what was converted."""
    settings = work.job.settings
    before = _first_steps(work, first)
    if before:
        sparser = functools.partial(enforce_sparsity, **({"weight": settings["hoyer"]} if "hoyer" in settings else {}))
        work.fit(work.plain(before), sparser, hooks=True)
    lr = {"lr": settings["router_fit_lr"]} if "router_fit_lr" in settings else {}
    how = {**work.pick(["expert_size", "width", "epochs"]), **lr, "seed": work.job.seed}
    d2dmoe(work.model, rule=rule, **work.calibrated(), **how)
    if before < work.steps:
        shares = work.job.sparsity
        phase = hold(shares[0]) if len(shares) == 1 else draw(min(shares), max(shares))
        work.fit(work.config(TrainConfig(steps=work.steps - before, phases=(phase,))))
    return Trained(work.model, TauKnob(work.model))


def _first_steps(work: Work, first: float) -> int:
    share = work.job.settings.get("first", first)
    if not 0.0 <= share <= 1.0:
        raise UserError(f"--set first={share} is outside [0, 1]: it is the first stage's share of the steps")
    return round(share * work.steps)


# --- the methods ------------------------------------------------------------------------------------------------------

_part = functools.partial
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "dense": Method("dense, fine-tuned", _dense, dense=True),
        "dense-longer": Method("dense, trained for longer", _dense, dense=True, tuned=True),
        "ours": Method("ours, one checkpoint", _ours, SPARSIFY_FIELDS | RANGE),
        "held": Method("ours, held", _held, SPARSIFY_FIELDS, each=True),
        "routers": Method("routers alone", _routers, SPARSIFY_FIELDS | RANGE, causal=True),
        "lora": Method("routers and LoRA", _lora, SPARSIFY_FIELDS | RANGE | {"rank"}, causal=True),
        **{
            f"static-{score}": Method(f"static, {score}", _part(_static, score=score), each=True)
            for score in get_args(Score)
        },
        "moefication-mlp": Method("MoEfication, MLP", _part(_moefication, router="mlp"), MOEFICATION, each=True),
        "moefication-centroid": Method(
            "MoEfication, centroid", _part(_moefication, router="centroid"), MOEFICATION, each=True
        ),
        "lte": Method("LTE", _part(_lte, held=False), LTE_FIELDS),
        "lte-held": Method("LTE, threshold held", _part(_lte, held=True), LTE_FIELDS, each=True),
        "d2dmoe-max": Method("D2DMoE, max", _part(_d2dmoe, rule="max"), D2DMOE),
        "d2dmoe-cumulative": Method("D2DMoE, cumulative", _part(_d2dmoe, rule="cumulative"), D2DMOE),
        "d2dmoe-held": Method("D2DMoE, max, then held", _part(_d2dmoe, rule="max", first=0.5), D2DMOE, each=True),
        "prunepath": Method("PrunePath, as released", _prunepath, SPARSIFY_FIELDS | {"tau"}),
        "cats": Method("CATS (single neurons)", _part(_thresholds, make=cats)),
        "teal": Method("TEAL (matrix inputs)", _part(_thresholds, make=teal), frozenset({"allocation"})),
    }
)
"""Every method by name."""


def check(work: Work) -> None:
    """Refuse a job's settings before anything heavy runs.

    Args:
        work: the job with any model.

    Raises:
        UserError: if a setting is refused.
    """
    name = work.job.method
    config = work.plain(steps=1)
    with as_user_error(ValueError, TypeError):
        if work.job.compile is not None:
            check_compilable(work.model, config)
        SparsifyConfig(**work.pick(SPARSIFY_FIELDS))
    if METHODS[name].own >= RANGE:
        _range(work)
    if name.startswith("lte"):
        _lte_stages(work)
    if name.startswith("d2dmoe"):
        _first_steps(work, 1.0)
