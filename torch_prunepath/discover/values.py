"""The values that run through a module on stand-ins: known numbers, and unknown ones.

Shapes: the numbers are ``[..., features]``; an unknown value claims to be ``[2, T, D]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CASTS = frozenset(["to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"])
"""Names of casts, which leave the numbers as they are."""

_RANDOM = frozenset(["bernoulli", "exponential", "multinomial", "normal", "rand_like", "randn_like", "uniform"])
"""Names of operations, without a trailing underscore, that draw random numbers."""

_FACTS = frozenset(["size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point"])
"""Names of methods whose results are true of an opaque value too, such as its size."""

_CHOICES = frozenset(
    [
        "softmax",
        "gumbel_softmax",
        "topk",
        "argmax",
        "max",
        "sort",
        "argsort",
        "multinomial",
        "one_hot",
        "gt",
        "ge",
        "lt",
    ]
)
"""Names of operations by which a router turns scores into a choice."""

_NOT_IN_PLACE = frozenset(["__index__", "__int__", "__invert__", "__iter__"])
"""Names that begin with ``__i`` as in-place operators do, but are none."""

_UNPACK_LENGTHS = (2, 3, 1, 4, 5, 6, 7, 8)
"""Numbers of values that an unpacked opaque value may hold, in the order in which they are tried. The order, and the
end at 8, are guesses."""


class Refused(Exception):
    """Error for a module that is not a feed-forward network as which it was tried.

    Args:
        reason: the reason, for users.
        rank: how far the trial came. Of several refusals of one module, the one with the highest rank is reported.
    """

    def __init__(self, reason: str, rank: int = 1) -> None:
        super().__init__(reason)
        self.reason = reason
        self.rank = rank


def leaves(value: Any) -> Iterator[Any]:
    """Yield the values inside nested tuples, lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


class _Traced(Tensor):
    """A tensor whose operations are checked before they run."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        unknown = [tensor for tensor in tensors if isinstance(tensor, Opaque)]
        # What was computed from a followed value and from others comes from the followed one, too.
        opaque = next((tensor for tensor in unknown if isinstance(tensor, Followed)), unknown[0] if unknown else None)
        name = func.__name__
        if not any(isinstance(tensor, Probe) for tensor in tensors):
            assert opaque is not None
            if name in _FACTS or name == "__get__":
                fact = super().__torch_function__(func, types, args, kwargs)
                fact = torch.device("cpu") if isinstance(fact, torch.device) else fact
                return opaque if isinstance(fact, Tensor) else fact
            if isinstance(opaque, Followed) and name.strip("_") in _CHOICES:
                opaque.choices.append(name.strip("_"))
                return opaque.other
            return opaque
        if name in _CASTS and isinstance(args[0], Probe):
            return args[0]
        _check_probe_operation(name, args, kwargs, opaque is not None)
        return super().__torch_function__(func, types, args, kwargs)


class Probe(_Traced):
    """Numbers that a watched module returned, or that were computed from such numbers."""


class Opaque(_Traced):
    """An unknown value: every operation on it returns it again."""

    unpacks: Unpacks

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Tensor]:
        return iter([self] * self.unpacks.next())

    def __index__(self) -> int:
        return 0

    __int__ = __index__

    def __float__(self) -> float:
        return 0.0

    def __add__(self, other: Any) -> Tensor:
        return self if isinstance(other, tuple | list) else super().__add__(other)

    def __radd__(self, other: Any) -> Tensor:
        """Stand for the concatenation of a tuple or list and this value, an output of another module."""
        return self if isinstance(other, tuple | list) else super().__radd__(other)

    @property
    def indices(self) -> Tensor:  # type: ignore[override]
        """Stand for a field of what ``topk``, ``sort`` and ``max`` return; a tensor has a method of this name."""
        return self

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Stand for the other field."""
        return self

    def __getattr__(self, name: str) -> Tensor:
        """Stand for any field of another module's output, such as ``last_hidden_state``."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self


class Followed(Opaque):
    """An unknown value that one watched module returned, or that was computed from what it returned.

    Attributes:
        other: the unknown value that does not come from there; what is chosen by a followed value is such a one.
        choices: names of the operations that chose by it.
    """

    other: Opaque
    choices: list[str]


class CalledDropouts(TorchFunctionMode):
    """Lets each dropout that is a call, in training, multiply its input by a factor of its own while it is active.

    Attributes:
        shares: the share of values that a dropout leaves out, by its factor, in the order of the calls.
    """

    def __init__(self, factors: Sequence[float]) -> None:
        super().__init__()
        self._factors = factors
        self.shares: dict[float, float] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, or the stand-in for a dropout."""
        kwargs = kwargs or {}
        if func.__name__ != "dropout" or not isinstance(args[0], Probe) or kwargs.get("inplace"):
            return func(*args, **kwargs)
        share, active = _dropout_of(args, kwargs)
        if not active or share == 0 or len(self.shares) == len(self._factors):
            return func(*args, **kwargs)
        factor = self._factors[len(self.shares)]
        self.shares[factor] = float(share)
        return args[0] * factor


def _dropout_of(args: tuple, kwargs: dict) -> tuple[float, bool]:
    """Return the share that a dropout leaves out, and whether it is active; torch names its parameters in two ways."""
    share = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return share, kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))


def refuse_called_dropout(share: float) -> Refused:
    """Make the refusal of a dropout that cannot be kept."""
    return Refused(
        f"a hidden value passes through a dropout of {share} that is a call, not an nn.Dropout: set it to 0 in the "
        "model's config before the model is built"
    )


def _check_probe_operation(name: str, args: tuple, kwargs: dict, meets_opaque: bool) -> None:
    """Raise :class:`Refused` if an FFN does not use the operation on its hidden values."""
    if meets_opaque:
        raise Refused(f"a hidden value meets a value of other origin ({name.strip('_')})")
    if name.rstrip("_") in _RANDOM:
        raise Refused(f"a hidden value meets random numbers ({name.strip('_')})")
    in_place = name == "__setitem__" or (name.startswith("__i") and name not in _NOT_IN_PLACE) or "out" in kwargs
    if (in_place or (name.endswith("_") and not name.endswith("__"))) and not isinstance(args[0], Probe):
        raise Refused(f"a hidden value is written into another tensor ({name.strip('_')})")
    if "dropout" in name:
        share, active = _dropout_of(args, kwargs)
        if active and share > 0:
            raise refuse_called_dropout(share)


class Unpacks:
    """Guesses of how many values each unpacked opaque value holds, in the order in which a run unpacks them."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._at = 0

    def restart(self) -> None:
        """Begin a new run with the same guesses."""
        self._at = 0

    def next(self) -> int:
        """Return the guess for the next value that is unpacked."""
        if self._at == len(self._lengths):
            self._lengths.append(_UNPACK_LENGTHS[0])
        self._at += 1
        return self._lengths[self._at - 1]

    def guess_again(self) -> bool:
        """Change the last guess, which did not fit; return False if every length was tried."""
        del self._lengths[self._at :]
        if not self._lengths or self._lengths[-1] == _UNPACK_LENGTHS[-1]:
            return False
        self._lengths[-1] = _UNPACK_LENGTHS[_UNPACK_LENGTHS.index(self._lengths[-1]) + 1]
        return True
