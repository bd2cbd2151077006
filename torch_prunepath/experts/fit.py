"""The start of routers, at centroids or fitted to what each expert contributes; and fitting them again later.

Shapes: N calibration tokens, D hidden size, F neurons, E experts of S neurons (the last may be smaller).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from torch_prunepath.config import num_experts
from torch_prunepath.inputs.data import as_inputs
from torch_prunepath.inputs.visit import visit_inputs
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.hooks import eagerly
from torch_prunepath.layer.saving import refresh
from torch_prunepath.layer.views import sparse_layers, sparse_views
from torch_prunepath.ops.experts import expert_sums
from torch_prunepath.progress import progress_bar
from torch_prunepath.rms import normalised
from torch_prunepath.sparsity import register_routing_hook
from torch_prunepath.thresholds import without_thresholds

ModelT = TypeVar("ModelT", bound=nn.Module)


def fit_routers(model: ModelT, batches: Any, *, tokenizer: Any = None, progress: bool = True) -> ModelT:
    """Fit the routers of a sparse model again, in place, to what its experts contribute on ``batches``.

    Each layer is fitted by itself, on the hidden states of the model with every expert active. The loss is soft-label
    cross-entropy of ``softmax(router(x))`` against each expert's share of the contribution norm.

    Args:
        model: a sparse model.
        batches: texts or chats (with ``tokenizer``), token ids ``[B, T]``, dicts of model inputs, or an iterable of
            these; see :func:`torch_prunepath.inputs.data.as_inputs`. All the data is used, in one batch.
        tokenizer: tokenizer for texts, as for :func:`torch_prunepath.sparsify`.
        progress: show a progress bar.

    Raises:
        ValueError: if the model holds no sparse FFN or the data does not fit. No router is changed.
    """
    layers, views = sparse_layers(model), sparse_views(model)
    inputs = as_inputs(batches, model, tokenizer)
    fitted: dict[str, tuple[Tensor, Tensor]] = {}
    with progress_bar(total=len(views), desc="fitting routers", unit="layer", progress=progress) as bar:

        def visit(view: FFNView, x_ND: Tensor) -> None:
            layer = layers[view.site]
            size, shared = layer.experts.expert_size, layer.experts.shared
            fitted[view.site] = fitted_router(x_ND, view.hidden(x_ND), view.down_FD, size, layer.router_norm, shared)
            bar.update()

        # Every expert active: hidden states as the dense model has them.
        everything = register_routing_hook(model, lambda routing: torch.ones_like(routing.mask_TE))
        with eagerly(), everything, without_thresholds(model):
            visit_inputs(model, list(views.values()), inputs, visit)
    with torch.no_grad():
        for name, (weight_ED, bias_E) in fitted.items():
            _load_router(layers[name], weight_ED, bias_E)
            made_with = layers[name].made_with
            if made_with is not None:
                layers[name].made_with = dataclasses.replace(made_with, router="fitted")
    refresh(model)
    return model


def _load_router(layer: RoutedExperts, weight_ED: Tensor, bias_E: Tensor) -> None:
    layer.router.weight.copy_(weight_ED)
    if layer.router.bias is None:
        layer.router.bias = nn.Parameter(bias_E.to(layer.router.weight.dtype))
    else:
        layer.router.bias.copy_(bias_E)


def centroid_init(view: FFNView, order_F: Tensor, expert_size: int) -> Tensor:
    """Compute the router weight of MoEfication (arXiv 2110.01786), float32 ``[E, D]``.

    It is the mean of each expert's L2-normalised gate rows, or up rows in a plain FFN.

    Args:
        view: the dense FFN, with its neurons in their original order.
        order_F: the permutation that forms the experts.
        expert_size: neurons of an expert, S.
    """
    rows_FD = (view.up_FD if view.gate_FD is None else view.gate_FD).detach().float()
    unit_FD = nnf.normalize(rows_FD, dim=-1)[order_F.to(rows_FD.device)]
    sums_ED = expert_sums(unit_FD.t(), expert_size).t()
    sizes_E = expert_sums(unit_FD.new_ones(unit_FD.shape[0]), expert_size)
    return sums_ED / sizes_E.unsqueeze(-1)


def contribution_shares(h_NF: Tensor, down_FD: Tensor, expert_size: int, shared: int = 0) -> Tensor:
    """Compute each expert's share of the contribution norm, float32 ``[N, E - shared]``; rows sum to 1, or are 0.

    The contribution of expert e is the vector ``h_e @ down_e``. Its norm is computed with the expert's Gram matrix, so
    that no ``[N, E, D]`` tensor is needed.

    Args:
        h_NF: hidden activations, with neurons in expert order.
        down_FD: down rows, with neurons in expert order.
        expert_size: neurons of an expert, S.
        shared: number of the first experts that are left out.
    """
    h_NF, down_FD = h_NF[:, shared * expert_size :], down_FD[shared * expert_size :]
    experts = num_experts(h_NF.shape[1], expert_size)
    padding = experts * expert_size - h_NF.shape[1]
    down_ESD = nnf.pad(down_FD.float(), (0, 0, 0, padding)).view(experts, expert_size, -1)
    gram_ESS = down_ESD @ down_ESD.transpose(1, 2)
    norms = []
    for h in h_NF.split(4096):  # bounds the float32 copies
        h_ENS = nnf.pad(h.float(), (0, padding)).view(-1, experts, expert_size).transpose(0, 1)
        norms.append(((h_ENS @ gram_ESS) * h_ENS).sum(-1).clamp_min(0).sqrt().t())
    norms_NE = torch.cat(norms)
    return norms_NE / norms_NE.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def fit_router(x_ND: Tensor, shares_NE: Tensor, *, iterations: int = 12, ridge: float = 0.1) -> tuple[Tensor, Tensor]:
    """Fit ``softmax(x W^T + b)`` to soft labels by cross-entropy, over all tokens at once.

    The method is nonlinear conjugate gradients (Polak and Ribiere), without a learning rate. The preconditioner is an
    approximation of the Hessian's block diagonal: each expert's mean probability times the covariance of the inputs,
    which is exact if probabilities are the same for all tokens. Each step has the length of a Newton step along its
    direction. More than 12 iterations gain nothing on SmolLM2-135M.

    Args:
        x_ND: router inputs.
        shares_NE: soft labels; rows sum to 1, or are 0.
        iterations: largest number of passes over the data.
        ridge: penalty on weights, relative to the mean variance of an input.

    Returns:
        The weight, float32 ``[E, D]``, and the bias, float32 ``[E]``.
    """
    problem = _SoftRegression(x_ND.float(), shares_NE.float(), ridge)
    weight_DE, bias_E = problem.start()
    logits_NE = bias_E.expand(x_ND.shape[0], -1)
    loss = problem.loss(weight_DE, logits_NE)
    previous: _Step | None = None
    shrink = 1.0
    for _ in range(iterations):
        step = problem.step(weight_DE, logits_NE, previous)
        length = shrink * step.length
        trial = weight_DE + length * step.weight_DE, bias_E + length * step.bias_E
        trial_logits_NE = logits_NE + length * step.logits_NE
        trial_loss = problem.loss(trial[0], trial_logits_NE)
        if not trial_loss < loss:  # overshot: shorter, and along the gradient
            previous, shrink = None, shrink / 4
            continue
        converged = loss - trial_loss < 1e-5 * abs(loss)
        (weight_DE, bias_E), logits_NE, loss = trial, trial_logits_NE, trial_loss
        previous, shrink = step, 1.0
        if converged:
            break
    return weight_DE.t().contiguous(), bias_E - problem.mean_D @ weight_DE


@dataclass(frozen=True)
class _Step:
    """A step of :func:`fit_router`: its direction, the length along it, and values that the next step needs."""

    weight_DE: Tensor
    bias_E: Tensor
    logits_NE: Tensor
    length: Tensor
    gradient: tuple[Tensor, Tensor]
    decrement: Tensor


class _SoftRegression:
    """The problem of :func:`fit_router`: mean cross-entropy on centred inputs, and a penalty on weights."""

    def __init__(self, x_ND: Tensor, labels_NE: Tensor, ridge: float) -> None:
        self.mean_D = x_ND.mean(0)
        self.x_ND, self.labels_NE = x_ND - self.mean_D, labels_NE
        covariance_DD = self.x_ND.t() @ self.x_ND / len(x_ND)
        self.ridge = (ridge * covariance_DD.diagonal().mean()).clamp_min(1e-12)
        eye = torch.eye(x_ND.shape[1], device=x_ND.device)
        self.factor_DD = torch.linalg.cholesky(covariance_DD + self.ridge * eye)
        self.prior_E = labels_NE.mean(0).clamp_min(1e-8)

    def start(self) -> tuple[Tensor, Tensor]:
        """Return the router (weight ``[D, E]``, bias ``[E]``) that gives every token the mean label."""
        return self.x_ND.new_zeros(self.x_ND.shape[1], len(self.prior_E)), self.prior_E.log()

    def loss(self, weight_DE: Tensor, logits_NE: Tensor) -> float:
        penalty = 0.5 * self.ridge * (self.prior_E * weight_DE.square()).sum()
        return float(penalty - (self.labels_NE * logits_NE.log_softmax(-1)).sum(-1).mean())

    def step(self, weight_DE: Tensor, logits_NE: Tensor, previous: _Step | None) -> _Step:
        p_NE = logits_NE.softmax(-1)
        residual_NE = (p_NE * self.labels_NE.sum(-1, keepdim=True) - self.labels_NE) / len(p_NE)
        gradient = self.x_ND.t() @ residual_NE + self.ridge * self.prior_E * weight_DE, residual_NE.sum(0)
        scaled = torch.cholesky_solve(gradient[0], self.factor_DD) / self.prior_E, gradient[1] / self.prior_E
        decrement = _dot(gradient, scaled)
        direction = -scaled[0], -scaled[1]
        if previous is not None:
            beta = ((decrement - _dot(previous.gradient, scaled)) / previous.decrement).clamp_min(0.0)
            direction = direction[0] + beta * previous.weight_DE, direction[1] + beta * previous.bias_E
        logits_NE = self.x_ND @ direction[0] + direction[1]
        mean_N1 = (p_NE * logits_NE).sum(-1, keepdim=True)
        curvature = (p_NE * (logits_NE - mean_N1).square()).sum(-1).mean()
        curvature = curvature + self.ridge * (self.prior_E * direction[0].square()).sum()
        length = (-_dot(gradient, direction) / curvature.clamp_min(1e-30)).clamp(0.0, 4.0)
        # Far from the optimum, at the start, the curvature still grows along the way.
        return _Step(*direction, logits_NE, length if previous is not None else 0.5 * length, gradient, decrement)


def _dot(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    return (a[0] * b[0]).sum() + (a[1] * b[1]).sum()


def fitted_router(
    x_ND: Tensor, h_NF: Tensor, down_FD: Tensor, expert_size: int, router_norm: bool, shared: int
) -> tuple[Tensor, Tensor]:
    """Fit a router to what each expert contributes: weight ``[E, D]`` and bias ``[E]``.

    Shared experts are left out; their scores are 0.
    """
    shares_NE = contribution_shares(h_NF, down_FD, expert_size, shared)
    weight_ED, bias_E = fit_router(normalised(x_ND) if router_norm else x_ND, shares_NE)
    return nnf.pad(weight_ED, (0, 0, shared, 0)), nnf.pad(bias_E, (shared, 0))
