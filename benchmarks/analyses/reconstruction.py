"""How far an FFN's output is off if only its k best experts are computed, against k: figure 2 of arXiv 2605.28283.

The error of a layer is ``|y - y_k| / |y|``, norms over all tokens of a text: y is what the layer answers with all its
experts (gates included), y_k with the k experts that its router scores highest, for the same input, that of the model
with all experts. "oracle" ranks by the norm of what each expert contributes. An answer to what a router is worth: the
oracle of the same experts bounds it.

Shapes: T tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.adaptation.measure import run as read
from benchmarks.analyses.study import Part, Row, Study, add_checkpoints, add_options, over_seeds, product, shown
from benchmarks.common.options import check_positive
from benchmarks.common.report import markdown
from torch_prunepath import register_routing_hook, set_tau, sparse_layers
from torch_prunepath.console.errors import UserError
from torch_prunepath.experts.fit import contribution_shares
from torch_prunepath.layer import RoutedExperts, Routing
from torch_prunepath.layer.views import sparse_views
from torch_prunepath.ops.experts import expand_experts, weigh
from torch_prunepath.select import sigmoid_weights

NAME = "reconstruction"
METHODS = ("ours", "lte", "moefication-mlp", "moefication-centroid")
SHARES = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
ROUTER, ORACLE = "router", "oracle"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Say what the analysis takes."""
    add_options(command, sparsity=[0.8])
    add_checkpoints(command)
    command.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, metavar="METHOD")
    command.add_argument("--expert-size", type=int, default=8, help="neurons an expert, of every method (default: 8)")
    command.add_argument("--active", type=float, nargs="+", default=list(SHARES), help="shares of active experts")
    command.add_argument("--show-layer-at", type=float, default=0.2, help="share that the plot shows each layer at")


def work(arguments: argparse.Namespace, command_line: str) -> tuple[str, str]:
    """Measure what is not measured yet; the table and the results as text."""
    check_positive({"expert_size": arguments.expert_size})
    for share in arguments.active:
        if not 0.0 < share <= 1.0:
            raise UserError(f"--active {share} is outside (0, 1]: 0.2 is a fifth of the experts")
    study = Study(NAME, arguments, command_line)
    parts = study.do([*_made(study), *_loaded(study)])
    rows = over_seeds((row for part in parts for row in part["rows"]), ("model", "by", "active"), ("error",))
    layers = over_seeds(
        (row for part in parts for row in _layer_rows(part)), ("model", "by", "active", "layer"), ("error", "experts")
    )
    at = min(arguments.active, key=lambda share: abs(share - arguments.show_layer_at))
    return study.finish(parts, [*rows, *layers], table(rows), lambda drawn: plot(drawn, rows, layers, at))


def _made(study: Study) -> list[Part]:
    arguments, shares = study.arguments, sorted(set(study.arguments.active))
    fields = study.fields(arguments.methods)
    found = []
    for method, seed in product(arguments.methods, arguments.seeds):
        run = study.run(method, {"expert_size": arguments.expert_size, **fields[method]}, seed)

        def do(run: Any = run) -> tuple[list[Row], Mapping[str, Any]]:
            adapted, said = study.make(run)
            return _rows(study, run.method, adapted.model, shares), said

        found.append(Part(f"{method}-seed{seed}", {**study.about(run), "active": shares}, do))
    return found


def _loaded(study: Study) -> list[Part]:
    shares, found = sorted(set(study.arguments.active)), []
    for name, folder in study.checkpoints().items():

        def do(name: str = name, folder: Any = folder) -> tuple[list[Row], Mapping[str, Any]]:
            return _rows(study, name, study.load(folder), shares), {}

        found.append(Part(name, {**study.about_checkpoint(folder), "active": shares, "name": name}, do))
    return found


def _rows(study: Study, name: str, model: Any, shares: Sequence[float]) -> list[Row]:
    """A row for each ranking and share: mean over layers, and every layer, on the first text."""
    text, window_NC = next(iter(study.material.texts.items()))
    errors = reconstruction(model, window_NC, shares, rows=study.settings.eval_rows)
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


def _layer_rows(part: Mapping[str, Any]) -> list[Row]:
    return [
        {**row, "layer": layer, "error": error, "experts": row["experts"][layer]}
        for row in part["rows"]
        for layer, error in row["layers"].items()
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
        read(model, window_NC, rows)
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
    shares = sorted({row["active"] for row in rows})
    cells: dict[tuple[str, str], dict[float, str]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["by"]), {})[row["active"]] = shown(row["error"], 3)
    lines = [[model, by, *(found.get(share, "") for share in shares)] for (model, by), found in cells.items()]
    title = ["# Relative error of FFN outputs with the best experts alone, mean over layers", ""]
    return title + markdown(["model", "ranked by", *(f"{share:.3g}" for share in shares)], lines)


def plot(drawn: Any, rows: Sequence[Row], layers: Sequence[Row], at: float) -> None:
    """The mean against the share; every layer at one share."""
    mean_axes, layer_axes = drawn.subplots(1, 2)
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        for by, style in ((ROUTER, "-"), (ORACLE, ":")):
            own = [row for row in rows if (row["model"], row["by"]) == (model, by)]
            label, look = f"{model}, {by}", {"color": f"C{number}", "linestyle": style}
            across = [100 * row["active"] for row in own]
            mean_axes.plot(across, [row["error"]["mean"] for row in own], marker=".", label=label, **look)
            bounds = ([row["error"][name] for row in own] for name in ("least", "most"))
            mean_axes.fill_between(across, *bounds, color=look["color"], alpha=0.2)
            each = [row for row in layers if (row["model"], row["by"], row["active"]) == (model, by, at)]
            layer_axes.plot([row["error"]["mean"] for row in each], marker=".", **look)
    mean_axes.set(xlabel="active experts (%)", ylabel="relative error, mean over layers", ylim=(0, None))
    layer_axes.set(xlabel="layer", ylabel=f"relative error at {at:.1%} active", ylim=(0, None))
    mean_axes.legend(fontsize="x-small")
