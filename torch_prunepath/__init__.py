"""Routed sparsity for the feed-forward networks of Hugging Face models, with a run-time knob.

import torch_prunepath
torch_prunepath.sparsify(model, tau=0.9)
"""

from __future__ import annotations

# Last: makes transformers' from_pretrained know sparse checkpoints.
import torch_prunepath.integrations.transformers  # noqa: F401
from torch_prunepath.checkpoint import load
from torch_prunepath.config import FFNSpec, SparsifyConfig
from torch_prunepath.conversion import densify, sparsify
from torch_prunepath.discover import find_ffns
from torch_prunepath.experts.fit import fit_routers
from torch_prunepath.layer import Routing
from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.ops.cpu.packs import Packs
from torch_prunepath.sparsity import record_sparsity, register_routing_hook, set_sparsity, set_tau

__version__ = "0.1.0"

__all__ = [
    "FFNSpec",
    "Packs",
    "Routing",
    "SparsifyConfig",
    "densify",
    "find_ffns",
    "fit_routers",
    "load",
    "record_sparsity",
    "register_routing_hook",
    "set_sparsity",
    "set_tau",
    "sparse_layers",
    "sparsify",
]
