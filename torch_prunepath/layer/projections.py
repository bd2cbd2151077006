"""What a sparse layer computes with its projections: by operators where they are just weights, else by calling them.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_prunepath.activations import activate
from torch_prunepath.layer.ffn import FFNView, bias_of, is_subclass, weight_out_in
from torch_prunepath.ops.experts import weigh, zero_inactive
from torch_prunepath.ops.operators import expert_down, expert_up
from torch_prunepath.ops.transforms import transformable
from torch_prunepath.select import keep_counted
from torch_prunepath.weights import Threshold, UpWeights


def is_plain(view: FFNView, *modules: nn.Module | None) -> bool:
    """Whether each module is just its weight: not wrapped (LoRA), quantised, offloaded, or watched by forward hooks.

    Raises:
        ValueError: if a weight is shared out over ranks.
    """
    known: tuple[type, ...] = view.owner.projection_types  # type: ignore[assignment]
    for module in modules:
        # Its own weight first, to refuse a shard whatever else there is. Sparse layers ask in every call.
        if module is not None and (
            is_subclass(module._parameters.get("weight")) or type(module) not in known or is_watched(module)
        ):
            return False
    return True


def check_whole(*modules: nn.Module | None) -> None:
    """Refuse projections of which this process holds a part.

    Raises:
        ValueError: if a weight is shared out over ranks.
    """
    for module in modules:
        is_subclass(getattr(module, "weight", None))


def runs_here_and_now(x_TD: Tensor) -> bool:
    """Whether the input is in this machine's memory and nobody traces, compiles or intercepts operators."""
    return (
        type(x_TD) is Tensor
        and x_TD.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.jit.is_tracing()
    )


def is_watched(module: nn.Module) -> bool:
    """Whether something hooks into the module's forward or replaces it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_idle(owner: nn.Module, dropout: str | float | None) -> bool:
    """Whether this dropout, if there is one, does nothing: a person may switch it on in a model that evaluates."""
    if isinstance(dropout, float):
        return not owner.training
    module = None if dropout is None else owner.get_submodule(dropout)
    return module is None or not (module.training or is_watched(module))


def up(
    view: FFNView, x_TD: Tensor, mask_TE: Tensor, activation: str, size: int, inputs: Threshold | None = None
) -> Tensor:
    """What goes into the last projection, 0 where experts are inactive: ``[T, D] -> [T, F]``."""
    if is_plain(view, view.up, view.gate):
        return up_of(x_TD, mask_TE, view.up_weights, activation, size, inputs)
    return up_by_modules(view, x_TD, mask_TE, activation, size, inputs)


def up_by_modules(
    view: FFNView, x_TD: Tensor, mask_TE: Tensor, activation: str, size: int, inputs: Threshold | None = None
) -> Tensor:
    """Let the projections compute every neuron, whatever wraps them; then drop what is inactive.

    What wraps them (LoRA) reads the inputs that count, too.
    """
    check_whole(view.up, view.gate)
    x_TD = keep_counted(x_TD, inputs)
    up_TF, gate_TF = view.up(x_TD), None
    if view.gate is not None:
        gate_TF = view.gate(x_TD)
    elif view.spec.fused is not None:
        first, second = up_TF.chunk(2, dim=-1)
        up_TF, gate_TF = (second, first) if view.spec.fused == "gate_up" else (first, second)
    return zero_inactive(activate(up_TF, gate_TF, activation), mask_TE, size)


def up_of(
    x_TD: Tensor, mask_TE: Tensor, weights: UpWeights, activation: str, size: int, inputs: Threshold | None = None
) -> Tensor:
    """:func:`up` by the operator, from weights that are given."""
    if inputs is not None and torch.is_autocast_enabled(x_TD.device.type):
        x_TD, inputs = keep_counted(x_TD, inputs), None  # as they are, not as autocast rounds them
    x, *cast = _autocast(x_TD, *weights)
    return transformable(expert_up)(x, mask_TE, *cast, activation, size, *(inputs or ()))


def down(
    view: FFNView,
    h_TF: Tensor,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    size: int,
    neurons: Threshold | None = None,
) -> Tensor:
    """The FFN's output, each expert's part times its weight: ``[T, F] -> [T, D]``."""
    if is_plain(view, view.down):
        return down_of(view.down, h_TF, mask_TE, weights_TE, size, neurons)
    return down_by_modules(view, h_TF, mask_TE, weights_TE, size, neurons)


def down_by_modules(
    view: FFNView,
    h_TF: Tensor,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    size: int,
    neurons: Threshold | None = None,
) -> Tensor:
    """Let the last projection read every neuron: those that are inactive, or do not count, are 0."""
    check_whole(view.down)
    h_TF = weigh(keep_counted(h_TF, neurons), weights_TE, size)
    if is_plain(view, view.down) and not torch.is_autocast_enabled(h_TF.device.type):
        h_TF = h_TF.to(weight_out_in(view.down).dtype)  # T5's is float32 whatever the model's
    y_TD: Tensor = view.down(h_TF)
    return y_TD


def down_of(
    module: nn.Module,
    h_TF: Tensor,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    size: int,
    neurons: Threshold | None = None,
) -> Tensor:
    """:func:`down` by the operator, of a projection that is given."""
    if neurons is not None and torch.is_autocast_enabled(h_TF.device.type):
        h_TF, neurons = keep_counted(h_TF, neurons), None  # as they are, not as autocast rounds them
    h, weight_DF, bias_D = _autocast(h_TF, weight_out_in(module), bias_of(module))
    assert h is not None and weight_DF is not None
    # T5 keeps its last projection in float32 whatever the model's dtype.
    h = h.to(weight_DF.dtype)
    return transformable(expert_down)(h, mask_TE, weights_TE, weight_DF.t(), bias_D, size, *(neurons or ()))


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast tensors as autocast casts a linear layer's inputs: our operators are not on its list."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
