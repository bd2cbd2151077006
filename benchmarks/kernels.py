"""Times each Triton kernel of a sparse FFN by itself, and all together: where the time between dense and floor goes.

    python -m benchmarks kernels --geometry qwen2-7b --tokens 1 4 16 --sparsity 0.5 0.8 0.9 0.95

Every kernel runs over several layers inside a CUDA graph, so that weights come from memory; medians of the replays. The
down kernel's time includes clearing its counters. Random weights and routers as in ``prunepath bench ffn``. Needs a
CUDA device. Shapes: T tokens, D hidden size, F neurons, E experts of S neurons.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness.options import dispatch, parser_of
from torch_prunepath.bench.geometry import GEOMETRIES
from torch_prunepath.bench.layers import SCORE_SPREAD
from torch_prunepath.bench.results import commit
from torch_prunepath.bench.timing import Captured, copy_bandwidth, timed
from torch_prunepath.console.errors import UserError
from torch_prunepath.console.report import aligned, machine
from torch_prunepath.csrc_triton import ffn
from torch_prunepath.csrc_triton.order import Workspace, workspace
from torch_prunepath.search import tau_of_scores
from torch_prunepath.weights import FFNWeights, Selector

SECONDS = 0.2
PARTS = ("router", "selection", "up", "down", "together")


class TimedFFN:
    """One layer's weights, and what its kernels hand on."""

    def __init__(self, hidden: int, width: int, gated: bool, activation: str, size: int, device: str = "cuda") -> None:
        def random(*shape: int, scale: float) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16) * scale

        self.experts, self.size, self.activation = -(-width // size), size, activation
        self.router = random(self.experts, hidden, scale=SCORE_SPREAD * hidden**-0.5)
        up = random(width, hidden, scale=hidden**-0.5)
        gate = random(width, hidden, scale=hidden**-0.5) if gated else None
        self.weights = FFNWeights(up, None, gate, None, random(width, hidden, scale=width**-0.5), None)
        self.tau = torch.tensor(0.5, device=device)
        self.hidden, self.width = hidden, width

    def begin(self, tokens: int) -> None:
        self.x = torch.randn_like(self.weights.up_FD[:tokens])
        self.tokens = tokens
        dtype = torch.float32 if tokens == 1 else torch.bfloat16
        self.h = torch.empty(tokens, self.width, dtype=dtype, device=self.x.device)
        self.work, self.spare = self._workspace(), self._workspace()

    def _workspace(self) -> Workspace:
        return workspace(self.experts, ffn.column_blocks(self.tokens, self.hidden), self.x.device)

    def set_sparsity(self, sparsity: float) -> float:
        """Choose tau; return the share of inactive experts that it gives."""
        self.tau.fill_(tau_of_scores(ffn.router_scores(self.x, self.router, None), sparsity))
        self.run_router(self.work)
        self.run_selection(self.work)
        self.run_up()
        return 1.0 - float(self.mask.float().mean())

    def run_router(self, work: Workspace) -> None:
        run = ffn.router_one if self.tokens == 1 else ffn.router_split
        self.parts = run(self.x, self.router, None, work)

    def run_selection(self, work: Workspace) -> None:
        if ffn.compares(self.tokens, self.experts):
            self.mask, _ = ffn.rank(self.parts, self.tau, "reach", None, work)
        else:
            self.mask, _ = ffn.select_weights(self.parts, self.tau, "reach", None, work.used_E)

    def run_up(self) -> None:
        ffn.up(self.x, self.mask, None, self.weights.up_part, self.activation, self.size, self.work, self.h)

    def run_down(self) -> None:
        self.work.arrivals.zero_()
        ffn.down(self.h, self.work, self.weights.down_FD, None, self.size, torch.bfloat16, early=False)

    def run_together(self) -> None:
        selector = Selector(self.router, None, self.tau, "reach", None)
        ffn.sparse_ffn(self.x, selector, self.weights, self.activation, self.size)

    def bytes_of(self, part: str) -> float:
        """What a part reads of the weights."""
        used = float(self.mask.any(0).float().mean())
        up = self.weights.up_FD.nbytes * (1 if self.weights.gate_FD is None else 2) * used
        each = {"router": self.router.nbytes, "selection": 0, "up": up, "down": self.weights.down_FD.nbytes * used}
        return sum(each.values()) if part == "together" else each[part]


def measure(layers: list[TimedFFN]) -> dict[str, float]:
    def over(part: str) -> Callable[[], None]:
        def call() -> None:
            for layer in layers:
                run = getattr(layer, f"run_{part}")
                # A second workspace, so that what up and down read stays as it is.
                run(layer.spare) if part in ("router", "selection") else run()

        return call

    graphs = {part: Captured(over(part)) for part in PARTS}
    times = timed(graphs, torch.device("cuda"), calls=len(layers), seconds=SECONDS)
    return {part: times[part].median_us for part in PARTS}


def build(geometry: str, size: int) -> list[TimedFFN]:
    """Layers whose rows at 95% sparsity exceed four L2 caches, if memory allows."""
    shape = GEOMETRIES[geometry]
    each = 2 * shape.hidden_size * shape.ffn_size * (2 if shape.plain else 3)
    wanted = int(4 * torch.cuda.get_device_properties(0).L2_cache_size / (each * 0.05))
    count = min(max(4, wanted), int(20e9 / each), 48)
    sizes = (shape.hidden_size, shape.ffn_size, not shape.plain, shape.activation, size)
    return [TimedFFN(*sizes) for _ in range(count)]


def rows(layers: list[TimedFFN], tokens: int, sparsities: list[float], bandwidth: float) -> Iterator[dict[str, Any]]:
    for layer in layers:
        layer.begin(tokens)
    for sparsity in sparsities:
        real = statistics.mean(layer.set_sparsity(sparsity) for layer in layers)
        floors = {part: layers[0].bytes_of(part) / bandwidth * 1e6 for part in PARTS}
        yield {"tokens": tokens, "sparsity": real, "us": measure(layers), "floor_us": floors}


@torch.no_grad()
def run(arguments: argparse.Namespace, command_line: str) -> str:
    """Measure; the table as text.

    Raises:
        UserError: if there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device: kernels are timed on one")
    layers = build(arguments.geometry, arguments.expert_size)
    bandwidth = copy_bandwidth(torch.device("cuda"))
    record: list[dict[str, Any]] = []
    for tokens in tqdm(arguments.tokens, unit="size", disable=None):
        record += rows(layers, tokens, arguments.sparsity, bandwidth)
    about = {"geometry": arguments.geometry, "expert_size": arguments.expert_size, "layers": len(layers)}
    about |= {"copy_bytes_per_second": bandwidth, **machine(), "commit": arguments.commit or commit()}
    if arguments.json:
        return json.dumps({**about, "command": command_line, "rows": record})
    head = f"copy {bandwidth / 1e12:.2f} TB/s; {len(layers)} layers; microseconds, in brackets by bytes alone"
    lines = [("tokens", "sparsity", *PARTS)]
    for row in record:
        cells = (f"{row['us'][part]:.2f} ({row['floor_us'][part]:.2f})" for part in PARTS)
        lines.append((str(row["tokens"]), f"{row['sparsity']:.1%}", *cells))
    return "\n".join([f"{torch.cuda.get_device_name()}, commit {about['commit']}", head, *aligned(lines)])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = parser_of("kernels", __doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="qwen2-7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--commit", help="what the results say they were made from (default: git's answer)")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    return dispatch("kernels", parser, {"run": run}, argv)
