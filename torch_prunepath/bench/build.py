"""Whole models for ``prunepath bench decode``: a dense one first, then the same one made sparse in place.

Shapes: D hidden size, E experts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_prunepath.bench.geometry import Geometry, resolve
from torch_prunepath.bench.layers import SCORE_SPREAD
from torch_prunepath.bench.options import DecodeOptions
from torch_prunepath.bench.sources import is_sparse_checkpoint, load_folder
from torch_prunepath.config import SparsifyConfig
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.conversion import densify, sparsify
from torch_prunepath.discover import find_ffns
from torch_prunepath.evaluation.models import longest_context
from torch_prunepath.inputs.data import evaluating
from torch_prunepath.layer import Routing
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.sparsity import register_routing_hook, set_tau

SCALING_TOKENS = 64
"""Random tokens on which the spread of routers' scores and the size of FFNs' outputs are measured. Each token also
averages over D or E, so few are enough; 64 is a guess."""

FFN_SHARE = 0.1
"""Size of the vector that one FFN of a model with random weights adds, relative to the embeddings. :func:`_calm` says
why it is far below 1; 0.1 is a guess."""


def build_dense(name: str, options: DecodeOptions) -> tuple[Any, str]:
    """Build or load the dense model on its device; also return a text that says where its weights come from.

    Raises:
        UserError: if the model cannot be loaded, or ``--layers`` is given for a folder.
    """
    found = resolve(name)
    if isinstance(found, Geometry):
        return _random(found, options), "random weights; random routers, scaled"
    if options.layers is not None:
        raise UserError(f"--layers works for geometries, not for models in folders ({found}): leave it out")
    model = load_folder(found, options.torch_dtype, options.torch_device)
    if is_sparse_checkpoint(found):
        return densify(model), "the model's own weights and routers; random prompts"
    return model, "the model's own weights; random routers, scaled; random prompts"


def make_sparse(name: str, model: Any, options: DecodeOptions) -> Any:
    """Return the sparse model at tau = 1: the dense one converted in place, or loaded again if it was saved sparse.

    Raises:
        ValueError: if no FFN of the dense model can be made sparse.
    """
    found = resolve(name)
    if isinstance(found, Path) and is_sparse_checkpoint(found):
        if options.include is not None or options.exclude is not None:
            raise UserError(f"{found} is sparse already: leave --include and --exclude out")
        model.to("meta")  # frees the dense one's memory
        model = load_folder(found, options.torch_dtype, options.torch_device)
        set_tau(model, 1.0)
        return model
    config = SparsifyConfig(
        expert_size=options.expert_size,
        partition="contiguous",
        router="zero",
        gate=options.gate,  # type: ignore[arg-type]
        budget="uniform",
    )
    with as_user_error(ValueError):
        sparsify(model, tau=1.0, config=config, include=options.include, exclude=options.exclude, progress=False)
    _randomise_routers(model, options.seed)
    return model


def random_ids(model: Any, batch: int, tokens: int, seed: int) -> Tensor:
    """Draw token ids, int64 ``[batch, tokens]``, on the model's device."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(size, (batch, tokens), generator=torch.Generator().manual_seed(seed)).to(model.device)


def _random(geometry: Geometry, options: DecodeOptions) -> Any:
    """Build a model directly on its device and in its dtype, so that there is never a second copy."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(options.seed)
    with torch.device(options.torch_device):
        model = AutoModelForCausalLM.from_config(
            geometry.config(options.layers), dtype=options.torch_dtype, attn_implementation="sdpa"
        )
    _calm(model)
    return model.eval()


@torch.no_grad()
def _calm(model: Any) -> None:
    """Scale the embeddings to unit variance, and each FFN so that it adds vectors of size ``FFN_SHARE`` to them.

    With the weights that transformers initialises, the output of each FFN is larger than the sum of all before it, to
    which it is added. If a rounding then makes another expert active, half of the next layer's choices change, and
    after some layers no two correct implementations agree.
    """
    embeddings = model.get_input_embeddings().weight
    embeddings.div_(embeddings.float().std())
    for spec in find_ffns(model):
        view = FFNView(model, spec)
        x_TD = torch.randn(SCALING_TOKENS, spec.hidden_size, device=embeddings.device, dtype=embeddings.dtype)
        size = (view.hidden(x_TD) @ view.down_FD).float().square().mean().sqrt()
        view.down_FD.mul_(FFN_SHARE / size)


@torch.no_grad()
def _randomise_routers(model: Any, seed: int) -> None:
    """Draw random router weights, and scale each layer's so that a token's scores spread by ``SCORE_SPREAD``."""
    layers = sparse_layers(model)
    generator = torch.Generator(model.device).manual_seed(seed)
    for layer in layers.values():
        layer.router.weight.normal_(0.0, 1 / math.sqrt(layer.ffn.hidden_size), generator=generator)
    spreads: dict[str, Tensor] = {}

    def measure(routing: Routing) -> None:
        spreads[routing.name] = routing.scores_TE.std(-1).mean()

    with evaluating(model), register_routing_hook(model, measure):
        model(input_ids=random_ids(model, 1, min(SCALING_TOKENS, longest_context(model)), seed), use_cache=False)
    for layer in layers.values():
        layer.router.weight.mul_((SCORE_SPREAD / spreads[layer.name]).to(layer.router.weight.dtype))
