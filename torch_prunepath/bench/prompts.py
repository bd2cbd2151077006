"""Prompts of different lengths, one after the other: how long each takes to be read and continued.

The host's clock is read before the prompt is passed to the model and after the last new token is there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_prunepath.bench.build import random_ids
from torch_prunepath.bench.decoder import Decoder, read_prompt
from torch_prunepath.bench.options import MODES, DecodeOptions
from torch_prunepath.progress import progress_bar

REPEATS = 3
"""Number of runs of each prompt: the median of three ignores one run that was disturbed."""

SHORTEST = 16
"""Tokens of the shortest prompt, about as many as a question has."""


def lengths(count: int, longest: int) -> list[int]:
    """Return ``count`` evenly spaced prompt lengths from ``SHORTEST``, or less, to ``longest``."""
    first = min(SHORTEST, longest)
    return [round(first + (longest - first) * i / max(count - 1, 1)) for i in range(count)]


class Prompts:
    """Prompts of different lengths for a dense or sparse model, read and continued one by one.

    The longest has ``context`` tokens, and each is continued by ``new_tokens`` tokens. Everything is compiled when the
    object is built: the decoding step in one of ``MODES``, and reading prompts of any length.

    Attributes:
        decoder: the decoder that all prompts use. It holds the longest prompt when the object has just been built.
    """

    def __init__(self, name: str, model: Any, options: DecodeOptions, mode: str, backend: str) -> None:
        self._name, self._new_tokens = name, options.new_tokens
        room = options.context + options.new_tokens
        ids_1C = random_ids(model, 1, room + 1, options.seed)
        self.decoder = Decoder(model, ids_1C, options.new_tokens, room=room)
        self._step = self.decoder.prepared(MODES[mode], backend)
        compiled = MODES[mode].compile is not None
        self._reader: Any = torch.compile(read_prompt, backend=backend, dynamic=True) if compiled else read_prompt
        counts = lengths(options.num_prompts, options.context)
        self._prompts = [ids_1C[:, -(length + options.new_tokens + 1) :].contiguous() for length in counts]
        # The longest first and last: code for one length is compiled anew, for any, when it meets another.
        for prompt_1C in (self._prompts[-1], *self._prompts):
            self.decoder.begin(prompt_1C, self._reader)

    @torch.no_grad()
    def measure(self) -> list[dict[str, Any]]:
        """Measure the median latency of each prompt, in milliseconds."""
        found = []
        bar = progress_bar(self._prompts, desc=f"{self._name}: prompts", unit="prompt", progress=None, leave=False)
        for number, prompt_1C in enumerate(bar):
            seconds = statistics.median(self._latency(prompt_1C) for _ in range(REPEATS))
            found.append(
                {
                    "geometry": self._name,
                    "prompt": number,
                    "prompt_tokens": prompt_1C.shape[1] - self._new_tokens - 1,
                    "new_tokens": self._new_tokens,
                    "latency_ms": seconds * 1e3,
                }
            )
        return found

    def _latency(self, prompt_1C: Tensor) -> float:
        _wait(prompt_1C)
        start = time.perf_counter()
        self.decoder.begin(prompt_1C, self._reader)
        self.decoder.turn(self._step)
        _wait(prompt_1C)
        return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def paired(
    dense: Sequence[dict[str, Any]], sparse: Sequence[dict[str, Any]], sparsity: float, realised: float
) -> list[dict[str, Any]]:
    """Join both sides' results of each prompt.

    Args:
        dense: results of the dense model by prompt.
        sparse: results of the sparse model by prompt.
        sparsity: sparsity that was asked for.
        realised: sparsity that was realised on the longest prompt.
    """
    about = {"sparsity": sparsity, "realised_sparsity": realised}
    pairs = zip(dense, sparse, strict=True)
    return [{**_shared(d), **about, **_side("dense", d), **_side("sparse", s)} for d, s in pairs]


def _shared(prompt: dict[str, Any]) -> dict[str, Any]:
    return {key: prompt[key] for key in ("geometry", "prompt", "prompt_tokens", "new_tokens")}


def _side(side: str, prompt: dict[str, Any]) -> dict[str, float]:
    return {
        f"{side}_latency_ms": prompt["latency_ms"],
        f"{side}_tokens_per_s": prompt["new_tokens"] / prompt["latency_ms"] * 1e3,
    }
