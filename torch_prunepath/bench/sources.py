"""The layers that ``prunepath bench ffn`` times for one name, and the inputs that they receive.

Shapes: N tokens to draw from, T tokens, D hidden size.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.bench.geometry import Geometry, resolve
from torch_prunepath.bench.layers import SCORE_SPREAD, TimedFFN, random_layer
from torch_prunepath.bench.options import FFNOptions
from torch_prunepath.bench.timing import cache_bytes, free_bytes
from torch_prunepath.checkpoint import load
from torch_prunepath.config import Rule, num_experts
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.discover import find_ffns
from torch_prunepath.evaluation.corpus import load_corpus, windows
from torch_prunepath.evaluation.models import longest_context
from torch_prunepath.inputs.data import evaluating
from torch_prunepath.inputs.front import front_tokens
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.manifest import METHOD
from torch_prunepath.layer.views import sparse_views
from torch_prunepath.progress import progress_bar

CACHES = 4
"""Bytes that one pass over the layers reads at the highest sparsity, as a multiple of the last cache's size. It must be
above 1, so that a layer's weights have left the cache when the layer is called again; 4 is a guess."""

MEMORY_SHARE = 0.4
"""Largest share of the free memory for the layers of one geometry: inputs, outputs and graphs need the rest. 0.4 is a
guess."""

CPU_BYTES = 4 << 30
"""Largest number of bytes of the layers of one geometry on CPUs: random weights for more would take minutes to draw."""

WINDOW = 256
"""Tokens of text that a model reads at once to give its layers' inputs. A guess."""

RANDOM_WEIGHTS = (
    "random weights N(0, 1/fan-in), random inputs N(0, 1), random routers whose scores have a standard "
    f"deviation of {SCORE_SPREAD:g}"
)


@dataclass(frozen=True)
class Source:
    """Layers to time, and inputs for them.

    Attributes:
        name: name of the geometry or folder.
        weights: a text that says where weights, inputs and routers come from.
        routers: ``"random"`` or ``"own"``.
        layers: layers in the order in which a timed pass calls them.
        pools: inputs of each layer to choose from, ``[N, D]``.
    """

    name: str
    weights: str
    routers: str
    layers: list[TimedFFN]
    pools: list[Tensor]

    def inputs(self, tokens: int) -> list[Tensor]:
        """Choose ``tokens`` inputs of each layer, ``[T, D]``, evenly spread over its pool."""
        # From the middle of equal parts: the first token of a text is unlike all others.
        available = len(self.pools[0])
        picks = [(2 * i + 1) * available // (2 * tokens) for i in range(tokens)]
        return [pool[picks].contiguous() for pool in self.pools]


def open_source(name: str, options: FFNOptions) -> Source:
    """Make the layers of a geometry, or load those of a model's folder.

    Raises:
        UserError: if ``name`` is neither a geometry nor a model's folder, or the model cannot be loaded.
        ValueError: if the model has no FFN to time.
    """
    found = resolve(name)
    return _random(found, options) if isinstance(found, Geometry) else _own(found, options)


def layers_wanted(layer: TimedFFN, options: FFNOptions) -> int:
    """Return how many layers a pass needs to exceed the caches.

    It is at least 2, and otherwise no more than memory has room for. ``--layers`` overrides it.
    """
    if options.layers is not None:
        return options.layers
    device = options.torch_device
    active = (1 - max(options.sparsities)) * layer.neuron_bytes + layer.router_bytes
    stored = layer.neuron_bytes + layer.down_DF.nbytes + layer.router_bytes
    room = MEMORY_SHARE * free_bytes(device)
    if device.type == "cpu":
        room = min(room, CPU_BYTES)
    return max(2, min(math.ceil(CACHES * cache_bytes(device) / active), int(room / stored)))


# --- random -----------------------------------------------------------------------------------------------------------


def _random(geometry: Geometry, options: FFNOptions) -> Source:
    device, dtype = options.torch_device, options.torch_dtype

    def layer(index: int) -> TimedFFN:
        return random_layer(geometry, dtype, device, options.expert_size, options.gate, options.seed + index)

    first = layer(0)
    count = layers_wanted(first, options)
    rest = progress_bar(
        range(1, count), desc=f"{geometry.name}: random layers", unit="layer", progress=None, leave=False
    )
    generator = torch.Generator(device).manual_seed(options.seed)
    pool_ND = torch.randn(max(options.tokens), geometry.hidden_size, device=device, generator=generator).to(dtype)
    return Source(geometry.name, RANDOM_WEIGHTS, "random", [first, *map(layer, rest)], [pool_ND] * count)


# --- a model's own ----------------------------------------------------------------------------------------------------


def is_sparse_checkpoint(folder: Path) -> bool:
    """Whether the folder's configuration says that the model was made by ``sparsify``.

    Raises:
        UserError: if the configuration cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}): save the model again") from error
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def load_folder(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the model in a folder, dense or sparse, in evaluation mode on the device.

    Raises:
        UserError: if the model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    sparse = is_sparse_checkpoint(folder)
    with as_user_error(OSError):
        model: Any = load(folder, dtype=dtype) if sparse else AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval()


def _own(folder: Path, options: FFNOptions) -> Source:
    model = load_folder(folder, options.torch_dtype, options.torch_device)
    sparse = is_sparse_checkpoint(folder)
    views = list(sparse_views(model).values()) if sparse else [FFNView(model, spec) for spec in find_ffns(model)]
    shape = views[0].spec.hidden_size, views[0].spec.ffn_size
    views = [view for view in views if (view.spec.hidden_size, view.spec.ffn_size) == shape]
    ids, front, text = _token_ids(folder, model, max(options.tokens))
    count = min(len(views), layers_wanted(_layer(views[0], options), options))
    views = [views[i] for i in torch.linspace(0, len(views) - 1, count).round().long().tolist()]
    pools = _receive(model, views, ids, front)
    layers = [_layer(view, options) for view in views]
    if not sparse:
        layers = [_spread(layer, pool) for layer, pool in zip(layers, pools, strict=True)]
    what = "its own routers" if sparse else f"random routers scaled to scores of standard deviation {SCORE_SPREAD:g}"
    weights = f"the model's own weights, layers' inputs on {text}, {what}"
    return Source(str(folder), weights, "own" if sparse else "random", layers, pools)


def _token_ids(folder: Path, model: Any, tokens: int) -> tuple[Tensor, int, str]:
    """Return windows ``[B, C]``, how many tokens at the start of each are context only, and where the ids come from.

    The other tokens are at least ``tokens`` in all.
    """
    length = min(WINDOW, longest_context(model))
    rows = -(-max(tokens, WINDOW) // length)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        size = model.config.get_text_config().vocab_size
        ids_BC = torch.randint(size, (rows, length), generator=torch.Generator().manual_seed(0))
        return ids_BC, 0, "random token ids (the folder has no tokenizer)"
    from transformers import AutoTokenizer

    with as_user_error(OSError):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus, front = load_corpus(), front_tokens(tokenizer)
    rows = -(-max(tokens, WINDOW) // max(1, length - front))
    ids_BC = windows(corpus.held_out, tokenizer, context=length, count=rows, part="held-out text")
    available = ids_BC[:, front:].numel()
    if available < tokens:
        raise UserError(f"{corpus.name} has {available} held-out tokens, not {tokens}: ask for smaller batches")
    return ids_BC, front, corpus.name


def _receive(model: Any, views: list[FFNView], ids_BC: Tensor, front: int) -> list[Tensor]:
    """Record the inputs of each FFN while the model reads the windows, ``[N, D]`` each, without tokens in front."""
    received: dict[str, list[Tensor]] = {view.site: [] for view in views}

    def watch(site: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            received[site].append(x.reshape(-1, x.shape[-1])[front:].clone())

        return hook

    handles = [
        model.get_submodule(view.site).register_forward_pre_hook(watch(view.site), with_kwargs=True) for view in views
    ]
    try:
        with evaluating(model):
            for ids_C in ids_BC.to(model.device):
                model(input_ids=ids_C[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(received[view.site]) for view in views]


@torch.no_grad()
def _layer(view: FFNView, options: FFNOptions) -> TimedFFN:
    """Take an FFN out of a model, with its own router if it is sparse, else with a random one of weights N(0, 1)."""
    site = view.up if view.spec.split else view.owner
    up_FD, gate_FD, down_FD = view.up_FD, view.gate_FD, view.down_FD.contiguous()
    device, dtype = up_FD.device, up_FD.dtype
    rule: Rule = "reach"
    size, offset = options.expert_size, None if options.gate == "one" else 0.0
    router_norm, shared = False, 0
    if isinstance(site, RoutedExperts):
        experts = site.experts
        size, rule, offset = experts.expert_size, experts.rule, None if experts.gate == "one" else experts.gate_offset
        router_ED, router_bias_E = site.router.weight, site.router.bias
        router_norm, shared = site.router_norm, experts.shared
    else:
        generator = torch.Generator(device).manual_seed(options.seed)
        shape = num_experts(view.spec.ffn_size, size), view.spec.hidden_size
        router_ED = torch.randn(shape, generator=generator, device=device).to(dtype)
        router_bias_E = None
    return TimedFFN(
        up_FD=up_FD.detach().contiguous(),
        up_bias_F=_detached(view.up_bias_F),
        gate_FD=None if gate_FD is None else gate_FD.detach().contiguous(),
        gate_bias_F=_detached(view.gate_bias_F),
        down_FD=down_FD.detach(),
        down_bias_D=_detached(view.down_bias_D),
        down_DF=down_FD.detach().t().contiguous(),
        router_ED=router_ED.detach(),
        router_bias_E=_detached(router_bias_E),
        tau=torch.ones((), device=device),
        rule=rule,
        gate_offset=offset,
        activation=view.spec.activation,
        expert_size=size,
        router_norm=router_norm,
        shared=shared,
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _spread(layer: TimedFFN, x_ND: Tensor) -> TimedFFN:
    """Scale the random router of a layer so that the scores of a token spread by ``SCORE_SPREAD`` over the experts."""
    spread = (x_ND.float() @ layer.router_ED.float().t()).std(-1).mean()
    return replace(layer, router_ED=layer.router_ED * (SCORE_SPREAD / spread).to(layer.router_ED.dtype))
