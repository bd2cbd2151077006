"""Weight-only quantisation by torchao for models that are sparse already."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from torch_prunepath.layer import SparseFFN, is_sparse
from torch_prunepath.layer.views import sparse_layers

try:
    from torchao import quantization
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("torchao is not installed: pip install torchao", name=error.name) from error


class QuantizedLinear(nn.Module):
    """A quantised projection that a sparse FFN calls as a whole; torchao computes its product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``x W^T + b``, ``[..., in] -> [..., out]``."""
        return nnf.linear(x, self.weight, self.bias)


def quantize_(model: nn.Module, config: Any, *, experts: bool = False) -> None:
    """Quantise the linear layers of a sparse model in place, with :func:`torchao.quantization.quantize_`.

    Routers are not quantised, so they choose experts as before. transformers cannot save the result: save the sparse
    model first, and quantise it again in each process.

    Args:
        model: a sparse model.
        config: a config of torchao, such as ``Int8WeightOnlyConfig()``.
        experts: quantise the projections of sparse FFNs, too. These then compute all neurons and drop the inactive
            ones, which saves memory but no time. Without it, the projections stay as they are, and fast. FFNs whose
            layers the model calls one by one (BERT, OPT) are never quantised.

    Raises:
        ValueError: if the model holds no sparse FFN.
    """
    layers = sparse_layers(model)
    inside = {id(part) for module in model.modules() if is_sparse(module) for part in module.modules()}
    whole = [layer for layer in layers.values() if isinstance(layer, SparseFFN)] if experts else []
    names = [(layer, name) for layer in whole for name in (layer.ffn.up, layer.ffn.gate, layer.ffn.down) if name]
    taken = {id(layer.get_submodule(name)) for layer, name in names}

    def chosen(module: nn.Module, _: str) -> bool:
        known = isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
        return known and (id(module) not in inside or id(module) in taken)

    quantization.quantize_(model, config, filter_fn=chosen)
    for layer, name in names:
        module = layer.get_submodule(name)
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            layer.set_submodule(name, QuantizedLinear(module))
