"""What a tokenizer puts in front of every text, such as a beginning-of-sequence token, and behind it.

A language model has hardly ever read a text without the tokens in front, and some fail without them. So every row and
window of text starts with them. What a causal model makes of them is the same for every text, so they are context only:
they count in no statistic and in no perplexity.

Shapes: B rows, T tokens a row; N windows of C tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FRONT = "front_tokens"
"""Key of a batch beside the model's inputs: how many tokens at the start of each row are context only, an int."""

PROBES = ("a", "0", "the")
"""Short texts from which it is seen what a tokenizer adds; the first that it does not drop as unknown is used."""


@dataclass(frozen=True)
class Added:
    """The token ids that a tokenizer adds to a text: those in ``front`` of it, and those ``behind`` it."""

    front: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()


def added_tokens(tokenizer: Any) -> Added:
    """Return what the tokenizer adds to every text, as it says itself: by the difference that special tokens make.

    Raises:
        ValueError: if the tokens of the text cannot be told from what is added.
    """
    for probe in PROBES:
        plain = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(probe)["input_ids"])
        if plain:
            break
    else:
        raise ValueError(f"the tokenizer finds no token in {', '.join(PROBES)}: pass token ids in place of texts")
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return Added(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
    raise ValueError(
        f"the tokenizer makes {plain} of {probe!r} without special tokens and {whole} with them, so that what it puts "
        "in front of a text cannot be told: pass token ids in place of texts"
    )


def front_tokens(tokenizer: Any) -> int:
    """Return how many tokens the tokenizer puts in front of every text."""
    return len(added_tokens(tokenizer).front)


def in_windows(ids_T: Tensor, front: Sequence[int], context: int) -> Tensor:
    """Cut ids into as many windows as they fill, each with the tokens in front first: int64 ``[N, C]``; N may be 0.

    Args:
        ids_T: the ids of a text, without what is put in front of it.
        front: the ids in front.
        context: tokens of a window with those in front, C.

    Raises:
        ValueError: if the tokens in front leave no room in a window.
    """
    body = context - len(front)
    if body < 1:
        raise ValueError(f"windows of {context} tokens have no room for text behind the {len(front)} in front of it")
    text_NC = ids_T[: len(ids_T) - len(ids_T) % body].to(torch.int64).view(-1, body)
    front_NC = torch.tensor(list(front), dtype=torch.int64).expand(len(text_NC), -1)
    return torch.cat([front_NC, text_NC], dim=1)


def as_batch(window_NC: Tensor, front: int) -> dict[str, Any]:
    """Make a batch of windows whose first ``front`` tokens are context only."""
    return {"input_ids": window_NC, FRONT: front} if front else {"input_ids": window_NC}


def front_of(batches: Sequence[Mapping[str, Any]]) -> int:
    """Return how many tokens at the start of each row of the batches are context only.

    Raises:
        ValueError: if the batches differ in it.
    """
    counts = {int(batch.get(FRONT, 0)) for batch in batches}
    if len(counts) > 1:
        raise ValueError(f"batches differ in {FRONT!r}, {sorted(counts)}: give all of them the same number")
    return counts.pop() if counts else 0


def for_model(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch without what is not the model's."""
    return {key: value for key, value in batch.items() if key != FRONT}


def quiet(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what is the model's, and add ``use_cache=False`` where the model has that option."""
    inputs = for_model(batch)
    if (
        hasattr(getattr(model, "config", None), "use_cache")
        and "use_cache" in inspect.signature(model.forward).parameters
    ):
        return {**inputs, "use_cache": False}
    return inputs
