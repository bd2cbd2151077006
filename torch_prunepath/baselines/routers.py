"""Routers of other methods, in float32 like our own whatever their weights are stored in, and how they are fitted.

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
    """Rows of norm 1, float32; a row of zeros stays one."""
    return nnf.normalize(x.float(), dim=-1)


class UnitRouter(Router):
    """A linear router that sees each token at norm 1."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., E]``."""
        return super().forward(unit(x))


class MLPRouter(Router):
    """Two linear layers; this module is the second, so that optimisers find ``weight`` and ``bias`` as they do ours.

    Attributes:
        inner: the first layer, ``D -> H``.
        activation: between them, ``"tanh"`` or ``"relu"``.
        unit_input: see each token at norm 1.
        magnitude: answer absolute values.
    """

    inner: Router
    activation: str
    unit_input: bool
    magnitude: bool

    @classmethod
    def stack(
        cls, inner: Router, outer: Router, activation: str, *, unit_input: bool = False, magnitude: bool = False
    ) -> MLPRouter:
        """A router of these two layers, which it takes over."""
        router = cls.of(outer.weight.detach(), None if outer.bias is None else outer.bias.detach())
        assert isinstance(router, MLPRouter)
        router.inner, router.activation = inner, activation
        router.unit_input, router.magnitude = unit_input, magnitude
        return router

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., E]``."""
        scores = super().forward(_ACTIVATIONS[self.activation](self.inner(unit(x) if self.unit_input else x)))
        return scores.abs() if self.magnitude else scores


def linear(inputs: int, outputs: int, *, bias: bool, device: torch.device, generator: torch.Generator) -> Router:
    """A float32 router with the weights that ``nn.Linear`` starts with, the same for the same generator."""
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
        router: float32, trained in place.
        x_ND: what it sees.
        labels_NE: what its outputs are compared with.
        loss: ``(outputs, labels) -> 0-d``, of one batch of tokens.
        lr: learning rate.
        epochs: passes over the tokens.
        batch: tokens a step.
        seed: seed of the order.
        quality: ``(outputs, labels) -> 0-d``, larger is better; then the last tenth of the tokens is held out, and the
            router of the best epoch is returned. Else that of the last.
    """
    held = len(x_ND) // 10 if quality is not None else 0
    kept = len(x_ND) - held
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
        if quality is not None and held:
            with torch.no_grad():
                now = float(quality(router(x_ND[kept:]), labels_NE[kept:]))
            if now > best_quality:
                best, best_quality = copy.deepcopy(router), now
    return best
