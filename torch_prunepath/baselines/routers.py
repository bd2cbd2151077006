"""Routers of other methods, and their fitting. Like ours they compute in float32, in any dtype of their weights.

Shapes: N calibration tokens, D hidden size, H width inside a router, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.layer.router import Router

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"tanh": torch.tanh, "relu": torch.relu})


def unit(x: Tensor) -> Tensor:
    """Scale each row to norm 1, in float32; a row of zeros stays as it is."""
    return nnf.normalize(x.float(), dim=-1)


class UnitRouter(Router):
    """A linear router that reads each token scaled to norm 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the scores, ``[..., D] -> [..., E]``."""
        return super().forward(unit(x))


class MLPRouter(Router):
    """A router of two linear layers. The module itself is the second, so that it has ``weight`` and ``bias`` as ours.

    Attributes:
        inner: the first layer, ``D -> H``.
        activation: activation function between the layers, ``"tanh"`` or ``"relu"``.
        unit_input: whether the router reads each token scaled to norm 1.
        magnitude: whether the scores are absolute values.
    """

    inner: Router
    activation: str
    unit_input: bool
    magnitude: bool

    @classmethod
    def stack(
        cls, inner: Router, outer: Router, activation: str, *, unit_input: bool = False, magnitude: bool = False
    ) -> MLPRouter:
        """Make a router of two layers, which must not be used elsewhere afterwards."""
        router = cls.of(outer.weight.detach(), None if outer.bias is None else outer.bias.detach())
        assert isinstance(router, MLPRouter)
        router.inner, router.activation = inner, activation
        router.unit_input, router.magnitude = unit_input, magnitude
        return router

    def forward(self, x: Tensor) -> Tensor:
        """Compute the scores, ``[..., D] -> [..., E]``."""
        scores = super().forward(_ACTIVATIONS[self.activation](self.inner(unit(x) if self.unit_input else x)))
        return scores.abs() if self.magnitude else scores


def linear(inputs: int, outputs: int, *, bias: bool, device: torch.device, generator: torch.Generator) -> Router:
    """Make a float32 router with random weights as ``nn.Linear`` has them, drawn from the generator on the CPU."""
    bound = inputs**-0.5

    def draw(*shape: int) -> Tensor:
        return ((2 * torch.rand(shape, generator=generator) - 1) * bound).to(device)

    return Router.of(draw(outputs, inputs), draw(outputs) if bias else None)


def fit(
    router: Router,
    x_ND: Tensor,
    labels_NE: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float,
    epochs: int,
    batch: int = 512,
    seed: int = 0,
    quality: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Router:
    """Train a router alone, with Adam.

    Args:
        router: the router in float32, trained in place.
        x_ND: inputs of the router.
        labels_NE: labels with which its outputs are compared.
        loss: ``(outputs, labels) -> 0-d``, the loss of one batch of tokens.
        lr: learning rate.
        epochs: passes over the tokens.
        batch: tokens a step.
        seed: seed of the order.
        quality: ``(outputs, labels) -> 0-d``, larger is better. If it is given, the last tenth of the tokens is held
            out to measure it.

    Returns:
        The router of the epoch with the best quality; without ``quality``, that of the last epoch.
    """
    held_out = len(x_ND) // 10 if quality is not None else 0
    kept = len(x_ND) - held_out
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(router.parameters(), lr=lr)
    best, best_quality = router, -torch.inf
    for _ in range(epochs):
        for part_B in torch.randperm(kept, generator=generator).to(x_ND.device).split(batch):
            with torch.enable_grad():
                term = loss(router(x_ND[part_B]), labels_NE[part_B])
            optimizer.zero_grad(set_to_none=True)
            term.backward()
            optimizer.step()
        if quality is not None and held_out:
            with torch.no_grad():
                now = float(quality(router(x_ND[kept:]), labels_NE[kept:]))
            if now > best_quality:
                best, best_quality = copy.deepcopy(router), now
    return best
