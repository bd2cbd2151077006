"""Trying a module as a feed-forward network (FFN), to find the role of each linear layer and the activation function.

Shapes: N probed tokens, D hidden size, F neurons.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.config import FFNSpec
from torch_prunepath.discover.linears import LinearAt, common_ancestor, fits, relative
from torch_prunepath.discover.stand_ins import Trace, inputs_of, trace
from torch_prunepath.discover.values import Opaque, Probe, Refused, leaves, refuse_called_dropout

_MARKERS = (3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0, 23.0)
"""Factors by which the ``nn.Dropout`` modules of a module multiply. They are different primes, so a value tells through
which dropout it went."""

_CALLED = (29.0, 31.0, 37.0, 41.0)
"""Factors by which the dropouts that are calls multiply in training: more primes."""

_TOLERANCE = 1e-5
"""Largest relative or absolute difference between equal values. gelu and its tanh form differ by up to 4.7e-4; an
activation function that is written with rounded constants differs by less than 1e-7."""


@dataclass(frozen=True)
class _Formula:
    """The input of ``down`` as ``scale * act(gate) * up``; ``gate`` is an index into the first layers."""

    activation: str
    scale: float
    gate: int | None = None
    fused: Literal["gate_up", "up_gate"] | None = None


def _matches(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=_TOLERANCE, atol=_TOLERANCE)


def _activation_of(
    hidden_NF: Tensor, gate_NF: Tensor, up_NF: Tensor | None, scales: Sequence[float]
) -> tuple[str, float] | None:
    """Find the activation's name and the scale with which ``scale * act(gate) * up`` is ``hidden``, or None."""

    def product(act: Callable[[Tensor], Tensor], columns: slice) -> Tensor:
        value = act(gate_NF[:, columns])
        return value if up_NF is None else value * up_NF[:, columns]

    few = slice(0, 64)
    for name, act in ACTIVATIONS.items():
        start = product(act, few)
        for scale in scales:
            if _matches(hidden_NF[:, few], scale * start) and _matches(hidden_NF, scale * product(act, slice(None))):
                return name, scale
    return None


def _formula_of(hidden: Tensor, size: int, given: Sequence[Tensor], scales: Sequence[float]) -> _Formula | None:
    """Find how ``hidden`` ``[..., F]`` is computed from the outputs of one or two first layers, or None."""
    if hidden.shape[-1] != size:
        return None
    hidden_NF = hidden.reshape(-1, size)
    parts = [part for values in given for part in values.reshape(-1, values.shape[-1]).split(size, dim=-1)]
    if len(parts) > 2 or any(part.shape != hidden_NF.shape for part in parts):
        return None
    if len(parts) == 1:
        found = _activation_of(hidden_NF, parts[0], None, scales)
        return None if found is None else _Formula(*found)
    for gate in (0, 1):
        found = _activation_of(hidden_NF, parts[gate], parts[1 - gate], scales)
        if found is not None and len(given) == 2:
            return _Formula(*found, gate=gate)
        if found is not None:
            return _Formula(*found, fused="gate_up" if gate == 0 else "up_gate")
    return None


def _unknown(down: str, record: Trace) -> Refused:
    passed = f", having passed {', '.join(dict.fromkeys(record.passed))}" if record.passed else ""
    known = ", ".join(ACTIVATIONS)
    reason = f"what reaches {down} is neither act(up) nor act(gate) * up with act one of {known}{passed}"
    return Refused(reason, rank=2)


class Trials:
    """Tries modules as FFNs. It keeps the numbers that their layers return, which depend on sizes only."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, int, int], Tensor] = {}

    def _numbers(self, tokens: int, features: int, seed: int) -> Tensor:
        """Draw numbers, float64 ``[2, tokens, features]``: a quarter within 4 of 0, some up to 1000 to show clamps."""
        key = (tokens, features, seed)
        if key not in self._values:
            generator = torch.Generator(device="cpu").manual_seed(seed)
            uniform = torch.rand(2, tokens, features, generator=generator, dtype=torch.float64, device="cpu")
            self._values[key] = torch.sinh((2 * uniform - 1) * math.asinh(1000.0))
        return self._values[key]

    def whole(self, name: str, owner: nn.Module, layers: Sequence[LinearAt]) -> FFNSpec:
        """Try ``owner.forward(x)`` as an FFN of exactly these layers, which are all its linear layers.

        Raises:
            Refused: if it is not such an FFN.
        """
        if "forward" in vars(owner):
            raise Refused("forward was wrapped on the instance, so that a converted class would not be run", rank=2)
        required, optional = inputs_of(owner)
        if len(required) != 1 or optional:
            raise Refused(f"forward takes more than one input ({', '.join(required + optional)})", rank=0)
        refusals = []
        for size in dict.fromkeys(up.in_size for up in layers for down in layers if fits(up, down)):
            try:
                spec = self._whole(name, owner, layers, size, training=False)
                return self._same_in_training(spec, owner, layers)
            except Refused as refusal:
                refusals.append(refusal)
        raise max(refusals, key=lambda refusal: refusal.rank)

    def _same_in_training(self, spec: FFNSpec, owner: nn.Module, layers: Sequence[LinearAt]) -> FFNSpec:
        try:
            in_training = self._whole(spec.name, owner, layers, spec.hidden_size, training=True)
        except Refused as refusal:
            raise Refused(f"in training, {refusal.reason}", rank=2) from None
        # A dropout that is a call does nothing in evaluation, so that only training shows it.
        share = in_training.output_dropout
        called = isinstance(share, float) and spec.output_dropout is None
        if isinstance(share, float) and not spec.gated:
            # Made sparse layer by layer, it keeps the model's own call, and old checkpoints have it so.
            raise refuse_called_dropout(share)
        if (dataclasses.replace(in_training, output_dropout=None) if called else in_training) != spec:
            raise Refused("forward computes something else in training", rank=2)
        return in_training

    def _whole(self, name: str, owner: nn.Module, layers: Sequence[LinearAt], size: int, *, training: bool) -> FFNSpec:
        tokens = self._tokens(layers)
        x = self._numbers(tokens, size, 0)
        given = {
            layer.module: self._numbers(tokens, layer.out_size, seed) for seed, layer in enumerate(layers, start=1)
        }
        dropouts: list[nn.Module] = [module for module in owner.modules() if isinstance(module, nn.Dropout)]
        if len(dropouts) > len(_MARKERS):
            raise Refused(f"holds {len(dropouts)} dropouts")
        markers = dict(zip(dropouts, _MARKERS, strict=False))
        called = _CALLED if training else ()
        record = trace(owner, given, (2, tokens, size), x=x, training=training, markers=markers, called=called)

        if any(len(record.calls.get(layer.module, ())) != 1 for layer in layers):
            raise Refused("forward does not call each of its linear layers once")
        first = [layer for layer in layers if torch.equal(record.calls[layer.module][0], x)]
        last = [layer for layer in layers if layer not in first]
        if len(last) != 1 or not all(fits(layer, last[0]) for layer in first):
            raise Refused(
                "its input does not go straight to its first linear layers, and through them to one last layer"
            )
        down = last[0]
        if first[0].in_size != size:
            raise Refused(f"its input has {first[0].in_size} features, not {size}", rank=0)
        scales = (1.0, *markers.values())
        values = [given[layer.module] for layer in first]
        formula = _formula_of(record.calls[down.module][0], down.in_size, values, scales)
        if formula is None and record.called_dropouts:
            raise refuse_called_dropout(next(iter(record.called_dropouts.values())))
        if formula is None:
            raise _unknown(relative(down.name, name), record)
        output_scale = _scale_of(record.result, given[down.module], (*scales, *record.called_dropouts))
        if output_scale is None:
            raise Refused(f"forward does more than the FFN with what {relative(down.name, name)} returns", rank=2)

        names: dict[float, str | float] = {markers[m]: n for n, m in owner.named_modules() if m in markers}
        names |= record.called_dropouts
        up = first[1 - formula.gate] if formula.gate is not None else first[0]
        return FFNSpec(
            name=name,
            up=relative(up.name, name),
            down=relative(down.name, name),
            gate=None if formula.gate is None else relative(first[formula.gate].name, name),
            fused=formula.fused,
            activation=formula.activation,
            hidden_dropout=names.get(formula.scale),  # type: ignore[arg-type]  # a called one is refused above
            output_dropout=names.get(output_scale),
            hidden_size=size,
            ffn_size=down.in_size,
        )

    def split(self, owner: nn.Module, up: LinearAt, downs: Sequence[LinearAt]) -> FFNSpec:
        """Try ``up`` and one of ``downs`` as an FFN somewhere inside ``owner.forward``.

        Raises:
            Refused: if the output of ``up`` does anything but go to one of ``downs`` through a known activation.
        """
        down, formula = self._inside(owner, [up], downs)
        name = common_ancestor(up.name, down.name)
        return FFNSpec(
            name=name,
            up=relative(up.name, name),
            down=relative(down.name, name),
            fused=formula.fused,
            activation=formula.activation,
            hidden_size=up.in_size,
            ffn_size=down.in_size,
            split=True,
        )

    def is_gated(self, owner: nn.Module, ups: Sequence[LinearAt], downs: Sequence[LinearAt]) -> bool:
        """Whether two first layers make a gated FFN with one of ``downs`` somewhere inside ``owner.forward``."""
        try:
            self._inside(owner, ups, downs)
        except Refused:
            return False
        return True

    def _inside(
        self, owner: nn.Module, ups: Sequence[LinearAt], downs: Sequence[LinearAt]
    ) -> tuple[LinearAt, _Formula]:
        """Find the last layer that ``ups`` feed inside ``owner.forward``, and the formula of its input."""
        tokens = self._tokens([*ups, *downs])
        given: dict[nn.Module, Tensor | None] = {down.module: None for down in downs}
        values = [self._numbers(tokens, up.out_size, seed) for seed, up in enumerate(ups, start=1)]
        given.update(zip((up.module for up in ups), values, strict=True))
        record = trace(owner, given, (2, tokens, ups[0].in_size))

        if any(isinstance(leaf, Probe) for leaf in leaves(record.result)):
            raise Refused("a hidden value is returned by forward")
        if any(not isinstance(call, Opaque) for up in ups for call in record.calls.get(up.module, ())):
            raise Refused("its first linear layers feed each other")
        fed = [d for d in downs if any(not isinstance(call, Opaque) for call in record.calls.get(d.module, ()))]
        if len(fed) != 1:
            raise Refused(f"its output goes to {len(fed)} linear layers of the right size, not to one", rank=0)
        calls = record.calls[fed[0].module]
        if any(isinstance(c, Opaque) for c in calls) or any(len(record.calls[up.module]) != len(calls) for up in ups):
            raise Refused(f"{fed[0].name.rpartition('.')[2]} is also called with something else")
        formulas = {_formula_of(call, fed[0].in_size, values, (1.0,)) for call in calls}
        formula = formulas.pop()
        if formula is None or formulas:
            raise _unknown(fed[0].name.rpartition(".")[2], record)
        return fed[0], formula

    @staticmethod
    def _tokens(layers: Sequence[LinearAt]) -> int:
        """Return T such that 2 T F is at least 512, enough numbers to tell activations apart (a guess)."""
        return max(2, math.ceil(256 / min(layer.out_size for layer in layers)))


def _scale_of(result: object, want: Tensor, scales: Sequence[float]) -> float | None:
    """Find the scale with which ``scale * want`` is ``result``, or None."""
    if not isinstance(result, Tensor) or isinstance(result, Opaque) or result.shape != want.shape:
        return None
    return next((scale for scale in scales if _matches(result, scale * want)), None)
