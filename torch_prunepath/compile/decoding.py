"""Passes over what surrounds the sparse FFNs where one token is decoded at a time: linear layers and attention."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_prunepath.compile.graph import aten, calls, overload, same_shape, skip_reshapes
from torch_prunepath.csrc_triton import LINEARS_AT_ONCE
from torch_prunepath.ops.linears import linears

# --- fuse_linears -----------------------------------------------------------------------------------------------------


def fuse_linears(graph: fx.Graph, training: bool) -> int:
    """Join the dense linear layers of one token that read it together, in half precision on a CUDA device."""
    if training:
        return 0
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        layer = _linear(node)
        if layer is not None:
            groups.setdefault((skip_reshapes(layer.x, set()), layer.x.meta["val"].shape), []).append(node)
    for nodes in groups.values():
        for start in range(0, len(nodes), LINEARS_AT_ONCE):
            _fuse_linears(graph, nodes[start : start + LINEARS_AT_ONCE])
    return sum(map(len, groups.values()))


class _Linear(NamedTuple):
    """The parts of a call that computes ``x @ weight + bias``."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def _linear(node: fx.Node) -> _Linear | None:
    """The parts of a linear layer that :func:`fuse_linears` takes; None if ``node`` is something else."""
    if node.kwargs:
        return None
    if calls(node, aten.mm.default):
        layer = _Linear(node.args[0], node.args[1], None)  # type: ignore[arg-type]
    elif calls(node, aten.addmm.default):
        layer = _Linear(node.args[1], node.args[2], node.args[0])  # type: ignore[arg-type]
    else:
        return None
    x, weight = layer.x.meta["val"], layer.weight.meta["val"]
    fits = (
        isinstance(x.shape[0], int)
        and x.shape[0] == 1
        and x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.stride(0) == 1  # with each input's weights contiguous (Conv1D) nothing was gained
        and x.dtype == weight.dtype == node.meta["val"].dtype
        and _is_parameter(layer.weight)
        and (layer.bias is None or (_is_parameter(layer.bias) and layer.bias.meta["val"].shape == weight.shape[1:]))
    )
    return layer if fits else None


def _is_parameter(node: fx.Node) -> bool:
    """Whether this is an input of the graph, perhaps transposed."""
    while calls(node, aten.permute.default):
        node = node.args[0]  # type: ignore[assignment]
    return node.op in ("placeholder", "get_attr")


def _fuse_linears(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    layers = [layer for layer in map(_linear, nodes) if layer is not None]
    first = nodes[0]
    for layer in layers:
        for part in _transposes(layer.weight):
            if first < part:
                first.prepend(part)
    args = (layers[0].x, [layer.weight for layer in layers], [layer.bias for layer in layers])
    with graph.inserting_before(first):
        fused = graph.call_function(overload(linears), args)
        fused.meta = {
            "val": [node.meta["val"] for node in nodes],
            "eager_input_vals": (fx.map_arg(args, lambda n: n.meta["val"]), {}),
        }
        for i, node in enumerate(nodes):
            result = graph.call_function(operator.getitem, (fused, i))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result)
    for node in nodes:
        graph.erase_node(node)


def _transposes(weight: fx.Node) -> list[fx.Node]:
    """The transposes between a parameter and its use, in the graph's order."""
    passed = []
    while calls(weight, aten.permute.default):
        passed.append(weight)
        weight = weight.args[0]  # type: ignore[assignment]
    return passed[::-1]


# --- share_heads ------------------------------------------------------------------------------------------------------


def share_heads(graph: fx.Graph, training: bool) -> int:
    """Let attention of one token a sequence read keys and values that several heads share as they are, not repeated.

    That is where PyTorch chose cuDNN, whose attention knows grouped queries (Ainslie et al., arXiv 2305.13245).
    """
    if training:
        return 0
    changes = 0
    for node in graph.find_nodes(op="call_function", target=aten._scaled_dot_product_cudnn_attention.default):
        keys, values = (_unrepeated(node.args[i]) for i in (1, 2))
        if keys is None or values is None or not statically_known_true(node.args[0].meta["val"].shape[2] == 1):  # type: ignore[union-attr]
            continue
        node.update_arg(1, keys)
        node.update_arg(2, values)
        changes += 1
    return changes


def _unrepeated(value: Any) -> fx.Node | None:
    """The ``[B, H, L, D]`` of which ``value`` repeats each head, ``[B, H * repeats, L, D]``; None if it is no such."""
    expand = _skip_copies(value)
    if not calls(expand, aten.expand.default):
        return None
    wide = _skip_copies(expand.args[0], reshapes=False)
    if not calls(wide, aten.unsqueeze.default) or wide.args[1] != 2:
        return None
    heads: fx.Node = wide.args[0]  # type: ignore[assignment]
    B, H, L, D = heads.meta["val"].shape
    repeats = expand.meta["val"].shape[2]
    sizes = zip(value.meta["val"].shape, (B, H * repeats, L, D), strict=True)
    return heads if all(statically_known_true(m == n) for m, n in sizes) else None


def _skip_copies(node: Any, reshapes: bool = True) -> fx.Node:
    """What ``node`` is a copy of: clones, slices that leave nothing out and, if ``reshapes``, reshapes are passed."""
    while True:
        source: Any = skip_reshapes(node, set()) if reshapes else node
        if calls(source, aten.clone.default) or (
            calls(source, aten.slice.Tensor) and same_shape(source, source.args[0])
        ):
            source = source.args[0]
        if source is node:
            return node  # type: ignore[no-any-return]
        node = source
