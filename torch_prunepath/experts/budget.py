"""How much router mass each layer can give up: budgets from the loss's curvature at each FFN's output.

Dropping experts changes an FFN's output by delta. To second order this costs ``1/2 delta^T F delta`` of KL divergence
from the dense model, with F the Fisher information of that output: the second moment of the loss gradient there, for
labels drawn from the model itself. One backward pass gives F for every layer; what a layer then costs at each sparsity
needs no model. Layers are given the sparsity at which the next neuron costs the same everywhere.

Shapes: N tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torch_prunepath.config import Rule
from torch_prunepath.inputs.data import Inputs, evaluation_mode
from torch_prunepath.inputs.padding import PaddingTracker
from torch_prunepath.inputs.visit import quiet, removing
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.ops.experts import expand_experts
from torch_prunepath.select import mask_from_scores

FISHER_TOKENS = 4096
"""Calibration tokens that are differentiated through, at most."""

CURVE_TOKENS = 2048
"""Calibration tokens on which the cost of dropping experts is read off, at most."""

GIVEN_UP = (0.003, 0.006, 0.012, 0.02, 0.035, 0.06, 0.1, 0.15, 0.22, 0.32, 0.45, 0.6, 0.75)
"""Values of ``1 - tau`` at which a layer's cost is read off."""

REFERENCE_SPARSITY = 0.4
"""Budgets are exact at this mean sparsity. On SmolLM2-135M one set of them serves 10% to 50%."""

FIRST_MIDDLE = 0.35
"""How far below the first of ``GIVEN_UP``, as a logarithm, the middle of the interval before it is taken to be: half of
the distance to the next one, log 2 / 2."""

NOTHING_GIVEN_UP = 3.0
"""How far below the first of ``GIVEN_UP``, as a logarithm, a layer counts as dense: at a twentieth of that mass."""

MOST_GIVEN_UP = 0.97
"""Largest share of its mass that a layer gives up where budgets are set: the costs of more were not measured, and a
share of 1 would have no logarithm to compare budgets by."""

SMALLEST_BUDGET = 0.05
"""No layer's exponent is smaller: it would give up nearly all its mass at every tau, however near to 1."""

Curve = list[tuple[float, float]]
"""(sparsity, cost) of one layer at each value of ``GIVEN_UP``."""


# --- Fisher information -----------------------------------------------------------------------------------------------


def fisher_information(
    model: nn.Module, views: Sequence[FFNView], inputs: Inputs, *, seed: int = 0, progress: bool = True
) -> dict[str, Tensor]:
    """Second moment of the loss gradient at each FFN's output, float32 ``[D, D]``, by ``view.site``.

    The loss is cross-entropy against labels that the model itself draws; for a model without logits, the product of its
    first output with a random direction. Parameters' own gradients are neither computed nor touched.

    Args:
        model: the dense model.
        views: its FFNs.
        inputs: model inputs; at most ``FISHER_TOKENS`` tokens are used, row by row.
        seed: seed of the labels.
        progress: show a progress bar.
    """
    moments = {view.site: torch.zeros(()) for view in views}
    counts = dict.fromkeys(moments, 0)
    generator = torch.Generator().manual_seed(seed)
    with evaluation_mode(model):
        for batch in tqdm(_rows(inputs), desc="measuring sensitivity", unit="row", disable=not progress):
            for site, g_ND in _output_gradients(model, views, batch, generator):
                moments[site] = moments[site].to(g_ND.device) + g_ND.t() @ g_ND
                counts[site] += g_ND.shape[0]
    return {site: moment / max(counts[site], 1) for site, moment in moments.items()}


def _rows(inputs: Inputs) -> list[Inputs]:
    """Single rows, evenly spread, of ``FISHER_TOKENS`` tokens in all."""
    rows = next(v.shape[0] for v in inputs.values() if isinstance(v, Tensor))
    width = inputs["input_ids"].shape[1] if "input_ids" in inputs else FISHER_TOKENS // 16
    chosen = torch.linspace(0, rows - 1, max(1, min(rows, FISHER_TOKENS // width))).round().long().tolist()
    return [{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()} for i in chosen]


def _output_gradients(
    model: nn.Module, views: Sequence[FFNView], batch: Inputs, generator: torch.Generator
) -> list[tuple[str, Tensor]]:
    """(site, float32 ``[N, D]``) of each FFN call in one pass, padding left out."""
    seen: list[tuple[str, Tensor, Tensor | None]] = []

    def watch(view: FFNView, tracker: PaddingTracker) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Frozen models have no graph yet: it starts here.
            output = output if output.requires_grad else output.requires_grad_()
            seen.append((view.site, output, tracker.keep(output.shape[:-1])))
            return output

        return hook

    with torch.enable_grad(), PaddingTracker(model) as tracker, contextlib.ExitStack() as stack:
        for view in views:
            stack.enter_context(removing(view.down.register_forward_hook(watch(view, tracker))))
        loss = _loss(model(**quiet(model, batch)), generator)
        grads = torch.autograd.grad(loss, [output for _, output, _ in seen])
    flat = [grad.reshape(-1, grad.shape[-1]).float() for grad in grads]
    return [(site, g if keep is None else g[keep]) for (site, _, keep), g in zip(seen, flat, strict=True)]


def _loss(output: Any, generator: torch.Generator) -> Tensor:
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        log_p = torch.log_softmax(logits.float(), dim=-1)
        flat = log_p.reshape(-1, log_p.shape[-1])
        labels = torch.multinomial(flat.detach().exp().cpu(), 1, generator=generator).to(flat.device)
        return -flat.gather(1, labels).sum()
    first = output if isinstance(output, Tensor) else output[0]
    direction = torch.randn(first.shape, generator=generator).to(first.device, first.dtype)
    return (first * direction).sum()


# --- cost of a layer --------------------------------------------------------------------------------------------------


@torch.no_grad()
def cost_curve(
    h_NF: Tensor,
    down_FD: Tensor,
    scores_NE: Tensor,
    fisher_DD: Tensor,
    expert_size: int,
    rule: Rule,
    shared: int = 0,
) -> Curve:
    """What one layer costs at each value of ``GIVEN_UP``, all other layers dense.

    Costs of tokens are averaged as square roots: a few tokens with huge activations, where the quadratic form says
    little, would otherwise decide.

    Args:
        h_NF: hidden activations, neurons in expert order.
        down_FD: down rows, neurons in expert order.
        scores_NE: router scores of the same tokens.
        fisher_DD: from :func:`fisher_information`.
        expert_size: S.
        rule: selection rule.
        shared: how many experts, the first ones, are always active.
    """
    curve = []
    for given_up in GIVEN_UP:
        mask_NE = mask_from_scores(scores_NE, torch.tensor(1.0 - given_up, device=scores_NE.device), rule, shared)
        active_NF = expand_experts(mask_NE, expert_size, h_NF.shape[1])
        delta_ND = h_NF.float().masked_fill(active_NF, 0) @ down_FD.float()
        cost_N = 0.5 * ((delta_ND @ fisher_DD) * delta_ND).sum(-1).clamp_min(0)
        curve.append((1.0 - float(active_NF.float().mean()), float(cost_N.sqrt().mean().square())))
    return curve


# --- allocation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CostCurve:
    """A curve made convex: at marginal cost ``exp(price[i])`` the layer gives up ``exp(log_u[i])`` of its mass."""

    price: list[float]
    log_u: list[float]
    sparsity_log_u: list[float]
    sparsity: list[float]

    @classmethod
    def of(cls, curve: Curve) -> _CostCurve:
        grid = [math.log(u) for u in GIVEN_UP]
        sparsity = [0.0]
        for s, _ in curve:
            sparsity.append(max(s, sparsity[-1] + 1e-5))
        costs = [0.0]
        for _, cost in curve:
            costs.append(max(cost, costs[-1]))
        price: list[float] = []
        for i in range(1, len(costs)):
            marginal = max((costs[i] - costs[i - 1]) / (sparsity[i] - sparsity[i - 1]), 1e-12)
            price.append(max(math.log(marginal), price[-1] + 1e-6 if price else -math.inf))
        middles = [grid[0] - FIRST_MIDDLE] + [(a + b) / 2 for a, b in itertools.pairwise(grid)]
        return cls(price, middles, [grid[0] - NOTHING_GIVEN_UP, *grid], sparsity)

    def given_up(self, price: float) -> float:
        """Logarithm of ``1 - tau`` at a marginal cost."""
        return min(_interpolate(price, self.price, self.log_u), math.log(MOST_GIVEN_UP))

    def sparsity_at(self, price: float) -> float:
        return _interpolate(self.given_up(price), self.sparsity_log_u, self.sparsity, extrapolate=False)


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float], extrapolate: bool = True) -> float:
    """Piecewise linear; beyond the ends, the mean slope of the nearest third (at least 1/5 as steep as 1 : 1)."""
    if x <= xs[0] or x >= xs[-1]:
        end, inner = (0, len(xs) // 3) if x <= xs[0] else (-1, -1 - len(xs) // 3)
        if not extrapolate:
            return ys[end]
        slope = max((xs[inner] - xs[end]) / (ys[inner] - ys[end]), 0.2)
        return ys[end] + (x - xs[end]) / slope
    i = next(i for i in range(1, len(xs)) if x <= xs[i])
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


def allocate(curves: Mapping[str, Curve], sparsity: float = REFERENCE_SPARSITY) -> dict[str, float]:
    """Budgets under which the last neuron dropped costs the same in every layer, at a mean sparsity.

    Args:
        curves: cost of each layer, by name.
        sparsity: mean over layers at which to equalise.

    Returns:
        For each layer the exponent b of ``1 - tau_layer = (1 - tau) ** b``; they average 1, and larger ones protect.
    """
    layers = {name: _CostCurve.of(curve) for name, curve in curves.items()}
    low, high = -40.0, 40.0
    for _ in range(60):
        price = (low + high) / 2
        mean = sum(layer.sparsity_at(price) for layer in layers.values()) / len(layers)
        low, high = (price, high) if mean < sparsity else (low, price)
    logs = {name: layer.given_up(low) for name, layer in layers.items()}
    mean_log = sum(logs.values()) / len(logs)
    return {name: max(log / mean_log, SMALLEST_BUDGET) for name, log in logs.items()}
