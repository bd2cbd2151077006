"""How sparse a model was over the tokens that count, where which ones count is known only after each forward pass.

An evaluation harness pads its batches without telling the model; :func:`torch_prunepath.record_sparsity` would count
the padding. Here every call of every layer is noted first, and counted once somebody says which tokens were real.

Shapes: T tokens of one call, rows by positions, padding among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_prunepath.layer import RoutedExperts, Routing, RoutingHook
from torch_prunepath.sparsity import sparse_layers


class Noted(NamedTuple):
    """One call of one layer: the layer's name, and how many neurons were inactive for each token, int64 ``[T]``."""

    name: str
    inactive_T: Tensor


class SparsityTally:
    """Notes what the sparse layers of ``model`` choose, until :meth:`close`; counts what it is told to count.

    Raises:
        ValueError: if the model holds no sparse FFN.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = sparse_layers(model)
        self._noted: list[Noted] = []
        self._neurons = {name: layer.ffn.ffn_size for name, layer in layers.items()}
        self._handles: list[Any] = [
            layer.register_routing_hook(self._note(name, layer)) for name, layer in layers.items()
        ]
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._noted.clear()
        self._inactive: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    def close(self) -> None:
        """Stop noting. What was counted stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note(self, name: str, layer: RoutedExperts) -> RoutingHook:
        size, neurons = layer.experts.expert_size, layer.ffn.ffn_size
        missing = layer.num_experts * size - neurons  # of the last expert

        def hook(routing: Routing) -> None:
            active_T = routing.mask_TE.sum(-1) * size - routing.mask_TE[:, -1].long() * missing
            self._noted.append(Noted(name, neurons - active_T))

        return hook

    def take(self) -> list[Noted]:
        """What was noted since the last time, in the order of the calls."""
        noted, self._noted[:] = list(self._noted), []
        return noted

    def count(self, noted: Noted, keep_T: Tensor) -> None:
        """Add one call's tokens to the average: those where ``keep_T``, bool ``[T]``, is true. Does not synchronise."""
        name, inactive_T = noted
        keep_T = keep_T.to(inactive_T.device)
        self._inactive[name] = self._inactive.get(name, 0) + (inactive_T * keep_T).sum()
        self._tokens[name] = self._tokens.get(name, 0) + keep_T.sum()

    @property
    def per_layer(self) -> dict[str, float]:
        """Share of inactive neurons of each layer that counted tokens, averaged over them."""
        return {
            name: int(inactive) / int(self._tokens[name]) / self._neurons[name]
            for name, inactive in self._inactive.items()
            if int(self._tokens[name])
        }

    @property
    def sparsity(self) -> float | None:
        """Share of inactive neurons, averaged over tokens, then over layers; None if no token was counted."""
        shares = self.per_layer.values()
        return sum(shares) / len(shares) if shares else None


def first_tokens(lengths: Sequence[int], tokens: int) -> Tensor:
    """Which tokens of a batch padded on the right are real.

    Args:
        lengths: real tokens of each row.
        tokens: T, tokens of the batch.

    Returns:
        bool ``[T]``, row by row.
    """
    width = tokens // len(lengths)
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).reshape(-1)
