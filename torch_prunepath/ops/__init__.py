"""The operators ``torch.ops.prunepath``: schema, fake, CPU and default implementation, autograd."""

# Modules, not the functions of the same names: these two only have to be registered.
from torch_prunepath.ops import linears, sparse_ffn
from torch_prunepath.ops.experts import expand_experts, zero_inactive
from torch_prunepath.ops.operators import expert_down, expert_up, register_cuda, router_scores, select_experts

__all__ = [
    "expand_experts",
    "expert_down",
    "expert_up",
    "linears",
    "register_cuda",
    "router_scores",
    "select_experts",
    "sparse_ffn",
    "zero_inactive",
]
