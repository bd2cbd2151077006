"""Compiles every kernel launch of a few calls for a GPU that need not be there: ``python compile_kernels.py cuda:90``.

Triton's driver is replaced by one that only names the target; launches become compilations. Prints a
JSON object of kernels and numbers of variants.
"""

from __future__ import annotations

import contextlib
import json
import sys
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from torch_prunepath.weights import FFNWeights, Selector, Thresholds


class NamedTarget:
    """A driver without a device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def target_of(name: str) -> GPUTarget:
    backend, arch = name.split(":")
    return GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)


def calls(ffn):  # type: ignore[no-untyped-def]
    """Calls that reach every kernel: one, few and many tokens, gated or plain, odd sizes, each dtype."""
    for tokens, dtype, hidden, width, size, gated, activation, offset, rule in [
        (1, torch.bfloat16, 3584, 18944, 32, True, "silu", None, "reach"),
        (1, torch.float32, 50, 101, 12, False, "gelu", 0.5, "below"),
        (1, torch.float16, 1024, 4096, 8, False, "gelu_tanh", None, "reach"),
        (4, torch.bfloat16, 1024, 4096, 32, True, "quick_gelu", 0.5, "reach"),
        (16, torch.float16, 576, 1536, 8, False, "relu2", None, "below"),
        (5, torch.float32, 50, 101, 12, True, "relu", None, "reach"),
        (100, torch.bfloat16, 64, 100, 8, True, "silu", 0.5, "reach"),
    ]:
        experts = -(-width // size)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype)

        x, mask = empty(tokens, hidden), torch.ones(tokens, experts, dtype=torch.bool)
        up, gate = (empty(width, hidden), empty(width)), (empty(width, hidden), empty(width))
        gate = gate if gated else (None, None)
        down = empty(width, hidden), empty(hidden)
        router = empty(experts, hidden), empty(experts)
        weights, tau = FFNWeights(*up, *gate, *down), torch.tensor(0.5)
        thresholds = Thresholds.of(tau, torch.ones(hidden), tau, torch.ones(width))
        for router_norm, shared in ((False, 0), (True, 0), (False, 2)):
            selector = Selector(*router, tau, rule, offset, router_norm, shared)
            ffn.sparse_ffn(x, selector, weights, activation, size)
            ffn.sparse_ffn(x, selector, weights, activation, size, thresholds)
        ffn.expert_up(x, mask, weights.up_part, activation, size, thresholds.inputs)
        ffn.expert_down(empty(tokens, width), mask, None, *down, size, thresholds.neurons)
        ffn.expert_up(x, mask, weights.up_part, activation, size)
        ffn.expert_down(empty(tokens, width), mask, None, *down, size)
        if tokens == 1:
            rows = up[0].t()
            ffn.linears(x, [rows, rows], [None, up[1]])
            ffn.linears(x, [rows], [None])


def divergences(divergence):  # type: ignore[no-untyped-def]
    for dtype, tokens, vocabulary in [(torch.bfloat16, 5, 49152), (torch.float16, 3, 101), (torch.float32, 1, 5000)]:
        logits, share = torch.empty(tokens, vocabulary, dtype=dtype), torch.empty(tokens)
        for gradient in (True, False):
            divergence(logits, logits, share, 2.0, gradient)
        divergence(logits[:, ::2], logits[:, ::2], share, 1.0, True)


def compile_all(target: GPUTarget) -> dict[str, int]:
    """Kernels by name, and how many variants of each were compiled."""
    from torch_prunepath.csrc_triton import divergence, down, ffn, linear, order, rank, router, select, up

    variants: dict[str, set[str]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):  # type: ignore[no-untyped-def]
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        variants.setdefault(self.__name__, set()).add(kernel.hash)

    triton.runtime.driver.set_active(NamedTarget(target))
    overlap = target.backend == "cuda" and target.arch >= 90
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for module in (down, linear, order, rank, router, select, up):
            stack.enter_context(mock.patch.object(module, "overlaps", lambda tensor: overlap))
            options = {"launch_pdl": True} if overlap else {}
            stack.enter_context(mock.patch.object(module, "launch_options", lambda tensor, o=options: o))
        calls(ffn)
        divergences(divergence.divergence)
    return {name: len(hashes) for name, hashes in variants.items()}


if __name__ == "__main__":
    print(json.dumps(compile_all(target_of(sys.argv[1]))))
