"""How the weights of sparse layers lie in memory: ordinary strides, or each neuron's numbers together.

Shapes: D hidden size, F neurons.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from torch_prunepath.layer import RoutedExperts, SparseFFN
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.views import sparse_layers, sparse_views

ModelT = TypeVar("ModelT", bound=nn.Module)


def contiguous(model: ModelT) -> ModelT:
    """Store every weight of a sparse model with ordinary strides, in place. Values do not change.

    Sparse models keep ``down``, ``[D, F]``, column by column, since decoding reads columns (in GPT-2's layers, which
    store ``[in, out]``, it is the other weights). What calls ``.view(-1)`` on parameters or asks for contiguous tensors
    needs this first: ``parameters_to_vector``, ``torch.nn.utils.prune``, ``torch.optim.LBFGS``, safetensors'
    ``save_file``, FSDP2's ``fully_shard``. Decoding then reads strided columns and is slower. :func:`neuron_major`, or
    saving and loading, brings the fast layout back.

    Returns:
        The same model.

    Example::

        torch_prunepath.contiguous(model)
        vector = torch.nn.utils.parameters_to_vector(model.parameters())

    Raises:
        ValueError: if the model holds no sparse FFN.
    """
    with torch.no_grad():
        for layer, view in _layers(model):
            _forget_copies(layer)
            for parameter in view.parameters():
                parameter.data = parameter.data.contiguous()
    return model


def neuron_major(model: ModelT) -> ModelT:
    """Store each neuron's numbers together, in place, as :func:`torch_prunepath.sparsify` does. Values do not change.

    It undoes :func:`contiguous`.

    Returns:
        The same model.

    Raises:
        ValueError: if the model holds no sparse FFN.
    """
    for layer, view in _layers(model):
        _forget_copies(layer)
        view.lay_out_()
    return model


def _layers(model: nn.Module) -> list[tuple[RoutedExperts, FFNView]]:
    return list(zip(sparse_layers(model).values(), sparse_views(model).values(), strict=True))


def _forget_copies(layer: RoutedExperts) -> None:
    if isinstance(layer, SparseFFN) and layer.packs is not None:
        layer.packs.clear()
