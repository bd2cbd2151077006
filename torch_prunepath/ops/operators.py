"""The operators of a sparse FFN: schema, fake, default implementation, CPU implementation, autograd.

    mask = select_experts(router_scores(x, ...), tau)
    y = expert_down(expert_up(x, mask, ...), mask, ...)

They are opaque to ``torch.compile``, so that a backend can find and replace them. Shapes: T tokens, D hidden size,
F neurons, E experts of S neurons (the last may be smaller). Weights are *rows* ``[F, D]``: one neuron's D numbers each.
The default implementations compute every neuron and zero those of inactive experts; on CPU, calls of few tokens read
only the rows of active experts where that pays (:mod:`torch_prunepath.ops.cpu.ffn`).

Operators list their weights one by one, because ``torch.library`` knows no other way; implementations take the values
of :mod:`torch_prunepath.weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.activations import ACTIVATION_BACKWARDS, ACTIVATIONS, activate
from torch_prunepath.ops.cpu import ffn as cpu
from torch_prunepath.ops.experts import expand_experts, expert_sums, weigh, zero_inactive
from torch_prunepath.ops.transforms import differentiable_gradients
from torch_prunepath.rms import inverse_rms
from torch_prunepath.select import mask_from_scores
from torch_prunepath.weights import UpWeights

__all__ = [
    "expand_experts",
    "expert_down",
    "expert_down_backward",
    "expert_up",
    "expert_up_backward",
    "register_cuda",
    "router_scores",
    "router_scores_backward",
    "select_experts",
    "zero_inactive",
]

# --- router_scores ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("prunepath::router_scores", mutates_args=())
def router_scores(x_TD: Tensor, router_ED: Tensor, router_bias_E: Tensor | None, router_norm: bool = False) -> Tensor:
    """Router scores ``x W^T + b`` in float32, whatever the dtypes of its inputs: ``[T, D], [E, D], [E] -> [T, E]``.

    With ``router_norm``, the router reads x divided by its root mean square: ``(x W^T) / sqrt(mean(x^2) + 1e-6) + b``.
    """
    router_bias_E = None if router_bias_E is None else router_bias_E.float()
    with torch.autocast(x_TD.device.type, enabled=False):
        if not router_norm:
            return nnf.linear(x_TD.float(), router_ED.float(), router_bias_E)
        scores_TE = nnf.linear(x_TD.float(), router_ED.float()) * inverse_rms(x_TD)
        return scores_TE if router_bias_E is None else scores_TE + router_bias_E


@router_scores.register_kernel("cpu")
def _(x_TD: Tensor, router_ED: Tensor, router_bias_E: Tensor | None, router_norm: bool = False) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return cpu.router_scores(x_TD, router_ED, router_bias_E, router_norm)


@router_scores.register_fake
def _(x_TD: Tensor, router_ED: Tensor, router_bias_E: Tensor | None, router_norm: bool = False) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], router_ED.shape[0], dtype=torch.float32)


@torch.library.custom_op("prunepath::router_scores_backward", mutates_args=())
def router_scores_backward(
    grad_TE: Tensor, x_TD: Tensor, router_ED: Tensor, needs: list[bool], router_norm: bool = False
) -> list[Tensor]:
    """Gradients of x, weight and bias (float32), in this order; those not in ``needs`` are empty tensors."""
    grads = [x_TD.new_empty(0), router_ED.new_empty(0), grad_TE.new_empty(0)]
    with torch.autocast(x_TD.device.type, enabled=False):
        if needs[2]:
            grads[2] = grad_TE.sum(0)
        scale_T1 = inverse_rms(x_TD) if router_norm else None
        grad_TE = grad_TE if scale_T1 is None else grad_TE * scale_T1
        if needs[0]:
            grad_TD = grad_TE @ router_ED.float()
            if scale_T1 is not None:  # less what goes along x itself, to which the scores are blind
                x32_TD = x_TD.float()
                grad_TD = grad_TD - x32_TD * (scale_T1.square() * (grad_TD * x32_TD).mean(-1, keepdim=True))
            grads[0] = grad_TD.to(x_TD.dtype)
        if needs[1]:
            grads[1] = (grad_TE.t() @ x_TD.float()).to(router_ED.dtype)
    return grads


@router_scores_backward.register_fake
def _(grad_TE, x_TD, router_ED, needs, router_norm=False):  # type: ignore[no-untyped-def]
    shapes = (x_TD.shape, router_ED.shape, grad_TE.shape[1:])
    likes = (x_TD, router_ED, grad_TE)
    return [like.new_empty(shape if need else 0) for like, shape, need in zip(likes, shapes, needs, strict=True)]


def _router_scores_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x_TD, router_ED, router_bias_E, ctx.router_norm = inputs
    ctx.save_for_backward(x_TD, router_ED, router_bias_E)


def _router_scores_autograd(ctx, grad_TE):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():  # create_graph=True
        inputs = (*ctx.saved_tensors, ctx.router_norm)
        return differentiable_gradients(router_scores, inputs, ctx.needs_input_grad, grad_TE)
    x_TD, router_ED, router_bias_E = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = router_scores_backward(grad_TE, x_TD, router_ED, needs, ctx.router_norm)
    x, weight, bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return x, weight, None if bias is None else bias.to(router_bias_E.dtype), None


router_scores.register_autograd(_router_scores_autograd, setup_context=_router_scores_setup)


# --- select_experts ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("prunepath::select_experts", mutates_args=())
def select_experts(scores_TE: Tensor, tau: Tensor, rule: str, shared: int = 0) -> Tensor:
    """Active experts as :func:`torch_prunepath.select.select_experts` finds them; ``tau``: 0-d float32. No gradient."""
    return mask_from_scores(scores_TE, tau, rule, shared)  # type: ignore[arg-type]


select_experts.register_kernel("cpu")(cpu.select_experts)


@select_experts.register_fake
def _(scores_TE: Tensor, tau: Tensor, rule: str, shared: int = 0) -> Tensor:
    return torch.empty_like(scores_TE, dtype=torch.bool)


# --- expert_up --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("prunepath::expert_up", mutates_args=())
def expert_up(
    x_TD: Tensor,
    mask_TE: Tensor,
    up_FD: Tensor,
    up_bias_F: Tensor | None,
    gate_FD: Tensor | None,
    gate_bias_F: Tensor | None,
    activation: str,
    expert_size: int,
) -> Tensor:
    """Hidden activations of the active experts, exactly 0 elsewhere.

    That is ``act(gate(x)) * up(x)``, in a plain FFN ``act(up(x))``, or ``up(x)`` if the activation is ``"none"``.

    Args:
        x_TD: ``[T, D]``.
        mask_TE: bool ``[T, E]``, E = ceil(F / S).
        up_FD: rows ``[F, D]`` in the dtype of ``x_TD``, any strides.
        up_bias_F: ``[F]`` or None.
        gate_FD: as ``up_FD``, or None.
        gate_bias_F: ``[F]`` or None.
        activation: key of ``ACTIVATIONS``; or, in a plain FFN, ``"none"``.
        expert_size: S.

    Returns:
        ``[T, F]`` in the dtype of ``x_TD``.
    """
    weights = UpWeights(up_FD, up_bias_F, gate_FD, gate_bias_F)
    return zero_inactive(activate(*weights.project(x_TD), activation), mask_TE, expert_size)


def _up_values(x_TD: Tensor, mask_TE: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The arguments of ``expert_up`` as its implementations take them."""
    *weights, activation, expert_size = rest
    return x_TD, mask_TE, UpWeights(*weights), activation, expert_size


@expert_up.register_kernel("cpu")
def _(*args: Any) -> Tensor:
    return cpu.expert_up(*_up_values(*args))


@expert_up.register_fake
def _(x_TD, mask_TE, up_FD, up_bias_F, gate_FD, gate_bias_F, activation, expert_size):  # type: ignore[no-untyped-def]
    return x_TD.new_empty(x_TD.shape[0], up_FD.shape[0])


@torch.library.custom_op("prunepath::expert_up_backward", mutates_args=())
def expert_up_backward(
    grad_TF: Tensor,
    x_TD: Tensor,
    mask_TE: Tensor,
    up_FD: Tensor,
    up_bias_F: Tensor | None,
    gate_FD: Tensor | None,
    gate_bias_F: Tensor | None,
    activation: str,
    expert_size: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, up, up bias, gate, gate bias, in this order; those not in ``needs`` are empty tensors."""
    grad_TF = zero_inactive(grad_TF, mask_TE, expert_size)
    grad_up, grad_gate = grad_TF, None
    if activation != "none":
        backward = ACTIVATION_BACKWARDS[activation]
        up_TF, gate_TF = UpWeights(up_FD, up_bias_F, gate_FD, gate_bias_F).project(x_TD)
        if gate_TF is None:
            grad_up = backward(grad_TF, up_TF)
        else:
            grad_up = grad_TF * ACTIVATIONS[activation](gate_TF)
            grad_gate = backward(grad_TF * up_TF, gate_TF)
    grads = [x_TD.new_empty(0) for _ in range(5)]
    if needs[0]:
        grads[0] = grad_up @ up_FD
        if gate_FD is not None and grad_gate is not None:
            grads[0] += grad_gate @ gate_FD
    for place, grad in ((1, grad_up), (3, grad_gate)):
        if grad is not None and needs[place]:
            grads[place] = grad.t() @ x_TD
        if grad is not None and needs[place + 1]:
            grads[place + 1] = grad.sum(0)
    return grads


@expert_up_backward.register_fake
def _(grad_TF, x_TD, mask_TE, up_FD, up_bias_F, gate_FD, gate_bias_F, activation, expert_size, needs):  # type: ignore[no-untyped-def]
    inputs = (x_TD, up_FD, up_bias_F, gate_FD, gate_bias_F)
    return [
        x_TD.new_empty(like.shape) if need and like is not None else x_TD.new_empty(0)
        for like, need in zip(inputs, needs, strict=True)
    ]


def _expert_up_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.activation, ctx.expert_size = inputs
    ctx.save_for_backward(*tensors)


def _expert_up_autograd(ctx, grad_TF):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():  # create_graph=True
        inputs = (*ctx.saved_tensors, ctx.activation, ctx.expert_size)
        return differentiable_gradients(expert_up, inputs, ctx.needs_input_grad, grad_TF)
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5)]
    grads = expert_up_backward(grad_TF, *ctx.saved_tensors, ctx.activation, ctx.expert_size, needs)
    x, up, up_bias, gate, gate_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return x, None, up, up_bias, gate, gate_bias, None, None


expert_up.register_autograd(_expert_up_autograd, setup_context=_expert_up_setup)


# --- expert_down ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("prunepath::expert_down", mutates_args=())
def expert_down(
    h_TF: Tensor,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    down_FD: Tensor,
    down_bias_D: Tensor | None,
    expert_size: int,
) -> Tensor:
    """Sum over the active experts of ``w_e * (h_e @ down_e)``, plus the bias once.

    Args:
        h_TF: hidden activations ``[T, F]``; those of inactive experts are ignored.
        mask_TE: bool ``[T, E]``, E = ceil(F / S).
        weights_TE: weights of the experts' outputs, float ``[T, E]``, or None for 1. Only active experts' weights count
            or receive a gradient.
        down_FD: rows ``[F, D]`` in the dtype of ``h_TF``, any strides.
        down_bias_D: ``[D]`` or None.
        expert_size: S.

    Returns:
        ``[T, D]`` in the dtype of ``h_TF``.
    """
    h_TF = weigh(zero_inactive(h_TF, mask_TE, expert_size), weights_TE, expert_size)
    return nnf.linear(h_TF, down_FD.t(), down_bias_D)


expert_down.register_kernel("cpu")(cpu.expert_down)


@expert_down.register_fake
def _(h_TF, mask_TE, weights_TE, down_FD, down_bias_D, expert_size):  # type: ignore[no-untyped-def]
    return h_TF.new_empty(h_TF.shape[0], down_FD.shape[1])


@torch.library.custom_op("prunepath::expert_down_backward", mutates_args=())
def expert_down_backward(
    grad_TD: Tensor,
    h_TF: Tensor,
    mask_TE: Tensor,
    weights_TE: Tensor | None,
    down_FD: Tensor,
    expert_size: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of h, weights, down and its bias, in this order; those not in ``needs`` are empty tensors."""
    grads = [h_TF.new_empty(0) for _ in range(4)]
    if needs[0] or needs[1]:
        through_TF = grad_TD @ down_FD.t()
        if needs[0]:
            grads[0] = weigh(zero_inactive(through_TF, mask_TE, expert_size), weights_TE, expert_size)
        if needs[1] and weights_TE is not None:
            products_TF = zero_inactive(through_TF * h_TF, mask_TE, expert_size)
            grads[1] = expert_sums(products_TF, expert_size).to(weights_TE.dtype)
    if needs[2]:
        grads[2] = weigh(zero_inactive(h_TF, mask_TE, expert_size), weights_TE, expert_size).t() @ grad_TD
    if needs[3]:
        grads[3] = grad_TD.sum(0)
    return grads


@expert_down_backward.register_fake
def _(grad_TD, h_TF, mask_TE, weights_TE, down_FD, expert_size, needs):  # type: ignore[no-untyped-def]
    grads = [h_TF.new_empty(0) for _ in range(4)]
    if needs[0]:
        grads[0] = h_TF.new_empty(h_TF.shape)
    if needs[1] and weights_TE is not None:
        grads[1] = weights_TE.new_empty(weights_TE.shape)
    if needs[2]:
        grads[2] = h_TF.new_empty(down_FD.shape)
    if needs[3]:
        grads[3] = h_TF.new_empty(grad_TD.shape[1])
    return grads


def _expert_down_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.expert_size = inputs
    ctx.save_for_backward(*tensors)


def _expert_down_autograd(ctx, grad_TD):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():  # create_graph=True
        inputs = (*ctx.saved_tensors, ctx.expert_size)
        return differentiable_gradients(expert_down, inputs, ctx.needs_input_grad, grad_TD)
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    *tensors, _ = ctx.saved_tensors
    grads = expert_down_backward(grad_TD, *tensors, ctx.expert_size, needs)
    h, weights, down, bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return h, None, weights, down, bias, None


expert_down.register_autograd(_expert_down_autograd, setup_context=_expert_down_setup)


# --- CUDA -------------------------------------------------------------------------------------------------------------


def register_cuda(op: Any, name: str, values: Callable[..., tuple[Any, ...]] = lambda *args: args) -> None:
    """Let the function ``name`` of ``csrc_triton.ffn`` compute ``op`` on CUDA devices, float64 excepted.

    Args:
        op: the operator.
        name: of its implementation.
        values: makes the implementation's arguments of the operator's.
    """

    @op.register_kernel("cuda")
    def _(*args: Any) -> Tensor:
        if args[0].dtype == torch.float64:  # kernels add up in float32
            return op._init_fn(*args)
        try:
            import torch_prunepath.csrc_triton.ffn as kernels
        except ImportError as error:
            raise ImportError("sparse FFNs on a CUDA device need Triton: pip install triton") from error
        # Kernels start on the current device, which need not be the tensors'; inputs are cast where they should be.
        with torch.cuda.device(args[0].device), torch.autocast("cuda", enabled=False):
            return getattr(kernels, name)(*values(*args))


register_cuda(router_scores, "router_scores")
register_cuda(select_experts, "select_experts")
register_cuda(expert_up, "expert_up", _up_values)
register_cuda(expert_down, "expert_down")
