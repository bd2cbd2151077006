"""Modules that look like an FFN and are none are refused with a reason; unusual ones that are one are found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import Gated, Plain, Stack
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.activations import ACT2FN

from torch_prunepath.discover import discover, find_ffns

SAME = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
}
OTHER = [
    "gelu_10",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "relu6",
    "sigmoid",
    "tanh",
    "prelu",
    "xielu",
]


@pytest.mark.parametrize(("act", "name"), SAME.items(), ids=SAME)
def test_activation_is_told_by_what_it_computes(act: str, name: str) -> None:
    assert [spec.activation for spec in find_ffns(Plain(16, 37, ACT2FN[act]).bfloat16())] == [name]


@pytest.mark.parametrize("act", OTHER)
def test_other_activations_are_refused(act: str) -> None:
    with pytest.raises(ValueError, match=r"neither act\(up\) nor|passes through act|xIELU"):
        find_ffns(Plain(16, 37, ACT2FN[act]))


class Ffn(nn.Module):
    """The parts of a gated FFN, for modules that use them differently."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 37), nn.Linear(16, 37), nn.Linear(37, 16)


class WithResidual(Ffn):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Scaled(Ffn):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.down(F.silu(self.gate(x)) * self.up(x))


class CalledDropout(Ffn):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(F.silu(self.gate(x)) * self.up(x), 0.1, self.training))


class OptionalInput(Ffn):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SubNorm(Ffn):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(37)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


class Clamped(Ffn):
    def forward(self, x: Tensor) -> Tensor:
        return self.down((F.silu(self.gate(x)) * self.up(x)).clamp(-100, 100))


class TopK(Ffn):
    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(torch.where(h.abs() >= h.abs().topk(8).values[..., -1:], h, 0))


class GateOfOtherInput(Ffn):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x.flip(-1))) * self.up(x))


class Noise(Ffn):
    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h * torch.rand_like(h) if self.training else h)


class WeightsUsedDirectly(Ffn):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate.weight)) * self.up(x), self.down.weight)


class Interleaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(16, 2 * 37), nn.Linear(37, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.wi(x)
        return self.wo(F.silu(h[..., ::2]) * h[..., 1::2])


class ReturnsHidden(Plain):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = self.act(self.fc1(x))
        return self.fc2(h) + residual, h


class Lora(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.low = nn.Parameter(torch.zeros(sizes[1], sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.low.t()


class NormalisedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.normalize(x, dim=-1))


class Marked(Tensor):
    """Stands for the weight classes of quantisation and sharding libraries."""


def plain(**changes: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """An FFN with ReLU, and submodules changed."""
    model = Plain(16, 37, F.relu)
    for name, change in changes.items():
        setattr(model, name, change(getattr(model, name)))
    return model


def with_weight(weight: Callable[[Tensor], Tensor]) -> nn.Module:
    model = Plain(16, 37, F.relu)
    model.fc1.weight = nn.Parameter(weight(model.fc1.weight.data), requires_grad=False)
    return model


def quantised() -> nn.Module:
    from torch.ao.nn.quantized.dynamic import Linear

    return nn.Sequential(Linear(16, 37), nn.ReLU(), Linear(37, 16))


def tied() -> nn.Module:
    model = Stack(Plain(16, 37, F.relu), Plain(16, 37, F.relu))
    model.ffns[1].fc1.weight = model.ffns[0].fc1.weight
    return model


def shared() -> nn.Module:
    model = Stack(Plain(16, 37, F.relu), Plain(16, 37, F.relu))
    model.ffns[1].fc1 = model.ffns[0].fc1
    return model


def replaced_forward(module: nn.Module, forward: Callable[..., Any], part: str = "") -> nn.Module:
    owner = module.get_submodule(part)
    owner.forward = partial(forward, owner)
    return module


class Routed(nn.Module):
    """A mixture of experts of the old kind, a list of FFNs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Gated(16, 37, True) for _ in range(4))
        self.router = nn.Linear(16, 4, bias=False)
        self.shared = Gated(16, 24, True)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)
        y = self.shared(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] += share[chosen == i, None] * expert(x[chosen == i])
        return y


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "residual": (WithResidual, r"gate layer of its own, .* does more than the FFN with what down returns"),
    "scaled": (Scaled, r"does more than the FFN with what down returns"),
    "called_dropout": (CalledDropout, r"in training, .* a dropout of 0.1 that is a call, not an nn.Dropout"),
    "optional_input": (OptionalInput, r"takes more than one input \(x, scale\)"),
    "norm_inside": (SubNorm, r"passes through norm \(LayerNorm\)"),
    "clamped": (Clamped, r"neither act\(up\) nor"),
    "top_k": (TopK, r"neither act\(up\) nor"),
    "gate_of_other_input": (GateOfOtherInput, r"does not go straight to its first linear layers"),
    "noise": (Noise, r"in training, a hidden value meets random numbers \(rand_like\)"),
    "weights_used_directly": (WeightsUsedDirectly, r"meets a value of other origin \(linear\)"),
    "interleaved": (Interleaved, r"neither act\(up\) nor"),
    "returns_hidden": (lambda: ReturnsHidden(16, 37, F.relu), r"a hidden value is returned by forward"),
    "no_activation": (lambda: nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 16)), r"neither act\(up\) nor"),
    "int_weight": (
        lambda: with_weight(lambda w: (100 * w).to(torch.int8)),
        r"fc1 is a Linear with a Parameter of .*int8",
    ),
    "float8_weight": (lambda: with_weight(lambda w: w.to(torch.float8_e4m3fn)), r"a Parameter of torch.float8_e4m3fn"),
    "weight_class": (lambda: with_weight(lambda w: w.as_subclass(Marked)), r"fc1 is a Linear with a Marked of"),
    "quantised_class": (quantised, r"0 is a Linear without a weight parameter: quantised"),
    "computed_weight": (lambda: plain(fc1=weight_norm), r"ParametrizedLinear without a weight parameter"),
    "lora": (lambda: plain(fc2=lambda _: Lora(37, 16)), r"fc2 is a Lora, not a plain nn.Linear or Conv1D"),
    "other_linear": (lambda: plain(fc1=lambda _: NormalisedLinear(16, 37)), r"computes something else than x W\^T"),
    "replaced_forward": (lambda: replaced_forward(plain(), Plain.forward), r"of a Plain was replaced on the instance"),
    "replaced_linear": (
        lambda: replaced_forward(plain(), nn.Linear.forward, "fc2"),
        r"fc2 has a forward that was repl",
    ),
    "replaced_activation": (
        lambda: replaced_forward(nn.Sequential(nn.Linear(16, 37), nn.ReLU(), nn.Linear(37, 16)), nn.ReLU.forward, "1"),
        r"of a ReLU was replaced on the instance",
    ),
    "torchscript": (lambda: nn.Sequential(torch.jit.script(nn.Linear(16, 37))), r"is compiled by TorchScript"),
    "tied": (tied, r"ffns\.\*: fc1 shares its weights with another module \(2 times\)"),
    "shared_layer": (shared, r"fc1 shares its weights with another module"),
    "fast_path": (lambda: nn.TransformerEncoderLayer(16, 4, 37), r"fast path does not call its linear layers"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        find_ffns(make())


def test_routed_experts_are_refused_and_shared_ones_are_not() -> None:
    found = discover(nn.Sequential(Routed(), Routed()))
    assert [(spec.name, spec.ffn_size) for spec in found.specs] == [("0.shared", 24), ("1.shared", 24)]
    experts = {refusal.name: refusal.reason for refusal in found.refused}
    assert set(experts) == {f"{block}.experts.{i}" for block in "01" for i in range(4)}
    assert all("one of the 4 experts that router chooses from" in reason for reason in experts.values())


class InPlace(Ffn):
    """Casts and in-place operations on the way."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate(x)
        h.mul_(torch.sigmoid(h))
        return self.down((h.float() * self.up(x).half()).to(x.dtype).type_as(x))


class Skipping(Ffn):
    """Draws a random number that the hidden values do not meet."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.rand(()) < 0:
            return x
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Outer(nn.Module):
    """Makes a whole FFN of one that takes an optional input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = OptionalInput()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("make", [InPlace, Skipping, Outer])
def test_unusual_whole_ffns(make: Callable[[], nn.Module]) -> None:
    model = make().bfloat16()
    state = torch.get_rng_state()
    (spec,) = find_ffns(model)
    assert (spec.name, spec.split, spec.activation, spec.gated) == ("", False, "silu", True)
    assert torch.equal(state, torch.get_rng_state())


def test_found_once_and_innermost() -> None:
    inner = Gated(16, 37, True)
    assert [spec.name for spec in find_ffns(nn.Sequential(nn.Sequential(nn.Sequential(inner))))] == ["0.0.0"]
    assert [spec.name for spec in find_ffns(nn.ModuleList([inner, inner]))] == ["0"]
    assert [spec.name for spec in find_ffns(nn.Sequential(nn.Sequential(inner), nn.Sequential(inner)))] == ["0.0"]
