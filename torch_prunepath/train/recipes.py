"""Named training configurations. Each returns a :class:`TrainConfig`; change fields with ``dataclasses.replace``.

Choices that are made when the model is made sparse (experts, router initialisation, gate) belong to
:class:`torch_prunepath.SparsifyConfig`; ``EXPERTS`` has the one that goes with each recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch_prunepath.config import SparsifyConfig
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.schedule import all_experts, draw, fixed_tau, hold, ramp


def paper(epochs: float = 1.0, tau: float = 0.95) -> TrainConfig:
    """PrunePath (arXiv 2605.28283) as its released code trains, with task loss, entropy and load balance.

    It has two stages of ``epochs`` each: with every expert active, then at ``tau`` (released: 0.95 or 0.5), whatever
    sparsity comes of it. Warm-up and decay of the learning rate are this library's defaults.
    """
    return TrainConfig(
        epochs=2 * epochs,
        phases=(all_experts(), fixed_tau(tau)),
        lr=1e-4,
        router_lr=1e-3,
        weight_decay=1e-2,
        entropy=3e-4,
        load_balance=1e-3,
    )


def ours(steps: int, low: float = 0.5, high: float = 0.95, distil: float = 0.0, log: bool = False) -> TrainConfig:
    """Training of one checkpoint for every sparsity from ``low`` to ``high``: a target is drawn for each step.

    In the first twentieth of the steps the target goes from 0 (every expert active) to the middle of the range: slower
    ramps cost quality. As the weights change, the routers are fitted to what their experts contribute
    (``contribution_fit``). With ``distil=1``, which needs a teacher, the dense model's logits are a second target,
    which is worth 2 to 6% of perplexity. ``log`` draws more of the high targets, see :class:`Phase`. The recipe goes
    with ``EXPERTS["ours"]`` and is measured in ``benchmarks/results/adaptation-h200.md``.
    """
    return TrainConfig(
        steps=steps,
        phases=(ramp(0.0, (low + high) / 2, share=1.0), draw(low, high, share=19.0, log=log)),
        lr=1e-3,
        router_lr=1e-3,
        contribution_fit=0.1,
        distill_logits=distil,
    )


def held(steps: int, sparsity: float, distil: float = 0.0) -> TrainConfig:
    """Training as in :func:`ours`, but for one sparsity: a ramp over the first twentieth of the steps, then held.

    At half the learning rate and 80% sparsity, perplexity is 6% worse on text like the training text, and the model
    forgets less of other text. Both were measured on a model of 135 million parameters; larger models usually need
    lower learning rates.
    """
    return TrainConfig(
        steps=steps,
        phases=(ramp(0.0, sparsity, share=1.0), hold(sparsity, share=19.0)),
        lr=1e-3,
        router_lr=1e-3,
        contribution_fit=0.1,
        distill_logits=distil,
    )


def lte_stages(
    steps: int, eta: float = 1.0, first: float = 0.5, lr: float = 5e-5, router_lr: float = 5e-5
) -> tuple[TrainConfig, TrainConfig]:
    """The two stages of LTE (arXiv 2402.06126), for a model that :func:`torch_prunepath.baselines.lte` made.

    In the first, every expert is active and weighed by its sigmoid, and the separation loss is on. In the second, the
    routers are frozen and the experts above 0.5 are active (tau 0.5 there). A larger ``eta`` gives a sparser model.
    Call ``start_second_stage()`` in between.

    Args:
        steps: steps of both stages together.
        eta: weight of the efficiency loss within :func:`torch_prunepath.train.losses.lte_separation`.
        first: share of the steps that the first stage takes.
        lr: learning rate of the model's weights; the paper's is 5e-5 for GPT-2 Medium.
        router_lr: learning rate of the routers, in the first stage.

    Raises:
        ValueError: if one of the stages would have no step.
    """
    if steps < 2 or not 0.0 < first < 1.0:
        raise ValueError(f"steps={steps}, first={first}: both stages need a step, so steps >= 2 and 0 < first < 1")
    begin = min(max(1, round(first * steps)), steps - 1)
    common = TrainConfig(steps=begin, phases=(all_experts(),), lr=lr, router_lr=router_lr, warmup=0.06, decay="linear")
    return (
        dataclasses.replace(common, lte_separation=1.0, separation_eta=eta),
        dataclasses.replace(common, steps=steps - begin, phases=(fixed_tau(0.5),)),
    )


ALWAYS_ACTIVE = 0.05
"""Share of the experts that ``ours`` and ``held`` always keep active, half of those that 90% sparsity leaves. For one
checkpoint it is better than none at every sparsity, and 8% is worse (docs/log.md, "one checkpoint for every sparsity,
GLUE and E2E")."""

EXPERTS: Mapping[str, SparsifyConfig] = MappingProxyType(
    {
        "ours": SparsifyConfig(shared_experts=ALWAYS_ACTIVE),
        "held": SparsifyConfig(shared_experts=ALWAYS_ACTIVE),
        "paper": SparsifyConfig(
            expert_size=32, partition="kmeans", router="zero", rule="below", gate="sigmoid", budget="uniform"
        ),
    }
)
"""Settings with which a dense model is made sparse for each recipe, by the recipe's name."""

RECIPES: Mapping[str, Callable[..., TrainConfig]] = MappingProxyType({"paper": paper, "ours": ours, "held": held})
"""The recipes of ``prunepath train`` by name."""
