"""What the routed baselines share: a dense model becomes experts with another router and another selection rule.

A baseline is our own sparse layers with these two replaced, so that training, sparsity targets and records are the same
code for every method. It is there to be compared with. No checkpoint holds it: ``save_pretrained`` refuses.

Shapes: N calibration tokens, D hidden size, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from torch_prunepath.config import Gate, SparsifyConfig, check_tau
from torch_prunepath.conversion import densify, sparsify
from torch_prunepath.discover import Which
from torch_prunepath.inputs.data import Inputs, as_inputs, can_sample, sampled_inputs
from torch_prunepath.inputs.visit import visit_inputs
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.router import Router
from torch_prunepath.layer.saving import forbid_saving
from torch_prunepath.layer.sparse import SelectionRule
from torch_prunepath.layer.views import sparse_layers, sparse_views
from torch_prunepath.progress import progress_bar
from torch_prunepath.sparsity import set_sparsity, set_tau

CALIBRATION_TOKENS = 16384
"""Calibration tokens used, at most, unless the caller says otherwise."""

BuildRouter = Callable[[FFNView, Tensor | None], Router]
"""``(view, x_ND) -> router`` for an FFN whose neurons are in expert order; ``x_ND`` is None without data."""


class RoutedBaseline:
    """A baseline on a model. ``set_tau``, ``record_sparsity``, ``train`` … work on the model as on one of ours.

    Args:
        model: a model made by :func:`convert`.
        inputs: calibration data, for :meth:`set_sparsity`.
    """

    def __init__(self, model: nn.Module, inputs: Inputs | None) -> None:
        self.model, self._inputs = model, inputs

    @property
    def layers(self) -> dict[str, RoutedExperts]:
        """The sparse layers by name."""
        return sparse_layers(self.model)

    def set_sparsity(
        self, share: float, batches: Any = None, *, tokenizer: Any = None, progress: bool = False
    ) -> float:
        """Make this share of the neurons inactive, on average over ``batches``, and return the tau that does.

        Args:
            share: in [0, 1).
            batches: as for :func:`torch_prunepath.set_sparsity`; None: the calibration data.
            tokenizer: for texts.
            progress: show a progress bar.

        Raises:
            ValueError: as :func:`torch_prunepath.set_sparsity`; also if there are neither batches nor calibration data.
        """
        batches = self._inputs if batches is None else batches
        if batches is None:
            raise ValueError("there is no data to measure sparsity on: pass batches=")
        return set_sparsity(self.model, share, batches, tokenizer=tokenizer, progress=progress)

    def freeze_routers(self, frozen: bool = True) -> None:
        """Keep the routers out of training, or (with False) let them in again."""
        for layer in self.layers.values():
            layer.router.requires_grad_(not frozen)

    def set_gate(self, gate: Gate) -> None:
        """Weigh active experts' outputs by the sigmoid of their scores, or by one."""
        for layer in self.layers.values():
            layer.experts = dataclasses.replace(layer.experts, gate=gate)

    def remove(self) -> None:
        """Make the model dense again; its weights stay as they were trained."""
        densify(self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def calibration_inputs(
    model: nn.Module, calibration: Any, tokenizer: Any, tokens: int, seed: int, progress: bool
) -> Inputs:
    """Model inputs from whatever the caller has; text that the model writes itself where that is None.

    Raises:
        ValueError: if there is nothing and the model cannot write, or the data does not fit.
    """
    if calibration is None:
        if not can_sample(model):
            raise ValueError(f"{type(model).__name__} cannot write its own calibration text: pass calibration=")
        return sampled_inputs(model, tokens, seed, progress, tokenizer)
    return as_inputs(calibration, model, tokenizer, tokens)


def convert(
    model: nn.Module,
    expert_size: int,
    build: BuildRouter,
    rule: SelectionRule,
    inputs: Inputs | None = None,
    *,
    tau: float = 1.0,
    seed: int = 0,
    include: Which | None = None,
    exclude: Which | None = None,
    progress: bool = True,
) -> None:
    """Group each FFN's neurons by balanced k-means of their weights, and give it a router and a rule, in place.

    Afterwards every gate is 1, routers take part in no training, and ``save_pretrained`` refuses.

    Args:
        model: a dense model.
        expert_size: S.
        build: makes each layer's router.
        rule: selects.
        inputs: what the routers are built from, on the hidden states of the dense model.
        tau: in (0, 1]; 1 activates every expert.
        seed: of the clustering.
        include: the FFNs to take; None: all. As for :func:`torch_prunepath.sparsify`.
        exclude: which of these to leave out.
        progress: show progress bars.

    Raises:
        ValueError: as :func:`torch_prunepath.sparsify`. The model is as it was.
    """
    check_tau(tau)
    config = SparsifyConfig(expert_size=expert_size, partition="kmeans", router="zero", budget="uniform", seed=seed)
    sparsify(model, tau=1.0, config=config, include=include, exclude=exclude, progress=progress)
    try:
        routers = _build_all(model, build, inputs, progress)
        for name, layer in sparse_layers(model).items():
            layer.router = routers[name].to(layer.router.weight.dtype).requires_grad_(False)
            layer.selection = rule
    except BaseException:
        densify(model)
        raise
    refuse_saving(model, rule)
    set_tau(model, tau)


def refuse_saving(model: nn.Module, rule: SelectionRule) -> None:
    """Make ``save_pretrained`` of a model that selects by ``rule`` say that no checkpoint can hold it."""
    forbid_saving(
        model,
        f"this model selects experts by {rule.__name__}, which checkpoints cannot hold: keep model.state_dict(), and "
        "load it into a dense model that was converted by the same function of torch_prunepath.baselines; "
        "densify(model) makes this one a dense model that can be saved",
    )


def _build_all(model: nn.Module, build: BuildRouter, inputs: Inputs | None, progress: bool) -> dict[str, Router]:
    views = sparse_views(model)
    routers: dict[str, Router] = {}
    with progress_bar(total=len(views), desc="building routers", unit="layer", progress=progress) as bar:

        def visit(view: FFNView, x_ND: Tensor | None) -> None:
            routers[view.site] = build(view, x_ND)
            bar.update()

        if inputs is None:
            for view in views.values():
                visit(view, None)
        else:
            visit_inputs(model, list(views.values()), inputs, visit)
    return routers
