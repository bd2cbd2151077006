"""Text for calibration and for measuring: a file, or the help topics of Python, English text that every CPython has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_prunepath.console.errors import UserError, as_user_error, one_line
from torch_prunepath.inputs.front import added_tokens, in_windows

CALIBRATION_SHARE = 0.75
"""Share of a text that is used for calibration; the rest is held out. Chosen without measurement."""

CONTEXT = 512
"""Largest number of tokens of a window. Chosen without measurement."""

TEST_WINDOWS = 8
"""Largest number of windows on which a model is measured. Chosen without measurement."""


@dataclass(frozen=True)
class Corpus:
    """Two parts of one text that do not overlap.

    Attributes:
        name: name of the text, for messages.
        calibration: the part to which routers are fitted.
        held_out: the part on which quality is measured.
    """

    name: str
    calibration: str
    held_out: str


def load_corpus(path: str | Path | None = None) -> Corpus:
    """Load the text of a UTF-8 file, or Python's help topics if ``path`` is None.

    Raises:
        UserError: if the file cannot be read as text.
    """
    return help_topics() if path is None else text_file(Path(path))


def help_topics() -> Corpus:
    """Load the topics of Python's ``help()`` in sorted order: about 450 kB of English about the language.

    Several topics quote others. A paragraph is kept only where it first occurs, so that none is in both parts.
    """
    from pydoc_data.topics import topics

    paragraphs: dict[str, str] = {}
    for _, text in sorted(topics.items()):
        for part in text.split("\n\n"):
            paragraphs.setdefault(" ".join(part.split()), part.strip("\n"))
    return _split("the help topics of Python", "\n\n".join(part for part in paragraphs.values() if part))


def text_file(path: Path) -> Corpus:
    """Load the text of a UTF-8 file.

    Raises:
        UserError: if the file cannot be read as text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({one_line(error)}): convert it, or name another file") from error
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}: name a text file that exists and can be read"
        ) from error
    return _split(str(path), text)


def _split(name: str, text: str) -> Corpus:
    """Cut the text at the first end of a paragraph after the calibration part's share, or there if none is near."""
    cut = int(len(text) * CALIBRATION_SHARE)
    end = text.find("\n\n", cut)
    # A text of a few huge paragraphs must not lose its held-out part to a paragraph's end far away.
    if cut <= end < cut + (len(text) - cut) // 4:
        cut = end
    return Corpus(name, text[:cut], text[cut:])


def fit_and_test(corpus: Corpus, tokenizer: Any, *, longest: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Cut token windows to fit routers to, and others to measure on.

    Args:
        corpus: the text.
        tokenizer: a Hugging Face tokenizer.
        longest: the longest context that the model takes.
        tokens: largest number of tokens to fit to, rounded to whole windows (at least one).

    Returns:
        Windows to fit to, int64 ``[N, C]``, and windows to measure on, int64 ``[M, C]``; M is at most ``TEST_WINDOWS``,
        C at most ``CONTEXT``.

    Raises:
        UserError: if a part of the text does not fill one window.
    """
    context = min(CONTEXT, longest)
    count = max(1, tokens // context)
    fit_NC = windows(corpus.calibration, tokenizer, context=context, count=count, part="text for calibration")
    test_MC = windows(corpus.held_out, tokenizer, context=context, count=TEST_WINDOWS, part="held-out text")
    return fit_NC, test_MC


def windows(text: str, tokenizer: Any, *, context: int, count: int, part: str) -> Tensor:
    """Cut ``text`` into windows that do not overlap, and choose some that are evenly spread over it.

    Every window starts with what the tokenizer puts in front of a text (:mod:`torch_prunepath.inputs.front`), which is
    a part of its C tokens. None ends with what the tokenizer puts behind a text, because the text goes on.

    Args:
        text: the text.
        tokenizer: a Hugging Face tokenizer.
        context: tokens of a window, those in front included, C.
        count: largest number of windows to return.
        part: name of the text, for the error.

    Returns:
        Token ids, int64 ``[N, C]``, N at most ``count``.

    Raises:
        UserError: if the text does not fill one window.
    """
    ids_T = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    front = added_tokens(tokenizer).front
    with as_user_error(ValueError):
        window_NC = in_windows(ids_T, front, context)
    available = len(window_NC)
    if available == 0:
        needed = context - len(front)
        raise UserError(
            f"the {part} is too short: it has {len(ids_T)} tokens, and at least {needed} are needed: give a longer text"
        )
    chosen_N = torch.linspace(0, available - 1, min(count, available)).round().to(torch.int64)
    return window_NC[chosen_N]
