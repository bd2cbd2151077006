"""Refusing data and models that cannot be right, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.inputs.front import FRONT

NOT_FINITE = "the model's logits contain NaN or infinity, so "
"""The beginning of a refusal where the weights are finite and what is computed with them is not."""


def vocabulary(model: nn.Module) -> int | None:
    """Return the number of token ids that the model's embedding has; None if it has none, or one of another kind."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if get is None else get()
    except (NotImplementedError, AttributeError):  # a model that reads no tokens
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def check_ids(ids: Tensor, model: nn.Module, tokenizer: Any = None, what: str = "calibration") -> None:
    """Refuse token ids that the model's embedding does not have.

    Ids that the model's config names (places of images) may lie beyond it: the model replaces them.

    Raises:
        ValueError: with the first such id and the size of the vocabulary, and that of the tokenizer if there is one.
    """
    size = vocabulary(model)
    if size is None or not ids.numel() or ids.is_floating_point():
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(ids))
    if lowest >= 0 and highest < size:
        return
    named = _named_ids(model)
    wrong = [int(i) for i in ids.unique() if not 0 <= i < size and int(i) not in named]
    if not wrong:
        return
    if wrong[0] < 0:
        raise ValueError(
            f"{what} holds the token id {wrong[0]}, but the model has {size} token ids, from 0 on: leave tokens out "
            "by 0 in attention_mask, or by -100 in labels"
        )
    have = f"the tokenizer has {len(tokenizer)} and the model" if hasattr(tokenizer, "__len__") else "the model has"
    raise ValueError(
        f"{what} holds the token id {wrong[-1]}, but {have} {size} token ids: use the tokenizer of this model"
    )


def _named_ids(model: nn.Module) -> set[int]:
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    return {v for k, v in fields.items() if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)}


def check_tokens(inputs: Mapping[str, Any], what: str = "calibration") -> None:
    """Refuse inputs none of whose tokens counts.

    Raises:
        ValueError: if there are no ids, the attention mask is 0 everywhere or of another shape, or all tokens are
            context only.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor):
        return
    if not ids.numel():
        raise ValueError(f"{what} holds no token: its rows are empty")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape != ids.shape:
        raise ValueError(
            f"{what}'s attention_mask is {tuple(mask.shape)} and its input_ids are {tuple(ids.shape)}: give a mask of "
            "their shape"
        )
    if isinstance(mask, Tensor) and not mask.any():
        raise ValueError(f"{what} holds no token: its attention_mask is 0 everywhere, which says that all is padding")
    if ids.dim() == 2 and ids.shape[1] <= int(inputs.get(FRONT, 0)):
        raise ValueError(f"{what} holds no token: {FRONT!r} says that all tokens of its rows are only context")


def broken_weight(model: nn.Module) -> str | None:
    """Return the name of a parameter that holds NaN or infinity; None if there is none."""
    for name, parameter in model.named_parameters():
        # Nothing on the meta device has values, and 8 bits are a quantiser's, which torch cannot compare.
        plain = parameter.is_floating_point() and parameter.element_size() > 1 and type(parameter.data) is Tensor
        if plain and parameter.device.type != "meta" and not _finite(parameter):
            return name
    return None


@torch.no_grad()
def _finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor) if tensor.numel() else (torch.zeros(()), torch.zeros(()))
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_weights(model: nn.Module) -> None:
    """Refuse a model whose weights are not all finite: nothing that is measured with it means anything.

    Raises:
        ValueError: with the name of the first such weight.
    """
    name = broken_weight(model)
    if name is not None:
        raise ValueError(
            f"the weights hold NaN or infinity ({name}): load the model again, from a checkpoint whose training did "
            "not diverge"
        )
