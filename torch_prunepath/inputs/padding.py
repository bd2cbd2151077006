"""Which tokens of a forward pass are padding, by the attention masks of the models inside it.

Shapes: N tokens in all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SOUND = ("input_features", "input_values")
"""Inputs whose mask is over frames or samples, of which several become one token."""


@dataclass(frozen=True)
class _Masks:
    """1 for real tokens, 0 for padding: among a stack's own tokens, and among those of a decoder inside it."""

    own: Tensor | None = None
    decoder: Tensor | None = None


class PaddingTracker:
    """Knows, inside a forward pass, which tokens are padding: ``keep(shape)`` is bool ``[N]``, or None for all.

    Watches the ``attention_mask`` of the model and of every stack inside it. A decoder that attends to an encoder never
    takes the encoder's mask: where it has none of its own, ``labels`` tell where its rows end, if there are any.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._masks: list[_Masks] = []
        self._handles: list[Any] = []

    def __enter__(self) -> PaddingTracker:
        for module in self._model.modules():
            # Stacks: the model itself and the transformers models nested in it.
            if module is self._model or hasattr(module, "get_input_embeddings"):
                parameters = list(inspect.signature(module.forward).parameters)
                if "attention_mask" in parameters:
                    self._handles += [
                        module.register_forward_pre_hook(self._enter(parameters), with_kwargs=True),
                        module.register_forward_hook(self._leave, always_call=True),
                    ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._masks.clear()

    def _enter(self, parameters: Sequence[str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            around = self._masks[-1] if self._masks else _Masks()
            decoder = _two_dimensional(given.get("decoder_attention_mask"))
            labels = _two_dimensional(given.get("labels"))
            if decoder is None and labels is not None and "decoder_input_ids" in parameters:
                decoder = _up_to_the_end(labels)
            own = _two_dimensional(given.get("attention_mask"))
            if own is None:  # none of its own, or one already expanded to attention's shape: what surrounds it holds
                own = around.own if given.get("encoder_hidden_states") is None else around.decoder
            if own is None:
                own = _attended(given.get("attention_mask"))
            if any(given.get(name) is not None for name in SOUND):
                own = None
            self._masks.append(_Masks(own, around.decoder if decoder is None else decoder))

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._masks.pop()

    def keep(self, shape: Sequence[int]) -> Tensor | None:
        """Which tokens of an activation with leading dimensions ``shape`` are real."""
        mask = self._masks[-1].own if self._masks else None
        if mask is None:
            return None
        if len(shape) == 2 and shape[0] == mask.shape[0] and shape[1] <= mask.shape[1]:
            return mask[:, mask.shape[1] - shape[1] :].reshape(-1).bool()
        if len(shape) == 1 and shape[0] == mask.numel():
            return mask.reshape(-1).bool()
        return None


def _two_dimensional(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _attended(mask: Any) -> Tensor | None:
    """Which of the tokens that ask are attended to, bool ``[B, Q]``, from attention's own mask ``[B, 1, Q, K]``.

    ``generate`` gives that one with a static cache, in which later places are free: the last key that anyone attends to
    is the last token that asks.
    """
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    # Additive masks have 0, or a bias, where they let attend.
    attended_BK = (mask > -1e3 if mask.is_floating_point() else mask.bool()).flatten(1, 2).any(1)
    Q, places_K = mask.shape[2], torch.arange(mask.shape[3], device=mask.device)
    first = ((places_K * attended_BK).amax() - Q + 1).clamp_min(0)
    return attended_BK.gather(1, (first + places_K[:Q]).expand(len(attended_BK), -1))


def _up_to_the_end(labels_BT: Tensor) -> Tensor:
    """1 up to the last label of each row that counts, 0 after it; -100 before that one is a prompt, no padding."""
    return (labels_BT != -100).flip(1).cummax(1).values.flip(1)
