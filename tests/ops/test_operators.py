"""Operators against plain formulas: values, gradients in float64, schemas, odd sizes, both CPU paths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.ops import operators as ops
from torch_prunepath.select import keep_counted, uncounted
from torch_prunepath.weights import Threshold

SHAPES = [  # T, D, F, S: last experts smaller than S, one expert, one neuron an expert
    pytest.param(1, 7, 37, 8, id="one-token"),
    pytest.param(5, 7, 37, 8, id="few-tokens"),
    pytest.param(33, 16, 64, 16, id="many-tokens"),
    pytest.param(3, 5, 6, 9, id="one-expert"),
    pytest.param(4, 3, 5, 1, id="neuron-experts"),
]


def weights(F: int, D: int, dtype: torch.dtype, bias: bool, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(F, D, generator=generator, dtype=torch.float64) / D**0.5
    return weight.to(dtype), torch.randn(F, generator=generator, dtype=torch.float64).to(dtype) if bias else None


def problem(T: int, D: int, F: int, S: int, dtype: torch.dtype, density: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T + F)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
    E = -(-F // S)
    mask = torch.rand(T, E, generator=generator) < density
    mask[:, 0] |= ~mask.any(1)
    return x, mask, torch.rand(T, E, generator=generator) + 0.5


def naive_up(x, mask, up, up_b, gate, gate_b, activation, S):  # type: ignore[no-untyped-def]
    u = x @ up.t() + (0 if up_b is None else up_b)
    if activation != "none":
        act = ACTIVATIONS[activation]
        u = act(u) if gate is None else act(x @ gate.t() + (0 if gate_b is None else gate_b)) * u
    on = torch.stack([mask[:, f // S] for f in range(up.shape[0])], dim=1)
    return torch.where(on, u, torch.zeros_like(u))


def naive_down(h, mask, gates, down, bias, S):  # type: ignore[no-untyped-def]
    on = torch.stack([mask[:, f // S] for f in range(down.shape[0])], dim=1)
    h = torch.where(on, h, torch.zeros_like(h))
    if gates is not None:
        h = h * torch.stack([gates[:, f // S] for f in range(down.shape[0])], dim=1).to(h.dtype)
    return h @ down + (0 if bias is None else bias)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("T", "D", "F", "S"), SHAPES)
def test_forward_equals_formula(T: int, D: int, F: int, S: int, gated: bool, bias: bool, density: float) -> None:
    x, mask, gates = problem(T, D, F, S, torch.float64, density)
    up, up_b = weights(F, D, torch.float64, bias, 1)
    gate, gate_b = weights(F, D, torch.float64, bias, 2) if gated else (None, None)
    down, down_b = weights(F, D, torch.float64, False, 3)[0], weights(D, 1, torch.float64, bias, 4)[1]
    h = ops.expert_up(x, mask, up, up_b, gate, gate_b, "silu", S)
    torch.testing.assert_close(h, naive_up(x, mask, up, up_b, gate, gate_b, "silu", S))
    poisoned = h.masked_fill(h == 0, float("inf"))  # what is inactive must not be read
    for g in (None, gates):
        expected = naive_down(h, mask, g, down, down_b, S)
        torch.testing.assert_close(ops.expert_down(poisoned, mask, g, down, down_b, S), expected)


@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_expert_up_gradients(activation: str, gated: bool) -> None:
    if activation == "none" and gated:
        pytest.skip("a gate needs an activation")
    T, D, F, S = 5, 7, 37, 8
    x, mask, _ = problem(T, D, F, S, torch.float64)
    tensors = [x, *weights(F, D, torch.float64, True, 1)]
    if gated:
        tensors += weights(F, D, torch.float64, True, 2)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def run(op, x, up, up_b, gate=None, gate_b=None):  # type: ignore[no-untyped-def]
        return op(x, mask, up, up_b, gate, gate_b, activation, S)

    assert torch.autograd.gradcheck(lambda *a: run(ops.expert_up, *a), leaves)
    grad = torch.randn(T, F, dtype=torch.float64)
    found = torch.autograd.grad(run(ops.expert_up, *leaves), leaves, grad)
    expected = torch.autograd.grad(run(naive_up, *leaves), leaves, grad)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_normalised_router_scores_and_gradients(dtype: torch.dtype, bias: bool) -> None:
    shapes = [(5, 7), (9, 7), (9,)] if bias else [(5, 7), (9, 7)]
    leaves = [(3 * torch.randn(*shape)).to(dtype).requires_grad_() for shape in shapes]
    found = ops.router_scores(*leaves, *([] if bias else [None]), True)
    x, weight, *rest = [leaf.float() for leaf in leaves]
    unit = torch.nn.functional.rms_norm(x, (7,), eps=1e-6)
    expected = torch.nn.functional.linear(unit, weight, *rest)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(5, 9)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    grads = torch.autograd.grad(found, leaves, grad)
    assert [g.dtype for g in grads] == [dtype] * len(leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, grad), rtol=tolerance, atol=tolerance)


def test_gradients_of_a_normalised_router_that_only_some_need() -> None:
    x, weight, bias = (torch.randn(*shape) for shape in ((5, 7), (9, 7), (9,)))
    grad, every = torch.randn(5, 9), [True] * 3
    expected = ops.router_scores_backward(grad, x, weight, every, True)
    for place in range(3):
        needs = [i == place for i in range(3)]
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x, weight, bias), needs, strict=True)]
        ops.router_scores(*leaves, True).backward(grad)
        torch.testing.assert_close(leaves[place].grad, expected[place])
        assert all(leaf.grad is None for leaf, need in zip(leaves, needs, strict=True) if not need)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_scores_and_gradients(dtype: torch.dtype) -> None:
    leaves = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((5, 7), (9, 7), (9,))]
    x, weight, bias = leaves
    found = ops.router_scores(x, weight, bias)
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    grad = torch.randn(5, 9)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize("gated", [False, True], ids=["gate-one", "gates"])
def test_expert_down_gradients(gated: bool) -> None:
    T, D, F, S = 5, 7, 37, 8
    _, mask, gates = problem(T, D, F, S, torch.float64)
    h = torch.randn(T, F, dtype=torch.float64)
    down, bias = weights(F, D, torch.float64, False)[0], torch.randn(D, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in ([h, down, bias, gates.double()] if gated else [h, down, bias])]

    def run(op, h, down, bias, gates=None):  # type: ignore[no-untyped-def]
        return op(h, mask, gates, down, bias, S)

    assert torch.autograd.gradcheck(lambda *a: run(ops.expert_down, *a), leaves)
    grad = torch.randn(T, D, dtype=torch.float64)
    found = torch.autograd.grad(run(ops.expert_down, *leaves), leaves, grad)
    expected = torch.autograd.grad(run(naive_down, *leaves), leaves, grad)
    torch.testing.assert_close(found, expected)
    if gated:
        assert not found[-1][~mask].any(), "inactive experts' gates have no gradient"


def test_only_needed_gradients_are_computed() -> None:
    x, mask, _ = problem(3, 7, 37, 8, torch.float32)
    up = weights(37, 7, torch.float32, False)[0]
    x.requires_grad_()
    ops.expert_up(x, mask, up, None, None, None, "relu", 8).sum().backward()
    assert x.grad is not None and up.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 4, 20])
def test_low_precision_is_near_float64(dtype: torch.dtype, T: int) -> None:
    D, F, S = 48, 133, 16
    x, mask, gates = problem(T, D, F, S, torch.float64, 0.3)
    up, gate, down = (weights(F, D, torch.float64, False, i)[0] for i in range(3))
    expected = naive_down(naive_up(x, mask, up, None, gate, None, "silu", S), mask, gates, down, None, S)
    low = [t.to(dtype) for t in (x, up, gate, down)]
    h = ops.expert_up(low[0], mask, low[1], None, low[2], None, "silu", S)
    found = ops.expert_down(h, mask, gates, low[3], None, S)
    assert found.dtype == dtype
    error = (found.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]


def test_overflow_in_an_inactive_neuron_does_not_spread() -> None:
    up = torch.full((2, 1), 60000.0, dtype=torch.float16)
    x = torch.full((1, 1), 60000.0, dtype=torch.float16)
    mask = torch.tensor([[True, False]])
    h = ops.expert_up(x, mask, up, None, None, None, "none", 1)
    assert h.tolist() == [[float("inf"), 0.0]]
    assert ops.expert_down(h.nan_to_num(posinf=1.0), mask, None, up * 0 + 1, None, 1).isfinite().all()


THRESHOLD_X = Threshold(torch.tensor(0.4), torch.linspace(0.5, 1.5, 7))
THRESHOLD_H = Threshold(torch.tensor(0.3), torch.linspace(0.5, 1.5, 37))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradients_with_thresholds(gated: bool) -> None:
    T, D, F, S = 5, 7, 37, 8
    x, mask, gates = problem(T, D, F, S, torch.float64)
    up, up_b = weights(F, D, torch.float64, True, 1)
    gate, gate_b = weights(F, D, torch.float64, True, 2) if gated else (None, None)
    h, down, bias = torch.randn(T, F).double(), weights(F, D, torch.float64, False)[0], torch.randn(D).double()
    off_x, off_h = uncounted(x, THRESHOLD_X), uncounted(h, THRESHOLD_H)
    assert off_x.any() and off_h.any()
    ups = [t.requires_grad_() for t in (x, up, up_b, gate, gate_b) if t is not None]
    downs = [t.requires_grad_() for t in (h, down, bias, gates.double())]

    def run_up(x, up, up_b, gate=None, gate_b=None):  # type: ignore[no-untyped-def]
        return ops.expert_up(x, mask, up, up_b, gate, gate_b, "silu", S, *THRESHOLD_X)

    def run_down(h, down, bias, gates):  # type: ignore[no-untyped-def]
        return ops.expert_down(h, mask, gates, down, bias, S, *THRESHOLD_H)

    naive_h = naive_up(torch.where(off_x, 0, x), mask, up, up_b, gate, gate_b, "silu", S)
    naive_y = naive_down(torch.where(off_h, 0, h), mask, downs[3], down, bias, S)
    for run, leaves, expected in ((run_up, ups, naive_h), (run_down, downs, naive_y)):
        assert torch.autograd.gradcheck(run, leaves) and torch.autograd.gradgradcheck(run, leaves)
        grad = torch.randn_like(expected)
        found = torch.autograd.grad(run(*leaves), leaves, grad)
        torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize("theta", [0.0, 0.4])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("T", "D", "F", "S"), SHAPES)
def test_forward_with_thresholds(T: int, D: int, F: int, S: int, density: float, theta: float) -> None:
    x, mask, gates = problem(T, D, F, S, torch.float64, density)
    up, up_b = weights(F, D, torch.float64, True, 1)
    down = weights(F, D, torch.float64, False, 3)[0]
    of_x = Threshold(torch.tensor(theta), torch.rand(D) + 0.5)
    of_h = Threshold(torch.tensor(theta), torch.rand(F) + 0.5)
    h = ops.expert_up(x, mask, up, up_b, None, None, "relu", S, *of_x)
    torch.testing.assert_close(h, naive_up(keep_counted(x, of_x), mask, up, up_b, None, None, "relu", S))
    expected = naive_down(keep_counted(h, of_h), mask, gates, down, None, S)
    on = torch.stack([mask[:, f // S] for f in range(F)], dim=1)
    poisoned = torch.where(on, h, float("nan"))  # what is inactive must not be read
    before = poisoned.clone()
    torch.testing.assert_close(ops.expert_down(poisoned, mask, gates, down, None, S, *of_h), expected)
    assert torch.equal(poisoned.nan_to_num(7.0), before.nan_to_num(7.0)), "the input must stay as it is"


def opcheck_inputs() -> list:
    x, mask, gates = problem(5, 7, 37, 8, torch.float32)
    up, up_b = weights(37, 7, torch.float32, True, 1)
    gate, gate_b = weights(37, 7, torch.float32, True, 2)
    h, bias = torch.randn(5, 37), torch.randn(7)
    for t in (x, up, up_b, gate, gate_b, h, bias, gates):
        t.requires_grad_()  # type: ignore[union-attr]
    router, router_b = weights(9, 7, torch.float32, True, 3)
    for t in (router, router_b):
        t.requires_grad_()  # type: ignore[union-attr]
    return [
        pytest.param(ops.router_scores, (x, router, router_b), id="router"),
        pytest.param(ops.router_scores, (x, router, None), id="router-no-bias"),
        pytest.param(ops.router_scores, (x, router, router_b, True), id="router-normalised"),
        pytest.param(ops.select_experts, (torch.randn(3, 9), torch.tensor(0.5), "reach"), id="select"),
        pytest.param(ops.expert_up, (x, mask, up, up_b, gate, gate_b, "silu", 8), id="up-gated"),
        pytest.param(ops.expert_up, (x, mask, up, None, None, None, "none", 8), id="up-plain"),
        pytest.param(ops.expert_up, (x, mask, up, up_b, gate, gate_b, "silu", 8, *THRESHOLD_X), id="up-threshold"),
        pytest.param(ops.expert_down, (h, mask, gates, up, bias, 8, *THRESHOLD_H), id="down-threshold"),
        pytest.param(ops.expert_down, (h, mask, gates, up, bias, 8), id="down-gates"),
        pytest.param(ops.expert_down, (h, mask, None, up, None, 8), id="down-one"),
    ]


@pytest.mark.parametrize(("op", "args"), opcheck_inputs())
def test_opcheck(op, args) -> None:  # type: ignore[no-untyped-def]
    torch.library.opcheck(op, args)


def test_backward_opcheck() -> None:
    x, mask, _ = problem(5, 7, 37, 8, torch.float32)
    up, up_b = weights(37, 7, torch.float32, True, 1)
    for needs in ([True] * 3 + [False] * 2, [False, True, False, False, False]):
        torch.library.opcheck(
            ops.expert_up_backward, (torch.randn(5, 37), x, mask, up, up_b, None, None, "gelu", 8, needs)
        )
    for router_norm in (False, True):
        args = torch.randn(5, 9), x, torch.randn(9, 7), [True, False, True], router_norm
        torch.library.opcheck(ops.router_scores_backward, args)
    args = torch.randn(5, 37), x, mask, up, up_b, None, None, "gelu", 8, [True] * 3 + [False] * 2, *THRESHOLD_X
    torch.library.opcheck(ops.expert_up_backward, args)
    downs = torch.randn(5, 7), torch.randn(5, 37), mask, torch.rand(5, 5), up, 8, [True] * 4, *THRESHOLD_H
    torch.library.opcheck(ops.expert_down_backward, downs)
    torch.library.opcheck(
        ops.expert_down_backward, (torch.randn(5, 7), torch.randn(5, 37), mask, None, up, 8, [True, False, True, True])
    )


@pytest.mark.parametrize("T", [0, 2])
def test_empty_batch(T: int) -> None:
    mask = torch.ones(T, 5, dtype=torch.bool)
    up = torch.randn(37, 7)
    h = ops.expert_up(torch.randn(T, 7), mask, up, None, None, None, "relu", 8)
    assert h.shape == (T, 37) and ops.expert_down(h, mask, None, up, None, 8).shape == (T, 7)
