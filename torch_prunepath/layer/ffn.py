"""One feed-forward network of a model, seen the same way whatever its layers are called or how they store weights.

Shapes: T tokens, D hidden size, F neurons. A *row* of a weight is the D numbers that belong to one neuron: a row of
gate and up, a column of down.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torch_prunepath.activations import activate
from torch_prunepath.config import FFNSpec
from torch_prunepath.weights import FFNWeights, UpWeights


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is ``nn.Linear`` or a transposed linear layer like GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer that stores its weight as ``[in, out]``."""
    if type(module) is nn.Linear:  # decided at once: sparse layers ask in every call
        return False
    weight = getattr(module, "weight", None)
    return (
        any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )


def weight_out_in(module: nn.Module) -> Tensor:
    """The weight as ``[out, in]``, a view."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if is_transposed(module) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias ``[out]``, or None."""
    return getattr(module, "bias", None)


def is_shard(weight: object) -> bool:
    """Whether a weight is a ``DTensor``, of which this process holds a part."""
    return hasattr(weight, "device_mesh") and hasattr(weight, "placements")


def is_subclass(weight: object) -> bool:
    """Whether a weight computes in a way of its own: quantised by torchao, or shared out over ranks.

    Raises:
        ValueError: if it is shared out over ranks and not gathered: a layer would take its part for the whole.
    """
    if type(weight) is nn.Parameter or weight is None or not is_traceable_wrapper_subclass(weight):
        return False
    if is_shard(weight):
        raise ValueError(
            "the weights of a sparse layer are shared out over ranks (DTensor) and not gathered when it runs: sparse "
            "layers run with whole weights, on one GPU or under FSDP2, not with tensor parallelism"
        )
    return True


def _weight_bytes(module: nn.Module | None) -> int:
    if module is None:
        return 0
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.numel() * weight.element_size()


def _set_weight(module: nn.Module, weight_oi: Tensor) -> None:
    """Store a weight ``[out, in]`` in the module's own orientation; parameter object and given strides stay."""
    module.weight.data = weight_oi.t() if is_transposed(module) else weight_oi  # type: ignore[union-attr]


def site_name(spec: FFNSpec) -> str:
    """Qualified name of the module that owns the router once the FFN is sparse: the owner, or ``up`` if split."""
    parts = [spec.name, spec.up] if spec.split else [spec.name]
    return ".".join(part for part in parts if part)


class FFNView:
    """An :class:`FFNSpec` resolved against a model: its modules, its weights as rows, and what it computes.

    Args:
        model: the model that ``spec.name`` is a submodule of.
        spec: where the FFN is.
    """

    def __init__(self, model: nn.Module, spec: FFNSpec) -> None:
        self._resolve(model.get_submodule(spec.name), spec)

    @classmethod
    def of_owner(cls, owner: nn.Module, spec: FFNSpec) -> FFNView:
        """A view from the module that ``spec.name`` names."""
        view = cls.__new__(cls)
        view._resolve(owner, spec)
        return view

    def _resolve(self, owner: nn.Module, spec: FFNSpec) -> None:
        self.spec = spec
        self.owner = owner
        self.up = self.owner.get_submodule(spec.up)
        self.down = self.owner.get_submodule(spec.down)
        self.gate = None if spec.gate is None else self.owner.get_submodule(spec.gate)

    @property
    def site(self) -> str:
        """Qualified name of the module that owns the router once the FFN is sparse."""
        return site_name(self.spec)

    def _halves(self, tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The parts of gate and of up in something whose first dimension is the output features of ``up``."""
        if tensor is None or self.spec.fused is None:
            return None, tensor
        first, second = tensor.split(self.spec.ffn_size)
        return (first, second) if self.spec.fused == "gate_up" else (second, first)

    @property
    def gate_FD(self) -> Tensor | None:
        """Gate rows ``[F, D]``, a view; None if the FFN is plain."""
        return self._halves(weight_out_in(self.up))[0] if self.gate is None else weight_out_in(self.gate)

    @property
    def up_FD(self) -> Tensor:
        """Up (fc1) rows ``[F, D]``, a view."""
        up_FD = self._halves(weight_out_in(self.up))[1]
        assert up_FD is not None
        return up_FD

    @property
    def down_FD(self) -> Tensor:
        """Down (fc2) rows ``[F, D]``, a view."""
        return weight_out_in(self.down).t()

    @property
    def gate_bias_F(self) -> Tensor | None:
        """Bias of the gate ``[F]``, or None."""
        return self._halves(bias_of(self.up))[0] if self.gate is None else bias_of(self.gate)

    @property
    def up_bias_F(self) -> Tensor | None:
        """Bias of up ``[F]``, or None."""
        return self._halves(bias_of(self.up))[1]

    @property
    def down_bias_D(self) -> Tensor | None:
        """Bias of down ``[D]``, or None."""
        return bias_of(self.down)

    @property
    def up_weights(self) -> UpWeights:
        """What makes hidden activations, all views."""
        return UpWeights(self.up_FD, self.up_bias_F, self.gate_FD, self.gate_bias_F)

    @property
    def weights(self) -> FFNWeights:
        """All weights of the FFN, all views."""
        return FFNWeights(self.up_FD, self.up_bias_F, self.gate_FD, self.gate_bias_F, self.down_FD, self.down_bias_D)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """What ``down`` receives, ``[T, F]``, in the dtype of ``x_TD`` (weights are cast to it)."""
        return activate(*self.up_weights.to(x_TD.dtype).project(x_TD), self.spec.activation)

    @torch.no_grad()
    def permute_(self, order_F: Tensor) -> None:
        """Put neuron ``order_F[i]`` at place ``i``, in place, each neuron's rows contiguous in memory.

        The dense FFN computes the same function, under the same parameter names and shapes; ``down`` of ``nn.Linear``
        keeps its shape ``[D, F]`` and gets the strides of a transposed ``[F, D]`` array. Needs the memory of one more
        weight.

        Args:
            order_F: int64 ``[F]``, a permutation.
        """
        order_F = order_F.to(self.up.weight.device, torch.int64)  # type: ignore[union-attr, arg-type]
        rows = order_F if self.spec.fused is None else torch.cat([order_F, order_F + self.spec.ffn_size])
        for module, order in ((self.up, rows), (self.gate, order_F)):
            if module is None:
                continue
            _set_weight(module, weight_out_in(module).index_select(0, order))
            bias = bias_of(module)
            if bias is not None:
                bias.data = bias.index_select(0, order)
        _set_weight(self.down, self.down_FD.index_select(0, order_F).t())

    @torch.no_grad()
    def lay_out_(self) -> None:
        """Give every weight the strides that :meth:`permute_` gives: each neuron's rows contiguous."""
        for module in (self.up, self.gate):
            if module is not None:
                _set_weight(module, weight_out_in(module).contiguous())
        _set_weight(self.down, self.down_FD.contiguous().t())

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes of the weights of gate and up (or fc1), and of down, as their dtypes say; biases left out."""
        # Not by views of the weights: quantised ones have none.
        up, gate, down = (_weight_bytes(module) for module in (self.up, self.gate, self.down))
        return up + gate, down

    def parameters(self) -> list[Tensor]:
        """Every weight and bias that :meth:`permute_` moves."""
        modules = [module for module in (self.up, self.gate, self.down) if module is not None]
        return [p for module in modules for p in (module.weight, bias_of(module)) if isinstance(p, Tensor)]

    @torch.no_grad()
    def unpermute_(self, order_F: Tensor) -> None:
        """Undo :meth:`permute_` bit-exactly, and give the weights their ordinary strides back."""
        self.permute_(torch.argsort(order_F.to(torch.int64)))
        for parameter in self.parameters():
            # contiguous() would leave odd strides where a dimension is 1.
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device).copy_(
                parameter
            )
