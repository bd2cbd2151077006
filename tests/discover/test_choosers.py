"""A network that decides which experts run is refused; shared experts and FFNs before a router are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from architectures import Plain
from torch import Tensor, nn
from torch.nn import functional as F

from torch_prunepath.discover import discover

DECIDES = "decides which experts run"


def ffn() -> nn.Module:
    return Plain(16, 64, torch.relu)


class Gate(nn.Module):
    """A router of three layers, as in ZAYA."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.out(F.gelu(self.fc2(F.gelu(self.fc1(x)))))
        return scores


class Block(nn.Module):
    """A mixture of four experts, and a shared one."""

    def __init__(self, gate: nn.Module, experts: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.shared_experts = gate, ffn()
        self.experts = experts or nn.ModuleList(ffn() for _ in range(4))

    def mix(self, x: Tensor, choice: Tensor) -> Tensor:
        mixed: Tensor = self.shared_experts(x)
        for i, expert in enumerate(self.experts):  # type: ignore[arg-type]
            mixed = mixed + expert(x) * (choice == i).unsqueeze(-1)
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, self.gate(x).argmax(-1))


class Apart(Block):
    """The last layer of the router lies beside the network before it, with a residual and a norm between."""

    def __init__(self) -> None:
        super().__init__(ffn())
        self.route, self.norm = nn.Linear(16, 4), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax(self.route(self.norm(x + self.gate(x))), -1)
        weights, chosen = shares.topk(2)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):  # type: ignore[arg-type]
            token, slot = torch.where(chosen == i)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y + self.shared_experts(x)


class Before(Apart):
    """The same parts, but the experts read what the first network computes: it is an FFN like any other."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gate(x)
        return self.mix(x, torch.softmax(self.route(self.norm(x)), -1).topk(1).indices[..., 0])


class AsManyAsFeatures(Block):
    """The network's own last layer has an output for each expert."""

    def __init__(self) -> None:
        super().__init__(ffn(), nn.ModuleList(ffn() for _ in range(16)))


class Stacked(nn.Module):
    """Experts as 3-D weights of the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 16, 32)), nn.Parameter(torch.randn(4, 32, 16))
        self.gate, self.shared_experts = Gate(), ffn()

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        h = torch.einsum("td,tdf->tf", x, self.w1[chosen]).relu()
        y: Tensor = self.shared_experts(x)
        return y + weight[..., None] * torch.einsum("tf,tfd->td", h, self.w2[chosen])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(ffn() for _ in range(4))

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        choice = scores.argmax(-1)
        return torch.stack([expert(x) * (choice == i).unsqueeze(-1) for i, expert in enumerate(self.experts)]).sum(0)


class Outside(nn.Module):
    """The router lies outside of the module that holds the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.moe, self.shared_experts = Gate(), Experts(), ffn()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.moe(x, self.gate(x)) + self.shared_experts(x)
        return y


def in_a_row() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4), nn.Softmax(-1))


MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "three_layers": lambda: Block(Gate()),
    "in_a_row": lambda: Block(in_a_row()),
    "apart": Apart,
    "as_many_as_features": AsManyAsFeatures,
    "experts_of_one_layer": lambda: Block(Gate(), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))),
    "stacked": Stacked,
    "outside": Outside,
}


@pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES)
def test_a_network_that_chooses_experts_is_refused(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make(), make())
    assert model(torch.randn(3, 16)).shape == (3, 16)
    found = discover(model)
    assert [spec.name for spec in found.specs] == ["0.shared_experts", "1.shared_experts"]
    deciding = [refusal.name for refusal in found.refused if DECIDES in refusal.reason]
    assert deciding == ["0.gate", "1.gate"]


def test_an_ffn_before_a_mixture_is_found() -> None:
    found = discover(nn.Sequential(Before()))
    assert [spec.name for spec in found.specs] == ["0.gate", "0.shared_experts"]


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 64, "vocab_size": 64}


def test_zaya() -> None:
    config = hf.ZayaConfig(**SMALL, num_experts=4, router_hidden_size=16, moe_intermediate_size=32)
    found = discover(hf.ZayaForCausalLM(config))
    assert found.specs == ()
    reasons = {refusal.name: refusal.reason for refusal in found.skipped}
    assert all(DECIDES in reasons[f"model.layers.{i}.mlp.gate.router_mlp"] for i in range(2))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            lambda: hf.Qwen2MoeForCausalLM(
                hf.Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=48)
            ),
            ["model.layers.0.mlp.shared_expert", "model.layers.1.mlp.shared_expert"],
        ),
        (
            lambda: hf.Llama4ForCausalLM(
                hf.Llama4TextConfig(**SMALL, head_dim=8, num_local_experts=4, intermediate_size_mlp=64)
            ),
            ["model.layers.0.feed_forward.shared_expert", "model.layers.1.feed_forward.shared_expert"],
        ),
        (
            lambda: hf.Gemma4ForCausalLM(
                hf.Gemma4TextConfig(
                    **SMALL,
                    head_dim=8,
                    num_experts=4,
                    top_k_experts=2,
                    moe_intermediate_size=16,
                    enable_moe_block=True,
                )
            ),
            ["model.layers.0.mlp", "model.layers.1.mlp"],
        ),
    ],
    ids=["qwen2_moe", "llama4", "gemma4"],
)
def test_shared_experts_of_real_mixtures_are_found(make: Callable[[], nn.Module], names: list[str]) -> None:
    found = discover(make())
    assert [spec.name for spec in found.specs] == names
    assert len(found.skipped) == 2 and not any(DECIDES in refusal.reason for refusal in found.skipped)
