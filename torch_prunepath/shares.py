"""How much of each FFN is read: shares of experts, inputs, neurons and bytes, counted call by call.

Shapes: T tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.sparse import Neurons
from torch_prunepath.select import uncounted


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


class Reads(NamedTuple):
    """What one call reads of a layer, token by token: int64 ``[T]`` each.

    Attributes:
        experts_T: active experts.
        inputs_T: inputs that count.
        active_T: neurons of active experts.
        counted_T: those of them that count; None where a threshold on neurons is still to be compared with.
    """

    experts_T: Tensor
    inputs_T: Tensor
    active_T: Tensor
    counted_T: Tensor | None

    @classmethod
    def of(cls, layer: RoutedExperts, x_TD: Tensor, mask_TE: Tensor, inactive_T: Tensor) -> Reads:
        """What a selection reads. Does not synchronise with the device."""
        inputs = layer.inputs_threshold
        active_T = layer.ffn.ffn_size - inactive_T
        inputs_T = torch.full_like(inactive_T, layer.ffn.hidden_size)
        if inputs is not None:
            inputs_T = inputs_T - uncounted(x_TD, inputs).sum(-1)
        return cls(mask_TE.sum(-1), inputs_T, active_T, active_T if inputs is None else None)


def counted_neurons(neurons: Neurons) -> Tensor:
    """How many neurons of active experts count for each token, int64 ``[T]``."""
    return (neurons.active_TF & ~uncounted(neurons.h_TF, neurons.threshold)).sum(-1)


class _Sizes(NamedTuple):
    """Number of a layer's experts, and bytes of its weights."""

    experts: int
    up_bytes: int
    down_bytes: int
    router_bytes: int

    @classmethod
    def of(cls, layer: RoutedExperts, view: FFNView) -> _Sizes:
        up_bytes, down_bytes = view.num_bytes
        router_ED = layer.router.weight
        return cls(layer.num_experts, up_bytes, down_bytes, router_ED.numel() * router_ED.element_size())


class ShareTally:
    """What one layer reads, added up in place where the layer is; torch.compile traces it once for all that are alike.

    Attributes:
        tokens, experts, inputs: 0-d int64, tokens that were counted, their active experts, and their inputs that count.
        active, counted: 0-d int64, neurons of active experts, and those of them that count.
        products: 0-d int64, token by token, neurons of active experts times inputs that count.
    """

    @torch.inference_mode(mode=False)
    def __init__(self, layer: RoutedExperts, view: FFNView, device: torch.device) -> None:
        self._sizes = _Sizes.of(layer, view)
        self.neurons, self.channels = layer.ffn.ffn_size, layer.ffn.hidden_size
        self.tokens, self.experts, self.inputs, self.active, self.counted, self.products = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(6)
        )

    @torch.no_grad()
    def add(self, reads: Reads, keep_T: Tensor | None) -> None:
        """Count one call's tokens, those where ``keep_T`` is true, or all of them."""
        real_T = torch.ones_like(reads.active_T) if keep_T is None else keep_T.to(reads.active_T)
        active_T = reads.active_T * real_T
        _add(self.tokens, real_T)
        _add(self.experts, reads.experts_T * real_T)
        _add(self.inputs, reads.inputs_T * real_T)
        _add(self.active, active_T)
        _add(self.products, active_T * reads.inputs_T)
        if reads.counted_T is not None:
            _add(self.counted, reads.counted_T * real_T)

    @torch.no_grad()
    def add_neurons(self, counted_T: Tensor, keep_T: Tensor | None) -> None:
        """Count the neurons that count of a call that was added before they were known."""
        _add(self.counted, counted_T if keep_T is None else counted_T * keep_T.to(counted_T))

    @property
    def ffn_bytes(self) -> int:
        """Bytes of the FFN's weights, router and biases left out."""
        return self._sizes.up_bytes + self._sizes.down_bytes

    def shares(self) -> Shares:
        """The shares, averaged over tokens; synchronises with the device."""
        sizes, tokens, counted = self._sizes, max(int(self.tokens), 1), int(self.counted)
        up = int(self.products) / tokens / (self.neurons * self.channels)
        down = counted / tokens / self.neurons
        return Shares(
            int(self.experts) / tokens / sizes.experts,
            int(self.inputs) / tokens / self.channels,
            counted / max(int(self.active), 1),
            (up * sizes.up_bytes + down * sizes.down_bytes + sizes.router_bytes) / self.ffn_bytes,
        )


def overall(tallies: Sequence[ShareTally]) -> Shares:
    """Shares averaged over layers; bytes of all layers together, of the bytes of all."""
    each = [tally.shares() for tally in tallies]
    experts, inputs, neurons, _ = (sum(values) / len(each) for values in zip(*each, strict=True))
    read = sum(shares.bytes * tally.ffn_bytes for shares, tally in zip(each, tallies, strict=True))
    return Shares(experts, inputs, neurons, read / sum(tally.ffn_bytes for tally in tallies))


def _add(total: Tensor, values_T: Tensor) -> None:
    total.add_(values_T.sum().to(total.device))
