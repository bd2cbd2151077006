"""The passes over linear layers and attention of one token: graphs of a CUDA device that need not be there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from torch_prunepath.compile.passes import run_passes
from torch_prunepath.ops.linears import linears

aten = torch.ops.aten
NAMES = ("fuse_linears", "share_heads")


def trace(function: Callable[..., Any], inputs: Sequence[Tensor], device: str = "cuda") -> fx.GraphModule:
    """The function's graph, its nodes said to be on the device."""
    mode = FakeTensorMode()
    fake = [mode.from_tensor(tensor) for tensor in inputs]
    with torch.no_grad(), mode, enable_python_dispatcher():
        graph = make_fx(function, select_decomp_table())(*fake)
    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map_only(Tensor, lambda t: placed(mode, t, device), node.meta["val"])
    return graph


def placed(mode: FakeTensorMode, tensor: Tensor, device: str) -> FakeTensor:
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, like, torch.device(device, 0 if device == "cuda" else None))


def fused(function: Callable[..., Any], inputs: Sequence[Tensor], **how: Any) -> list[int]:
    """How many layers each call of ``linears`` has after the pass; the results must stay what they were."""
    training = how.pop("training", False)
    graph = trace(function, inputs, **how)
    run_passes(graph.graph, NAMES, training)
    graph.recompile()
    torch.testing.assert_close(graph(*inputs), function(*inputs))
    return [len(node.args[1]) for node in graph.graph.find_nodes(op="call_function", target=linears._opoverload)]


def half(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attention_layer(x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, o: Tensor) -> Any:
    """Three projections of one token, one of them with a bias, and another of what comes of them."""
    y = nnf.linear(x, q, bias) * nnf.linear(x, k).sum() + nnf.linear(x, v).sum()
    return nnf.linear(y.tanh(), o)


ROWS = [half(32, 16), half(8, 16), half(24, 16), half(32), half(16, 32)]


@pytest.mark.parametrize("x", [half(1, 16), half(1, 1, 16)], ids=["flat", "batched"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_that_read_one_token_become_one_call(x: Tensor, dtype: torch.dtype) -> None:
    assert fused(attention_layer, [t.to(dtype) for t in (x, *ROWS)]) == [3, 1]


def test_a_bias_may_come_with_the_product() -> None:
    inputs = [half(1, 16), half(48, 16), half(48), half(8, 16)]
    assert fused(lambda x, w, b, v: (torch.addmm(b, x, w.t()), x @ v.t()), inputs) == [2]


def test_at_most_three_at_once() -> None:
    weights = [half(8 + i, 16) for i in range(4)]
    assert fused(lambda x, *ws: [nnf.linear(x, w) for w in ws], [half(1, 16), *weights]) == [3, 1]


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x, w: nnf.linear(x, w), [half(2, 16), half(8, 16)]),
        (lambda x, w: nnf.linear(x, w), [half(1, 16, dtype=torch.float32), half(8, 16, dtype=torch.float32)]),
        (lambda x, w: nnf.linear(x, w * 2), [half(1, 16), half(8, 16)]),
        (lambda x, w: x @ w, [half(1, 16), half(16, 32)]),
        (lambda x, w: x @ w, [half(1, 16), half(32, 32)[::2, ::4]]),
        (lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2.0), [half(1, 16), half(8, 16), half(8)]),
        (lambda x, w, b: torch.addmm(b, x, w.t()), [half(1, 16), half(8, 16), half(1, 8)]),
    ],
    ids=["two tokens", "float32", "computed weight", "columns", "strided weight", "scaled", "bias a row"],
)
def test_others_are_left(function: Callable[..., Any], inputs: list[Tensor]) -> None:
    assert fused(function, inputs) == []


def test_only_inference_on_cuda() -> None:
    assert fused(attention_layer, [half(1, 16), *ROWS], training=True) == []
    assert fused(attention_layer, [half(1, 16), *ROWS], device="cpu") == []


# --- share_heads ------------------------------------------------------------------------------------------------------


def repeat(kv: Tensor, times: int) -> Tensor:
    """As transformers does it."""
    B, H, L, D = kv.shape
    return kv[:, :, None].expand(B, H, times, L, D).reshape(B, H * times, L, D)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]


def heads_read(function: Callable[..., Any], queries: int = 1, training: bool = False) -> list[int]:
    """How many heads of keys and values attention reads after the pass."""
    graph = trace(function, [half(2, 6, queries, 8), half(2, 3, 10, 8), half(2, 3, 10, 8)])
    run_passes(graph.graph, NAMES, training)
    node = graph.graph.find_nodes(op="call_function", target=aten._scaled_dot_product_cudnn_attention.default)[0]
    return [node.args[i].meta["val"].shape[1] for i in (1, 2)]


def test_repeated_heads_are_read_as_they_are() -> None:
    assert heads_read(lambda q, k, v: attend(q, repeat(k, 2), repeat(v, 2))) == [3, 3]


def test_slices_that_leave_nothing_out_are_passed() -> None:
    def sliced(kv: Tensor) -> Tensor:
        wide = aten.slice.Tensor(aten.unsqueeze.default(aten.slice.Tensor(kv, 0, 0, 2**62), 2), 3, 0, 2**62)
        return wide.expand(2, 3, 2, 10, 8).reshape(2, 6, 10, 8)

    assert heads_read(lambda q, k, v: attend(q, sliced(k), sliced(v))) == [3, 3]


def test_heads_that_are_no_repeats_stay() -> None:
    tiled = lambda q, k, v: attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))  # noqa: E731
    assert heads_read(tiled) == [6, 6]
    assert heads_read(lambda q, k, v: attend(q, repeat(k, 2), repeat(v, 2) + 1)) == [6, 6]
    assert heads_read(lambda q, k, v: attend(q, k[:, :, None, :5].expand(2, 3, 4, 5, 8).reshape(2, 6, 10, 8), v)) != [
        3,
        3,
    ]
    assert heads_read(lambda q, k, v: attend(q, repeat(k, 2), repeat(v, 2)), training=True) == [6, 6]
    assert heads_read(lambda q, k, v: attend(q, repeat(k, 2), repeat(v, 2)), queries=4) == [6, 6]
