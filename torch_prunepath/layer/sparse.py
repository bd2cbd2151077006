"""The sparse FFN: an existing module whose class is swapped, so that names, shapes and state-dict keys stay.

A whole FFN becomes a :class:`SparseFFN`. Where a model keeps fc1 and fc2 apart (OPT, BERT, Bloom), fc1 becomes a
:class:`SparseUp` and fc2 a :class:`SparseDown`, and the model's own forward runs between them.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_prunepath.config import FFNSpec, Gate, Rule, SparsifyConfig, num_experts
from torch_prunepath.layer.ffn import FFNView, bias_of, is_subclass, site_name, weight_out_in
from torch_prunepath.layer.handoff import Chosen, Handoff
from torch_prunepath.layer.norms import KeepsNorms, column_norms, row_norms
from torch_prunepath.layer.projections import (
    down,
    down_by_modules,
    down_of,
    is_idle,
    is_plain,
    is_watched,
    runs_here_and_now,
    up,
    up_by_modules,
    up_of,
)
from torch_prunepath.layer.router import Router
from torch_prunepath.ops.cpu import ffn as cpu
from torch_prunepath.ops.cpu.packs import Packs
from torch_prunepath.ops.experts import expand_experts, weigh, zero_inactive
from torch_prunepath.ops.operators import select_experts
from torch_prunepath.ops.sparse_ffn import arguments, sparse_ffn
from torch_prunepath.ops.transforms import is_transformed, transformable
from torch_prunepath.select import keep_counted, sigmoid_weights
from torch_prunepath.weights import EVERYTHING, Selector, Threshold, Thresholds, UpWeights


@dataclass(frozen=True)
class ExpertsSpec:
    """How a sparse FFN routes.

    Attributes:
        expert_size: S.
        rule: ``"reach"`` or ``"below"``, see :func:`torch_prunepath.select.select_experts`.
        gate: the weight of an active expert's output: ``"sigmoid"`` of its score, or ``"one"``.
        gate_offset: the constant inside the sigmoid.
        shared: so many experts, the first ones, are always active with weight 1; the router chooses among the others.
    """

    expert_size: int
    rule: Rule = "reach"
    gate: Gate = "one"
    gate_offset: float = 0.0
    shared: int = 0


class Knot(NamedTuple):
    """A place on the path along which a model's budget moves; see :func:`torch_prunepath.set_budget`.

    Attributes:
        bytes: share of all FFNs' bytes that a token reads there.
        tau, theta_x, theta_h: what the layer is set to there.
    """

    bytes: float
    tau: float
    theta_x: float
    theta_h: float


@dataclass(frozen=True)
class Routing:
    """What one layer's router chose in one call; given to routing hooks.

    Attributes:
        name: qualified name of the sparse layer.
        x_TD: the layer's input, flattened to tokens.
        scores_TE: float32 router scores.
        mask_TE: bool, the active experts.
        shape: the input's leading dimensions, usually (batch, sequence); their product is T.
    """

    name: str
    x_TD: Tensor
    scores_TE: Tensor
    mask_TE: Tensor
    shape: tuple[int, ...]


RoutingHook = Callable[[Routing], Tensor | None]


@dataclass(frozen=True)
class Neurons:
    """What one layer's neurons answered in one call, before their threshold.

    Attributes:
        h_TF: hidden activations, before their experts' weights.
        active_TF: bool, those of active experts.
        threshold: which of them count.
        shape: the activations' leading dimensions, usually (batch, sequence); their product is T.
    """

    h_TF: Tensor
    active_TF: Tensor
    threshold: Threshold
    shape: tuple[int, ...]


class NeuronRecorder(Protocol):
    """Watches the neurons of a layer that has a threshold on them; torch.compile traces it with the layer."""

    def note_neurons(self, neurons: Neurons) -> None:
        """Take notice of what they answered."""


Norms = Mapping[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]
"""Norms by name: the function that computes each, and the weights that it is computed of."""

SelectionRule = Callable[[Tensor, Tensor], Tensor]
"""A function ``(scores_TE, tau) -> mask_TE`` of tensor operations alone: torch.compile traces it, once for all."""


class Recorder(Protocol):
    """Watches a layer like a routing hook, but changes nothing; torch.compile traces it with the layer."""

    def note(
        self, layer: RoutedExperts, x_TD: Tensor, scores_TE: Tensor, mask_TE: Tensor, shape: tuple[int, ...]
    ) -> None:
        """Take notice of a selection."""


def recording(layer: RoutedExperts, recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """Inside the context the layer tells the recorder what it does."""
    return listed(layer, "recorders", recorder)


@contextlib.contextmanager
def listed(module: nn.Module, name: str, recorder: object) -> Iterator[None]:
    """Inside the context, the recorder is in the module's tuple of this name, which is empty by default."""
    setattr(module, name, (*getattr(module, name), recorder))
    try:
        yield
    finally:
        others = tuple(each for each in getattr(module, name) if each is not recorder)
        if others:
            setattr(module, name, others)
        else:  # as it was, also for what torch.compile knows of the layer
            module.__dict__.pop(name, None)


class Swapped(nn.Module):
    """A module whose class was swapped for one made at run time; pickle and deepcopy rebuild the class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        dense, kind = bases_of(type(self))
        return _blank, (dense, kind), self.__dict__.copy()


class RoutedExperts(KeepsNorms, Swapped):
    """What every sparse layer has: a router, tau, thresholds, the permutation of its neurons, and hooks.

    ``theta_x`` and ``theta_h`` are the thresholds on inputs and on neurons, see :mod:`torch_prunepath.select`; without
    norms (``has_norms``) nobody has set them yet, and nothing is compared with them.

    Never built by itself: :func:`torch_prunepath.layer.swap.make_routed` mixes it into the class of an existing module.
    """

    ffn: FFNSpec
    experts: ExpertsSpec
    router: Router
    permutation: Tensor
    tau: Tensor
    theta_x: Tensor
    theta_h: Tensor
    column_norm_D: Tensor
    budget: float
    made_with: SparsifyConfig | None = None  # an adapter's config has it instead
    routing_hooks: OrderedDict[int, RoutingHook]
    path: tuple[Knot, ...] | None = None  # what set_budget measured
    recorders: tuple[Recorder, ...] = ()
    neuron_recorders: tuple[NeuronRecorder, ...] = ()
    selection: SelectionRule | None = None  # in the place of experts.rule

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Models that were pickled before there were thresholds.
        for name in ("theta_x", "theta_h"):
            if "tau" in self._buffers and name not in self._buffers:
                self.register_buffer(name, torch.zeros_like(self.tau), persistent=False)

    @property
    def name(self) -> str:
        """Qualified name of this layer in the model that was made sparse."""
        return site_name(self.ffn)

    @property
    def num_experts(self) -> int:
        """How many experts there are, E."""
        return num_experts(self.ffn.ffn_size, self.experts.expert_size)

    @property
    def router_norm(self) -> bool:
        """Whether the router reads tokens divided by their root mean square; adapters around it do not."""
        return getattr(self.router, "base_layer", self.router).router_norm

    def route(self, x_TD: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Active experts, bool ``[T, E]``, and their outputs' weights, float32 ``[T, E]``, or None where all are 1."""
        scores_TE = self.router(x_TD)
        experts = self.experts
        if self.selection is None:
            mask_TE = transformable(select_experts)(scores_TE, self.tau, experts.rule, experts.shared)
        else:
            mask_TE = self.selection(scores_TE.detach(), self.tau)
        for hook in self.routing_hooks.values():
            replaced = hook(Routing(self.name, x_TD, scores_TE, mask_TE, shape))
            if replaced is not None:
                mask_TE = _checked_mask(self.name, replaced, mask_TE)
        for recorder in self.recorders:
            recorder.note(self, x_TD, scores_TE, mask_TE, shape)
        if experts.gate == "one":
            return mask_TE, None
        return mask_TE, sigmoid_weights(scores_TE, experts.gate_offset, experts.shared)

    @property
    def inputs_threshold(self) -> Threshold | None:
        """Which inputs count; None where no threshold was ever set."""
        return Threshold(self.theta_x, self.norm("column_norm_D")) if self.has_norms else None

    def routed(self, values_TE: Tensor) -> Tensor:
        """Leave out the columns of shared experts, among which the router does not choose."""
        return values_TE[:, self.experts.shared :] if self.experts.shared else values_TE

    def inactive_neurons(self, mask_TE: Tensor) -> Tensor:
        """How many of the layer's neurons are inactive for each token, int64 ``[T]``, if ``mask_TE`` is active."""
        size, inactive_TE = self.experts.expert_size, ~mask_TE
        missing = self.num_experts * size - self.ffn.ffn_size  # of the last expert, which may be smaller
        return inactive_TE.sum(-1) * size - inactive_TE[:, -1] * missing

    def register_routing_hook(self, hook: RoutingHook) -> RemovableHandle:
        """Call ``hook(routing)`` after every selection; a bool ``[T, E]`` that it returns replaces the mask."""
        handle = RemovableHandle(self.routing_hooks)
        handle.id = max(self.routing_hooks, default=-1) + 1  # alike in all layers, for torch.compile
        self.routing_hooks[handle.id] = hook
        return handle

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise ValueError(
            "nn.DataParallel cannot copy a sparse layer: its replicas would share hooks and hand-offs between threads; "
            "use DistributedDataParallel, one process for each device"
        )


def _checked_mask(name: str, replaced: Tensor, mask_TE: Tensor) -> Tensor:
    if replaced.shape != mask_TE.shape or replaced.dtype != torch.bool:
        raise ValueError(
            f"{name}: a routing hook must return None or a bool mask of shape {tuple(mask_TE.shape)}, "
            f"not {replaced.dtype} {tuple(replaced.shape)}"
        )
    return replaced


class SparseFFN(RoutedExperts):
    """A whole FFN that computes only the experts its router chooses."""

    row_norm_F: Tensor
    projection_types: tuple[type, ...]  # of the modules that discovery found to compute a linear layer
    packs: Packs | None = None  # a user may give one

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The FFN's output: ``[..., D] -> [..., D]``."""
        shape = hidden_states.shape
        x_TD = hidden_states.reshape(-1, shape[-1])
        view = FFNView.of_owner(self, self.ffn)
        if self._takes_one_operator(view, x_TD):
            return self._forward_at_once(view, x_TD).reshape(shape)
        mask_TE, weights_TE = self.route(x_TD, shape[:-1])
        # In training, what the operators would compute again for the gradient is kept, as in a dense model.
        apart = not (self.training and torch.is_grad_enabled())
        run_up, run_down = (up, down) if apart else (up_by_modules, down_by_modules)
        inputs, neurons = self.thresholds
        h_TF = run_up(view, x_TD, mask_TE, self.ffn.activation, self.experts.expert_size, inputs)
        if self.ffn.hidden_dropout is not None:
            h_TF = self.get_submodule(self.ffn.hidden_dropout)(h_TF)
        if neurons is not None:
            for recorder in self.neuron_recorders:
                active_TF = expand_experts(mask_TE, self.experts.expert_size, self.ffn.ffn_size)
                recorder.note_neurons(Neurons(h_TF, active_TF, neurons, shape[:-1]))
        y_TD = run_down(view, h_TF, mask_TE, weights_TE, self.experts.expert_size, neurons)
        if isinstance(self.ffn.output_dropout, float):
            y_TD = nnf.dropout(y_TD, self.ffn.output_dropout, self.training)
        elif self.ffn.output_dropout is not None:
            y_TD = self.get_submodule(self.ffn.output_dropout)(y_TD)
        return y_TD.reshape(shape)

    @property
    def thresholds(self) -> Thresholds:
        """Which inputs and neurons count; all where no threshold was ever set."""
        if not self.has_norms:
            return EVERYTHING
        return Thresholds(self.inputs_threshold, Threshold(self.theta_h, self.norm("row_norm_F")))

    def weights_with_norms(self) -> Norms:
        """What thresholds compare with: norms of columns of [gate; up], and of down's rows."""
        view = FFNView.of_owner(self, self.ffn)
        first = [weight_out_in(module) for module in (view.up, view.gate) if module is not None]
        return {"column_norm_D": (column_norms, tuple(first)), "row_norm_F": (row_norms, (view.down_FD,))}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.packs is not None:
            self.packs.clear()
        return super()._apply(fn, recurse)

    def _takes_one_operator(self, view: FFNView, x_TD: Tensor) -> bool:
        """Whether nobody needs more than the output: no gradient, hook, dropout or other method's rule."""
        return (
            not torch.is_grad_enabled()
            and not self.training
            and len(self.recorders) == 0  # torch.compile cannot negate a tuple
            and len(self.neuron_recorders) == 0
            and self.selection is None
            and not list(self.routing_hooks)  # listed, so that torch.compile notices a later hook
            and type(self.router) is Router
            and not is_watched(self.router)
            and is_plain(view, view.up, view.gate, view.down)
            and all(is_idle(self, name) for name in (self.ffn.hidden_dropout, self.ffn.output_dropout))
            and x_TD.dtype == weight_out_in(view.up).dtype == weight_out_in(view.down).dtype
            and not torch.is_autocast_enabled(x_TD.device.type)
            and not is_transformed()
        )

    def _forward_at_once(self, view: FFNView, x_TD: Tensor) -> Tensor:
        experts, router = self.experts, self.router
        offset = None if experts.gate == "one" else experts.gate_offset
        selector = Selector(
            router.weight, router.bias, self.tau, experts.rule, offset, router.router_norm, experts.shared
        )
        ffn = (x_TD, selector, view.weights, self.ffn.activation, experts.expert_size, self.thresholds)
        # The operator's dispatch costs as much as a small layer's projection.
        if runs_here_and_now(x_TD):
            return cpu.sparse_ffn(*ffn, self.packs)
        return sparse_ffn(*arguments(*ffn))


class SparseUp(RoutedExperts):
    """fc1 of an FFN whose two layers a model calls apart; also holds the router. Inactive neurons come out as 0."""

    handoff: Handoff

    def forward(self, x: Tensor) -> Tensor:
        """Output of fc1: ``[..., D] -> [..., F]``, or ``[..., 2F]`` if gate and up are fused."""
        shape = x.shape
        x_TD = x.reshape(-1, shape[-1])
        mask_TE, weights_TE = self.route(x_TD, shape[:-1])
        self.handoff.routing = Chosen(mask_TE, weights_TE, self.theta_h if self.has_norms else None)
        inputs = self.inputs_threshold
        if is_subclass(self.weight):
            h_TF = super().forward(keep_counted(x_TD, inputs))
            width = self.ffn.ffn_size
            halves_TF = [zero_inactive(half_TF, mask_TE, self.experts.expert_size) for half_TF in h_TF.split(width, -1)]
            return torch.cat(halves_TF, dim=-1).reshape(*shape[:-1], h_TF.shape[-1])
        rows, bias = weight_out_in(self), bias_of(self)
        # Fused gate and up: two FFN widths under one mask.
        halves = [(rows, bias)]
        if self.ffn.fused is not None:
            biases = (None, None) if bias is None else bias.chunk(2)
            halves = list(zip(rows.chunk(2), biases, strict=True))
        size = self.experts.expert_size
        h = torch.cat([up_of(x_TD, mask_TE, UpWeights(w, b), "none", size, inputs) for w, b in halves], dim=-1)
        return h.reshape(*shape[:-1], h.shape[-1])

    def weights_with_norms(self) -> Norms:
        """What the threshold on inputs compares with: norms of columns of fc1, gate included if it is fused."""
        return {"column_norm_D": (column_norms, (weight_out_in(self),))}


class SparseDown(KeepsNorms, Swapped):
    """fc2 of an FFN whose two layers a model calls apart."""

    row_norm_F: Tensor
    handoff: Handoff
    expert_size: int
    neuron_recorders: tuple[NeuronRecorder, ...] = ()

    def forward(self, h: Tensor) -> Tensor:
        """Output of fc2: ``[..., F] -> [..., D]``."""
        routing = self.handoff.take()
        assert routing is not None, "fc2 was called before its fc1"
        mask_TE, weights_TE, theta_h = routing
        h_TF, neurons = h.reshape(-1, h.shape[-1]), None
        if theta_h is not None:
            neurons = Threshold(theta_h, self.norm("row_norm_F"))
            for recorder in self.neuron_recorders:
                active_TF = expand_experts(mask_TE, self.expert_size, h_TF.shape[1])
                recorder.note_neurons(Neurons(h_TF, active_TF, neurons, h.shape[:-1]))
        if is_subclass(self.weight):
            h_TF = keep_counted(zero_inactive(h_TF, mask_TE, self.expert_size), neurons)
            y_TD: Tensor = super().forward(weigh(h_TF, weights_TE, self.expert_size))
        else:
            y_TD = down_of(self, h_TF, mask_TE, weights_TE, self.expert_size, neurons)
        return y_TD.reshape(*h.shape[:-1], y_TD.shape[-1])

    def weights_with_norms(self) -> Norms:
        """What the threshold on neurons compares with: norms of the rows of fc2."""
        return {"row_norm_F": (row_norms, (weight_out_in(self).t(),))}


# --- swapping classes -------------------------------------------------------------------------------------------------


@functools.cache
def sparse_class(dense: type, kind: type) -> type:
    """The class ``kind`` mixed over ``dense``: one for each pair, so that ``type(a) is type(b)`` for like layers."""
    return type(f"{kind.__name__}[{dense.__name__}]", (kind, dense), {"__module__": __name__, "__doc__": kind.__doc__})


def bases_of(sparse: type) -> tuple[type, type]:
    """The dense class and the kind that :func:`sparse_class` made a class of."""
    kind, dense = sparse.__bases__
    return dense, kind


def _blank(dense: type, kind: type) -> nn.Module:
    """An instance without state, for pickle and deepcopy: the class has no importable name of its own."""
    cls = sparse_class(dense, kind)
    return cls.__new__(cls)  # type: ignore[no-any-return, call-overload]


def is_sparse(module: nn.Module) -> bool:
    """Whether ``module`` is a sparse layer (or the second half of one)."""
    return isinstance(module, Swapped)
