"""What the routers of a sparse model did in one forward pass, kept with its graph for the losses that need it.

Shapes: T tokens, D hidden size, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.calibrate import PaddingTracker, removing
from torch_prunepath.ffn import FFNView
from torch_prunepath.layer import RoutedExperts, Routing
from torch_prunepath.sparsify import sparse_views
from torch_prunepath.sparsity import sparse_layers


@dataclass
class RoutedCall:
    """One call of one sparse layer.

    Attributes:
        name: qualified name of the sparse layer.
        layer: the layer.
        view: its FFN.
        scores_TE: float32 router scores, with their graph.
        mask_TE: bool, the active experts.
        weight_T: float32, 0 for padding and 1 for other tokens; None where every token counts.
        x_TD: the layer's input with its graph, if the tape keeps inputs.
        y_TD: the layer's output with its graph, if the tape keeps outputs.
        inside: what the tape's ``inside`` answered.
    """

    name: str
    layer: RoutedExperts
    view: FFNView
    scores_TE: Tensor
    mask_TE: Tensor
    weight_T: Tensor | None
    x_TD: Tensor | None = None
    y_TD: Tensor | None = None
    inside: Any = None


class RoutingTape:
    """Records every call of every sparse layer while ``model`` runs inside the context; opening it again starts anew.

    Only calls made by ``model``'s own forward count, so that what gradient checkpointing recomputes in a backward pass
    is not recorded twice, whether the context is still open then or not.

    Args:
        model: a sparse model, or a module that holds one.
        inputs: keep each layer's input (alive until the tape is reopened or dropped).
        outputs: keep each layer's output.
        inside: called with each call (and its input) while the layer runs; what it answers is kept with the call. For
            what reads the layer's weights, which are whole only then if they are sharded (FSDP2). It may be set anew.

    Raises:
        ValueError: if the model holds no sparse FFN.

    Example::

        tape = RoutingTape(model)
        with tape:
            loss = model(**batch).loss
        loss = loss + 1e-3 * sum(load_balance(c.scores_TE, c.weight_T) for c in tape.calls) / len(tape.calls)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inputs: bool = True,
        outputs: bool = False,
        inside: Callable[[RoutedCall], Any] | None = None,
    ) -> None:
        self._model, self._inputs, self._outputs, self.inside = model, inputs, outputs, inside
        self.layers, self._views = sparse_layers(model), sparse_views(model)
        self._depth = 0
        self._stack = contextlib.ExitStack()
        self._latest: dict[str, RoutedCall] = {}
        self.calls: list[RoutedCall] = []

    def __enter__(self) -> RoutingTape:
        self.calls, self._depth = [], 0
        enter = self._stack.enter_context
        enter(removing(self._model.register_forward_pre_hook(self._start)))
        enter(removing(self._model.register_forward_hook(self._end, always_call=True)))
        tracker = enter(PaddingTracker(self._model))
        for name, layer in self.layers.items():
            enter(removing(layer.register_routing_hook(self._record(name, tracker))))
            if self._outputs:
                last = self._views[name].down if layer.ffn.split else layer
                enter(removing(last.register_forward_hook(self._record_output(name))))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._latest.clear()

    def _start(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1

    def _record(self, name: str, tracker: PaddingTracker) -> Callable[[Routing], None]:
        layer, view = self.layers[name], self._views[name]

        def hook(routing: Routing) -> None:
            if not self._depth:
                return
            keep_T = tracker.keep(routing.shape)
            call = RoutedCall(
                name,
                layer,
                view,
                routing.scores_TE,
                routing.mask_TE,
                None if keep_T is None else keep_T.to(routing.scores_TE.device, torch.float32),
                routing.x_TD,
            )
            if self.inside is not None:
                call.inside = self.inside(call)
            if not self._inputs:
                call.x_TD = None
            self._latest[name] = call
            self.calls.append(call)

        return hook

    def _record_output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._depth:
                self._latest[name].y_TD = output.reshape(-1, output.shape[-1])

        return hook

    def check(self, gradient: bool) -> None:
        """Refuse an empty tape, and with ``gradient`` one whose scores have lost the graph to trainable routers.

        Raises:
            ValueError: with what to do about it.
        """
        if not self.calls:
            raise ValueError(
                "no sparse layer ran while the tape was open: call the tape's own model inside the context"
            )
        for call in self.calls:
            if gradient and call.layer.router.weight.requires_grad and not call.scores_TE.requires_grad:
                raise ValueError(
                    f"the scores of {call.name} carry no gradient, as with reentrant gradient checkpointing: call "
                    'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
                )

    @torch.no_grad()
    def sparsity(self) -> Tensor:
        """Share of inactive neurons over tokens that are no padding, then over layers: 0-d float32, on the device.

        The same number as :func:`torch_prunepath.record_sparsity` finds; this one does not wait for the device.
        """
        self.check(gradient=False)
        inactive: dict[str, Tensor] = {}
        tokens: dict[str, Tensor] = {}
        for call in self.calls:
            inactive_T = _inactive_share(call)
            weight_T = torch.ones_like(inactive_T) if call.weight_T is None else call.weight_T
            inactive[call.name] = inactive.get(call.name, 0) + inactive_T @ weight_T
            tokens[call.name] = tokens.get(call.name, 0) + weight_T.sum()
        device = self.calls[0].scores_TE.device
        return torch.stack([(inactive[name] / tokens[name].clamp_min(1)).to(device) for name in inactive]).mean()


def _inactive_share(call: RoutedCall) -> Tensor:
    """Share of a layer's neurons that are inactive, float32 ``[T]``; the last expert may be smaller."""
    size, neurons = call.layer.experts.expert_size, call.layer.ffn.ffn_size
    missing = call.layer.num_experts * size - neurons
    active_T = call.mask_TE.sum(-1) * size - call.mask_TE[:, -1] * missing
    return 1 - active_T.float() / neurons
