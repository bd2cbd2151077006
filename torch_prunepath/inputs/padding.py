"""Telling which tokens of a forward pass are padding, from the attention masks of the models inside it.

Shapes: N tokens in all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.layer.hooks import after_call, before_call

SOUND = ("input_features", "input_values")
"""Names of inputs whose mask is over frames or samples of sound, several of which become one token."""


@dataclass(frozen=True)
class _Masks:
    """Masks of a stack's own tokens and of a decoder's inside it: 1 for real tokens, 0 for padding."""

    own: Tensor | None = None
    decoder: Tensor | None = None


class PaddingTracker:
    """A context in which :meth:`keep` tells, inside a forward pass, which tokens are padding.

    It watches the ``attention_mask`` of the model and of every stack (a transformers model inside it). The mask of an
    encoder is never used for a decoder that attends to it: where the decoder has no mask, ``labels`` tell where its
    rows end, if there are any.

    Args:
        model: the model whose forward passes are watched.
        front: how many of the first real tokens of each row do not count, although they are no padding.
    """

    def __init__(self, model: nn.Module, front: int = 0) -> None:
        self._model, self.front = model, front
        self._masks: list[_Masks] = []
        self._handles: list[Any] = []

    def __enter__(self) -> PaddingTracker:
        for module in self._model.modules():
            # Stacks: the model itself and the transformers models nested in it.
            if module is self._model or hasattr(module, "get_input_embeddings"):
                parameters = list(inspect.signature(module.forward).parameters)
                if "attention_mask" in parameters or (self.front and "input_ids" in parameters):
                    self._handles += [
                        before_call(module, self._enter(parameters)),
                        after_call(module, self._leave),
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
            own = self._without_front(_two_dimensional(given.get("attention_mask")))
            if own is None:  # none of its own, or one already expanded to attention's shape: what surrounds it holds
                own = around.own if given.get("encoder_hidden_states") is None else around.decoder
            if own is None:
                own = self._without_front(_attended(given.get("attention_mask")))
            if own is None and self.front:
                own = self._without_front(_all_of(given.get("input_ids")))
            if any(given.get(name) is not None for name in SOUND):
                own = None
            self._masks.append(_Masks(own, around.decoder if decoder is None else decoder))

        return hook

    def _without_front(self, mask: Tensor | None) -> Tensor | None:
        """Clear the tokens in front in a mask ``[B, T]``."""
        if mask is None or not self.front:
            return mask
        return (mask != 0) & ((mask != 0).cumsum(1) > self.front)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._masks.pop()

    def keep(self, shape: Sequence[int]) -> Tensor | None:
        """Return which tokens of an activation are real, bool ``[N]``, or None if all are or it is not known.

        Args:
            shape: shape of the activation without its last dimension.
        """
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


def _all_of(ids: Any) -> Tensor | None:
    """The mask of token ids without padding."""
    return torch.ones_like(ids) if isinstance(ids, Tensor) and ids.dim() == 2 else None


def _attended(mask: Any) -> Tensor | None:
    """Return which of the query tokens are attended to, bool ``[B, Q]``, from an attention mask ``[B, 1, Q, K]``.

    ``generate`` passes such a mask with a static cache, whose later places are empty. So the last key to which any
    query attends belongs to the last query.
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
    """Mark the tokens up to each row's last label that counts, bool ``[B, T]``.

    Labels of -100 before it belong to a prompt, not to padding.
    """
    return (labels_BT != -100).flip(1).cummax(1).values.flip(1)
