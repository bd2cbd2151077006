"""Copies of a layer's weights in oneDNN's order, for bfloat16 calls of several tokens on a CPU.

A sparse layer stores ``down`` by rows, which few tokens read in place; oneDNN, torch's library for bfloat16, reorders
that layout at every product, for as long as the product itself takes. A copy in oneDNN's own order costs memory and
makes products of few tokens up to twice as fast as those with an ordinary weight.

Shapes: T tokens, D hidden size, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SAMPLES = 256
"""How many numbers of a weight every call compares with what they were when it was copied. One of every row and column
took 154 us in place of 20 (docs/log.md, "what bounds bfloat16 calls of several tokens on a CPU")."""

FIRST_CALL = 2
"""The call that makes the copies. One prompt alone would lose by them: for one of 2048 x 8192 numbers it takes 20 ms to
save 2 at every call of 8 tokens (docs/log.md, "bfloat16 on a CPU, several tokens, again")."""

SMALL_BYTES = 128 << 10
"""Size of a weight below which a copy is not worth its checks at every call; a guess."""

Name = Literal["router", "up", "gate", "down"]


@dataclass(frozen=True)
class _Copy:
    """A reordered weight, and how to tell whether it is still a copy.

    Attributes:
        state: where the weight was, its version and its layout.
        sample_N: some of its numbers, as they were.
        packed: the weight in oneDNN's own order.
    """

    state: tuple[object, ...]
    sample_N: Tensor
    packed: Tensor


class Packs:
    """A layer's reordered copies of ``down`` and the router, made when the second call of several tokens asks for them.

    No layer has them unless it is given them: ``layer.packs = Packs()``. They belong to the layer, but not to the state
    that is saved: copies and pickles of this object are empty. A changed weight is noticed by its address and version,
    and, where something went around those (``weight.data``), by 256 of its numbers. After an edit of single neurons
    through ``weight.data``, call :meth:`clear`.

    Args:
        every: whether ``up`` and ``gate`` are copied as well: faster at few tokens, for twice the FFN's memory.
    """

    def __init__(self, every: bool = False) -> None:
        self.every = every
        self._calls = 0
        self._copies: dict[Name, _Copy] = {}

    def __reduce__(self) -> tuple[type[Packs], tuple[bool]]:
        return Packs, (self.every,)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(copy.packed.numel() * copy.packed.element_size() for copy in self._copies.values())

    def clear(self) -> None:
        """Drop the copies; the second call of several tokens from now makes them anew."""
        self._calls = 0
        self._copies.clear()

    def count(self) -> bool:
        """Note a call of several tokens; returns whether copies are to be used in it."""
        if not torch.backends.mkldnn.enabled:  # type: ignore[truthy-bool]
            return False
        self._calls = min(self._calls + 1, FIRST_CALL)
        return self._calls == FIRST_CALL

    def of(self, name: Name, weight_oi: Tensor) -> Tensor | None:
        """The copy of a weight ``[out, in]``, for :func:`linear`; None if it has none.

        Args:
            name: which weight it is; ``up`` and ``gate`` have copies if :attr:`every` says so.
            weight_oi: bfloat16 in this machine's memory (anything else has no copy); the router's copy is float32.
        """
        if not self.every and name in ("up", "gate"):
            return None
        copy = self._copies.get(name)
        if copy is not None and copy.state == _state(weight_oi) and torch.equal(_sample(weight_oi), copy.sample_N):
            return copy.packed
        self._copies.pop(name, None)
        if not _suits(weight_oi):
            return None
        made = _pack(weight_oi, torch.float32 if name == "router" else torch.bfloat16)
        self._copies[name] = made
        return made.packed


def linear(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    """Linear layer ``x W^T + b`` from the copy of ``W``: ``[T, out]``."""
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, packed, bias_O, "none", [], "")
    return y_TO


def _pack(weight_oi: Tensor, dtype: torch.dtype) -> _Copy:
    # The state is read before the copy is made: a change meanwhile shows at the next call.
    state, sample_N = _state(weight_oi), _sample(weight_oi).clone()
    return _Copy(state, sample_N, torch.ops.mkldnn._reorder_linear_weight(weight_oi.detach().to(dtype)))


def _suits(weight_oi: Tensor) -> bool:
    """Whether oneDNN has bfloat16 products, the weight's changes are counted, and its sample can be compared."""
    rows = weight_oi if weight_oi.is_contiguous() else weight_oi.t()
    return (
        weight_oi.dtype == torch.bfloat16
        and rows.is_contiguous()
        and weight_oi.nbytes >= SMALL_BYTES
        and not weight_oi.is_inference()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and not bool(_sample(weight_oi).isnan().any())
    )


def _state(weight_oi: Tensor) -> tuple[object, ...]:
    version = -1 if weight_oi.is_inference() else weight_oi._version
    return weight_oi.data_ptr(), version, weight_oi.shape, weight_oi.stride(), weight_oi.dtype


def _sample(weight_oi: Tensor) -> Tensor:
    """Evenly spread numbers, a view; the odd step visits many rows and columns."""
    step = weight_oi.numel() // SAMPLES | 1
    return weight_oi.detach().as_strided((weight_oi.numel() // step,), (step,))
