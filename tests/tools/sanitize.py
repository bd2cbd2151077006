"""A few calls of every kernel at odd sizes: ``compute-sanitizer --tool memcheck python tests/tools/sanitize.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_prunepath.csrc_triton import ffn
from torch_prunepath.csrc_triton.divergence import divergence
from torch_prunepath.weights import FFNWeights, Selector, Thresholds, UpWeights

D, F, S, E = 50, 101, 12, 9


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def run(tokens: int) -> None:
    x, tau = random(tokens, D), torch.tensor(0.5, device="cuda")
    weights = FFNWeights(random(F, D), random(F), random(F, D), random(F), random(F, D), random(D))
    norm_D, norm_F = torch.rand(D, device="cuda"), torch.rand(F, device="cuda")
    thresholds = Thresholds.of(tau, norm_D, tau, norm_F)
    for router_norm, shared in ((False, 0), (True, 2)):
        selector = Selector(random(E, D), random(E), tau, "reach", 0.3, router_norm, shared)
        ffn.sparse_ffn(x, selector, weights, "silu", S)
        ffn.sparse_ffn(x, selector, weights, "silu", S, thresholds)
    mask = torch.rand(tokens, E, device="cuda") < 0.5
    h = ffn.expert_up(x, mask, UpWeights(weights.up_FD), "none", S)
    ffn.expert_down(h, mask, None, weights.down_FD, None, S)
    h = ffn.expert_up(x, mask, UpWeights(weights.up_FD), "none", S, thresholds.inputs)
    ffn.expert_down(h, mask, None, weights.down_FD, None, S, thresholds.neurons)
    ffn.linears(x[:1], [weights.up_FD.t(), random(D, F)], [weights.up_bias_F, None])
    divergence(random(tokens, 5001), random(tokens, 5001), torch.rand(tokens, device="cuda"), 2.0, True)


if __name__ == "__main__":
    torch.manual_seed(0)
    for tokens in (1, 3, 20):
        for _ in range(2):
            run(tokens)
    torch.cuda.synchronize()
    print("ran")
