"""Budgets of layers: how much router mass each layer can give up, from the loss's curvature at its FFN's output.

Dropping experts changes an FFN's output by delta. To second order this costs ``1/2 delta^T F delta`` of KL divergence
from the dense model. F is the Fisher information of that output: the second moment of the loss gradient there, for
labels drawn from the model itself. One backward pass gives F for every layer, and the cost of a layer at each sparsity
is then computed without the model. Each layer is given the sparsity at which dropping one more neuron costs the same in
all layers.

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

from torch_prunepath.config import Rule
from torch_prunepath.inputs.data import Inputs, evaluation_mode, single_rows
from torch_prunepath.inputs.front import front_of, quiet
from torch_prunepath.inputs.padding import PaddingTracker
from torch_prunepath.inputs.visit import removing
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.ops.experts import expand_experts
from torch_prunepath.progress import progress_bar
from torch_prunepath.select import mask_from_scores

FISHER_TOKENS = 4096
"""Largest number of calibration tokens for the Fisher information, which needs a backward pass. docs/log.md, "choosing
the training-free defaults on SmolLM2-135M", leaves open whether more tokens are better."""

CURVE_TOKENS = 2048
"""Largest number of calibration tokens on which the cost of dropping experts is measured. A guess."""

GIVEN_UP = (0.003, 0.006, 0.012, 0.02, 0.035, 0.06, 0.1, 0.15, 0.22, 0.32, 0.45, 0.6, 0.75)
"""Values of ``1 - tau`` at which a layer's cost is measured, spaced about evenly as logarithms. Chosen without
measurement."""

REFERENCE_SPARSITY = 0.4
"""Mean sparsity at which budgets are exact. Budgets fitted at 0.4 served 20% to 50% on SmolLM2-135M (docs/log.md,
"choosing the training-free defaults on SmolLM2-135M")."""

FIRST_MIDDLE = 0.35
"""Distance, as a logarithm, from the first of ``GIVEN_UP`` down to the middle of the interval before it. That interval
has no lower end, so its middle is put half as far away as the next value: log 2 / 2."""

NOTHING_GIVEN_UP = 3.0
"""Distance, as a logarithm, from the first of ``GIVEN_UP`` down to the mass at which a layer counts as dense, which is
a twentieth of that value. A guess."""

MOST_GIVEN_UP = 0.97
"""Largest share of its mass that a layer gives up when budgets are computed. Costs are measured up to 0.75 only, and at
1 the logarithm, to which a budget is proportional, is 0. 0.97 is a guess."""

SMALLEST_BUDGET = 0.05
"""Smallest budget (exponent) of a layer. With a smaller one it would give up nearly all its mass at every tau below 1,
however near to 1. 0.05 is a guess."""

Curve = list[tuple[float, float]]
"""Pairs (sparsity, cost) of one layer, for each value of ``GIVEN_UP``."""


# --- Fisher information -----------------------------------------------------------------------------------------------


def fisher_information(
    model: nn.Module, views: Sequence[FFNView], inputs: Inputs, *, seed: int = 0, progress: bool = True
) -> dict[str, Tensor]:
    """Measure the second moment of the loss gradient at each FFN's output, float32 ``[D, D]``, by ``view.site``.

    The loss is cross-entropy against labels that are drawn from the model itself. For a model without logits, it is the
    product of the first output with a random direction. Gradients of parameters are neither computed nor changed.

    Args:
        model: the dense model.
        views: the model's FFNs.
        inputs: model inputs; at most ``FISHER_TOKENS`` tokens are used, row by row.
        seed: seed of the labels.
        progress: show a progress bar.
    """
    moments = {view.site: torch.zeros(()) for view in views}
    counts = dict.fromkeys(moments, 0)
    generator = torch.Generator().manual_seed(seed)
    rows = single_rows(inputs, model, FISHER_TOKENS)
    with evaluation_mode(model):
        for batch in progress_bar(rows, desc="measuring sensitivity", unit="row", progress=progress):
            for site, g_ND in _output_gradients(model, views, batch, generator):
                moments[site] = moments[site].to(g_ND.device) + g_ND.t() @ g_ND
                counts[site] += g_ND.shape[0]
    return {site: moment / max(counts[site], 1) for site, moment in moments.items()}


def _output_gradients(
    model: nn.Module, views: Sequence[FFNView], batch: Inputs, generator: torch.Generator
) -> list[tuple[str, Tensor]]:
    """Compute the gradient at the output of each FFN call in one pass: pairs of site and float32 ``[N, D]``.

    Padding and the tokens in front of a text are left out.
    """
    seen: list[tuple[str, Tensor, Tensor | None]] = []

    def watch(view: FFNView, tracker: PaddingTracker) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Frozen models have no graph yet: it starts here.
            output = output if output.requires_grad else output.requires_grad_()
            seen.append((view.site, output, tracker.keep(output.shape[:-1])))
            return output

        return hook

    with torch.enable_grad(), PaddingTracker(model, front_of([batch])) as tracker, contextlib.ExitStack() as stack:
        for view in views:
            stack.enter_context(removing(view.down.register_forward_hook(watch(view, tracker))))
        loss = _loss(model(**quiet(model, batch)), generator)
        outputs = [output for _, output, _ in seen]
        # An output that the loss does not depend on (a layer that is skipped, a head that is not used) has gradient 0.
        grads = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
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
    loss = torch.zeros(())
    for part in [first] if isinstance(first, Tensor) else first:  # a backbone's: one feature map a stage
        direction = torch.randn(part.shape, generator=generator).to(part.device, part.dtype)
        loss = loss.to(part.device, part.dtype) + (part * direction).sum()
    return loss


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
    """Compute the cost of one layer at each value of ``GIVEN_UP``, with all other layers dense.

    The square roots of the tokens' costs are averaged. Otherwise a few tokens with huge activations would decide, for
    which the quadratic form is a bad estimate.

    Args:
        h_NF: hidden activations, with neurons in expert order.
        down_FD: down rows, with neurons in expert order.
        scores_NE: router scores of the same tokens.
        fisher_DD: the layer's result of :func:`fisher_information`.
        expert_size: neurons of an expert, S.
        rule: selection rule.
        shared: number of the first experts that are always active.
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
    """The cost curve of a layer, made convex.

    Attributes:
        price: logarithms of marginal costs, ascending.
        log_u: logarithm of the mass that the layer gives up at each price.
        sparsity_log_u: logarithms of masses given up, ascending.
        sparsity: sparsity at each of these masses.
    """

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
        """Return the logarithm of ``1 - tau`` at a marginal cost, whose logarithm is ``price``."""
        return min(_interpolate(price, self.price, self.log_u), math.log(MOST_GIVEN_UP))

    def sparsity_at(self, price: float) -> float:
        return _interpolate(self.given_up(price), self.sparsity_log_u, self.sparsity, extrapolate=False)


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float], extrapolate: bool = True) -> float:
    """Interpolate linearly between points.

    Beyond the ends, go on with the mean slope of the nearest third of the points, where dx/dy is at least 0.2 (a
    guess); without ``extrapolate``, return the value at the end.
    """
    if x <= xs[0] or x >= xs[-1]:
        end, inner = (0, len(xs) // 3) if x <= xs[0] else (-1, -1 - len(xs) // 3)
        if not extrapolate:
            return ys[end]
        slope = max((xs[inner] - xs[end]) / (ys[inner] - ys[end]), 0.2)
        return ys[end] + (x - xs[end]) / slope
    i = next(i for i in range(1, len(xs)) if x <= xs[i])
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


def allocate(curves: Mapping[str, Curve], sparsity: float = REFERENCE_SPARSITY) -> dict[str, float]:
    """Compute budgets with which the last neuron dropped costs the same in every layer, at a mean sparsity.

    Args:
        curves: cost curve of each layer, by name.
        sparsity: mean sparsity over layers at which costs are made equal.

    Returns:
        Each layer's exponent b of ``1 - tau_layer = (1 - tau) ** b``. The exponents average 1 unless one is raised to
        ``SMALLEST_BUDGET``; a layer with a larger one gives up less.
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
