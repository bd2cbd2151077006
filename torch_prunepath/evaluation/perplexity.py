"""Perplexity and decoding speed of a causal language model, dense or sparse.

Shapes: N windows of C tokens, B windows at once, P prompt tokens.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.inputs.check import NOT_FINITE, check_ids, check_weights
from torch_prunepath.inputs.data import evaluation_mode
from torch_prunepath.progress import progress_bar


def perplexity(model: Any, window_NC: Tensor, *, front_tokens: int = 0, title: str = "perplexity") -> float:
    """Measure the perplexity over windows, each read by itself: exp of :func:`mean_loss`.

    Args:
        model: a causal language model; ``model(input_ids=[1, C]).logits`` is ``[1, C, vocabulary]``.
        window_NC: int64 ``[N, C]``, no padding, C at least 2.
        front_tokens: how many tokens at the start of each window are context only.
        title: title of the progress bar.

    Raises:
        ValueError: if an id is outside the model's vocabulary, or the perplexity is not a finite number.
    """
    mean = mean_loss(model, window_NC, front_tokens=front_tokens, title=title)
    if not math.isfinite(mean):
        check_weights(model)
        raise ValueError(NOT_FINITE + "it has no perplexity: load it in float32")
    return math.exp(mean)


def mean_loss(
    model: Any, window_NC: Tensor, *, rows: int = 1, front_tokens: int = 0, title: str = "perplexity"
) -> float:
    """Measure the mean negative log-likelihood of the tokens of every window that have one before them, in nats.

    Tokens in front of the text are never predicted, but the first behind them is. So one such token, or none, leaves
    tokens 2 to C. The mean is NaN or infinite if logits are.

    Args:
        model: a causal language model, as for :func:`perplexity`; it runs in evaluation mode.
        window_NC: int64 ``[N, C]``, no padding, C at least 2.
        rows: windows that go through the model at once.
        front_tokens: how many tokens at the start of each window are context only.
        title: title of the progress bar.

    Raises:
        ValueError: if an id is outside the model's vocabulary, or windows have nothing to predict.
    """
    check_ids(window_NC, model, what="the text")
    known = max(1, front_tokens)
    if window_NC.shape[1] <= known:
        raise ValueError(f"windows of {window_NC.shape[1]} tokens have none to predict: make them longer than {known}")
    total = 0.0
    with evaluation_mode(model), torch.inference_mode():
        for window_BC in progress_bar(window_NC.split(rows), desc=title, unit="window", leave=False, progress=None):
            window_BC = window_BC.to(model.device)
            logits_TV = model(input_ids=window_BC, use_cache=False).logits[:, known - 1 : -1].flatten(0, 1)
            total += nnf.cross_entropy(logits_TV.float(), window_BC[:, known:].flatten(), reduction="sum").item()
    return total / (window_NC.shape[0] * (window_NC.shape[1] - known))


class _Clock:
    """A streamer for ``generate`` that notes the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        """Note the time; ``generate`` calls this with the prompt, then with each token once it is on the host."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing; ``generate`` calls this after the last token."""


def decode_speed(
    model: Any, prompt_1P: Tensor, *, tokens: int = 32, repeats: int = 3, title: str = "decoding"
) -> float:
    """Measure greedy decoding with a KV cache at batch 1, in tokens a second, as the median of runs after a warm-up.

    The time from the first new token to the last counts; reading the prompt does not.

    Args:
        model: a causal language model with ``generate``.
        prompt_1P: token ids of the prompt, int64 ``[1, P]``.
        tokens: new tokens of a run, at least 2; end-of-sequence tokens do not stop it.
        repeats: number of timed runs.
        title: title of the progress bar.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0
    )
    prompt_1P = prompt_1P.to(model.device)
    speeds = []
    with evaluation_mode(model), torch.inference_mode():
        for _ in progress_bar(range(1 + repeats), desc=title, unit="run", leave=False, progress=None):
            clock = _Clock()
            model.generate(
                prompt_1P,
                attention_mask=torch.ones_like(prompt_1P),
                generation_config=settings,
                streamer=clock,
            )
            first, *_, last = clock.times[1:]
            speeds.append((tokens - 1) / (last - first))
    return statistics.median(speeds[1:])
