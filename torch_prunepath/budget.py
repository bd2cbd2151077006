"""How much router mass each layer can give up: budgets from the loss's sensitivity to each FFN's neurons.

Shapes: N tokens, D hidden size, F neurons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torch_prunepath.calibrate import PaddingTracker, quiet, removing
from torch_prunepath.data import Inputs
from torch_prunepath.ffn import FFNView

SENSITIVITY_TOKENS = 4096
"""Calibration tokens that are differentiated through, at most."""


def sensitivity_budgets(
    model: nn.Module, views: Sequence[FFNView], inputs: Inputs, *, seed: int = 0, progress: bool = True
) -> dict[str, float]:
    """Budget of each layer, by ``view.site``; their mean is 1."""
    sensitivity = taylor_sensitivity(model, views, inputs, seed=seed, progress=progress)
    inverse = {site: max(value, 1e-12) ** -2 for site, value in sensitivity.items()}
    mean = sum(inverse.values()) / len(inverse)
    return {site: value / mean for site, value in inverse.items()}


def taylor_sensitivity(
    model: nn.Module, views: Sequence[FFNView], inputs: Inputs, *, seed: int, progress: bool
) -> dict[str, float]:
    """Mean over tokens of ``sum_f |h_f * (g . down_f)|``, with g the loss gradient at the FFN's output."""
    rows = next(v.shape[0] for v in inputs.values() if isinstance(v, Tensor))
    width = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
    rows = max(1, min(rows, SENSITIVITY_TOKENS // width))
    totals = {view.site: 0.0 for view in views}
    generator = torch.Generator().manual_seed(seed)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for row in tqdm(range(rows), desc="measuring sensitivity", unit="row", disable=not progress):
            batch = {k: v[row : row + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            for site, value in _one_row(model, views, batch, generator).items():
                totals[site] += value / rows
    finally:
        for module, mode in modes:
            module.training = mode
    return totals


def _one_row(model: nn.Module, views: Sequence[FFNView], batch: Inputs, generator: torch.Generator) -> dict[str, float]:
    seen: list[tuple[FFNView, Tensor, Tensor, Tensor | None]] = []

    def watch(view: FFNView, tracker: PaddingTracker) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_()
            seen.append((view, args[0].detach(), output, tracker.keep(output.shape[:-1])))
            return output

        return hook

    with torch.enable_grad(), PaddingTracker(model) as tracker, contextlib.ExitStack() as stack:
        for view in views:
            stack.enter_context(removing(view.down.register_forward_hook(watch(view, tracker))))
        loss = _loss(model(**quiet(model, batch)), generator)
        grads = torch.autograd.grad(loss, [output for _, _, output, _ in seen])
    totals = {view.site: 0.0 for view in views}
    for (view, h, _, keep), grad in zip(seen, grads, strict=True):
        h_NF, g_ND = h.reshape(-1, h.shape[-1]).float(), grad.reshape(-1, grad.shape[-1]).float()
        per_token = (h_NF * (g_ND @ view.down_FD.detach().float().t())).abs().sum(-1)
        totals[view.site] += float((per_token if keep is None else per_token[keep]).mean())
    return totals


def _loss(output: Any, generator: torch.Generator) -> Tensor:
    """Sampled cross-entropy of a model with logits; of any other, a random projection of what it returns first."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        log_p = torch.log_softmax(logits.float(), dim=-1)
        flat = log_p.reshape(-1, log_p.shape[-1])
        labels = torch.multinomial(flat.detach().exp().cpu(), 1, generator=generator).to(flat.device)
        return -flat.gather(1, labels).sum()
    first = (
        output
        if isinstance(output, Tensor)
        else next(iter(output.values()))
        if hasattr(output, "values")
        else output[0]
    )
    direction = torch.randn(first.shape, generator=generator).to(first.device, first.dtype)
    return (first * direction).sum()
