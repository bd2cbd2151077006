"""Microseconds of a sparse FFN on the CPU against torch's dense one, router included, once their results agree.

    python benchmarks/cpu_rows.py --geometry llama-3.2-1b --expert-size 32 --dtype float32 bfloat16 --batch 1
    python benchmarks/cpu_rows.py --geometry smollm2-135m --expert-size 8 --batch 1 2 4 16 --sparsity 0.5 0.8
    python benchmarks/cpu_rows.py --geometry llama-3.2-1b --batch 4 --sparsity 0.5 0.8 --parts

Weights are random, the same in every layer; routers are random, another in every layer, and tau is set for each so
that the mean sparsity over the tokens is the one asked for. Layers take turns, so that no cache holds the next one's
weights. Dense is ``linear(silu(linear(x, gate)) * linear(x, up), down)`` with ordinary weights ``[out, in]``. Dense and
sparse take turns as well; the table shows medians, minima in brackets. "operators" runs the four operators of the
eager path in place of the whole one. ``--parts`` shows where gathering rows breaks even: one projection each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath import cpu_rows, ops
from torch_prunepath.config import num_experts
from torch_prunepath.fused import sparse_ffn
from torch_prunepath.report import machine
from torch_prunepath.select import mask_from_scores

GEOMETRIES = {  # D, F
    "smollm2-135m": (576, 1536),
    "qwen2-0.5b": (896, 4864),
    "llama-3.2-1b": (2048, 8192),
    "qwen2-7b": (3584, 18944),
    "llama-3-8b": (4096, 14336),
}
Call = Callable[[], Tensor]


@dataclass
class Layer:
    """Weights of one gated FFN: rows, and the down-projection once more as torch's dense layer has it."""

    up_FD: Tensor
    gate_FD: Tensor
    down_FD: Tensor
    down_DF: Tensor
    router_ED: Tensor
    tau: Tensor
    mask_TE: Tensor

    def dense(self, x_TD: Tensor) -> Tensor:
        return nnf.linear(nnf.silu(nnf.linear(x_TD, self.gate_FD)) * nnf.linear(x_TD, self.up_FD), self.down_DF)

    def sparse(self, x_TD: Tensor, size: int) -> Tensor:
        weights = self.up_FD, None, self.gate_FD, None, self.down_FD, None
        return sparse_ffn(x_TD, self.router_ED, None, self.tau, "reach", None, *weights, "silu", size)

    def operators(self, x_TD: Tensor, size: int) -> Tensor:
        mask_TE = ops.select_experts(ops.router_scores(x_TD, self.router_ED, None), self.tau, "reach")
        h_TF = ops.expert_up(x_TD, mask_TE, self.up_FD, None, self.gate_FD, None, "silu", size)
        return ops.expert_down(h_TF, mask_TE, None, self.down_FD, None, size)

    def check(self, x_TD: Tensor, size: int) -> None:
        """Ends the run if the sparse FFN is not the masked dense one."""
        h_TF = nnf.silu(nnf.linear(x_TD, self.gate_FD)) * nnf.linear(x_TD, self.up_FD)
        expected = nnf.linear(ops.zero_inactive(h_TF, self.mask_TE, size), self.down_DF).double()
        for found in (self.sparse(x_TD, size), self.operators(x_TD, size)):
            error = float((found.double() - expected).norm() / expected.norm())
            if not error < (2e-2 if x_TD.element_size() == 2 else 1e-5):
                raise SystemExit(f"wrong: relative error {error:.2g} against the masked dense FFN")


def build(geometry: str, size: int, dtype: torch.dtype, total_bytes: float) -> list[Layer]:
    """As many layers as ``total_bytes`` hold, at least two; tau is 1."""
    D, F = GEOMETRIES[geometry]
    first = [torch.randn(F, D).mul_(D**-0.5).to(dtype) for _ in range(3)]
    layers = []
    for _ in range(max(2, int(total_bytes / (3 * F * D * dtype.itemsize)))):
        up, gate, down = (w.clone() for w in first)
        router = (torch.randn(num_experts(F, size), D) * 3 / D**0.5).to(dtype)
        everything = torch.ones(1, len(router), dtype=torch.bool)
        layers.append(Layer(up, gate, down, down.t().contiguous(), router, torch.tensor(1.0), everything))
    return layers


def set_sparsity(layers: list[Layer], x_TD: Tensor, sparsity: float) -> float:
    """Sets tau of every layer; returns the mean sparsity that came out."""
    for layer in layers:
        scores_TE = ops.router_scores(x_TD, layer.router_ED, None)
        through_TE = scores_TE.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
        active = max(1, round((1 - sparsity) * scores_TE.shape[1]))
        middle = through_TE[:, [active - 1]] if active == 1 else through_TE[:, active - 2 : active].mean(-1)
        layer.tau = middle.median() if sparsity > 0 else torch.tensor(1.0)
        layer.mask_TE = mask_from_scores(scores_TE, layer.tau, "reach")
    return 1 - statistics.mean(float(layer.mask_TE.float().mean()) for layer in layers)


def time_all(series: list[list[Call]], seconds: float) -> list[tuple[float, float]]:
    """(median, minimum) in microseconds of every series of calls, in turns."""
    for calls in series:
        calls[0]()
    times: list[list[float]] = [[] for _ in series]
    end = time.perf_counter() + seconds * len(series)
    while time.perf_counter() < end:
        for calls, found in zip(series, times, strict=True):
            for call in calls:
                start = time.perf_counter()
                call()
                found.append(1e6 * (time.perf_counter() - start))
    return [(statistics.median(found), min(found)) for found in times]


def whole(layers: list[Layer], x_TD: Tensor, size: int, sparsity: float, seconds: float) -> str:
    found = set_sparsity(layers, x_TD, sparsity)
    layers[0].check(x_TD, size)
    dense, sparse, operators = time_all(
        [
            [lambda c=c: c.dense(x_TD) for c in layers],  # type: ignore[misc]
            [lambda c=c: c.sparse(x_TD, size) for c in layers],  # type: ignore[misc]
            [lambda c=c: c.operators(x_TD, size) for c in layers],  # type: ignore[misc]
        ],
        seconds,
    )
    ratios = f"{dense[0] / sparse[0]:.2f}x ({dense[1] / sparse[1]:.2f}x)"
    cells = [f"{a:.0f} ({b:.0f})" for a, b in (dense, sparse, operators)]
    return " | ".join([f"{found:.0%}", *cells, ratios])


def parts(layers: list[Layer], x_TD: Tensor, size: int, sparsity: float, seconds: float) -> str:
    """One projection each, whatever the library would choose."""
    found = set_sparsity(layers, x_TD, sparsity)
    pairs = [cpu_rows.find_pairs(c.mask_TE, size, c.up_FD) for c in layers]
    h_TF = nnf.linear(x_TD, layers[0].up_FD)
    both = list(zip(layers, pairs, strict=True))
    up, dot, down, total = time_all(
        [
            [lambda c=c: nnf.linear(x_TD, c.up_FD) for c in layers],  # type: ignore[misc]
            [lambda c=c, p=p: cpu_rows.dot_rows(x_TD, p, c.up_FD, None) for c, p in both],  # type: ignore[misc]
            [lambda c=c: nnf.linear(h_TF, c.down_FD.t()) for c in layers],  # type: ignore[misc]
            [lambda c=c, p=p: cpu_rows.sum_rows(cpu_rows.take_pairs(h_TF, p), p, c.down_FD, None) for c, p in both],  # type: ignore[misc]
        ],
        seconds,
    )
    share = f"{len(pairs[0].rows_P) / len(layers[0].up_FD):.2f}"
    return " | ".join([f"{found:.0%}", share, *(f"{a:.0f} ({b:.0f})" for a, b in (up, dot, down, total))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=["llama-3.2-1b"])
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.8, 0.9])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each cell")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of weights that take turns")
    parser.add_argument("--parts", action="store_true", help="one projection each, in place of the whole FFN")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{machine()}, {torch.get_num_threads()} threads")
    columns = (
        ["P / F", "up", "dot_rows", "down", "sum_rows"] if args.parts else ["dense", "sparse", "operators", "ratio"]
    )
    print(" | ".join(["geometry", "dtype", "S", "T", "sparsity", *columns]))
    measure = parts if args.parts else whole
    for geometry in args.geometry:
        for name in args.dtype:
            layers = build(geometry, args.expert_size, getattr(torch, name), args.gigabytes * 1e9)
            for batch in args.batch:
                x_TD = torch.randn(batch, GEOMETRIES[geometry][0]).to(getattr(torch, name))
                for sparsity in args.sparsity:
                    row = measure(layers, x_TD, args.expert_size, sparsity, args.seconds)
                    print(f"{geometry} | {name} | {args.expert_size} | {batch} | {row}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
