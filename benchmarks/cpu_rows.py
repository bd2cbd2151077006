"""Microseconds of a sparse FFN on the CPU against torch's dense one, router included, once their results agree.

    python -m benchmarks cpu_rows --geometry llama-3.2-1b --expert-size 32 --dtype float32 bfloat16 --batch 1
    python -m benchmarks cpu_rows --geometry smollm2-135m --expert-size 8 --batch 1 2 4 16 --sparsity 0.5 0.8
    python -m benchmarks cpu_rows --geometry llama-3.2-1b --batch 4 --sparsity 0.5 0.8 --parts projections
    python -m benchmarks cpu_rows --geometry smollm2-135m --expert-size 8 --dtype bfloat16 --batch 4 --parts routing
    python -m benchmarks cpu_rows --published -o benchmarks/results

Weights are random, the same in every layer; routers are random, another in every layer, and tau is set for each so
that the mean sparsity over the tokens is the one asked for. Layers take turns, so that no cache holds the next one's
weights. Dense is ``linear(silu(linear(x, gate)) * linear(x, up), down)`` with ordinary weights ``[out, in]``. Dense and
sparse take turns as well; the table shows medians, minima in brackets. "operators" runs the four operators of the
eager path in place of the whole one. ``--parts projections`` shows where gathering rows breaks even: one projection
each. ``--parts routing`` times scores, selection and masking around dense's products, and the ratio that they leave.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness.options import dispatch, parser_of
from benchmarks.harness.store import replacing
from torch_prunepath.bench.geometry import GEOMETRIES
from torch_prunepath.bench.results import commit
from torch_prunepath.config import num_experts
from torch_prunepath.console.errors import UserError
from torch_prunepath.console.report import machine
from torch_prunepath.ops import operators as ops
from torch_prunepath.ops.cpu import dense as cpu_dense
from torch_prunepath.ops.cpu import ffn as cpu
from torch_prunepath.ops.cpu import rows as cpu_rows
from torch_prunepath.ops.cpu.packs import Packs
from torch_prunepath.ops.experts import zero_inactive
from torch_prunepath.search import tau_of_scores
from torch_prunepath.select import mask_from_scores
from torch_prunepath.weights import FFNWeights, Selector

GATED = tuple(name for name, geometry in GEOMETRIES.items() if not geometry.plain)
Call = Callable[[], Tensor]
Row = dict[str, Any]
Measure = Callable[..., Row]


@dataclass(frozen=True)
class Plan:
    """What to measure of one geometry: every dtype with every batch at every sparsity."""

    geometry: str
    expert_size: int
    dtypes: list[str]
    batches: list[int]
    sparsities: list[float]


@dataclass
class TimedFFN:
    """Weights of one gated FFN: rows, and the down-projection once more as torch's dense layer has it."""

    up_FD: Tensor
    gate_FD: Tensor
    down_FD: Tensor
    down_DF: Tensor
    router_ED: Tensor
    tau: Tensor
    mask_TE: Tensor
    packs: Packs | None = None

    def dense(self, x_TD: Tensor) -> Tensor:
        return nnf.linear(nnf.silu(nnf.linear(x_TD, self.gate_FD)) * nnf.linear(x_TD, self.up_FD), self.down_DF)

    def sparse(self, x_TD: Tensor, size: int) -> Tensor:
        selector = Selector(self.router_ED, None, self.tau, "reach", None)
        weights = FFNWeights(self.up_FD, None, self.gate_FD, None, self.down_FD, None)
        return cpu.sparse_ffn(x_TD, selector, weights, "silu", size, packs=self.packs)

    def operators(self, x_TD: Tensor, size: int) -> Tensor:
        mask_TE = ops.select_experts(ops.router_scores(x_TD, self.router_ED, None), self.tau, "reach")
        h_TF = ops.expert_up(x_TD, mask_TE, self.up_FD, None, self.gate_FD, None, "silu", size)
        return ops.expert_down(h_TF, mask_TE, None, self.down_FD, None, size)

    def check(self, x_TD: Tensor, size: int) -> None:
        """Ends the run if the sparse FFN is not the masked dense one."""
        h_TF = nnf.silu(nnf.linear(x_TD, self.gate_FD)) * nnf.linear(x_TD, self.up_FD)
        expected = nnf.linear(zero_inactive(h_TF, self.mask_TE, size), self.down_DF).double()
        for found in (self.sparse(x_TD, size), self.operators(x_TD, size)):
            error = float((found.double() - expected).norm() / expected.norm())
            if not error < (2e-2 if x_TD.element_size() == 2 else 1e-5):
                raise UserError(f"wrong: relative error {error:.2g} against the masked dense FFN")


def build(geometry: str, size: int, dtype: torch.dtype, total_bytes: float) -> list[TimedFFN]:
    """As many layers as ``total_bytes`` hold, at least two; tau is 1."""
    D, F = GEOMETRIES[geometry].hidden_size, GEOMETRIES[geometry].ffn_size
    first = [torch.randn(F, D).mul_(D**-0.5).to(dtype) for _ in range(3)]
    layers = []
    for _ in range(max(2, int(total_bytes / (3 * F * D * dtype.itemsize)))):
        up, gate, down = (w.clone() for w in first)
        router = (torch.randn(num_experts(F, size), D) * 3 / D**0.5).to(dtype)
        everything = torch.ones(1, len(router), dtype=torch.bool)
        layers.append(TimedFFN(up, gate, down, down.t().contiguous(), router, torch.tensor(1.0), everything))
    return layers


def set_sparsity(layers: list[TimedFFN], x_TD: Tensor, sparsity: float) -> float:
    """Sets tau of every layer; returns the mean sparsity that came out."""
    for layer in layers:
        scores_TE = ops.router_scores(x_TD, layer.router_ED, None)
        layer.tau = torch.tensor(tau_of_scores(scores_TE, sparsity))
        layer.mask_TE = mask_from_scores(scores_TE, layer.tau, "reach")
    return 1 - statistics.mean(float(layer.mask_TE.float().mean()) for layer in layers)


def time_all(series: list[list[Call]], seconds: float) -> list[tuple[float, float]]:
    """(median, minimum) in microseconds of every series of calls, in turns."""
    for calls in series:
        for call in calls * 2:  # the second call of a layer makes its copies
            call()
    times: list[list[float]] = [[] for _ in series]
    end = time.perf_counter() + seconds * len(series)
    while time.perf_counter() < end:
        for calls, found in zip(series, times, strict=True):
            for call in calls:
                start = time.perf_counter()
                call()
                found.append(1e6 * (time.perf_counter() - start))
    return [(statistics.median(found), min(found)) for found in times]


def whole(layers: list[TimedFFN], x_TD: Tensor, size: int, sparsity: float, seconds: float) -> Row:
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
    times = {"dense": dense, "sparse": sparse, "operators": operators}
    return {"sparsity": found, **times, "ratio": (dense[0] / sparse[0], dense[1] / sparse[1])}


def projections(layers: list[TimedFFN], x_TD: Tensor, size: int, sparsity: float, seconds: float) -> Row:
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
    share = len(pairs[0].rows_P) / len(layers[0].up_FD)
    return {"sparsity": found, "P / F": share, "up": up, "dot_rows": dot, "down": down, "sum_rows": total}


def routing(layers: list[TimedFFN], x_TD: Tensor, size: int, sparsity: float, seconds: float) -> Row:
    """Dense's own products with the routing of a sparse call around them, in its order: what that alone costs."""
    found = set_sparsity(layers, x_TD, sparsity)
    names = ["scores", "selection", "hidden", "masking", "down"]
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + len(names) * seconds
    while time.perf_counter() < end:
        for c in layers:
            marks = [time.perf_counter()]
            scores_TE = cpu.router_scores(x_TD, c.router_ED, None, packs=c.packs)
            marks.append(time.perf_counter())
            mask_TE = cpu.select_experts(scores_TE, c.tau, "reach")
            marks.append(time.perf_counter())
            h_TF = nnf.silu(nnf.linear(x_TD, c.gate_FD)) * nnf.linear(x_TD, c.up_FD)
            marks.append(time.perf_counter())
            cpu_dense.mask_(h_TF, mask_TE, size)
            marks.append(time.perf_counter())
            nnf.linear(h_TF, c.down_DF)
            marks.append(time.perf_counter())
            for name, first, last in zip(names, marks, marks[1:], strict=False):
                times[name].append(1e6 * (last - first))
    ends = {name: (statistics.median(values), min(values)) for name, values in times.items()}
    dense = tuple(map(sum, zip(ends.pop("hidden"), ends.pop("down"), strict=True)))
    ratio = tuple(d / (d + sum(parts)) for d, *parts in zip(dense, *ends.values(), strict=True))
    return {"sparsity": found, "dense": dense, **ends, "ratio": ratio}


MEASURES: dict[str, Measure] = {"ffn": whole, "projections": projections, "routing": routing}


def cell(name: str, value: Any) -> str:
    """A median and, in brackets, the minimum of microseconds or of ratios; a share; or a word."""
    if isinstance(value, tuple):
        return "{:.2f}x ({:.2f}x)".format(*value) if name == "ratio" else "{:.0f} ({:.0f})".format(*value)
    return f"{value:.0%}" if isinstance(value, float) else str(value)


def line(row: Row) -> str:
    return f"| {' | '.join(cell(*item) for item in row.items())} |"


def measure(plan: Plan, function: Measure, seconds: float, gigabytes: float, copies: str) -> Iterator[Row]:
    cells = list(itertools.product(plan.batches, plan.sparsities))
    for name in plan.dtypes:
        dtype = getattr(torch, name)
        layers = build(plan.geometry, plan.expert_size, dtype, gigabytes * 1e9)
        for layer in layers:
            layer.packs = {"none": None, "down": Packs(), "all": Packs(every=True)}[copies]
        for batch, sparsity in tqdm(cells, desc=f"{plan.geometry}, {name}", unit="cell", disable=None):
            x_TD = torch.randn(batch, GEOMETRIES[plan.geometry].hidden_size).to(dtype)
            key = {"geometry": plan.geometry, "dtype": name, "S": plan.expert_size, "T": batch}
            yield key | function(layers, x_TD, plan.expert_size, sparsity, seconds)


def published() -> list[Plan]:
    both, many, high = ["float32", "bfloat16"], [2, 4, 8, 16, 64, 512], [0.5, 0.8, 0.9, 0.95]
    sizes = {"smollm2-135m": 8, "llama-3.2-1b": 32, "qwen2-7b": 32, "llama-3-8b": 32}
    plans = [Plan(name, size, both, [1], high) for name, size in sizes.items()]
    return plans + [Plan(name, sizes[name], both, many, [0.5, 0.8]) for name in ("smollm2-135m", "llama-3.2-1b")]


def save(folder: Path, about: Row, rows: list[Row]) -> None:
    """Keep ``cpu-rows.json`` and ``cpu-rows.md``."""
    hardware, versions = about["hardware"], about["versions"]
    lines = [
        "# A sparse FFN on the CPU",
        "",
        "Microseconds of one gated FFN, router included; medians, minima in brackets. S: neurons an expert, T: tokens.",
        "Dense is torch's F.linear (float32: MKL); the sparse path calls oneDNN, which alone may be faster.",
        "",
        f"{hardware['cpu']}, {hardware['threads']} threads; {', '.join(f'{k} {v}' for k, v in versions.items())};",
        f"commit {about['commit']}; `{about['command']}`",
        "",
        *table(rows),
    ]
    for suffix, text in (("json", json.dumps({**about, "rows": rows}, indent=1)), ("md", "\n".join(lines))):
        with replacing(folder / f"cpu-rows.{suffix}") as part:
            part.write_text(text + "\n", encoding="utf-8")


def table(rows: list[Row]) -> list[str]:
    """Markdown: a line a row."""
    return [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}", *map(line, rows)]


@torch.no_grad()  # not inference_mode, whose weights have no versions
def run(arguments: argparse.Namespace, command_line: str) -> str:
    """Measure; the table as text."""
    a = arguments
    torch.manual_seed(0)
    asked = [Plan(name, a.expert_size, a.dtype, a.batch, a.sparsity) for name in a.geometry]
    rows: list[Row] = []
    for plan in published() if a.published else asked:
        rows += measure(plan, MEASURES[a.parts], a.seconds, a.gigabytes, a.copies)
    about = {**machine(), "command": command_line, "commit": a.commit or commit(), "unit": "microseconds"}
    if a.output:
        save(a.output, about, rows)
    return json.dumps({**about, "rows": rows}) if a.json else "\n".join(table(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = parser_of("cpu_rows", __doc__)
    parser.add_argument("--geometry", nargs="+", choices=GATED, default=["llama-3.2-1b"])
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.8, 0.9])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each cell")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of weights that take turns")
    parser.add_argument("--copies", default="none", choices=["none", "down", "all"], help="reordered ones, in bfloat16")
    parser.add_argument("--parts", choices=MEASURES, default="ffn", help="what is timed (default: the whole FFN)")
    parser.add_argument("--published", action="store_true", help="the published table, whatever else is asked for")
    parser.add_argument("-o", "--output", type=Path, help="folder for cpu-rows.json and cpu-rows.md")
    parser.add_argument("--commit", help="what the results say they were made from (default: git's answer)")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    return dispatch("cpu_rows", parser, {"run": run}, argv)
