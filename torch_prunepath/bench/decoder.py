"""What is timed of a whole model: decoding steps and the reading of prompts, the same for dense and sparse models.

A decoding step computes the next token, argmax included, and updates cache and positions in place, so that no step
waits for the host. It does not feed that token back but the next of a fixed random sequence: random weights would
repeat one token, alike in all sequences, and dense and sparse models would read different ones.

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
"""Most parts that a row of logits is cut into to find the largest; the second step compares as many numbers."""


def prepare(call: Callable[[], Any], mode: Mode, backend: str, before: Callable[[], None] | None = None) -> Any:
    """``call`` compiled, warmed up and, if the mode says so, recorded; takes no arguments.

    Args:
        call: changes only tensors that stay where they are.
        mode: one of ``MODES``.
        backend: of ``torch.compile``.
        before: undoes what ``call`` changed; run ahead of each call here.
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
    """Something to time.

    Attributes:
        phase: ``"decode"`` or ``"prefill"``.
        batch: B.
        tokens: tokens a sequence that one call reads.
        calls: calls in :meth:`turn`.
        cache_bytes: bytes of keys and values that a call reads.
    """

    phase: str
    batch: int
    tokens: int
    calls: int

    @property
    def cache_bytes(self) -> int: ...  # noqa: D102

    def step(self) -> Tensor:
        """One call, eagerly; returns logits ``[B, V]``."""

    def prepared(self, mode: Mode, backend: str) -> Step:
        """:meth:`step` made fast."""

    def rewind(self) -> None:
        """Back to the state before the first call."""

    def turn(self, step: Step, calls: int | None = None) -> list[Tensor]:
        """``calls`` calls, one after the other; what each returned."""

    def ids(self) -> Tensor:
        """All tokens that are read, ``[B, ...]``."""


class Decoder:
    """A prompt in a static cache, to go on from. See :class:`Work`.

    Args:
        model: a causal language model in evaluation mode.
        ids_BC: int64 ``[B, P + N + 1]``: the prompt, the tokens that the steps read, and one that none reads.
        new_tokens: N.
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
        """Back to the end of the prompt; what steps wrote to the cache is masked, and overwritten in its turn."""
        self.token_B1.copy_(self.stream_BN[:, :1])
        self.index_B1.zero_()
        self.position_B1.fill_(self.length)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    @torch.no_grad()
    def step(self) -> Tensor:
        """One token."""
        return self._call()()

    def _call(self) -> Step:
        state = (self.token_B1, self.index_B1, self.position_B1, self.chosen_B1, self.stream_BN)
        return functools.partial(_step, self.model, self.cache, *state)

    @torch.no_grad()
    def prepared(self, mode: Mode, backend: str) -> Step:
        """:meth:`step` made fast; rewinds."""
        step: Step = prepare(self._call(), mode, backend, self.rewind)
        self.rewind()
        return step

    def turn(self, step: Step, calls: int | None = None) -> list[Tensor]:
        """Decode; rewind first, or there may be no room."""
        return [step() for _ in range(self.calls if calls is None else calls)]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values: attention over a static cache reads those to come too."""
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in self.cache.layers)

    def ids(self) -> Tensor:
        """``[B, P + N]``."""
        return self._ids_BC[:, :-1]


class Prefill:
    """A prompt read at once, without a cache. See :class:`Work`."""

    phase = "prefill"
    calls = 1
    cache_bytes = 0

    def __init__(self, model: Any, ids_BP: Tensor) -> None:
        self.model, self._ids_BP = model, ids_BP
        self.batch, self.tokens = ids_BP.shape

    @torch.no_grad()
    def step(self) -> Tensor:
        """The whole prompt."""
        return read_prompt(self.model, self._ids_BP, None)

    @torch.no_grad()
    def prepared(self, mode: Mode, backend: str) -> Step:
        """:meth:`step` made fast."""
        step: Step = prepare(functools.partial(read_prompt, self.model, self._ids_BP, None), mode, backend, self.rewind)
        return step

    def rewind(self) -> None:
        """Nothing to do."""

    def turn(self, step: Step, calls: int | None = None) -> list[Tensor]:
        """Read it ``calls`` times."""
        return [step() for _ in range(calls or 1)]

    def ids(self) -> Tensor:
        """``[B, P]``."""
        return self._ids_BP


@torch.no_grad()
def logits_of(work: Work, step: Step, calls: int) -> Tensor:
    """Logits ``[calls * B, V]`` of the first calls, float32; rewinds before and afterwards."""
    work.rewind()
    # Cloned one by one: a recorded graph returns the same memory each time.
    rows = [work.turn(step, 1)[0].float().clone() for _ in range(min(calls, work.calls))]
    work.rewind()
    return torch.cat(rows)


def read_prompt(model: Any, ids_BP: Tensor, cache: Any) -> Tensor:
    """Read tokens into an empty cache (or none); logits ``[B, V]`` of the last position."""
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
    """``argmax(-1)``, ``[B, 1]``, in two steps where V has a divisor: Inductor gives each whole row to one program."""
    B, V = logits_BV.shape
    parts = max(n for n in range(1, MOST_PARTS + 1) if V % n == 0)
    best_BP, place_BP = logits_BV.view(B, parts, -1).max(-1)
    part_B1 = best_BP.argmax(-1, keepdim=True)
    return part_B1 * (V // parts) + place_BP.gather(1, part_B1)
