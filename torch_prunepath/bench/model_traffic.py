"""Measurements of a whole model's call: bytes read, experts chosen, and how much rounding changes the logits.

Shapes: T tokens, V vocabulary, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.bench.check import relative_rms
from torch_prunepath.bench.decoder import Work, logits_of
from torch_prunepath.bench.layers import Usage
from torch_prunepath.bench.timing import Traffic
from torch_prunepath.inputs.visit import removing
from torch_prunepath.layer import Routing
from torch_prunepath.layer.views import sparse_layers, sparse_views
from torch_prunepath.search import OutOfReach, find_tau
from torch_prunepath.sparsity import register_routing_hook, set_tau

NOISE_ROUNDINGS = 8.0
"""Standard deviation of the noise added to FFN inputs, in roundings (half an epsilon each). A guess of how far the
inputs of two correct implementations differ."""

NOISE_DRAWS = 8
"""Number of random draws of which the largest error counts. A guess."""

NOISE_MARGIN = 1.5
"""Factor by which the largest error of the draws is raised, as more draws could find a larger one. A guess."""


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of the weights that a call reads in full.

    An embedding counts only if it is the weight of the output layer as well.
    """
    output = model.get_output_embeddings()  # type: ignore[operator]
    skipped = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and (output is None or module.weight is not output.weight)
    }
    return sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in skipped)


def traffic(model: nn.Module, work: Work, used: dict[str, Usage], dense_bytes: int, bandwidth: float) -> Traffic:
    """Return the bytes that one call of a sparse model reads, and those that the dense model read.

    Args:
        model: the sparse model.
        work: the call.
        used: usage of each layer, by the layer's own name.
        dense_bytes: bytes of the dense model's weights.
        bandwidth: copy bandwidth in bytes a second.
    """
    unread = routers = 0.0
    layers = sparse_layers(model)
    for name, view in sparse_views(model).items():
        parts = (view.up_FD, view.up_bias_F, view.gate_FD, view.gate_bias_F, view.down_FD)
        unread += (1.0 - used[layers[name].name].union) * sum(part.nbytes for part in parts if part is not None)
        routers += sum(parameter.nbytes for parameter in layers[name].router.parameters())
    whole = dense_bytes + work.cache_bytes
    return Traffic(whole, whole - unread + routers, bandwidth)


def usage(model: nn.Module, work: Work, calls: int) -> dict[str, Usage]:
    """Measure the usage of each layer in the first calls, averaged over them, by the layer's own name."""
    seen: dict[str, list[Usage]] = {}
    shapes = {layer.name: (layer.experts.expert_size, layer.ffn.ffn_size) for layer in sparse_layers(model).values()}

    def watch(routing: Routing) -> None:
        seen.setdefault(routing.name, []).append(Usage.of(routing.mask_TE, *shapes[routing.name]))

    with register_routing_hook(model, watch):
        logits_of(work, work.step, calls)
    return {name: Usage.mean(usages) for name, usages in seen.items()}


def reach(model: nn.Module, work: Work, sparsity: float, calls: int) -> dict[str, Usage]:
    """Set the tau at which the calls that will be timed realise ``sparsity``, and return the usage of their layers.

    Where the experts are too large for that sparsity, tau is the one that came nearest, or leaves one expert active in
    each layer.
    """
    used: dict[float, dict[str, Usage]] = {}

    def measure(tau: float) -> float:
        set_tau(model, tau)
        used[tau] = usage(model, work, calls)
        return Usage.mean(list(used[tau].values())).sparsity

    try:
        tau = find_tau(measure, sparsity)
    except OutOfReach:
        tau = min(used)
    set_tau(model, tau)
    return used[tau] if tau in used else usage(model, work, calls)


def rounding_noise(modules: Iterable[nn.Module], work: Work, expected_RV: Tensor, calls: int, seed: int) -> float:
    """Measure how far logits move when these modules' inputs are off by some roundings.

    Two correct implementations differ by roundings, and an expert near tau may then be active in only one of them. Such
    experts are few, so noise is drawn ``NOISE_DRAWS`` times.

    Returns:
        The largest relative RMS error of a row of logits over the draws, times ``NOISE_MARGIN``.
    """
    generator = torch.Generator(expected_RV.device).manual_seed(seed)

    def perturb(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return ((x * (1 + NOISE_ROUNDINGS * torch.finfo(x.dtype).eps / 2 * noise)).to(x.dtype), *rest)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(removing(module.register_forward_pre_hook(perturb)))
        draws = [relative_rms(logits_of(work, work.step, calls), expected_RV) for _ in range(NOISE_DRAWS)]
    return NOISE_MARGIN * max(draws)
