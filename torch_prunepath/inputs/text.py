"""From texts and chats to rows of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torch_prunepath.inputs.front import FRONT, added_tokens

ROW_TOKENS = 512
"""Tokens in a row of calibration text, where the model allows as many. Chosen without measurement: docs/log.md,
"choosing the training-free defaults on SmolLM2-135M", leaves open whether longer rows are better."""

SHORTEST = 8
"""Rows of fewer tokens are left out where there are longer ones: such rests say little about a text. A guess."""


class Row(dict[str, Any]):
    """A batch of one row that the caller did not give as a batch, so that it may be joined with others."""


def row_length(model: nn.Module) -> int:
    """Return the tokens in a row of calibration text: ``ROW_TOKENS``, or fewer if the model has fewer positions."""
    config = getattr(model, "config", None)
    limits = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
    # RoBERTa counts positions from its padding index + 1.
    return min([ROW_TOKENS, *(limit - 2 for limit in limits if isinstance(limit, int) and limit > 2)])


def text_rows(texts: Sequence[str], tokenizer: Any, length: int, *, causal: bool) -> list[Row]:
    """Cut texts into rows of at most ``length`` tokens, each ``[1, T]``.

    Every row starts with what the tokenizer puts in front of a text. What it puts behind ends every row of a model that
    reads in both directions, which knows no text without it; for a causal model it ends the text, so only its last row.

    Args:
        texts: the texts.
        tokenizer: a Hugging Face tokenizer.
        length: largest number of tokens in a row.
        causal: whether each token sees only those before it. The tokens in front are context only then.

    Raises:
        ValueError: if no text has a token, or rows are too short for what the tokenizer adds.
    """
    added = added_tokens(tokenizer)
    front, behind = list(added.front), list(added.behind)
    room = length - len(front) - len(behind)
    if room < 1:
        raise ValueError(f"rows of {length} tokens have no room for text beside the {length - room} that are added")
    # For a causal model what stands behind is a part of the text, and cut with it.
    tail, closing = (behind, []) if causal else ([], behind)
    room = length - len(front) - len(closing)
    pieces = []
    for text in texts:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        ids += tail if ids else []
        pieces += [ids[start : start + room] for start in range(0, len(ids), room)]
    rows = [front + piece + closing for piece in pieces]
    rows = [row for row in rows if len(row) >= min(SHORTEST, length)] or rows
    if not rows:
        raise ValueError("calibration texts are empty after tokenisation: pass more text")
    context = {FRONT: len(front)} if front and causal else {}
    return [Row(input_ids=torch.tensor([row]), **context) for row in rows]


def is_chat(value: Any) -> bool:
    """Whether this is a list of messages, dicts that have a role."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def chat_text(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    """Write a chat by the tokenizer's template, without what it puts in front of every text.

    Raises:
        ValueError: if the tokenizer has no template, or the template does not take these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "calibration holds chats, and the tokenizer has no chat template: pass the tokenizer of a model that "
            "chats, or texts"
        )
    try:
        text: str = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
    except Exception as error:  # whatever a template raises (jinja2's errors, TypeError for a message without content)
        raise ValueError(
            f"the tokenizer's chat template does not take a chat of calibration ({error}): give messages as "
            '{"role": "user", "content": "text"}'
        ) from error
    # Templates write the tokens in front by themselves; they are put in front of every row.
    written = tokenizer.decode(list(added_tokens(tokenizer).front))
    return text.removeprefix(written) if written else text
