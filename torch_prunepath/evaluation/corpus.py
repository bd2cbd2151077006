"""Text for calibration and for measuring: a file, or the English that every CPython ships, its help topics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_prunepath.console.errors import UserError, one_line

CALIBRATION_SHARE = 0.75
CONTEXT = 512
TEST_WINDOWS = 8


@dataclass(frozen=True)
class Corpus:
    """Two parts of one text that do not overlap.

    Attributes:
        name: what the text is.
        calibration: the part that routers are fitted to.
        held_out: the part that quality is measured on.
    """

    name: str
    calibration: str
    held_out: str


def load_corpus(path: str | Path | None = None) -> Corpus:
    """The text of a UTF-8 file, or Python's help topics if there is none.

    Raises:
        UserError: if the file cannot be read as text.
    """
    return help_topics() if path is None else text_file(Path(path))


def help_topics() -> Corpus:
    """The topics of Python's ``help()`` in sorted order: about 450 kB of English on the language.

    Several topics quote others. A paragraph is kept where it first occurs only, so that none is in both parts.
    """
    from pydoc_data.topics import topics

    paragraphs: dict[str, str] = {}
    for _, text in sorted(topics.items()):
        for part in text.split("\n\n"):
            paragraphs.setdefault(" ".join(part.split()), part.strip("\n"))
    return _split("the help topics of Python", "\n\n".join(part for part in paragraphs.values() if part))


def text_file(path: Path) -> Corpus:
    """The text of a UTF-8 file.

    Raises:
        UserError: if the file cannot be read as text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({one_line(error)}): convert it, or name another file") from error
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}: name a text file that exists and can be read"
        ) from error
    return _split(str(path), text)


def _split(name: str, text: str) -> Corpus:
    """Cut at the first paragraph's end past the calibration part's share; anywhere if no paragraph ends there."""
    cut = int(len(text) * CALIBRATION_SHARE)
    end = text.find("\n\n", cut)
    # A text of a few huge paragraphs must not lose its held-out part to a paragraph's end far away.
    if cut <= end < cut + (len(text) - cut) // 4:
        cut = end
    return Corpus(name, text[:cut], text[cut:])


def fit_and_test(corpus: Corpus, tokenizer: Any, *, longest: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Token windows to fit routers to, and others to measure on.

    Args:
        corpus: the text.
        tokenizer: a Hugging Face tokenizer.
        longest: the longest context that the model takes.
        tokens: about how many tokens to fit to, at most.

    Returns:
        int64 ``[N, C]`` and int64 ``[M, C]``, M at most ``TEST_WINDOWS``, C at most ``CONTEXT``.

    Raises:
        UserError: if a part of the text does not fill one window.
    """
    context = min(CONTEXT, longest)
    count = max(1, tokens // context)
    fit_NC = windows(corpus.calibration, tokenizer, context=context, count=count, part="text for calibration")
    test_MC = windows(corpus.held_out, tokenizer, context=context, count=TEST_WINDOWS, part="held-out text")
    return fit_NC, test_MC


def windows(text: str, tokenizer: Any, *, context: int, count: int, part: str) -> Tensor:
    """Windows of ``text`` that do not overlap, spread evenly over it.

    Args:
        text: what to cut.
        tokenizer: a Hugging Face tokenizer.
        context: C, tokens a window.
        count: the most windows to return.
        part: what the text is called in the error.

    Returns:
        int64 ``[N, C]``, N at most ``count``.

    Raises:
        UserError: if the text does not fill one window.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    available = len(ids) // context
    if available == 0:
        raise UserError(f"the {part} is too short: {len(ids)} tokens of at least {context}: give a longer text")
    window_NC = ids[: available * context].view(available, context)
    chosen_N = torch.linspace(0, available - 1, min(count, available)).round().to(torch.int64)
    return window_NC[chosen_N]
