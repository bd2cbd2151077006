"""What the ``prunepath`` backend does to a graph before Inductor lowers it: an ordered list of passes.

A pass takes a functional graph of aten operators, whose nodes carry fake tensors in ``meta["val"]``, edits it in place,
and returns how many places it changed. Every pass is right by itself, so each can be switched off by name.

Shapes: T tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_prunepath.compile.decoding import fuse_linears, share_heads
from torch_prunepath.compile.graph import (
    Operator,
    arguments,
    aten,
    behind_reshapes,
    calls,
    calls_to,
    erase,
    overload,
    replace_call,
    same_shape,
    same_tensor,
    skip_reshapes,
    used_only_by,
)
from torch_prunepath.compile.inline import inline
from torch_prunepath.csrc_triton import UNION_TOKENS
from torch_prunepath.ops import operators as ops
from torch_prunepath.ops.sparse_ffn import sparse_ffn

Pass = Callable[[fx.Graph, bool], int]
"""A function ``(graph, training) -> places changed``; ``training``: whether gradients are taken through the graph."""

log = logging.getLogger(__name__)


def run_passes(graph: fx.Graph, names: Iterable[str], training: bool) -> None:
    """Apply the passes of these names to ``graph``, in place."""
    for name in names:
        changes = PASSES[name](graph, training)
        log.debug("pass %s changed %d places", name, changes)
    graph.lint()


# --- fuse_relu --------------------------------------------------------------------------------------------------------


def fuse_relu(graph: fx.Graph, training: bool) -> int:
    """Let ``expert_up`` take in the relu that a model itself calls between the halves of its FFN."""
    return sum(_fuse_relu(graph, down) for down in calls_to(graph, ops.expert_down))


def _fuse_relu(graph: fx.Graph, down: fx.Node) -> bool:
    between: set[fx.Node] = set()
    h = arguments(down)["h_TF"]
    relu = skip_reshapes(h, between)
    if not isinstance(relu, fx.Node) or not calls(relu, aten.relu.default):
        return False
    between.add(relu)
    up = skip_reshapes(relu.args[0], between)
    if not isinstance(up, fx.Node) or not calls(up, overload(ops.expert_up)):
        return False
    if not same_shape(up, h) or not used_only_by([up, *between], down):
        return False
    named = arguments(up)
    if named["activation"] != "none":
        return False
    fused = replace_call(graph, up, ops.expert_up, tuple((named | {"activation": "relu"}).values()))
    down.replace_input_with(h, fused)
    erase(graph, between)
    return True


# --- inline_dense -----------------------------------------------------------------------------------------------------


def inline_dense(graph: fx.Graph, training: bool) -> int:
    """Show Inductor the masking, activation and weighing where all neurons are computed anyway, so that it fuses them.

    That is in backward graphs, and in forward graphs of more than ``UNION_TOKENS`` tokens. If their number is not
    known when the graph is compiled, then in graphs for training.
    """
    changes = 0
    for op in (ops.expert_up, ops.expert_down, ops.expert_up_backward, ops.expert_down_backward):
        backward = op in (ops.expert_up_backward, ops.expert_down_backward)
        for node in calls_to(graph, op):
            if backward or _many_tokens(node, training):
                inline(graph, node, op)
                changes += 1
    return changes


def _many_tokens(node: fx.Node, training: bool) -> bool:
    T = node.meta["val"].shape[0]
    if isinstance(T, int):
        return T > UNION_TOKENS
    return training or statically_known_true(T > UNION_TOKENS)


# --- fuse_ffn ---------------------------------------------------------------------------------------------------------


def fuse_ffn(graph: fx.Graph, training: bool) -> int:
    """Make one ``sparse_ffn`` of a router, its selection and both halves of an FFN, if nothing else reads between."""
    return sum(_fuse_ffn(graph, down) for down in calls_to(graph, ops.expert_down))


def _fuse_ffn(graph: fx.Graph, down: fx.Node) -> bool:
    interior: set[fx.Node] = set()
    args = _ffn_arguments(down, interior)
    if args is None or not used_only_by(interior, down):
        return False
    replace_call(graph, down, sparse_ffn, args)
    erase(graph, interior)
    return True


def _ffn_arguments(down: fx.Node, interior: set[fx.Node]) -> tuple[Any, ...] | None:
    """The arguments of the ``sparse_ffn`` that ends in ``down``; adds the nodes that it replaces to ``interior``."""
    d = arguments(down)
    up = _behind(d["h_TF"], ops.expert_up, interior)
    selection = _behind(d["mask_TE"], ops.select_experts, interior)
    if up is None or selection is None:
        return None
    u, s = arguments(up), arguments(selection)
    router = _behind(s["scores_TE"], ops.router_scores, interior)
    if router is None or _behind(u["mask_TE"], ops.select_experts, interior) is not selection:
        return None
    r = arguments(router)
    if not same_tensor(u["x_TD"], r["x_TD"]) or u["expert_size"] != d["expert_size"] or u["activation"] == "none":
        return None
    offset = None
    if d["weights_TE"] is not None:
        offset = _gate_offset(d["weights_TE"], router, s["shared"], interior)
        if offset is None:
            return None
    routing = (r["router_ED"], r["router_bias_E"], s["tau"], s["rule"], offset)
    rows = (u["up_FD"], u["up_bias_F"], u["gate_FD"], u["gate_bias_F"], d["down_FD"], d["down_bias_D"])
    how = (u["activation"], u["expert_size"], r["router_norm"], s["shared"])
    thresholds = (u["theta_x"], u["column_norm_D"], d["theta_h"], d["row_norm_F"])
    return (u["x_TD"], *routing, *rows, *how, *thresholds)


def _gate_offset(weights: fx.Node, router: fx.Node, shared: int, interior: set[fx.Node]) -> float | None:
    """The c of ``weights = sigmoid(scores + c)``; None if they are something else, or of other scores.

    With ``shared`` experts, the c of ``select.sigmoid_weights`` of as many.
    """
    routed: object = weights
    if shared:
        padded = behind_reshapes(weights, interior)
        if padded is None or not calls(padded, aten.constant_pad_nd.default) or padded.args[1:] != ([shared, 0], 1.0):
            return None
        interior.add(padded)
        routed = padded.args[0]
    sigmoid = skip_reshapes(routed, interior)
    if not isinstance(sigmoid, fx.Node) or not calls(sigmoid, aten.sigmoid.default):
        return None
    interior.add(sigmoid)
    scores = skip_reshapes(sigmoid.args[0], interior)
    offset: Any = 0.0
    if isinstance(scores, fx.Node) and calls(scores, aten.add.Tensor) and not scores.kwargs:
        interior.add(scores)
        offset = scores.args[1]
        scores = skip_reshapes(scores.args[0], interior)
    if shared:
        if not isinstance(scores, fx.Node) or not _leaves_out(scores, shared) or not same_shape(scores, sigmoid):
            return None
        interior.add(scores)
        scores = behind_reshapes(scores.args[0], interior)
        scores = _uncut(scores, interior)
    found = scores is router and type(offset) in (int, float) and same_shape(router, weights)
    return float(offset) if found else None


def _uncut(node: fx.Node | None, interior: set[fx.Node]) -> fx.Node | None:
    """What ``node`` is a slice of that leaves nothing out: of the tokens, all of them."""
    while calls(node, aten.slice.Tensor) and same_shape(node, node.args[0]):  # type: ignore[union-attr, arg-type]
        assert node is not None
        interior.add(node)
        node = behind_reshapes(node.args[0], interior)
    return node


def _leaves_out(node: fx.Node, shared: int) -> bool:
    """Whether this is ``scores[:, shared:]``."""
    if not calls(node, aten.slice.Tensor) or node.args[1:3] != (1, shared):
        return False
    (_, left), (_, E) = node.meta["val"].shape, node.args[0].meta["val"].shape  # type: ignore[union-attr]
    return statically_known_true(left == E - shared)


def _behind(value: object, op: Operator, interior: set[fx.Node]) -> fx.Node | None:
    """The call of ``op`` that ``value`` is the result of; adds it, and reshapes after it, to ``interior``."""
    node = behind_reshapes(value, interior)
    if node is None or not calls(node, overload(op)):
        return None
    interior.add(node)
    return node


PASSES: Mapping[str, Pass] = MappingProxyType(
    {
        "fuse_relu": fuse_relu,
        "inline_dense": inline_dense,
        "fuse_ffn": fuse_ffn,
        "fuse_linears": fuse_linears,
        "share_heads": share_heads,
    }
)
"""Passes by name, in the order in which they run."""
