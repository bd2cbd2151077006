"""Dense linear layers that read one token, as one operator: the ``prunepath`` backend puts it in their place.

cuBLAS starts a kernel a layer, and two where it splits sums; at one token a step the starts cost as much as the reading
of small layers. Shapes: T tokens, D input features, N output features of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_prunepath.ops.operators import register_cuda


@torch.library.custom_op("prunepath::linears", mutates_args=())
def linears(x_TD: Tensor, weights_DN: Sequence[Tensor], biases_N: Sequence[Tensor | None]) -> list[Tensor]:
    """What several linear layers answer to the same tokens: ``x @ W + b`` each, without a gradient.

    Sums are taken in float32 on CUDA devices.

    Args:
        x_TD: ``[T, D]``; on CUDA devices T is 1.
        weights_DN: ``[D, N]`` each, any strides, in the dtype of ``x_TD``; on CUDA devices at most
            ``LINEARS_AT_ONCE`` of :mod:`torch_prunepath.csrc_triton`.
        biases_N: ``[N]`` or None for each layer.

    Returns:
        ``[T, N]`` each, contiguous, in the dtype of ``x_TD``.
    """
    layers = zip(weights_DN, biases_N, strict=True)
    return [torch.mm(x_TD, w_DN) if b_N is None else torch.addmm(b_N, x_TD, w_DN) for w_DN, b_N in layers]


@linears.register_fake
def _(x_TD: Tensor, weights_DN: Sequence[Tensor], biases_N: Sequence[Tensor | None]) -> list[Tensor]:
    return [x_TD.new_empty(x_TD.shape[0], w_DN.shape[1]) for w_DN in weights_DN]


register_cuda(linears, "linears")
