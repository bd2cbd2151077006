"""How much of each FFN is read: shares of experts, inputs, neurons and bytes, counted call by call.

Shapes: T tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_prunepath.layer import RoutedExperts, Routing
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.sparse import Neurons, SparseDown
from torch_prunepath.layer.views import norm_keepers, sparse_layers, sparse_views
from torch_prunepath.select import uncounted

Keep = Callable[[Sequence[int]], Tensor | None]
"""A function from an activation's leading dimensions to which of its tokens count, bool ``[T]``; None: all do."""


class Shares(NamedTuple):
    """What one token's output needs of an FFN, or of all of them, on average.

    Attributes:
        experts: active experts, of all experts.
        inputs: inputs that count, of all inputs.
        neurons: neurons that count, of those of active experts.
        bytes: bytes of weights that are read, of the FFN's: gate and up in the rows of active experts and the columns
            of inputs that count, down in the rows of neurons that count, and the router, whole. The router is no part
            of what they are divided by, so that this may be above 1. Biases are left out.
    """

    experts: float
    inputs: float
    neurons: float
    bytes: float


class _Sizes(NamedTuple):
    """An FFN's sizes in numbers of things, and in bytes."""

    experts: int
    inputs: int
    neurons: int
    up_bytes: int
    down_bytes: int
    router_bytes: int

    @classmethod
    def of(cls, layer: RoutedExperts, view: FFNView) -> _Sizes:
        first = [weight for weight in (view.up_FD, view.gate_FD) if weight is not None]
        spec, router = layer.ffn, layer.router.weight
        sizes = (layer.num_experts, spec.hidden_size, spec.ffn_size)
        each = [weight.numel() * weight.element_size() for weight in (view.down_FD, router)]
        return cls(*sizes, sum(weight.numel() * weight.element_size() for weight in first), *each)


class _Sums:
    """Sums over one layer's tokens, on its device."""

    def __init__(self) -> None:
        self.tokens: Tensor | int = 0
        self.experts: Tensor | int = 0
        self.inputs: Tensor | int = 0
        self.active: Tensor | int = 0  # neurons of active experts
        self.counted: Tensor | int = 0  # those of them that count
        self.products: Tensor | int = 0  # neurons of active experts times inputs that count

    def add(self, real_T: Tensor, experts_T: Tensor, active_T: Tensor, inputs_T: Tensor) -> None:
        self.tokens = self.tokens + real_T.sum()
        self.experts = self.experts + (experts_T * real_T).sum()
        self.inputs = self.inputs + (inputs_T * real_T).sum()
        self.active = self.active + (active_T * real_T).sum()
        self.products = self.products + (active_T * inputs_T * real_T).sum()


class ShareCounts:
    """Counts of what the sparse layers of a model read. Counting does not synchronise with the device."""

    def __init__(self) -> None:
        self._sizes: dict[str, _Sizes] = {}
        self._sums: dict[str, _Sums] = {}

    @contextmanager
    def watching(self, model: nn.Module, keep: Keep) -> Iterator[Callable[[Routing], None]]:
        """Count neurons while the context is open; yields the routing hook that counts the rest.

        Args:
            model: a sparse model.
            keep: which tokens count.
        """
        layers, views = sparse_layers(model), sparse_views(model)
        named = {layer.name: layer for layer in layers.values()}
        self._sizes = {layer.name: _Sizes.of(layer, views[key]) for key, layer in layers.items()}

        def routed(routing: Routing) -> None:
            self._count_routing(named[routing.name], routing, keep)

        def answered(neurons: Neurons) -> None:
            off_TF = uncounted(neurons.h_TF, neurons.threshold)
            counted_T = (neurons.active_TF & ~off_TF).sum(-1)
            real_T = _real(keep(neurons.shape), counted_T)
            sums = self._sums[neurons.name]
            sums.counted = sums.counted + (counted_T * real_T).sum()

        with neuron_hooks(model, answered):
            yield routed

    def _count_routing(self, layer: RoutedExperts, routing: Routing, keep: Keep) -> None:
        inactive_T, inputs = layer.inactive_neurons(routing.mask_TE), layer.inputs_threshold
        inputs_T = torch.full_like(inactive_T, layer.ffn.hidden_size)
        if inputs is not None:
            inputs_T = inputs_T - uncounted(routing.x_TD, inputs).sum(-1)
        active_T = layer.ffn.ffn_size - inactive_T
        real_T = _real(keep(routing.shape), inactive_T)
        sums = self._sums.setdefault(layer.name, _Sums())
        sums.add(real_T, routing.mask_TE.sum(-1), active_T, inputs_T)
        if inputs is None:  # without thresholds nobody looks at neurons
            sums.counted = sums.counted + (active_T * real_T).sum()

    def per_layer(self) -> dict[str, Shares]:
        """The shares of each layer, averaged over the tokens it saw."""
        return {name: self._shares(name)[0] for name in self._sums}

    def overall(self) -> Shares:
        """The shares averaged over layers; bytes of all layers together, of the bytes of all."""
        found = [self._shares(name) for name in self._sums]
        assert found, "no token ran"
        experts, inputs, neurons, _ = (sum(each) / len(found) for each in zip(*(s for s, _ in found), strict=True))
        read = sum(shares.bytes * size for shares, size in found) / sum(size for _, size in found)
        return Shares(experts, inputs, neurons, read)

    def _shares(self, name: str) -> tuple[Shares, int]:
        sums, sizes = self._sums[name], self._sizes[name]
        tokens = max(int(sums.tokens), 1)
        experts, inputs = int(sums.experts) / tokens / sizes.experts, int(sums.inputs) / tokens / sizes.inputs
        counted = int(sums.counted)
        up = int(sums.products) / tokens / (sizes.neurons * sizes.inputs)
        down = counted / tokens / sizes.neurons
        size = sizes.up_bytes + sizes.down_bytes
        read = up * sizes.up_bytes + down * sizes.down_bytes + sizes.router_bytes
        return Shares(experts, inputs, counted / max(int(sums.active), 1), read / size), size


def _real(keep_T: Tensor | None, like_T: Tensor) -> Tensor:
    return torch.ones_like(like_T) if keep_T is None else keep_T.to(like_T)


@contextmanager
def neuron_hooks(model: nn.Module, hook: Callable[[Neurons], None]) -> Iterator[None]:
    """Call ``hook`` with the neurons of every layer that has a threshold on them, while the context is open."""
    layers, views = sparse_layers(model), sparse_views(model)
    last = {name: norm_keepers(layer, views[name])[-1] for name, layer in layers.items()}
    for name, module in last.items():
        if isinstance(module, SparseDown):
            module.name = layers[name].name
        module.neuron_hooks = (*module.neuron_hooks, hook)
    try:
        yield
    finally:
        for module in last.values():
            module.neuron_hooks = tuple(one for one in module.neuron_hooks if one is not hook)
