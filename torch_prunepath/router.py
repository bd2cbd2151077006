"""The router: one linear map from a token to the scores of the experts, and the ways it can start.

Shapes: N calibration tokens, D hidden size, F neurons, E experts of S neurons (the last may be smaller).
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from torch_prunepath.config import num_experts
from torch_prunepath.ffn import FFNView


class Router(nn.Linear):
    """``nn.Linear(D, E)`` that computes and answers in float32, whatever its weights are stored in."""

    @classmethod
    def of(cls, weight_ED: Tensor, bias_E: Tensor | None) -> Router:
        """A router with these weights, in their dtype and on their device."""
        experts, hidden = weight_ED.shape
        router = cls(hidden, experts, bias=bias_E is not None, device="meta")
        router.weight = nn.Parameter(weight_ED.contiguous())
        if bias_E is not None:
            router.bias = nn.Parameter(bias_E)
        return router

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., E]``."""
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nnf.linear(x.float(), self.weight.float(), bias)


def expert_sums(values_NF: Tensor, expert_size: int) -> Tensor:
    """Sum over each expert's neurons: ``[..., F] -> [..., E]``."""
    experts = num_experts(values_NF.shape[-1], expert_size)
    padded = nnf.pad(values_NF, (0, experts * expert_size - values_NF.shape[-1]))
    return padded.unflatten(-1, (experts, expert_size)).sum(-1)


def centroid_init(view: FFNView, order_F: Tensor, expert_size: int) -> Tensor:
    """Router weight ``[E, D]``: the mean of each expert's L2-normalised gate (or up) rows.

    From MoEfication (arXiv 2110.01786).

    Args:
        view: the dense FFN, its neurons in their original order.
        order_F: the permutation that forms the experts.
        expert_size: S.
    """
    rows_FD = (view.up_FD if view.gate_FD is None else view.gate_FD).detach().float()
    unit_FD = nnf.normalize(rows_FD, dim=-1)[order_F.to(rows_FD.device)]
    sums_ED = expert_sums(unit_FD.t(), expert_size).t()
    sizes_E = expert_sums(unit_FD.new_ones(unit_FD.shape[0]), expert_size)
    return sums_ED / sizes_E.unsqueeze(-1)


def contribution_shares(h_NF: Tensor, down_FD: Tensor, expert_size: int) -> Tensor:
    """Each expert's share of the contribution norm, ``[N, E]`` float32, rows sum to 1.

    The contribution of expert e is the vector ``h_e @ down_e``; its norm is taken through the expert's Gram matrix, so
    that no ``[N, E, D]`` tensor exists.

    Args:
        h_NF: hidden activations, neurons in expert order.
        down_FD: down rows, neurons in expert order.
        expert_size: S.
    """
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


def fit_router(x_ND: Tensor, shares_NE: Tensor, *, iterations: int = 40, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Fit ``softmax(x W^T + b)`` to soft labels by cross-entropy.

    Accelerated gradient steps preconditioned by the input's second moment: Boehning's bound (Ann. Inst. Stat. Math. 44,
    1992) on the Hessian of multinomial regression, ``1/2 X^T X``, makes a unit step safe without any learning rate.

    Args:
        x_ND: router inputs.
        shares_NE: soft labels, rows sum to 1.
        iterations: full passes over the data.
        ridge: penalty, relative to the mean eigenvalue of the input's second moment.

    Returns:
        weight ``[E, D]`` and bias ``[E]``, float32.
    """
    N = x_ND.shape[0]
    x = x_ND.float()
    scale = x.square().mean().sqrt().clamp_min(1e-12)
    x = torch.cat([x / scale, x.new_ones(N, 1)], dim=1)
    moment = x.t() @ x / N
    damping = ridge * moment.diagonal().mean()
    hessian = 0.5 * moment + damping * torch.eye(x.shape[1], device=x.device)
    factor = torch.linalg.cholesky(hessian)
    labels = shares_NE.float()

    weight = x.new_zeros(x.shape[1], labels.shape[1])
    weight[-1] = labels.mean(0).clamp_min(1e-8).log()
    anchor, previous = weight.clone(), weight
    momentum = 1.0
    for _ in range(iterations):
        residual = torch.softmax(x @ anchor, dim=-1).sub_(labels)
        gradient = x.t() @ residual / N + damping * anchor
        weight = anchor - torch.cholesky_solve(gradient, factor)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        anchor = weight + (momentum - 1) / following * (weight - previous)
        previous, momentum = weight, following
    return (weight[:-1] / scale).t().contiguous(), weight[-1].clone()
