"""The thresholds on inputs and on neurons inside active experts: set by value, or by the share that they leave out.

What they mean is defined in :mod:`torch_prunepath.select`. Shapes: T tokens, D hidden size, F neurons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.config import LARGEST_THRESHOLD, check_threshold
from torch_prunepath.inputs.data import Inputs, evaluating, iterate_inputs
from torch_prunepath.inputs.front import for_model, front_of
from torch_prunepath.inputs.padding import PaddingTracker
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.hooks import eagerly
from torch_prunepath.layer.saving import refresh
from torch_prunepath.layer.sparse import Neurons, recording
from torch_prunepath.layer.views import (
    check_readable,
    one_a_layer,
    recording_neurons,
    sparse_layers,
    sparse_views,
    write_thresholds,
)
from torch_prunepath.progress import progress_bar
from torch_prunepath.quantiles import Sample

Value = float | Sequence[float] | Mapping[str, float]
"""One number for all layers, one a layer in module order, or some layers' by name."""

TINY = float(torch.finfo(torch.float32).tiny)
"""The least threshold of a share above 0: entries that are exactly 0, of which relu leaves many, cost nothing."""

SAMPLED = 1 << 20
"""Most magnitudes of a layer that quantiles are taken of: 4 MB. A share of half is then known to 0.0005."""


def set_thresholds(model: nn.Module, *, inputs: Value | None = None, neurons: Value | None = None) -> None:
    """Leave out inputs and neurons of active experts that are small, in place.

    Channel d of a token is read by gate and up (or fc1) iff ``|x_d| * c_d >= inputs``, where ``c_d`` is the norm of
    column d of [gate; up]. Neuron f of an active expert is read by down (or fc2) iff ``|h_f| * ||down_f|| >= neurons``.
    0 leaves nothing out. Biases always count, and the router reads all of x.

    The first call for a layer computes the norms of its weights, and compiled code is compiled once more; from then
    on any value, 0 included, serves without another compilation.

    Args:
        model: a sparse model.
        inputs: the threshold on inputs; None leaves it as it is.
        neurons: the threshold on neurons; None leaves it as it is.

    Raises:
        ValueError: if a value is no number of at least 0, a sequence's length is wrong, a name is unknown, both are
            None, or the weights of a layer cannot be read (quantised, sharded or on the meta device). No layer is
            changed.
    """
    layers, views = sparse_layers(model), sparse_views(model)
    if inputs is None and neurons is None:
        raise ValueError("nothing to set: give inputs=, neurons=, or both; 0 leaves nothing out")
    theta_x = _values(layers, inputs, check_threshold, "inputs")
    theta_h = _values(layers, neurons, check_threshold, "neurons")
    named = [name for name in layers if name in theta_x or name in theta_h]
    for name in named:
        check_readable(name, layers[name], views[name])
    for name in named:
        write_thresholds(layers[name], views[name], theta_x.get(name), theta_h.get(name))
    refresh(model)


def check_share(value: Any) -> float:
    """Return the share that a threshold leaves out as a float.

    Raises:
        ValueError: if it is no number in [0, 1).
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < 1:
        raise ValueError(f"a share to leave out must be a number in [0, 1), not {value!r}: 0 leaves nothing out")
    return float(value)


def _values(layers: Mapping[str, Any], value: Any, check: Any, of: str) -> dict[str, float]:
    if value is None:
        return {}
    values = one_a_layer(layers, value, check, of)
    return dict.fromkeys(layers, check(value)) if values is None else values


@contextlib.contextmanager
def without_thresholds(model: nn.Module) -> Iterator[None]:
    """Let every input and every neuron count while the context is open."""
    thetas = [theta for layer in sparse_layers(model).values() for theta in (layer.theta_x, layer.theta_h)]
    before = [float(theta) for theta in thetas]
    try:
        for theta in thetas:
            theta.zero_()
        yield
    finally:
        for theta, value in zip(thetas, before, strict=True):
            theta.fill_(value)


def set_threshold_shares(
    model: nn.Module,
    batches: Any,
    *,
    inputs: Value | None = None,
    neurons: Value | None = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> None:
    """Set thresholds so that they leave out given shares on ``batches``: one pass over them for each kind.

    Inputs are measured first, on the model with its tau and no thresholds; then neurons of active experts, with the
    thresholds on inputs in force. Padding does not count. As the hidden states of later layers change with what earlier
    ones leave out, the realised shares differ a little: :func:`torch_prunepath.record_sparsity` tells them.

    Args:
        model: a sparse model.
        batches: token ids ``[B, T]``, dicts of model inputs, an iterable of either, or texts with ``tokenizer``.
        inputs: share of inputs to leave out, in [0, 1); or shares of layers, as for :func:`set_thresholds`. None
            leaves thresholds on inputs as they are.
        neurons: share of the neurons of active experts to leave out, likewise.
        tokenizer: for texts.
        progress: show a progress bar.

    Raises:
        ValueError: if a share is outside [0, 1), both are None, the data does not fit, or :func:`set_thresholds`
            cannot set thresholds. Thresholds are as they were.
    """
    layers = sparse_layers(model)
    if inputs is None and neurons is None:
        raise ValueError("nothing to set: give inputs=, neurons=, or both; 0 leaves nothing out")
    share_x = _values(layers, inputs, check_share, "inputs")
    share_h = _values(layers, neurons, check_share, "neurons")
    data = list(iterate_inputs(batches, model, tokenizer))
    before = {name: (float(layer.theta_x), float(layer.theta_h)) for name, layer in layers.items()}
    passes = len(data) * (bool(share_x) + bool(share_h))
    with progress_bar(total=passes, desc="finding thresholds", unit="batch", progress=progress) as bar:
        try:
            if share_h:
                set_thresholds(model, neurons=dict.fromkeys(share_h, 0.0))
            if share_x:
                set_thresholds(model, inputs=dict.fromkeys(share_x, 0.0))
                set_thresholds(model, inputs=_thresholds(share_x, _input_samples(model, data, bar)))
            if share_h:
                set_thresholds(model, neurons=_thresholds(share_h, _neuron_samples(model, data, bar)))
        except BaseException:
            for name, (theta_x, theta_h) in before.items():
                layers[name].theta_x.fill_(theta_x)
                layers[name].theta_h.fill_(theta_h)
            refresh(model)
            raise


def _thresholds(shares: Mapping[str, float], samples: Mapping[str, Sample]) -> dict[str, float]:
    found = {}
    for name, share in shares.items():
        quantiles = samples[name].quantiles()
        if quantiles is None:
            raise ValueError(
                f"{name} saw no token of these batches: give data that runs every FFN, and not padding alone"
            )
        found[name] = min(max(quantiles.threshold(share), TINY), LARGEST_THRESHOLD) if share > 0 else 0.0
    return found


class _InputWatch:
    """A recorder that samples one layer's inputs as their threshold compares them."""

    def __init__(self, tracker: PaddingTracker) -> None:
        self.sample, self._tracker = Sample(SAMPLED), tracker

    def note(
        self, layer: RoutedExperts, x_TD: Tensor, scores_TE: Tensor, mask_TE: Tensor, shape: tuple[int, ...]
    ) -> None:
        threshold, keep_T = layer.inputs_threshold, self._tracker.keep(shape)
        if threshold is not None:
            self.sample.add((x_TD if keep_T is None else x_TD[keep_T]).float() * threshold.norm_N)


class _NeuronWatch:
    """A recorder that samples the neurons of one layer's active experts as their threshold compares them."""

    def __init__(self, tracker: PaddingTracker) -> None:
        self.sample, self._tracker = Sample(SAMPLED), tracker

    def note_neurons(self, neurons: Neurons) -> None:
        keep_T, active_TF = self._tracker.keep(neurons.shape), neurons.active_TF
        active_TF = active_TF if keep_T is None else active_TF & keep_T.unsqueeze(-1)
        self.sample.add((neurons.h_TF.float() * neurons.threshold.norm_N)[active_TF])


def _input_samples(model: nn.Module, data: Sequence[Inputs], bar: Any) -> dict[str, Sample]:
    """Magnitudes of inputs by layer."""
    with PaddingTracker(model, front_of(data)) as tracker, contextlib.ExitStack() as stack:
        watches = {name: _InputWatch(tracker) for name in sparse_layers(model)}
        for name, layer in sparse_layers(model).items():
            stack.enter_context(recording(layer, watches[name]))
        _run(model, data, bar)
    return {name: watch.sample for name, watch in watches.items()}


def _neuron_samples(model: nn.Module, data: Sequence[Inputs], bar: Any) -> dict[str, Sample]:
    """Magnitudes of the neurons of active experts, by layer."""
    views = sparse_views(model)
    with PaddingTracker(model, front_of(data)) as tracker, contextlib.ExitStack() as stack:
        watches = {name: _NeuronWatch(tracker) for name in views}
        for name, layer in sparse_layers(model).items():
            stack.enter_context(recording_neurons(layer, views[name], watches[name]))
        _run(model, data, bar)
    return {name: watch.sample for name, watch in watches.items()}


@torch.no_grad()
def _run(model: nn.Module, data: Sequence[Inputs], bar: Any) -> None:
    with evaluating(model), eagerly():
        for batch in data:
            model(**for_model(batch))
            bar.update()
