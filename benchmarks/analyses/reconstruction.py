"""How far an FFN's output is off if only its k best experts are computed, against k: figure 2 of arXiv 2605.28283.

    python -m benchmarks reconstruction run --model DIR_OR_GGUF --data FOLDER -o OUT
    python -m benchmarks reconstruction report OUT

The error of a layer is ``|y - y_k| / |y|``, norms over all tokens of a text: y is what the layer answers with all its
experts (gates included), y_k with the k experts that its router scores highest, for the same input, that of the model
with all experts. "oracle" ranks by the norm of what each expert contributes. An answer to what a router is worth: the
oracle of the same experts bounds it.

Models are converted and trained as ``benchmarks books`` does it, on the same texts; without ``--steps`` nothing is
trained. Each part writes one JSON file once it is done, and is not done again. ``results.json``, ``results.md`` and
``results.png`` in the folder are those of the last command; ``OUT/cache`` can be removed when all is done.

Shapes: T tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.analyses.study import Analysis, Part, Study, add_checkpoints, add_options
from benchmarks.harness.jobs import check_positive
from benchmarks.harness.report import look, markdown, over_seeds, shown
from benchmarks.harness.task import Row
from torch_prunepath import register_routing_hook, set_tau, sparse_layers
from torch_prunepath.console.errors import UserError
from torch_prunepath.evaluation.perplexity import mean_loss
from torch_prunepath.experts.fit import contribution_shares
from torch_prunepath.layer import RoutedExperts, Routing
from torch_prunepath.layer.views import sparse_views
from torch_prunepath.ops.experts import expand_experts, weigh
from torch_prunepath.select import sigmoid_weights

NAME = "reconstruction"
METHODS = ("ours", "lte", "moefication-mlp", "moefication-centroid")
SHARES = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
ROUTER, ORACLE = "router", "oracle"
LAYERS_AT = 0.2
"""Share of active experts that the plot shows each layer at: the budget of MoEfication's main results."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Say what the analysis takes."""
    add_options(command, sparsity=[0.8])
    add_checkpoints(command)
    command.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, metavar="METHOD")
    command.add_argument("--expert-size", type=int, default=8, help="neurons an expert, of every method (default: 8)")
    command.add_argument("--active", type=float, nargs="+", default=list(SHARES), help="shares of active experts")


def check(arguments: argparse.Namespace) -> None:
    """Refuse options before anything is loaded.

    Raises:
        UserError: if a number is out of its range.
    """
    check_positive({"expert_size": arguments.expert_size})
    for share in arguments.active:
        if not 0.0 < share <= 1.0:
            raise UserError(f"--active {share} is outside (0, 1]: 0.2 is a fifth of the experts")


def plan(study: Study) -> list[Part]:
    """A model for each method and seed, and each checkpoint."""
    arguments = study.arguments
    shares, common = sorted(set(arguments.active)), {"expert_size": arguments.expert_size}
    return study.models(arguments.methods, common, lambda name, model: _rows(study, name, model, shares), active=shares)


def summary(rows: Sequence[Row]) -> list[Row]:
    """Rows over seeds: means over layers first, then every layer."""
    layers = [
        {**row, "layer": layer, "error": error, "experts": row.get("experts", {}).get(layer)}
        for row in rows
        for layer, error in row["layers"].items()
    ]
    means = over_seeds(rows, ("model", "by", "active"), ("error",))
    # Some records of earlier versions were kept without the numbers of experts.
    values = ["error", "experts"] if all(row["experts"] is not None for row in layers) else ["error"]
    return [*means, *over_seeds(layers, ("model", "by", "active", "layer"), values)]


def _rows(study: Study, name: str, model: Any, shares: Sequence[float]) -> list[Row]:
    """A row for each ranking and share: mean over layers, and every layer, on the first text."""
    text, window_NC = next(iter(study.task.texts.items()))
    errors = reconstruction(model, window_NC, shares, rows=study.task.measuring.eval_rows)
    experts = {layer: each.num_experts for layer, each in sparse_layers(model).items()}
    return [
        {
            "model": name,
            "text": text,
            "by": by,
            "active": share,
            "error": statistics.fmean(layers.values()),
            "layers": layers,
            "experts": {layer: count(share, experts[layer]) for layer in layers},
        }
        for (by, share), layers in errors.items()
    ]


def count(share: float, experts: int) -> int:
    """k: the share of the experts, at least one."""
    return max(1, round(share * experts))


def reconstruction(
    model: Any, window_NC: Tensor, shares: Sequence[float], *, rows: int
) -> dict[tuple[str, float], dict[str, float]]:
    """Relative error of each layer by ranking and share of active experts.

    Args:
        model: a sparse model, of ours or a baseline; its tau is 1 afterwards.
        window_NC: int64, what it reads.
        shares: of the experts that are computed.
        rows: windows at once.
    """
    set_tau(model, 1.0)
    squares: dict[tuple[str, float], dict[str, Tensor]] = {(by, s): {} for by in (ROUTER, ORACLE) for s in shares}
    totals: dict[str, Tensor] = {}
    layers, views = sparse_layers(model), sparse_views(model)

    def note(routing: Routing) -> None:
        layer, view = layers[routing.name], views[routing.name]
        h_TF = _gated(layer, view.hidden(routing.x_TD.float()), routing.scores_TE)
        down_FD, size = view.down_FD.float(), layer.experts.expert_size
        y_TD = h_TF @ down_FD
        bias_D = view.down_bias_D
        totals[routing.name] = totals.get(routing.name, 0) + (y_TD if bias_D is None else y_TD + bias_D).square().sum()
        ranks = {
            ROUTER: _ranks(_shared_first(layer, routing.scores_TE)),
            ORACLE: _ranks(contribution_shares(h_TF, down_FD, size)),
        }
        for (by, share), found in squares.items():
            left_TE = ranks[by] >= count(share, layer.num_experts)
            rest_TD = (h_TF * expand_experts(left_TE, size, h_TF.shape[1])) @ down_FD
            found[routing.name] = found.get(routing.name, 0) + rest_TD.square().sum()

    with register_routing_hook(model, note):
        mean_loss(model, window_NC, rows=rows, title="reading")
    return {
        key: {name: float((square / totals[name]).sqrt()) for name, square in found.items()}
        for key, found in squares.items()
    }


def _gated(layer: RoutedExperts, h_TF: Tensor, scores_TE: Tensor) -> Tensor:
    """Hidden activations, each weighed by its expert's gate."""
    if layer.experts.gate == "one":
        return h_TF
    weights_TE = sigmoid_weights(scores_TE, layer.experts.gate_offset, layer.experts.shared)
    return weigh(h_TF, weights_TE, layer.experts.expert_size)


def _shared_first(layer: RoutedExperts, scores_TE: Tensor) -> Tensor:
    """Scores that rank the experts which are always active before all others."""
    places_E = torch.arange(scores_TE.shape[-1], device=scores_TE.device)
    return scores_TE.masked_fill(places_E < layer.experts.shared, torch.inf)


def _ranks(values_TE: Tensor) -> Tensor:
    """Place of each expert, 0 for the largest value; ties by lower index."""
    order_TE = values_TE.sort(dim=-1, descending=True, stable=True).indices
    places_TE = torch.arange(values_TE.shape[-1], device=values_TE.device).expand_as(order_TE)
    return torch.empty_like(order_TE).scatter_(-1, order_TE, places_TE)


def table(rows: Sequence[Row]) -> list[str]:
    """A line a model and ranking, a column a share."""
    means = [row for row in rows if "layer" not in row]
    shares = sorted({row["active"] for row in means})
    cells: dict[tuple[str, str], dict[float, str]] = {}
    for row in means:
        cells.setdefault((row["model"], row["by"]), {})[row["active"]] = shown(row["error"], 3)
    lines = [[model, by, *(found.get(share, "") for share in shares)] for (model, by), found in cells.items()]
    title = ["# Relative error of FFN outputs with the best experts alone, mean over layers", ""]
    return title + markdown(["model", "ranked by", *(f"{share:.3g}" for share in shares)], lines)


def plot(drawn: Any, rows: Sequence[Row]) -> None:
    """The mean against the share; every layer at the share nearest to ``LAYERS_AT``."""
    mean_axes, layer_axes = drawn.subplots(1, 2)
    at = min({row["active"] for row in rows}, key=lambda share: abs(share - LAYERS_AT))
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        for by, line in ((ROUTER, "-"), (ORACLE, ":")):
            own = [row for row in rows if (row["model"], row["by"]) == (model, by)]
            means = [row for row in own if "layer" not in row]
            style = {**look(number), "linestyle": line}
            across = [100 * row["active"] for row in means]
            mean_axes.plot(across, [r["error"]["mean"] for r in means], marker=".", label=f"{model}, {by}", **style)
            bounds = ([row["error"][name] for row in means] for name in ("least", "most"))
            mean_axes.fill_between(across, *bounds, color=style["color"], alpha=0.2)
            each = [row["error"]["mean"] for row in own if "layer" in row and row["active"] == at]
            layer_axes.plot(each, marker=".", **style)
    mean_axes.set(xlabel="active experts (%)", ylabel="relative error, mean over layers", ylim=(0, None))
    layer_axes.set(xlabel="layer", ylabel=f"relative error at {at:.1%} active", ylim=(0, None))
    mean_axes.legend(fontsize="x-small")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    return Analysis(NAME, __doc__, add_arguments, check, plan, summary, table, plot).main(argv)
