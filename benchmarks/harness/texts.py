"""Texts as windows of token ids.

Shapes: N windows of C tokens, T tokens.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_prunepath.console.errors import UserError
from torch_prunepath.inputs.front import added_tokens, in_windows

CHUNK = 1 << 16
"""Characters that are tokenised together, about: chunks are tokenised side by side."""


def read_text(path: Path) -> str:
    """A text file, plain, .gz or .xz."""
    opener: Callable[..., Any] = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8-sig") as file:
        text: str = file.read()
    return text


def tokenise(text: str, tokenizer: Any) -> Tensor:
    """Token ids of a text, int32 ``[T]``; cut into chunks at line ends."""
    chunks, start = [], 0
    while start < len(text):
        end = text.find("\n", start + CHUNK)
        end = len(text) if end < 0 else end + 1
        chunks.append(text[start:end])
        start = end
    ids = tokenizer(chunks, add_special_tokens=False, verbose=False)["input_ids"] if chunks else []
    return torch.cat([torch.tensor(part, dtype=torch.int32) for part in ids] or [torch.empty(0, dtype=torch.int32)])


def windows(ids_T: Tensor, context: int, front: Sequence[int] = ()) -> Tensor:
    """Every whole window of a text, int64 ``[N, C]``, each with the ids ``front`` at its start.

    Raises:
        UserError: if there is none.
    """
    window_NC = in_windows(ids_T, front, context)
    if not len(window_NC):
        raise UserError(f"the text has {len(ids_T)} tokens, fewer than one window of {context}: give a longer one")
    return window_NC


def first_windows(text: str, tokenizer: Any, count: int, context: int) -> Tensor:
    """The first ``count`` windows of a text, int64 ``[count, C]``, each with what the tokenizer puts in front of it.

    Raises:
        UserError: if the text is shorter.
    """
    # In one piece, not in chunks: the published numbers were made so.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    front = added_tokens(tokenizer).front
    body = context - len(front)
    if len(ids) < count * body:
        raise UserError(f"the text has {len(ids)} tokens, {count} x {body} are needed: give a longer text")
    return in_windows(torch.tensor(ids[: count * body]), front, context)


def spread(window_NC: Tensor, count: int) -> Tensor:
    """At most ``count`` windows, evenly spread."""
    chosen_N = torch.linspace(0, len(window_NC) - 1, min(count, len(window_NC))).round().long()
    return window_NC[chosen_N]


def fingerprint(window_NC: Tensor) -> str:
    """Hex digits that differ where the windows do."""
    return hashlib.sha256(window_NC.contiguous().numpy().tobytes()).hexdigest()[:10]
