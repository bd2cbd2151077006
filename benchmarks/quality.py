"""Perplexity against sparsity without training: partitions, routers, expert sizes, static removal, the oracle.

    python -m benchmarks quality --model DIR_OR_GGUF --calibration FILE --test FILE --out quality.json

Every row is read off at the same realised sparsity on the test text. Baselines run
through the same layers, as routing hooks: static removal keeps the same neurons for every token; the oracle routes by
the experts' true contributions instead of the router's guess.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness.options import check_device, dispatch, parser_of
from benchmarks.harness.store import replacing
from benchmarks.harness.texts import first_windows, read_text
from torch_prunepath import (
    SparsifyConfig,
    densify,
    record_sparsity,
    register_routing_hook,
    set_tau,
    sparse_layers,
    sparsify,
)
from torch_prunepath.baselines.pruning import neuron_scores
from torch_prunepath.bench.results import commit
from torch_prunepath.console.report import machine
from torch_prunepath.discover import find_ffns
from torch_prunepath.evaluation.models import load_model
from torch_prunepath.evaluation.perplexity import perplexity
from torch_prunepath.experts.fit import contribution_shares
from torch_prunepath.inputs.data import Inputs, as_inputs
from torch_prunepath.inputs.front import front_tokens
from torch_prunepath.inputs.visit import visit_inputs
from torch_prunepath.layer import Routing
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.views import sparse_views
from torch_prunepath.search import find_tau
from torch_prunepath.select import mask_from_scores

TOLERANCE = 0.004  # sparsity: perplexity is interpolated over at most this distance from a measured point
MOST_TAU = 0.9999  # tau of the dense model on the axis of log(1 - tau), where 1 has no place
PARTITIONS = ["coactivation", "kmeans", "contiguous", "random"]
STATIC = ["norm", "wanda", "wanda-down"]
ROUTERS = ["fitted", "centroid", "zero"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One setting of tau, and what it gave."""

    tau: float
    sparsity: float
    log_ppl: float


def between(below: Point, above: Point, sparsity: float) -> Point:
    """Linear in the sparsity between two points: of the logarithms of perplexity and of the mass that tau gives up."""
    along = (sparsity - below.sparsity) / max(above.sparsity - below.sparsity, 1e-9)
    given_up = [math.log1p(-min(point.tau, MOST_TAU)) for point in (below, above)]
    log_given_up = given_up[0] + along * (given_up[1] - given_up[0])
    log_ppl = below.log_ppl + along * (above.log_ppl - below.log_ppl)
    return Point(-math.expm1(log_given_up), sparsity, log_ppl)


class Bench:
    """One model and one test text; measures perplexity at exact sparsities."""

    def __init__(self, model: Any, calibration: Inputs, test_NC: Tensor, targets: list[float], front: int = 0) -> None:
        self.model, self.calibration, self.targets, self.front = model, calibration, targets, front
        self.test_NC = test_NC.to(model.device)
        self.dense = self.perplexity()

    def perplexity(self) -> float:
        """Perplexity of the model as it stands on the test text, without the ``front`` tokens of each window."""
        return perplexity(self.model, self.test_NC, front_tokens=self.front)

    def point(self, tau: float) -> Point:
        """Realised sparsity and log perplexity on the test text."""
        set_tau(self.model, tau)
        with record_sparsity(self.model, front_tokens=self.front) as record:
            ppl = self.perplexity()
        return Point(tau, record.sparsity, math.log(ppl))

    def row(self, **labels: Any) -> Row:
        """A row of the table for the sparse model as it stands: perplexity at each sparsity asked for."""
        points: dict[float, Point] = {}
        found = {f"{target:g}": self.at(target, points) for target in self.targets}
        return {
            **labels,
            "perplexity": {target: round(math.exp(point.log_ppl), 3) for target, point in found.items()},
            "tau": {target: round(point.tau, 5) for target, point in found.items()},
        }

    def at(self, target: float, points: dict[float, Point]) -> Point:
        """Perplexity at a sparsity: tau is searched until the sparsity is near, then perplexity is read off in between.

        ``points`` is what was measured so far, by tau; new ones are added.

        Raises:
            OutOfReach: if one expert a layer is not sparse enough.
        """

        def measure(tau: float) -> float:
            points[tau] = self.point(tau)
            return points[tau].sparsity

        seen = {tau: point.sparsity for tau, point in points.items()}
        nearest = points.get(find_tau(measure, target, tolerance=TOLERANCE, seen=seen))
        known = [Point(1.0, 0.0, math.log(self.dense)), *points.values()]
        below = max((p for p in known if p.sparsity <= target), key=lambda p: p.sparsity)
        above = min((p for p in known if p.sparsity > target), key=lambda p: p.sparsity, default=None)
        return between(below, above, target) if above is not None else nearest or below

    @contextmanager
    def converted(self, config: SparsifyConfig) -> Iterator[float]:
        """The model as ``config`` makes it; yields the seconds that took."""
        start = time.perf_counter()
        calibration = self.calibration if config.needs_data else None
        sparsify(self.model, config=config, calibration=calibration, progress=False)
        try:
            yield time.perf_counter() - start
        finally:
            densify(self.model)


# --- baselines --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def static_scores(bench: Bench, kind: str) -> dict[str, Tensor]:
    """Score of every neuron ``[F]`` by layer; the lowest are removed first.

    ``"norm"`` and ``"wanda-down"`` are those of :func:`torch_prunepath.baselines.prune`; ``"wanda"`` adds to the latter
    Wanda's score (arXiv 2306.11695) of the weights into the neuron: magnitude times the norm of what it multiplies.
    """
    views = [FFNView(bench.model, spec) for spec in find_ffns(bench.model)]
    score = "norm" if kind == "norm" else "wanda"
    scores = neuron_scores(bench.model, views, bench.calibration, score, progress=False)  # type: ignore[arg-type]
    if kind == "wanda":

        def visit(view: FFNView, x_ND: Tensor) -> None:
            rms_D = x_ND.float().square().mean(0).sqrt()  # as there: the root of the mean, not of the sum
            into = [rows for rows in (view.gate_FD, view.up_FD) if rows is not None]
            scores[view.site] = scores[view.site] + sum((rows.float().abs() @ rms_D).double().cpu() for rows in into)

        visit_inputs(bench.model, views, bench.calibration, visit)
    return scores


def static_row(bench: Bench, kind: str) -> Row:
    """The same share of neurons removed from every layer, whatever the token."""
    scores = static_scores(bench, kind)
    config = SparsifyConfig(expert_size=1, partition="contiguous", router="zero", budget="uniform")
    points = {}
    with bench.converted(config):
        for target in bench.targets:
            keep = {}
            for site, score in scores.items():
                removed = round(target * len(score))
                keep_F = torch.ones_like(score, dtype=torch.bool).index_fill_(0, score.argsort()[:removed], False)
                keep[site] = keep_F.to(bench.model.device)
            with register_routing_hook(bench.model, lambda r, keep=keep: keep[r.name].expand_as(r.mask_TE)):
                points[f"{target:g}"] = round(bench.perplexity(), 3)
    return {"method": f"static, {kind}", "expert_size": 1, "perplexity": points}


def oracle_row(bench: Bench, config: SparsifyConfig) -> Row:
    """Routing by the experts' true shares of the contribution norm: what a perfect router would choose."""
    with bench.converted(config):
        views, layers = sparse_views(bench.model), sparse_layers(bench.model)

        def route(routing: Routing) -> Tensor:
            view, layer = views[routing.name], layers[routing.name]
            h_NF = view.hidden(routing.x_TD)
            shares_NE = contribution_shares(h_NF, view.down_FD, config.expert_size)
            return mask_from_scores(shares_NE.clamp_min(1e-30).log(), layer.tau, config.rule)

        with register_routing_hook(bench.model, route):
            return bench.row(method="oracle", partition=config.partition, expert_size=config.expert_size)


# --- table ------------------------------------------------------------------------------------------------------------


def measure(bench: Bench, arguments: argparse.Namespace, save: Callable[[list[Row]], None]) -> list[Row]:
    """Every row; ``save`` is called after each."""
    default = SparsifyConfig()
    configs = []
    for size, partition, router in itertools.product(arguments.sizes, arguments.partitions, arguments.routers):
        config = replace(default, expert_size=size, partition=partition, router=router)
        configs.append(config)
        if (partition, router) == (default.partition, default.router):
            configs.append(replace(config, budget="uniform"))
    jobs: list[tuple[str, Callable[[], Row]]] = [
        (f"static {kind}", lambda kind=kind: static_row(bench, kind)) for kind in arguments.static
    ]
    for size in arguments.sizes if arguments.oracle else []:
        jobs.append((f"oracle S={size}", lambda size=size: oracle_row(bench, replace(default, expert_size=size))))
    for config in configs:
        name = f"{config.partition} {config.router} {config.budget} S={config.expert_size}"
        jobs.append((name, lambda config=config: routed_row(bench, config)))
    rows: list[Row] = []
    for name, job in (bar := tqdm(jobs, unit="row")):
        bar.set_description(name)
        rows.append(job())
        save(rows)
    return rows


def routed_row(bench: Bench, config: SparsifyConfig) -> Row:
    """The library's own conversion."""
    with bench.converted(config) as seconds:
        return bench.row(
            method="routed",
            partition=config.partition,
            router=config.router,
            budget=config.budget,
            expert_size=config.expert_size,
            seconds=round(seconds, 1),
        )


def table(dense: float, rows: list[Row]) -> str:
    """Markdown: one line a row, perplexity at each sparsity."""
    targets = list(rows[0]["perplexity"])
    lines = [f"Dense: {dense:.2f}.", "", "| method | partition | router | budget | S | " + " | ".join(targets) + " |"]
    lines.append("|---" * (5 + len(targets)) + "|")
    for row in rows:
        labels = [str(row.get(key, "")) for key in ("method", "partition", "router", "budget", "expert_size")]
        values = [f"{row['perplexity'][target]:.1f}" for target in targets]
        lines.append("| " + " | ".join(labels + values) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of("quality", __doc__)
    parser.add_argument("--model", required=True, help="folder, GGUF file or hub name of a causal language model")
    parser.add_argument("--calibration", type=Path, required=True, help="text that experts and routers are made from")
    parser.add_argument("--test", type=Path, required=True, help="text that perplexity is measured on")
    parser.add_argument("--calibration-tokens", type=int, default=SparsifyConfig().calibration_tokens)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--partitions", nargs="+", default=PARTITIONS, choices=PARTITIONS)
    parser.add_argument("--routers", nargs="+", default=ROUTERS, choices=ROUTERS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--static", nargs="*", default=STATIC, choices=STATIC)
    parser.add_argument("--oracle", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--commit", default=None, help="what the results say they were made from (default: git's answer)"
    )
    parser.add_argument("--out", type=Path, help="write results here as JSON, after every row")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    return parser


def run(arguments: argparse.Namespace, command_line: str) -> str:
    """Measure; the table as text."""
    check_device(arguments.device)
    model, tokenizer = load_model(arguments.model)
    model = model.to(arguments.device)
    calibration = as_inputs([read_text(arguments.calibration)], model, tokenizer, arguments.calibration_tokens)
    test_NC = first_windows(read_text(arguments.test), tokenizer, arguments.windows, arguments.context)
    bench = Bench(model, calibration, test_NC, arguments.sparsity, front_tokens(tokenizer))
    results: dict[str, Any] = {
        **machine(),
        "commit": arguments.commit or commit(),
        "command": command_line,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "dense": round(bench.dense, 3),
    }

    def save(rows: list[Row]) -> None:
        if arguments.out is not None:
            with replacing(arguments.out) as part:
                part.write_text(json.dumps({**results, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    rows = measure(bench, arguments, save)
    return json.dumps({**results, "rows": rows}) if arguments.json else table(bench.dense, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    return dispatch("quality", parser(), {"run": run}, argv)
