"""``prunepath bench ffn``: one FFN at a time, dense and sparse, against the memory floor.

Several layers are called one after the other, so that none finds its weights in a cache. Times are per layer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_prunepath.bench import results as record
from torch_prunepath.bench.check import check_layer
from torch_prunepath.bench.layers import LAYOUTS, TimedFFN, Usage
from torch_prunepath.bench.options import FFNOptions
from torch_prunepath.bench.sources import Source, open_source
from torch_prunepath.bench.timing import Timing, Traffic, copy_bandwidth, peak_memory, ready, timed
from torch_prunepath.progress import progress_bar

CHECKED_LAYERS = 2
"""Number of layers whose outputs are compared: all are made alike, and float64 is slow. 2 is a guess."""

render = record.render


def run(options: FFNOptions, command_line: str = "") -> dict[str, Any]:
    """Check and time everything that the options ask for, and return the results, ready for JSON.

    Raises:
        ValueError: if a model cannot be loaded or has no FFN to time, or the output cannot be written.
        WrongResult: if an output is wrong.
    """
    bandwidth = copy_bandwidth(options.torch_device)
    results = record.begin("ffn", options, command_line, bandwidth)
    total = len(options.geometries) * len(options.tokens) * len(options.sparsities)
    with progress_bar(total=total, desc="bench ffn", unit="row", progress=None) as bar:
        for name in options.geometries:
            source = open_source(name, options)
            results["geometries"][source.name] = _about(source)
            for tokens in options.tokens:
                for row in _rows(source, tokens, options, bandwidth):
                    results["rows"].append(row)
                    record.announce(row)
                    bar.update()
            del source
            _free(options.torch_device)
    return record.finish(results, options.output)


def _about(source: Source) -> dict[str, Any]:
    layer = source.layers[0]
    return {
        "weights": source.weights,
        "routers": source.routers,
        "hidden_size": layer.up_FD.shape[1],
        "ffn_size": layer.ffn_size,
        "gated": layer.gate_FD is not None,
        "activation": layer.activation,
        "expert_size": layer.expert_size,
        "experts": len(layer.router_ED),
        "layers": len(source.layers),
    }


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def _rows(source: Source, tokens: int, options: FFNOptions, bandwidth: float) -> Any:
    """Yield a row for each sparsity."""
    device, layers = options.torch_device, source.layers
    inputs = source.inputs(tokens)

    def turn(call: Callable[[TimedFFN, Tensor], Tensor]) -> Callable[[], Any]:
        """Make a call that passes over all layers."""
        return lambda: [call(layer, x_TD) for layer, x_TD in zip(layers, inputs, strict=True)][-1]

    dense = {name: turn(lambda layer, x, name=name: layer.dense(x, name)) for name in LAYOUTS}  # type: ignore[misc]
    sparse = turn(TimedFFN.sparse)
    runs: dict[str, Any] = {}
    for sparsity in options.sparsities:
        for layer, x_TD in zip(layers, inputs, strict=True):
            layer.set_sparsity(x_TD, sparsity)
        error = _check(source, inputs, f"FFN of {source.name} at sparsity {sparsity:g}, {tokens} tokens")
        with peak_memory(device) as peak:
            sparse()
        if not runs:
            # A graph reads tau from the device: one serves every sparsity.
            runs = {name: ready(call, device) for name, call in (dense | {"sparse": sparse}).items()}
            layouts = timed({n: runs[n] for n in LAYOUTS}, device, calls=len(layers), seconds=options.seconds / 4)
            best = min(LAYOUTS, key=lambda name: layouts[name].median_us)
        pair = {"dense": runs[best], "sparse": runs["sparse"]}
        times = timed(pair, device, calls=len(layers), seconds=options.seconds)
        yield record.clean(
            {
                "geometry": source.name,
                "phase": "prefill" if tokens in options.prompt_lengths and tokens not in options.batches else "ffn",
                "device": options.device,
                "dtype": options.dtype,
                "batch": tokens,
                "tokens": tokens,
                "expert_size": layers[0].expert_size,
                "gate": "one" if layers[0].gate_offset is None else "sigmoid",
                "sparsity": sparsity,
                **_usage(layers, inputs, times, bandwidth),
                **_spreads(times),
                "dense_layouts_us": {name: timing.median_us for name, timing in layouts.items()},
                **peak.row(),
                "check_error": error,
            }
        )


def _check(source: Source, inputs: list[Tensor], what: str) -> float:
    """Check the outputs of the first layers, and return the largest error."""
    errors = []
    for layer, x_TD in list(zip(source.layers, inputs, strict=True))[:CHECKED_LAYERS]:
        sparse_TD = layer.sparse(x_TD)
        errors += [check_layer(layer, x_TD, layer.dense(x_TD, layout), sparse_TD, what) for layout in LAYOUTS]
    return max(errors)


def _usage(layers: list[TimedFFN], inputs: list[Tensor], times: dict[str, Timing], bandwidth: float) -> dict[str, Any]:
    """Return the realised sparsity on the inputs that were timed, and the times compared with the memory floor."""
    pairs = zip(layers, inputs, strict=True)
    usage = Usage.mean([Usage.of(layer.mask(x_TD), layer.expert_size, layer.ffn_size) for layer, x_TD in pairs])
    neurons, router = layers[0].neuron_bytes, layers[0].router_bytes
    traffic = Traffic(neurons, usage.union * neurons + router, bandwidth)
    return {
        "realised_sparsity": usage.sparsity,
        "union_share": usage.union,
        **traffic.row(times["dense"].median_us, times["sparse"].median_us),
    }


def _spreads(times: dict[str, Timing]) -> dict[str, float]:
    return {
        f"{side}_{key}": getattr(times[side], key)
        for side in ("dense", "sparse")
        for key in ("min_us", "iqr_us", "rounds")
    }
