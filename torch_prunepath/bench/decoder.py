"""The parts of a whole model that are timed: decoding steps, and reading prompts; the same for dense and sparse models.

A decoding step computes the next token, argmax included, and updates cache and positions in place, so that no step
waits for the host. The next step does not read that token but the next one of a fixed random sequence. Otherwise a
model with random weights would repeat one token in all sequences, and dense and sparse models would read different
tokens.

Shapes: B sequences, P prompt tokens, N decoded tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_prunepath.bench.options import Mode
from torch_prunepath.bench.timing import Captured

Step = Callable[[], Tensor]

MOST_PARTS = 256
"""Largest number of parts into which a row of logits is cut to find the largest logit; the second step compares as many
numbers. A guess."""


def prepare(call: Callable[[], Any], mode: Mode, backend: str, before: Callable[[], None] | None = None) -> Any:
    """Return ``call`` compiled, warmed up and, if the mode says so, recorded as a CUDA graph.

    Args:
        call: a function without arguments that changes only tensors that stay where they are.
        mode: one of the values of ``MODES``.
        backend: backend of ``torch.compile``.
        before: a function that undoes the changes of ``call``; it runs before each call here.
    """
    before = before or (lambda: None)
    if mode.compile is not None:
        # torch.compile takes a mode or options; what "default" stands for has no options of its own.
        how: dict[str, Any] = {"options": {"combo_kernels": True}} if mode.combo_kernels else {"mode": mode.compile}
        call = torch.compile(call, backend=backend, dynamic=False, fullgraph=True, **how)
    # Inductor's own graphs record on the second call. What we record is compiled before its warm-up.
    for _ in range(1 if mode.capture else 3):
        before()
        call()
    return Captured(call, before) if mode.capture else call


class Work(Protocol):
    """Something of a model that is timed call by call.

    Attributes:
        phase: ``"decode"`` or ``"prefill"``.
        batch: B.
        tokens: tokens of each sequence that one call reads.
        calls: number of calls that :meth:`turn` makes.
        cache_bytes: bytes of keys and values that a call reads.
    """

    phase: str
    batch: int
    tokens: int
    calls: int

    @property
    def cache_bytes(self) -> int: ...  # noqa: D102

    def step(self) -> Tensor:
        """Make one eager call, and return logits ``[B, V]``."""

    def prepared(self, mode: Mode, backend: str) -> Step:
        """Compile :meth:`step` in the mode, and return the compiled step."""

    def rewind(self) -> None:
        """Go back to the state before the first call."""

    def turn(self, step: Step, calls: int | None = None) -> list[Tensor]:
        """Make ``calls`` calls one after the other, by default :attr:`calls`, and return the logits of each."""

    def ids(self) -> Tensor:
        """Return all tokens that are read, int64 ``[B, ...]``."""


class Decoder:
    """The :class:`Work` of decoding: a prompt in a static cache, from which each step reads one more token.

    Args:
        model: a causal language model in evaluation mode.
        ids_BC: int64 ``[B, P + N + 1]``: the prompt, the tokens that the steps read, and one that no step reads.
        new_tokens: number of decoding steps, N.
        room: tokens that the cache holds; P + N by default.
    """

    phase = "decode"
    tokens = 1

    def __init__(self, model: Any, ids_BC: Tensor, new_tokens: int, room: int | None = None) -> None:
        from transformers import StaticCache

        self.model, self.calls = model, new_tokens
        self.batch = ids_BC.shape[0]
        room = ids_BC.shape[1] - 1 if room is None else room
        self.cache: Any = StaticCache(config=model.config, max_cache_len=room)
        # Where the next step reads and writes: these stay in place, as recorded graphs need it.
        self.token_B1, self.index_B1, self.position_B1, self.chosen_B1 = (
            torch.zeros(self.batch, 1, dtype=torch.int64, device=ids_BC.device) for _ in range(4)
        )
        self.stream_BN = torch.zeros_like(ids_BC[:, : new_tokens + 1])
        for state in (self.token_B1, self.index_B1, self.position_B1, self.chosen_B1, self.stream_BN):
            torch._dynamo.mark_static_address(state)
        self.begin(ids_BC, read_prompt)

    @torch.no_grad()
    def begin(self, ids_BC: Tensor, reader: Callable[[Any, Tensor, Any], Tensor]) -> None:
        """Read the prompt at the start of ``ids_BC``, and rewind to its end."""
        self._ids_BC = ids_BC
        self.length = ids_BC.shape[1] - self.calls - 1
        self.stream_BN.copy_(ids_BC[:, self.length :])
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        reader(self.model, ids_BC[:, : self.length], self.cache)
        self.rewind()

    @torch.no_grad()
    def rewind(self) -> None:
        """Go back to the end of the prompt; later entries of the cache are masked until steps overwrite them."""
        self.token_B1.copy_(self.stream_BN[:, :1])
        self.index_B1.zero_()
        self.position_B1.fill_(self.length)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Decode one token eagerly, and return logits ``[B, V]``."""
        return self._call()()

    def _call(self) -> Step:
        state = (self.token_B1, self.index_B1, self.position_B1, self.chosen_B1, self.stream_BN)
        return functools.partial(_step, self.model, self.cache, *state)

    @torch.no_grad()
    def prepared(self, mode: Mode, backend: str) -> Step:
        """Compile :meth:`step` in the mode, rewind, and return the compiled step."""
        step: Step = prepare(self._call(), mode, backend, self.rewind)
        self.rewind()
        return step

    def turn(self, step: Step, calls: int | None = None) -> list[Tensor]:
        """Decode ``calls`` tokens, by default N. Rewind before, or the cache may have no room."""
        return [step() for _ in range(self.calls if calls is None else calls)]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values; attention over a static cache also reads the entries not yet filled."""
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in self.cache.layers)

    def ids(self) -> Tensor:
        """Return the prompt and the tokens that the steps read, int64 ``[B, P + N]``."""
        return self._ids_BC[:, :-1]


class Prefill:
    """The :class:`Work` of reading a whole prompt at once, without a cache."""

    phase = "prefill"
    calls = 1
    cache_bytes = 0

    def __init__(self, model: Any, ids_BP: Tensor) -> None:
        self.model, self._ids_BP = model, ids_BP
        self.batch, self.tokens = ids_BP.shape

    @torch.no_grad()
    def step(self) -> Tensor:
        """Read the prompt eagerly, and return logits ``[B, V]`` of its last position."""
        return read_prompt(self.model, self._ids_BP, None)

    @torch.no_grad()
    def prepared(self, mode: Mode, backend: str) -> Step:
        """Compile :meth:`step` in the mode, and return the compiled step."""
        step: Step = prepare(functools.partial(read_prompt, self.model, self._ids_BP, None), mode, backend, self.rewind)
        return step

    def rewind(self) -> None:
        """Do nothing: reading the prompt changes no state."""

    def turn(self, step: Step, calls: int | None = None) -> list[Tensor]:
        """Read the prompt ``calls`` times, by default once."""
        return [step() for _ in range(calls or 1)]

    def ids(self) -> Tensor:
        """Return the prompt, int64 ``[B, P]``."""
        return self._ids_BP


@torch.no_grad()
def logits_of(work: Work, step: Step, calls: int) -> Tensor:
    """Return the logits of the first calls, float32 ``[calls * B, V]``; rewind before and afterwards."""
    work.rewind()
    # Cloned one by one: a recorded graph returns the same memory each time.
    rows = [work.turn(step, 1)[0].float().clone() for _ in range(min(calls, work.calls))]
    work.rewind()
    return torch.cat(rows)


def read_prompt(model: Any, ids_BP: Tensor, cache: Any) -> Tensor:
    """Read tokens into an empty cache, or without one, and return the logits ``[B, V]`` of the last position."""
    output = model(input_ids=ids_BP, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    logits_BV: Tensor = output.logits[:, -1]
    return logits_BV


def _step(
    model: Any,
    cache: Any,
    token_B1: Tensor,
    index_B1: Tensor,
    position_B1: Tensor,
    chosen_B1: Tensor,
    stream_BN: Tensor,
) -> Tensor:
    output = model(input_ids=token_B1, position_ids=position_B1, past_key_values=cache, use_cache=True)
    logits_BV: Tensor = output.logits[:, -1]
    chosen_B1.copy_(_argmax(logits_BV))
    index_B1.add_(1)
    position_B1.add_(1)
    token_B1.copy_(stream_BN.gather(1, index_B1))
    return logits_BV


def _argmax(logits_BV: Tensor) -> Tensor:
    """Compute ``argmax(-1)``, ``[B, 1]``, in two steps if V has a divisor, so that several programs share a row.

    Inductor's own argmax gives a whole row to one program.
    """
    B, V = logits_BV.shape
    parts = max(n for n in range(1, MOST_PARTS + 1) if V % n == 0)
    best_BP, place_BP = logits_BV.view(B, parts, -1).max(-1)
    part_B1 = best_BP.argmax(-1, keepdim=True)
    return part_B1 * (V // parts) + place_BP.gather(1, part_B1)
