"""The passes of the compile backend on small graphs: what they rewrite, what they must leave, and equal numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from torch_prunepath.compile.passes import PASSES, run_passes
from torch_prunepath.csrc_triton import UNION_TOKENS
from torch_prunepath.ops import operators as ops
from torch_prunepath.select import sigmoid_weights

D, F, S = 16, 37, 8
E = 5  # the last expert has 5 neurons


class Weights(NamedTuple):
    up: Tensor
    gate: Tensor
    down: Tensor
    up_b: Tensor
    gate_b: Tensor
    down_b: Tensor
    router: Tensor
    router_b: Tensor
    tau: Tensor


FFN = Callable[..., Any]
"""``(weights, *tensors) -> tensors``"""


def weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    shapes = [(F, D), (F, D), (F, D), (F,), (F,), (D,), (E, D), (E,)]
    random = [torch.randn(shape, generator=generator, dtype=torch.float64) / 4 for shape in shapes]
    return Weights(*random, tau=torch.tensor(0.6))._replace(router=8 * random[6])


def tokens(T: int) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(T), dtype=torch.float64)


def route(w: Weights, x: Tensor, rule: str = "reach") -> tuple[Tensor, Tensor]:
    scores = ops.router_scores(x, w.router, w.router_b)
    return scores, ops.select_experts(scores, w.tau, rule)


def up(w: Weights, x: Tensor, mask: Tensor, activation: str = "silu", gated: bool = True, size: int = S) -> Tensor:
    gate = (w.gate, w.gate_b) if gated else (None, None)
    return ops.expert_up(x, mask, w.up, w.up_b, *gate, activation, size)


def down(w: Weights, h: Tensor, mask: Tensor, gates: Tensor | None = None, size: int = S) -> Tensor:
    return ops.expert_down(h, mask, gates, w.down.to(h.dtype), w.down_b.to(h.dtype), size)


def trace(ffn: FFN, *inputs: Tensor, symbolic: bool = False) -> fx.GraphModule:
    """A functional graph as Inductor hands it to the passes, fake tensors in ``meta``; its inputs: weights, inputs."""

    def flat(*tensors: Tensor) -> Any:
        return ffn(Weights(*tensors[: len(Weights._fields)]), *tensors[len(Weights._fields) :])

    mode = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True))
    sizes = [DimDynamic.DYNAMIC if symbolic else DimDynamic.STATIC, DimDynamic.STATIC]
    fake = [mode.from_tensor(tensor) for tensor in weights()]
    fake += [mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(sizes)) for tensor in inputs]
    with torch.no_grad(), mode, enable_python_dispatcher():
        return make_fx(flat)(*fake)


def called(graph: fx.GraphModule) -> Counter[str]:
    targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return Counter(target._opname for target in targets if target.namespace == "prunepath")


def rewritten(
    ffn: FFN, *inputs: Tensor, names: tuple[str, ...] = tuple(PASSES), training: bool = False, **how: bool
) -> Counter[str]:
    """What is called after the passes ran; the results must be those of the untouched function."""
    graph = trace(ffn, *inputs, **how)
    run_passes(graph.graph, names, training)
    graph.recompile()
    with torch.no_grad():
        torch.testing.assert_close(graph(*weights(), *inputs), ffn(weights(), *inputs))
    return called(graph)


# --- fuse_ffn ---------------------------------------------------------------------------------------------------------


def gated(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    return down(w, up(w, x, mask), mask)


def plain_below(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x, "below")
    return down(w, up(w, x, mask, "relu2", gated=False), mask)


def sigmoid_gate(w: Weights, x: Tensor) -> Tensor:
    scores, mask = route(w, x)
    return down(w, up(w, x, mask), mask, torch.sigmoid(scores))


def normalised_router(w: Weights, x: Tensor) -> Tensor:
    scores = ops.router_scores(x, w.router, w.router_b, True)
    mask = ops.select_experts(scores, w.tau, "reach")
    return down(w, up(w, x, mask), mask, torch.sigmoid(scores))


def shared_experts(w: Weights, x: Tensor) -> Tensor:
    scores = ops.router_scores(x, w.router, w.router_b)
    mask = ops.select_experts(scores, w.tau, "reach", 2)
    return down(w, up(w, x, mask), mask, sigmoid_weights(scores, 0.5, 2))


def sigmoid_gate_offset(w: Weights, x: Tensor) -> Tensor:
    scores, mask = route(w, x)
    return down(w, up(w, x, mask), mask, torch.sigmoid(scores + 2))


def reshaped_between(w: Weights, x: Tensor) -> Tensor:
    x3 = x.view(1, -1, D)
    scores = ops.router_scores(x3.reshape(-1, D), w.router, None).view(1, -1, E)
    mask = ops.select_experts(scores.view(-1, E), w.tau, "reach")
    h = up(w, x3.view(-1, D), mask).view(1, -1, F)
    return down(w, h.view(-1, F), mask, torch.sigmoid(scores + 0.5).view(-1, E))


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize(
    "ffn",
    [gated, plain_below, sigmoid_gate, normalised_router, shared_experts, sigmoid_gate_offset, reshaped_between],
)
def test_a_whole_ffn_becomes_one_operator(ffn: FFN, symbolic: bool) -> None:
    assert rewritten(ffn, tokens(5), symbolic=symbolic) == {"sparse_ffn": 1}


def test_every_ffn_of_a_graph_is_fused() -> None:
    assert rewritten(lambda w, x: x + gated(w, x + plain_below(w, x)), tokens(3)) == {"sparse_ffn": 2}


def test_the_new_node_knows_its_shape_and_its_inputs_strides() -> None:
    graph = trace(gated, tokens(5))
    before = graph.graph.find_nodes(op="call_function", target=torch.ops.prunepath.expert_down.default)[0].meta["val"]
    run_passes(graph.graph, ("fuse_ffn",), training=False)
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.prunepath.sparse_ffn.default)
    assert (node.meta["val"].shape, node.meta["val"].dtype) == (before.shape, before.dtype)
    given, _ = node.meta["eager_input_vals"]
    for arg, val in zip(node.args, given, strict=True):
        expected = arg.meta["val"].stride() if isinstance(arg, fx.Node) else arg
        assert (val.stride() if isinstance(val, Tensor) else val) == expected


def scores_used(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    scores, mask = route(w, x)
    return down(w, up(w, x, mask), mask), scores.softmax(-1)


def mask_used(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    _, mask = route(w, x)
    return down(w, up(w, x, mask), mask), mask.sum(-1)


def h_used(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    _, mask = route(w, x)
    h = up(w, x, mask)
    return down(w, h, mask), h


def gates_used(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    scores, mask = route(w, x)
    gates = torch.sigmoid(scores + 1.0)
    return down(w, up(w, x, mask), mask, gates), gates


def reshape_used(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    scores, mask = route(w, x)
    return down(w, up(w, x, mask), mask), scores.view(-1)


def replaced_mask(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    mask = mask | (x[:, :E] > 0)
    return down(w, up(w, x, mask), mask)


def two_masks(w: Weights, x: Tensor) -> Tensor:
    return down(w, up(w, x, route(w, x)[1]), route(w, x, "below")[1])


def two_inputs(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    return down(w, up(w, 2 * x, mask), mask)


def reordered_input(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    return down(w, up(w, x.t().reshape(-1, D), mask), mask)


def two_expert_sizes(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    return down(w, up(w, x, mask, size=9), mask)


def other_gate(w: Weights, x: Tensor) -> Tensor:
    scores, mask = route(w, x)
    return down(w, up(w, x, mask), mask, torch.relu(scores))


def gate_of_other_scores(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    return down(w, up(w, x, mask), mask, torch.sigmoid(x[:, :E].float()))


def gate_scaled(w: Weights, x: Tensor) -> Tensor:
    scores, mask = route(w, x)
    return down(w, up(w, x, mask), mask, torch.sigmoid(2 * scores))


def gate_offset_tensor(w: Weights, x: Tensor) -> Tensor:
    scores, mask = route(w, x)
    return down(w, up(w, x, mask), mask, torch.sigmoid(scores + x[:, :E].float()))


def gate_offset_alpha(w: Weights, x: Tensor) -> Tensor:
    scores, mask = route(w, x)
    return down(w, up(w, x, mask), mask, torch.sigmoid(torch.add(scores, 1.0, alpha=2)))


def shared_without_their_gates(w: Weights, x: Tensor) -> Tensor:
    scores = ops.router_scores(x, w.router, w.router_b)
    mask = ops.select_experts(scores, w.tau, "reach", 2)
    return down(w, up(w, x, mask), mask, torch.sigmoid(scores))


def gates_of_fewer_shared(w: Weights, x: Tensor) -> Tensor:
    scores = ops.router_scores(x, w.router, w.router_b)
    mask = ops.select_experts(scores, w.tau, "reach", 2)
    return down(w, up(w, x, mask), mask, sigmoid_weights(scores, 0.5, 1))


def gates_of_none_shared(w: Weights, x: Tensor) -> Tensor:
    scores, mask = route(w, x)
    return down(w, up(w, x, mask), mask, sigmoid_weights(scores, 0.5, 1))


def shared_gates_of_the_first(w: Weights, x: Tensor) -> Tensor:
    scores = ops.router_scores(x, w.router, w.router_b)
    mask = ops.select_experts(scores, w.tau, "reach", 2)
    gates = nn.functional.pad(torch.sigmoid(scores[:, : E - 2] + 0.5), (2, 0), value=1.0)
    return down(w, up(w, x, mask), mask, gates)


def shared_gates_of_half(w: Weights, x: Tensor) -> Tensor:
    scores = ops.router_scores(x, w.router, w.router_b)
    mask = ops.select_experts(scores, w.tau, "reach", 2)
    return down(w, up(w, x, mask), mask, nn.functional.pad(torch.sigmoid(scores[:, 2:]), (2, 0), value=0.5))


def scaled_scores(w: Weights, x: Tensor) -> Tensor:
    scores = ops.router_scores(x, w.router, None)
    mask = ops.select_experts(3 * scores, w.tau, "reach")
    return down(w, up(w, x, mask), mask)


def dropout_between(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    return down(w, up(w, x, mask) * 1.25, mask)


def other_dtype_down(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    return down(w, up(w, x, mask).float(), mask)


def no_activation(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    return down(w, up(w, x, mask, "none", gated=False), mask)


def activation_between(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    return down(w, nn.functional.gelu(up(w, x, mask, "none", gated=False)), mask)


def relu_after_silu(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    return down(w, torch.relu(up(w, x, mask)), mask)


NEAR_MISSES = [scores_used, mask_used, h_used, gates_used, reshape_used, replaced_mask, two_masks, two_inputs]
NEAR_MISSES += [reordered_input, two_expert_sizes, other_gate, gate_of_other_scores, gate_scaled, gate_offset_tensor]
NEAR_MISSES += [gate_offset_alpha, scaled_scores, dropout_between, other_dtype_down, no_activation]
NEAR_MISSES += [activation_between, relu_after_silu, shared_without_their_gates, gates_of_fewer_shared]
NEAR_MISSES += [gates_of_none_shared, shared_gates_of_the_first, shared_gates_of_half]


@pytest.mark.parametrize("ffn", NEAR_MISSES)
def test_what_is_no_whole_ffn_stays(ffn: FFN) -> None:
    x = tokens(5) if ffn is not reordered_input else tokens(D)
    assert rewritten(ffn, x) == called(trace(ffn, x))


# --- fuse_relu --------------------------------------------------------------------------------------------------------


def split(w: Weights, x: Tensor) -> Tensor:
    _, mask = route(w, x)
    h = up(w, x, mask, "none", gated=False).view(1, -1, F)
    return down(w, torch.relu(h).view(-1, F), mask)


def split_relu_used(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    _, mask = route(w, x)
    h = torch.relu(up(w, x, mask, "none", gated=False))
    return down(w, h, mask), h


def split_pre_activation_used(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    _, mask = route(w, x)
    pre = up(w, x, mask, "none", gated=False)
    return down(w, torch.relu(pre), mask), pre


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
def test_relu_between_the_halves_is_taken_in(symbolic: bool) -> None:
    graph = trace(split, tokens(5), symbolic=symbolic)
    assert PASSES["fuse_relu"](graph.graph, False) == 1
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    assert rewritten(split, tokens(5), names=("fuse_relu",), symbolic=symbolic) == called(trace(split, tokens(5)))
    assert rewritten(split, tokens(5), symbolic=symbolic) == {"sparse_ffn": 1}


@pytest.mark.parametrize("ffn", [split_relu_used, split_pre_activation_used, relu_after_silu, gated])
def test_relu_that_is_read_elsewhere_stays(ffn: FFN) -> None:
    assert PASSES["fuse_relu"](trace(ffn, tokens(5)).graph, False) == 0
    assert "router_scores" in rewritten(ffn, tokens(5), names=("fuse_relu",))


# --- inline_dense -----------------------------------------------------------------------------------------------------

INLINED = {"router_scores": 1, "select_experts": 1}


@pytest.mark.parametrize("ffn", [gated, sigmoid_gate_offset, h_used, activation_between, other_dtype_down])
def test_many_tokens_are_plain_operators(ffn: FFN) -> None:
    assert rewritten(ffn, tokens(UNION_TOKENS + 1)) == INLINED
    assert "expert_up" in rewritten(ffn, tokens(UNION_TOKENS), names=("inline_dense",))


def test_an_unknown_number_of_tokens_is_inlined_for_training_only() -> None:
    assert rewritten(sigmoid_gate, tokens(5), symbolic=True, training=True) == INLINED
    assert rewritten(sigmoid_gate, tokens(5), symbolic=True, training=False) == {"sparse_ffn": 1}
    assert rewritten(gated, tokens(5), training=True) == {"sparse_ffn": 1}


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "none"])
@pytest.mark.parametrize("needs", [(True,) * 5, (True, False, False, False, False), (False, True, False, True, True)])
def test_backward_of_up_is_inlined(needs: tuple[bool, ...], activation: str, symbolic: bool) -> None:
    gated = activation != "none"
    kept = [i for i, need in enumerate(needs) if need and (i < 3 or gated)]

    def backward(w: Weights, grad: Tensor, x: Tensor, mask: Tensor) -> list[Tensor]:
        gate = (w.gate, w.gate_b) if gated else (None, None)
        grads = ops.expert_up_backward(grad, x, mask, w.up, w.up_b, *gate, activation, S, list(needs))
        return [grads[i] for i in kept]

    w = weights()
    x = tokens(5)
    assert rewritten(backward, tokens(5) @ w.up.t(), x, route(w, x)[1], symbolic=symbolic, training=True) == {}


@pytest.mark.parametrize("gates", [False, True], ids=["no-gates", "gates"])
@pytest.mark.parametrize("needs", [(True,) * 4, (True, False, False, False), (False, False, True, True)])
def test_backward_of_down_is_inlined(needs: tuple[bool, ...], gates: bool) -> None:
    kept = [i for i, need in enumerate(needs) if need and (i != 1 or gates)]

    def backward(w: Weights, grad: Tensor, h: Tensor, mask: Tensor, weights_TE: Tensor) -> list[Tensor]:
        gate = weights_TE if gates else None
        grads = ops.expert_down_backward(grad, h, mask, gate, w.down, S, list(needs))
        return [grads[i] for i in kept]

    w = weights()
    scores, mask = route(w, tokens(5))
    h = tokens(5) @ w.up.t()
    assert rewritten(backward, tokens(5), h, mask, scores.sigmoid(), training=True) == {}


def test_inlining_under_autocast_keeps_the_graphs_dtypes() -> None:
    graph = trace(gated, tokens(UNION_TOKENS + 1).float())
    with torch.autocast("cpu"):
        run_passes(graph.graph, ("inline_dense",), training=False)
    dtypes = {n.meta["val"].dtype for n in graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    assert torch.bfloat16 not in dtypes


# --- the list ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("off", "T", "left"),
    [
        ("fuse_relu", 5, {"expert_up": 1, "expert_down": 1, **INLINED}),
        ("fuse_ffn", 5, {"expert_up": 1, "expert_down": 1, **INLINED}),
        ("inline_dense", UNION_TOKENS + 1, {"sparse_ffn": 1}),
    ],
)
def test_each_pass_can_be_left_out(off: str, T: int, left: dict[str, int]) -> None:
    assert rewritten(split, tokens(T), names=tuple(name for name in PASSES if name != off)) == left


def test_no_pass_no_change() -> None:
    assert rewritten(split, tokens(80), names=()) == called(trace(split, tokens(80)))
