"""Putting an operator's default implementation, traced to aten, in the place of a call of the operator."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from torch_prunepath.compile.graph import Operator


def inline(graph: fx.Graph, node: fx.Node, op: Operator) -> None:
    """Replace ``node``, a call of ``op`` with positional arguments, by aten operators that compute the same."""
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
    traced = _trace(node, tensors, op)
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        placeholders = traced.find_nodes(op="placeholder")
        copies.update(zip(placeholders, tensors, strict=True))
        results = graph.graph_copy(traced, copies)
    assert isinstance(results, (list, tuple))
    for used, result in zip(_results(node), results, strict=True):
        assert isinstance(result, fx.Node)
        used.replace_all_uses_with(result)
        if used is not node:
            graph.erase_node(used)
    graph.erase_node(node)


def _results(node: fx.Node) -> list[fx.Node]:
    """The nodes that hold what the call returns: itself, or, if that is a list, the items that are taken from it."""
    if isinstance(node.meta["val"], Tensor):
        return [node]
    assert all(user.target is operator.getitem for user in node.users)
    return list(node.users)


def _trace(node: fx.Node, tensors: list[fx.Node], op: Operator) -> fx.Graph:
    """The default implementation as a graph from the call's tensors to the list of its used results."""
    results = _results(node)

    def implementation(*values: Any) -> list[Tensor]:
        given = iter(values)
        args = [next(given) if isinstance(arg, fx.Node) else arg for arg in node.args]
        returned = op._init_fn(*args)  # type: ignore[attr-defined]
        return [returned if result is node else returned[result.args[1]] for result in results]

    values = [tensor.meta["val"] for tensor in tensors]
    # Autocast may be on around the compiler; the graph holds its casts already.
    plain = torch.autocast(values[0].device.type, enabled=False)
    with torch.no_grad(), plain, enable_python_dispatcher(), values[0].fake_mode:
        functional = torch.func.functionalize(implementation, remove="mutations")
        graph = make_fx(functional, select_decomp_table(), tracing_mode="real")(*values).graph
    graph.eliminate_dead_code()
    assert not graph.find_nodes(op="get_attr"), "a constant tensor would be lost"
    return graph
