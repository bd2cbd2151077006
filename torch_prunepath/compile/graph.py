"""Reading and editing FX graphs of aten operators: what the passes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default})

Operator = Callable[..., Any]
"""An operator that ``torch.library.custom_op`` made."""


def overload(op: Operator) -> torch._ops.OpOverload:
    """What graphs call for a custom operator."""
    return op._opoverload  # type: ignore[attr-defined, no-any-return]


def calls(node: object, target: Any) -> bool:
    """Whether ``node`` is a call of ``target``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def calls_to(graph: fx.Graph, op: Operator) -> list[fx.Node]:
    """The calls of a custom operator, in order."""
    return list(graph.find_nodes(op="call_function", target=overload(op)))


def arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names in the operator's schema, None (or the default) where not given."""
    parameters = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((p.name for p in parameters), node.args, strict=False))
    return {p.name: p.default_value for p in parameters} | given | dict(node.kwargs)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors have one shape, whatever symbolic sizes turn out to be."""
    left, right = a.meta["val"].shape, b.meta["val"].shape
    return len(left) == len(right) and all(statically_known_true(m == n) for m, n in zip(left, right, strict=True))


def skip_reshapes(value: object, passed: set[fx.Node]) -> object:
    """What ``value`` is a reshape of, or ``value``; adds the reshapes to ``passed``."""
    while isinstance(value, fx.Node) and value.op == "call_function" and value.target in _RESHAPES:
        passed.add(value)
        value = value.args[0]
    return value


def behind_reshapes(value: object, passed: set[fx.Node]) -> fx.Node | None:
    """What ``value`` is a reshape of, or ``value``; None if that is no node or has another shape."""
    node = skip_reshapes(value, passed)
    if not isinstance(node, fx.Node) or not isinstance(value, fx.Node) or not same_shape(node, value):
        return None
    return node


def same_tensor(a: object, b: object) -> bool:
    """Whether two arguments are one tensor: a node, or reshapes of a node to one shape."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return a is b
    return skip_reshapes(a, set()) is skip_reshapes(b, set()) and same_shape(a, b)


def used_only_by(interior: Iterable[fx.Node], consumer: fx.Node) -> bool:
    """Whether nothing but ``consumer`` and the nodes themselves reads ``interior``."""
    allowed = {consumer, *interior}
    return all(user in allowed for node in interior for user in node.users)


def replace_call(graph: fx.Graph, node: fx.Node, op: Operator, args: tuple[Any, ...]) -> fx.Node:
    """Put a call of ``op`` in the place of ``node``, whose result has the same shape and dtype."""
    with graph.inserting_before(node):
        new = graph.call_function(overload(op), args)
    new.meta = dict(node.meta)
    # Inductor gives an operator's inputs these strides; without them it may lay them out as it likes.
    new.meta["eager_input_vals"] = (fx.map_arg(args, lambda n: n.meta["val"]), {})
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def erase(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Remove nodes that only read each other."""
    doomed = set(nodes)
    for node in reversed(graph.nodes):
        if node in doomed:
            graph.erase_node(node)
