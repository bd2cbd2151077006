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

from torch_prunepath.inputs.padding import PaddingTracker
from torch_prunepath.inputs.visit import removing
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.hooks import after_call, before_call
from torch_prunepath.layer.sparse import recording
from torch_prunepath.layer.views import sparse_layers, sparse_views


@dataclass
class RoutedCall:
    """One call of one sparse layer.

    Attributes:
        layer: the layer.
        view: its FFN.
        scores_TE: float32 router scores, with their graph.
        mask_TE: bool, the active experts.
        weight_T: float32, 0 for padding and tokens in front of a text, and 1 for others; None where every token counts.
        x_TD: the layer's input with its graph, if the tape keeps inputs.
        y_TD: the layer's output with its graph, if the tape keeps outputs.
        inside: what the tape's ``inside`` answered.
        inactive: 0-d, summed over tokens that count, the share of the layer's neurons that are inactive.
        name: qualified name of the sparse layer.
    """

    layer: RoutedExperts
    view: FFNView
    scores_TE: Tensor
    mask_TE: Tensor
    weight_T: Tensor | None
    x_TD: Tensor | None = None
    y_TD: Tensor | None = None
    inside: Any = None
    inactive: Tensor | None = None
    name: str = ""


class LayerRecorder:
    """What one sparse layer tells while it runs.

    torch.compile traces it together with the layer, once for all layers that are alike: whatever differs from layer to
    layer or from step to step must be a tensor, or must not be read here.
    """

    def __init__(
        self, view: FFNView, inputs: bool, inside: Callable[[RoutedCall], Any] | None, tracker: PaddingTracker
    ) -> None:
        self.view, self.inputs, self.inside, self.tracker = view, inputs, inside, tracker
        self.running = False
        self.calls: list[RoutedCall] = []

    def note(
        self, layer: RoutedExperts, x_TD: Tensor, scores_TE: Tensor, mask_TE: Tensor, shape: tuple[int, ...]
    ) -> None:
        """A selection was made."""
        if not self.running:
            return
        keep_T = self.tracker.keep(shape)
        weight_T = None if keep_T is None else keep_T.to(scores_TE.device, torch.float32)
        call = RoutedCall(layer, self.view, scores_TE, mask_TE, weight_T, x_TD)
        call.inactive = _inactive(call)
        if self.inside is not None:
            call.inside = self.inside(call)
        if not self.inputs:
            call.x_TD = None
        self.calls.append(call)

    def note_output(self, module: nn.Module, args: Any, output: Tensor | None) -> None:
        """A forward hook: the layer, or the second half of one that is split, has an answer, or None after an error."""
        if self.running and output is not None:
            self.calls[-1].y_TD = output.reshape(-1, output.shape[-1])


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

    Attributes:
        front: how many tokens at the start of each row do not count, as ``front_tokens`` of the batch that runs next.

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
        self._depth, self.front = 0, 0
        self._stack = contextlib.ExitStack()
        self._recorders: dict[str, LayerRecorder] = {}
        self.calls: list[RoutedCall] = []

    def __enter__(self) -> RoutingTape:
        self.calls, self._depth = [], 0
        enter = self._stack.enter_context
        enter(removing(before_call(self._model, self._start)))
        enter(removing(after_call(self._model, self._end)))
        tracker = enter(PaddingTracker(self._model, self.front))
        for name, layer in self.layers.items():
            view = self._views[name]
            self._recorders[name] = recorder = LayerRecorder(view, self._inputs, self.inside, tracker)
            enter(recording(layer, recorder))
            if self._outputs:
                last = view.down if layer.ffn.split else layer
                enter(removing(after_call(last, recorder.note_output)))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._recorders.clear()

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        for recorder in self._recorders.values():
            recorder.running = True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        for name, recorder in self._recorders.items():
            recorder.running = False
            for call in recorder.calls:
                call.name = name
            self.calls += recorder.calls
            recorder.calls = []

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
        inactive: dict[str, Any] = {}
        tokens: dict[str, Any] = {}
        for call in self.calls:
            weight = float(call.mask_TE.shape[0]) if call.weight_T is None else call.weight_T.sum()
            inactive[call.name] = inactive.get(call.name, 0) + call.inactive
            tokens[call.name] = tokens.get(call.name, 0) + weight
        device = self.calls[0].scores_TE.device
        shares = [inactive[name] / _at_least_one(tokens[name]) for name in inactive]
        return torch.stack([share.to(device) for share in shares]).mean()


def _at_least_one(tokens: Any) -> Any:
    return tokens.clamp_min(1) if isinstance(tokens, Tensor) else max(tokens, 1)


@torch.no_grad()
def _inactive(call: RoutedCall) -> Tensor:
    """See :attr:`RoutedCall.inactive`."""
    share_T = call.layer.inactive_neurons(call.mask_TE).float() / call.layer.ffn.ffn_size
    return share_T.sum() if call.weight_T is None else (share_T * call.weight_T).sum()
