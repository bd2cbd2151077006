"""Running a module's own ``forward`` on stand-ins, to see what it does with the numbers that its linear layers return.

A *shadow* of the module runs: an object of the same class with the same attributes. Its watched submodules return
numbers chosen by the caller. Its weights, its buffers and its other submodules with weights give *opaque* values: they
are unknown, and any operation on them gives another opaque value. So no weight is read, copied or multiplied (it may be
on the meta device, in any dtype), and the module itself stays as it was, without hooks, patches or new attributes.

The price: a ``forward`` that branches on opaque values may take another branch than it would really take, and attention
cannot be followed. The numbers are float64 on the CPU and stay so: casts are ignored.

Shapes: the numbers returned are ``[..., features]``; an opaque value claims to be ``[2, T, D]``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.discover.values import CalledDropouts, Followed, Opaque, Probe, Refused, Unpacks, leaves


def has_forward(module: nn.Module) -> bool:
    """Whether the class of the module defines ``forward``; containers like ``nn.ModuleList`` do not."""
    return type(module).forward is not nn.Module.forward


def inputs_of(module: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the required parameters of ``module.forward``, and those of the optional ones."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in named if p.default is p.empty]
    return required, [p.name for p in named if p.name not in required]


@dataclass
class Trace:
    """The record of a run on stand-ins.

    Attributes:
        calls: inputs of each watched module, call by call, as plain float64 tensors or :class:`Opaque`; modules are in
            the order of their first call.
        result: return value of ``forward``, as a plain tensor if it was a single :class:`Probe`.
        passed: class names of the submodules that probes passed through.
        called_dropouts: shares of the dropouts that are calls and were active in training, by the factor in ``called``
            by which each multiplied.
        choices: names of the operations that chose by the value that is followed.
    """

    calls: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    result: Any = None
    passed: list[str] = field(default_factory=list)
    called_dropouts: dict[float, float] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)


def plain(probe: Tensor) -> Tensor:
    """Copy the numbers into an ordinary tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return probe.as_subclass(Tensor).clone()


class _Shadows:
    """Builds the shadow of a module; running the shadow fills ``trace``."""

    def __init__(
        self,
        trace: Trace,
        watched: Mapping[nn.Module, Tensor | None],
        markers: Mapping[nn.Module, float],
        opaque: Opaque,
        training: bool,
    ) -> None:
        self._trace, self._watched, self._markers = trace, watched, markers
        self._opaque, self._training = opaque, training

    def of(self, module: nn.Module) -> nn.Module:
        """Build a module of the same class, with stand-ins for submodules.

        Raises:
            Refused: if the module's ``forward`` was replaced on the instance.
        """
        own = type(module).forward
        innermost = inspect.unwrap(vars(module).get("forward", own))
        if getattr(innermost, "__func__", innermost) is not inspect.unwrap(own):
            raise Refused(f"the forward of a {type(module).__name__} was replaced on the instance", rank=3)
        children = {n: None if c is None else self._stand_in(n, c) for n, c in module._modules.items()}
        return self._copy(module, children)

    def _copy(
        self, module: nn.Module, children: dict[str, nn.Module | None], forward: Callable | None = None
    ) -> nn.Module:
        state = {k: v.copy() if type(v) in (dict, list, set) else v for k, v in vars(module).items()}
        state.update({k: self._opaque for k, v in state.items() if isinstance(v, Tensor)})
        state.update({k: type(v)() for k, v in state.items() if k.endswith(("_hooks", "_hooks_with_kwargs"))})
        state.pop("forward", None)
        state.pop("_compiled_call_impl", None)
        for tensors in ("_parameters", "_buffers"):
            state[tensors] = {k: None if v is None else self._opaque for k, v in state[tensors].items()}
        state.update(_modules=children, training=self._training)
        if forward is not None:
            state["forward"] = forward
        shadow = object.__new__(type(module))
        vars(shadow).update(state)
        return shadow

    def _stand_in(self, name: str, child: nn.Module) -> nn.Module:
        if child in self._watched:
            return self._copy(child, {}, partial(self._call_watched, child))
        if isinstance(child, nn.Dropout):
            return self._copy(child, {}, partial(self._call_dropout, child))
        if not has_forward(child) or any(module in self._watched for module in child.modules()):
            return self.of(child)
        if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
            return self._copy(child, {}, partial(self._call_opaque, f"{name} ({type(child).__name__})"))
        return self._copy(child, {}, partial(self._call_stateless, self.of(child)))

    def _call_watched(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        x = next(iter((*args, *kwargs.values())))
        known = isinstance(x, Tensor) and not isinstance(x, Opaque)
        self._trace.calls.setdefault(module, []).append(plain(x) if known else x)
        values = self._watched[module]
        if values is None or isinstance(values, Opaque):
            return self._opaque if values is None else values
        if known and x.shape[:-1] != values.shape[:-1]:
            values = values.reshape(*x.shape[:-1], values.shape[-1])
        return values.clone().as_subclass(Probe)

    def _call_dropout(self, module: nn.Module, x: Tensor) -> Tensor:
        return x * self._markers[module] if module in self._markers else x

    def _call_opaque(self, label: str, *args: Any, **kwargs: Any) -> Tensor:
        given = list(leaves((args, kwargs)))
        if any(isinstance(leaf, Probe) for leaf in given):
            raise Refused(f"a hidden value passes through {label}")
        return next((leaf for leaf in given if isinstance(leaf, Followed)), self._opaque)

    def _call_stateless(self, shadow: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = list(leaves((args, kwargs)))
        if any(isinstance(leaf, Opaque) for leaf in given) and not any(isinstance(leaf, Followed) for leaf in given):
            if any(isinstance(leaf, Probe) for leaf in given):
                raise Refused(f"a hidden value meets a value of other origin ({type(shadow).__name__})")
            return self._opaque
        self._trace.passed.append(type(shadow).__name__)
        return type(shadow).forward(shadow, *args, **kwargs)


def trace(
    owner: nn.Module,
    watched: Mapping[nn.Module, Tensor | None],
    shape: tuple[int, ...],
    *,
    x: Tensor | None = None,
    training: bool = False,
    markers: Mapping[nn.Module, float] | None = None,
    called: Sequence[float] = (),
    follow: nn.Module | None = None,
    record: Trace | None = None,
) -> Trace:
    """Run ``owner.forward`` on stand-ins.

    Args:
        owner: the module to run; it is not changed.
        watched: submodules whose inputs are recorded, and the float64 numbers that each returns for any input; with
            None it returns an opaque value.
        shape: shape that opaque values claim to have.
        x: the only input of ``owner.forward``, float64; None makes every input opaque.
        training: value of ``training`` in the shadow and its submodules.
        markers: factor by which each ``nn.Dropout`` multiplies, so that its place can be found; 1 if not given.
        called: factors by which the dropouts that are calls multiply, one for each call; more calls are refused.
        follow: a submodule that returns a :class:`Followed` value.
        record: the record to fill and return; with it, a caller can see how far a refused run came.

    Raises:
        Refused: if the run fails, or does something with the numbers that no feed-forward network does.
    """
    opaque = torch.empty(shape, dtype=torch.float64, device="meta").as_subclass(Opaque)
    opaque.unpacks = Unpacks()
    record = Trace() if record is None else record
    if follow is not None:
        watched = {**watched, follow: _followed(opaque, record)}
    while True:
        opaque.unpacks.restart()
        record.calls.clear()
        record.passed.clear()
        record.choices.clear()
        dropouts = CalledDropouts(called)
        try:
            shadow = _Shadows(record, watched, markers or {}, opaque, training).of(owner)
            required, _ = inputs_of(owner)
            with dropouts if called else contextlib.nullcontext():
                if x is not None:
                    result = shadow.forward(x.clone().as_subclass(Probe))
                elif required:
                    result = shadow.forward(**dict.fromkeys(required, opaque))
                else:
                    result = shadow.forward(opaque)
            record.called_dropouts = dropouts.shares
            record.result = plain(result) if isinstance(result, Probe) else result
            return record
        except Refused:
            raise
        except Exception as error:
            unpacking = isinstance(error, ValueError) and "unpack" in str(error)
            if not (unpacking and opaque.unpacks.guess_again()):
                what = (str(error).strip().splitlines() or [""])[0][:200]
                raise Refused(f"forward cannot be followed ({type(error).__name__}: {what})", rank=0) from error


def _followed(opaque: Opaque, record: Trace) -> Followed:
    followed = torch.empty(opaque.shape, dtype=torch.float64, device="meta").as_subclass(Followed)
    followed.unpacks, followed.other, followed.choices = opaque.unpacks, opaque, record.choices
    return followed
