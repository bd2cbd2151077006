"""Norms of weights, which the thresholds on inputs and on neurons compare activations with; kept once they are needed.

A module that never had a threshold keeps none, and computes what it would without this file. One that has some keeps
them in buffers that are overwritten in place, so that compiled code goes on with what is in them.

Shapes: D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from torch_prunepath.layer.buffers import Float32Buffers


def column_norms(*rows_FD: Tensor) -> Tensor:
    """The norm of each column of all these weights together, float32 ``[D]``."""
    norms = [torch.linalg.vector_norm(rows.detach(), dim=0, dtype=_wide(rows)) for rows in rows_FD]
    return (norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)).float()


def row_norms(rows_FD: Tensor) -> Tensor:
    """The norm of each row, float32 ``[F]``."""
    return torch.linalg.vector_norm(rows_FD.detach(), dim=1, dtype=_wide(rows_FD)).float()


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def are_readable(*weights: Tensor) -> bool:
    """Whether norms can be computed of these weights: they are here (not on the meta device), whole and unquantised."""
    return all(
        type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta
        for weight in weights
    )


class KeepsNorms(Float32Buffers):
    """Mixed into modules that can keep norms of their weights: the buffers that :meth:`weights_with_norms` names.

    ``has_norms`` says whether there are any. They are computed again when weights may have changed: after
    ``load_state_dict``, ``to()`` and its like, and at every ``train()`` and ``eval()``. While the module trains, the
    norms in use are those of the weights as they are.
    """

    has_norms: bool = False

    def weights_with_norms(self) -> Mapping[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
        """Buffer by buffer, the function that computes it, and the weights that it is computed of."""
        raise NotImplementedError

    def can_keep_norms(self) -> bool:
        """Whether norms can be computed of the weights as they are stored now."""
        return all(are_readable(*weights) for _, weights in self.weights_with_norms().values())

    def norms_now(self) -> dict[str, Tensor]:
        """The norms, of the weights as they are now; they carry no gradient."""
        return {name: compute(*weights) for name, (compute, weights) in self.weights_with_norms().items()}

    def norm(self, name: str) -> Tensor:
        """One of the norms, to compute with: while the module trains, of the weights as they are now."""
        if self.training:
            compute, weights = self.weights_with_norms()[name]
            if are_readable(*weights):
                return compute(*weights)
        kept: Tensor = getattr(self, name)
        return kept

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def keep_norms(self) -> None:
        """Begin to keep norms, or compute those that are kept again."""
        if self.has_norms:
            self.refresh_norms()
            return
        for name, norm in self.norms_now().items():
            self.register_buffer(name, norm, persistent=False)
        self.register_load_state_dict_post_hook(refresh_after_loading)
        self.has_norms = True

    @torch.no_grad()
    def refresh_norms(self) -> None:
        """Compute the norms again, in place, if any are kept and the weights can be read."""
        if self.has_norms and self.can_keep_norms():
            for name, norm in self.norms_now().items():
                getattr(self, name).copy_(norm)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation."""
        super().train(mode)
        self.refresh_norms()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.refresh_norms()
        return self


def refresh_after_loading(module: nn.Module, keys: Any) -> None:
    """The hook of a module that keeps norms, called when its state dict was loaded."""
    assert isinstance(module, KeepsNorms)
    module.refresh_norms()


def forget_norms(module: nn.Module) -> None:
    """Undo :meth:`KeepsNorms.keep_norms`."""
    module.__dict__.pop("has_norms", None)
    for name in ("column_norm_D", "row_norm_F"):
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    hooks = module._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is refresh_after_loading]:
        del hooks[key]
