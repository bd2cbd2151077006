"""Routed sparsity for the feed-forward networks of Hugging Face models, with a run-time knob.

Example::

    import torch_prunepath

    torch_prunepath.sparsify(model, tau=0.9)

Public names are imported when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_prunepath.on_import import on_import

if TYPE_CHECKING:  # what _HOMES says, for type checkers and editors
    from torch_prunepath.checkpoint import load
    from torch_prunepath.config import FFNSpec, SparsifyConfig
    from torch_prunepath.conversion import densify, sparsify
    from torch_prunepath.discover import find_ffns
    from torch_prunepath.experts.fit import fit_routers
    from torch_prunepath.layer import Routing
    from torch_prunepath.layer.layout import contiguous, neuron_major
    from torch_prunepath.layer.manifest import Manifest
    from torch_prunepath.layer.rebuild import rebuild
    from torch_prunepath.layer.saving import describe
    from torch_prunepath.layer.views import sparse_layers
    from torch_prunepath.ops.cpu.packs import Packs
    from torch_prunepath.sparsity import record_sparsity, register_routing_hook, set_sparsity, set_tau

__version__ = "0.1.0"

__all__ = [
    "FFNSpec",
    "Manifest",
    "Packs",
    "Routing",
    "SparsifyConfig",
    "contiguous",
    "densify",
    "describe",
    "find_ffns",
    "fit_routers",
    "load",
    "neuron_major",
    "rebuild",
    "record_sparsity",
    "register_routing_hook",
    "set_sparsity",
    "set_tau",
    "sparse_layers",
    "sparsify",
]

_HOMES = {
    "FFNSpec": "config",
    "Manifest": "layer.manifest",
    "Packs": "ops.cpu.packs",
    "Routing": "layer",
    "SparsifyConfig": "config",
    "contiguous": "layer.layout",
    "densify": "conversion",
    "describe": "layer.saving",
    "find_ffns": "discover",
    "fit_routers": "experts.fit",
    "load": "checkpoint",
    "neuron_major": "layer.layout",
    "rebuild": "layer.rebuild",
    "record_sparsity": "sparsity",
    "register_routing_hook": "sparsity",
    "set_sparsity": "sparsity",
    "set_tau": "sparsity",
    "sparse_layers": "layer.views",
    "sparsify": "conversion",
}
"""The module below this package that defines each public name. No module may have the name of another's function."""

_ROOMS = (
    *("activations", "card", "checkpoint", "config", "conversion", "discover", "experts", "inputs", "integrations"),
    *("layer", "ops", "rms", "select", "sparsity"),
)
"""Modules that are attributes of the package without an import of their own."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return found
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


# In a checkout, the two packages that an installation has inside this folder lie beside it. Python finds this folder
# before an installation when it is started in the repository's root, and has to find those two as well.
_HERE = Path(__file__).parent
_APART = ("csrc_triton", "integrations")
if all((_HERE.parent / name / "__init__.py").is_file() and not (_HERE / name).exists() for name in _APART):
    __path__.append(str(_HERE.parent))

# Makes from_pretrained know sparse checkpoints. This module of transformers takes a second to import, and it is there
# whenever a model class is.
on_import("transformers.quantizers.auto", lambda: importlib.import_module("torch_prunepath.integrations.transformers"))
on_import(
    "transformers.modeling_utils",
    lambda: importlib.import_module("torch_prunepath.integrations.transformers_saving").install(),
)
if "torch" in sys.modules:
    importlib.import_module("torch_prunepath.ops")  # registers torch.ops.prunepath
