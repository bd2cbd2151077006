"""An FFN's weights as values: projections, casts, and the way into the operator and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_prunepath.activations import ACTIVATIONS, activate
from torch_prunepath.layer.buffers import Float32Buffers
from torch_prunepath.ops.experts import expand_experts, expert_sums, weigh, zero_inactive
from torch_prunepath.ops.sparse_ffn import arguments, sparse_ffn, values
from torch_prunepath.weights import EVERYTHING, FFNWeights, Selector, Threshold, Thresholds, UpWeights


def ffn(D: int = 3, F: int = 5, gated: bool = True, bias: bool = True) -> FFNWeights:
    def pair(out: int) -> tuple[Tensor, Tensor | None]:
        return torch.randn(F, D), torch.randn(out) if bias else None

    return FFNWeights(*pair(F), *(pair(F) if gated else (None, None)), *pair(D))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_project_is_both_linear_layers(gated: bool, bias: bool) -> None:
    weights, x = ffn(gated=gated, bias=bias).up_part, torch.randn(4, 3)
    up, gate = weights.project(x)
    torch.testing.assert_close(up, x @ weights.up_FD.t() + (weights.up_bias_F if bias else 0))
    if gated:
        torch.testing.assert_close(gate, x @ weights.gate_FD.t() + (weights.gate_bias_F if bias else 0))
    else:
        assert gate is None
    wide = weights.to(torch.float64)
    assert [t is None for t in wide] == [t is None for t in weights]
    assert {t.dtype for t in wide if t is not None} == {torch.float64}
    assert isinstance(wide, UpWeights) and torch.equal(wide.up_FD.float(), weights.up_FD)


@given(offset=st.none() | st.floats(-2, 2), norm=st.booleans(), shared=st.integers(0, 3), gated=st.booleans())
def test_the_operators_arguments_and_back(offset: float | None, norm: bool, shared: int, gated: bool) -> None:
    selector = Selector(torch.randn(2, 3), None, torch.tensor(0.5), "below", offset, norm, shared)
    thresholds = Thresholds(Threshold(torch.tensor(0.5), torch.rand(3)), Threshold(torch.tensor(0.1), torch.rand(5)))
    given_values = (torch.randn(4, 3), selector, ffn(gated=gated), "silu", 3, thresholds)
    flat = arguments(*given_values)
    names = [argument.name for argument in sparse_ffn._opoverload._schema.arguments]
    named = dict(zip(names, flat, strict=True))
    for value in given_values[1:3]:
        assert all(named[name] is part for name, part in value._asdict().items())
    back = values(*flat)
    assert all(a is b for a, b in zip(back[1] + back[2], selector + given_values[2], strict=True))
    assert (back[0] is flat[0], *back[3:5]) == (True, "silu", 3)
    assert all(a is b for a, b in zip(back[5].parts, thresholds.parts, strict=True))
    # The dispatcher leaves out defaults at the end.
    for kept in (14, 15):
        assert values(*flat[:kept])[1] == (*selector[: kept - 9], *(False, 0)[kept - 14 :])
        assert values(*flat[:kept])[5] == EVERYTHING
    assert values(*flat[:18])[5] == (thresholds.inputs, None)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activate(activation: str, reuse: bool) -> None:
    up, gate = torch.randn(2, 7), torch.randn(2, 7)
    before, act = (up.clone(), gate.clone()), ACTIVATIONS[activation]
    assert torch.equal(activate(up, gate, activation, reuse=reuse), act(gate) * up)
    assert torch.equal(activate(up, None, activation, reuse=reuse), act(up))
    assert activate(up, None, "none") is up
    assert torch.equal(up, before[0]) and torch.equal(gate, before[1]), "inputs must stay as they are"


@given(T=st.integers(0, 4), F=st.integers(1, 20), S=st.integers(1, 9))
def test_experts_and_neurons(T: int, F: int, S: int) -> None:
    E = -(-F // S)
    values_TE, h_TF = torch.rand(T, E), torch.randn(T, F).bfloat16()
    expert_of = torch.arange(F) // S
    wide = expand_experts(values_TE, S, F)
    assert torch.equal(wide, values_TE[:, expert_of])
    sums = torch.zeros(T, E).index_add_(1, expert_of, h_TF.float())
    torch.testing.assert_close(expert_sums(h_TF, S), sums)
    assert torch.equal(weigh(h_TF, values_TE, S), h_TF * wide.bfloat16()) and weigh(h_TF, None, S) is h_TF
    assert torch.equal(zero_inactive(h_TF, values_TE > 0.5, S), torch.where(wide > 0.5, h_TF, 0))


def test_tau_stays_float32() -> None:
    module = Float32Buffers()
    module.register_buffer("tau", torch.tensor(0.123456789))
    module.register_buffer("other", torch.tensor(0.123456789))
    for cast in (module.half, module.bfloat16, module.double):
        cast()
        assert module.tau.dtype == torch.float32 and module.tau == torch.tensor(0.123456789)
    assert module.other.dtype == torch.float64
