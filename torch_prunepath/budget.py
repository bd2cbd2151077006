"""Bytes read as the one knob: how tau and the thresholds of all layers go together.

Shapes: N tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.config import check_bytes, check_tau
from torch_prunepath.experts.budget import fisher_information
from torch_prunepath.experts.path import LayerCosts, Point, Setting, layer_path, shared_out, towards
from torch_prunepath.inputs.data import Inputs, as_inputs, evaluating, single_rows
from torch_prunepath.inputs.front import front_of, quiet
from torch_prunepath.inputs.rows import spread
from torch_prunepath.inputs.visit import visit_inputs
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.hooks import eagerly
from torch_prunepath.layer.norms import forget_norms
from torch_prunepath.layer.saving import refresh
from torch_prunepath.layer.sparse import Knot
from torch_prunepath.layer.views import check_readable, norm_keepers, sparse_layers, sparse_views, write_thresholds
from torch_prunepath.progress import progress_bar
from torch_prunepath.sparsity import record_sparsity

PATH_TOKENS = 4096
"""Largest number of tokens that are read to find the path: those of the Fisher information, which needs a backward
pass. A guess."""

COST_TOKENS = 1024
"""Largest number of tokens on which a layer's costs are measured. A guess."""

READ_TOKENS = 2048
"""Largest number of tokens on which it is counted what the whole model reads at each place of the path. A guess."""

NOMINAL = (0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2, 0.16, 0.12, 0.08, 0.05)
"""Shares of bytes at which the path is fixed; between them, settings are interpolated. About evenly spaced as
logarithms, where quality changes fast."""


def set_budget(
    model: nn.Module,
    bytes: float,  # the unit that the share is of
    batches: Any = None,
    *,
    tokenizer: Any = None,
    start_tau: float = 1.0,
    progress: bool = True,
) -> float:
    """Have a token read a share of its FFNs' bytes, by tau and both thresholds of every layer, where it costs least.

    With ``batches``, the path is measured: for each layer what its settings save and cost (the second-order estimate
    of the loss, :mod:`torch_prunepath.experts.budget`), for all layers together the settings at which the last byte
    saved costs the same in each, from the whole model down. The path stays with the model, and in its checkpoints, so
    that later calls need no data. ``set_tau`` and ``set_thresholds`` change settings apart from it.

    Args:
        model: a sparse model.
        bytes: share of the bytes of all FFNs' weights that a token is to read on average, routers included, in (0, 1].
            At 1 every layer has tau ``start_tau`` and no thresholds, and reads its router as well.
        batches: token ids ``[B, T]``, dicts of model inputs, texts with ``tokenizer``, or an iterable of these; a few
            thousand tokens are used. None takes the path that was measured before.
        tokenizer: for texts.
        start_tau: tau at the path's beginning, in (0, 1]; nothing counts as lost there. 1 suits a model that was made
            sparse without training; a model trained at a tau may begin at that one.
        progress: show progress bars.

    Returns:
        The share that was read at this place of the path on the data that it was measured on.

    Raises:
        ValueError: if the share or tau is out of range, or so small that no setting reads so little; if there is no
            path and no data; if the data does not fit; or if the model holds no sparse FFN. Settings are as they were.
    """
    share, start_tau = check_bytes(bytes), check_tau(start_tau)
    layers, views = sparse_layers(model), sparse_views(model)
    if batches is None:
        knots = stored_path(layers)
    else:
        for name, layer in layers.items():
            check_readable(name, layer, views[name])
        inputs = as_inputs(batches, model, tokenizer, PATH_TOKENS)
        with _restoring(layers, views):
            knots = _measured_path(model, layers, views, inputs, start_tau, progress)
    place = _place_of(share, [knot.bytes for knot in next(iter(knots.values()))])
    found = {name: _between(path, place) for name, path in knots.items()}
    for name, knot in found.items():
        layers[name].path = knots[name]
        _write(layers[name], views[name], Setting(knot.tau, knot.theta_x, knot.theta_h))
    refresh(model)
    return next(iter(found.values())).bytes


def stored_path(layers: Mapping[str, RoutedExperts]) -> dict[str, tuple[Knot, ...]]:
    """The path that was measured before, layer by layer.

    Raises:
        ValueError: if there is none, or layers come from paths that were measured apart.
    """
    paths = {name: layer.path for name, layer in layers.items()}
    if not all(paths.values()):
        raise ValueError("the model has no path yet: pass batches to set_budget once, some text like that it will read")
    if len({tuple(knot.bytes for knot in path or ()) for path in paths.values()}) > 1:
        raise ValueError("the layers' paths were not measured together: pass batches to set_budget again")
    return {name: path for name, path in paths.items() if path}


def _place_of(share: float, read: list[float]) -> float:
    """Place on the path, in knots, where a share is read; ``read`` falls from knot to knot."""
    if share >= min(1.0, read[0]):  # with its router, a whole layer reads more than 1
        return 0.0
    for i, (more, less) in enumerate(itertools.pairwise(read)):
        if share >= less:
            return i + (more - share) / (more - less)
    raise ValueError(
        f"{share:g} of the bytes is out of reach: the least that this model can read is {read[-1]:.3g}; experts of "
        "another size, or training, may need less"
    )


def _between(path: tuple[Knot, ...], place: float) -> Knot:
    here, share = int(place), place % 1
    return path[here] if not share else towards(path[here], path[here + 1], share)


def _write(layer: RoutedExperts, view: FFNView, setting: Setting) -> None:
    with torch.no_grad():
        layer.tau.fill_(setting.tau)
    if setting.theta_x or setting.theta_h or float(layer.theta_x) or float(layer.theta_h):
        write_thresholds(layer, view, setting.theta_x, setting.theta_h)


@contextlib.contextmanager
def _restoring(layers: Mapping[str, RoutedExperts], views: Mapping[str, FFNView]) -> Iterator[None]:
    """Give every layer its settings back at the end, and take away the norms that it had no use for before."""
    before = {n: Setting(float(v.tau), float(v.theta_x), float(v.theta_h)) for n, v in layers.items()}
    keepers = [keeper for name, layer in layers.items() for keeper in norm_keepers(layer, views[name])]
    without = [keeper for keeper in keepers if not keeper.has_norms]
    try:
        yield
    finally:
        for name, setting in before.items():
            _write(layers[name], views[name], setting)
        for keeper in without:
            forget_norms(keeper)


# --- measuring --------------------------------------------------------------------------------------------------------


def _measured_path(
    model: nn.Module,
    layers: Mapping[str, RoutedExperts],
    views: Mapping[str, FFNView],
    inputs: Inputs,
    start_tau: float,
    progress: bool,
) -> dict[str, tuple[Knot, ...]]:
    whole = dict.fromkeys(layers, Setting(start_tau, 0.0, 0.0))
    for name, setting in whole.items():
        _write(layers[name], views[name], setting)
    paths = _layer_paths(model, layers, views, inputs, start_tau, progress)
    sizes = {name: float(sum(view.num_bytes)) for name, view in views.items()}
    steps = [whole]
    for target in NOMINAL:
        with contextlib.suppress(ValueError):  # beyond the ends of all paths
            steps.append(shared_out(paths, sizes, target))
    steps.append({name: path[-1].setting for name, path in paths.items()})
    some = single_rows(inputs, model, READ_TOKENS)
    read: list[float] = []
    kept: list[dict[str, Setting]] = []
    for settings in progress_bar(steps, desc="measuring bytes", unit="setting", progress=progress):
        for name, setting in settings.items():
            _write(layers[name], views[name], setting)
        share = _bytes_read(model, some)
        if not read or share < read[-1]:
            read.append(share)
            kept.append(settings)
    return {
        name: tuple(Knot(share, *settings[name]) for share, settings in zip(read, kept, strict=True)) for name in layers
    }


def _layer_paths(
    model: nn.Module,
    layers: Mapping[str, RoutedExperts],
    views: Mapping[str, FFNView],
    inputs: Inputs,
    start_tau: float,
    progress: bool,
) -> dict[str, list[Point]]:
    paths: dict[str, list[Point]] = {}
    every = list(views.values())
    with eagerly():
        fisher = fisher_information(model, every, inputs, progress=progress)
    bar = progress_bar(total=len(every), desc="weighing bytes", unit="layer", progress=progress)
    with eagerly(), bar:

        def visit(view: FFNView, x_ND: Tensor) -> None:
            x_ND = x_ND[spread(len(x_ND), min(len(x_ND), COST_TOKENS)).to(x_ND.device)]
            paths[view.site] = layer_path(LayerCosts(view, layers[view.site], x_ND, fisher[view.site], start_tau))
            bar.update()

        visit_inputs(model, every, inputs, visit)
    return paths


@torch.no_grad()
def _bytes_read(model: nn.Module, rows: Sequence[Inputs]) -> float:
    """Share of the FFNs' bytes that the model reads as it is set."""
    with evaluating(model), eagerly(), record_sparsity(model, front_tokens=front_of(rows)) as record:
        for row in rows:
            model(**quiet(model, row))
    return record.shares.bytes
