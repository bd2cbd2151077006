"""Single rows of a batch, where it can be cut into rows.

It cannot where a tensor packs what belongs to several rows, as vision-language models take the patches of all images
one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHORT = 8
"""Tokens of a small part: enough to run any model, few enough to cost nothing beside the data."""


def count_rows(inputs: dict[str, Any]) -> int | None:
    """The number of rows, or None if tensors differ in their first dimension: they then belong together as they are."""
    sizes = {value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def take_rows(inputs: dict[str, Any], rows: Any) -> dict[str, Any]:
    """The given rows (a slice, or int64 indices ``[B]``) of every tensor; the rest as it is."""
    return {k: v[rows] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}


def spread(count: int, wanted: int, together: int = 1) -> Tensor:
    """Which of ``count`` rows to take, evenly spread, in whole groups of ``together``: int64, about ``wanted`` rows."""
    first = torch.linspace(0, count // together - 1, max(1, wanted // together)).round().long() * together
    return (first[:, None] + torch.arange(together)).flatten()


def small_part(inputs: dict[str, Any], rows: int = 1) -> dict[str, Any]:
    """The first rows, and their first tokens, of what can be cut into rows; the rest as it is."""
    part = inputs if count_rows(inputs) is None else take_rows(inputs, slice(rows))
    tensors = {key: value for key, value in part.items() if isinstance(value, Tensor)}
    # Shorter rows only where every input has them: a token's box or codebooks come in a tensor of another shape.
    if all(value.dim() == 2 and not value.is_floating_point() for value in tensors.values()):
        part = {**part, **{key: value[:, :SHORT] for key, value in tensors.items()}}
    return part
