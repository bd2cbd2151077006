"""Device functions that several kernels share, and what a launch needs to know of its device."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _overlaps(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (9, 0)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """Number of multiprocessors of the tensor's device; 2 in the interpreter, which runs programs in turn."""
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else 2


def overlaps(tensor: Tensor) -> bool:
    """Whether the tensor's device can start a kernel while its predecessor ends (programmatic dependent launch)."""
    return tensor.is_cuda and _overlaps(tensor.device.index)


def launch_options(tensor: Tensor) -> dict[str, bool]:
    """Options of a launch that may overlap with its predecessor's end."""
    return {"launch_pdl": True} if overlaps(tensor) else {}


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


@contextlib.contextmanager
def beside(tensor: Tensor) -> Iterator[Callable[[], None]]:
    """Let the block run beside what follows it, on a stream of its own; call what this yields before using results.

    Memory that the block allocates is safe to reuse: the next such block waits for all that was launched before it.
    """
    if not tensor.is_cuda:
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(tensor.device), _side_stream(tensor.device.index)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """First statement of every kernel: wait for the predecessor's results, then let the successor's programs start.

    In this order, because a kernel may then rely on all its ancestors, not on its predecessor alone.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def inverse_rms(squares, D, EPSILON: tl.constexpr):
    """One over a token's root mean square, from its sum of squares: ``torch_prunepath.rms.inverse_rms``."""
    return 1.0 / tl.sqrt(squares / D + EPSILON)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation function of ``torch_prunepath.activations``, in float32; ``"none"`` gives x."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    if ACTIVATION == "relu2":
        return tl.where(x < 0, 0.0, x * x)
    if ACTIVATION == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    return x
