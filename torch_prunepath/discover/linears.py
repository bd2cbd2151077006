"""Linear layers of a model: their sizes, and which of them can be part of a sparse feed-forward network (FFN).

Shapes: D hidden size, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_prunepath.layer.ffn import is_transposed

_PACKAGE = __name__.partition(".")[0]
"""Name of this package."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that can be made sparse."""


@dataclass(frozen=True)
class LinearAt:
    """A linear layer ``[in_size] -> [out_size]`` and its qualified name."""

    name: str
    module: nn.Module
    in_size: int
    out_size: int


def fits(up: LinearAt, down: LinearAt) -> bool:
    """Whether two layers have the sizes of an FFN: ``[D] -> [F]`` (``[D] -> [2F]`` if fused) and ``[F] -> [D]``."""
    return up is not down and down.out_size == up.in_size and up.out_size in (down.in_size, 2 * down.in_size)


def common_ancestor(*names: str) -> str:
    """Return the qualified name of the lowest module above all ``names``; "" is the root."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def lies_in(name: str, module: str) -> bool:
    """Whether ``name`` is the qualified name of ``module`` or of a module inside it."""
    return not module or name == module or name.startswith(f"{module}.")


def relative(name: str, owner: str) -> str:
    """Return ``name`` relative to the module ``owner`` above it."""
    return name.removeprefix(f"{owner}.") if owner else name


def comes_from_here(module: nn.Module) -> bool:
    """Whether the class of ``module``, or a class that it derives from, comes from this package."""
    return any(cls.__module__.partition(".")[0] == _PACKAGE for cls in type(module).__mro__)


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """Return the input and output features of a linear layer, also of a quantised one; None for any other module."""
    if is_transposed(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(type(size) is int for size in sizes):
        return None
    wraps = not isinstance(module, nn.Linear) and any(sizes_of(part) for part in module.children())
    return None if wraps else sizes  # type: ignore[return-value]


def problem_of(module: nn.Module) -> str | None:
    """Return the reason why a module that has :func:`sizes_of` cannot be part of a sparse FFN, or None if it can.

    It can if its weight is an ordinary floating point parameter that may be permuted in place, and if it computes
    ``x W^T + b`` and nothing else.
    """
    if comes_from_here(module):
        return "is sparse already"
    kind = type(module).__name__
    weight = module._parameters.get("weight")
    if weight is None:
        pruned = any(name.endswith("_orig") for name in module._parameters)
        hint = ", call torch.nn.utils.prune.remove on what was pruned" if pruned else ""
        return f"is a {kind} without a weight parameter: quantised or computed weights do not do{hint}"
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
        return f"is a {kind} with a {type(weight).__name__} of {weight.dtype}: quantised or sharded weights do not do"
    if not (isinstance(module, nn.Linear) or is_transposed(module)) or set(module._parameters) != {"weight", "bias"}:
        return f"is a {kind}, not a plain nn.Linear or Conv1D"
    if "forward" in vars(module):
        return "has a forward that was replaced on the instance, so that a converted class would not run"
    if type(module).forward is not nn.Linear.forward and not _computes_linear(module):
        return f"is a {kind} that computes something else than x W^T + b"
    return None


def _computes_linear(module: nn.Module) -> bool:
    """Whether a linear layer that has its own ``forward`` computes ``x W^T + b``, tried with small weights."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    x, weight, bias = random(2, 4, 5), random(3, 5), random(3)
    has_bias = module._parameters["bias"] is not None
    transposed = is_transposed(module)
    small = object.__new__(type(module))
    vars(small).update(vars(module), training=False)
    vars(small).update({"nf": 3, "nx": 5} if transposed else {"in_features": 5, "out_features": 3})
    vars(small)["_parameters"] = {
        "weight": nn.Parameter(weight.t() if transposed else weight),
        "bias": nn.Parameter(bias) if has_bias else None,
    }
    want = x @ weight.t() + (bias if has_bias else 0)
    try:
        got = type(module).forward(small, x)
    except Exception:  # it needs something that a linear layer does not have
        return False
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want)
