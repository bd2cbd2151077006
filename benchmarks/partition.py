"""Seconds and quality of partitions: balanced k-means on made-up rows, or every partition on a model's layers.

    python -m benchmarks partition --geometry 1536x576 18944x3584 --sizes 32
    python -m benchmarks partition --model DIR_OR_GGUF --calibration FILE --test FILE

"within" is the sum of squared distances to the experts' means, as a share of that to the mean of all rows; "as given"
is the same for rows as they come, "reference" for k-means with optimal assignment (k-means-constrained; --reference).
"experts for 80%" is the share of a layer's experts that a perfect router needs for 80% of the sum of the experts'
output norms, averaged over held-out tokens and layers. Seconds are of all layers together. A result that is no
permutation, or worse than the rows as they come, ends the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as nnf
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness.options import dispatch, parser_of
from benchmarks.harness.texts import first_windows, read_text
from torch_prunepath.bench.results import commit
from torch_prunepath.config import Partition, num_experts
from torch_prunepath.console.errors import UserError
from torch_prunepath.console.report import aligned, machine
from torch_prunepath.discover import find_ffns
from torch_prunepath.evaluation.models import load_model
from torch_prunepath.experts.fit import contribution_shares
from torch_prunepath.experts.kmeans import balanced_kmeans, sum_of_squares
from torch_prunepath.experts.partition import contribution_features, partition, weight_features
from torch_prunepath.inputs.data import as_inputs
from torch_prunepath.inputs.front import as_batch, front_tokens
from torch_prunepath.inputs.visit import visit_inputs
from torch_prunepath.layer.ffn import FFNView

MASSES = (0.7, 0.8, 0.9)
KINDS = ["clustered", "decaying", "unstructured"]
Row = dict[str, Any]


def made_up(kind: str, ffn_size: int, hidden_size: int, expert_size: int) -> Tensor:
    """Rows of norm 1: without structure, with a decaying spectrum, or around one centre an expert."""
    rng = torch.Generator().manual_seed(0)
    rows_FD = torch.randn(ffn_size, hidden_size, generator=rng)
    if kind == "decaying":
        rows_FD *= torch.arange(1, hidden_size + 1) ** -0.5
    elif kind == "clustered":
        centres_ED = torch.randn(num_experts(ffn_size, expert_size), hidden_size, generator=rng)
        rows_FD += centres_ED[torch.randperm(ffn_size, generator=rng) // expert_size]
    return nnf.normalize(rows_FD, dim=1)


def reference(features_FD: Tensor, expert_size: int) -> tuple[float, float]:
    """(seconds, within) of k-means-constrained, one start."""
    from k_means_constrained import KMeansConstrained

    # Where there is a remainder, its clusters need not have S rows all but one: a little more freedom than ours has.
    count, last = num_experts(len(features_FD), expert_size), len(features_FD) % expert_size
    start = time.perf_counter()
    found = KMeansConstrained(count, size_min=last or expert_size, size_max=expert_size, n_init=1, random_state=0)
    found.fit(features_FD.numpy())
    return time.perf_counter() - start, float(found.inertia_)


def judge(features_FD: Tensor, order_F: Tensor, expert_size: int, with_reference: bool) -> Row:
    """The objective, once the result is known to be right."""
    ffn_size = len(features_FD)
    total = sum_of_squares(features_FD, torch.arange(ffn_size), ffn_size)
    within, given = (sum_of_squares(features_FD, o, expert_size) for o in (order_F, torch.arange(ffn_size)))
    if not torch.equal(order_F.sort().values, torch.arange(ffn_size)):
        raise UserError("wrong: not a permutation")
    if within > given * (1 + 1e-5):
        raise UserError(f"wrong: sum of squares {within}, but {given} for the rows as they come")
    row = {"within": within / total, "as given": given / total}
    if with_reference:
        seconds, theirs = reference(features_FD, expert_size)
        row |= {"reference": theirs / total, "reference seconds": seconds}
    return row


def made_up_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    cases = list(itertools.product(arguments.geometry, arguments.sizes, arguments.kinds))
    for geometry, size, kind in tqdm(cases, unit="partition", disable=None):
        ffn_size, hidden_size = map(int, geometry.split("x"))
        features_FD = made_up(kind, ffn_size, hidden_size, size)
        start = time.perf_counter()
        order_F = balanced_kmeans(features_FD, size)
        seconds = time.perf_counter() - start
        quality = judge(features_FD, order_F, size, arguments.reference)
        yield {"rows": kind, "geometry": geometry, "S": size, "layers": 1, "seconds": seconds, **quality}


# --- a model's layers -------------------------------------------------------------------------------------------------


def contributions(view: FFNView, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden activations ``[N, F]``, and each neuron's part of the output's norm."""
    h_NF = view.hidden(x_ND).float()
    return h_NF, h_NF.abs() * view.down_FD.float().norm(dim=1)


def experts_needed(view: FFNView, h_NF: Tensor, order_F: Tensor, size: int) -> Row:
    """Share of the experts that reach each mass, the largest first."""
    shares_NE = contribution_shares(h_NF[:, order_F], view.down_FD[order_F], size).sort(dim=1, descending=True).values
    before_NE = shares_NE.cumsum(1) - shares_NE
    return {f"experts for {mass:.0%}": float((before_NE < mass).float().mean()) for mass in MASSES}


@torch.no_grad()
def model_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    model, tokenizer = load_model(arguments.model)
    views = [FFNView(model, spec) for spec in find_ffns(model)]
    texts = (arguments.calibration, arguments.tokens), (arguments.test, arguments.test_tokens)
    fit_NC, test_NC = (first_windows(read_text(path), tokenizer, -(-count // 512), 512) for path, count in texts)
    calibration: dict[str, Tensor] = {}

    def keep(view: FFNView, x_ND: Tensor) -> None:
        calibration[view.site] = x_ND[: arguments.tokens]

    front = front_tokens(tokenizer)
    visit_inputs(model, views, as_inputs(as_batch(fit_NC, front), model), keep)
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    bar = tqdm(total=len(views) * len(arguments.sizes) * len(arguments.partitions), unit="partition")

    def visit(view: FFNView, x_ND: Tensor) -> None:
        h_NF, _ = contributions(view, x_ND)
        _, fit_TF = contributions(view, calibration.pop(view.site))
        for size in arguments.sizes:
            for name in arguments.partitions:
                start = time.perf_counter()
                order_F = partition(name, view, fit_TF, size)
                row: Row = {"seconds": time.perf_counter() - start}
                if name in ("kmeans", "coactivation"):
                    features_FD = weight_features(view) if name == "kmeans" else contribution_features(fit_TF)
                    row |= judge(features_FD, order_F, size, arguments.reference)
                found[name, size].append(row | experts_needed(view, h_NF, order_F, size))
                bar.update()

    visit_inputs(model, views, as_inputs(as_batch(test_NC, front), model), visit)
    bar.close()
    geometry = f"{views[0].spec.ffn_size}x{views[0].spec.hidden_size}"
    for (name, size), rows in found.items():
        means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        means |= {key: sum(row[key] for row in rows) for key in rows[0] if key.endswith("seconds")}
        yield {"rows": name, "geometry": geometry, "S": size, "layers": len(rows), **means}


# --- table ------------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """One line a row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(key: str, value: Any) -> str:
        if not isinstance(value, float):
            return "" if value is None else str(value)
        return f"{value:.2f}" if key.endswith("seconds") else f"{value:.4f}"

    return "\n".join(aligned([columns, *([cell(key, row.get(key)) for key in columns] for row in rows)]))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of("partition", __doc__)
    parser.add_argument("--geometry", nargs="+", default=["1536x576"], metavar="FxD", help="of made-up rows")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="of made-up rows")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--model", help="folder, GGUF file or hub name: measure its layers in place of made-up rows")
    parser.add_argument("--partitions", nargs="+", default=get_args(Partition), choices=get_args(Partition))
    parser.add_argument("--calibration", type=Path, help="text that neurons are grouped by")
    parser.add_argument("--test", type=Path, help="text that the grouping is judged on")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--test-tokens", type=int, default=1024)
    parser.add_argument("--reference", action="store_true", help="compare with k-means-constrained")
    parser.add_argument("--commit", default=None, help="what the results say they were made from (default: git's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    return parser


def run(arguments: argparse.Namespace, command_line: str) -> str:
    """Measure; the table as text.

    Raises:
        UserError: if a text is missing, or a partition is wrong.
    """
    if arguments.model and not (arguments.calibration and arguments.test):
        raise UserError("--model needs --calibration and --test")
    rows = list(model_rows(arguments) if arguments.model else made_up_rows(arguments))
    made_from = {**machine(), "commit": arguments.commit or commit(), "command": command_line}
    return json.dumps({**made_from, "rows": rows}) if arguments.json else table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    return dispatch("partition", parser(), {"run": run}, argv)
