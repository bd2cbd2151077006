"""Single rows of a batch, where it can be cut into rows.

It cannot where a tensor packs what belongs to several rows, as vision-language models take the patches of all images
one after the other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def count_rows(inputs: dict[str, Any]) -> int | None:
    """The number of rows, or None if tensors differ in their first dimension: they then belong together as they are."""
    sizes = {value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def take_rows(inputs: dict[str, Any], rows: Any) -> dict[str, Any]:
    """The given rows (a slice, or int64 indices ``[B]``) of every tensor; the rest as it is."""
    return {k: v[rows] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}
