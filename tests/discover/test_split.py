"""FFNs inside a module whose forward does more, wrapped forwards, and FFNs that are sparse already."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F
from architectures import Gated, Stack
from torch import Tensor, nn

from torch_prunepath import SparsifyConfig, sparsify
from torch_prunepath.discover import find_ffns


def wrapped(module: nn.Module) -> nn.Module:
    """As hooks of other libraries do it: a function around the module's own ``forward``."""
    module.forward = functools.update_wrapper(partial(type(module).forward, module), module.forward)
    return module


class PreNorm(nn.Module):
    """Norm, FFN and residual connection in one module, the FFN's layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.layers = nn.ModuleList([nn.Linear(16, 37), nn.Linear(37, 16)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers[1](F.gelu(self.layers[0](self.norm(x))))


class TwoParts(nn.Module):
    """Attention whose results must be unpacked and added to a tuple, then an FFN with dropout by function call."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v, mask)), k, v

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc1, self.fc2 = self.Attention(), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, ...]:
        attended = self.attention(x, mask)
        x, _, _ = attended
        batch, tokens, width = x.shape
        h = F.relu(self.fc1(x.reshape(-1, width)))
        h = F.dropout(h, 0.3, self.training)
        return (x + self.fc2(h).view(batch, tokens, width), *attended[1:])


class OldTwoParts(TwoParts):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 37), nn.Linear(37, 16)

    def forward(self, x: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, ...]:
        attended = self.attention(x, mask)
        return (self.fc2(F.relu(self.fc1(attended[0]))),) + attended[1:]  # noqa: RUF005


SPLIT: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str, str]]]] = {
    "pre_norm": (PreNorm, [("layers", "0", "1")]),
    "called_dropout": (TwoParts, [("", "fc1", "fc2")]),
    "tuple_of_results": (OldTwoParts, [("", "fc1", "fc2")]),
    "deep": (
        lambda: nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in [(16, 37), (37, 16)] * 2)),
        [("", "0.0", "1.0"), ("", "2.0", "3.0")],
    ),
    "square_chain": (
        lambda: nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU()))),
        [("", "0", "2"), ("", "4", "6")],
    ),
    "wrapped_forward": (lambda: wrapped(PreNorm()), [("layers", "0", "1")]),
    "decoder_layer": (lambda: nn.TransformerDecoderLayer(16, 4, 37), [("", "linear1", "linear2")]),
}


@pytest.mark.parametrize(("make", "parts"), SPLIT.values(), ids=SPLIT)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_split_inside_a_larger_forward(
    make: Callable[[], nn.Module], parts: list[tuple[str, str, str]], training: bool
) -> None:
    specs = find_ffns(make().train(training))
    assert [(spec.name, spec.up, spec.down) for spec in specs] == parts
    assert all(spec.split and not spec.gated for spec in specs)


def test_whole_with_a_wrapped_forward_is_refused() -> None:
    with pytest.raises(ValueError, match="wrapped on the instance"):
        find_ffns(wrapped(Gated(16, 37, True)))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_sparse_ffns_are_refused(split: bool) -> None:
    model = Stack(PreNorm() if split else Gated(16, 37, True))
    config = SparsifyConfig(partition="contiguous", router="zero", budget="uniform")
    sparsify(model, config=config, progress=False)
    with pytest.raises(ValueError, match=r"is sparse already"):
        find_ffns(model)
