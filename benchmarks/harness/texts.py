"""Texts as windows of token ids.

Shapes: N windows of C tokens, T tokens.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_prunepath.console.errors import UserError

CHUNK = 1 << 16
"""Characters that are tokenised together, about: chunks are tokenised side by side."""


def read_text(path: Path) -> str:
    """A text file, plain, .gz or .xz."""
    opener: Callable[..., Any] = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:
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


def windows(ids_T: Tensor, context: int) -> Tensor:
    """Every whole window of a text, int64 ``[N, C]``.

    Raises:
        UserError: if there is none.
    """
    if len(ids_T) < context:
        raise UserError(f"the text has {len(ids_T)} tokens, fewer than one window of {context}: give a longer one")
    return ids_T[: len(ids_T) - len(ids_T) % context].to(torch.int64).view(-1, context)


def first_windows(text: str, tokenizer: Any, count: int, context: int) -> Tensor:
    """The first ``count`` windows of a text, int64 ``[count, C]``.

    Raises:
        UserError: if the text is shorter.
    """
    # In one piece, not in chunks: the published numbers were made so.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < count * context:
        raise UserError(f"the text has {len(ids)} tokens, {count} x {context} are needed: give a longer text")
    return torch.tensor(ids[: count * context]).view(count, context)


def spread(window_NC: Tensor, count: int) -> Tensor:
    """At most ``count`` windows, evenly spread."""
    chosen_N = torch.linspace(0, len(window_NC) - 1, min(count, len(window_NC))).round().long()
    return window_NC[chosen_N]


def fingerprint(window_NC: Tensor) -> str:
    """Hex digits that differ where the windows do."""
    return hashlib.sha256(window_NC.contiguous().numpy().tobytes()).hexdigest()[:10]
