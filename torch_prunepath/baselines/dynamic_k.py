"""D2DMoE (Szatkowski et al., arXiv 2310.04361): routers predict the norm of each expert's output.

A token activates the experts whose predicted norm is near the token's largest one. By the other rule of the released
code, it activates the experts with the largest norms, until they make up a share of the sum. The method's first stage,
which makes a dense model's activations sparser, is :func:`torch_prunepath.baselines.enforce_sparsity`. Its conversion
of attention projections is left out.

Shapes: N calibration tokens, D hidden size, F neurons, E experts of S neurons.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from torch_prunepath.baselines.routed import CALIBRATION_TOKENS, RoutedBaseline, calibration_inputs, convert
from torch_prunepath.baselines.routers import MLPRouter, fit, linear
from torch_prunepath.baselines.rules import cumulative_share, near_largest
from torch_prunepath.config import check_choice, num_experts
from torch_prunepath.discover import Which
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.router import Router

DynamicK = Literal["max", "cumulative"]


def d2dmoe(
    model: nn.Module,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    rule: DynamicK = "max",
    expert_size: int = 32,
    width: int = 128,
    tau: float = 0.9,
    tokens: int = CALIBRATION_TOKENS,
    epochs: int = 30,
    lr: float = 1e-3,
    seed: int = 0,
    include: Which | None = None,
    exclude: Which | None = None,
    progress: bool = True,
) -> RoutedBaseline:
    """Apply D2DMoE to a dense model, in place, with frozen routers. Checkpoints do not hold it.

    Experts are balanced k-means clusters of gate rows, or of up rows where there is no gate. Each router is
    ``D -> width -> E`` with a ReLU inside, and its output is the absolute value. It is fitted by mean squared error
    (Adam) to the L2 norms of the experts' outputs without the down-projection's bias.

    Args:
        model: a dense model.
        calibration: data to which routers are fitted, as for :func:`torch_prunepath.sparsify`; with None a causal
            language model samples its own text.
        tokenizer: tokenizer for texts.
        rule: experts to activate. ``"max"``: those with a norm of at least ``1 - tau`` times the largest (the paper's
            rule, whose own tau is ``1 - tau``); ``"cumulative"``: those with the largest norms, until they make up the
            share tau of the sum.
        expert_size: neurons of an expert, S.
        width: width inside the routers.
        tau: share in (0, 1]; 1 activates every expert.
        tokens: largest number of calibration tokens that are used.
        epochs: passes over the calibration tokens.
        lr: learning rate of the routers.
        seed: seed of clustering, sampled text and routers.
        include: the FFNs to take; None: all. As for :func:`torch_prunepath.sparsify`.
        exclude: which of these to leave out.
        progress: show progress bars.

    Raises:
        ValueError: if nothing can be converted or the data does not fit. The model is as it was.
    """
    check_choice("rule", rule, DynamicK)
    inputs = calibration_inputs(model, calibration, tokenizer, tokens, seed, progress)
    build = partial(_build, expert_size=expert_size, width=width, epochs=epochs, lr=lr, seed=seed)
    select = near_largest if rule == "max" else cumulative_share
    convert(
        model,
        expert_size,
        build,
        select,
        inputs,
        tau=tau,
        seed=seed,
        include=include,
        exclude=exclude,
        progress=progress,
    )
    return RoutedBaseline(model, inputs)


def _build(
    view: FFNView, x_ND: Tensor | None, *, expert_size: int, width: int, epochs: int, lr: float, seed: int
) -> Router:
    assert x_ND is not None
    generator = torch.Generator().manual_seed(seed)
    layer = partial(linear, bias=True, device=x_ND.device, generator=generator)
    experts = num_experts(view.spec.ffn_size, expert_size)
    router = MLPRouter.stack(layer(view.spec.hidden_size, width), layer(width, experts), "relu", magnitude=True)
    norms_NE = expert_norms(view.hidden(x_ND), view.down_FD, expert_size)
    return fit(router, x_ND, norms_NE, nnf.mse_loss, lr=lr, epochs=epochs, seed=seed)


def expert_norms(h_NF: Tensor, down_FD: Tensor, expert_size: int) -> Tensor:
    """Compute the L2 norm of each expert's output, ``[N, F], [F, D] -> [N, E]`` float32."""
    parts = zip(h_NF.split(expert_size, dim=1), down_FD.split(expert_size), strict=True)
    return torch.stack([(h.float() @ down.float()).norm(dim=-1) for h, down in parts], dim=-1)
