"""Operators where a gradient is differentiated again, or torch.func transforms what calls them.

``torch.library`` gives an operator one gradient: none of that gradient, none forward, and no batching rule. Default
implementations are made of torch's operators and have all of these, so they take the operators' place there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

_NOTHING = type(None)


def is_transformed() -> bool:
    """Whether a transform of torch.func (``grad``, ``vmap``, ``jvp`` ...) or forward-mode differentiation is under way.

    It takes 0.15 us. torch.compile reads it, too, and compiles anew for another answer.
    """
    # By type: torch.compile takes what is on the stack for an object, also if that is None.
    return type(_functorch.peek_interpreter_stack()) is not _NOTHING or forward_ad._current_level >= 0


def transformable(op: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, or its default implementation if something transforms the call."""
    return op._init_fn if is_transformed() else op  # type: ignore[attr-defined, no-any-return]


def differentiable_gradients(
    op: Callable[..., Any], inputs: Sequence[Any], needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of an operator's inputs that can be differentiated again, as often as torch's own can.

    Args:
        op: the operator.
        inputs: its arguments, with the graph that they have.
        needs: which of them need a gradient; those after its end need none.
        grad: gradient of its output.

    Returns:
        One gradient for each input, None for those that need none.
    """
    needs = (*needs, *[False] * (len(inputs) - len(needs)))
    # Gradients of this use alone: an input may have others.
    uses = [value.view_as(value) if need else value for value, need in zip(inputs, needs, strict=True)]
    wanted = [use for use, need in zip(uses, needs, strict=True) if need]
    with torch.autocast(grad.device.type, enabled=False):
        output = op._init_fn(*uses)  # type: ignore[attr-defined]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needs)
