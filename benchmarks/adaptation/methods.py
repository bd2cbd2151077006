"""How each method makes a dense model sparse and trains it, all with the same tokens, loop and learning rates.

What a method's authors publish is its default here, apart from the learning rate, which comes from the same grid for
all, and the number of steps. ``--set`` changes fields of ``TrainConfig``, and of the method's own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.adaptation.job import Adapted, Job, Run
from benchmarks.adaptation.measure import Constant, ShareKnob, TauKnob, ThresholdKnob
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
from torch_prunepath.baselines.sigmoid import PUBLISHED_TAU
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.integrations.peft import PrunePathConfig
from torch_prunepath.train import Phase, TrainConfig, draw, fixed_tau, hold, recipes, train

TRAIN_FIELDS = frozenset(field.name for field in dataclasses.fields(TrainConfig)) - {
    *("steps", "epochs", "lr", "seed", "autocast")
}
SPARSIFY_FIELDS = frozenset(field.name for field in dataclasses.fields(SparsifyConfig)) - {"seed", "calibration_tokens"}
RANGE = frozenset({"low", "high", "log"})
TARGET = "target"
"""Inside ``phases``: the sparsity that a run is trained for."""


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        title: in tables.
        adapt: converts and trains.
        own: names of its settings besides those of ``TrainConfig``.
        per_sparsity: whether each sparsity needs a run of its own.
    """

    title: str
    adapt: Callable[[Job], Adapted]
    own: frozenset[str] = frozenset()
    per_sparsity: bool = False

    @property
    def fields(self) -> frozenset[str]:
        """What ``--set`` may change."""
        return TRAIN_FIELDS | self.own


def check(run: Run) -> None:
    """Refuse settings before anything is trained.

    Raises:
        UserError: if a value is refused.
    """
    _changed(run, TrainConfig(steps=1))
    with as_user_error(ValueError, TypeError):
        SparsifyConfig(**run.pick(SPARSIFY_FIELDS))


def _changed(run: Run, base: TrainConfig) -> TrainConfig:
    """A recipe with the run's settings."""
    with as_user_error(ValueError, TypeError):
        fields = run.pick(TRAIN_FIELDS)
        if "phases" in fields:
            made = [Phase(*(run.sparsity if value == TARGET else value for value in p)) for p in fields["phases"]]
            fields["phases"] = tuple(made)
        return dataclasses.replace(base, **fields)


def _stage(job: Job, base: TrainConfig) -> TrainConfig:
    """A recipe as this run trains it."""
    return _changed(job.run, job.common(base))


def _tau_knob(job: Job, model: Any) -> TauKnob:
    return TauKnob(model, job.material.settings.eval_rows)


def _calibration(job: Job) -> Any:
    return job.material.calibration_NC.to(job.material.settings.device)


def _plain(job: Job, steps: int | None = None) -> TrainConfig:
    """The task alone."""
    return _stage(job, TrainConfig(steps=job.steps if steps is None else steps))


# --- dense and static -------------------------------------------------------------------------------------------------


def _dense(job: Job) -> Adapted:
    """Trained once for the methods that begin with it."""
    return Adapted(job.trained_once(_plain(job), train_dense), Constant(0.0))


def _static(job: Job, score: Any) -> Adapted:
    model = job.material.dense()
    assert job.run.sparsity is not None
    data = {"calibration": _calibration(job), "tokens": job.material.settings.calibration_tokens}
    pruned = prune(model, job.run.sparsity, score=score, progress=False, **data)
    job.train(model, _plain(job), train_dense)
    return Adapted(model, Constant(pruned.sparsity))


def _thresholds(job: Job, make: Any) -> Adapted:
    model = _dense(job).model
    data = {"calibration": _calibration(job), "tokens": job.material.settings.calibration_tokens}
    first = job.material.settings.sparsities[0]
    handle = make(model, first, seed=job.run.seed, progress=False, **data, **job.run.pick(["allocation"]))
    return Adapted(model, ThresholdKnob(handle))


# --- this library's -------------------------------------------------------------------------------------------------


def _sparsified(job: Job, base: SparsifyConfig) -> Any:
    with as_user_error(ValueError, TypeError):
        tokens = {"calibration_tokens": job.material.settings.calibration_tokens}
        config = dataclasses.replace(base, seed=job.run.seed, **{**tokens, **job.run.pick(SPARSIFY_FIELDS)})
    data = _calibration(job) if config.needs_data else None
    return job.converted(
        "sparsified",
        dataclasses.asdict(config),
        lambda model: sparsify(model, tau=1.0, config=config, calibration=data, progress=False),
    )


def _ours(job: Job) -> Adapted:
    config = _stage(job, recipes.ours(job.steps, **job.run.pick(RANGE)))
    model = _sparsified(job, recipes.EXPERTS["ours"])
    job.train(model, config)
    return Adapted(model, _tau_knob(job, model))


def _held(job: Job) -> Adapted:
    assert job.run.sparsity is not None
    config = _stage(job, recipes.held(job.steps, job.run.sparsity))
    model = _sparsified(job, recipes.EXPERTS["held"])
    job.train(model, config)
    return Adapted(model, _tau_knob(job, model))


def _released(job: Job) -> Adapted:
    experts, stages = released_prunepath(**job.run.pick(["tau"]))
    config = _stage(job, dataclasses.replace(stages, steps=job.steps, epochs=None))
    model = _sparsified(job, experts)
    job.train(model, config)
    tau = job.run.settings.get("tau", inspect.signature(released_prunepath).parameters["tau"].default)
    return Adapted(model, _tau_knob(job, model), {"as trained": tau})


def _adapters(job: Job, rank: int) -> Adapted:
    """Routers as an adapter, and LoRA on every projection if ``rank`` is not 0; the model's own weights stay."""
    dense = job.material.dense()
    projections = _linear_names(dense)
    tokens = job.material.settings.calibration_tokens
    data = {"calibration": _calibration(job), "calibration_tokens": tokens, "seed": job.run.seed}
    with as_user_error(ValueError, TypeError):
        settings = PrunePathConfig(
            task_type="CAUSAL_LM", tau=1.0, router_loss=0.0, **data, **job.run.pick(SPARSIFY_FIELDS)
        )
    model = get_peft_model(dense, settings)
    config = _stage(job, recipes.ours(job.steps, **job.run.pick(RANGE)))
    if rank:
        lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=projections)
        beside = get_peft_model(model.get_base_model(), lora)
        job.train(model, config)
        beside.merge_and_unload()
    else:
        job.train(model, dataclasses.replace(config, task=0.0))  # its gradient would reach nothing that is trained
    sparse = model.merge_and_unload()
    return Adapted(sparse, _tau_knob(job, sparse))


def _linear_names(model: Any) -> list[str]:
    """Last parts of the names of linear modules, without the head."""
    head = model.get_output_embeddings()
    linear = (name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def _lora(job: Job) -> Adapted:
    return _adapters(job, job.run.settings.get("rank", 16))


# --- other routed methods ---------------------------------------------------------------------------------------------

MOEFICATION = frozenset({"expert_size", "epochs"})
LTE_FIELDS = frozenset({"expert_size", "eta", "first"})
D2DMOE = frozenset({"expert_size", "width", "epochs", "router_fit_lr", "hoyer", "first"})


def _moefication(job: Job, router: Any) -> Adapted:
    assert job.run.sparsity is not None
    how = {"router": router, "seed": job.run.seed, **job.run.pick(MOEFICATION)}
    tokens = job.material.settings.calibration_tokens
    data = _calibration(job) if router == "mlp" else None
    model = job.converted(
        "moefication", how, lambda dense: moefication(dense, data, tokens=tokens, progress=False, **how)
    )
    config = TrainConfig(steps=job.steps, phases=(fixed_tau(1.0 - job.run.sparsity),))
    job.train(model, _stage(job, config))
    return Adapted(model, ShareKnob(model, job.material.settings.eval_rows))


def _lte(job: Job) -> Adapted:
    """With a sparsity to train for, the second stage moves the threshold to hold it; else ``eta`` decides."""
    held = job.run.sparsity is not None
    how = {"seed": job.run.seed, **job.run.pick(["expert_size"])}
    with as_user_error(ValueError, TypeError):
        stages = recipes.lte_stages(job.steps, router_lr=job.run.lr, **job.run.pick(["eta", "first"]))
    if held:
        stages = (stages[0], dataclasses.replace(stages[1], phases=(hold(job.run.sparsity),)))
    first, second = (_stage(job, stage) for stage in stages)
    model = job.converted("lte", how, lambda dense: lte(dense, progress=False, **how))
    handle = LTE(model, None)
    handle.start_first_stage()
    job.train(model, first)
    handle.start_second_stage()
    if not job.cut:
        job.train(model, second)
    return Adapted(model, _tau_knob(job, model), {} if held else {"as published": PUBLISHED_TAU})


def _d2dmoe(job: Job, rule: Any) -> Adapted:
    """Sparser activations first, then routers. ``first`` below 1 leaves steps to train what was converted."""
    settings = job.run.settings
    share = settings.get("first", 1.0)
    if not 0.0 <= share <= 1.0:
        raise UserError(f"--set first={share} is outside [0, 1]: it is a share of the steps")
    before = round(share * job.steps)
    model = job.material.dense()
    if before:
        sparser = functools.partial(enforce_sparsity, weight=settings.get("hoyer", 1e-3))
        job.train(model, _plain(job, before), sparser, hooks=True)
    lr = {"lr": settings["router_fit_lr"]} if "router_fit_lr" in settings else {}
    how = {**job.run.pick(["expert_size", "width", "epochs"]), **lr, "seed": job.run.seed}
    tokens = job.material.settings.calibration_tokens
    d2dmoe(model, _calibration(job), rule=rule, tokens=tokens, progress=False, **how)
    if before < job.steps and not job.cut:
        phases = (draw(min(job.material.settings.sparsities), max(job.material.settings.sparsities)),)
        job.train(model, _stage(job, TrainConfig(steps=job.steps - before, phases=phases)), train)
    return Adapted(model, _tau_knob(job, model))


_SCORES = {score: functools.partial(_static, score=score) for score in ("norm", "rms", "wanda")}

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "dense": Method("dense, fine-tuned", _dense),
        "ours": Method("ours, one checkpoint", _ours, SPARSIFY_FIELDS | RANGE),
        "held": Method("ours, held", _held, SPARSIFY_FIELDS, per_sparsity=True),
        "routers": Method("routers alone", functools.partial(_adapters, rank=0), SPARSIFY_FIELDS | RANGE),
        "lora": Method("routers and LoRA", _lora, SPARSIFY_FIELDS | RANGE | {"rank"}),
        **{f"static-{score}": Method(f"static, {score}", adapt, per_sparsity=True) for score, adapt in _SCORES.items()},
        "moefication-mlp": Method(
            "MoEfication, MLP", functools.partial(_moefication, router="mlp"), MOEFICATION, per_sparsity=True
        ),
        "moefication-centroid": Method(
            "MoEfication, centroid",
            functools.partial(_moefication, router="centroid"),
            MOEFICATION,
            per_sparsity=True,
        ),
        "lte": Method("LTE", _lte, LTE_FIELDS),
        "lte-held": Method("LTE, threshold held", _lte, LTE_FIELDS, per_sparsity=True),
        "d2dmoe-max": Method("D2DMoE, max", functools.partial(_d2dmoe, rule="max"), D2DMOE),
        "d2dmoe-cumulative": Method("D2DMoE, cumulative", functools.partial(_d2dmoe, rule="cumulative"), D2DMOE),
        "prunepath": Method("PrunePath, as released", _released, SPARSIFY_FIELDS | {"tau"}),
        "cats": Method("CATS (single neurons)", functools.partial(_thresholds, make=cats)),
        "teal": Method("TEAL (matrix inputs)", functools.partial(_thresholds, make=teal), frozenset({"allocation"})),
    }
)
"""Every method by name."""
