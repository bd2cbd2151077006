"""The first stage of D2DMoE (arXiv 2310.04361): fine-tuning a dense model towards sparser activations.

The square Hoyer norm of each token's activations, ``(sum |a|)^2 / sum a^2``, is added to the objective as a mean over
tokens. If all activations that are not 0 had the same size, it would be their number.

Shapes: T tokens, F neurons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.baselines.dense import train_dense
from torch_prunepath.config import check_choice
from torch_prunepath.discover import Which, find_ffns
from torch_prunepath.inputs.padding import PaddingTracker
from torch_prunepath.inputs.visit import removing
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.losses import weighted_mean

Target = Literal["activations", "preactivations"]


def square_hoyer(values_TF: Tensor) -> Tensor:
    """Compute ``(sum |v|)^2 / sum v^2`` of each row, float32 ``[T]``.

    It goes from 1 (one value is not 0) to F (all have the same size); a row of zeros has 0.
    """
    values_TF = values_TF.float()
    return values_TF.abs().sum(-1).square() / (values_TF.square().sum(-1) + 1e-15)


def enforce_sparsity(
    model: nn.Module,
    batches: Iterable[Any],
    config: TrainConfig,
    *,
    weight: float = 1e-3,
    on: Target | None = None,
    displacement: float = -10.0,
    include: Which | None = None,
    exclude: Which | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Fine-tune a dense model towards sparse activations, in place; then convert it with ``d2dmoe``.

    Activation functions stay what they are; some of the paper's models replace them by ReLU first.

    Args:
        model: a dense model.
        batches: the batches, as for :func:`torch_prunepath.train.train`.
        config: the settings, as for :func:`torch_prunepath.baselines.train_dense`.
        weight: weight of the penalty, which is a mean over tokens that are not padding, then over FFNs.
        on: values whose norm is made small. ``"activations"``: the output of the gate's (or a plain FFN's) activation
            function, for ReLU; ``"preactivations"``: the part of its input above ``displacement``, for smooth
            functions, as in the released code. None chooses by the activation function.
        displacement: lower end of the inputs that count with ``on="preactivations"``.
        include: the FFNs on which the penalty is; None: all. As for :func:`torch_prunepath.sparsify`.
        exclude: which of these it leaves out.
        **options: further arguments of ``train_dense``, except ``compile``: the penalty is added by hooks, which are
            not compiled.

    Returns:
        The records of ``train``, with the penalty as ``hoyer``.

    Raises:
        ValueError: if the weight is negative, ``compile`` is given, or as ``train_dense``.
    """
    if on is not None:
        check_choice("on", on, Target)
    if not weight >= 0:
        raise ValueError(f"weight={weight} must not be negative: 0 turns the penalty off")
    if options.get("compile"):
        raise ValueError("the penalty is added by hooks, which compiled blocks do not call: leave compile off")
    views = [FFNView(model, spec) for spec in find_ffns(model, include, exclude)]
    penalty = _Penalty(len(views), weight / config.accumulation, on, displacement)
    with penalty.watching(model, views):
        records = train_dense(model, batches, config, include=include, exclude=exclude, **options)
    # Where a callback ended the run, its last step has no record.
    means = penalty.means(config.accumulation)[: len(records)]
    return [{**record, "hoyer": mean} for record, mean in zip(records, means, strict=True)]


class _Penalty:
    """A penalty that is a mean over FFNs; its gradient is added in each FFN as that runs."""

    def __init__(self, layers: int, weight: float, on: Target | None, displacement: float) -> None:
        self.layers, self.weight, self.on, self.displacement = layers, weight, on, displacement
        self._running = False
        self._batches: list[Tensor] = []

    @contextlib.contextmanager
    def watching(self, model: nn.Module, views: list[FFNView]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            enter(removing(model.register_forward_pre_hook(self._start)))
            enter(removing(model.register_forward_hook(self._end, always_call=True)))
            tracker = enter(PaddingTracker(model))
            for view in views:
                watched = view.up if view.gate is None else view.gate
                enter(removing(watched.register_forward_hook(self._add(view, tracker))))
            yield

    def means(self, accumulation: int) -> list[float]:
        """Return the penalty of each step, unweighted."""
        if not self._batches:
            return []
        return torch.stack(self._batches).view(-1, accumulation).mean(-1).tolist()

    def _start(self, module: nn.Module, args: Any) -> None:
        self._running = True
        self._batches.append(torch.zeros((), device=next(module.parameters()).device))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running = False

    def _add(self, view: FFNView, tracker: PaddingTracker) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            pre_TF = _gate_half(view, output).reshape(-1, view.spec.ffn_size)
            keep_T = tracker.keep(args[0].shape[:-1])
            term = weighted_mean(square_hoyer(self._target(view, pre_TF)), None if keep_T is None else keep_T.float())
            term = term / self.layers
            if self._running:  # and not computed anew by gradient checkpointing
                self._batches[-1] += term.detach().to(self._batches[-1].device)
            return _WithTerm.apply(output, self.weight * term)

        return hook

    def _target(self, view: FFNView, pre_TF: Tensor) -> Tensor:
        relu = view.spec.activation in ("relu", "relu2")
        if (self.on or ("activations" if relu else "preactivations")) == "activations":
            return ACTIVATIONS[view.spec.activation](pre_TF)
        return pre_TF.clamp_min(self.displacement) - self.displacement


def _gate_half(view: FFNView, output: Tensor) -> Tensor:
    if view.spec.fused is None:
        return output
    first, second = output.chunk(2, dim=-1)
    return first if view.spec.fused == "gate_up" else second


class _WithTerm(torch.autograd.Function):
    """A function that returns its input unchanged; its backward pass acts as if a term were added to the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(term)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (term,) = ctx.saved_tensors
        return grad, torch.ones_like(term)
